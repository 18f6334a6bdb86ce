"""The changes that wait for a GPU: each applies on those before it; all together they pass their own kernel tests, and train as the script does."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from shards import tiny_flags

import train_gpt

sys.path.insert(0, str(train_gpt.Path(train_gpt.__file__).parent / "records"))
import record  # noqa: E402

FOLDER = record.RECORDS / "candidates"
SCRIPT = record.ROOT / "train_gpt.py"
ENTRIES = record.read_sweep(FOLDER / "candidates.txt")[1]


def test_the_list_adds_one_at_a_time():
    patches = sorted(FOLDER.glob("*.patch"))
    assert [entry.patches for entry in ENTRIES] == [tuple(patches[:count]) for count in range(len(patches) + 1)]
    assert [entry.name for entry in ENTRIES[1:]] == [patch.stem.split("-", 1)[1] for patch in patches]
    scripts = [record.patched(SCRIPT, entry.patches) for entry in ENTRIES]
    for before, after in zip(scripts, scripts[1:], strict=False):
        assert after != before
        compile(after, "train_gpt.py", "exec")


PROGRAM = """
import json, sys, torch, train_gpt
s, world = train_gpt.parse_settings(json.loads(sys.argv[1])), train_gpt.World()
trainer, loader = train_gpt.Trainer(s, world), train_gpt.TrainLoader(s, world)
torch.manual_seed(0)
torch.nn.init.normal_(trainer.model.head, std=0.02)
for stack in trainer.normuon.stacks:
    stack.own.add_(0.01)  # the zeros of the start would hide a path
print([trainer.train_step(step, batches, (128, 384))[0].item() for step, batches in enumerate(loader.stream(0, 3))])
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what the patches change, with all of them."""
    folder = tmp_path_factory.mktemp("candidates")
    shutil.copy(SCRIPT, folder)
    for name in ("tests", "records/ablations"):
        shutil.copytree(record.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    for patch in ENTRIES[-1].patches:
        subprocess.run(["git", "apply", str(patch)], cwd=folder, env=environment, check=True)
    return folder


def test_together_they_pass_their_tests(project):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_kernels.py", "tests/test_benchmark.py"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_together_they_train_as_the_script(project, tmp_path):
    """On a CPU, where each is its plain reference, they change no loss but by rounding."""
    flags = json.dumps([*tiny_flags(tmp_path), "--num_scheduled_iterations=4", "--num_extension_iterations=0"])
    losses = []
    for folder in (record.ROOT, project):
        done = subprocess.run([sys.executable, "-c", PROGRAM, flags], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        losses.append(json.loads(done.stdout))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len({*losses[0]}) == 3
