"""The sample's shards, as the script writes them, and a run on them."""

import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from starts import forked
from test_main import SCRIPT, val_losses

import train_gpt

WRITER = Path(__file__).parent.parent / "data" / "sample.py"


def write_sample(folder, *arguments):
    """The script, run in a project of its own."""
    (folder / "data").mkdir(exist_ok=True)
    shutil.copy(WRITER, folder / "data")
    command = [sys.executable, str(folder / "data" / "sample.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the sample's shards where the script looks for them."""
    folder = tmp_path_factory.mktemp("project")
    done = write_sample(folder)
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


def full_disk(folder):
    folder.mkdir()
    (folder / "sample_val_000000.partial").symlink_to("/dev/full")


@pytest.mark.parametrize(
    "damage, says",
    [
        (full_disk, "No space left on device"),
        (lambda folder: folder.touch(), "File exists"),
        (lambda folder: folder.symlink_to("/sys"), "cannot be written"),  # nobody writes there, root included
    ],
)
def test_folder_that_cannot_be_written(tmp_path, damage, says):
    (tmp_path / "data").mkdir()
    damage(tmp_path / "data" / "sample")
    done = write_sample(tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("data/sample.py: ") and says in line


@pytest.mark.parametrize("argument, code", [("--help", 0), ("7", 2)])
def test_arguments_write_nothing(tmp_path, argument, code):
    done = write_sample(tmp_path, argument)
    assert done.returncode == code and len(done.stderr.splitlines()) == (code > 0)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["sample.py"]


def test_ctrl_c(tmp_path):
    """In the middle of reading the library, for which the folder's making is the sign."""
    shutil.copy(WRITER, tmp_path)
    child = subprocess.Popen([sys.executable, str(tmp_path / "sample.py")], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "sample").exists():
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    says = "data/sample.py: stopped; the same command writes the sample anew\n"
    assert (child.returncode, errors) == (130, says)


def test_sample_run(project):
    """A few smaller steps on the sample find its shards and lower its loss."""
    flags = ["--preset=sample", "--train_batch_size=1024", "--val_tokens=2048", "--val_batch_size=2048"]
    flags += ["--num_scheduled_iterations=6", "--num_extension_iterations=0", "--warmup_steps=0"]
    done = forked([SCRIPT, *flags], folder=project)
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
