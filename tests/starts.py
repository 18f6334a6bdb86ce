"""Processes forked from one that has imported torch, which takes a second and is most of a start.

All else is as Python does it: the script is read, compiled and run as __main__, with arguments, environment,
folder and output of its own.
"""

import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from unittest import mock

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
LIBRARIES = ["numpy", "torch", "torch.utils.benchmark", "tqdm", "triton.tools.tensor_descriptor"]


def server():
    """multiprocessing's context for such processes, which have a clean environment, as the first of them."""
    multiprocessing.forkserver.set_forkserver_preload(["starts", *LIBRARIES])
    with mock.patch.dict(os.environ, ENVIRONMENT, clear=True):
        multiprocessing.forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def _python(arguments, folder, environment, outputs):
    """Do in this process what python does with these arguments: a script's path or -c and a program."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    name, *rest = arguments
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
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
    """As subprocess.run of Python with these arguments, in a process for each of the ranks' variables."""
    arguments, context = [*map(str, arguments)], server()
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as errors:
        given = [(arguments, folder, environment | rank, (out.name, errors.name)) for rank in ranks]
        children = [context.Process(target=_python, args=each) for each in given]
        for child in children:
            child.start()
        try:
            for child in children:
                child.join(timeout)
            codes = [child.exitcode for child in children]
        finally:
            for child in children:
                child.kill()
                child.join()
        code = next(filter(None, codes), 0)
        done = subprocess.CompletedProcess(arguments, code, out.read(), errors.read())
    assert None not in codes, done
    return done
