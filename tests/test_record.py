"""The record tool on the published numbers, as logs, and on what else lies in folders of logs."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import scipy.stats
import torch
from shards import tiny_flags
from test_main import ENVIRONMENT

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "records" / "record.py"
sys.path.insert(0, str(TOOL.parent))
import record  # noqa: E402

LINE = "=" * 100

SEED1 = [3.278, 3.2777, 3.2799, 3.2783, 3.2784, 3.28, 3.2787, 3.278, 3.2797, 3.2804]
SEED1_MS = [135063, 134826, 135004, 134994, 134993, 134722, 134925, 134998, 134981, 134912]
NEW = [3.2806, 3.2764, 3.2787, 3.2778, 3.2776, 3.2754, 3.2779, 3.2775, 3.2782, 3.2779]
NEW_MS = [163078, 163129, 163029, 163141, 162534, 163100, 163046, 163144, 162926, 163224]
PRIOR = [3.2784, 3.2778, 3.2766, 3.2771, 3.2764, 3.2768, 3.276, 3.279, 3.2747, 3.2772]
PRIOR_MS = [164443, 164403, 164348, 164370, 164817, 164833, 164301, 164459, 164244, 164306]

CALIBRATION = "calibration rank 0: bfloat16_gemm={}TFLOP/s copy=4270GB/s launch=3.9us power_limit=700.00W"
VAL_FILES = "val_files=data/fineweb10B/fineweb_val_*.bin"
TASK = f"{VAL_FILES}\nval_tokens=10485760\ntrain_files=data/fineweb10B/fineweb_train_*.bin"


def write_runs(folder, losses, milliseconds, steps=2225, script="import torch\nprint(1)", settings=""):
    """Logs in this project's format, as far as tools read it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (loss, ms) in enumerate(zip(losses, milliseconds, strict=True)):
        lines = [script, LINE, "Python 3", settings, LINE]
        lines.append(f"step:0/{steps} val_loss:10.8258 train_time:0ms step_avg:0.04ms")
        lines.append(f"step:1/{steps} train_time:61ms step_avg:61.00ms")
        lines.append(f"step:{steps}/{steps} val_loss:{loss} train_time:{ms}ms step_avg:60.70ms")
        lines.append("peak memory allocated: 29250 MiB reserved: 47336 MiB")
        (folder / f"{i}.txt").write_text("\n".join(lines) + "\n")
    return folder


def tool(*arguments, **options):
    """What the tool printed and its exit code; with options it is a process of its own."""
    arguments = list(map(str, arguments))
    if options:
        command = [sys.executable, str(TOOL), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
        assert "Traceback" not in done.stderr, done.stderr
        return done
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", ["record.py", *arguments]):
            code = record.main()
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def refused(*arguments, says):
    """The tool ends in one line that says so, with the code of a user's mistake; notes may come before it."""
    done = tool(*arguments)
    assert done.returncode == 2 and done.stderr.count("record.py: ") == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("record.py: ") and says in line, line


def succeeded(*arguments):
    """What the tool printed when nothing went wrong."""
    done = tool(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stats_on_the_published_numbers(tmp_path):
    write_runs(tmp_path / "seed1", SEED1, SEED1_MS)
    (found,) = json.loads(tool("stats", tmp_path / "seed1", "--json").stdout)
    wanted = dict(loss_mean=3.2789, loss_std=0.0010, p=0.0034, time_mean=134.9418, time_std=0.1008)
    assert {name: round(found[name], 4) for name in wanted} == wanted
    assert found["runs"] == 10 and found["step_avg_ms"] == pytest.approx(60.648, abs=1e-3)
    table = tool("stats", tmp_path / "seed1").stdout
    assert re.search(r"2225 +10 +3\.2789 +0\.0010 +0\.0034 +134\.9418 +0\.1008 +60\.65", table)
    table = tool("stats", tmp_path / "seed1", "--markdown").stdout
    assert "| 2225 | 10 | 3.2789 | 0.0010 | 0.0034 | 134.9418 | 0.1008 | 60.65 |" in table


def test_target(tmp_path):
    write_runs(tmp_path / "seed1", SEED1, SEED1_MS)
    (found,) = json.loads(tool("stats", tmp_path / "seed1", "--json", "--target=3.278").stdout)
    assert found["p"] > 0.9


def test_compare_on_the_published_numbers(tmp_path):
    prior = write_runs(tmp_path / "prior", PRIOR, PRIOR_MS)
    new = write_runs(tmp_path / "new", NEW, NEW_MS)
    text = tool("compare", prior, new).stdout
    for part in ("A: 10 runs of 2225 steps", "(p 0.0000), 164.4524", "(p 0.0003), 163.0351"):
        assert part in text
    assert re.search(r"times, B - A: -1\.4173 s, 95 % interval -1\.6\d+ to -1\.2\d+, Welch p 0\.0000", text)
    assert "B is faster (-1.4173 s)" in text
    assert "B is slower (+1.4173 s)" in tool("compare", new, prior).stdout
    text = tool("compare", new, new).stdout
    assert "Neither is shown to be faster (+0.0000 s), and no difference in loss is shown." in text


def test_compare_names_the_better_loss(tmp_path):
    low = write_runs(tmp_path / "low", [3.270, 3.271, 3.272], [9000, 9001, 9002])
    high = write_runs(tmp_path / "high", [3.290, 3.291, 3.292], [9000, 9001, 9002])
    assert "and its loss is worse." in tool("compare", low, high).stdout
    assert "and its loss is better." in tool("compare", high, low).stdout


def test_public_logs(tmp_path):
    """A separator before the script, several separators, other names, a nested folder, the oldest format."""
    steps = "step:0/9 val_loss:10.8 train_time:0ms step_avg:nanms\n"
    steps += "step:9/9 val_loss:3.27 train_time:900ms step_avg:100.00ms\n"
    quoted = "import os\n'''\nstep:5/9 val_loss:1.0 train_time:1ms step_avg:1.00ms\n'''\n"
    old = "s:0 tel:10.9\ns:0 trl:10.9 lr:1e-3 norm:1\ns:8 trl:3.3 lr:1e-3 norm:1\ns:9 tel:3.29\n"
    (tmp_path / "nested").mkdir()
    (tmp_path / "a.txt").write_text(f"{LINE}\nimport os\n{LINE}\nRunning python\n{LINE}\n{steps}{LINE}\n")
    (tmp_path / "nested" / "b.log").write_text(f"{quoted}{LINE}\n{steps}")
    (tmp_path / "old.log").write_text(old)
    (tmp_path / "notes.txt").write_text("it went well\n")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 100)
    done = tool("stats", tmp_path, "--json")
    plain, nested = json.loads(done.stdout)
    assert (plain["losses"], plain["times"]) == ([3.27, 3.29], [0.9])
    assert (nested["folder"], nested["losses"]) == (str(tmp_path / "nested"), [3.27])
    for name in ("notes.txt", "binary.txt"):
        assert f"left out: {tmp_path}/{name}: not a log" in done.stderr
    refused("new", "a", tmp_path / "old.log", "--unproven", f"--records={tmp_path}", says="holds no script")


def test_unfinished_and_not_finite_runs_are_left_out_by_name(tmp_path):
    write_runs(tmp_path, [3.27, 3.28, "nan", 3.29], [1, 2, 3, 4])
    whole = (tmp_path / "3.txt").read_text()
    (tmp_path / "3.txt").write_text(whole[: whole.index("step:2225")])
    (tmp_path / "4.txt").write_text(f"script\n{LINE}\nstep:1/9 train_time:5ms step_avg:5.00ms\n")
    (tmp_path / "6.txt").write_text(f"script\n{LINE}\nPython 3\narguments: --seed=1\nseed=1\n")
    (tmp_path / "5.txt").write_text("s:0 tel:10.9\ns:1 trl:10.8 lr:1 norm:1\n")
    done = tool("stats", tmp_path, "--json")
    assert json.loads(done.stdout)[0]["losses"] == [3.27, 3.28]
    for line in (
        "2.txt: its final loss is nan",
        "3.txt: unfinished, cut off after step 0 of 2225",
        "4.txt: unfinished, cut off before",
        "5.txt: unfinished",
        "6.txt: unfinished, cut off before its first step",
    ):
        assert line in done.stderr


def test_different_lengths_are_kept_apart(tmp_path):
    write_runs(tmp_path / "a", [3.27, 3.28], [1, 2])
    write_runs(tmp_path / "b", [3.3], [1], steps=1705)
    done = tool("stats", tmp_path, "--json")
    groups = [(s["steps"], s["runs"], s["p"] is None) for s in json.loads(done.stdout)]
    assert groups == [(2225, 2, False), (1705, 1, True)]
    assert "runs of different length, so they are kept apart: 1 of 1705 steps, 2 of 2225" in done.stderr
    assert "1705 steps: one run gives no p; at least 1 more is missing" in done.stderr
    assert tool("compare", tmp_path, tmp_path / "a").returncode == 2


@pytest.mark.parametrize(
    "prepare, says",
    [
        (lambda folder: None, "holds no .txt or .log file"),
        (lambda folder: (folder / "a.txt").write_bytes(b"\0" * 1000), "no finished run"),
        (lambda folder: folder.rmdir(), "does not exist"),
    ],
)
def test_bad_input(tmp_path, prepare, says):
    folder = tmp_path / "logs"
    folder.mkdir()
    prepare(folder)
    for command in (["stats", folder], ["compare", folder, folder]):
        done = tool(*command)
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and last.startswith("record.py: ") and says in last


def test_unknown_arguments(tmp_path):
    for arguments in (["stats"], ["stats", tmp_path, "--fast"], ["compare", "a"], ["sort"]):
        refused(*arguments, says="--help lists what there is")


def test_one_run_cannot_be_compared(tmp_path):
    write_runs(tmp_path, [3.27], [1])
    refused("compare", tmp_path, tmp_path, says="at least 1 more is missing")


def test_folders_are_kept_apart(tmp_path):
    """Those at all depths but hidden ones; a link that leads in a ring is followed once."""
    for name, losses in (("baseline", [3.28, 3.29]), ("candidate", [3.27, 3.25]), ("deep/er/still", [3.26])):
        write_runs(tmp_path / "x" / name, losses, range(len(losses)))
    shutil.copytree(tmp_path / "x" / "baseline", tmp_path / "x" / ".old")
    (tmp_path / "x" / "deep" / "ring").symlink_to(tmp_path / "x")
    done = tool("stats", tmp_path / "x", "--json")
    found = {Path(s["folder"]).name: s["losses"] for s in json.loads(done.stdout)}
    assert found == {"baseline": [3.28, 3.29], "candidate": [3.27, 3.25], "still": [3.26]}
    assert f"{tmp_path}/x: searched at all depths; its logs lie in 3 folders, up to 3 deep" in done.stderr
    table = succeeded("stats", tmp_path / "x")
    assert re.search(r"/candidate +2225 +2 +3\.2600 ", table)
    assert "candidate, 2225 steps, losses: 3.2700 3.2500\n" in table
    refused("compare", tmp_path / "x", tmp_path / "x" / "baseline", says="runs in 3 folders")
    logs = [tmp_path / "x" / name / "0.txt" for name in ("baseline", "candidate")]
    (named,) = json.loads(succeeded("stats", *logs, "--json"))  # one by one they are one group
    assert named["losses"] == [3.28, 3.27]


def test_a_run_counts_once(tmp_path):
    """Given twice, copied, archived or as the console showed it; runs with equal figures are two."""
    a = write_runs(tmp_path / "a", [3.27, 3.271], [9, 8], settings="seed=1")
    shutil.copy(a / "0.txt", a / "9.txt")
    (a / "console.log").write_text((a / "1.txt").read_text().rpartition(LINE)[2])
    write_runs(tmp_path / "b", [3.27], [9], settings="seed=2")
    succeeded("new", "kept", a, f"--records={tmp_path}/records", "--unproven")
    for paths in (
        [a],
        [a, a],
        [a / "0.txt", a / "1.txt", a / "0.txt"],
        [a, the_record(tmp_path / "records", "kept")],
    ):
        done = tool("stats", *paths, "--json")
        assert [s["losses"] for s in json.loads(done.stdout)] == [[3.27, 3.271]]
        assert f"left out: {paths[-1] if paths[-1].is_file() else ''}" in done.stderr
    assert f"left out: {a}/console.log: the same run as {a}/1.txt" in tool("stats", a).stderr
    losses = [s["losses"] for s in json.loads(tool("stats", a, tmp_path / "b", "--json").stdout)]
    assert losses == [[3.27, 3.271], [3.27]]


def test_times_in_seconds(tmp_path):
    lines = ["import torch", LINE, "step:0/9 val_loss:10.82584 train_time:0.000s step_avg:0.12ms"]
    lines += ["step:1/9 train_time:178.564s step_avg:178564.12ms"]
    (tmp_path / "a.txt").write_text("\n".join(lines) + "\n")
    assert "a.txt: unfinished, cut off after step 0 of 9" in tool("stats", tmp_path).stderr
    lines += ["step:9/9 val_loss:3.27975 train_time:553.294s step_avg:166.40ms", ""]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (found,) = json.loads(succeeded("stats", tmp_path, "--json"))
    assert (found["losses"], found["times"]) == ([3.27975], [553.294])


def test_unusable_arguments(tmp_path):
    a = write_runs(tmp_path / "a", [3.27, 3.271], [1, 2])
    for command in (["stats", ""], ["compare", "", a], ["diff", a, ""], ["plot", "", "-o", "a.png"]):
        refused(*command, says="'': does not exist; name a log or a folder of logs")
    for target in ("nan", "inf", "-1", "x"):
        for command in (["stats", a], ["plot", a, "-o", tmp_path / "a.png"]):
            refused(*command, f"--target={target}", says=f"'{target}' is no loss; give nats a token, as 3.28")
    refused("plot", a, "-o", "", says="-o '': names no file")
    refused("race", TOOL, TOOL, "--preset=record", f"--out={a}/0.txt", says="0.txt/a: Not a directory")


def test_torch_is_never_imported(tmp_path):
    """With a torch that cannot be imported, what reads logs works."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    a = write_runs(tmp_path / "a", PRIOR, PRIOR_MS)
    for command in (["stats", a], ["compare", a, a], ["diff", a, a], ["plot", a, "-o", tmp_path / "a.png"]):
        done = tool(*command, env=environment)
        assert done.returncode == 0, done.stderr


def test_diff_takes_the_scripts_out_of_logs(tmp_path):
    for name, rate in (("a", "0.03"), ("b", "0.04")):
        script = f"x = 1\nlr = {rate}\ny = 2"
        write_runs(tmp_path / name, [3.27], [1], script=script, settings=f"muon_lr={rate}\nseed=1")
    (tmp_path / "b.py").write_text("x = 1\nlr = 0.04\ny = 2\n")
    text = tool("diff", tmp_path / "a", tmp_path / "b").stdout
    first, *lines = text.splitlines()
    assert first == "muon_lr: 0.03 -> 0.04"
    assert [line for line in lines if line[:1] in "+-"][2:] == ["-lr = 0.03", "+lr = 0.04"]
    assert "\033" not in text
    text = tool("diff", tmp_path / "a" / "0.txt", tmp_path / "b.py").stdout
    assert "+lr = 0.04" in text and "(not set)" not in text
    command = f"{sys.executable} {TOOL} diff {tmp_path}/a/0.txt {tmp_path}/b/0.txt | head -1"
    piped = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert piped.stdout == "muon_lr: 0.03 -> 0.04\n" and not piped.stderr
    (tmp_path / "notes.txt").write_text("no log\n")
    refused("diff", tmp_path / "notes.txt", tmp_path / "b.py", says="neither a script nor a log")
    refused("diff", tmp_path / "none.py", tmp_path / "b.py", says="cannot be read as a script")


def test_diff_takes_what_most_runs_share(tmp_path):
    """And names the log, on stderr and in the header; logs without a script do not count."""
    write_runs(tmp_path / "a", [3.27], [1], script="x = 1")
    write_runs(tmp_path / "a" / "more", [3.28, 3.29, 3.3], [1, 2, 3], script="x = 2")
    (tmp_path / "a" / "old").mkdir()
    for i in range(9):
        (tmp_path / "a" / "old" / f"{i}.log").write_text(f"s:0 tel:10.9\ns:9 tel:3.{i}\n")
    (tmp_path / "b.py").write_text("x = 3\n")
    done = tool("diff", tmp_path / "a", tmp_path / "b.py")
    log = f"{tmp_path}/a/more/0.txt"
    assert f"{tmp_path}/a: {log}, whose script 3 of 4 logs share\n" in done.stderr
    assert done.stdout.splitlines()[0] == f"--- {log}" and "-x = 2\n+x = 3" in done.stdout
    refused("diff", tmp_path / "a" / "old", tmp_path / "b.py", says="neither a script nor a log with one")


def run_until(command, lines):
    """The first lines that a command prints; then it and what it started are killed."""
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    printed = [next(child.stdout) for _ in range(lines)]
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    return printed


def test_race_resumes(tmp_path):
    """Two scripts, two runs each, killed in the second round: what is finished is kept, the rest is run."""
    script = ROOT / "train_gpt.py"
    other = tmp_path / "other.py"
    other.write_text(script.read_text())
    flags = tiny_flags(tmp_path)
    flags += ["--num_scheduled_iterations=6", "--num_extension_iterations=0", "--warmup_steps=0"]
    command = [sys.executable, str(TOOL), "race", str(other), str(script)]
    command += ["--runs=2", f"--out={tmp_path}/race", "--nproc=1", *flags]

    def race(limit):
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=limit)

    *_, result, last = run_until(command, 5)  # a line before each run and one after it
    assert re.match(r"B, seed 1: loss 5\.\d{4}, \d+\.\d{3} s\n", result)
    assert last.startswith(f"run: {other} ") and "--seed=2" in last
    done = race(120)
    assert done.returncode == 0, done.stderr
    runs = [line for line in done.stdout.splitlines() if line.startswith("run: ")]
    assert [line.split()[1] for line in runs] == [str(other), str(script)]
    assert all("--seed=2" in line for line in runs)
    for side in ("a", "b"):
        logs = [path.read_text() for path in (tmp_path / "race" / side).iterdir()]
        whole = [text for text in logs if "step:6/6 val_loss" in text]
        assert sorted(re.search(r"^seed=(\d+)$", text, re.M)[1] for text in whole) == ["1", "2"]
    for part in ("A: 2 runs of 6 steps", "times, B - A:", "losses, B - A: +0.00000"):
        assert part in done.stdout
    assert (
        "losses, B - A, 2 pairs of equal seed: +0.00000 nats" in done.stdout
        and "t-test p 1.0000" in done.stdout
    )
    again = race(60)
    assert again.returncode == 0 and not re.search("^run: ", again.stdout, re.M)
    other.write_text(script.read_text() + "\n# another version\n")
    changed = race(60)
    assert changed.returncode == 2 and "holds runs of another version" in changed.stderr


FAKE = f"""
import pathlib, shlex, sys
flags = dict(flag.removeprefix("--").split("=") for flag in sys.argv[1:])
seed = int(flags["seed"])
if flags.get("fails") == flags["seed"] and not pathlib.Path("mended").exists():
    raise SystemExit("RuntimeError: no luck")
loss = LOSS + 0.01 * seed + float(flags.get("worse", 0)) * seed
settings = [f"arguments: {{shlex.join(sys.argv[1:])}}", f"seed={{seed}}", f"preset={{flags['preset']}}"]
settings += ["val_tokens=9", "val_files=data/sample_val.bin", "train_files=data/sample_train.bin"]
lines = [pathlib.Path(__file__).read_text(), "{LINE}", *settings, "{LINE}"]
lines.append(f"step:9/9 val_loss:{{loss:.4f}} train_time:{{TIME + seed}}ms step_avg:1.00ms")
pathlib.Path(flags["log_dir"], f"{{seed}}.txt").write_text("\\n".join(lines) + "\\n")
"""


@pytest.fixture
def racers(tmp_path, monkeypatch):
    """Two scripts that train nothing and log as the project's do, in a project without GPU, data and runs."""
    (tmp_path / "a.py").write_text(f"LOSS, TIME = 3.28, 9000\n{FAKE}")
    (tmp_path / "b.py").write_text(f"LOSS, TIME = 3.279, 8000\n{FAKE}")
    (tmp_path / "data").mkdir()
    sample = (
        "import pathlib\nwith open(pathlib.Path(__file__).parent / 'made', 'a') as file:\n    file.write('.')"
    )
    (tmp_path / "data" / "sample.py").write_text(sample)
    (tmp_path / "data" / "made").write_text("")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "SAMPLE", tmp_path / "data" / "last.bin")
    monkeypatch.setattr(record, "count_gpus", lambda: 0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_race_on_a_machine_without_gpu_and_data(racers):
    """The sample is made and told of; runs alternate by the same seeds, and each result follows its run."""
    done = tool("race", "a.py", "b.py --worse=0.1", "--runs=3", "--seed=5", "--muon_lr=1")
    assert done.returncode == 0 and (racers / "data" / "made").read_text() == "."
    assert "no CUDA GPU found" in done.stderr and "--preset=sample" in done.stderr
    lines = done.stdout.splitlines()
    for i in range(3):
        both = f"--preset=sample --muon_lr=1 {{}}--seed={5 + i} --log_dir=logs/race/"
        assert lines[4 * i] == f"run: a.py {both.format('')}a"
        assert lines[4 * i + 1] == f"A, seed {5 + i}: loss {3.33 + 0.01 * i:.4f}, {9.005 + 0.001 * i:.3f} s"
        assert lines[4 * i + 2] == f"run: b.py {both.format('--worse=0.1 ')}b"
    assert lines[-1].startswith("This says nothing about FineWeb: its validation set, 9 tokens of")
    assert "the small sample model's losses compare only with each other" in lines[-1]
    (racers / "data" / "last.bin").touch()
    again = tool("race", "a.py", "b.py --worse=0.1", "--runs=3", "--seed=5", "--muon_lr=1")
    assert "run: " not in again.stdout and again.stdout.count(", seed ") == 6
    assert (racers / "data" / "made").read_text() == "."
    done = tool("race", "a.py", "b.py", "--runs=3", "--seed=5", "--muon_lr=1")
    assert done.returncode == 2 and "holds runs of another version of b.py or with other flags" in done.stderr


def test_race_is_compared_by_pairs(racers):
    """A seed moves both losses by 0.01, the script by 0.001: pairs show it, Welch's test does not."""
    done = tool("race", "a.py", "b.py --worse=0.0001", "--runs=5", "--preset=record")
    assert done.returncode == 0 and "no CUDA GPU" not in done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"(seed|mean| +\d) ", line)]
    assert " ".join(rows[0]) == "seed loss A loss B B - A time A s time B s B / A"
    assert rows[1] == ["1", "3.2900", "3.2891", "-0.0009", "9.001", "8.001", "0.8889"]
    assert rows[5] == ["5", "3.3300", "3.3295", "-0.0005", "9.005", "8.005", "0.8890"]
    assert rows[6] == ["mean", "3.3100", "3.3093", "-0.0007", "9.003", "8.003", "0.8889"] and len(rows) == 7
    a, b = ([float(row[i]) for row in rows[1:6]] for i in (1, 2))
    test = scipy.stats.ttest_rel(b, a)
    low, high = test.confidence_interval(0.95)
    error = statistics.stdev(y - x for x, y in zip(a, b, strict=True)) / 5**0.5
    assert (
        f"losses, B - A, 5 pairs of equal seed: -0.00070 nats, 95 % interval {low:+.5f} to {high:+.5f},"
        f" standard error {error:.5f}, paired t-test p {test.pvalue:.4f}\n"
    ) in done.stdout
    assert f"Welch p {scipy.stats.ttest_ind(b, a, equal_var=False).pvalue:.4f}\n" in done.stdout
    assert "B is faster (-1.0000 s), and its loss is better.\n" in done.stdout
    (racers / "logs" / "race" / "b" / "2.txt").unlink()
    text = succeeded("compare", "logs/race/a", "logs/race/b")
    assert "4 pairs of equal seed" in text and not re.search("^ +2 ", text, re.M)


def test_race_survives_a_run_that_fails(racers):
    command = ["race", "a.py", "b.py --fails=2", "--runs=3", "--preset=record"]
    done = tool(*command)
    assert done.returncode == 1 and done.stdout.count("run: ") == 6
    assert "2 pairs of equal seed" in done.stdout
    failure = "record.py: b.py, seed 2: ended with code 1: RuntimeError: no luck"
    assert done.stderr.splitlines() == [
        f"{failure}; the race goes on without this run",
        "record.py: 1 of 6 runs failed; the same command tries them again",
    ]
    (racers / "mended").touch()
    done = tool(*command)
    assert (done.returncode, done.stderr, done.stdout.count("run: ")) == (0, "", 1)
    assert "3 pairs of equal seed" in done.stdout
    (racers / "mended").unlink()
    done = tool("race", "a.py", "b.py --fails=1", "--runs=3", "--preset=record", "--out=broken")
    assert done.returncode == 2 and done.stdout.count("run: ") == 2  # its side has none yet
    assert done.stderr.endswith("no luck; mend it, and the same command goes on from here\n")


def test_race_keeps_to_the_script_it_began_with(racers):
    """One that is changed in mid-race is found out."""
    change = "import pathlib\npathlib.Path('a.py').write_text(pathlib.Path('a.py').read_text() + '# more')\n"
    (racers / "b.py").write_text(f"LOSS, TIME = 3.279, 8000\n{change}{FAKE}")
    done = tool("race", "a.py", "b.py", "--runs=2", "--preset=record")
    assert "a.py, seed 2: ended without the log of a finished run of this script" in done.stderr


def test_visible_gpus(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    for visible, count in (("", 0), ("-1", 0), ("3", 1), ("0,2", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert record.count_gpus() == count


def test_new_keeps_the_other_side(racers):
    """Its script, with the commit that it is of, and its logs: what the page says works without the race."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for command in (["init", "-q"], ["add", "a.py"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert tool("race", "a.py", "b.py", "--runs=2").returncode == 0
    command = ["new", "b", "logs/race/b", "--records=records", "--against=logs/race/a"]
    refused(*command, says="keep them with --unproven")
    succeeded(*command, "--unproven")
    folder = the_record(racers / "records", "b").relative_to(racers)
    assert (folder / "baseline" / "train_gpt.py").read_text() == (racers / "a.py").read_text()
    text = (folder / "README.md").read_text()
    assert (
        f"Against `logs/race/a`, whose script is `baseline/train_gpt.py` (commit `{commit}`): +1 -1 lines"
        in text
    )
    assert (
        "**no claim to the target**" in text
        and "the small sample model's losses compare only with each other" in text
    )
    table = succeeded("compare", "logs/race/a", "logs/race/b")
    shutil.rmtree("logs")
    assert succeeded("compare", folder / "baseline", folder) == table
    means = next(line for line in table.splitlines() if line.startswith("mean"))
    assert f"| {' | '.join(means.split())} |" in text
    assert "- B's mean loss is at or below A's plus 0.001, after 0.8" in text
    assert (
        "- The logs of A hold no calibration, so a slower machine cannot be told from a slower script."
        in text
    )
    own = succeeded("stats", folder)  # the baseline's are another group
    assert own == succeeded("stats", folder / "logs") != succeeded("stats", folder / "baseline")
    shown = re.search(r"`\./run\.sh record (diff [^`]+)`", text)[1]
    assert "+LOSS, TIME = 3.279, 8000" in succeeded(*shown.split())
    succeeded(
        "new", "c", folder, "--records=records", "--unproven"
    )  # against a record, which is there for all
    again = the_record(racers / "records", "c")
    assert not (again / "baseline").exists() and "## Race" not in (again / "README.md").read_text()
    succeeded("new", "d", folder, "--records=records", "--unproven", "--against=a.py")  # a script alone
    last = the_record(racers / "records", "d")
    assert not any((last / "baseline").iterdir())  # it is kept already, and no run of it was given
    text = (last / "README.md").read_text()
    assert f"whose script is `../{folder.name}/baseline/train_gpt.py`" in text and "## Race" not in text
    assert tool("race", "a.py", "b.py --rate=2", "--runs=2", "--out=more").returncode == 0
    succeeded("new", "e", "more/b", "--records=records", "--unproven", "--against=more/a")
    last = the_record(racers / "records", "e")
    assert sorted(path.suffix for path in (last / "baseline").iterdir()) == [".txt", ".txt"]
    assert succeeded("compare", last / "baseline", last) == succeeded("compare", "more/a", "more/b")


def test_new_refuses_a_baseline_that_is_not_one(tmp_path):
    """Of several lengths, settings or scripts, or unfinished: one line, and no folder that is in the way."""
    write_runs(tmp_path / "b", [3.2, 3.21], [1, 2], settings=f"x=1\n{TASK}")
    write_runs(tmp_path / "lengths", [3.3], [3], settings=f"x=1\n{TASK}", steps=7)
    write_runs(tmp_path / "lengths" / "more", [3.31], [3], settings=f"x=1\n{TASK}")
    for i, folder in enumerate(("settings", "settings/more")):
        write_runs(tmp_path / folder, [3.3 + i / 100], [3], settings=f"x={i}\n{TASK}")
        write_runs(tmp_path / folder.replace("settings", "scripts"), [3.4 + i / 100], [3], script=f"x = {i}")
    write_runs(tmp_path / "unfinished", [3.3], [3])
    log = tmp_path / "unfinished" / "0.txt"
    log.write_text(log.read_text().rpartition("step:2225")[0])
    for name, says in (
        ("lengths", "of different length"),
        ("settings", "other settings than"),
        ("scripts", "another script than"),
        ("unfinished", "no finished run"),
    ):
        against = f"--against={tmp_path / name}"
        refused(
            "new", "n", tmp_path / "b", against, "--unproven", f"--records={tmp_path / 'records'}", says=says
        )
        assert not (tmp_path / "records").exists(), name


def test_a_folder_named_baseline(tmp_path):
    """Outside of a record it is a folder like others."""
    write_runs(tmp_path / "logs", [3.2, 3.21], [1, 2])
    write_runs(tmp_path / "baseline", [3.3, 3.31], [1, 2])
    assert "3.3000" in succeeded("stats", tmp_path)


def test_race_refuses(tmp_path):
    refused("race", TOOL, TOOL, "--runs=1", says="at least 2")
    refused("race", tmp_path / "missing.py", TOOL, says="missing.py: does not exist")
    failing = tmp_path / "failing.py"
    failing.write_text("raise SystemExit(3)")
    options = [f"--out={tmp_path}/race", "--nproc=1", "--preset=record"]
    refused(
        "race", failing, failing, *options, says="failing.py, seed 1: ended with code 3: no word; mend it"
    )
    refused("race", "'", failing, *options, says="name a script, or in quotes a script and its flags")
    refused("race", "", failing, *options, says="name a script, or in quotes a script and its flags")


def test_two_thousand_logs(tmp_path):
    """2,000 logs of 180 kB: the figure is 5 s; the bound here leaves room for a slow disk."""
    write_runs(tmp_path, [3.2777], [135000], script="# a line of a long script\n" * 6900)
    log = (tmp_path / "0.txt").read_bytes()
    assert len(log) > 175_000
    for i in range(1, 2000):
        (tmp_path / f"{i}.txt").write_bytes(log.replace(b":135000ms", b":%dms" % (135000 + i)))
    program = f"""
import runpy, sys
sys.argv = ["record.py", "stats", {str(tmp_path)!r}]
try:
    runpy.run_path({str(TOOL)!r}, run_name="__main__")
finally:
    print(open("/proc/self/status").read())
"""
    began = time.time()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert re.search(r"2225 +2000 +3\.2777", done.stdout)
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) < 300_000
    print(f"{time.time() - began:.1f} s")


def calibrated(gemm, other=None):
    """Calibration lines of one rank, or of two."""
    lines = [CALIBRATION.format(gemm)]
    if other:
        lines.append(CALIBRATION.format(other).replace("rank 0", "rank 1"))
    return "\n".join(lines)


def test_compare_tells_machines_apart(tmp_path):
    write_runs(tmp_path / "a", PRIOR, PRIOR_MS, settings=calibrated(700))
    write_runs(tmp_path / "near", NEW, NEW_MS, settings=calibrated(706, 704))
    write_runs(tmp_path / "far", NEW, NEW_MS, settings=calibrated(705, 690))
    write_runs(tmp_path / "none", NEW, NEW_MS)
    text = tool("compare", tmp_path / "a", tmp_path / "near").stdout
    assert "bfloat16_gemm TFLOP/s: A 700, B 704 (+0.6%)" in text and "launch us: A 3.9, B 3.9" in text
    assert "machines differ" not in text
    text = tool("compare", tmp_path / "a", tmp_path / "far").stdout
    assert "The machines differ by more than 1 % (bfloat16_gemm -1.4%)" in text
    text = tool("compare", tmp_path / "a", tmp_path / "none").stdout
    assert "The logs of B hold no calibration" in text


def is_png(path, width):
    """Whether a picture of this width lies there."""
    data = path.read_bytes()
    return data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") == width


def the_record(records, name):
    """The folder of the record of this name."""
    (folder,) = [*records.glob(f"*_{name}"), *records.glob(f"proxy/*_{name}")]
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two records from the published numbers, the second against the first, and their logs."""
    folder = tmp_path_factory.mktemp("made")
    head = "devices: 8 x NVIDIA H100\nPyTorch 2.13.0\narguments: --seed=7 --muon_lr=0.03\n"
    head += f"muon_lr=0.03\n{TASK}\n"
    a_settings = head + calibrated(700)
    b_settings = head.replace("0.03", "0.04") + calibrated(680)
    write_runs(folder / "a", PRIOR, PRIOR_MS, settings=a_settings, script="def f():\n    return 1")
    write_runs(folder / "b", NEW, NEW_MS, settings=b_settings, script="def f():\n    return 2")
    for log in (folder / "b").glob("*.txt"):
        log.rename(log.with_name(f"later_{log.name}"))  # of one day the later log counts, not the name
    to = f"--records={folder}/records"
    succeeded("new", "first", folder / "a", to, "--what=The first", "--note=Only a test.")
    succeeded("new", "another", folder / "b", to)
    return folder


@pytest.fixture
def records(made, tmp_path):
    """A copy of the two records, with a copy of the logs beside it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "records"


def test_new(made):
    records = made / "records"
    first = the_record(records, "first")
    text = (first / "README.md").read_text()
    for part in (
        "# The first\n",
        "10 runs of 2225 steps on 8×NVIDIA H100: validation loss 3.2770 ± 0.0012, 164.452 ± 0.207 s",
        "p = 0.0000",
        "Only a test.",
        f"torchrun --standalone --nproc_per_node=8 records/{first.name}/train_gpt.py --muon_lr=0.03\n",
        "compared with none",
        "| 0.txt | - | 3.2784 | 164.443 |",
        "PyTorch 2.13.0",
    ):
        assert part in text, part
    assert (first / "train_gpt.py").read_text() == "def f():\n    return 1\n"
    assert len(list((first / "logs").iterdir())) == 10 and is_png(first / "curves.png", 1000)
    refused("new", "first", made / "a", f"--records={records}", says="exists already")
    another = the_record(records, "another")
    text = (another / "README.md").read_text()
    for part in ("+1 -1 lines, in `f`", "- `muon_lr: 0.03 -> 0.04`", f"Against `{first}`"):
        assert part in text, part
    assert f"record diff {first} records/{another.name}`" in text


def test_summary_of_a_diff():
    """It names the definitions that differ, or says how many there are where a list would not be read."""

    def script(count: int, value: int) -> str:
        return "".join(f"def f{i}():\n    return {value}\n" for i in range(count))

    assert record.summarize_diff(script(2, 1), script(2, 2)) == "+2 -2 lines, in `f0`, `f1`"
    assert record.summarize_diff(script(40, 1), script(40, 2)).endswith("`f38`, `f39`")
    many = record.summarize_diff(script(41, 1), script(41, 2))
    assert many == "+41 -41 lines, in 41 classes, functions and tables"


def test_archived_logs_name_their_script(records, tmp_path):
    """A record's logs are those of the runs, with one line in the place of the source, and read alike."""
    first = the_record(records, "first")
    digest = hashlib.sha256((first / "train_gpt.py").read_bytes()).hexdigest()
    for log in (first / "logs").iterdir():
        whole = (tmp_path / "a" / log.name).read_text()
        named, rest = log.read_text().split("\n", 1)
        assert named == f"script: train_gpt.py sha256:{digest}"
        assert whole == f"def f():\n    return 1\n{rest}" and rest.startswith(LINE)
        assert record.read_head(log) == record.read_head(tmp_path / "a" / log.name)
    assert tool("stats", first).stdout == tool("stats", tmp_path / "a").stdout
    assert succeeded("diff", first, tmp_path / "a") == ""
    assert "+    return 2" in succeeded(
        "diff", first, the_record(records, "another") / "logs" / "later_0.txt"
    )
    assert "Neither is shown to be faster" in succeeded("compare", first, tmp_path / "a")
    script = first / "train_gpt.py"
    series = record.Series(script, script.read_text(), ["--muon_lr=0.03"], first / "logs")
    assert len(record.finished_runs(series)) == 10
    assert not record.finished_runs(dataclasses.replace(series, text="def f():\n    return 2\n"))
    assert not record.finished_runs(dataclasses.replace(series, flags=[]))
    beside = tmp_path / "beside"
    shutil.copytree(first / "logs", beside)
    shutil.copy(first / "train_gpt.py", beside)
    assert succeeded("diff", beside, tmp_path / "a") == ""
    done = tool("diff", "0.txt", tmp_path / "a", cwd=first / "logs")  # where a path names no folder
    assert (done.returncode, done.stdout) == (0, "")
    succeeded("new", "again", first, f"--records={tmp_path}/others")
    again = the_record(tmp_path / "others", "again")
    assert (again / "logs" / "0.txt").read_bytes() == (first / "logs" / "0.txt").read_bytes()
    assert (again / "train_gpt.py").read_bytes() == (first / "train_gpt.py").read_bytes()


@pytest.mark.parametrize("change, says", [("missing", "cannot be read"), ("other", "its SHA-256 differs")])
def test_an_archived_script_must_be_the_one_named(records, tmp_path, change, says):
    first = the_record(records, "first")
    script = first / "train_gpt.py"
    if change == "missing":
        script.unlink()
    else:
        script.write_text("def f():\n    return 3\n")
    (records / "README.md").write_text("\n".join(record.MARKS))
    for command in (
        ["diff", first, tmp_path / "a"],
        ["new", "third", first, f"--records={tmp_path}/others"],
        ["history", f"--records={records}"],
        ["plot", tmp_path / "a", "-o", tmp_path / "a.png", f"--records={records}"],
    ):
        refused(*command, says=f"{script}: ")
        refused(*command, says=says)


def test_history(records, tmp_path):
    """The table of claims, of what proves nothing and of what others reported, with links from its page."""
    reported = dict(date="2024-10-10", what="theirs", machine="8×H100", steps=None)
    reported |= dict(losses=[3.27, 3.271], seconds=[900, 901])
    (records / "reported.json").write_text(json.dumps([reported]))
    (records / "ablations").mkdir()
    weak = write_runs(tmp_path / "weak", [3.28, 3.281], [1, 2], settings=TASK)
    succeeded("new", "weak", weak, "--unproven", f"--records={records}")
    page = records / "README.md"
    page.write_text("\n".join(["before", record.MARKS[0], "old", record.MARKS[1], "after", ""]))
    for _ in range(2):  # a second time changes nothing
        succeeded("history", f"--records={records}")
        lines = page.read_text().splitlines()
        assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
        rows = {line.split(" | ")[1]: line for line in lines if line.startswith("| 20")}
        assert sorted(rows) == ["The first", "another", "theirs", "weak"] and lines[7] == rows["theirs"]
        assert list(rows).index("another") < list(rows).index("The first")
        first = the_record(records, "first").name
        assert rows["The first"].endswith(f"| [{first}]({first}) |") and "| 0.0000 |" in rows["The first"]
        name = the_record(records, "weak").name
        assert rows["weak"].endswith(f"| [{name}](proxy/{name}) |") and "| no claim |" in rows["weak"]
        assert rows["theirs"].endswith("| reported by others |")
        assert any("differ by more than 1 %: bfloat16_gemm -2.9%" in line for line in lines)
    other = tmp_path / "README.md"
    other.write_text("\n".join(record.MARKS))
    succeeded("history", f"--records={records}", f"--readme={other}")
    assert f"](records/proxy/{name}) |" in other.read_text()


def test_plot(records, tmp_path):
    out = tmp_path / "out.png"
    succeeded("plot", tmp_path / "a", the_record(records, "another"), "-o", out, f"--records={records}")
    assert is_png(out, 1000)


def draw(monkeypatch, *arguments):
    """The figure of `plot`, and its axes without the history's."""
    kept = []
    save = record.save
    monkeypatch.setattr(record, "save", lambda drawn, path: kept.append(drawn) or save(drawn, path))
    succeeded("plot", *arguments)
    return kept[-1], kept[-1].axes


def test_plot_names_and_zooms(tmp_path, monkeypatch):
    """Folders of one name are told apart; the right half shows 0.02 around the target, or the lowest mean."""
    for name, loss in (("base/logs", 3.279), ("this/logs", 3.276), ("far/logs", 3.7)):
        write_runs(tmp_path / name, [loss, loss], [9000, 9100])
    to = ["-o", tmp_path / "out", f"--records={tmp_path}/none"]
    drawn, axes = draw(monkeypatch, tmp_path / "base" / "logs", tmp_path / "this", *to)
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "base (2 runs)",
        "this (2 runs)",
        "target 3.28",
    ]
    assert len(axes) == 4 and axes[1].get_ylim() == axes[3].get_ylim() == pytest.approx((3.26, 3.30))
    assert [line.get_ydata()[-1] for line in axes[1].lines if line.get_linestyle() == "-"] == [3.279, 3.276]
    drawn, axes = draw(monkeypatch, tmp_path / "far", *to)
    assert (
        axes[1].get_ylim() == pytest.approx((3.68, 3.72)) and "the lowest mean, 3.7;" in axes[1].get_title()
    )
    assert is_png(tmp_path / "out.png", 1000) and f"picture: {tmp_path}/out.png\n" == succeeded(
        "plot", tmp_path, *to
    )


def test_plot_of_many_sets(tmp_path, monkeypatch):
    """No two of 45 look alike, and the legend stands outside the axes."""
    for i in range(45):
        write_runs(tmp_path / "logs" / f"idea_{i}", [3.27 + i / 1000], [9000 + i])
    drawn, axes = draw(monkeypatch, tmp_path / "logs", "-o", tmp_path / "a.svg", f"--records={tmp_path}/none")
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes[0].lines}
    assert len(looks) == 45 + 1 and len(drawn.legends) == 1 and not any(axis.get_legend() for axis in axes)


@pytest.mark.parametrize(
    "folders, names",
    [
        (["x/baseline/logs", "x/this_pr/logs"], ["baseline", "this_pr"]),
        (["x/a/1/logs", "y/b/2/logs"], ["x/a/1", "y/b/2"]),
        (["x/a/run", "x/b/run", "x/c"], ["a/run", "b/run", "c"]),
        (["x", "x/x"], ["x", "x/x"]),
        (["x/a.txt", "x/b.txt"], ["a.txt", "b.txt"]),
        (["records/2026-11-22_books/logs"], ["2026-11-22_books"]),
        (["x/logs", "x/old"], ["logs", "old"]),
    ],
)
def test_short_names(folders, names):
    assert record.short_names(list(map(Path, folders))) == names


def test_records_of_old_and_of_log_files(tmp_path, monkeypatch):
    """A record at the target without times is drawn, and one whose logs are .log files is in the history."""
    for name, step in (
        ("old", "s:0 tel:10.9\ns:9 tel:{}\n"),
        ("log", "step:9/9 val_loss:{} train_time:9s step_avg:1ms\n"),
    ):
        (tmp_path / name).mkdir()
        for i in range(3):
            log = f"print({i // 9})\n{LINE}\n{step.format(3.27 + i / 1000)}"
            (tmp_path / name / f"{i}.log").write_text(log)
        succeeded("new", name, tmp_path / name, f"--records={tmp_path}/records")
    drawn, axes = draw(
        monkeypatch, tmp_path / "old", "-o", tmp_path / "a.png", f"--records={tmp_path}/records"
    )
    assert len(axes) == 3  # steps, near the target, and the history with what has times
    (tmp_path / "records" / "README.md").write_text("\n".join(record.MARKS))
    succeeded("history", f"--records={tmp_path}/records")
    rows = [
        row for row in (tmp_path / "records" / "README.md").read_text().splitlines() if row.startswith("| 20")
    ]
    assert len(rows) == 2 and all("3.2710 ± 0.0010, 3 runs" in row for row in rows)


def test_new_keeps_logs_of_one_name(tmp_path):
    """Every run that its page counts is there, under a name of its own."""
    a = write_runs(tmp_path / "a", [3.27, 3.271], [1, 2], settings=f"seed=1\n{TASK}")
    b = write_runs(tmp_path / "b", [3.272, 3.273], [3, 4], settings=f"seed=2\n{TASK}")
    write_runs(b / "deeper", [3.274], [5], settings=f"seed=3\n{TASK}")
    done = tool("new", "both", a, b, a / "0.txt", f"--records={tmp_path}/records")
    assert f"one group: 2 of {a}, 2 of {b}, 1 of {b}/deeper\n" in done.stderr
    folder = the_record(tmp_path / "records", "both")
    names = ["0-2.txt", "0-3.txt", "0.txt", "1-2.txt", "1.txt"]
    assert sorted(path.name for path in (folder / "logs").iterdir()) == names
    rows = re.findall(r"^\| (\S+\.txt) \| (\d) \| (3\.\d+) \|", (folder / "README.md").read_text(), re.M)
    assert [(seed, loss) for _, seed, loss in rows] == [
        *(("1", "3.2700"), ("1", "3.2710"), ("2", "3.2720"), ("2", "3.2730"), ("3", "3.2740"))
    ]
    for name, _, loss in rows:
        assert f"{record.read_run(folder / 'logs' / name).loss:.4f}" == loss
    (found,) = json.loads(succeeded("stats", folder, "--json"))
    assert found["runs"] == 5


def test_what_proves_nothing_goes_to_proxy(tmp_path):
    weak = write_runs(tmp_path / "weak", [3.28, 3.281], [1, 2], settings=TASK)
    proven = write_runs(tmp_path / "proven", PRIOR, PRIOR_MS, settings=TASK)
    for name, logs in (("weak", weak), ("proven", proven)):
        succeeded("new", name, logs, "--unproven", f"--records={tmp_path}/records")
    folder = the_record(tmp_path / "records", "weak")
    assert folder.parent == tmp_path / "records" / "proxy"
    text = (folder / "README.md").read_text()
    assert "**no claim to the target**" in text and f"python records/proxy/{folder.name}/train_gpt.py" in text
    proven_folder = the_record(tmp_path / "records", "proven")
    assert proven_folder.parent == tmp_path / "records"  # the flag allows, it does not degrade
    assert f"records/proxy/{folder.name}`: +0 -0 lines" in (proven_folder / "README.md").read_text()


def test_new_refuses(tmp_path):
    to = f"--records={tmp_path}/records"
    weak = write_runs(tmp_path / "weak", [3.28, 3.281], [1, 2], settings=TASK)
    refused("new", "a", weak, to, says="nothing is proven: p = ")
    other = write_runs(tmp_path / "other", PRIOR, PRIOR_MS, settings=TASK.replace("10485760", "1572864"))
    refused("new", "a", other, to, says="is not the target's, 10485760 of FineWeb")
    one = write_runs(tmp_path / "one", [3.2], [1], settings=TASK)
    refused("new", "a", one, to, says="one run gives no p")
    mixed = write_runs(tmp_path / "mixed", PRIOR, PRIOR_MS, script="x = 1")
    write_runs(tmp_path / "mixed" / "more", [3.2], [1], script="x = 2")
    refused("new", "a", mixed, to, says="made by another script")
    uneven = write_runs(tmp_path / "uneven", PRIOR, PRIOR_MS, settings=f"{TASK}\nseed=1\nmuon_lr=1")
    write_runs(uneven / "more", [3.2], [1], settings=f"{TASK}\nseed=2\nmuon_lr=2")
    refused("new", "a", uneven, to, says="other settings than")
    refused("new", "a", uneven, to, says="muon_lr: 1 -> 2")
    refused("new", "../a", weak, to, says="name a record by letters")
    assert not (tmp_path / "records").exists()


def test_bad_pictures_and_tables(tmp_path):
    runs = write_runs(tmp_path / "runs", PRIOR, PRIOR_MS)
    refused("plot", runs, "-o", tmp_path / "none" / "a.png", says="cannot be written")
    refused("plot", runs, "-o", tmp_path / "a.xyz", says="cannot be written")
    refused("plot", tmp_path / "x", "-o", "a.png", says="does not exist")
    (tmp_path / "README.md").write_text("no marks\n")
    refused("history", f"--readme={tmp_path}/README.md", says="the table's place is not marked")
    refused("history", f"--readme={tmp_path}/none.md", says="cannot be read")
    (tmp_path / "README.md").write_text("\n".join(record.MARKS))
    undated = dict(date="May", what="theirs", machine="8×H100", steps=None, losses=[3.2], seconds=[900])
    for text in ("{", "[1]", '[{"losses": [1], "seconds": [1]}]', json.dumps([undated])):
        (tmp_path / "reported.json").write_text(text)
        refused("history", f"--records={tmp_path}", says="reported.json: cannot be read")


KEPT = sorted([*TOOL.parent.glob("2*"), *TOOL.parent.glob("proxy/2*")])


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_kept_records_are_whole(folder):
    """Each log names the script beside it, which it does not repeat, and shows a run of it."""
    assert is_png(folder / "curves.png", 1000)
    sides = [(folder, "logs")]
    if "## Race" in (folder / "README.md").read_text():
        sides.append((folder / "baseline", "."))
    for place, below in sides:
        logs = sorted((place / below).glob("*.txt"))
        assert logs
        for log in logs:
            first, line = log.read_text().splitlines()[:2]
            name, digest = re.fullmatch(r"script: (\S*train_gpt\.py) sha256:(\w{64})", first).groups()
            script = (place / name).read_bytes()
            assert hashlib.sha256(script).hexdigest() == digest and line == LINE
            assert below == "." or name == "train_gpt.py"
            assert isinstance(record.read_run(log), record.Run)
            assert record.read_head(log)[0] == script.decode().strip()


def test_records_pages():
    """Their links lead somewhere, their table is today's, and the folder stays small."""
    for page in TOOL.parent.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"
    size = sum(path.stat().st_size for path in TOOL.parent.rglob("*") if "__pycache__" not in path.parts)
    assert KEPT and size < 8_500_000  # a record with both sides of its race takes 400 to 800 kB


def test_the_page_names_what_a_newcomer_needs():
    text = (TOOL.parent / "README.md").read_text()
    assert "--unproven" in text and "tests/test_compile.py" in text


def test_history_is_written(tmp_path):
    page = TOOL.parent / "README.md"
    kept = page.read_text()
    copy = tmp_path / "records"
    shutil.copytree(TOOL.parent, copy)
    succeeded("history", f"--records={copy}")
    assert (copy / "README.md").read_text() == kept


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "lists no setting"),
        ("a b: --x=1", ":1: cannot read"),
        ("a: --x=1\na: --x=2", ":2: cannot read"),
        ("seeds: x\na:", ":1: cannot read"),
        ("a: --x='1", ":1: cannot read"),
        ("a: x.patch --x=1", "x.patch does not exist"),
        ("a: x=1", "'x=1' is not a flag"),
    ],
)
def test_bad_sweep(tmp_path, text, says):
    (tmp_path / "list.txt").write_text(text)
    refused("sweep", tmp_path / "list.txt", f"--out={tmp_path}/out", says=says)


def patch(before, after, rest=" two\n", file="train_gpt.py"):
    """A patch of a file's first line, which stands before the rest of its hunk."""
    count = 1 + len(rest.splitlines())
    return f"--- a/{file}\n+++ b/{file}\n@@ -1,{count} +1,{count} @@\n-{before}\n+{after}\n{rest}"


def test_sweep_refuses_a_patch_that_does_not_apply(tmp_path):
    (tmp_path / "a.patch").write_text(patch("nothing like it", "x", rest=""))
    (tmp_path / "list.txt").write_text("a: a.patch\n")
    refused("sweep", tmp_path / "list.txt", f"--out={tmp_path}/out", says="a.patch: does not apply")


def test_sweep_applies_patches_in_order(tmp_path):
    """The second patch needs the first; what one says of another file is left out."""
    (tmp_path / "script.py").write_text("one\ntwo\n")
    (tmp_path / "a.patch").write_text(patch("one", "three") + patch("x", "y", rest="", file="tests/x.py"))
    (tmp_path / "b.patch").write_text(patch("three", "print('four')"))
    (tmp_path / "list.txt").write_text("seeds: 1\nboth: a.patch b.patch --x=1\nsecond: b.patch\n")
    options = [f"--script={tmp_path}/script.py", f"--out={tmp_path}/out", "--nproc=1"]
    refused("sweep", tmp_path / "list.txt", *options, says="b.patch: does not apply")
    assert (tmp_path / "out" / "both" / "train_gpt.py").read_text() == "print('four')\ntwo\n"


def test_sweep_resumes(tmp_path):
    """Two settings, two seeds, killed in the second round and gone on with; one that fails is named."""
    entries = ["baseline:", "no-mlp: --layers=5.mlp=0  # one less", ""]
    (tmp_path / "list.txt").write_text(
        "\n".join(["seeds: 3 4", "flags: --num_scheduled_iterations=4", *entries])
    )
    # What the list says is no flag of the command, which would win.
    listed = ("--num_scheduled", "--layers")
    flags = [flag for flag in tiny_flags(tmp_path) if not flag.startswith(listed)]
    command = [sys.executable, str(TOOL), "sweep", str(tmp_path / "list.txt"), f"--out={tmp_path}/out"]
    command += ["--nproc=1", *flags, "--num_extension_iterations=0", "--warmup_steps=0"]

    def sweep():
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)

    last = run_until(command, 5)[-1]
    assert "baseline/train_gpt.py" in last and "--seed=4" in last
    done = sweep()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run: ") == 2 and done.stdout.count("--seed=4") == 2
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert re.match(r"\| baseline \| 2 \| 5\.\d{4} \| 0\.\d{4} \| \+0\.0000 \|", table[2])
    assert table[3].startswith("| no-mlp | 2 |")
    assert is_png(tmp_path / "out" / "losses.png", 1000)
    with open(tmp_path / "list.txt", "a") as file:
        file.write("broken: --layers=5.mlp=x\n")
    done = sweep()
    assert done.returncode == 1 and done.stdout.count("run: ") == 1
    assert "broken, seed 3: ended with code 2: train_gpt.py: --layers: cannot read" in done.stderr
    assert "| broken | 0 | - |" in (tmp_path / "out" / "table.md").read_text()


def test_parts_of_a_profile():
    """Names as profiles on an H200 and on a CPU showed them, or as the script's kernels may be called."""
    names = {
        "_attention_key_kernel": "attention",
        "_heads_kernel": "attention",
        "_norm_qkv_kernel": "attention",
        "triton_per_fused_attention_backward_mul_sigmoid_2": "fused by the compiler",
        "_loss_kernel": "loss",
        "_loss_backward_kernel": "loss",
        "_mix_backward_kernel": "mixing and norms",
        "_norm_kernel": "mixing and norms",
        "_mlp_kernel": "products",
        "nvjet_sm90_qqtst_192x192_128x4_2x1_v_bz_coopB_TNN": "products",
        "aten::baddbmm": "products",
        "Memcpy DtoD (Device -> Device)": "copies",
        "_scatter_add_kernel": "embeddings",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL": "communication",
        "aten::pow": "other",
        "aten::linalg_vector_norm": "other",
        "_normuon_kernel": "other",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    }
    assert {name: record.part_of(name) for name in names} == names


def test_covered():
    assert record.covered([]) == 0 and record.covered([(3, 5), (0, 2), (1, 2.5), (4, 4.5)]) == 4.5


def event(name, begin, length, category="kernel", thread=7):
    """A complete event of a Chrome trace, its times in µs."""
    return dict(ph="X", cat=category, name=name, pid=0, tid=thread, ts=begin, dur=length)


def write_trace(
    folder, events, log_line="profile: steps 20 to 21, trace logs/a.trace.json.gz; read it with: x"
):
    """A log of a run that profiled two steps, and its trace beside it."""
    log = (
        write_runs(folder, [3.27], [1], script=f'print("{log_line}")\n{log_line.replace("21", "99")}')
        / "0.txt"
    )
    log.write_text(log.read_text() + log_line + "\n")
    text = json.dumps({"schemaVersion": 1, "traceEvents": events})
    log.with_suffix(".trace.json.gz").write_bytes(gzip.compress(text.encode()))
    return log


def test_profile_of_a_gpu(tmp_path):
    """Time a step by part, each collective and what is not hidden, the longest kernels; no CPU events."""
    events = [
        event("_attention_key_kernel", 0, 3000),
        event("_attention_key_kernel", 4000, 1000),
        event("nvjet_sm90_x", 5000, 2000),
        event("ncclDevKernel_AllGather", 6000, 2500, thread=9),
        event("Memcpy DtoD (Device -> Device)", 9000, 500, "gpu_memcpy"),
        event("Memset (Device)", 9500, 100, "gpu_memset"),
        event("aten::mm", 0, 9000, "cpu_op"),
        event("ProfilerStep#20", 0, 9000, "gpu_user_annotation"),
        dict(ph="M", name="process_name", pid=0, args={}),
        dict(ph="i", cat="kernel", name="no duration", ts=1),
    ]
    log = write_trace(tmp_path, events)
    lines = succeeded("profile", log).splitlines()
    assert lines == [
        f"trace: {log.with_suffix('.trace.json.gz')}, 2 steps",
        "communication 1.25 ms a step",
        "attention 2.00 ms a step",
        "products 1.00 ms a step",
        "copies 0.30 ms a step",
        "computing 3.30 ms a step, communication not hidden 0.75 ms",
        "at    6.000 ms  2.500 ms, 1.500 not hidden  AllGather",
        "    2.000 ms     1.0 calls a step  _attention_key_kernel",
        "    1.250 ms     0.5 calls a step  ncclDevKernel_AllGather",
        "    1.000 ms     0.5 calls a step  nvjet_sm90_x",
        "    0.250 ms     0.5 calls a step  Memcpy DtoD (Device -> Device)",
        "    0.050 ms     0.5 calls a step  Memset (Device)",
    ]
    trace = log.with_suffix(".trace.json.gz")
    assert "attention 4.00 ms a step" in succeeded("profile", trace, "--steps=1")
    plain = tmp_path / "plain.json"
    plain.write_bytes(gzip.decompress(trace.read_bytes()))
    assert succeeded("profile", plain, "--steps=2").splitlines()[1:] == lines[1:]
    many = write_trace(tmp_path / "many", [event(f"k{i}", i, 1 + i / 10) for i in range(50)])
    assert len(succeeded("profile", many).splitlines()) == 3 + 30


def test_profile_of_a_cpu(tmp_path):
    """An operator counts without what it calls, thread by thread."""
    events = [
        event("aten::mm", 100, 400, "cpu_op"),
        event("aten::matmul", 0, 1000, "cpu_op"),
        event("aten::copy_", 200, 100, "cpu_op"),
        event("aten::t", 500, 50, "cpu_op"),
        event("aten::pow", 500, 200, "cpu_op"),
        event("aten::matmul", 300, 5000, "cpu_op", thread=8),
        event("train_step", 0, 90000, "user_annotation"),
    ]
    assert succeeded("profile", write_trace(tmp_path, events)).splitlines()[1:] == [
        "products 0.15 ms a step",
        "copies 0.05 ms a step",
        "other 2.80 ms a step",
        "    2.700 ms     1.0 calls a step  aten::matmul",
        "    0.150 ms     0.5 calls a step  aten::mm",
        "    0.075 ms     0.5 calls a step  aten::pow",
        "    0.050 ms     0.5 calls a step  aten::copy_",
        "    0.025 ms     0.5 calls a step  aten::t",
    ]


def test_profile_of_a_real_trace(tmp_path):
    """What the profiler itself says of a few operators on this CPU."""
    x = torch.randn(300, 300)
    w = torch.randn(300, 300, requires_grad=True)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profiler:
        for _ in range(2):
            torch.nn.functional.rms_norm(x @ w, (300,)).square().sum().backward()
    log = write_trace(tmp_path, [])
    profiler.export_chrome_trace(str(log.with_suffix(".trace.json.gz")))
    text = succeeded("profile", log)
    found = re.findall(r"^ +([\d.]+) ms +([\d.]+) calls a step  (aten::.*)$", text, re.M)
    measured = {
        each.key: (each.self_cpu_time_total / 2000, each.count / 2) for each in profiler.key_averages()
    }
    assert len(found) > 5 and "products " in text and "computing" not in text
    for ms, calls, name in found:
        assert float(ms) == pytest.approx(measured[name][0], abs=2e-3), name
        assert float(calls) >= measured[name][1], name  # the profiler counts one that calls its own name once
    assert ("2.0", "aten::mm") in [(calls, name) for _, calls, name in found]
    assert sorted(found, key=lambda row: -float(row[0])) == found


def test_bad_profiles(tmp_path):
    plain = write_runs(tmp_path / "plain", [3.27], [1]) / "0.txt"
    refused("profile", plain, says="its run had no --profile")
    line = "profile: steps 20 to 21, trace "  # as a script may quote it
    quoting = write_runs(tmp_path / "quoting", [3.27], [1], script=f'"""\n{line}\n"""') / "0.txt"
    refused("profile", quoting, says="its run had no --profile")
    refused("profile", tmp_path / "none.txt", says="none.txt: cannot be read")
    refused("profile", tmp_path, says="name a log or its trace")
    log = write_trace(tmp_path, [])
    trace = log.with_suffix(".trace.json.gz")
    refused("profile", log, says="holds no kernel and no operator")
    refused("profile", trace, says="give --steps=N")
    refused("profile", trace, "--steps=0", says="at least 1")
    refused("profile", trace, "--steps=x", says="invalid int value")
    whole = gzip.compress(b'{"traceEvents": [' + b"1," * 10_000)
    texts = [b"[]", b"{}", b'{"traceEvents": 1}', b'{"traceEvents": [1]}', b"\xff", b"", whole, whole[:-20]]
    for text in [*texts, whole[:10] + b"\0" * 50]:
        trace.write_bytes(text)
        refused("profile", log, says="not a trace of torch.profiler")
    for wrong in ({"ts": "x"}, {"dur": None}, {"name": 1, "ts": []}):
        trace.write_text(json.dumps({"traceEvents": [event("k", 0, 1) | wrong]}))
        refused("profile", log, says="has no name, ts or dur")
    trace.unlink()
    refused("profile", log, says=f"{trace}: cannot be read")
