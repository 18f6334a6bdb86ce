"""The loader against a document-by-document reading of its rule, and what it refuses."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import documents, write_shard

import train_gpt
from train_gpt import TrainLoader, UsageError, ValLoader, World, parse_settings


def flags(folder, *more):
    return parse_settings([
        f"--train_files={folder}/train_*.bin", f"--val_files={folder}/val_*.bin", "--vocab_size=257", "--train_batch_size=400",
        "--micro_batches=4", "--train_max_seq_len=30", "--num_scheduled_iterations=5", "--num_extension_iterations=0", *more,
    ])  # fmt: skip


def plain_steps(shards, s):
    """Steps as lists of (inputs, targets, segment number of each input), one document at a time."""
    for tokens in shards:
        starts = [i for i, token in enumerate(tokens) if token == s.bos]
        found = [tokens[a:b] for a, b in zip(starts, starts[1:] + [len(tokens)], strict=True)]
        step, at = [], 0
        while True:
            text, segments, number = [], [], 0
            while len(text) < s.train_tokens + 1 and at < len(found):
                piece = list(found[at][: min(s.train_max_seq_len, s.train_tokens + 1 - len(text))])
                text, segments, number, at = text + piece, segments + [number] * len(piece), number + 1, at + 1
            if len(text) < s.train_tokens + 1:
                break
            step.append((text[:-1], text[1:], segments[:-1]))
            if len(step) == s.micro_batches:
                yield step
                step = []


def segments_of(batch):
    """Segment numbers by the batch's bounds, which must agree with each other."""
    first, last = batch.first.tolist(), batch.last.tolist()
    assert all(first[last[i]] == first[i] and last[first[i]] == last[i] and first[i] <= i <= last[i] for i in range(len(first)))
    return np.unique(first, return_inverse=True)[1].tolist()


@pytest.fixture
def shards(tmp_path):
    made = [documents(120, 70, seed=i) for i in range(3)]
    made[1] = np.concatenate([[5, 6, 7], made[1]])  # tokens before the first BOS
    for i, tokens in enumerate(made):
        write_shard(tmp_path / f"train_{i}.bin", tokens)
    return made


def test_stream_follows_the_rule(tmp_path, shards):
    s = flags(tmp_path)
    wanted = list(plain_steps(shards, s))
    loader = TrainLoader(s, World())
    assert len(wanted) == sum(loader._steps(i) for i in range(3)) > 6
    for step, batches in enumerate(loader.stream(0, len(wanted))):
        assert len(batches) == 4
        for batch, (inputs, targets, segments) in zip(batches, wanted[step], strict=True):
            assert batch.inputs.tolist() == inputs and batch.targets.tolist() == targets
            assert segments_of(batch) == segments


def test_stream_is_the_same_for_any_world(tmp_path, shards):
    s = flags(tmp_path)
    alone = list(TrainLoader(s, World()).stream(0, 5))
    for size in (2, 4):
        ranks = [list(TrainLoader(s, World(rank, size)).stream(0, 5)) for rank in range(size)]
        for step in range(5):
            dealt = [batch.inputs for rank in ranks for batch in rank[step]]
            assert torch.equal(torch.stack(dealt), torch.stack([batch.inputs for batch in alone[step]]))


def test_stream_starts_anywhere(tmp_path, shards):
    loader = TrainLoader(flags(tmp_path), World())
    whole = list(loader.stream(0, 5))
    later = list(loader.stream(3, 5))
    assert all(torch.equal(a.inputs, b.inputs) for x, y in zip(whole[3:], later, strict=True) for a, b in zip(x, y, strict=True))


def test_last_piece_of_one_token(tmp_path):
    """A document that fills only the last target gives its BOS there, and its tail is dropped."""
    write_shard(tmp_path / "train_0.bin", np.concatenate([[256] + [1] * 9, [256] + [2] * 9, [256] + [3] * 9, [256] + [4] * 19]))
    s = flags(tmp_path, "--train_batch_size=20", "--micro_batches=1", "--num_scheduled_iterations=1")
    (batches,) = TrainLoader(s, World()).stream(0, 1)
    assert batches[0].targets[-1] == 256 and batches[0].last[-1] == 19


def test_validation_goes_straight_through(tmp_path):
    tokens = documents(60, 70, seed=4)
    write_shard(tmp_path / "val_0.bin", tokens)
    s = flags(tmp_path, "--val_tokens=1200", "--val_batch_size=400")
    batches = list(ValLoader(s, World()).stream())
    assert torch.cat([b.inputs for b in batches]).tolist() == tokens[:1200].tolist()
    assert torch.cat([b.targets for b in batches]).tolist() == tokens[1:1201].tolist()
    for i, batch in enumerate(batches):
        mine = tokens[100 * i : 100 * i + 100]
        segments = np.cumsum(mine == 256) - (mine[0] == 256)
        assert segments_of(batch) == segments.tolist()
    ranks = [list(ValLoader(s, World(rank, 2)).stream()) for rank in range(2)]
    assert [len(r) for r in ranks] == [6, 6] and torch.equal(ranks[1][0].inputs, batches[1].inputs)


BAD_SHARDS = {
    "not a token shard (magic number 7": dict(magic=7),
    "shard version 2, want 1": dict(version=2),
    "holds 400 tokens where its header says 500": dict(count=500),
}


@pytest.mark.parametrize("says", BAD_SHARDS)
def test_bad_header(tmp_path, says):
    path = write_shard(tmp_path / "train_0.bin", [256] * 400, **BAD_SHARDS[says])
    with pytest.raises(UsageError) as error:
        TrainLoader(flags(tmp_path), World()).check()
    assert path in str(error.value) and says in str(error.value) and "cached_fineweb10B.py" in str(error.value)


@pytest.mark.parametrize(
    "tokens, says",
    [([256, 300] * 200, "token 300 is beyond the vocabulary"), ([1, 2] * 200, "holds no BOS token 256"), ([256] * 900, "feeds 2 steps of the 5")],
)
def test_bad_training_tokens(tmp_path, tokens, says):
    write_shard(tmp_path / "train_0.bin", tokens)
    with pytest.raises(UsageError, match=says):
        TrainLoader(flags(tmp_path), World()).check()


def test_too_few_tokens_names_the_command(tmp_path):
    write_shard(tmp_path / "train_0.bin", [256] * 900)
    with pytest.raises(UsageError, match=r"fetch more with: python data/cached_fineweb10B.py N"):
        TrainLoader(flags(tmp_path), World()).check()


def test_truncated_header(tmp_path):
    (tmp_path / "train_0.bin").write_bytes(b"123")
    with pytest.raises(UsageError, match="not a token shard"):
        TrainLoader(flags(tmp_path), World()).check()


def test_no_shard(tmp_path):
    with pytest.raises(UsageError, match="--train_files=.* matches no file"):
        TrainLoader(flags(tmp_path), World())
    with pytest.raises(UsageError, match="--val_files=.* matches no file"):
        ValLoader(flags(tmp_path), World())


def test_validation_too_short(tmp_path):
    write_shard(tmp_path / "val_0.bin", [256] * 400)
    with pytest.raises(UsageError, match="holds 400 tokens, but validation needs --val_tokens=400 and one more"):
        ValLoader(flags(tmp_path, "--val_tokens=400", "--val_batch_size=400"), World())


def test_shared_corpus_feeds_210_steps(tmp_path):
    """The count that another implementation of the rule gave, on 60 M tokens of real text."""
    corpus = Path(__file__).resolve().parents[2] / "shared" / "corpus"
    if not corpus.is_dir():
        pytest.skip("the shared corpus is not beside this checkout")
    for i in (1, 2, 3):
        assert os.system(f"xz -dc -T0 {corpus}/classics_train_00000{i}.bin.xz > {tmp_path}/train_{i}.bin") == 0
    s = parse_settings([f"--train_files={tmp_path}/train_*.bin", "--num_scheduled_iterations=210", "--num_extension_iterations=0"])
    loader = TrainLoader(s, World())
    assert sum(loader._steps(i) for i in range(3)) == 210
    loader.check()
    assert train_gpt.MAGIC == 20240520
