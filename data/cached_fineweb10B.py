"""Fetch FineWeb's first ten billion tokens, or a part of them, from the Hub.

    python data/cached_fineweb10B.py [N]     # the validation shard and the first N training shards

N is 9 by default and 103 at most. The text comes as GPT-2 tokens in shards of 100 million, which land in
data/fineweb10B/. Whole ones are skipped and broken downloads go on where they stopped, so the same command
repairs and extends what is there. HF_ENDPOINT and HF_TOKEN work as elsewhere. The source is the dataset
kjj0/fineweb10B-gpt2.
"""

import argparse
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAIN_SHARDS = 103
SHARD_BYTES = 256 * 4 + 100_000_000 * 2  # header and tokens
AT_ONCE = 4


def is_whole(path: Path) -> bool:
    """Whether a shard is there with as many tokens as its header says."""
    if not path.exists():
        return False
    header = np.fromfile(path, "<i4", 3)
    return len(header) == 3 and header[0] == 20240520 and path.stat().st_size == 256 * 4 + 2 * int(header[2])


def fetch(path: Path):
    """Download one shard, under a temporary name until it is whole; a part that is there already is kept."""
    url = hf_hub_url(REPOSITORY, path.name, repo_type="dataset")
    headers = build_hf_headers()
    size = get_hf_file_metadata(url, headers=headers).size
    partial = path.with_suffix(".partial")
    if partial.exists() and size is not None and partial.stat().st_size > size:
        partial.unlink()
    with open(partial, "ab") as file:
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=headers,
            expected_size=size,
            displayed_filename=path.name,
        )
    if not is_whole(partial):
        partial.unlink()
        raise OSError("what came is not a whole shard, and was removed")
    os.replace(partial, path)


def fail(message: str) -> int:
    """Say what went wrong in one line; returns the exit code."""
    print(f"data/cached_fineweb10B.py: {message}", file=sys.stderr, flush=True)
    return 1


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line."""

    def error(self, message: str):
        sys.exit(f"data/cached_fineweb10B.py: {message}; give one number, 1 to {TRAIN_SHARDS}")


def wanted_shards() -> int:
    """The number of training shards that the command line asks for; ends the program for a bad one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = f"training shards, 1 to {TRAIN_SHARDS} [9]"
    parser.add_argument("shards", nargs="?", type=int, default=9, metavar="N", help=text)
    wanted = parser.parse_args().shards
    if not 1 <= wanted <= TRAIN_SHARDS:
        parser.error(f"{wanted} training shards do not exist")
    return wanted


def main() -> int:
    """Fetch the shards that are missing; returns the exit code."""
    wanted = wanted_shards()
    folder = Path(__file__).parent / "fineweb10B"
    folder.mkdir(parents=True, exist_ok=True)
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, wanted + 1)]
    missing = [folder / name for name in names if not is_whole(folder / name)]
    partials = [path.with_suffix(".partial") for path in missing]
    need = len(missing) * SHARD_BYTES - sum(path.stat().st_size for path in partials if path.exists())
    free = shutil.disk_usage(folder).free
    if need > free:
        return fail(
            f"{folder} needs {need / 1e9:.1f} GB more and the disk has {free / 1e9:.1f} GB free; free some or"
            " ask for fewer shards"
        )
    with ThreadPoolExecutor(AT_ONCE) as pool:
        downloads = {pool.submit(fetch, path): path for path in missing}
        try:
            for download in as_completed(downloads):
                download.result()
        except KeyboardInterrupt:
            fail("stopped; the same command goes on from here")
            os._exit(130)  # the threads would finish their downloads first
        except Exception as error:  # whatever the network, the Hub or the disk has to say
            pool.shutdown(wait=False, cancel_futures=True)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            fail(
                f"{downloads[download].name} could not be fetched from {constants.ENDPOINT} ({lines[0]}); the"
                " same command goes on from here"
            )
            os._exit(1)
    print(f"{folder}: {len(names)} shards are whole, {len(missing)} of them new")
    return 0


if __name__ == "__main__":
    sys.exit(main())
