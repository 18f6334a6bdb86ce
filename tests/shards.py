"""Small shards for tests."""

import numpy as np


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """A shard of these tokens, with a header that may lie."""
    tokens = np.asarray(tokens, "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return str(path)


def documents(count, longest, vocab_size=257, seed=0):
    """Tokens of documents of random lengths, 1 to longest, each with its BOS."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    bos = vocab_size - 1
    return np.concatenate([np.concatenate([[bos], random.integers(0, bos, n - 1)]) for n in lengths])


def tiny_flags(folder):
    """Flags of a model that takes milliseconds a step, on shards written to folder."""
    for i in range(2):
        write_shard(folder / f"train_{i}.bin", documents(600, 60, seed=i))
    write_shard(folder / "val_0.bin", documents(60, 60, seed=9))
    flags = dict(
        train_files=folder / "train_*.bin",
        val_files=folder / "val_*.bin",
        val_tokens=512,
        val_batch_size=256,
        train_batch_size=256,
        micro_batches=4,
        train_max_seq_len=40,
        vocab_size=257,
        model_dim=32,
        num_heads=2,
        # Seven layers are left, with every kind of them, for time.
        layers=",".join(f"{i}.attention=0,{i}.mlp=0" for i in (3, 5, 6, 8)),
        val_loss_every=5,
        num_scheduled_iterations=18,
        num_extension_iterations=2,
        log_dir=folder / "logs",
    )
    return [f"--{name}={value}" for name, value in flags.items()]
