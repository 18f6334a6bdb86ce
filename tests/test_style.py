"""Every file is as `ruff format` leaves it, and `ruff check` finds nothing by pyproject.toml's rules."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDTH = 110  # columns


def ruff(*arguments):
    """Ruff in the project's folder: its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def checked_files():
    """The Python files that ruff checks, by their paths in the project."""
    code, listing = ruff("check", "--show-files")
    assert code == 0, listing
    paths = sorted(Path(line).relative_to(ROOT) for line in listing.splitlines())
    return [str(path) for path in paths if path.suffix == ".py"]


FILES = checked_files()


def test_files_are_found():
    """The project's own files are among them, and no archived script is."""
    assert {"train_gpt.py", "records/record.py", "data/sample.py", "tests/test_style.py"} <= set(FILES)
    assert [name for name in FILES if name.endswith("train_gpt.py")] == ["train_gpt.py"]


@pytest.mark.parametrize("file", FILES)
def test_check(file):
    code, found = ruff("check", "--quiet", file)
    assert code == 0, found


@pytest.mark.parametrize("file", FILES)
def test_format(file):
    """The formatter would change nothing, and no comment tells it to look away."""
    code, found = ruff("format", "--diff", file)
    assert code == 0, found
    assert not re.search(r"#\s*fmt:\s*(skip|off)", (ROOT / file).read_text())


def test_width():
    """No line of the script is wider than the limit, strings and comments included."""
    lines = (ROOT / "train_gpt.py").read_text().splitlines()
    wide = [f"{i}: {len(line)}" for i, line in enumerate(lines, 1) if len(line) > WIDTH]
    assert not wide
