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
    done = subprocess.run([sys.executable, str(folder / "data" / "sample.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_sample_shards_and_preset(project):
    folder, documents = project / "data" / "sample", {}
    assert sorted(path.name for path in folder.iterdir()) == ["sample_train_000001.bin", "sample_train_000002.bin", "sample_val_000000.bin"]
    for path in folder.iterdir():
        tokens = train_gpt.read_shard(str(path), vocab_size=257)
        starts = np.flatnonzero(tokens == 256)
        assert starts[0] == 0
        documents[path.name] = [bytes(piece[1:].astype(np.uint8)) for piece in np.split(tokens, starts[1:])]
    train, val = documents["sample_train_000001.bin"], documents["sample_val_000000.bin"]
    assert len(train) == 1500 and train != documents["sample_train_000002.bin"] and not set(train) & set(val)
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse.py", "json/decoder.py"):  # whole source files, each on one side
        assert ((library / name).read_bytes() in set(train) | set(documents["sample_train_000002.bin"])) != ((library / name).read_bytes() in val)

    flags = ["--preset=sample", "--num_scheduled_iterations=6", "--num_extension_iterations=0", "--val_tokens=8192", "--warmup_steps=0"]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], cwd=project, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    losses = val_losses(done.stdout)
    assert done.returncode == 0 and losses[0] == 5.9506 and losses[-1] < 4.5
    assert re.search(r"^log: logs/", done.stdout, re.M)


def test_sample_losses(project, monkeypatch):
    """The first steps of the sample give the losses kept for this Python, whose library the sample is made of."""
    kept = Path(__file__).parent / "losses" / f"sample_cpu_python{platform.python_version()}_torch{torch.__version__.split('+')[0]}.txt"
    if not kept.exists():
        pytest.skip(f"no losses are kept for Python {platform.python_version()} with torch {torch.__version__}: tests/losses/")
    wanted = dict(re.findall(r"^step:(\d+) loss:(\S+)$", kept.read_text(), re.M))
    monkeypatch.chdir(project)
    s, world = train_gpt.parse_settings(["--preset=sample"]), train_gpt.World()
    trainer, loader, losses = train_gpt.Trainer(s, world), train_gpt.TrainLoader(s, world), {}
    for step, batches in enumerate(loader.stream(0, len(wanted))):
        losses[step] = trainer.train_step(step, batches, train_gpt.attention_windows(step, s))[0].item()
        print(f"step:{step} loss:{losses[step]:.5f}")
    assert len(wanted) == 8 and all(abs(losses[int(step)] - float(loss)) < 2e-3 for step, loss in wanted.items())  # other CPUs round otherwise
