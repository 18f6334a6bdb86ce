"""Write the sample: byte-level shards of Python source text, with nothing downloaded.

    python data/sample.py

Documents are the source files of the running Python's own standard library, each a BOS (256) and then its
bytes, in the shard format of FineWeb's. A training shard holds DOCUMENTS of them, shuffled; where the library
is smaller, because it came without its tests, it is gone through again in a new order. The losses depend on
the Python version.
"""

import os
import random
import sys
import sysconfig
import zlib
from pathlib import Path

import numpy as np

MAGIC = 20240520
VERSION = 1
BOS = 256
SHARDS = 2  # of training
DOCUMENTS = 1500  # in each
VAL_TOKENS = 262_144  # the validation shard has more


def source_files() -> list[Path]:
    """The standard library's files of Python source, by path; site-packages are not part of it."""
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    files = [path for path in root.rglob("*.py") if not installed & set(path.parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def write_shard(path: Path, documents: list[bytes]):
    """One shard of whole documents, under a temporary name until it is complete."""
    pieces = [np.concatenate([[BOS], np.frombuffer(text, np.uint8)]) for text in documents]
    tokens = np.concatenate(pieces).astype("<u2")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(header.tobytes() + tokens.tobytes())
    os.replace(partial, path)
    print(f"{path}: {len(tokens):,} tokens in {len(documents):,} documents")


def main() -> int:
    """Write the validation shard and the training shards; returns the exit code."""
    folder = Path(__file__).parent / "sample"
    folder.mkdir(exist_ok=True)
    # One file in sixteen, by its text, is kept for validation.
    train = []
    val = []
    for text in dict.fromkeys(path.read_bytes() for path in source_files()):
        if text:
            (train if zlib.crc32(text) % 16 else val).append(text)
    shuffle = random.Random(1).shuffle
    shuffle(val)
    size = sum(map(len, val))
    if size <= VAL_TOKENS:
        message = f"this Python has only {size} bytes of library source to validate on"
        print(f"data/sample.py: {message}", file=sys.stderr)
        return 1
    write_shard(folder / "sample_val_000000.bin", val)
    for number in range(1, SHARDS + 1):
        documents = []
        while len(documents) < DOCUMENTS:
            shuffle(train)
            documents += train[: DOCUMENTS - len(documents)]
        write_shard(folder / f"sample_train_{number:06d}.bin", documents)
    return 0


if __name__ == "__main__":
    sys.exit(main())
