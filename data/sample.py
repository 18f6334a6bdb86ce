"""Write the sample: byte-level shards of Python source text, with nothing downloaded.

    python data/sample.py

Documents are the source files of the running Python's own standard library, each a BOS (256) and then its
bytes, in the shard format of FineWeb's. A training shard holds DOCUMENTS of them, shuffled; where the library
is smaller, because it came without its tests, it is gone through again in a new order. The losses depend on
the Python version.
"""

import argparse
import os
import random
import signal
import struct
import sys
import sysconfig
import zlib
from pathlib import Path

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


def tokens_of(text: bytes) -> bytes:
    """A document's tokens, little-endian uint16: a BOS, then one for each byte."""
    tokens = bytearray(2 + 2 * len(text))
    tokens[:2] = struct.pack("<H", BOS)
    tokens[2::2] = text
    return tokens


def write_shard(path: Path, documents: list[bytes]):
    """One shard of whole documents, under a temporary name until it is complete."""
    tokens = b"".join(map(tokens_of, documents))
    count = len(tokens) // 2
    partial = path.with_suffix(".partial")
    partial.write_bytes(struct.pack("<256i", MAGIC, VERSION, count, *[0] * 253) + tokens)
    os.replace(partial, path)
    print(f"{path}: {count:,} tokens in {len(documents):,} documents")


def write_sample(folder: Path):
    """The validation shard and the training shards."""
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
        end(1, f"this Python has only {size} bytes of library source to validate on")
    write_shard(folder / "sample_val_000000.bin", val)
    for number in range(1, SHARDS + 1):
        documents = []
        while len(documents) < DOCUMENTS:
            shuffle(train)
            documents += train[: DOCUMENTS - len(documents)]
        write_shard(folder / f"sample_train_{number:06d}.bin", documents)


def end(code: int, message: str):
    """End the program with one line."""
    print(f"data/sample.py: {message}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line."""

    def error(self, message: str):
        end(2, f"{message}; it takes none")


def main() -> int:
    """Write the sample; returns the exit code."""
    signal.signal(signal.SIGINT, lambda *_: end(130, "stopped; the same command writes the sample anew"))
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folder = Path(__file__).parent / "sample"
    try:
        write_sample(folder)
    except OSError as error:
        end(1, f"{error.filename or folder}: {error.strerror}; the sample cannot be written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
