"""Read the logs of runs and say what they prove.

    ./run.sh record stats LOG|DIR...          # final losses and times, and whether the mean loss is below the target
    ./run.sh record compare LOG|DIR LOG|DIR   # is the second faster, at a loss that is not worse?
    ./run.sh record diff LOG|SCRIPT|DIR ...   # what changed between the scripts of two records
    ./run.sh record race A.py B.py --runs N   # run both alternately on this machine, then compare; the same command resumes

Reads this project's logs and those of the public records since 2024-10; folders may be nested one level. Never imports torch.
"""

import argparse
import difflib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TARGET = 3.28
SEPARATOR = re.compile(rb"^={20,}\s*$", re.M)
VALIDATION = re.compile(rb"^step:(\d+)/(\d+) val_loss:(\S+) train_time:(\d+)ms step_avg:([\d.]+|nan|inf)ms", re.M)
OLD_LINE = re.compile(rb"^s:(\d+) (trl|tel):(\S+)", re.M)


class UsageError(Exception):
    """A mistake of the user's: its text is one line that names the file or flag and what to do."""


@dataclass(frozen=True)
class Run:
    """A finished run: its log, steps, final validation loss in nats a token, and training time in s where the log has it."""

    path: Path
    steps: int
    loss: float
    seconds: float | None


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
    else:
        return "not a log"
    try:
        loss = float(loss)
    except ValueError:
        return "not a log"
    return Run(path, steps, loss, seconds) if math.isfinite(loss) else f"its final loss is {loss}"


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
    header = ["steps", "runs", "mean loss", "std", f"p (< {arguments.target:g})", "mean time s", "std", "step ms"]
    rows = [header] + [
        [str(s["steps"]), str(s["runs"]), number(s["loss_mean"]), number(s["loss_std"]), number(s["p"]), number(s["time_mean"]), number(s["time_std"]),
         number(s["step_avg_ms"], 2)] for s in summaries
    ]  # fmt: skip
    if arguments.markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(header), *rows[1:]]))
    else:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows))
        for s in summaries:
            print(f"{s['steps']} steps, losses: " + " ".join(f"{loss:.4f}" for loss in s["losses"]))
    return 0


def compare(arguments) -> int:
    """Print both summaries, the differences with 95 % intervals, and whether the second is faster at equal loss."""
    from scipy.stats import ttest_ind

    sides = []
    for path in (arguments.a, arguments.b):
        groups = read_runs([path])
        if len(groups) > 1:
            raise UsageError(f"{path}: runs of {len(groups)} different lengths; name the logs of one length")
        (runs,) = groups.values()
        if len(runs) < 2:
            raise UsageError(f"{path}: one run cannot be compared; at least 1 more is missing")
        sides.append(summarize(runs, TARGET))
    a, b = sides
    for name, side in (("A", a), ("B", b)):
        time = f", {side['time_mean']:.4f} ± {side['time_std']:.4f} s" if side["times"] else ""
        print(f"{name}: {side['runs']} runs of {side['steps']} steps, loss {side['loss_mean']:.4f} ± {side['loss_std']:.4f} (p {side['p']:.4f}){time}")
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
    time, loss = verdicts["times"], verdicts["losses"]
    speed = "B is faster" if time[1] < 0 else "B is slower" if time[0] > 0 else "Neither is shown to be faster"
    quality = "its loss is worse" if loss[0] > 0 else "its loss is better" if loss[1] < 0 else "no difference in loss is shown"
    print(f"{speed} ({mean_and_std(b['times'])[0] - mean_and_std(a['times'])[0]:+.4f} s), and {quality}.")
    return 0


def script_of(argument: str) -> tuple[str, dict[str, str]]:
    """The script behind a log, a script or a folder's first log, and the settings that this project's logs list."""
    path = Path(argument)
    if path.suffix == ".py":
        try:
            return path.read_text(), {}
        except (OSError, UnicodeDecodeError):
            raise UsageError(f"{path}: cannot be read as a script") from None
    logs = [log for log in find_logs([argument]) if read_run(log) != "not a log"]
    if not logs:
        raise UsageError(f"{path}: neither a script nor a log, nor a folder with one")
    text = logs[0].read_bytes()
    script, head = text[: script_end(text)], SEPARATOR.split(text[script_end(text) :])[0]
    return script.decode(errors="replace").strip("=\r\n"), dict(re.findall(r"^(\w+)=(.*)$", head.decode(errors="replace"), re.M))


def diff(arguments) -> int:
    """Print the settings that differ, then the unified diff of the two scripts; in colour on a terminal."""
    (a, a_settings), (b, b_settings) = script_of(arguments.a), script_of(arguments.b)
    if a_settings and b_settings:  # a script alone, or another project's log, lists none
        for name in sorted(a_settings.keys() | b_settings.keys()):
            if a_settings.get(name) != b_settings.get(name):
                print(f"{name}: {a_settings.get(name, '(not set)')} -> {b_settings.get(name, '(not set)')}")
    colours = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"} if sys.stdout.isatty() else {}
    for line in difflib.unified_diff(a.splitlines(), b.splitlines(), arguments.a, arguments.b, lineterm=""):
        colour = colours.get(line[:1], "")
        print(f"{colour}{line}\033[0m" if colour else line)
    return 0


def launch_command(script: str, processes: int) -> list[str]:
    """How run.sh starts a script: plainly for one process, else by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*(torchrun if processes > 1 else [sys.executable]), script]


def count_gpus() -> int:
    """NVIDIA GPUs of this machine, 0 without their driver."""
    if not shutil.which("nvidia-smi"):
        return 0
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")


def race(arguments) -> int:
    """Run A and B in turn until each has its runs, run i of both with the same seed, and compare them.

    Both scripts must take --log_dir and --seed, as this project's do. Finished runs are those whose logs lie in OUT/a and OUT/b.
    """
    if arguments.runs < 2:
        raise UsageError(f"--runs={arguments.runs}: one run proves nothing; give at least 2")
    for script in (arguments.a, arguments.b):
        if not Path(script).is_file():
            raise UsageError(f"{script}: does not exist; name a training script")
    folders = [Path(arguments.out) / side for side in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    processes = arguments.nproc or max(1, count_gpus())
    for i in range(arguments.runs):
        for script, folder in zip((arguments.a, arguments.b), folders, strict=True):
            if sum(isinstance(read_run(log), Run) for log in folder.glob("*.txt")) > i:
                continue
            print(f"run {i + 1} of {arguments.runs}: {script}", flush=True)
            command = [*launch_command(script, processes), *arguments.flags, f"--seed={arguments.seed + i}", f"--log_dir={folder}"]
            if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                raise UsageError(f"{script}: run {i + 1} ended with code {code}; mend it, and the same command goes on from here")
    arguments.a, arguments.b = map(str, folders)
    return compare(arguments)


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line."""

    def error(self, message: str):
        raise UsageError(f"{message} (--help lists what there is)")


def main() -> int:
    parser = Parser(prog="record.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("stats", help="final losses, times and p of runs")
    command.add_argument("paths", nargs="+", metavar="LOG|DIR")
    command.add_argument("--target", type=float, default=TARGET, help=f"loss that the mean is tested against [{TARGET}]")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--markdown", action="store_true", help="as a Markdown table")
    command.set_defaults(run=stats)
    for function, text in ((compare, "is B faster than A at equal loss?"), (diff, "what changed from A's script to B's")):
        command = commands.add_parser(function.__name__, help=text)
        command.add_argument("a", metavar="A")
        command.add_argument("b", metavar="B")
        command.set_defaults(run=function)
    command = commands.add_parser("race", allow_abbrev=False, help="run two scripts alternately on this machine, then compare; other flags go to both")
    command.add_argument("a", metavar="A.py")
    command.add_argument("b", metavar="B.py")
    command.add_argument("--runs", type=int, default=10, help="runs of each script [10]")
    command.add_argument("--out", default="logs/race", help="folder of the logs [logs/race]")
    command.add_argument("--seed", type=int, default=1, help="seed of the first run; the next ones count up [1]")
    command.add_argument("--nproc", type=int, default=0, help="processes [all GPUs, or 1]")
    command.set_defaults(run=race)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe
    try:
        arguments, flags = parser.parse_known_args()
        if flags and arguments.run is not race:
            parser.error(f"unknown argument {flags[0]}")
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
