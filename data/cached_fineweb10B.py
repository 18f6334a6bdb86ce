"""Fetch FineWeb's first ten billion tokens, or a part of them, from the Hub.

    python data/cached_fineweb10B.py [N]             # the validation shard and the first N training shards
    python data/cached_fineweb10B.py --verify [N]    # also check those that are there already

N is 9 by default and 103 at most. The text comes as GPT-2 tokens in shards of 100 million, which land in
data/fineweb10B/. Each must have the SHA-256 that the Hub names. Whole ones are skipped and broken downloads
go on where they stopped, so the same command repairs and extends what is there. HF_ENDPOINT and HF_TOKEN work
as elsewhere. The source is the dataset kjj0/fineweb10B-gpt2.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import signal
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

REPOSITORY = "kjj0/fineweb10B-gpt2"
TRAIN_SHARDS = 103
SHARD_BYTES = 256 * 4 + 100_000_000 * 2  # header and tokens
AT_ONCE = 4
WAITS = (2, 4, 8)  # s, before a download is tried again


class FetchError(Exception):
    """A shard could not be fetched: the text is one line that says why."""


class Source(NamedTuple):
    """A shard on the Hub: its size is in bytes, its SHA-256 in hexadecimal."""

    url: str
    headers: dict
    size: int | None
    sha256: str


def say(message: str):
    """One line on stderr."""
    print(f"data/cached_fineweb10B.py: {message}", file=sys.stderr, flush=True)


def is_whole(path: Path) -> bool:
    """Whether a shard is there with as many tokens as its header says."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        header = file.read(12)
    if len(header) < 12:
        return False
    magic, _, tokens = struct.unpack("<3i", header)
    return magic == 20240520 and path.stat().st_size == 256 * 4 + 2 * tokens


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_the_disk(error: Exception) -> bool:
    """Whether an error is the file system's; those of the Hub and the network have no number."""
    return isinstance(error, OSError) and error.errno is not None


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    if of_the_disk(error):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def fetching(path: Path) -> Iterator[None]:
    """Turn whatever the network, the Hub or the disk has to say into a FetchError that names the shard."""
    try:
        yield
    except Exception as error:
        source = "" if of_the_disk(error) else f" from {os.environ.get('HF_ENDPOINT', 'the Hub')}"
        raise FetchError(f"{path.name} could not be fetched{source} ({first_line(error)})") from error


def find(path: Path) -> Source:
    """Ask the Hub for a shard's size and SHA-256; the library tries again where that may help."""
    # Imported late: it takes half a second, and --help and a look at whole shards do without.
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    with fetching(path):
        url = hf_hub_url(REPOSITORY, path.name, repo_type="dataset")
        headers = build_hf_headers()
        metadata = get_hf_file_metadata(url, headers=headers, retry_on_errors=True)
        if len(metadata.etag or "") != 64:
            raise ValueError("it names no SHA-256")
        return Source(url, headers, metadata.size, metadata.etag)


def download(partial: Path, source: Source):
    """Go on with a partial file until it has its size.

    The library itself tries again after a 429, as its Retry-After says, and after most breaks. What it raises
    at once, such as a 5xx or a reset, is tried again here.
    """
    from huggingface_hub.file_download import http_get

    name = partial.with_suffix(".bin").name
    for wait in (*WAITS, None):
        try:
            with open(partial, "ab") as file:
                http_get(
                    source.url,
                    file,
                    resume_size=file.tell(),
                    headers=source.headers,
                    expected_size=source.size,
                    displayed_filename=name,
                )
            return
        except Exception as error:
            response = getattr(error, "response", None)
            refused = response is not None and response.status_code < 500
            if wait is None or refused or of_the_disk(error):
                raise
            say(f"{name}: {first_line(error)}; trying again in {wait} s")
            time.sleep(wait)


def fetch(path: Path, source: Source) -> bool:
    """Bring one shard to the Hub's SHA-256; returns whether it had to be downloaded.

    Until it has it, it has a temporary name; a part that is there already is kept.
    """
    with fetching(path):
        if is_whole(path):
            if sha256(path) == source.sha256:
                return False
            say(f"{path.name} is damaged, as its SHA-256 is not the Hub's; fetching it again")
            path.unlink()
        partial = path.with_suffix(".partial")
        if partial.exists() and source.size is not None and partial.stat().st_size > source.size:
            partial.unlink()
        for first in (True, False):
            download(partial, source)
            if is_whole(partial) and sha256(partial) == source.sha256:
                os.replace(partial, path)
                return True
            partial.unlink()
            if first:
                say(f"{path.name} came damaged, as its SHA-256 is not the Hub's; fetching it again")
        raise ValueError("what came, twice, is not a whole shard of the Hub's SHA-256, and was removed")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process fetches into the folder. A process that is killed gives its lock back."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another fetch into {folder} is at work; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch_all(folder: Path, paths: list[Path]) -> int:
    """Fetch or check these shards, several at once; returns how many were downloaded."""
    absent = [path for path in paths if not is_whole(path)]
    partials = [path.with_suffix(".partial") for path in absent]
    need = len(absent) * SHARD_BYTES - sum(path.stat().st_size for path in partials if path.exists())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise FetchError(
            f"{folder} needs {need / 1e9:.1f} GB more and the disk has {free / 1e9:.1f} GB free; free some or"
            " ask for fewer shards"
        )
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            fetches = [pool.submit(fetch, path, find(path)) for path in paths]
            return sum(done.result() for done in as_completed(fetches))
        except FetchError as error:
            say(f"{error}; the same command goes on from here")
            os._exit(1)  # the other threads would finish their downloads first


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line."""

    def error(self, message: str):
        sys.exit(f"data/cached_fineweb10B.py: {message}; give one number, 1 to {TRAIN_SHARDS}, or --verify")


def parse_arguments() -> argparse.Namespace:
    """The number of training shards and whether to verify; ends the program for a bad command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = f"training shards, 1 to {TRAIN_SHARDS} [9]"
    parser.add_argument("shards", nargs="?", type=int, default=9, metavar="N", help=text)
    text = "also check the SHA-256 of shards that are there; a wrong one is fetched again"
    parser.add_argument("--verify", action="store_true", help=text)
    arguments = parser.parse_args()
    if not 1 <= arguments.shards <= TRAIN_SHARDS:
        parser.error(f"{arguments.shards} training shards do not exist")
    return arguments


def stop(*_):
    """Ctrl-C: one line, and no wait for the threads. What they wrote is kept."""
    os.write(2, b"data/cached_fineweb10B.py: stopped; the same command goes on from here\n")
    os._exit(130)


def main() -> int:
    """Fetch the shards that are missing, and check the others if asked to; returns the exit code."""
    signal.signal(signal.SIGINT, stop)
    arguments = parse_arguments()
    folder = Path(__file__).parent / "fineweb10B"
    names = ["fineweb_val_000000.bin"] + [
        f"fineweb_train_{i:06d}.bin" for i in range(1, arguments.shards + 1)
    ]

    def wanted() -> list[Path]:
        return [folder / name for name in names if arguments.verify or not is_whole(folder / name)]

    new = 0
    try:
        if wanted():
            folder.mkdir(parents=True, exist_ok=True)
            with alone(folder):
                new = fetch_all(folder, wanted())
    except FetchError as error:
        say(str(error))
        return 1
    except OSError as error:
        say(f"{first_line(error)}; shards go to {folder}, which must be a folder that can be written")
        return 1
    verified = ", with the Hub's SHA-256" if arguments.verify else ""
    print(f"{folder}: {len(names)} shards are whole{verified}, {new} of them new")
    return 0


if __name__ == "__main__":
    sys.exit(main())
