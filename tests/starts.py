"""Start processes as forks of one that has imported torch: the import is most of what a start takes.

All else is as Python does it: the script is read, compiled and run as __main__, with arguments, environment,
folder and output of its own.
"""

import functools
import json
import multiprocessing.connection
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from unittest import mock

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
GRACE = 30  # s, in which ranks may end by themselves after one of them has failed
LIBRARIES = ["numpy", "torch", "torch.utils.benchmark", "tqdm", "triton.tools.tensor_descriptor"]


def server():
    """multiprocessing's context for such processes, which have a clean environment, as the first of them."""
    multiprocessing.forkserver.set_forkserver_preload(["starts", *LIBRARIES])
    with mock.patch.dict(os.environ, ENVIRONMENT, clear=True):
        multiprocessing.forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


@functools.cache
def installed_path():
    """Where Python looks for modules that are installed, without what pytest and others have added."""
    program = "import json, sys; print(json.dumps(sys.path[1:]))"
    command = [sys.executable, "-E", "-c", program]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def _python(arguments, installed, folder, environment, outputs):
    """Do in this process what python does with these arguments: a script's path or -c and a program."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    name, *rest = arguments
    sys.path[:] = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    if name == "-c":
        program, *rest = rest
        sys.argv = ["-c", *rest]
        sys.path.insert(0, "")
        exec(program, vars(sys.modules["__main__"]))
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(name))
        runpy.run_path(name, run_name="__main__")


def ranks_of(size):
    """What torchrun sets in the environment of each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def forked(arguments, ranks=({},), environment=ENVIRONMENT, folder=".", timeout=120):
    """As subprocess.run of Python with these arguments, in a process for each of the ranks' variables.

    As torchrun does, it ends the others when one has failed, though not at once, and returns its code.
    """
    arguments, context = [*map(str, arguments)], server()
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as errors:
        given = [
            (arguments, installed_path(), folder, environment | rank, (out.name, errors.name))
            for rank in ranks
        ]
        children = [context.Process(target=_python, args=each) for each in given]
        for child in children:
            child.start()
        running = {child.sentinel: child for child in children}
        code, end = 0, time.monotonic() + timeout
        try:
            while running and (left := end - time.monotonic()) > 0:
                for sentinel in multiprocessing.connection.wait(running, left):
                    child = running.pop(sentinel)
                    child.join()
                    if child.exitcode and not code:
                        code, end = child.exitcode, min(end, time.monotonic() + GRACE)
        finally:
            for child in children:
                child.kill()
                child.join()
        done = subprocess.CompletedProcess(arguments, code, out.read(), errors.read())
    assert code or not running, done  # it hung
    return done
