"""Make runs, read their logs and say what they prove.

    ./run.sh record stats LOG|DIR...          # final losses and times; is the mean below the target?
    ./run.sh record compare LOG|DIR LOG|DIR   # is the second faster, at a loss that is not worse?
    ./run.sh record diff LOG|SCRIPT|DIR ...   # what changed between the scripts of two records
    ./run.sh record race A.py B.py --runs=N   # run both alternately, then compare; the same command resumes
    ./run.sh record sweep FILE                # run a list of settings and rank them; the same command resumes
    ./run.sh record plot DIR... -o out.png    # loss against time and steps, and the record history
    ./run.sh record profile LOG               # where the time of profiled steps went, by part and by kernel
    ./run.sh record new NAME LOG|DIR...       # a record's folder: script, logs, statistics, picture
    ./run.sh record history                   # write the table of records in records/README.md

A claim's folder goes to records/, and with --unproven runs that prove nothing go to records/proxy/. The tool
reads this project's logs and those of the public records since 2024-10. A folder is searched at all depths,
and the logs of each folder are a group of their own; logs named one by one are one group together. A log that
comes twice, under whatever name, counts once.

A log as a run writes it begins with the script's source. In a record's folder the source lies beside the logs
once, as train_gpt.py, and each log begins with a line that names it instead:

    script: train_gpt.py sha256:<hex>

What a record raced, its logs and its script, lies below that in baseline/, and belongs to no other group. If
a record has that script already, the logs name it there.

This tool never imports torch.
"""

import argparse
import dataclasses
import difflib
import gzip
import hashlib
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
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

RECORDS = Path(__file__).parent
ROOT = RECORDS.parent
TARGET = 3.28  # nats a token
SIGNIFICANT = 0.01  # p of a claim is below this
TARGET_TOKENS = "10485760"  # of FineWeb's validation shard, on which the target is meant
TOLERANCE = 0.001  # nats by which a record's mean loss may lie above its baseline's and still count as equal
SCRIPT_NAME = "train_gpt.py"
BASELINE = "baseline"  # the folder in a record's that holds what it raced
RECORD_NAME = re.compile(r"\d{4}-\d\d-\d\d_")


class UsageError(Exception):
    """A mistake of the user's: its text is one line that names the file or flag and what to do."""


# ============================================================================================================
# Logs

SEPARATOR = re.compile(rb"^={20,}\s*$", re.M)
VALIDATION = re.compile(
    rb"^step:(\d+)/(\d+) val_loss:(\S+) train_time:(\d+(?:\.\d+)?)(m?s) step_avg:(?:[\d.]+|nan|inf)m?s", re.M
)
OLD_LINE = re.compile(rb"^s:(\d+) (trl|tel):(\S+)", re.M)
CALIBRATION = re.compile(rb"^calibration rank \d+: (.*)$", re.M)
FIGURE = re.compile(r"(\w+)=(\d+(?:\.\d+)?(?:e[+-]?\d+)?)([A-Za-z/]+)")
ARCHIVED = re.compile(r"script: ([\w./-]+) sha256:([0-9a-f]{64})")
PROFILED = re.compile(rb"^profile: steps (\d+) to (\d+), trace ", re.M)


def tell(text: str):
    """Print what a user must know beside the results."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Run:
    """A finished run: its log, its steps and its final validation loss in nats a token.

    `seconds` is the training time, where the log has it. `curve` has step, training time and loss of every
    validation. `calibration` holds the figures of the run's slowest rank by name and unit, and is empty for a
    log that has none.
    """

    path: Path
    steps: int
    loss: float
    seconds: float | None
    has_script: bool = False
    curve: tuple[tuple[int, float | None, float], ...] = ()
    calibration: dict[str, float] = dataclasses.field(default_factory=dict)


def script_span(data: bytes) -> tuple[int, int]:
    """Where the line of = behind a log's script begins and ends; (0, 0) in a log without a script.

    Some logs begin with such a line, so it is the first that has text before it.
    """
    for match in SEPARATOR.finditer(data):
        if data[: match.start()].strip(b"=\r\n "):
            return match.span()
    return 0, 0


def read_run(path: Path) -> Run | str:
    """The run that a log tells of, or why there is none: no log, cut off, or ended with no finite loss."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    _, start = script_span(data)
    try:
        if lines := VALIDATION.findall(data, start):
            step, total = map(int, lines[-1][:2])
            if step < total:
                return f"unfinished, cut off after step {step} of {total}"
            scale = {b"s": 1, b"ms": 1000}
            curve = [(int(line[0]), float(line[3]) / scale[line[4]], float(line[2])) for line in lines]
        elif lines := OLD_LINE.findall(data, start):
            step, kind, _ = lines[-1]
            if kind != b"tel":
                return f"unfinished, cut off after step {int(step)}"
            curve = [(int(step), None, float(loss)) for step, kind, loss in lines if kind == b"tel"]
        elif re.search(rb"^step:\d+/\d+ train_time:", data[start:], re.M):
            return "unfinished, cut off before its first validation"
        elif start and b"\narguments: " in data[start:]:
            return "unfinished, cut off before its first step"
        else:
            return "not a log"
    except ValueError:
        return "not a log"
    steps, seconds, loss = curve[-1]
    if not math.isfinite(loss):
        return f"its final loss is {loss}"
    return Run(path, steps, loss, seconds, start > 0, tuple(curve), read_calibration(data, start))


def read_calibration(data: bytes, start: int) -> dict[str, float]:
    """The figures of a log's calibration lines; of several ranks the slowest, since a step waits for it."""
    slowest = {}
    for line in CALIBRATION.findall(data, start):
        for name, value, unit in FIGURE.findall(line.decode(errors="replace")):
            key = f"{name} {unit}"
            worse = max if unit == "us" else min
            slowest[key] = worse(slowest.get(key, float(value)), float(value))
    return slowest


def is_log_file(path: Path) -> bool:
    """Whether a path's name is a log's and a file lies there."""
    return path.suffix in (".txt", ".log") and path.is_file()


def logs_below(top: Path) -> dict[Path, list[Path]]:
    """The .txt and .log files of a folder and of those below it, by their folder.

    Hidden folders are left out, and of a record that of its baseline, unless it is the one that is named.
    """
    found = {}
    seen = set()  # links may lead round in a ring
    for root, folders, names in os.walk(
        top, onerror=lambda error: tell(f"left out: {error.filename}: {error.strerror}"), followlinks=True
    ):
        real = os.path.realpath(root)
        left_out = BASELINE if "logs" in folders and RECORD_NAME.match(os.path.basename(real)) else None
        folders[:] = sorted(
            name for name in folders if real not in seen and not name.startswith(".") and name != left_out
        )
        logs = sorted(filter(is_log_file, (Path(root, name) for name in names)))
        if logs and real not in seen:
            found[Path(root)] = logs
        seen.add(real)
    return found


def find_logs(arguments: list[str]) -> dict[Path, list[Path]]:
    """The logs in each folder that is named or lies below one, and as one group the logs that are named.

    Raises UsageError for a path where there is none; stderr says when the logs lie in several folders.
    """
    groups = {}
    named = []
    for argument in arguments:
        if os.path.isfile(argument):
            named.append(Path(argument))
            continue
        if not os.path.isdir(argument):
            raise UsageError(f"{argument!r}: does not exist; name a log or a folder of logs")
        inside = logs_below(Path(argument))
        if not inside:
            raise UsageError(f"{argument}: holds no .txt or .log file at any depth; name a folder of logs")
        if len(inside) > 1:
            depth = max(len(folder.relative_to(argument).parts) for folder in inside)
            count = f"{len(inside)} folders, up to {depth} deep"
            tell(f"{argument}: searched at all depths; its logs lie in {count}")
        for folder, logs in inside.items():
            groups.setdefault(folder, []).extend(logs)
    if named:
        shared = os.path.commonpath([path.absolute() for path in named])
        groups.setdefault(Path(os.path.relpath(shared)), []).extend(named)
    return groups


def same_run(a: Run, b: Run) -> bool:
    """Whether logs of one curve are of one run: copies, perhaps archived, or the console's beside a log."""
    return not (a.has_script and b.has_script) or read_head(a.path) == read_head(b.path)


def read_runs(groups: dict[Path, list[Path]]) -> dict[tuple[Path, int], list[Run]]:
    """Finished runs by their group and number of steps; stderr names what is left out, and why.

    Raises UsageError when nothing remains.
    """
    found = []
    for name, logs in groups.items():
        for path in logs:
            run = read_run(path)
            if isinstance(run, str):
                tell(f"left out: {path}: {run}")
            else:
                found.append((name, run))
    kept = {}
    first = {}
    # A log with its script is kept rather than what the console showed of the same run.
    for name, run in sorted(found, key=lambda pair: not pair[1].has_script):
        alike = first.setdefault(run.curve, [])
        if before := next((other for other in alike if same_run(run, other)), None):
            tell(f"left out: {run.path}: the same run as {before.path}")
            continue
        alike.append(run)
        kept.setdefault((name, run.steps), []).append(run)
    if not kept:
        raise UsageError(
            f"{', '.join(map(str, groups))}: no finished run; name logs that end with a validation"
        )
    lengths = Counter(steps for (_, steps), runs in kept.items() for _ in runs)
    if len(lengths) > 1:
        counts = ", ".join(f"{count} of {steps} steps" for steps, count in sorted(lengths.items()))
        tell(f"runs of different length, so they are kept apart: {counts}")
    order = list(groups)
    return dict(sorted(kept.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def logged_runs(folder: Path) -> list[Run]:
    """The finished runs whose logs lie in a folder."""
    runs = [read_run(log) for log in sorted(filter(is_log_file, folder.glob("*")))]
    return [run for run in runs if isinstance(run, Run)]


# ============================================================================================================
# The heads of logs


def read_head(log: Path) -> tuple[str, str]:
    """The script that a log holds or names, and what follows it up to the next line of =.

    What follows is versions, machine and settings. Raises UsageError when an archived log's script is
    missing.
    """
    data = log.read_bytes()
    script_end, rest_start = script_span(data)
    script = bare(data[:script_end])
    rest = SEPARATOR.split(data[rest_start:])[0].decode(errors="replace")
    if named := ARCHIVED.fullmatch(script):
        script = archived_script(log, named[1], named[2])
    return script, rest


def bare(script: bytes) -> str:
    """A script's text without the empty lines, or a log's line of =, around it."""
    return script.decode(errors="replace").strip("=\r\n")


def archived_script(log: Path, name: str, digest: str) -> str:
    """The script that an archived log names: from its folder or, if that is `logs`, from the one above.

    Raises UsageError when there is none, or when its SHA-256 is not the one that the log gives.
    """
    folders = [log.parent]
    if log.absolute().parent.name == "logs":
        folders.insert(0, Path(os.path.normpath(log.parent / "..")))
    paths = [folder / name for folder in folders]
    path = next(filter(Path.is_file, paths), paths[0])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{path}: {log} names this script, and it cannot be read ({error.strerror})"
        ) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise UsageError(f"{path}: is not the script that {log} names; its SHA-256 differs")
    return bare(data)


def archive(log: bytes, name: str, script: bytes) -> bytes:
    """A log as a record keeps it: one line that names the script stands in the place of the source."""
    separator, _ = script_span(log)
    line = f"script: {name} sha256:{hashlib.sha256(script).hexdigest()}\n"
    return line.encode() + log[separator:]


def without(flags: list[str], *names: str) -> list[str]:
    """Flags but for those of these names."""
    return [flag for flag in flags if flag.split("=")[0] not in names]


def settings_in(head: str) -> dict[str, str]:
    """The settings that this project's logs list."""
    return dict(re.findall(r"^([a-z]\w*)=(.*)$", head, re.M))


def arguments_in(head: str) -> list[str] | None:
    """The flags of a run but for its seed and log folder; None where its log tells none."""
    found = re.search(r"^arguments: (.*)$", head, re.M)
    try:
        flags = shlex.split(found[1]) if found else None
    except ValueError:  # the line is cut
        flags = None
    return flags and without(flags, "--log_dir", "--seed")


def seed_of(run: Run) -> str | None:
    """The seed that a run's log lists."""
    _, head = read_head(run.path)
    return settings_in(head).get("seed")


def machine_of(head: str) -> tuple[str, int]:
    """The devices that a log of this project names, as 8×NVIDIA H100, and their number."""
    found = re.search(r"^devices: (\d+) x (.*)$", head, re.M)
    return (f"{found[1]}×{found[2]}", int(found[1])) if found else ("not named in the logs", 1)


def changed_settings(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """Settings that differ, as text; none where a side lists none, as a script alone does."""
    if not a or not b:
        return []
    changed = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return [f"{name}: {a.get(name, '(not set)')} -> {b.get(name, '(not set)')}" for name in changed]


def changed_experiment(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """Settings that differ as in `changed_settings`, but for the seed and the log folder."""
    return [line for line in changed_settings(a, b) if line.split(":")[0] not in ("seed", "log_dir")]


def same_in_all(runs: list[Run]) -> tuple[str, str]:
    """The script that all runs share, and the head of the first.

    Raises UsageError, naming the log and what differs, unless they also share all settings but the seed.
    """
    first = runs[0].path
    script, head = read_head(first)
    for run in runs[1:]:
        other, other_head = read_head(run.path)
        if other != script:
            raise UsageError(
                f"{run.path}: made by another script than {first}; a record has one (record.py diff shows how"
                " they differ)"
            )
        if unlike := changed_experiment(settings_in(head), settings_in(other_head)):
            raise UsageError(f"{run.path}: other settings than {first} ({unlike[0]}); a record has one set")
    return script, head


# ============================================================================================================
# Statistics

JUDGED = ("gemm", "copy", "all_reduce", "power_limit")  # launch times and momentary clocks scatter too much


@dataclass(frozen=True)
class Summary:
    """What `stats` says of runs of one length: losses in nats a token, times in s.

    p: one-sided t-test of the mean loss against the target, None for a single run. What the runs do not have,
    as the deviation of one or the times of logs without them, is None.
    """

    steps: int | None
    runs: int
    losses: list[float]
    loss_mean: float
    loss_std: float | None
    target: float
    p: float | None
    times: list[float]
    time_mean: float | None
    time_std: float | None
    step_avg_ms: float | None


def mean_and_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which one value does not have."""
    import numpy as np

    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def probability(values: list[float], mean: float, alternative: str) -> float | None:
    """The p of a t-test that the mean of values is "less" than a number, or not it ("two-sided").

    None for a single value.
    """
    from scipy.stats import ttest_1samp

    if len(values) < 2:
        return None
    found, std = mean_and_std(values)
    if std < 1e-9:  # equal but for rounding: the test divides by it
        return float(found >= mean if alternative == "less" else abs(found - mean) < 1e-9)
    return float(ttest_1samp(values, mean, alternative=alternative).pvalue)


def summarize(runs: list[Run], target: float) -> Summary:
    """The figures of runs of one length."""
    losses = [run.loss for run in runs]
    times = [run.seconds for run in runs if run.seconds is not None]
    steps = runs[0].steps
    loss_mean, loss_std = mean_and_std(losses)
    time_mean, time_std = mean_and_std(times) if times else (None, None)
    return Summary(
        steps=steps,
        runs=len(runs),
        losses=losses,
        loss_mean=loss_mean,
        loss_std=loss_std,
        target=target,
        p=probability(losses, target, "less"),
        times=times,
        time_mean=time_mean,
        time_std=time_std,
        step_avg_ms=1000 * time_mean / steps if times and steps else None,
    )


def number(value: float | None, digits: int = 4) -> str:
    """A figure of so many decimals, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table, the first row being its head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def aligned(rows: list[list[str]]) -> str:
    """A plain table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(map("  ".join, lines))


def describe_run(run: Run) -> str:
    """A run's final loss and, where its log has it, its time."""
    return f"loss {run.loss:.4f}" + (f", {run.seconds:.3f} s" if run.seconds is not None else "")


def stats_rows(summaries: list[Summary]) -> list[list[str]]:
    """The table of `stats`."""
    p = f"p (< {summaries[0].target:g})"
    rows = [["steps", "runs", "mean loss", "std", p, "mean time s", "std", "step ms"]]
    for s in summaries:
        figures = [s.loss_mean, s.loss_std, s.p, s.time_mean, s.time_std]
        rows.append([str(s.steps), str(s.runs), *map(number, figures), number(s.step_avg_ms, 2)])
    return rows


def stats(arguments) -> int:
    """Print runs, losses, p and times of each group of runs, as a plain table, Markdown or JSON."""
    groups = read_runs(find_logs(arguments.paths))
    summaries = {group: summarize(runs, arguments.target) for group, runs in groups.items()}
    for s in summaries.values():
        if s.p is None:
            tell(f"{s.steps} steps: one run gives no p; at least 1 more is missing")
    if arguments.json:
        listed = [{"folder": str(folder)} | dataclasses.asdict(s) for (folder, _), s in summaries.items()]
        print(json.dumps(listed, indent=1))
        return 0
    folders = [str(folder) for folder, _ in groups]
    apart = len(set(folders)) > 1
    rows = stats_rows(list(summaries.values()))
    rows = [[folder] * apart + row for folder, row in zip(["folder", *folders], rows, strict=True)]
    if arguments.markdown:
        print(markdown(rows))
        return 0
    print(aligned(rows))
    for folder, s in zip(folders, summaries.values(), strict=True):
        losses = " ".join(f"{loss:.4f}" for loss in s.losses)
        print(f"{folder}, " * apart + f"{s.steps} steps, losses: {losses}")
    return 0


def calibration_of(runs: list[Run]) -> dict[str, float]:
    """Each calibration figure as the mean over the runs that have it."""
    figures = {}
    for run in runs:
        for name, value in run.calibration.items():
            figures.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in figures.items()}


def is_judged(name: str) -> bool:
    """Whether two machines are compared by a calibration figure of this name."""
    return any(part in name for part in JUDGED)


def machine_differences(a: list[Run], b: list[Run]) -> list[str]:
    """The judged figures in which the machine of b is more than 1 % off that of a, as text."""
    a_figures = calibration_of(a)
    b_figures = calibration_of(b)
    changes = {name: b_figures[name] / a_figures[name] - 1 for name in a_figures if name in b_figures}
    return [
        f"{name.split()[0]} {change:+.1%}"
        for name, change in changes.items()
        if is_judged(name) and abs(change) > 0.01
    ]


def machines_compared(a: list[Run], b: list[Run]) -> tuple[list[str], list[str]]:
    """Lines with the calibration of two sets of runs, and what makes their times hard to compare."""
    a_figures = calibration_of(a)
    b_figures = calibration_of(b)
    for name, figures in (("A", a_figures), ("B", b_figures)):
        if not figures:
            doubt = "so a slower machine cannot be told from a slower script."
            return [], [f"The logs of {name} hold no calibration, {doubt}"]
    shared = [(name, value, b_figures[name]) for name, value in a_figures.items() if name in b_figures]
    lines = [
        f"{name}: A {value:.4g}, B {other:.4g} ({other / value - 1:+.1%})" for name, value, other in shared
    ]
    doubts = []
    if found := machine_differences(a, b):
        doubts.append(
            f"The machines differ by more than 1 % ({', '.join(found)}): the times may show the machine and"
            " not the script."
        )
    return lines, doubts


def comparable_runs(path: str) -> list[Run]:
    """The runs of one side of a comparison: several, of one folder and one length.

    Raises UsageError for others.
    """
    groups = read_runs(find_logs([path]))
    folders = dict.fromkeys(str(folder) for folder, _ in groups)
    if len(folders) > 1:
        raise UsageError(f"{path}: runs in {len(folders)} folders ({', '.join(folders)}); name one of them")
    if len(groups) > 1:
        raise UsageError(f"{path}: runs of {len(groups)} different lengths; name the logs of one length")
    (runs,) = groups.values()
    if len(runs) < 2:
        raise UsageError(f"{path}: one run cannot be compared; at least 1 more is missing")
    return runs


def pairs_by_seed(a: list[Run], b: list[Run]) -> list[tuple[str, Run, Run]]:
    """Seed, run of a and run of b for each seed that both sides have once."""
    sides = []
    for runs in (a, b):
        seeds = [seed_of(run) for run in runs]
        sides.append({seed: run for seed, run in zip(seeds, runs, strict=True) if seeds.count(seed) == 1})
    shared = sides[0].keys() & sides[1].keys() - {None}
    return [(seed, *(side[seed] for side in sides)) for seed in sorted(shared, key=lambda x: (len(x), x))]


def pair_rows(pairs: list[tuple[str, Run, Run]]) -> list[list[str]]:
    """The table of runs that are paired by seed, and its means."""
    rows = [["seed", "loss A", "loss B", "B - A", "time A s", "time B s", "B / A"]]
    values = [(a.loss, b.loss, a.seconds, b.seconds) for _, a, b in pairs]
    means = [None if None in column else statistics.fmean(column) for column in zip(*values, strict=True)]
    for name, row in zip([*(seed for seed, _, _ in pairs), "mean"], [*values, means], strict=True):
        loss_a, loss_b, time_a, time_b = row
        ratio = time_b / time_a if time_a and time_b else None
        losses = [number(loss_a), number(loss_b), f"{loss_b - loss_a:+.4f}"]
        rows.append([name, *losses, number(time_a, 3), number(time_b, 3), number(ratio)])
    return rows


def difference_of(
    name: str, unit: str, digits: int, a: list[float], b: list[float], pairs: list[tuple[float, float]]
) -> tuple[tuple[float, float, float], list[str]]:
    """How far b is from a: by Welch's test of the means and, of several pairs, by their differences.

    Returns a difference and the bounds of its 95 % interval, the pairs' if one side lies in them whole; and
    a line for each test.
    """
    from scipy.stats import t, ttest_ind

    lines = []

    def show(kind: str, difference: tuple[float, float, float], test: str):
        mean, low, high = (f"{value:+.{digits}f}" for value in difference)
        lines.append(f"{name}, B - A{kind}: {mean} {unit}, 95 % interval {low} to {high}, {test}")

    test = ttest_ind(b, a, equal_var=False)
    welch = (statistics.fmean(b) - statistics.fmean(a), *test.confidence_interval(0.95))
    show("", welch, f"Welch p {test.pvalue:.4f}")
    if len(pairs) < 2:
        return welch, lines
    changes = [after - before for before, after in pairs]
    mean, std = mean_and_std(changes)
    error = std / math.sqrt(len(pairs))
    reach = float(t.ppf(0.975, len(pairs) - 1)) * error
    paired = (mean, mean - reach, mean + reach)
    p = probability(changes, 0, "two-sided")
    test = f"standard error {error:.{digits}f}, paired t-test p {p:.4f}"
    show(f", {len(pairs)} pairs of equal seed", paired, test)
    return paired if len(pairs) == min(len(a), len(b)) else welch, lines


def verdict(difference: tuple[float, float, float], below: str, above: str, neither: str) -> str:
    """What the 95 % interval of a difference says: it lies below zero, above, or holds it."""
    _, low, high = difference
    if high < 0:
        return below
    return above if low > 0 else neither


def differences(a: Summary, b: Summary, pairs: list[tuple[str, Run, Run]]) -> list[str]:
    """Lines on what B differs from A by in loss and in time, and what that shows."""
    trained = [(x.loss, y.loss) for _, x, y in pairs]
    losses, lines = difference_of("losses", "nats", 5, a.losses, b.losses, trained)
    quality = verdict(losses, "its loss is better", "its loss is worse", "no difference in loss is shown")
    if len(a.times) < 2 or len(b.times) < 2:
        return [*lines, "These logs hold no times, so nothing can be said of speed."]
    timed = [(x.seconds, y.seconds) for _, x, y in pairs if None not in (x.seconds, y.seconds)]
    times, more = difference_of("times", "s", 4, a.times, b.times, timed)
    speed = verdict(times, "B is faster", "B is slower", "Neither is shown to be faster")
    return [*lines, *more, f"{speed} ({times[0]:+.4f} s), and {quality}."]


def compare(arguments) -> int:
    """Print both summaries, the machines, the differences with 95 % intervals, and which side is faster.

    Runs of equal seed are paired, and the pairs decide if one side lies in them whole.
    """
    sets = [comparable_runs(path) for path in (arguments.a, arguments.b)]
    a, b = (summarize(runs, TARGET) for runs in sets)
    for name, s in (("A", a), ("B", b)):
        spent = f", {s.time_mean:.4f} ± {s.time_std:.4f} s" if len(s.times) > 1 else ""
        print(
            f"{name}: {s.runs} runs of {s.steps} steps, loss {s.loss_mean:.4f} ± {s.loss_std:.4f}"
            f" (p {s.p:.4f}){spent}"
        )
    for line in itertools.chain(*machines_compared(*sets)):
        print(line)
    if pairs := pairs_by_seed(*sets):
        print(aligned(pair_rows(pairs)))
    print("\n".join(differences(a, b, pairs)))
    reasons = [off_target(settings_in(read_head(runs[0].path)[1])) for runs in sets]
    for reason in dict.fromkeys(filter(None, reasons)):
        print(f"This says nothing about FineWeb: {reason}.")
    return 0


# ============================================================================================================
# Scripts


def read_text(path: Path, kind: str) -> str:
    """A file's text; raises UsageError, saying that it cannot be read as what it should be."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UsageError(f"{path}: cannot be read as {kind} ({reason})") from None


@dataclass(frozen=True)
class Source:
    """A script, the file that it was found in, and the settings that a log lists with it.

    `share` tells how many of a folder's logs have this script.
    """

    path: Path
    script: str
    settings: dict[str, str]
    share: str = ""


def source_of(argument: str) -> Source:
    """The script behind a script's file, a log, or a folder of logs: the one that most of them share.

    Raises UsageError where there is no script.
    """
    path = Path(argument)
    if path.suffix == ".py":
        return Source(path, read_text(path, "a script"), {})
    logs = itertools.chain.from_iterable(find_logs([argument]).values())
    heads = {log: read_head(log) for log in logs if read_run(log) != "not a log"}
    shares = Counter(script for script, _ in heads.values() if script)
    if not shares:
        raise UsageError(f"{path}: neither a script nor a log with one, nor a folder of such logs")
    shared, count = shares.most_common(1)[0]
    log, head = next((log, head) for log, (script, head) in heads.items() if script == shared)
    return Source(log, shared, settings_in(head), f"{count} of {shares.total()} logs")


def diff(arguments) -> int:
    """Print the settings that differ, then the unified diff of the two scripts; in colour on a terminal.

    Of a folder it takes the script that most logs share; stderr names the log.
    """
    a = source_of(arguments.a)
    b = source_of(arguments.b)
    for argument, source in ((arguments.a, a), (arguments.b, b)):
        if Path(argument).is_dir():
            tell(f"{argument}: {source.path}, whose script {source.share} share")
    for line in changed_settings(a.settings, b.settings):
        print(line)
    colours = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"} if sys.stdout.isatty() else {}
    lines = (a.script.splitlines(), b.script.splitlines())
    for line in difflib.unified_diff(*lines, str(a.path), str(b.path), lineterm=""):
        colour = colours.get(line[:1], "")
        print(f"{colour}{line}\033[0m" if colour else line)
    return 0


def definition_of(lines: list[str], at: int) -> str:
    """The name of the class, function or table that a line of a script lies in."""
    for line in reversed(lines[: at + 1]):
        if found := re.match(r"(?:class|def) (\w+)|(\w+) = ", line):
            return f"`{found[1] or found[2]}`"
    return "`the head`"


def summarize_diff(a: str, b: str) -> str:
    """How many lines two scripts differ by, and in which definitions, or beyond 40 in how many."""
    old = a.splitlines()
    new_lines = b.splitlines()
    added = removed = 0
    touched = {}
    matcher = difflib.SequenceMatcher(None, old, new_lines, autojunk=False)
    for kind, old_low, old_high, new_low, new_high in matcher.get_opcodes():
        if kind == "equal":
            continue
        removed += old_high - old_low
        added += new_high - new_low
        touched |= {definition_of(old, at): None for at in range(old_low, old_high)}
        touched |= {definition_of(new_lines, at): None for at in range(new_low, new_high)}
    where = ", ".join(touched) if len(touched) <= 40 else f"{len(touched)} classes, functions and tables"
    return f"+{added} -{removed} lines" + (f", in {where}" if touched else "")


def patched(script: Path, patches: tuple[Path, ...]) -> str:
    """The script's text after patches, of which only what they change in train_gpt.py counts.

    Raises UsageError when one does not apply.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / SCRIPT_NAME
        shutil.copy(script, copy)
        # A repository around the folder would confuse git.
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(Path(folder).parent)}
        for patch in patches:
            command = ["git", "apply", f"--include={SCRIPT_NAME}", str(patch.resolve())]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode:
                reason = done.stderr.strip().splitlines()[0]
                raise UsageError(f"{patch}: does not apply to {script}: {reason}")
        return copy.read_text()


def commit_of(script: Path) -> str | None:
    """The short name of this repository's first commit with a file of this content; None without one."""
    if not shutil.which("git"):
        return None

    def git(*arguments: str) -> list[str]:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.split()

    blob = git("hash-object", "--no-filters", str(script.resolve()))
    commits = git("log", "--all", f"--find-object={blob[0]}", "--format=%h") if blob else []
    return commits[-1] if commits else None


# ============================================================================================================
# Runs

SAMPLE = ROOT / "data" / "sample" / "sample_train_000002.bin"  # what data/sample.py writes last


def launch_command(script: str, processes: int) -> list[str]:
    """How run.sh starts a script: plainly for one process, else by torchrun."""
    if processes == 1:
        return [sys.executable, script]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={processes}", script]


def count_gpus() -> int:
    """NVIDIA GPUs that a script sees on this machine, 0 without their driver."""
    if not shutil.which("nvidia-smi"):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")


@dataclass(frozen=True)
class Series:
    """Runs that differ in the seed alone: their script, its text, their flags, the folder of their logs."""

    script: Path
    text: str
    flags: list[str]
    folder: Path


def finished_runs(series: Series, seed: int | None = None) -> list[Run]:
    """The finished runs of a series, or those with this seed."""
    found = []
    for run in logged_runs(series.folder):
        script, head = read_head(run.path)
        flags = arguments_in(head)
        if script.strip() == series.text.strip() and flags in (None, series.flags):
            if seed is None or settings_in(head).get("seed") == str(seed):
                found.append(run)
    return found


def make_run(series: Series, seed: int, processes: int) -> Run | str:
    """The run of a series with this seed, made unless it is there; or what went wrong.

    The script must take --seed and --log_dir and list its settings in its log, as this project's do.
    """
    if made := finished_runs(series, seed):
        return made[0]
    arguments = [*series.flags, f"--seed={seed}", f"--log_dir={series.folder}"]
    print(f"run: {shlex.join([str(series.script), *arguments])}", flush=True)
    command = [*launch_command(str(series.script), processes), *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no word"]
        # torchrun has the last word, but the script says why.
        cause = next((line for line in said if line.startswith(f"{series.script.name}: ")), said[-1])
        return f"ended with code {done.returncode}: {cause}"
    made = finished_runs(series, seed)
    return made[0] if made else "ended without the log of a finished run of this script"


def read_side(argument: str) -> tuple[Path, list[str]]:
    """The script that a side of a race names, and the flags that follow it in the same quotes."""
    try:
        script, *flags = [argument] if Path(argument).is_file() else shlex.split(argument)
    except ValueError:
        raise UsageError(f"{argument!r}: name a script, or in quotes a script and its flags") from None
    if not Path(script).is_file():
        raise UsageError(f"{script}: does not exist; name a training script")
    return Path(script), flags


def sample_flags(given: list[str]) -> list[str]:
    """The flag for the small sample, where there is no GPU and no flag names data; the sample is made."""
    flags = []
    if not count_gpus() and not any(flag.startswith(("--train_files", "--preset")) for flag in given):
        tell("no CUDA GPU found, so the small sample model is trained on the CPU: --preset=sample")
        flags = ["--preset=sample"]
    if "--preset=sample" in given + flags and not SAMPLE.is_file():
        if subprocess.run([sys.executable, str(ROOT / "data" / "sample.py")]).returncode:
            raise UsageError("data/sample.py: could not write the sample; the line above says why")
    return flags


def race(arguments) -> int:
    """Run A and B in turn until each has its runs, run i of both with the same seed, and compare them.

    Flags that the tool does not know go to both. A side in quotes gets those that follow it there, as in
    race train_gpt.py "train_gpt.py --muon_lr=0.04". Where a run fails the race goes on, unless its side has
    none yet, and the same command tries it again.
    """
    if arguments.runs < 2:
        raise UsageError(f"--runs={arguments.runs}: one run proves nothing; give at least 2")
    named = [read_side(arguments.a), read_side(arguments.b)]
    common = sample_flags([*arguments.flags, *named[0][1], *named[1][1]]) + arguments.flags
    sides = {}
    for side, (script, flags) in zip("AB", named, strict=True):
        folder = Path(arguments.out) / side.lower()
        folder.mkdir(parents=True, exist_ok=True)
        flags = without(common + flags, "--seed", "--log_dir")
        sides[side] = Series(script, read_text(script, "a script"), flags, folder)
        if len(finished_runs(sides[side])) < len(logged_runs(folder)):
            raise UsageError(
                f"{folder}: holds runs of another version of {script} or with other flags; give another --out"
            )
    processes = arguments.nproc or max(1, count_gpus())
    failed = 0
    for seed, (side, series) in itertools.product(range(arguments.runs), sides.items()):
        seed += arguments.seed
        run = make_run(series, seed, processes)
        if isinstance(run, Run):
            print(f"{side}, seed {seed}: {describe_run(run)}", flush=True)
        elif not finished_runs(series):
            raise UsageError(
                f"{series.script}, seed {seed}: {run}; mend it, and the same command goes on from here"
            )
        else:
            failed += 1
            tell(f"record.py: {series.script}, seed {seed}: {run}; the race goes on without this run")
    arguments.a, arguments.b = (str(series.folder) for series in sides.values())
    compare(arguments)
    if failed:
        tell(f"record.py: {failed} of {2 * arguments.runs} runs failed; the same command tries them again")
    return 1 if failed else 0


@dataclass
class Entry:
    """A line of a sweep file: its name, its flags and the patches of the script that it needs, in order."""

    name: str
    flags: list[str]
    patches: tuple[Path, ...] = ()


def read_entry(name: str, words: list[str], path: Path, place: str) -> Entry:
    """The entry of a sweep file's line, given its words; raises UsageError, naming the place of the line."""
    files = itertools.takewhile(lambda word: word.endswith(".patch"), words)
    patches = tuple(path.parent / file for file in files)
    for patch in patches:
        if not patch.is_file():
            raise UsageError(f"{place}: {patch} does not exist")
    flags = words[len(patches) :]
    for flag in flags:
        if not flag.startswith("--"):
            raise UsageError(f"{place}: {flag!r} is not a flag; write --name=value")
    return Entry(name, flags, patches)


def read_sweep(path: Path) -> tuple[list[int], list[Entry]]:
    """Seeds and entries of a sweep file; raises UsageError, naming the line.

    A line is NAME: [FILE.patch ...] FLAGS, with the patches beside the file. The lines seeds: and flags: hold
    for all entries, and # begins a comment.
    """
    seeds = [1, 2]
    common = []
    entries = {}
    for count, line in enumerate(read_text(path, "a list of settings").splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        place = f"{path}:{count}"
        name, colon, rest = line.partition(":")
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise UsageError(f"{place}: cannot read {line!r} ({error})") from None
        if name == "seeds" and words and all(word.isdecimal() for word in words):
            seeds = [int(word) for word in words]
        elif name == "flags":
            common = words
        elif not colon or not re.fullmatch(r"[\w.+-]+", name) or name in entries or name == "seeds":
            raise UsageError(
                f"{place}: cannot read {line!r}; write NAME: [FILE.patch ...] FLAGS, each name once, or"
                " seeds: 1 2"
            )
        else:
            entries[name] = read_entry(name, words, path, place)
    if not entries:
        raise UsageError(f"{path}: lists no setting; write lines such as  no-mlp-5: --layers=5.mlp=0")
    for entry in entries.values():
        entry.flags = common + entry.flags
    return seeds, list(entries.values())


def sweep_rows(results: dict[str, list[Run]]) -> list[list[str]]:
    """The table of a sweep: each setting's losses, and how far their mean is from the first setting's."""
    rows = [["setting", "runs", "mean loss", "std", f"against {next(iter(results))}", "step ms"]]
    first = None
    for name, runs in results.items():
        if not runs:
            rows.append([name, "0", "-", "-", "-", "-"])
            continue
        s = summarize(runs, TARGET)
        first = s.loss_mean if first is None else first
        figures = [number(s.loss_mean), number(s.loss_std), f"{s.loss_mean - first:+.4f}"]
        rows.append([name, str(s.runs), *figures, number(s.step_avg_ms, 2)])
    return rows


def sweep(arguments) -> int:
    """Run each setting of a file with each seed, then write a table and a picture of their losses.

    All settings are run with one seed before the next seed begins.
    """
    file = Path(arguments.file)
    script = Path(arguments.script)
    seeds, entries = read_sweep(file)
    if not script.is_file():
        raise UsageError(f"--script={script}: does not exist")
    out = Path(arguments.out or f"logs/sweep-{file.stem}")
    processes = arguments.nproc or max(1, count_gpus())
    all_series = {}
    for entry in entries:
        folder = out / entry.name
        folder.mkdir(parents=True, exist_ok=True)
        text = patched(script, entry.patches)
        (folder / SCRIPT_NAME).write_text(text)
        flags = without(entry.flags + arguments.flags, "--seed", "--log_dir")
        all_series[entry.name] = Series(folder / SCRIPT_NAME, text, flags, folder)
    failed = set()
    for seed, (name, series) in itertools.product(seeds, all_series.items()):
        if name in failed:
            continue
        run = make_run(series, seed, processes)
        if isinstance(run, Run):
            print(f"{name}, seed {seed}: {describe_run(run)}", flush=True)
        else:
            failed.add(name)
            tell(f"record.py: {name}, seed {seed}: {run}")
    results = {name: finished_runs(series) for name, series in all_series.items()}
    rows = sweep_rows(results)
    (out / "table.md").write_text(markdown(rows) + "\n")
    print(aligned(rows))
    losses = {name: [run.loss for run in runs] for name, runs in results.items() if runs}
    if losses:
        draw_sweep(losses, out / "losses.png")
        print(f"table: {out / 'table.md'}, picture: {out / 'losses.png'}")
    return 1 if failed else 0


# ============================================================================================================
# Pictures

ZOOM = 0.02  # nats around the target that are drawn once more
STYLES = [
    dict(color=f"C{colour}", linestyle=line, marker=marker)
    for marker in "os^D"
    for line in ("-", "--", ":", "-.")
    for colour in range(10)
]


def figure(width: float, height: float, rows: list[list[str]]):
    """A matplotlib figure of so many inches, drawn without a display, and its axes by their names in rows."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), dpi=100, layout="constrained")
    axes = drawn.subplot_mosaic(rows)
    for axis in axes.values():
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn, axes


def save(drawn, path: Path) -> Path:
    """Write a picture, as .png if its name has no suffix; returns its path.

    Raises UsageError where it cannot be written.
    """
    path = path if path.suffix else Path(f"{path}.png")
    try:
        drawn.savefig(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: the picture cannot be written ({error})") from None
    return path


def draw_sweep(losses: dict[str, list[float]], path: Path):
    """Draw final losses by setting: a dot a run, a bar at the mean, a line at the first setting's mean."""
    drawn, axes = figure(10, 1.5 + 0.3 * len(losses), [["losses"]])
    axis = axes["losses"]
    means = [statistics.fmean(values) for values in losses.values()]
    for y, values in enumerate(losses.values()):
        axis.plot(values, [y] * len(values), "o", color="C0", alpha=0.6)
        axis.plot(means[y], y, "|", color="black", markersize=14, markeredgewidth=2)
    axis.axvline(means[0], color="grey", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(losses)), list(losses))
    axis.set_ylim(len(losses) - 0.5, -0.5)
    axis.set_xlabel("final validation loss (nats a token); bar: mean, dashed: the first setting")
    save(drawn, path)


def common_points(runs: list[Run]) -> dict[int, list[tuple[float | None, float]]]:
    """Time in s and loss of each run, by the steps at which all of them were validated."""
    points = {}
    for run in runs:
        for step, seconds, loss in run.curve:
            points.setdefault(step, []).append((seconds, loss))
    return {step: found for step, found in sorted(points.items()) if len(found) == len(runs)}


def short_names(folders: list[Path]) -> list[str]:
    """The parts of different paths in which they differ, at least one of each."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    if all(path[-1] == "logs" for path in parts):  # those of records
        parts = [path[:-1] for path in parts]
    for order in (1, -1):  # what all share is cut off at the front, then at the end
        parts = [path[::order] for path in parts]
        levels = zip(*(path[:-1] for path in parts), strict=False)
        shared = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))
        parts = [path[shared:][::order] for path in parts]
    return ["/".join(path) for path in parts]


def draw_curves(sets: dict[str, list[Run]], target: float | None, *more: str):
    """A figure of validation loss against steps and, where the logs have it, time.

    Left stands the whole of it, right what lies around the target or, where no run ends so near to it, around
    the lowest mean. Returns the figure and its axes by name, with a row for each of `more` below.
    """
    sets = {f"{name} ({len(runs)} run{'s' * (len(runs) > 1)})": runs for name, runs in sets.items()}
    every = [run for runs in sets.values() for run in runs]
    kinds = {"steps": sets}
    if timed := {name: runs for name, runs in sets.items() if None not in [run.seconds for run in runs]}:
        kinds["training time (s)"] = timed
    columns = max(1, 120 // (max(map(len, sets)) + 8))  # of the legend, which stands above
    rows = [[kind, f"{kind}, near"] for kind in kinds] + [[name, name] for name in more]
    drawn, axes = figure(10, 3.6 * len(rows) + 0.2 * (len(sets) // columns + 2), rows)
    about = "the lowest mean"
    centre = min(statistics.fmean(run.loss for run in runs) for runs in sets.values())
    if target is not None and any(abs(run.loss - target) <= ZOOM for run in every):
        about, centre = "the target", target
    shown = [loss for run in every for step, _, loss in run.curve if step and math.isfinite(loss)]
    shown += [centre] if target is None else [centre, target]
    margin = 0.05 * (max(shown) - min(shown)) or ZOOM
    for kind, shown_sets in kinds.items():
        whole, near = axes[kind], axes[f"{kind}, near"]
        draw_sets(whole, near, shown_sets, centre + ZOOM, timed=kind != "steps")
        for axis in (whole, near):
            if target is not None:
                axis.axhline(target, color="black", linestyle="--", linewidth=1, label=f"target {target:g}")
            axis.set_xlabel(kind)
        whole.set_ylim(min(shown) - margin, max(shown) + margin)
        whole.set_ylabel("validation loss (nats a token)")
        near.set_ylim(centre - ZOOM, centre + ZOOM)
        near.set_title(f"within {ZOOM:g} of {about}, {centre:.5g}; a dot ends each run", fontsize=10)
    handles, labels = axes["steps"].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
    return drawn, axes


def draw_sets(whole, near, sets: dict[str, list[Run]], high: float, timed: bool):
    """Draw the mean and the spread of each set against steps or times on both axes, and on `near` its ends.

    `near` begins where the first mean falls below `high`.
    """
    bounds = []
    for (label, runs), style in zip(sets.items(), itertools.cycle(STYLES)):
        points = common_points(runs)
        losses = [[loss for _, loss in found] for found in points.values()]
        means = list(map(statistics.fmean, losses))
        x = (
            [statistics.fmean(spent for spent, _ in found) for found in points.values()]
            if timed
            else [*points]
        )
        for axis in (whole, near):
            axis.plot(x, means, label=label, markersize=3, **style)
            spread = list(map(min, losses)), list(map(max, losses))
            axis.fill_between(x, *spread, color=style["color"], alpha=0.2)
        ends = [run.seconds if timed else run.steps for run in runs]
        near.plot(ends, [run.loss for run in runs], "o", color=style["color"], alpha=0.6)
        bounds += ends
        for (x0, y0), (x1, y1) in itertools.pairwise(zip(x, means, strict=True)):
            if y0 > high >= y1:
                bounds.append(x0 + (x1 - x0) * (y0 - high) / (y0 - y1))
    margin = 0.05 * (max(bounds) - min(bounds)) or 1
    near.set_xlim(min(bounds) - margin, max(bounds) + margin)


def draw_history(axis, records: list["Record"]):
    """Draw time to the target against date: our records filled, those reported by others hollow."""
    labelled = records if len(records) <= 12 else [records[0], records[-1]]  # more labels would overlap
    for record in records:
        at = (date.fromisoformat(record.date), record.summary.time_mean)
        face = "none" if record.reported else "C0"
        axis.plot(*at, "o", markerfacecolor=face, markeredgecolor="C0", markersize=8)
    for i, record in enumerate(labelled):
        at = (date.fromisoformat(record.date), record.summary.time_mean)
        text = f"{record.summary.time_mean:.1f} s, {record.machine}"
        offset = (8, -14 if i % 2 else 6)
        axis.annotate(text, at, xytext=offset, textcoords="offset points", fontsize=8)
    axis.margins(0.25)
    axis.set_xlabel("date (hollow: reported by others)")
    axis.set_ylabel("time to the target (s)")
    axis.tick_params("x", rotation=20)


def plot(arguments) -> int:
    """Draw validation losses against steps and time, and the records that reached the target by date."""
    if not Path(arguments.out).name:
        raise UsageError(f"-o {arguments.out!r}: names no file; name a picture, .png or .svg")
    logs = {}
    for path in arguments.paths:
        for folder, inside in find_logs([path]).items():
            logs.setdefault(folder, []).extend(inside)
    groups = read_runs(logs)
    lengths = Counter(folder for folder, _ in groups)
    names = dict(zip(lengths, short_names(list(lengths)), strict=True))
    sets = {
        names[folder] + (f", {steps} steps" if lengths[folder] > 1 else ""): runs
        for (folder, steps), runs in groups.items()
    }
    records = read_records(Path(arguments.records))
    reached = [record for record in records if record.reached and record.summary.times]
    drawn, axes = draw_curves(sets, arguments.target, *["history"] * bool(reached))
    if reached:
        draw_history(axes["history"], reached)
    print(f"picture: {save(drawn, Path(arguments.out))}")
    return 0


# ============================================================================================================
# Records

MARKS = ("<!-- records: written by ./run.sh record history -->", "<!-- end of records -->")


@dataclass(frozen=True)
class Record:
    """A record as the table shows it: of a folder, or, where that is None, reported by others."""

    folder: Path | None
    date: str
    what: str
    machine: str
    runs: list[Run]
    summary: Summary
    settings: dict[str, str]

    @property
    def reported(self) -> bool:
        return self.folder is None

    @property
    def reached(self) -> bool:
        """Whether it proves that the target was reached."""
        return why_unproven(self.summary, self.settings) is None

    @property
    def age(self) -> tuple:
        """What records are ordered by: of one day our own come later, by their last log."""
        return self.date, not self.reported, self.runs[-1].path.name, str(self.folder)


def off_target(settings: dict[str, str]) -> str | None:
    """Why a log's validation set is not the target's; None if it is, or if the log names none."""
    files = settings.get("val_files")
    tokens = settings.get("val_tokens")
    if files is None or ("fineweb_val" in files and tokens == TARGET_TOKENS):
        return None
    losses = "the small sample model's losses" if settings.get("preset") == "sample" else "its losses"
    return (
        f"its validation set, {tokens} tokens of `{files}`, is not the target's, {TARGET_TOKENS} of FineWeb;"
        f" {losses} compare only with each other"
    )


def why_unproven(summary: Summary, settings: dict[str, str]) -> str | None:
    """Why runs do not prove that the target was reached, or None when they do."""
    if reason := off_target(settings):
        return reason
    if summary.p is None:
        return "one run gives no p; at least 1 more is missing"
    if summary.p >= SIGNIFICANT:
        return (
            f"p = {summary.p:.4f} that its mean loss, {summary.loss_mean:.4f}, is below {summary.target:g};"
            f" it must be under {SIGNIFICANT}"
        )
    return None


def read_record(readme: Path) -> Record | None:
    """The record whose README.md this is; None for a folder that is no record's."""
    folder = readme.parent
    runs = logged_runs(folder / "logs")
    if not runs or not RECORD_NAME.match(folder.name):
        return None
    _, head = read_head(runs[0].path)
    machine, _ = machine_of(head)
    title = read_text(readme, "a record's page").partition("\n")[0].strip("# ")
    summary = summarize(runs, TARGET)
    return Record(folder, folder.name[:10], title, machine, runs, summary, settings_in(head))


def read_reported(path: Path) -> list[Record]:
    """The results that others reported, from a list in JSON; raises UsageError when it cannot be read."""
    records = []
    try:
        for entry in json.loads(read_text(path, "a list of reported results")):
            times = zip(entry["losses"], entry["seconds"], strict=True)
            runs = [Run(path, entry["steps"], loss, seconds) for loss, seconds in times]
            date.fromisoformat(entry["date"])
            summary = summarize(runs, TARGET)
            records.append(Record(None, entry["date"], entry["what"], entry["machine"], runs, summary, {}))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UsageError(f"{path}: cannot be read as a list of reported results ({error!r})") from None
    return records


def read_records(records: Path) -> list[Record]:
    """Every record, newest first: claims, those in proxy/, and the results reported by others."""
    pages = [*sorted(records.glob("*/README.md")), *sorted(records.glob("proxy/*/README.md"))]
    found = [record for page in pages if (record := read_record(page))]
    reported = records / "reported.json"
    if reported.is_file():
        found += read_reported(reported)
    return sorted(found, key=lambda record: record.age, reverse=True)


@dataclass(frozen=True)
class Draft:
    """What a new record's page is written from: its runs, and what they share and show."""

    runs: list[Run]
    script: str
    head: str
    summary: Summary
    doubt: str | None  # why nothing is proven

    @property
    def settings(self) -> dict[str, str]:
        return settings_in(self.head)


def kept_names(runs: list[Run]) -> list[str]:
    """The names under which a record keeps logs: their own, and another where that is taken."""
    names = []
    for path in (run.path for run in runs):
        more = (f"{path.stem}-{i}{path.suffix}" for i in itertools.count(2))
        names.append(next(name for name in itertools.chain([path.name], more) if name not in names))
    return names


def runs_alike(paths: list[str]) -> list[Run]:
    """The finished runs of logs; raises UsageError unless they share script, settings and length."""
    groups = read_runs(find_logs(paths))
    if len({steps for _, steps in groups}) > 1:
        raise UsageError(f"{', '.join(paths)}: runs of different length; name the logs of one length")
    runs = list(itertools.chain.from_iterable(groups.values()))
    script, _ = same_in_all(runs)
    if not script:
        raise UsageError(f"{runs[0].path}: holds no script; a record needs logs that begin with theirs")
    if len(groups) > 1:
        parts = ", ".join(f"{len(found)} of {folder}" for (folder, _), found in groups.items())
        tell(f"runs of one script and one set of settings, so they are one group: {parts}")
    return runs


def draft_record(paths: list[str]) -> Draft:
    """What logs of finished runs give for a record; raises UsageError if they do not belong together."""
    runs = runs_alike(paths)
    script, head = read_head(runs[0].path)
    summary = summarize(runs, TARGET)
    return Draft(runs, script, head, summary, why_unproven(summary, settings_in(head)))


def new(arguments) -> int:
    """Make a record's folder from finished runs of one script: the script, the logs, a page and a picture."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", arguments.name):
        raise UsageError(f"{arguments.name!r}: name a record by letters, digits, dots and dashes")
    draft = draft_record(arguments.paths)
    if draft.doubt and not arguments.unproven:
        raise UsageError(f"nothing is proven: {draft.doubt}; make more runs, or keep them with --unproven")
    records = Path(arguments.records)
    against = arguments.against or newest_record(records)
    before = source_of(against) if against else None
    elsewhere = before and not Path(against).resolve().is_relative_to(records.resolve())
    baseline = runs_alike([against]) if elsewhere and before.path.suffix != ".py" else []
    name = f"{time.strftime('%Y-%m-%d', time.gmtime())}_{arguments.name}"
    folder = (records / "proxy" if draft.doubt else records) / name
    try:
        (folder / "logs").mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{folder}: exists already; give another name, or remove it") from None
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made ({error.strerror})") from None
    kept = None
    if elsewhere:
        (folder / BASELINE).mkdir()
        script = keep_script(before.script, folder / BASELINE, records.rglob(SCRIPT_NAME))
        keep_logs(baseline, script, folder / BASELINE)
        kept = os.path.relpath(script, folder), commit_of(script)
    keep_logs(draft.runs, keep_script(draft.script, folder), folder / "logs")
    sets = {BASELINE: baseline, arguments.name: draft.runs} if baseline else {arguments.name: draft.runs}
    drawn, _ = draw_curves(sets, None if off_target(draft.settings) else TARGET)
    save(drawn, folder / "curves.png")
    shown = os.path.relpath(folder, records / "..")
    parts = [
        f"# {arguments.what or arguments.name}",
        *describe_result(draft),
        arguments.note,
        "![validation loss against steps and time](curves.png)",
        *describe_rerun(draft, shown),
        *describe_race(baseline, draft),
        *describe_change(draft, shown, against, before, kept),
        *describe_statistics(draft),
    ]
    (folder / "README.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    print(f"record: {folder}")
    return 0


def newest_record(records: Path) -> str | None:
    """The folder of the last record made here."""
    return next((str(record.folder) for record in read_records(records) if not record.reported), None)


def keep_script(script: str, folder: Path, kept: Iterable[Path] = ()) -> Path:
    """Write a script into a folder, unless it is one of those that are kept already; returns where it is."""
    source = (script.strip("\r\n") + "\n").encode()  # as logs give it
    if same := next((path for path in sorted(kept) if path.read_bytes() == source), None):
        return same
    (folder / SCRIPT_NAME).write_bytes(source)
    return folder / SCRIPT_NAME


def keep_logs(runs: list[Run], script: Path, folder: Path):
    """Write runs' logs into a folder, with a line that names their script in the place of its source."""
    beside = folder.parent if folder.name == "logs" else folder
    for run, name in zip(runs, kept_names(runs), strict=True):
        log = archive(run.path.read_bytes(), os.path.relpath(script, beside), script.read_bytes())
        (folder / name).write_bytes(log)


def describe_race(baseline: list[Run], draft: Draft) -> list[str]:
    """The paragraphs that compare a record, B, with the runs that it raced, A, if there are any."""
    if not baseline:
        return []
    a, b = summarize(baseline, TARGET), draft.summary
    text = f"A: {a.runs} runs of {a.steps} steps in `{BASELINE}/`; B: the {b.runs} of this record."
    pairs = pairs_by_seed(baseline, draft.runs)
    lines = differences(a, b, pairs) if min(a.runs, b.runs) > 1 else []
    if a.times and b.times:
        reached = b.loss_mean <= a.loss_mean + TOLERANCE
        level = "at or below" if reached else "**above**"
        share = b.time_mean / a.time_mean
        lines.append(f"B's mean loss is {level} A's plus {TOLERANCE:g}, after {share:.3f} of A's time.")
    lines += machines_compared(baseline, draft.runs)[1]
    table = [markdown(pair_rows(pairs))] if pairs else []
    return ["## Race", text, *table, "\n".join(f"- {line}" for line in lines)]


def describe_result(draft: Draft) -> list[str]:
    """The paragraphs on what the runs reached, what that proves, and on which data."""
    s = draft.summary
    machine, _ = machine_of(draft.head)
    spent = ""
    if s.times:
        spent = f", {s.time_mean:.3f} ± {number(s.time_std, 3)} s, {number(s.step_avg_ms, 2)} ms a step"
    loss = f"validation loss {s.loss_mean:.4f} ± {number(s.loss_std)}"
    parts = ["## Result", f"{s.runs} runs of {s.steps} steps on {machine}: {loss}{spent}."]
    if draft.doubt:
        parts.append(f"This is **no claim to the target**: {draft.doubt}.")
    else:
        parts.append(f"The mean loss is below {TARGET:g} (one-sided t-test, p = {s.p:.4f}).")
    if named := draft.settings:
        files = (named.get("train_files"), named.get("val_tokens"), named.get("val_files"))
        parts.append("Trained on `{}`, validated on {} tokens of `{}`.".format(*files))
    return parts


def describe_rerun(draft: Draft, shown: str) -> list[str]:
    """The paragraphs with the command that runs the record again."""
    _, processes = machine_of(draft.head)
    start = ["torchrun", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
    flags = {flag.split("=")[0]: flag for flag in arguments_in(draft.head) or []}  # the last of a name counts
    command = shlex.join([*start, f"{shown}/{SCRIPT_NAME}", *flags.values()])
    text = "From the project's folder, with a `--seed` of your own:"
    defaults = f"With its defaults, on FineWeb or the sample: `./run.sh --record={Path(shown).name}`."
    return ["## Run it again", text, f"```\n{command}\n```", defaults]


def describe_change(
    draft: Draft, shown: str, against: str | None, before: Source | None, kept: tuple[str, str | None] | None
) -> list[str]:
    """The paragraphs on what changed since another record, given its name and its script.

    kept: where that script is kept, seen from this record's folder, and its commit.
    """
    if before is None:
        return ["## What changed", "This is the first record here, so it is compared with none."]
    name = os.path.relpath(against, ROOT) if Path(against).is_relative_to(ROOT) else against
    of = ""
    other = name
    if kept:
        script, commit = kept
        other = os.path.normpath(f"{shown}/{script}")
        of = f", whose script is `{script}`" + (f" (commit `{commit}`)" if commit else "")
    changes = f"Against `{name}`{of}: {summarize_diff(before.script, draft.script)}."
    parts = ["## What changed", f"{changes} All of it: `./run.sh record diff {other} {shown}`."]
    if lines := changed_experiment(before.settings, draft.settings):
        parts.append("\n".join(["Settings:", "", *(f"- `{line}`" for line in lines)]))
    return parts


def describe_statistics(draft: Draft) -> list[str]:
    """The paragraphs with the figures of the runs and of their machine."""
    rows = [["log", "seed", "loss", "time s"]]
    for run, name in zip(draft.runs, kept_names(draft.runs), strict=True):
        rows.append([name, seed_of(run) or "-", number(run.loss), number(run.seconds, 3)])
    parts = ["## Statistics", markdown(stats_rows([draft.summary])), markdown(rows)]
    machine, _ = machine_of(draft.head)
    versions = re.search(r"^PyTorch .*$", draft.head, re.M)
    parts += ["## Machine", f"{machine}. {versions[0] if versions else ''}".strip()]
    figures = calibration_of(draft.runs)
    if figures:
        parts.append(markdown([list(figures), [f"{value:.4g}" for value in figures.values()]]))
    else:
        parts.append("The logs hold no calibration.")
    return parts


def history_row(record: Record, folder: Path) -> list[str]:
    """A record's row of the table, with a link from a folder."""
    s = record.summary
    figures = [
        f"{name.split()[0]} {value:.4g} {name.split()[1]}"
        for name, value in calibration_of(record.runs).items()
        if is_judged(name)
    ]
    source = "reported by others"
    if not record.reported:
        source = f"[{record.folder.name}]({os.path.relpath(record.folder, folder)})"
    return [
        record.date,
        record.what,
        record.machine,
        str(s.steps or "-"),
        f"{number(s.time_mean, 2)} ± {number(s.time_std, 2)}",
        f"{s.loss_mean:.4f} ± {number(s.loss_std)}, {s.runs} runs",
        number(s.p) if record.reached else "no claim",
        ", ".join(figures) or "-",
        source,
    ]


def machine_notes(records: list[Record]) -> list[str]:
    """A line for each record whose machine is not as fast as that of the record before it.

    The record before it is the last with the same kind and number of devices.
    """
    notes = []
    newest = {}
    for record in reversed(records):
        if not calibration_of(record.runs):
            continue
        before = newest.get(record.machine)
        newest[record.machine] = record
        if before and (differences := machine_differences(before.runs, record.runs)):
            notes.append(
                f"The machines of {before.folder.name} and {record.folder.name} differ by more than 1 %:"
                f" {', '.join(differences)}."
            )
    return notes[::-1]


def history(arguments) -> int:
    """Write the table of records between its two marks in records/README.md."""
    records = Path(arguments.records)
    page = Path(arguments.readme or records / "README.md")
    text = read_text(page, "the page with the table")
    begin, end = MARKS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UsageError(
            f"{page}: the table's place is not marked; put the lines {begin} and {end} there, once each"
        )
    found = read_records(records)
    head = ["date", "what", "machine", "steps", "time s", "validation loss"]
    table = [[*head, f"p (< {TARGET:g})", "calibration", "source"]]
    table += [history_row(record, page.parent) for record in found]
    notes = machine_notes(found)
    before = text[: text.index(begin)] + begin
    after = text[text.index(end) :]
    page.write_text("\n".join([before, markdown(table), *(["", *notes] if notes else []), after]))
    print(f"{page}: {len(found)} records")
    return 0


# ============================================================================================================
# Profiles

GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
CPU_EVENTS = ("cpu_op",)
LONGEST = 30  # kernels that are listed

# The parts of a step, and what is in the names of their kernels (on a CPU, operators); the first that fits
# counts. train_gpt.py's own kernels begin with _, the compiler's with triton_, cuBLAS' with nvjet.
PARTS = {
    "fused by the compiler": r"^triton_",
    "communication": r"nccl|gloo|c10d",
    "attention": r"attention|^_\w*(heads|qkv)",
    "loss": r"^_\w*loss|log_softmax|nll",
    "embeddings": r"scatter_add|index_add|embedding",
    "products": r"^_\w*mlp|nvjet|gemm|cutlass|cublas|splitK|mm$",
    "mixing and norms": r"^_\w*(mix|norm(?!uon))|rms_norm",
    "copies": r"Memcpy|Memset|copy_|_transpose_kernel",
    "other": r"",
}


@dataclass(frozen=True)
class Span:
    """A kernel or an operator of a trace: its name, where it ran, and its begin and end in µs."""

    name: str
    thread: str
    begin: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.begin


def part_of(name: str) -> str:
    """The part of a step that a kernel, or on a CPU an operator, belongs to."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, name))


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total = 0.0
    end = -math.inf
    for low, high in sorted(spans):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


def own_times(spans: list[Span]) -> list[float]:
    """The length of each span without those that lie in it on its thread, in µs."""
    times = [span.length for span in spans]
    around = {}  # of each thread the spans that have begun and not ended, outermost first
    for i in sorted(range(len(spans)), key=lambda i: (spans[i].begin, -spans[i].end)):
        stack = around.setdefault(spans[i].thread, [])
        while stack and spans[stack[-1]].end <= spans[i].begin:
            stack.pop()
        if stack:
            times[stack[-1]] -= spans[i].length
        stack.append(i)
    return times


def read_trace(path: Path) -> tuple[list[Span], bool]:
    """The kernels of a Chrome trace, or a CPU's operators where it has none; and whether they are a GPU's.

    Raises UsageError for a file that is no such trace.
    """
    try:
        data = path.read_bytes()
        trace = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror or error}); a log's trace lies beside it"
        ) from None
    except (EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UsageError(
            f"{path}: not a trace of torch.profiler; name a log of a run with --profile"
        ) from None
    for kinds in (GPU_EVENTS, CPU_EVENTS):
        if found := [event for event in events if event.get("cat") in kinds]:
            return [read_span(event, path) for event in found], kinds is GPU_EVENTS
    raise UsageError(f"{path}: holds no kernel and no operator, so nothing was profiled")


def read_span(event: dict, path: Path) -> Span:
    """An event of a trace as a span; raises UsageError when it has no name or times."""
    try:
        begin = float(event["ts"])
        thread = f"{event.get('pid')} {event.get('tid')}"
        return Span(str(event["name"]), thread, begin, begin + float(event["dur"]))
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path}: an event of the trace has no name, ts or dur; profile again") from None


def profiled_steps(log: Path) -> int:
    """How many steps a log's run profiled; raises UsageError for none."""
    try:
        data = log.read_bytes()
    except OSError as error:
        raise UsageError(f"{log}: cannot be read ({error.strerror}); name a log or its trace") from None
    _, start = script_span(data)
    found = PROFILED.findall(data, start)
    first, last = map(int, found[-1]) if found else (1, 0)
    if last < first:
        raise UsageError(
            f"{log}: its run had no --profile=FROM:TO, or it is not a log; name another, or a trace"
        )
    return last - first + 1


def collectives(spans: list[Span]) -> list[str]:
    """A line for each collective of a GPU, in their order: when it began, its time and what nothing hides."""
    computing = [(s.begin, s.end) for s in spans if part_of(s.name) != "communication"]
    start = min(span.begin for span in spans)
    lines = []
    for span in sorted(spans, key=lambda span: span.begin):
        if part_of(span.name) == "communication":
            inside = [(max(a, span.begin), min(b, span.end)) for a, b in computing]
            bare = span.length - covered([(a, b) for a, b in inside if a < b])
            name = re.sub(r"^ncclDevKernel_|\(.*", "", span.name)
            times = f"at {(span.begin - start) / 1000:8.3f} ms {span.length / 1000:6.3f} ms"
            lines.append(f"{times}, {bare / 1000:.3f} not hidden  {name}")
    return lines


def profile_report(spans: list[Span], on_gpu: bool, steps: int) -> list[str]:
    """The lines of a profile: time a step by part, each collective, the longest kernels."""
    times = [span.length for span in spans] if on_gpu else own_times(spans)
    parts = dict.fromkeys(PARTS, 0.0)
    kernels = {}
    for span, spent in zip(spans, times, strict=True):
        parts[part_of(span.name)] += spent
        kernels.setdefault(span.name, []).append(spent)
    a_step = 1000 * steps  # from µs to ms a step
    lines = [f"{part} {spent / a_step:.2f} ms a step" for part, spent in parts.items() if spent]
    if on_gpu:
        computing = covered([(s.begin, s.end) for s in spans if part_of(s.name) != "communication"])
        bare_time = covered([(s.begin, s.end) for s in spans]) - computing
        lines.append(
            f"computing {computing / a_step:.2f} ms a step, communication not hidden"
            f" {bare_time / a_step:.2f} ms"
        )
        lines += collectives(spans)
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    for name, spent in longest:
        calls = f"{len(spent) / steps:7.1f} calls a step"
        lines.append(f"{sum(spent) / a_step:9.3f} ms {calls}  {name[:120]}")
    return lines


def profile(arguments) -> int:
    """Print where the time of profiled steps went: ms a step by part, collectives, the longest kernels.

    The log is that of a run with --profile=FROM:TO, whose trace lies beside it; a trace alone needs --steps.
    On a GPU kernels count, and on a CPU operators without what they call.
    """
    path = Path(arguments.log)
    if arguments.steps is not None and arguments.steps < 1:
        raise UsageError(f"--steps={arguments.steps}: give the number of steps in the trace, at least 1")
    if path.name.endswith((".json", ".json.gz")):
        if arguments.steps is None:
            raise UsageError(
                f"{path}: a trace does not say how many steps it holds; give --steps=N, or name its log"
            )
        trace = path
        steps = arguments.steps
    else:
        trace = path.with_suffix(".trace.json.gz")
        steps = arguments.steps or profiled_steps(path)
    spans, on_gpu = read_trace(trace)
    print(f"trace: {trace}, {steps} step{'s' * (steps > 1)}")
    print("\n".join(profile_report(spans, on_gpu, steps)))
    return 0


# ============================================================================================================
# Command line


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are one line."""

    def error(self, message: str):
        raise UsageError(f"{message} (--help lists what there is)")


def finite_loss(text: str) -> float:
    """The loss of a flag; raises ArgumentTypeError unless it is a number above 0."""
    try:
        loss = float(text)
    except ValueError:
        loss = math.nan
    if not 0 < loss < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no loss; give nats a token, as 3.28")
    return loss


def add_command(commands, function, text: str, *positional: str) -> Parser:
    """Add a function as a command of its name, with a line for --help and its positional arguments."""
    command = commands.add_parser(
        function.__name__, help=text, description=function.__doc__, allow_abbrev=False
    )
    for name in positional:
        if name == "paths":
            command.add_argument(name, nargs="+", metavar="LOG|DIR")
        else:
            command.add_argument(name, metavar=name.upper())
    command.set_defaults(run=function)
    return command


def add_reading(commands):
    """Add the commands that read logs."""
    command = add_command(commands, stats, "final losses, times and p of runs", "paths")
    text = f"loss that the mean is tested against [{TARGET}]"
    command.add_argument("--target", type=finite_loss, default=TARGET, help=text)
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--markdown", action="store_true", help="as a Markdown table")
    add_command(commands, compare, "is B faster than A at equal loss?", "a", "b")
    add_command(commands, diff, "what changed from A's script to B's", "a", "b")
    command = add_command(commands, plot, "draw losses against steps and time, and the history", "paths")
    command.add_argument("-o", "--out", required=True, help="the picture, .png or .svg")
    text = f"loss that is drawn as a line [{TARGET}]"
    command.add_argument("--target", type=finite_loss, default=TARGET, help=text)
    command.add_argument("--records", default=str(RECORDS), help="folder of the history [records]")
    command = add_command(commands, profile, "where the time of profiled steps went", "log")
    text = "steps in the trace, where it is named without its log"
    command.add_argument("--steps", type=int, default=None, help=text)


def add_running(commands):
    """Add the commands that make runs; flags that they do not know go to the script."""
    text = "run two scripts alternately, then compare; other flags go to both, and to one as 'A.py --flag=1'"
    command = add_command(commands, race, text, "a", "b")
    command.add_argument("--runs", type=int, default=10, help="runs of each script [10]")
    command.add_argument("--out", default="logs/race", help="folder of the logs [logs/race]")
    text = "seed of the first run; the next ones count up [1]"
    command.add_argument("--seed", type=int, default=1, help=text)
    command.add_argument("--nproc", type=int, default=0, help="processes [all GPUs, or 1]")
    text = "run a list of settings and rank their losses; other flags go to all"
    command = add_command(commands, sweep, text, "file")
    text = f"script that the settings and patches are for [{SCRIPT_NAME}]"
    command.add_argument("--script", default=str(ROOT / SCRIPT_NAME), help=text)
    command.add_argument("--out", default=None, help="folder of the results [logs/sweep-FILE]")
    command.add_argument("--nproc", type=int, default=0, help="processes [all GPUs, or 1]")


def add_keeping(commands):
    """Add the commands that keep records."""
    command = add_command(commands, new, "make a record's folder from finished runs", "name", "paths")
    text = "log, script or folder that it is compared with [the newest record]"
    command.add_argument("--against", default=None, metavar="RECORD", help=text)
    text = "its title, as the table of records shows it [NAME]"
    command.add_argument("--what", default="", help=text)
    text = "what else a reader must know, such as the limits of the claim"
    command.add_argument("--note", default="", help=text)
    text = "keep it in records/proxy/ although it does not prove the target"
    command.add_argument("--unproven", action="store_true", help=text)
    command.add_argument("--records", default=str(RECORDS), help="folder of the records [records]")
    command = add_command(commands, history, "write the table of records in records/README.md")
    command.add_argument("--records", default=str(RECORDS), help="folder of the records [records]")
    text = "the page with the table [README.md in the folder of the records]"
    command.add_argument("--readme", default=None, help=text)


def parser() -> Parser:
    """The command line."""
    root = Parser(prog="record.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    add_reading(commands)
    add_running(commands)
    add_keeping(commands)
    return root


def main() -> int:
    """Run a command; returns its exit code. A user's mistake ends in one line and the code 2."""
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
        tell(f"record.py: {error}")
        return 2
    except OSError as error:
        tell(f"record.py: {error.filename}: {error.strerror}")
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe
    sys.exit(main())
