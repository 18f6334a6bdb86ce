"""run.sh with stand-ins for the virtual environment's Python and for the one that makes it.

The first says how many GPUs there are, and notes what it is told.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSIDE = """#!/bin/bash
case "$*" in *device_count*) echo {gpus}; exit ;; esac
echo "python $*${{SCRIPT:+ SCRIPT=$SCRIPT}}" >> told
case "$*" in
  *"pip install"*) while [ -e hold ]; do sleep 0.01; done; [ ! -e no-network ] ;;
  data/sample.py) mkdir -p data/sample; touch data/sample/sample_{{val_000000,train_00000{{1,2}}}}.bin ;;
esac
"""
# It makes the environment, with pip where it can.
OUTSIDE = """#!/bin/bash
[ "$1" = -m ] || exit 0
echo "python3 $*" >> told
mkdir -p .venv/bin .venv/lib/python3.11/site-packages/pip-1.dist-info
cp inside .venv/bin/python
[ -e no-pip ] || touch .venv/lib/python3.11/site-packages/pip-1.dist-info/RECORD
"""
VENV = "python3 -m venv .venv"
PIP = "python -m pip install --quiet --disable-pip-version-check -r requirements.txt"
SAMPLE = ["python data/sample.py", "python train_gpt.py --preset=sample"]
TORCHRUN = "python -m torch.distributed.run --standalone"
FINEWEB = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, 10))]


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def project(tmp_path):
    """A bare project in which everything is installed, with no network to reach."""
    folder = tmp_path / "project"
    for name in ("tests", "records", "data", ".venv/bin", "path"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "run.sh", folder)
    for name in ("requirements.txt", "tests/requirements.txt", "records/requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
        shutil.copy(ROOT / name, folder / ".venv" / f"installed-{name.replace('/', '-')}")
    write_program(folder / "path" / "python3", OUTSIDE)

    def start(gpus, *arguments, cwd="/", script=folder / "run.sh", **variables):
        """run.sh under way, in a process group of its own."""
        write_program(folder / "inside", INSIDE.format(gpus=gpus))
        if (folder / ".venv" / "bin").exists():
            shutil.copy(folder / "inside", folder / ".venv" / "bin" / "python")
        environment = os.environ | {"PATH": f"{folder / 'path'}:{os.environ['PATH']}"}
        environment.pop("SCRIPT", None)  # these tests may be of another script
        environment |= variables
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )

    def told():
        """What the stand-ins were told since this was asked last."""
        path = folder / "told"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def run(*arguments, **more):
        child = start(*arguments, **more)
        out, errors = child.communicate(timeout=30)
        return subprocess.CompletedProcess(child.args, child.returncode, out, errors), told()

    run.folder, run.start, run.told = folder, start, told
    return run


def refused(done, *says):
    """It ended with code 2 and one line that says so."""
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("run.sh: ") and all(part in line for part in says), line


def test_without_a_gpu_it_makes_and_runs_the_sample(project):
    done, told = project(0, "--seed=3")
    assert done.returncode == 0
    assert done.stdout == "run.sh: no CUDA GPU found, so this trains the small sample model on the CPU\n"
    assert told == ["python data/sample.py", "python train_gpt.py --preset=sample --seed=3"]
    assert project(0)[1] == SAMPLE[1:]


@pytest.mark.parametrize("lost", ["sample_val_000000.bin", "sample_train_000002.bin"])
def test_a_sample_half_written_is_written_again(project, lost):
    project(0)
    (project.folder / "data" / "sample" / lost).unlink()
    assert project(0)[1] == SAMPLE


def test_with_gpus_it_fetches_once_and_starts_torchrun_on_all(project):
    launch = f"{TORCHRUN} --nproc_per_node=8 train_gpt.py --seed=3"
    done, told = project(8, "--seed=3")
    assert done.returncode == 0 and told == ["python data/cached_fineweb10B.py", launch]
    folder = project.folder / "data" / "fineweb10B"
    folder.mkdir()
    for name in FINEWEB:
        (folder / name).touch()
    assert project(8, "--seed=3")[1] == [launch]
    (folder / FINEWEB[8]).unlink()  # an earlier fetch was killed; its last shard came before this one
    assert project(8, "--seed=3")[1] == ["python data/cached_fineweb10B.py", launch]


def test_one_gpu_needs_no_torchrun(project):
    assert project(1, "--train_files=x")[1] == ["python train_gpt.py --train_files=x"]


def test_nproc(project):
    launch = f"{TORCHRUN} --nproc_per_node=2 train_gpt.py"
    assert project(8, "--nproc=2", "--train_files=x")[1] == [f"{launch} --train_files=x"]
    assert project(0, "--nproc=2")[1][-1] == f"{launch} --preset=sample"


@pytest.mark.parametrize(
    "gpus, arguments, says",
    [
        (2, ["--nproc=3"], "this machine has 2 GPUs"),
        (2, ["--nproc=0"], "at least 1"),
        (0, ["--nproc=two"], "--nproc=two"),
        (0, ["--nproc=00"], "--nproc=00"),
        (0, ["--nproc="], "--nproc="),
        (0, ["--nproc=99999999999999999999"], "at most"),
        (8, ["--nproc=99999999999999999999"], "at most"),
        (8, ["--nproc", "2"], "--nproc=2"),
    ],
)
def test_bad_nproc(project, gpus, arguments, says):
    done, told = project(gpus, *arguments)
    refused(done, says)
    assert not told


def test_tests(project):
    assert project(0, "test", "-k", "norm")[1] == ["python -m pytest -n 2 --dist=worksteal tests -k norm"]


def test_tests_of_another_script(project, tmp_path):
    """Its path is relative to where the user is; training takes no notice of it."""
    (tmp_path / "idea.py").touch()
    pytest_told = "python -m pytest -n 2 --dist=worksteal tests"
    for name in ("idea.py", str(tmp_path / "idea.py")):
        done, told = project(0, "test", cwd=tmp_path, SCRIPT=name)
        assert told == [f"{pytest_told} SCRIPT={tmp_path / 'idea.py'}"], done.stderr
    done, told = project(0, "test", cwd=tmp_path, SCRIPT="none.py")
    refused(done, "none.py is no file")
    assert not told


STARTED = """
import conftest, subprocess, sys, train_gpt
from pathlib import Path
script = Path(train_gpt.__file__)
program = "import train_gpt; print(train_gpt.MARK)"
exec(program)
sys.stdout.flush()
subprocess.run([sys.executable, "-c", program], cwd=script.parent, check=True)
print(script.name, script.read_text())
"""


def test_script_stands_in_for_train_gpt(tmp_path):
    """Where tests import it, where what they start imports it, and where they read it."""
    (tmp_path / "idea.py").write_text("MARK = 7")
    environment = os.environ | {"SCRIPT": "idea.py", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", STARTED]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["7", "7", "train_gpt.py MARK = 7"]


def test_script_stands_in_for_train_gpt_in_the_benchmark(tmp_path):
    """Its module is imported by the first tests, so what it imports is what all others get."""
    (tmp_path / "idea.py").write_text((ROOT / "train_gpt.py").read_text() + "\nMARK = 7\n")
    environment = os.environ | {"SCRIPT": "idea.py", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", "import conftest, benchmark; print(benchmark.g.MARK)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    assert done.stdout == "7\n", done.stderr


def test_record(project):
    assert project(0, "record", "stats", "logs")[1] == ["python records/record.py stats logs"]


def test_a_record(project, tmp_path):
    """Its script runs with the flags, on one GPU or several; one that is not there is refused."""
    folder = tmp_path / "project" / "records" / "proxy" / "2026-01-01_idea"
    folder.mkdir(parents=True)
    (folder / "train_gpt.py").touch()
    script = "records/proxy/2026-01-01_idea/train_gpt.py"
    _, told = project(0, "--record=2026-01-01_idea", "--seed=7")
    assert told == [SAMPLE[0], f"python {script} --preset=sample --seed=7"]
    _, told = project(2, "--record=2026-01-01_idea", "--preset=sample")
    assert told[-1] == f"{TORCHRUN} --nproc_per_node=2 {script} --preset=sample"
    folder.rename(tmp_path / "project" / "records" / "2026-02-02_claim")
    assert project(0, "--record=2026-02-02_claim")[1][-1].startswith(
        "python records/2026-02-02_claim/train_gpt"
    )
    (tmp_path / "project" / "train_gpt.py").touch()
    for name in ("2026-01-01_idea", "", ".", "..", "../records/2026-02-02_claim", "proxy/2026-02-02_claim"):
        done, told = project(0, f"--record={name}")
        refused(done, f"--record={name}: there is no such record")
        assert not told
    done, told = project(0, "--record", "2026-02-02_claim")
    refused(done, "--record=2026-11-29_small-batches")
    assert not told


def test_a_link_to_it(project, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "train").symlink_to("../project/run.sh")
    done, told = project(0, cwd=tmp_path / "bin", script="train")
    assert (done.returncode, told) == (0, SAMPLE)


def test_first_start(project):
    shutil.rmtree(project.folder / ".venv")
    done, told = project(0)
    assert done.returncode == 0 and told == [VENV, PIP, *SAMPLE], done.stderr


def test_environment_half_made(project):
    """Killed before pip was in it, it is made to its end; where that cannot be, one line says what to do."""
    (project.folder / ".venv" / "installed-requirements.txt").unlink()
    (project.folder / "no-pip").touch()
    done, told = project(0)
    refused(done, "cannot make a virtual environment", f"remove {project.folder}/.venv")
    assert told == [VENV]
    (project.folder / "no-pip").unlink()
    done, told = project(0, "test")
    assert done.returncode == 0 and told[:2] == [VENV, PIP] and len(told) == 5  # and other packages anew
    (project.folder / ".venv" / "installed-requirements.txt").unlink()
    assert project(0)[1] == [PIP, *SAMPLE]


def test_environment_in_the_way(project):
    shutil.rmtree(project.folder / ".venv")
    (project.folder / ".venv").touch()
    refused(project(0)[0], ".venv must be a folder")


@pytest.mark.parametrize("killed", [False, True])
def test_the_second_of_two_first_starts_waits(project, killed):
    """It installs what a killed one left undone, and else nothing again."""
    shutil.rmtree(project.folder / ".venv")
    (project.folder / "hold").touch()
    first = project.start(0)
    while not (project.folder / "told").exists() or PIP not in (project.folder / "told").read_text():
        time.sleep(0.01)
    second = project.start(0)
    assert "another start is at work" in second.stderr.readline()
    if killed:
        os.killpg(first.pid, signal.SIGKILL)
    (project.folder / "hold").unlink()
    for child in (first, second):
        child.communicate(timeout=30)
    assert second.returncode == 0 and (first.returncode == 0) == (not killed)
    told = project.told()
    assert [told.count(line) for line in (VENV, PIP, SAMPLE[0])] == [1, 1 + killed, 1]
    assert told.count(SAMPLE[1]) == 2 - killed


def test_help_of_a_bare_project_writes_nothing(project):
    shutil.rmtree(project.folder / ".venv")
    done, told = project(0, "--help")
    assert done.returncode == 0 and "./run.sh test" in done.stdout and not told
    assert not (project.folder / ".venv").exists()


def test_pip_fails(project):
    (project.folder / ".venv" / "installed-requirements.txt").unlink()
    (project.folder / "no-network").touch()
    done, told = project(0)
    assert told == [VENV, PIP]
    refused(done, "pip could not install requirements.txt; the lines above say why")
