"""run.sh with a stand-in for the virtual environment's Python.

The stand-in says how many GPUs there are, and notes what it is told.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAND_IN = """#!/bin/bash
case "$*" in *device_count*) echo {gpus} ;; *) echo "$(basename $0) $*" >> "$(dirname $0)/../../told" ;; esac
"""


@pytest.fixture
def project(tmp_path):
    """A bare project in which everything is installed, with no network to reach."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "records").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("requirements.txt", "tests/requirements.txt", "records/requirements.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
        shutil.copy(ROOT / name, tmp_path / ".venv" / f"installed-{name.replace('/', '-')}")

    def run(gpus, *arguments):
        for name in ("python", "torchrun"):
            (tmp_path / ".venv" / "bin" / name).write_text(STAND_IN.format(gpus=gpus))
            (tmp_path / ".venv" / "bin" / name).chmod(0o755)
        (tmp_path / "told").unlink(missing_ok=True)
        command = ["bash", str(tmp_path / "run.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=30)
        told = (tmp_path / "told").read_text().splitlines() if (tmp_path / "told").exists() else []
        return done, told

    run.folder = tmp_path
    return run


def test_without_a_gpu_it_makes_and_runs_the_sample(project):
    done, told = project(0, "--seed=3")
    assert done.returncode == 0
    assert done.stdout == "run.sh: no CUDA GPU found, so this trains the small sample model on the CPU\n"
    assert told == ["python data/sample.py", "python train_gpt.py --preset=sample --seed=3"]


def test_with_gpus_it_fetches_once_and_starts_torchrun_on_all(project):
    launch = "torchrun --standalone --nproc_per_node=8 train_gpt.py --seed=3"
    done, told = project(8, "--seed=3")
    assert done.returncode == 0 and told == ["python data/cached_fineweb10B.py", launch]
    folder = project.folder / "data" / "fineweb10B"
    folder.mkdir()
    for name in ("fineweb_val_000000.bin", "fineweb_train_000009.bin"):
        (folder / name).touch()
    assert project(8, "--seed=3")[1] == [launch]


def test_one_gpu_needs_no_torchrun(project):
    assert project(1, "--train_files=x")[1] == ["python train_gpt.py --train_files=x"]


def test_nproc(project):
    launch = "torchrun --standalone --nproc_per_node=2 train_gpt.py"
    assert project(8, "--nproc=2", "--train_files=x")[1] == [f"{launch} --train_files=x"]
    assert project(0, "--nproc=2")[1][-1] == f"{launch} --preset=sample"


@pytest.mark.parametrize(
    "gpus, nproc, says",
    [(2, "3", "this machine has 2 GPUs"), (2, "0", "at least 1"), (0, "two", "--nproc=two")],
)
def test_bad_nproc(project, gpus, nproc, says):
    done, told = project(gpus, f"--nproc={nproc}")
    assert done.returncode == 2 and not told
    (line,) = done.stderr.splitlines()
    assert line.startswith("run.sh: ") and says in line


def test_tests(project):
    assert project(0, "test", "-k", "norm")[1] == ["python -m pytest -n 2 --dist=worksteal tests -k norm"]


def test_record(project):
    assert project(0, "record", "stats", "logs")[1] == ["python records/record.py stats logs"]


def test_pip_fails(project):
    (project.folder / ".venv" / "installed-requirements.txt").unlink()
    python = project.folder / ".venv" / "bin" / "python"
    python.write_text("#!/bin/bash\nexit 1\n")
    python.chmod(0o755)
    command = ["bash", str(project.folder / "run.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert done.stderr == "run.sh: pip could not install requirements.txt; the lines above say why\n"
