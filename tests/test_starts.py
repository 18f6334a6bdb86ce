"""The stand-in for starts of Python does what they do."""

import os
import re
import subprocess
import sys

import pytest
import starts
from starts import ENVIRONMENT, forked, ranks_of

PROGRAM = """
import os, signal, sys
seen = {name: os.environ.get(name) for name in ("RANK", "HOME", "TRITON_INTERPRET", "MARK")}
handlers = [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
print(__name__, __file__ if "__file__" in globals() else "", sys.argv, sys.path, os.getcwd(), seen)
print(handlers, sys.stdin.read(), sys.stdout.encoding, sys.stdout.isatty())
sys.stderr.write("error")
END
"""


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "os._exit(4)", "os.kill(os.getpid(), signal.SIGKILL)"])
@pytest.mark.parametrize("saved", [False, True])
def test_forked_is_as_started(tmp_path, end, saved):
    """Arguments, environment, folder, signals, output and exit code, of a script and of -c."""
    program = PROGRAM.replace("END", f"sys.stdout.flush(); {end}")
    environment = ENVIRONMENT | {"HOME": "/home", "MARK": "7"}
    del environment["HOME" if saved else "MARK"]
    arguments = ["-c", program, "a", "--b=c"]
    if saved:
        (tmp_path / "program.py").write_text(program)
        arguments = [str(tmp_path / "program.py"), "a", "--b=c"]
    started = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
    )
    done = forked(arguments, environment=environment, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (started.returncode, started.stdout, "error")


def test_ranks():
    """Each has its own number; what one of them ends with is told."""
    program = "import os, sys; os.write(1, os.environ['RANK'].encode() + b' ')"  # at once, as print does not
    program += "; sys.exit(5 * (os.environ['LOCAL_RANK'] == '2'))"
    done = forked(["-c", program], ranks_of(3))
    assert done.returncode == 5 and sorted(done.stdout.split()) == ["0", "1", "2"]


def test_a_rank_that_fails(monkeypatch):
    """The others are not waited for as long as for a run that hangs."""
    monkeypatch.setattr(starts, "GRACE", 0.2)
    done = forked(
        ["-c", "import os, time; os.environ['RANK'] == '1' and os._exit(3); time.sleep(60)"], ranks_of(2)
    )
    assert done.returncode == 3


def test_a_process_that_hangs_is_ended():
    with pytest.raises(AssertionError, match=r"stdout='(\d+)\\n'") as error:
        forked(["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], timeout=0.5)
    pid = int(re.search(r"stdout='(\d+)", str(error.value))[1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
