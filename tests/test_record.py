"""The record tool on the published numbers, as logs, and on what else lies in folders of logs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shards import tiny_flags
from test_main import ENVIRONMENT

TOOL = Path(__file__).parent.parent / "records" / "record.py"
LINE = "=" * 100

SEED1 = [3.278, 3.2777, 3.2799, 3.2783, 3.2784, 3.28, 3.2787, 3.278, 3.2797, 3.2804]
SEED1_MS = [135063, 134826, 135004, 134994, 134993, 134722, 134925, 134998, 134981, 134912]
NEW = [3.2806, 3.2764, 3.2787, 3.2778, 3.2776, 3.2754, 3.2779, 3.2775, 3.2782, 3.2779]
NEW_MS = [163078, 163129, 163029, 163141, 162534, 163100, 163046, 163144, 162926, 163224]
PRIOR = [3.2784, 3.2778, 3.2766, 3.2771, 3.2764, 3.2768, 3.276, 3.279, 3.2747, 3.2772]
PRIOR_MS = [164443, 164403, 164348, 164370, 164817, 164833, 164301, 164459, 164244, 164306]


def write_runs(folder, losses, milliseconds, steps=2225, script="import torch\nprint(1)", settings=""):
    """Logs in this project's format, as far as tools read it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (loss, ms) in enumerate(zip(losses, milliseconds, strict=True)):
        lines = [script, LINE, "Python 3", settings, LINE, f"step:0/{steps} val_loss:10.8258 train_time:0ms step_avg:0.04ms"]
        lines += [f"step:1/{steps} train_time:61ms step_avg:61.00ms", f"step:{steps}/{steps} val_loss:{loss} train_time:{ms}ms step_avg:60.70ms"]
        (folder / f"{i}.txt").write_text("\n".join([*lines, "peak memory allocated: 29250 MiB reserved: 47336 MiB", ""]))
    return folder


def tool(*arguments):
    done = subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_stats_on_the_published_numbers(tmp_path):
    write_runs(tmp_path / "seed1", SEED1, SEED1_MS)
    (found,) = json.loads(tool("stats", tmp_path / "seed1", "--json").stdout)
    rounded = {name: round(found[name], 4) for name in ("loss_mean", "loss_std", "p", "time_mean", "time_std")}
    assert rounded == dict(loss_mean=3.2789, loss_std=0.0010, p=0.0034, time_mean=134.9418, time_std=0.1008)
    assert found["runs"] == 10 and found["step_avg_ms"] == pytest.approx(60.648, abs=1e-3)
    table = tool("stats", tmp_path / "seed1").stdout
    assert re.search(r"2225 +10 +3\.2789 +0\.0010 +0\.0034 +134\.9418 +0\.1008 +60\.65", table)
    assert "| 2225 | 10 | 3.2789 | 0.0010 | 0.0034 | 134.9418 | 0.1008 | 60.65 |" in tool("stats", tmp_path / "seed1", "--markdown").stdout


def test_target(tmp_path):
    write_runs(tmp_path / "seed1", SEED1, SEED1_MS)
    (found,) = json.loads(tool("stats", tmp_path / "seed1", "--json", "--target=3.278").stdout)
    assert found["p"] > 0.9


def test_compare_on_the_published_numbers(tmp_path):
    prior, new = write_runs(tmp_path / "prior", PRIOR, PRIOR_MS), write_runs(tmp_path / "new", NEW, NEW_MS)
    text = tool("compare", prior, new).stdout
    assert "A: 10 runs of 2225 steps" in text and "(p 0.0000), 164.4524" in text and "(p 0.0003), 163.0351" in text
    assert re.search(r"times, B - A: -1\.4173 s, 95 % interval -1\.6\d+ to -1\.2\d+, Welch p 0\.0000", text)
    assert "B is faster (-1.4173 s)" in text
    assert "B is slower (+1.4173 s)" in tool("compare", new, prior).stdout
    assert "Neither is shown to be faster (+0.0000 s), and no difference in loss is shown." in tool("compare", new, new).stdout


def test_public_logs(tmp_path):
    """A separator before the script, several separators, other names, a nested folder, the oldest format."""
    steps = "step:0/9 val_loss:10.8 train_time:0ms step_avg:nanms\nstep:9/9 val_loss:3.27 train_time:900ms step_avg:100.00ms\n"
    (tmp_path / "nested").mkdir()
    (tmp_path / "a.txt").write_text(f"{LINE}\nimport os\n{LINE}\nRunning python\n{LINE}\n{steps}{LINE}\n")
    (tmp_path / "nested" / "b.log").write_text(f"import os\n'''\nstep:5/9 val_loss:1.0 train_time:1ms step_avg:1.00ms\n'''\n{LINE}\n{steps}")
    (tmp_path / "old.log").write_text("s:0 tel:10.9\ns:0 trl:10.9 lr:1e-3 norm:1\ns:8 trl:3.3 lr:1e-3 norm:1\ns:9 tel:3.29\n")
    (tmp_path / "notes.txt").write_text("it went well\n")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 100)
    done = tool("stats", tmp_path, "--json")
    (found,) = json.loads(done.stdout)
    assert sorted(found["losses"]) == [3.27, 3.27, 3.29] and found["times"] == [0.9, 0.9]
    assert f"left out: {tmp_path}/notes.txt: not a log" in done.stderr and f"{tmp_path}/binary.txt: not a log" in done.stderr


def test_unfinished_and_not_finite_runs_are_left_out_by_name(tmp_path):
    write_runs(tmp_path, [3.27, 3.28, "nan", 3.29], [1, 2, 3, 4])
    whole = (tmp_path / "3.txt").read_text()
    (tmp_path / "3.txt").write_text(whole[: whole.index("step:2225")])
    (tmp_path / "4.txt").write_text(f"script\n{LINE}\nstep:1/9 train_time:5ms step_avg:5.00ms\n")
    (tmp_path / "6.txt").write_text(f"script\n{LINE}\nPython 3\narguments: --seed=1\nseed=1\n")
    (tmp_path / "5.txt").write_text("s:0 tel:10.9\ns:1 trl:10.8 lr:1 norm:1\n")
    done = tool("stats", tmp_path, "--json")
    assert json.loads(done.stdout)[0]["losses"] == [3.27, 3.28]
    for line in ("2.txt: its final loss is nan", "3.txt: unfinished, cut off after step 0 of 2225", "4.txt: unfinished, cut off before", "5.txt: unfinished", "6.txt: unfinished, cut off before its first step"):
        assert line in done.stderr


def test_different_lengths_are_kept_apart(tmp_path):
    write_runs(tmp_path / "a", [3.27, 3.28], [1, 2])
    write_runs(tmp_path / "b", [3.3], [1], steps=1705)
    done = tool("stats", tmp_path, "--json")
    assert [(s["steps"], s["runs"], s["p"] is None) for s in json.loads(done.stdout)] == [(1705, 1, True), (2225, 2, False)]
    assert "runs of different length, so they are kept apart: 1 of 1705 steps, 2 of 2225 steps" in done.stderr
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
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("record.py: ") and says in done.stderr


def test_unknown_arguments(tmp_path):
    for arguments in (["stats"], ["stats", tmp_path, "--fast"], ["compare", "a"], ["sort"]):
        done = tool(*arguments)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("record.py: ")


def test_one_run_cannot_be_compared(tmp_path):
    write_runs(tmp_path, [3.27], [1])
    done = tool("compare", tmp_path, tmp_path)
    assert done.returncode == 2 and "at least 1 more is missing" in done.stderr


def test_diff_takes_the_scripts_out_of_logs(tmp_path):
    write_runs(tmp_path / "a", [3.27], [1], script="x = 1\nlr = 0.03\ny = 2", settings="muon_lr=0.03\nseed=1")
    write_runs(tmp_path / "b", [3.27], [1], script="x = 1\nlr = 0.04\ny = 2", settings="muon_lr=0.04\nseed=1")
    (tmp_path / "b.py").write_text("x = 1\nlr = 0.04\ny = 2\n")
    text = tool("diff", tmp_path / "a", tmp_path / "b").stdout.splitlines()
    assert text[0] == "muon_lr: 0.03 -> 0.04"
    assert [line for line in text if line[:1] in "+-"][2:] == ["-lr = 0.03", "+lr = 0.04"] and not any("\033" in line for line in text)
    text = tool("diff", tmp_path / "a" / "0.txt", tmp_path / "b.py").stdout
    assert "+lr = 0.04" in text and "(not set)" not in text
    piped = subprocess.run(f"{sys.executable} {TOOL} diff {tmp_path}/a {tmp_path}/b | head -1", shell=True, capture_output=True, text=True)
    assert piped.stdout == "muon_lr: 0.03 -> 0.04\n" and not piped.stderr
    (tmp_path / "notes.txt").write_text("no log\n")
    assert "neither a script nor a log" in tool("diff", tmp_path / "notes.txt", tmp_path / "b.py").stderr


def test_race_resumes(tmp_path):
    """Two real scripts on the CPU, two runs each, killed in the second round: the finished runs are kept, the rest is run."""
    script = TOOL.parent.parent / "train_gpt.py"
    other = tmp_path / "other.py"
    other.write_text(script.read_text())
    flags = [*tiny_flags(tmp_path), "--num_scheduled_iterations=6", "--num_extension_iterations=0", "--warmup_steps=0"]
    command = [sys.executable, str(TOOL), "race", str(other), str(script), "--runs=2", f"--out={tmp_path}/race", "--nproc=1", *flags]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
    lines = [next(first.stdout) for _ in range(3)]
    assert lines[2].startswith(f"run: {other} ") and "--seed=2" in lines[2]
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [(line.split()[1], "--seed=2" in line) for line in done.stdout.splitlines() if line.startswith("run: ")] == [(str(other), True), (str(script), True)]
    for side in ("a", "b"):
        whole = [path.read_text() for path in (tmp_path / "race" / side).iterdir() if "step:6/6 val_loss" in path.read_text()]
        assert sorted(re.search(r"^seed=(\d+)$", text, re.M)[1] for text in whole) == ["1", "2"]
    assert "A: 2 runs of 6 steps" in done.stdout and "times, B - A:" in done.stdout and "losses, B - A: +0.00000" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert again.returncode == 0 and not re.search("^run: ", again.stdout, re.M)
    other.write_text(script.read_text() + "\n# another version\n")
    changed = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert changed.returncode == 2 and "holds runs of another version" in changed.stderr


def test_race_refuses(tmp_path):
    assert "at least 2" in tool("race", TOOL, TOOL, "--runs=1").stderr
    assert "missing.py: does not exist" in tool("race", tmp_path / "missing.py", TOOL).stderr
    failing = tmp_path / "failing.py"
    failing.write_text("raise SystemExit(3)")
    done = tool("race", failing, failing, f"--out={tmp_path}/race", "--nproc=1")
    assert done.returncode == 2 and "run 1 ended with code 3" in done.stderr


def test_two_thousand_logs(tmp_path):
    """2,000 logs of 180 kB: the figure is 5 s; the bound here leaves room for a slow disk."""
    write_runs(tmp_path, [3.2777], [135000], script="# a line of a long script\n" * 6900)
    log = (tmp_path / "0.txt").read_bytes()
    assert len(log) > 175_000
    for i in range(1, 2000):
        (tmp_path / f"{i}.txt").write_bytes(log)
    program = f"import runpy, sys; sys.argv = ['record.py', 'stats', {str(tmp_path)!r}]\n"
    program += f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\nfinally: print(open('/proc/self/status').read())"
    began = time.time()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert re.search(r"2225 +2000 +3\.2777", done.stdout)
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) < 300_000
    print(f"{time.time() - began:.1f} s")


CALIBRATION = "calibration rank 0: bfloat16_gemm={}TFLOP/s copy=4270GB/s launch=3.9us power_limit=700.00W"
TASK = "val_files=data/fineweb10B/fineweb_val_*.bin\nval_tokens=10485760\ntrain_files=data/fineweb10B/fineweb_train_*.bin"


def calibrated(gemm, other=None):
    lines = [CALIBRATION.format(gemm)] + ([CALIBRATION.format(other).replace("rank 0", "rank 1")] if other else [])
    return "\n".join(lines)


def test_compare_tells_machines_apart(tmp_path):
    write_runs(tmp_path / "a", PRIOR, PRIOR_MS, settings=calibrated(700))
    write_runs(tmp_path / "near", NEW, NEW_MS, settings=calibrated(706, 704))
    write_runs(tmp_path / "far", NEW, NEW_MS, settings=calibrated(705, 690))
    write_runs(tmp_path / "none", NEW, NEW_MS)
    text = tool("compare", tmp_path / "a", tmp_path / "near").stdout
    assert "bfloat16_gemm TFLOP/s: A 700, B 704 (+0.6%)" in text and "launch us: A 3.9, B 3.9" in text and "machines differ" not in text
    text = tool("compare", tmp_path / "a", tmp_path / "far").stdout
    assert "The machines differ by more than 1 % (bfloat16_gemm -1.4%)" in text
    assert "The logs of B hold no calibration" in tool("compare", tmp_path / "a", tmp_path / "none").stdout


def is_png(path, width):
    data = path.read_bytes()
    return data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") == width


def test_new_plot_and_history(tmp_path):
    """A record from the published numbers, a second one against it, and the table of both."""
    records, readme = tmp_path / "records", tmp_path / "README.md"
    marks = "<!-- records: written by ./run.sh record history -->", "<!-- end of records -->"
    readme.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    shared = f"devices: 8 x NVIDIA H100\nPyTorch 2.13.0\narguments: --seed=7 --muon_lr=0.03\nmuon_lr=0.03\n{TASK}\n"
    write_runs(tmp_path / "a", PRIOR, PRIOR_MS, settings=shared + calibrated(700), script="def f():\n    return 1")
    write_runs(tmp_path / "b", NEW, NEW_MS, settings=shared.replace("0.03", "0.04") + calibrated(680), script="def f():\n    return 2")
    done = tool("new", "first", tmp_path / "a", f"--records={records}", "--what=The first", "--note=Only a test.")
    assert done.returncode == 0, done.stderr
    (first,) = records.iterdir()
    text = (first / "README.md").read_text()
    for part in ("# The first\n", "10 runs of 2225 steps on 8×NVIDIA H100: validation loss 3.2770 ± 0.0012, 164.452 ± 0.207 s", "p = 0.0000", "Only a test.",
                 f"torchrun --standalone --nproc_per_node=8 records/{first.name}/train_gpt.py --muon_lr=0.03\n", "compared with none",
                 "| 0.txt | - | 3.2784 | 164.443 |", "PyTorch 2.13.0"):  # fmt: skip
        assert part in text, part
    assert (first / "train_gpt.py").read_text() == "def f():\n    return 1\n" and len(list((first / "logs").iterdir())) == 10
    assert is_png(first / "curves.png", 1000)
    assert "exists already" in tool("new", "first", tmp_path / "a", f"--records={records}").stderr

    for log in (tmp_path / "b").glob("*.txt"):
        log.rename(log.with_name(f"later_{log.name}"))  # of one day the later log counts, not the folder's name
    assert tool("new", "another", tmp_path / "b", f"--records={records}").returncode == 0
    text = next(records.glob("*_another/README.md")).read_text()
    assert "+1 -1 lines, in `f`" in text and "- `muon_lr: 0.03 -> 0.04`" in text and f"Against `{first}`" in text

    (records / "reported.json").write_text('[{"date": "2024-10-10", "what": "theirs", "machine": "8×H100", "steps": null, "losses": [3.27, 3.271], "seconds": [900, 901]}]')
    (records / "ablations").mkdir()
    for _ in range(2):  # a second time changes nothing
        assert tool("history", f"--records={records}", f"--readme={readme}").returncode == 0
        lines = readme.read_text().splitlines()
        assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
        assert [line.split(" | ")[1] for line in lines if line.startswith("| 20")] == ["another", "The first", "theirs"]
        assert "reported by others" in lines[6] and f"](records/{first.name}) |" in lines[5]
        assert any("differ by more than 1 %: bfloat16_gemm -2.9%" in line for line in lines)
    assert tool("plot", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out.png", f"--records={records}").returncode == 0
    assert is_png(tmp_path / "out.png", 1000)


def test_new_refuses(tmp_path):
    arguments = [f"--records={tmp_path}/records"]
    weak = write_runs(tmp_path / "weak", [3.28, 3.281], [1, 2], settings=TASK)
    assert "nothing is proven: p = " in tool("new", "a", weak, *arguments).stderr
    other = write_runs(tmp_path / "other", PRIOR, PRIOR_MS, settings=TASK.replace("10485760", "1572864"))
    assert "is not the target's, 10485760 of FineWeb" in tool("new", "a", other, *arguments).stderr
    one = write_runs(tmp_path / "one", [3.2], [1], settings=TASK)
    assert "one run gives no p" in tool("new", "a", one, *arguments).stderr
    mixed = write_runs(tmp_path / "mixed", PRIOR, PRIOR_MS, script="x = 1")
    write_runs(tmp_path / "mixed" / "more", [3.2], [1], script="x = 2")
    assert "made by another script" in tool("new", "a", mixed, *arguments).stderr
    uneven = write_runs(tmp_path / "uneven", PRIOR, PRIOR_MS, settings=f"{TASK}\nseed=1\nmuon_lr=1")
    write_runs(uneven / "more", [3.2], [1], settings=f"{TASK}\nseed=2\nmuon_lr=2")
    assert "other settings than" in tool("new", "a", uneven, *arguments).stderr and "muon_lr: 1 -> 2" in tool("new", "a", uneven, *arguments).stderr
    assert "name a record by letters" in tool("new", "../a", weak, *arguments).stderr
    assert not (tmp_path / "records").exists()
    assert tool("new", "a", weak, "--unproven", *arguments).returncode == 0
    assert "**no claim to the target**" in next((tmp_path / "records").glob("*/README.md")).read_text()


def test_bad_pictures_and_tables(tmp_path):
    runs = write_runs(tmp_path / "runs", PRIOR, PRIOR_MS)
    for command in (["plot", runs, "-o", tmp_path / "none" / "a.png"], ["plot", runs, "-o", tmp_path / "a.xyz"], ["plot", tmp_path / "x", "-o", "a.png"]):
        done = tool(*command)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    (tmp_path / "README.md").write_text("no marks\n")
    assert "the table's place is not marked" in tool("history", f"--readme={tmp_path}/README.md").stderr
    assert "cannot be read" in tool("history", f"--readme={tmp_path}/none.md").stderr


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "lists no setting"),
        ("a b: --x=1", ":1: cannot read"),
        ("a: --x=1\na: --x=2", ":2: cannot read"),
        ("seeds: x\na:", ":1: cannot read"),
        ("a: x.patch --x=1", "x.patch does not exist"),
        ("a: x=1", "'x=1' is not a flag"),
    ],
)
def test_bad_sweep(tmp_path, text, says):
    (tmp_path / "list.txt").write_text(text)
    done = tool("sweep", tmp_path / "list.txt", f"--out={tmp_path}/out")
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_sweep_refuses_a_patch_that_does_not_apply(tmp_path):
    (tmp_path / "a.patch").write_text("--- a/train_gpt.py\n+++ b/train_gpt.py\n@@ -1,1 +1,1 @@\n-nothing like it\n+x\n")
    (tmp_path / "list.txt").write_text("a: a.patch\n")
    done = tool("sweep", tmp_path / "list.txt", f"--out={tmp_path}/out")
    assert done.returncode == 2 and "a.patch: does not apply" in done.stderr


def test_sweep_applies_patches_in_order(tmp_path):
    """The second patch needs the first; what one says of another file is left to whoever applies it by hand."""
    (tmp_path / "script.py").write_text("one\ntwo\n")
    (tmp_path / "a.patch").write_text("--- a/train_gpt.py\n+++ b/train_gpt.py\n@@ -1,2 +1,2 @@\n-one\n+three\n two\n"
                                      "--- a/tests/x.py\n+++ b/tests/x.py\n@@ -1,1 +1,1 @@\n-x\n+y\n")  # fmt: skip
    (tmp_path / "b.patch").write_text("--- a/train_gpt.py\n+++ b/train_gpt.py\n@@ -1,2 +1,2 @@\n-three\n+print('four')\n two\n")
    (tmp_path / "list.txt").write_text("seeds: 1\nboth: a.patch b.patch --x=1\nsecond: b.patch\n")
    done = tool("sweep", tmp_path / "list.txt", f"--script={tmp_path}/script.py", f"--out={tmp_path}/out", "--nproc=1")
    assert (tmp_path / "out" / "both" / "train_gpt.py").read_text() == "print('four')\ntwo\n"
    assert done.returncode == 2 and "b.patch: does not apply" in done.stderr


def test_sweep_resumes(tmp_path):
    """Two settings, two seeds, on the CPU: killed in the second round, gone on with, and a setting that fails is named."""
    (tmp_path / "list.txt").write_text("seeds: 3 4\nflags: --num_scheduled_iterations=4\nbaseline:\nno-mlp: --layers=5.mlp=0  # one less\n")
    flags = [*tiny_flags(tmp_path), "--num_extension_iterations=0", "--warmup_steps=0"]
    flags = [flag for flag in flags if not flag.startswith("--num_scheduled")]
    command = [sys.executable, str(TOOL), "sweep", str(tmp_path / "list.txt"), f"--out={tmp_path}/out", "--nproc=1", *flags]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
    lines = [next(first.stdout) for _ in range(3)]
    assert "baseline/train_gpt.py" in lines[2] and "--seed=4" in lines[2]
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run: ") == 2 and done.stdout.count("--seed=4") == 2
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert re.match(r"\| baseline \| 2 \| 5\.\d{4} \| 0\.\d{4} \| \+0\.0000 \|", table[2]) and table[3].startswith("| no-mlp | 2 |")
    assert is_png(tmp_path / "out" / "losses.png", 1000)
    with open(tmp_path / "list.txt", "a") as file:
        file.write("broken: --layers=5.mlp=x\n")
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 1 and done.stdout.count("run: ") == 1
    assert "broken, seed 3: ended with code 2: train_gpt.py: --layers: cannot read" in done.stderr and "| broken | 0 | - |" in (tmp_path / "out" / "table.md").read_text()
