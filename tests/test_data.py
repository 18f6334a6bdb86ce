"""The loader against a document-by-document reading of its rule, and what it refuses."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import documents, write_shard

import train_gpt
from train_gpt import StepShape, TrainLoader, UsageError, ValLoader, World, parse_settings


def flags(folder, *more):
    return parse_settings(
        [
            f"--train_files={folder}/train_*.bin",
            f"--val_files={folder}/val_*.bin",
            "--vocab_size=257",
            "--train_batch_size=400",
            "--micro_batches=4",
            "--train_max_seq_len=30",
            "--num_scheduled_iterations=5",
            "--num_extension_iterations=0",
            *more,
        ]
    )


def thirds(step, s):
    """2, 4 and 6 micro-batches by thirds of the run."""
    micro_batches = (2, 4, 6)[min(2, 3 * step // s.total_steps)]
    return StepShape(micro_batches, s.train_batch_size // s.micro_batches, s.train_max_seq_len)


def varied(step, s):
    """Other micro-batches and longest documents in the middle of the run, and a smaller step at the end."""
    whole = StepShape(s.micro_batches, s.train_batch_size // s.micro_batches, s.train_max_seq_len)
    if step < s.total_steps // 4 or step >= s.total_steps:
        return whole
    if step < s.total_steps // 2:
        return whole._replace(micro_batch_tokens=whole.micro_batch_tokens * 3 // 2, max_seq_len=20)
    if step < s.total_steps - 1:
        return whole._replace(max_seq_len=whole.max_seq_len * 2)
    return whole._replace(micro_batches=2, micro_batch_tokens=whole.micro_batch_tokens // 2)


def plain_steps(shards, s):
    """Steps as lists of (inputs, targets, segment number of each input), one document at a time."""
    done = 0
    for tokens in shards:
        starts = [i for i, token in enumerate(tokens) if token == s.bos]
        found = [tokens[a:b] for a, b in zip(starts, starts[1:] + [len(tokens)], strict=True)]
        step, at = [], 0
        while True:
            shape = train_gpt.step_shape(done, s)
            room = shape.micro_batch_tokens + 1
            text, segments, number = [], [], 0
            while len(text) < room and at < len(found):
                piece = list(found[at][: min(shape.max_seq_len, room - len(text))])
                text += piece
                segments += [number] * len(piece)
                number += 1
                at += 1
            if len(text) < room:
                break
            step.append((text[:-1], text[1:], segments[:-1]))
            if len(step) == shape.micro_batches:
                yield step
                done += 1
                step = []


def segments_of(batch):
    """Segment numbers by the batch's bounds, which must agree with each other."""
    first, last = batch.doc_start.tolist(), batch.doc_end.tolist()
    assert all(
        first[last[i]] == first[i] and last[first[i]] == last[i] and first[i] <= i <= last[i]
        for i in range(len(first))
    )
    return np.unique(first, return_inverse=True)[1].tolist()


@pytest.fixture
def shards(tmp_path):
    made = [documents(120, 70, seed=i) for i in range(3)]
    made[1] = np.concatenate([[5, 6, 7], made[1]])  # tokens before the first BOS
    for i, tokens in enumerate(made):
        write_shard(tmp_path / f"train_{i}.bin", tokens)
    return made


def planned_steps(loader):
    """How many steps the shards feed."""
    return next(step for step in itertools.count() if loader.data.planned(step) is None)


@pytest.mark.parametrize("shape", [train_gpt.step_shape, thirds, varied])
def test_stream_follows_the_rule(tmp_path, shards, monkeypatch, shape):
    monkeypatch.setattr(train_gpt, "step_shape", shape)
    s = flags(tmp_path, "--num_scheduled_iterations=8")
    wanted = list(plain_steps(shards, s))
    loader = TrainLoader(s, World())
    assert len(wanted) == planned_steps(loader) >= s.total_steps
    assert {loader.data.planned(step).shard for step in range(len(wanted))} == {0, 1, 2}
    for step, batches in enumerate(loader.stream(0, len(wanted))):
        assert len(batches) == shape(step, s).micro_batches
        for batch, (inputs, targets, segments) in zip(batches, wanted[step], strict=True):
            assert batch.inputs.tolist() == inputs and batch.targets.tolist() == targets
            assert segments_of(batch) == segments


@pytest.mark.parametrize("shape, sizes", [(train_gpt.step_shape, (2, 4)), (thirds, (2,)), (varied, (2,))])
def test_stream_is_the_same_for_any_world(tmp_path, shards, monkeypatch, shape, sizes):
    monkeypatch.setattr(train_gpt, "step_shape", shape)
    s = flags(tmp_path)
    alone = list(TrainLoader(s, World()).stream(0, 5))
    for size in sizes:
        ranks = [list(TrainLoader(s, World(rank, size)).stream(0, 5)) for rank in range(size)]
        for step in range(5):
            dealt = [batch.inputs for rank in ranks for batch in rank[step]]
            assert torch.equal(torch.stack(dealt), torch.stack([batch.inputs for batch in alone[step]]))


@pytest.mark.parametrize("shape", [train_gpt.step_shape, thirds, varied])
def test_stream_starts_anywhere(tmp_path, shards, monkeypatch, shape):
    """Also in a loader that has read nothing before, and in one that goes back, as after warm-up."""
    monkeypatch.setattr(train_gpt, "step_shape", shape)
    s = flags(tmp_path)
    loader = TrainLoader(s, World())
    whole = list(loader.stream(0, 5))
    later = list(loader.stream(3, 5))
    assert same(list(loader.stream(0, 5)), whole)
    assert same(later, whole[3:]) and same(list(TrainLoader(s, World()).stream(3, 5)), whole[3:])


def same(steps, others):
    """Whether two lists of steps have equal batches."""
    assert [len(step) for step in steps] == [len(step) for step in others]
    pairs = zip(itertools.chain(*steps), itertools.chain(*others), strict=True)
    return all(torch.equal(a, b) for batch, other in pairs for a, b in zip(batch, other, strict=True))


def test_last_piece_of_one_token(tmp_path):
    """A document that fills only the last target gives its BOS there, and its tail is dropped."""
    write_shard(
        tmp_path / "train_0.bin",
        np.concatenate([[256] + [1] * 9, [256] + [2] * 9, [256] + [3] * 9, [256] + [4] * 19]),
    )
    s = flags(tmp_path, "--train_batch_size=20", "--micro_batches=1", "--num_scheduled_iterations=1")
    (batches,) = TrainLoader(s, World()).stream(0, 1)
    assert batches[0].targets[-1] == 256 and batches[0].doc_end[-1] == 19


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
    assert (
        path in str(error.value) and says in str(error.value) and "cached_fineweb10B.py" in str(error.value)
    )


@pytest.mark.parametrize(
    "tokens, says",
    [
        ([256, 300] * 200, "token 300 is beyond the vocabulary"),
        ([1, 2] * 200, "holds no BOS token 256"),
        ([256] * 900, "feeds 2 steps of the 5"),
    ],
)
def test_bad_training_tokens(tmp_path, tokens, says):
    write_shard(tmp_path / "train_0.bin", tokens)
    with pytest.raises(UsageError, match=says):
        TrainLoader(flags(tmp_path), World()).check()


def test_no_shard_fills_a_step(tmp_path):
    write_shard(tmp_path / "train_0.bin", [256] * 90)
    with pytest.raises(
        UsageError, match="no shard fills a step; give larger ones or lower --train_batch_size"
    ):
        TrainLoader(flags(tmp_path), World()).check()


def test_validation_of_another_vocabulary(tmp_path):
    write_shard(tmp_path / "val_0.bin", [1, 2] * 400)
    with pytest.raises(UsageError, match="val_0.bin: holds no BOS token 256 where validation reads"):
        ValLoader(flags(tmp_path, "--val_tokens=400", "--val_batch_size=400"), World())


def test_document_batch_of_a_list():
    """A tokenizer gives lists: their documents are kept apart as an array's are."""
    tokens = [256, 5, 6, 256, 7, 8, 9, 256, 1]
    for given in (tokens, tuple(tokens), np.array(tokens, np.uint16)):
        batch = train_gpt.document_batch(given, 256, torch.device("cpu"))
        assert batch.doc_start.tolist() == [0, 0, 0, 3, 3, 3, 3, 7]
        assert batch.inputs.tolist() == tokens[:-1] and batch.targets.tolist() == tokens[1:]


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
    with pytest.raises(
        UsageError, match="holds 400 tokens, but validation needs --val_tokens=400 and one more"
    ):
        ValLoader(flags(tmp_path, "--val_tokens=400", "--val_batch_size=400"), World())


def test_shared_corpus_feeds_210_steps(tmp_path):
    """The count that another implementation of the rule gave, on 60 M tokens of real text."""
    corpus = Path(__file__).resolve().parents[2] / "shared" / "corpus"
    if not corpus.is_dir():
        pytest.skip("the shared corpus is not beside this checkout")
    for i in (1, 2, 3):
        assert (
            os.system(f"xz -dc -T0 {corpus}/classics_train_00000{i}.bin.xz > {tmp_path}/train_{i}.bin") == 0
        )
    s = parse_settings(
        [
            f"--train_files={tmp_path}/train_*.bin",
            "--num_scheduled_iterations=210",
            "--num_extension_iterations=0",
        ]
    )
    loader = TrainLoader(s, World())
    assert planned_steps(loader) == 210
    loader.check()
    assert train_gpt.MAGIC == 20240520


def test_validation_shard_among_the_training_shards(tmp_path):
    """Under its own name, or through a link of either kind; a link to nowhere is no shard."""
    write_shard(tmp_path / "val_0.bin", documents(200, 30))
    s = flags(tmp_path, "--val_tokens=400")
    (tmp_path / "train_2.bin").symlink_to("nowhere")
    ValLoader(s, World())
    for link in (os.link, os.symlink):
        link(tmp_path / "val_0.bin", tmp_path / "train_1.bin")
        with pytest.raises(UsageError, match=r"val_0.bin: --train_files=.*train_\*.bin reads it too"):
            ValLoader(s, World())
        (tmp_path / "train_1.bin").unlink()
    with pytest.raises(UsageError, match="reads it too"):
        ValLoader(flags(tmp_path, "--val_tokens=400", f"--train_files={tmp_path}/*.bin"), World())


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_no_regular_shard(tmp_path, make):
    """A pipe, which would be waited for, and a folder."""
    make(tmp_path / "train_0.bin")
    with pytest.raises(UsageError, match="train_0.bin: cannot be read"):
        TrainLoader(flags(tmp_path), World()).check()
