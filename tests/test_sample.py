"""The sample's shards, as the script writes them, and a run on them."""

import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from test_main import ENVIRONMENT, SCRIPT, val_losses

import train_gpt


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the sample's shards where the script looks for them."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").mkdir()
    shutil.copy(SCRIPT.parent / "data" / "sample.py", folder / "data")
    command = [sys.executable, str(folder / "data" / "sample.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_sample_shards(project):
    folder = project / "data" / "sample"
    names = ["sample_train_000001.bin", "sample_train_000002.bin", "sample_val_000000.bin"]
    assert sorted(path.name for path in folder.iterdir()) == names
    documents = {}
    for path in folder.iterdir():
        tokens = train_gpt.read_shard(str(path), vocab_size=257)
        starts = np.flatnonzero(tokens == 256)
        assert starts[0] == 0
        documents[path.name] = [bytes(piece[1:].astype(np.uint8)) for piece in np.split(tokens, starts[1:])]
    first, second, val = (documents[name] for name in names)
    train = {*first, *second}
    assert len(first) == len(second) == 1500 and first != second and not train & set(val)
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py"):  # whole source files, each on one side
        text = (library / name).read_bytes()
        assert (text in train) != (text in val)


def test_sample_run(project):
    """A few steps on the sample find its shards and lower its loss."""
    command = [sys.executable, str(SCRIPT), "--preset=sample", "--val_tokens=8192", "--warmup_steps=0"]
    command += ["--num_scheduled_iterations=6", "--num_extension_iterations=0"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    losses = val_losses(done.stdout)
    assert done.returncode == 0 and losses[0] == 5.9506 and losses[-1] < 4.5
    assert re.search(r"^log: logs/", done.stdout, re.M)


def test_sample_losses(project, monkeypatch):
    """The first steps give the losses kept for this Python, whose library the sample is made of."""
    versions = f"python{platform.python_version()}_torch{torch.__version__.split('+')[0]}"
    kept = Path(__file__).parent / "losses" / f"sample_cpu_{versions}.txt"
    if not kept.exists():
        pytest.skip(f"no losses are kept for {versions} in tests/losses")
    wanted = dict(re.findall(r"^step:(\d+) loss:(\S+)$", kept.read_text(), re.M))
    monkeypatch.chdir(project)
    s = train_gpt.parse_settings(["--preset=sample"])
    world = train_gpt.World()
    trainer = train_gpt.Trainer(s, world)
    loader = train_gpt.TrainLoader(s, world)
    losses = {}
    for step, batches in enumerate(loader.stream(0, len(wanted))):
        losses[step] = trainer.train_step(step, batches, train_gpt.step_inputs(step, s))[0].item()
        print(f"step:{step} loss:{losses[step]:.5f}")
    assert len(wanted) == 8
    for step, loss in wanted.items():
        assert losses[int(step)] == pytest.approx(float(loss), abs=2e-3)  # other CPUs round otherwise
