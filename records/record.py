"""Make runs, read their logs and say what they prove.

    ./run.sh record stats LOG|DIR...          # final losses and times, and whether the mean loss is below the target
    ./run.sh record compare LOG|DIR LOG|DIR   # is the second faster, at a loss that is not worse?
    ./run.sh record diff LOG|SCRIPT|DIR ...   # what changed between the scripts of two records
    ./run.sh record race A.py B.py --runs N   # run both alternately on this machine, then compare; the same command resumes
    ./run.sh record sweep FILE                # run a list of settings and rank their losses; the same command resumes
    ./run.sh record plot DIR... -o out.png    # loss against time and steps, and the record history
    ./run.sh record new NAME LOG|DIR...       # a record's folder: script, logs, statistics, picture
    ./run.sh record history                   # the table of records in README.md, anew

Reads this project's logs and those of the public records since 2024-10; folders may be nested one level. Never imports torch.
"""

import argparse
import difflib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

RECORDS = Path(__file__).parent
ROOT = RECORDS.parent
TARGET, SIGNIFICANT = 3.28, 0.01
TARGET_TOKENS = "10485760"  # of FineWeb's validation shard, on which the target is meant
SEPARATOR = re.compile(rb"^={20,}\s*$", re.M)
VALIDATION = re.compile(rb"^step:(\d+)/(\d+) val_loss:(\S+) train_time:(\d+)ms step_avg:([\d.]+|nan|inf)ms", re.M)
OLD_LINE = re.compile(rb"^s:(\d+) (trl|tel):(\S+)", re.M)
CALIBRATION = re.compile(rb"^calibration rank \d+: (.*)$", re.M)
FIGURE = re.compile(r"(\w+)=([\d.]+(?:e[+-]?\d+)?)([A-Za-z/]+)")
JUDGED = ("gemm", "copy", "all_reduce", "power_limit")  # launch times and momentary clocks scatter too much to judge by


class UsageError(Exception):
    """A mistake of the user's: its text is one line that names the file or flag and what to do."""


@dataclass(frozen=True)
class Run:
    """A finished run: its log, steps, final validation loss in nats a token, and training time in s where the log has it."""

    path: Path
    steps: int
    loss: float
    seconds: float | None
    calibration: dict[str, float]  # of its slowest rank, with the unit in the name; empty in logs that have none


def script_end(data: bytes) -> int:
    """Where the script in a log's head ends: at the first line of = that has text before it, for some logs begin with one."""
    return next((match.end() for match in SEPARATOR.finditer(data) if data[: match.start()].strip(b"=\r\n ")), 0)


def read_run(path: Path) -> Run | str:
    """The run that a log tells of, or why there is none: it is not a log, was cut off, or ended with no finite loss."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    start = script_end(data)
    if lines := VALIDATION.findall(data, start):
        step, total, loss, milliseconds, _ = lines[-1]
        if int(step) < int(total):
            return f"unfinished, cut off after step {int(step)} of {int(total)}"
        steps, seconds = int(total), int(milliseconds) / 1000
    elif lines := OLD_LINE.findall(data, start):
        step, kind, loss = lines[-1]
        if kind != b"tel":
            return f"unfinished, cut off after step {int(step)}"
        steps, seconds = int(step), None
    elif re.search(rb"^step:\d+/\d+ train_time:", data[start:], re.M):
        return "unfinished, cut off before its first validation"
    elif start and b"\narguments: " in data[start:]:
        return "unfinished, cut off before its first step"
    else:
        return "not a log"
    try:
        loss = float(loss)
    except ValueError:
        return "not a log"
    return Run(path, steps, loss, seconds, read_calibration(data, start)) if math.isfinite(loss) else f"its final loss is {loss}"


def read_calibration(data: bytes, start: int) -> dict[str, float]:
    """The figures of a log's calibration lines; of several ranks the slowest, since a step waits for it."""
    slowest = {}
    for line in CALIBRATION.findall(data, start):
        for name, value, unit in FIGURE.findall(line.decode()):
            key, worse = f"{name} {unit}", max if unit == "us" else min
            slowest[key] = worse(slowest.get(key, float(value)), float(value))
    return slowest


def find_logs(arguments: list[str]) -> list[Path]:
    """The .txt and .log files that are named, or lie in a folder that is named or one level below; raises UsageError."""
    found = []
    for path in map(Path, arguments):
        if path.is_dir():
            inside = sorted(p for pattern in ("*", "*/*") for p in path.glob(pattern) if p.suffix in (".txt", ".log") and p.is_file())
            if not inside:
                raise UsageError(f"{path}: holds no .txt or .log file, itself or one level below; name a folder of logs")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"{path}: does not exist; name a log or a folder of logs")
    return found


def read_runs(arguments: list[str]) -> dict[int, list[Run]]:
    """Finished runs by their number of steps; what is left out is named on stderr. Raises UsageError when nothing remains."""
    groups = {}
    for path in find_logs(arguments):
        run = read_run(path)
        if isinstance(run, str):
            print(f"left out: {path}: {run}", file=sys.stderr)
        else:
            groups.setdefault(run.steps, []).append(run)
    if not groups:
        raise UsageError(f"{' '.join(arguments)}: no finished run; name logs that end with a validation")
    if len(groups) > 1:
        counts = ", ".join(f"{len(runs)} of {steps} steps" for steps, runs in sorted(groups.items()))
        print(f"runs of different length, so they are kept apart: {counts}", file=sys.stderr)
    return groups


def mean_and_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which one value does not have."""
    import numpy as np

    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def summarize(runs: list[Run], target: float) -> dict:
    """What `stats` says of runs of one length. p: one-sided t-test of the mean loss against the target, None for a single run."""
    from scipy.stats import ttest_1samp

    losses, times = [run.loss for run in runs], [run.seconds for run in runs if run.seconds is not None]
    loss_mean, loss_std = mean_and_std(losses)
    time_mean, time_std = mean_and_std(times) if times else (None, None)
    if len(runs) < 2:
        p = None
    elif loss_std < 1e-9:  # equal but for rounding: the test divides by it
        p = float(loss_mean >= target)
    else:
        p = float(ttest_1samp(losses, target, alternative="less").pvalue)
    return dict(
        steps=runs[0].steps, runs=len(runs), losses=losses, loss_mean=loss_mean, loss_std=loss_std, target=target, p=p, times=times,
        time_mean=time_mean, time_std=time_std, step_avg_ms=1000 * time_mean / runs[0].steps if times and runs[0].steps else None,
    )  # fmt: skip


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table, the first row being its head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def aligned(rows: list[list[str]]) -> str:
    """A plain table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def stats_rows(summaries: list[dict]) -> list[list[str]]:
    """The table of `stats`."""
    rows = [["steps", "runs", "mean loss", "std", f"p (< {summaries[0]['target']:g})", "mean time s", "std", "step ms"]]
    for s in summaries:
        figures = [number(s["loss_mean"]), number(s["loss_std"]), number(s["p"]), number(s["time_mean"]), number(s["time_std"]), number(s["step_avg_ms"], 2)]
        rows.append([str(s["steps"]), str(s["runs"]), *figures])
    return rows


def stats(arguments) -> int:
    """Print runs, losses, p and times of each group of runs, as a plain table, Markdown or JSON."""
    groups = read_runs(arguments.paths)
    summaries = [summarize(runs, arguments.target) for _, runs in sorted(groups.items())]
    for s in summaries:
        if s["p"] is None:
            print(f"{s['steps']} steps: one run gives no p; at least 1 more is missing", file=sys.stderr)
    if arguments.json:
        print(json.dumps(summaries, indent=1))
        return 0
    rows = stats_rows(summaries)
    if arguments.markdown:
        print(markdown(rows))
    else:
        print(aligned(rows))
        for s in summaries:
            print(f"{s['steps']} steps, losses: " + " ".join(f"{loss:.4f}" for loss in s["losses"]))
    return 0


def calibration_of(runs: list[Run]) -> dict[str, float]:
    """Each calibration figure as the mean over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run.calibration)
    return {name: statistics.fmean(run.calibration[name] for run in runs if name in run.calibration) for name in names}


def machine_differences(a: dict[str, float], b: dict[str, float]) -> list[str]:
    """The judged figures in which b is more than 1 % off a, as text."""
    names = [name for name in a if name in b and any(part in name for part in JUDGED)]
    return [f"{name.split()[0]} {b[name] / a[name] - 1:+.1%}" for name in names if abs(b[name] / a[name] - 1) > 0.01]


def print_machines(a: list[Run], b: list[Run]):
    """The calibration of two sets of runs, and whether their machines differ."""
    a, b = calibration_of(a), calibration_of(b)
    for name, figures in (("A", a), ("B", b)):
        if not figures:
            print(f"The logs of {name} hold no calibration, so a slower machine cannot be told from a slower script.")
            return
    for name in a:
        if name in b:
            print(f"{name}: A {a[name]:.4g}, B {b[name]:.4g} ({b[name] / a[name] - 1:+.1%})")
    if differences := machine_differences(a, b):
        print(f"The machines differ by more than 1 % ({', '.join(differences)}): the times may show the machine and not the script.")


def compare(arguments) -> int:
    """Print both summaries, the differences with 95 % intervals, the machines, and whether the second is faster at equal loss."""
    from scipy.stats import ttest_ind

    sides, sets = [], []
    for path in (arguments.a, arguments.b):
        groups = read_runs([path])
        if len(groups) > 1:
            raise UsageError(f"{path}: runs of {len(groups)} different lengths; name the logs of one length")
        (runs,) = groups.values()
        if len(runs) < 2:
            raise UsageError(f"{path}: one run cannot be compared; at least 1 more is missing")
        sides.append(summarize(runs, TARGET))
        sets.append(runs)
    a, b = sides
    for name, side in (("A", a), ("B", b)):
        spent = f", {side['time_mean']:.4f} ± {side['time_std']:.4f} s" if len(side["times"]) > 1 else ""
        print(f"{name}: {side['runs']} runs of {side['steps']} steps, loss {side['loss_mean']:.4f} ± {side['loss_std']:.4f} (p {side['p']:.4f}){spent}")
    print_machines(*sets)
    verdicts = {}
    for name, unit, digits in (("losses", "nats", 5), ("times", "s", 4)):
        if len(a[name]) > 1 and len(b[name]) > 1:
            test = ttest_ind(b[name], a[name], equal_var=False)
            low, high = test.confidence_interval(0.95)
            difference = mean_and_std(b[name])[0] - mean_and_std(a[name])[0]
            print(f"{name}, B - A: {difference:+.{digits}f} {unit}, 95 % interval {low:+.{digits}f} to {high:+.{digits}f}, Welch p {test.pvalue:.4f}")
            verdicts[name] = (low, high)
    if "times" not in verdicts:
        print("These logs hold no times, so nothing can be said of speed.")
        return 0
    span, loss = verdicts["times"], verdicts["losses"]
    speed = "B is faster" if span[1] < 0 else "B is slower" if span[0] > 0 else "Neither is shown to be faster"
    quality = "its loss is worse" if loss[0] > 0 else "its loss is better" if loss[1] < 0 else "no difference in loss is shown"
    print(f"{speed} ({mean_and_std(b['times'])[0] - mean_and_std(a['times'])[0]:+.4f} s), and {quality}.")
    return 0


def read_head(log: Path) -> tuple[str, str]:
    """The script in a log's head, and what follows it up to the next line of =: versions, machine and settings."""
    data = log.read_bytes()
    end = script_end(data)
    script, rest = (part.decode(errors="replace") for part in (data[:end], SEPARATOR.split(data[end:])[0]))
    return script.strip("=\r\n"), rest


def settings_in(head: str) -> dict[str, str]:
    """The settings that this project's logs list."""
    return dict(re.findall(r"^([a-z]\w*)=(.*)$", head, re.M))


def arguments_in(head: str) -> list[str] | None:
    """The flags that a run was started with, but for the log folder, where its log tells."""
    found = re.search(r"^arguments: (.*)$", head, re.M)
    return [flag for flag in shlex.split(found[1]) if not flag.startswith("--log_dir")] if found else None


def script_of(argument: str) -> tuple[str, dict[str, str]]:
    """The script behind a log, a script or a folder's first log, and its settings where a log lists them."""
    path = Path(argument)
    if path.suffix == ".py":
        try:
            return path.read_text(), {}
        except (OSError, UnicodeDecodeError):
            raise UsageError(f"{path}: cannot be read as a script") from None
    logs = [log for log in find_logs([argument]) if read_run(log) != "not a log"]
    if not logs:
        raise UsageError(f"{path}: neither a script nor a log, nor a folder with one")
    script, head = read_head(logs[0])
    return script, settings_in(head)


def changed_settings(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """Settings that differ, as text; none where a side lists none, as a script alone or another project's log."""
    names = sorted(a.keys() | b.keys()) if a and b else []
    return [f"{name}: {a.get(name, '(not set)')} -> {b.get(name, '(not set)')}" for name in names if a.get(name) != b.get(name)]


def diff(arguments) -> int:
    """Print the settings that differ, then the unified diff of the two scripts; in colour on a terminal."""
    (a, a_settings), (b, b_settings) = script_of(arguments.a), script_of(arguments.b)
    for line in changed_settings(a_settings, b_settings):
        print(line)
    colours = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"} if sys.stdout.isatty() else {}
    for line in difflib.unified_diff(a.splitlines(), b.splitlines(), arguments.a, arguments.b, lineterm=""):
        colour = colours.get(line[:1], "")
        print(f"{colour}{line}\033[0m" if colour else line)
    return 0


def summarize_diff(a: str, b: str) -> str:
    """How many lines two scripts differ by, and in which definitions."""
    sides, counts, touched = (a.splitlines(), b.splitlines()), [0, 0], {}
    for _, *spans in (o for o in difflib.SequenceMatcher(None, *sides, autojunk=False).get_opcodes() if o[0] != "equal"):
        for side, (lines, low, high) in enumerate(((sides[0], *spans[:2]), (sides[1], *spans[2:]))):
            counts[side] += high - low
            for at in range(low, high):
                above = (re.match(r"(?:class|def) (\w+)|(\w+) = ", lines[i]) for i in range(at, -1, -1))
                found = next(filter(None, above), None)
                touched[found[1] or found[2] if found else "the head"] = None
    return f"+{counts[1]} -{counts[0]} lines" + (f", in {', '.join(f'`{name}`' for name in touched)}" if touched else "")


def launch_command(script: str, processes: int) -> list[str]:
    """How run.sh starts a script: plainly for one process, else by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*(torchrun if processes > 1 else [sys.executable]), script]


def count_gpus() -> int:
    """NVIDIA GPUs of this machine, 0 without their driver."""
    if not shutil.which("nvidia-smi"):
        return 0
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")


def finished_runs(folder: Path, script: Path) -> list[Run]:
    """The finished runs of just this script whose logs lie in a folder."""
    runs = [run for log in sorted(folder.glob("*.txt")) if isinstance(run := read_run(log), Run)]
    return [run for run in runs if read_head(run.path)[0].strip() == script.read_text().strip()]


def make_run(script: Path, folder: Path, seed: int, flags: list[str], processes: int) -> str | None:
    """Run a script once, with its log in the folder, unless a finished run of it with this seed and these settings lies there.

    The script must take --seed and --log_dir and list its settings in its log, as this project's do. Returns what went wrong.
    """
    arguments = [flag for flag in flags if not flag.startswith("--log_dir")] + [f"--seed={seed}"]
    for run in finished_runs(folder, script):
        head = read_head(run.path)[1]
        if settings_in(head).get("seed") == str(seed) and arguments_in(head) in (None, arguments):
            return None
    arguments.append(f"--log_dir={folder}")
    print(f"run: {shlex.join([str(script), *arguments])}", flush=True)
    done = subprocess.run([*launch_command(str(script), processes), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return f"ended with code {done.returncode}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"
    if not finished_runs(folder, script):
        return "ended without a log of a finished run"
    return None


def race(arguments) -> int:
    """Run A and B in turn until each has its runs, run i of both with the same seed, and compare them."""
    if arguments.runs < 2:
        raise UsageError(f"--runs={arguments.runs}: one run proves nothing; give at least 2")
    scripts = [Path(script) for script in (arguments.a, arguments.b)]
    for script in scripts:
        if not script.is_file():
            raise UsageError(f"{script}: does not exist; name a training script")
    folders = [Path(arguments.out) / side for side in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for script, folder in zip(scripts, folders, strict=True):
        if len(finished_runs(folder, script)) < sum(isinstance(read_run(log), Run) for log in folder.glob("*.txt")):
            raise UsageError(f"{folder}: holds runs of another version of {script}; give another --out")
    processes = arguments.nproc or max(1, count_gpus())
    for i in range(arguments.runs):
        for script, folder in zip(scripts, folders, strict=True):
            if error := make_run(script, folder, arguments.seed + i, arguments.flags, processes):
                raise UsageError(f"{script}: run {i + 1} {error}; mend it, and the same command goes on from here")
    arguments.a, arguments.b = map(str, folders)
    return compare(arguments)


@dataclass
class Entry:
    """A line of a sweep file: its name, its flags and the patches of the script that it needs, in order."""

    name: str
    flags: list[str]
    patches: tuple[Path, ...] = ()


def read_sweep(path: Path) -> tuple[list[int], list[Entry]]:
    """Seeds and entries of a sweep file; raises UsageError, naming the line.

    A line is NAME: [FILE.patch ...] FLAGS, the patches beside the file; seeds: and flags: hold for all; # begins a comment.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a list of settings ({error})") from None
    seeds, common, entries = [1, 2], [], {}
    for count, line in enumerate(lines, 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        name, colon, rest = line.partition(":")
        words = shlex.split(rest)
        if name == "seeds" and words and all(word.isdecimal() for word in words):
            seeds = [int(word) for word in words]
        elif name == "flags":
            common = words
        elif not colon or not re.fullmatch(r"[\w.+-]+", name) or name in entries or name == "seeds":
            raise UsageError(f"{path}:{count}: cannot read {line!r}; write NAME: [FILE.patch ...] FLAGS, each name once, or seeds: 1 2")
        else:
            patches = tuple(path.parent / word for word in itertools.takewhile(lambda word: word.endswith(".patch"), words))
            words = words[len(patches) :]
            for patch in patches:
                if not patch.is_file():
                    raise UsageError(f"{path}:{count}: {patch} does not exist")
            if stray := [word for word in words if not word.startswith("--")]:
                raise UsageError(f"{path}:{count}: {stray[0]!r} is not a flag; write --name=value")
            entries[name] = Entry(name, words, patches)
    if not entries:
        raise UsageError(f"{path}: lists no setting; write lines such as  no-mlp-5: --layers=5.mlp=0")
    for entry in entries.values():
        entry.flags = common + entry.flags
    return seeds, list(entries.values())


def patched(script: Path, patches: tuple[Path, ...]) -> str:
    """The script's text after patches, of which only what they change in train_gpt.py counts; raises UsageError when one does not apply."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "train_gpt.py"
        shutil.copy(script, copy)
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(folder).parent)}  # a repository around it would confuse git
        for patch in patches:
            command = ["git", "apply", "--include=train_gpt.py", str(patch.resolve())]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise UsageError(f"{patch}: does not apply to {script}: {done.stderr.strip().splitlines()[0]}")
        return copy.read_text()


def sweep(arguments) -> int:
    """Run each setting of a file with each seed, all settings before the next seed; then a table and a picture of their losses."""
    file, script = Path(arguments.file), Path(arguments.script)
    seeds, entries = read_sweep(file)
    if not script.is_file():
        raise UsageError(f"--script={script}: does not exist")
    out = Path(arguments.out or f"logs/sweep-{file.stem}")
    processes = arguments.nproc or max(1, count_gpus())
    for entry in entries:
        (out / entry.name).mkdir(parents=True, exist_ok=True)
        (out / entry.name / "train_gpt.py").write_text(patched(script, entry.patches))
    failed = {}
    for seed in seeds:
        for entry in entries:
            folder = out / entry.name
            if entry.name not in failed and (error := make_run(folder / "train_gpt.py", folder, seed, entry.flags + arguments.flags, processes)):
                failed[entry.name] = error
                print(f"record.py: {entry.name}, seed {seed}: {error}", file=sys.stderr)
    results = {entry.name: finished_runs(out / entry.name, out / entry.name / "train_gpt.py") for entry in entries}
    first = next((mean_and_std([run.loss for run in runs])[0] for runs in results.values() if runs), None)
    rows = [["setting", "runs", "mean loss", "std", f"against {entries[0].name}", "step ms"]]
    for name, runs in results.items():
        losses, times = [run.loss for run in runs], [run.seconds for run in runs if run.seconds is not None]
        mean, std = mean_and_std(losses) if losses else (None, None)
        ms = 1000 * mean_and_std(times)[0] / runs[0].steps if times else None
        rows.append([name, str(len(runs)), number(mean), number(std), "-" if mean is None else f"{mean - first:+.4f}", number(ms, 2)])
    (out / "table.md").write_text(markdown(rows) + "\n")
    print(aligned(rows))
    if first is not None:
        draw_sweep({name: [run.loss for run in runs] for name, runs in results.items() if runs}, out / "losses.png")
        print(f"table: {out / 'table.md'}, picture: {out / 'losses.png'}")
    return 1 if failed else 0


def figure(width: float, height: float, rows: int = 1, columns: int = 1):
    """A matplotlib figure of so many inches, drawn without a display, and its axes in a flat list."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(rows, columns, figsize=(width, height), dpi=100, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, list(axes.flat)


def save(drawn, path: Path):
    """Write a picture; raises UsageError where it cannot be written."""
    try:
        drawn.savefig(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: the picture cannot be written ({error})") from None


def draw_sweep(losses: dict[str, list[float]], path: Path):
    """Final losses by setting: a dot a run, a bar at the mean, and the first setting's mean as a line."""
    drawn, (axis,) = figure(10, 1.5 + 0.3 * len(losses))
    for y, values in enumerate(losses.values()):
        axis.plot(values, [y] * len(values), "o", color="C0", alpha=0.6)
        axis.plot(mean_and_std(values)[0], y, "|", color="black", markersize=14, markeredgewidth=2)
    axis.axvline(mean_and_std(next(iter(losses.values())))[0], color="grey", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(losses)), list(losses))
    axis.set_ylim(len(losses) - 0.5, -0.5)
    axis.set_xlabel("final validation loss (nats a token); bar: mean, dashed: the first setting")
    save(drawn, path)


def read_curve(path: Path) -> list[tuple[int, float | None, float]]:
    """Step, training time in s where the log has it, and loss of every validation of a log."""
    data = path.read_bytes()
    start = script_end(data)
    if lines := VALIDATION.findall(data, start):
        return [(int(step), int(ms) / 1000, float(loss)) for step, _, loss, ms, _ in lines]
    return [(int(step), None, float(loss)) for step, kind, loss in OLD_LINE.findall(data, start) if kind == b"tel"]


def draw_curves(axes: list, sets: dict[str, list[Run]], target: float | None):
    """Validation loss against steps and against time, for each named set of runs its mean and the spread of its runs."""
    shown = []
    for colour, (name, runs) in enumerate(sets.items()):
        points = {}
        for run in runs:
            for step, seconds, loss in read_curve(run.path):
                points.setdefault(step, []).append((seconds, loss))
        steps = sorted(step for step, found in points.items() if len(found) == len(runs))
        losses = [[loss for _, loss in points[step]] for step in steps]
        shown += [loss for step, found in zip(steps, losses, strict=True) if step for loss in found]
        for axis, timed in zip(axes, (False, True), strict=True):
            if timed and any(seconds is None for step in steps for seconds, _ in points[step]):
                continue
            at = [statistics.fmean(seconds for seconds, _ in points[step]) for step in steps] if timed else steps
            style = dict(color=f"C{colour}", label=f"{name} ({len(runs)} run{'s' * (len(runs) > 1)})", marker="o", markersize=3)
            axis.plot(at, [statistics.fmean(found) for found in losses], **style)
            axis.fill_between(at, [min(found) for found in losses], [max(found) for found in losses], color=f"C{colour}", alpha=0.25)
    lines = [] if target is None else [target]
    low, high = min(shown + lines), max(shown + lines)
    for axis, label in zip(axes, ("steps", "training time (s)"), strict=True):
        for line in lines:
            axis.axhline(line, color="black", linestyle="--", linewidth=1, label=f"target {line:g}")
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axis.set_xlabel(label)
        axis.set_ylabel("validation loss (nats a token)")
        axis.legend()


def draw_history(axis, rows: list[dict]):
    """Time to the target against date: records that reached it, ours filled, those reported by others hollow."""
    from datetime import date

    for row in rows:
        face = "none" if row["reported"] else "C0"
        axis.plot(date.fromisoformat(row["date"]), row["seconds"], "o", markerfacecolor=face, markeredgecolor="C0", markersize=8)
    for i, row in enumerate(rows if len(rows) <= 12 else (rows[0], rows[-1])):  # more labels would overlap
        place = dict(xytext=(8, -14 if i % 2 else 6), textcoords="offset points", fontsize=8)
        axis.annotate(f"{row['seconds']:.1f} s, {row['machine']}", (date.fromisoformat(row["date"]), row["seconds"]), **place)
    axis.margins(0.25)
    axis.set_xlabel("date (hollow: reported by others)")
    axis.set_ylabel("time to the target (s)")
    axis.tick_params("x", rotation=20)


def plot(arguments) -> int:
    """Draw the validation losses of records against steps and time and, below, the history of records that reached the target."""
    sets = {}
    for path in arguments.paths:
        groups = read_runs([path])
        for steps, runs in sorted(groups.items()):
            sets[Path(path).name + (f", {steps} steps" if len(groups) > 1 else "")] = runs
    rows = [row for row in history_rows(Path(arguments.records)) if row["reached"]]
    drawn, axes = figure(10, 13 if rows else 9, 3 if rows else 2)
    draw_curves(axes[:2], sets, arguments.target)
    if rows:
        draw_history(axes[2], rows)
    save(drawn, Path(arguments.out))
    print(f"picture: {arguments.out}")
    return 0


def machine_of(head: str) -> tuple[str, int]:
    """The devices that a log of this project names, as 8×NVIDIA H100, and their number."""
    found = re.search(r"^devices: (\d+) x (.*)$", head, re.M)
    return (f"{found[1]}×{found[2]}", int(found[1])) if found else ("not named in the logs", 1)


def same_in_all(runs: list[Run]) -> tuple[str, str]:
    """Script and head that all runs share but for seed and log folder; raises UsageError, naming the log and what differs."""
    script, head = read_head(runs[0].path)
    for run in runs[1:]:
        other, other_head = read_head(run.path)
        if other != script:
            raise UsageError(f"{run.path}: made by another script than {runs[0].path}; a record has one (record.py diff shows how they differ)")
        unlike = [line for line in changed_settings(settings_in(head), settings_in(other_head)) if line.split(":")[0] not in ("seed", "log_dir")]
        if unlike:
            raise UsageError(f"{run.path}: other settings than {runs[0].path} ({unlike[0]}); a record has one set")
    return script, head


def off_target(settings: dict[str, str]) -> str | None:
    """Why the validation set that a log's settings name is not the target's; None if it is, or if the log names none."""
    if not settings or ("fineweb_val" in settings.get("val_files", "") and settings.get("val_tokens") == TARGET_TOKENS):
        return None
    return f"its validation set, {settings.get('val_tokens')} tokens of `{settings.get('val_files')}`, is not the target's, {TARGET_TOKENS} of FineWeb"


def why_unproven(summary: dict, settings: dict[str, str]) -> str | None:
    """Why runs do not prove that the target was reached, or None when they do."""
    if reason := off_target(settings):
        return reason
    if summary["p"] is None:
        return "one run gives no p; at least 1 more is missing"
    if summary["p"] >= SIGNIFICANT:
        return f"p = {summary['p']:.4f} that its mean loss, {summary['loss_mean']:.4f}, is below {summary['target']:g}; it must be under {SIGNIFICANT}"
    return None


def newest_record(records: Path) -> str | None:
    """The folder of the last record made here."""
    return next((str(row["folder"]) for row in history_rows(records) if not row["reported"]), None)


def new(arguments) -> int:
    """Make a record's folder from finished runs of one script: the script, the logs, a README.md and a picture."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", arguments.name):
        raise UsageError(f"{arguments.name!r}: name a record by letters, digits, dots and dashes")
    groups = read_runs(arguments.paths)
    if len(groups) > 1:
        raise UsageError("a record has runs of one length; name the logs of one length")
    (runs,) = groups.values()
    script, head = same_in_all(runs)
    settings, summary = settings_in(head), summarize(runs, TARGET)
    doubt = why_unproven(summary, settings)
    if doubt and not arguments.unproven:
        raise UsageError(f"nothing is proven: {doubt}; make more runs, or keep them with --unproven")
    folder = Path(arguments.records) / f"{time.strftime('%Y-%m-%d', time.gmtime())}_{arguments.name}"
    against = arguments.against or newest_record(Path(arguments.records))
    changes = script_of(against) if against else None
    try:
        (folder / "logs").mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{folder}: exists already; give another name, or remove it") from None
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made ({error.strerror})") from None
    (folder / "train_gpt.py").write_text(script.rstrip("\n") + "\n")
    for run in runs:
        shutil.copy(run.path, folder / "logs")
    drawn, axes = figure(10, 9, 2)
    draw_curves(axes, {arguments.name: runs}, None if off_target(settings) else TARGET)
    save(drawn, folder / "curves.png")
    (folder / "README.md").write_text(describe_record(arguments, folder, runs, script, head, summary, doubt, against, changes))
    print(f"record: {folder}")
    return 0


def describe_record(arguments, folder: Path, runs: list[Run], script: str, head: str, summary: dict, doubt: str | None, against, changes) -> str:
    """The README.md of a record."""
    settings, (machine, processes) = settings_in(head), machine_of(head)
    versions = re.search(r"^PyTorch .*$", head, re.M)
    flags = [flag for flag in arguments_in(head) or [] if not flag.startswith("--seed")]
    rerun = [*(["torchrun", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]), f"records/{folder.name}/train_gpt.py"]
    spent = f", {summary['time_mean']:.3f} ± {number(summary['time_std'], 3)} s, {summary['step_avg_ms']:.2f} ms a step" if summary["times"] else ""
    result = f"{summary['runs']} runs of {summary['steps']} steps on {machine}: validation loss {summary['loss_mean']:.4f} ± {number(summary['loss_std'])}{spent}."
    claim = f"This is **no claim to the target**: {doubt}." if doubt else f"The mean loss is below {TARGET:g} (one-sided t-test, p = {summary['p']:.4f})."
    data = f"Trained on `{settings['train_files']}`, validated on {settings['val_tokens']} tokens of `{settings['val_files']}`." if settings else ""
    parts = [f"# {arguments.what or arguments.name}", "## Result", result, *filter(None, [claim, data, arguments.note])]
    parts += ["![validation loss against steps and time](curves.png)", "## Run it again", "From the project's folder, with a `--seed` of your own:"]
    parts += [f"```\n{shlex.join([*rerun, *flags])}\n```", "## What changed"]
    if changes is None:
        parts.append("This is the first record here, so it is compared with none.")
    else:
        name = os.path.relpath(against, ROOT) if Path(against).is_relative_to(ROOT) else against
        lines = [f"- `{line}`" for line in changed_settings(changes[1], settings) if line.split(":")[0] not in ("seed", "log_dir")]
        parts += [f"Against `{name}`: {summarize_diff(changes[0], script)}. All of it: `./run.sh record diff {name} records/{folder.name}`."]
        parts += ["\n".join(["Settings:", *lines])] if lines else []
    rows = [["log", "seed", "loss", "time s"]]
    rows += [[run.path.name, settings_in(read_head(run.path)[1]).get("seed", "-"), number(run.loss), number(run.seconds, 3)] for run in runs]
    parts += ["## Statistics", markdown(stats_rows([summary])), markdown(rows), "## Machine", f"{machine}. {versions[0] if versions else ''}".strip()]
    figures = calibration_of(runs)
    parts.append(markdown([list(figures), [f"{value:.4g}" for value in figures.values()]]) if figures else "The logs hold no calibration.")
    return "\n\n".join(parts) + "\n"


def history_rows(records: Path) -> list[dict]:
    """Every record, newest first: those in the folders, of one day by their last log, and the results reported by others in reported.json."""
    rows = []
    for readme in sorted(records.glob("*/README.md")):
        logs = [run for log in sorted((readme.parent / "logs").glob("*.txt")) if isinstance(run := read_run(log), Run)]
        if not logs or not re.match(r"\d{4}-\d\d-\d\d_", readme.parent.name):
            continue
        head = read_head(logs[0].path)[1]
        rows.append(dict(folder=readme.parent, date=readme.parent.name[:10], what=readme.read_text().splitlines()[0].strip("# "), runs=logs,
                         machine=machine_of(head)[0], summary=summarize(logs, TARGET), settings=settings_in(head), reported=False))  # fmt: skip
    if (path := records / "reported.json").is_file():
        for entry in json.loads(path.read_text()):
            times = zip(entry["losses"], entry["seconds"], strict=True)
            runs = [Run(path, entry["steps"], loss, seconds, {}) for loss, seconds in times]
            rows.append(dict(folder=None, date=entry["date"], what=entry["what"], runs=runs, machine=entry["machine"],
                             summary=summarize(runs, TARGET), settings={}, reported=True))  # fmt: skip
    for row in rows:
        row["seconds"], row["reached"] = row["summary"]["time_mean"], why_unproven(row["summary"], row["settings"]) is None
    return sorted(rows, key=lambda row: (row["date"], row["folder"] is not None, row["runs"][-1].path.name, str(row["folder"])), reverse=True)


def history(arguments) -> int:
    """Write the table of records between its two marks in README.md."""
    readme, marks = Path(arguments.readme), ("<!-- records: written by ./run.sh record history -->", "<!-- end of records -->")
    try:
        text = readme.read_text()
    except OSError as error:
        raise UsageError(f"{readme}: cannot be read ({error.strerror})") from None
    if text.count(marks[0]) != 1 or text.count(marks[1]) != 1 or text.index(marks[0]) > text.index(marks[1]):
        raise UsageError(f"{readme}: the table's place is not marked; put the lines {marks[0]} and {marks[1]} there, once each")
    rows = history_rows(Path(arguments.records))
    table = [["date", "what", "machine", "steps", "time s", "validation loss", f"p (< {TARGET:g})", "calibration", "source"]]
    for row in rows:
        s, figures = row["summary"], calibration_of(row["runs"])
        shown = ", ".join(f"{name.split()[0]} {value:.4g} {name.split()[1]}" for name, value in figures.items() if any(part in name for part in JUDGED))
        proof = number(s["p"]) if row["reached"] else "no claim"
        loss = f"{s['loss_mean']:.4f} ± {number(s['loss_std'])}, {s['runs']} runs"
        seconds = f"{number(s['time_mean'], 2)} ± {number(s['time_std'], 2)}"
        source = "reported by others" if row["reported"] else f"[{row['folder'].name}]({os.path.relpath(row['folder'], readme.parent)})"
        table.append([row["date"], row["what"], row["machine"], str(s["steps"] or "-"), seconds, loss, proof, shown or "-", source])
    notes, calibrated = [], [row for row in rows if calibration_of(row["runs"])]
    for newer, older in zip(calibrated, calibrated[1:], strict=False):
        differences = machine_differences(calibration_of(older["runs"]), calibration_of(newer["runs"]))
        if newer["machine"] == older["machine"] and differences:
            notes.append(f"The machines of {older['folder'].name} and {newer['folder'].name} differ by more than 1 %: {', '.join(differences)}.")
    before, after = text[: text.index(marks[0])], text[text.index(marks[1]) :]
    readme.write_text("\n".join([f"{before}{marks[0]}", markdown(table), *(["", *notes] if notes else []), after]))
    print(f"{readme}: {len(rows)} records")
    return 0


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line."""

    def error(self, message: str):
        raise UsageError(f"{message} (--help lists what there is)")


def parser() -> Parser:
    """The command line."""
    root = Parser(prog="record.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    def add(function, text: str, *positional: str) -> Parser:
        command = commands.add_parser(function.__name__, help=text, description=function.__doc__, allow_abbrev=False)
        for name in positional:
            many = dict(nargs="+", metavar="LOG|DIR") if name == "paths" else dict(metavar=name.upper())
            command.add_argument(name, **many)
        command.set_defaults(run=function)
        return command

    command = add(stats, "final losses, times and p of runs", "paths")
    command.add_argument("--target", type=float, default=TARGET, help=f"loss that the mean is tested against [{TARGET}]")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--markdown", action="store_true", help="as a Markdown table")
    add(compare, "is B faster than A at equal loss?", "a", "b")
    add(diff, "what changed from A's script to B's", "a", "b")
    command = add(race, "run two scripts alternately on this machine, then compare; other flags go to both", "a", "b")
    command.add_argument("--runs", type=int, default=10, help="runs of each script [10]")
    command.add_argument("--out", default="logs/race", help="folder of the logs [logs/race]")
    command.add_argument("--seed", type=int, default=1, help="seed of the first run; the next ones count up [1]")
    command.add_argument("--nproc", type=int, default=0, help="processes [all GPUs, or 1]")
    command = add(sweep, "run a list of settings and rank their losses; other flags go to all", "file")
    command.add_argument("--script", default=str(ROOT / "train_gpt.py"), help="script that the settings and patches are for [train_gpt.py]")
    command.add_argument("--out", default=None, help="folder of the results [logs/sweep-FILE]")
    command.add_argument("--nproc", type=int, default=0, help="processes [all GPUs, or 1]")
    command = add(plot, "draw losses against steps and time, and the history", "paths")
    command.add_argument("-o", "--out", required=True, help="the picture, .png or .svg")
    command.add_argument("--target", type=float, default=TARGET, help=f"loss that is drawn as a line [{TARGET}]")
    command.add_argument("--records", default=str(RECORDS), help="folder of the history [records]")
    command = add(new, "make a record's folder from finished runs", "name", "paths")
    command.add_argument("--against", default=None, metavar="RECORD", help="log, script or folder that it is compared with [the newest record]")
    command.add_argument("--what", default="", help="its title, as the table of records shows it [NAME]")
    command.add_argument("--note", default="", help="what else a reader must know, such as the limits of the claim")
    command.add_argument("--unproven", action="store_true", help="keep it although it does not prove the target")
    command.add_argument("--records", default=str(RECORDS), help="folder of the records [records]")
    command = add(history, "rewrite the table of records in README.md")
    command.add_argument("--records", default=str(RECORDS), help="folder of the records [records]")
    command.add_argument("--readme", default=str(ROOT / "README.md"), help="the file with the table [README.md]")
    return root


def main() -> int:
    """Run a subcommand; returns its exit code. A user's mistake ends in one line and the code 2."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe
    try:
        arguments, flags = parser().parse_known_args()
        if flags and arguments.run not in (race, sweep):
            raise UsageError(f"unknown argument {flags[0]} (--help lists what there is)")
        arguments.flags = flags
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("record.py: stopped by Ctrl-C", file=sys.stderr)
        return 130
    except UsageError as error:
        print(f"record.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
