"""The real downloader against a small Hub on loopback, which breaks off, forgets and lies when told to."""

import hashlib
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from shards import write_shard

SCRIPT = Path(__file__).parent.parent / "data" / "cached_fineweb10B.py"
# What Python runs at its start: waits are noted and short.
SHORT_WAITS = """
import time
sleep = time.sleep
def short(seconds):
    with open({waits!r}, "a") as file:
        print(seconds, file=file)
    sleep(0.01)
time.sleep = short
"""


class Hub(BaseHTTPRequestHandler):
    """Serves files as the Hub resolves them: a HEAD with ETag, commit and length, and GETs with ranges."""

    def log_message(self, *_):
        pass

    @staticmethod
    def etag(data):
        return hashlib.sha256(data).hexdigest()

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        prefix, _, name = self.path.partition("/resolve/main/")
        data = self.server.files.get(name) if prefix == "/datasets/kjj0/fineweb10B-gpt2" else None
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.server.asked.append((self.command, name))
        trouble = self.server.trouble.get((self.command, name))
        if trouble:
            return self.fail(*trouble.pop(0))
        if body and name in self.server.held:
            self.server.release.wait(60)
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{self.etag(data)}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.server.gets.append((name, start))
            if self.server.damages.get(name, 0) > 0:
                self.server.damages[name] -= 1
                data = flipped(data)
            self.wfile.write(data[start : self.server.breaks.get(name)])  # and hangs up there
            self.close_connection = True

    def fail(self, code, *headers):
        """An HTTP error, or a reset of the connection for code 0."""
        self.close_connection = True
        if code == 0:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        self.send_response(code)
        for name, value in (*headers, ("Content-Length", "0")):
            self.send_header(name, value)
        self.end_headers()


def flipped(data):
    """These bytes with one bit of a token changed, past the header and the size that a shard is judged by."""
    changed = bytearray(data)
    changed[3000] ^= 1
    return bytes(changed)


def shard_bytes(path, count):
    """The bytes of a shard of so many tokens."""
    return Path(write_shard(path, np.arange(count) % 50257)).read_bytes()


@pytest.fixture
def hub(tmp_path):
    """A server with a validation shard and three training shards, and the script in a project of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    for i in range(4):
        name = f"fineweb_train_{i:06d}.bin" if i else "fineweb_val_000000.bin"
        server.files[name] = shard_bytes(tmp_path / "hub" / name, 5000 + 100 * i)
    server.gets = []  # of bodies, and where they start
    server.asked = []  # of every kind
    server.breaks = {}
    server.damages = {}  # how often a file still comes with a wrong bit
    server.trouble = {}  # what a request for a file fails with, in turn
    server.held = []  # files that wait for release
    server.release = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "data").mkdir()
    # Shards of this size, or the check of the disk would want a gigabyte.
    text = SCRIPT.read_text()
    assert "100_000_000 * 2" in text
    (tmp_path / "data" / SCRIPT.name).write_text(text.replace("100_000_000 * 2", "5000 * 2"))
    server.folder = tmp_path / "data" / "fineweb10B"
    (tmp_path / "sitecustomize.py").write_text(SHORT_WAITS.format(waits=str(tmp_path / "waits")))
    yield server
    server.release.set()
    server.shutdown()


def fetching(hub, *arguments):
    """The command that fetches shards, and its environment, in which the Hub is that server."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(hub.folder.parent.parent),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    return [sys.executable, str(hub.folder.parent / SCRIPT.name), *arguments], environment


def fetch(hub, *arguments):
    """The script's exit code and what it printed."""
    command, environment = fetching(hub, *arguments)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def failed(done, says):
    """It ended with code 1 and no traceback, and its last line says so."""
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert says in done.stderr.strip().splitlines()[-1]


def same(hub, *names):
    """Whether these shards are those of the Hub."""
    return all((hub.folder / name).read_bytes() == hub.files[name] for name in names)


def test_fetches_shards_and_skips_whole_ones(hub):
    done = fetch(hub, "2")
    assert done.returncode == 0, done.stderr
    names = ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"]
    assert sorted(path.name for path in hub.folder.iterdir()) == [".lock", *names]
    assert same(hub, *names)
    count = len(hub.gets)
    again = fetch(hub, "3")
    assert again.returncode == 0 and hub.gets[count:] == [("fineweb_train_000003.bin", 0)]
    assert "4 shards are whole, 1 of them new" in again.stdout


def test_a_bar_each_on_a_terminal(hub):
    terminal, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 120))
    command, environment = fetching(hub, "1")
    child = subprocess.Popen(command, stdout=side, stderr=side, env=environment)
    os.close(side)
    shown = b""
    try:
        while part := os.read(terminal, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert child.wait(timeout=60) == 0
    assert b"fineweb_val_000000.bin: 100%" in shown and b"fineweb_train_000001.bin: 100%" in shown


def test_resumes_after_a_break(hub):
    """The library hands over 10 MB at a time, so that is what a break can cost."""
    name = "fineweb_train_000001.bin"
    hub.files[name] = shard_bytes(hub.folder.parent / "large.bin", 12_000_000)
    hub.breaks = {name: 15_000_000}
    failed(fetch(hub, "1"), "fineweb_train_000001.bin could not be fetched")
    part = (hub.folder / "fineweb_train_000001.partial").stat().st_size
    assert 10_000_000 <= part <= 15_000_000 and not (hub.folder / name).exists()
    hub.breaks = {}
    hub.gets = []
    assert fetch(hub, "1").returncode == 0
    assert hub.gets == [(name, part)] and same(hub, name)


def test_a_cut_shard_is_fetched_again(hub):
    assert fetch(hub, "1").returncode == 0
    path = hub.folder / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert fetch(hub, "1").returncode == 0 and same(hub, path.name)


def test_what_is_no_shard_is_refused(hub):
    hub.files["fineweb_train_000001.bin"] = b"<html>moved</html>"
    failed(fetch(hub, "1"), "not a whole shard")
    for suffix in (".bin", ".partial"):
        assert not (hub.folder / f"fineweb_train_000001{suffix}").exists()


def test_hub_does_not_answer(hub):
    hub.shutdown()
    hub.server_close()
    failed(fetch(hub, "1"), "could not be fetched from http://127.0.0.1")


@pytest.mark.parametrize("argument", ["0", "104", "many"])
def test_bad_count(hub, argument):
    done = fetch(hub, argument)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode != 0 and "1 to 103" in line and not hub.gets


def test_disk_too_small(hub):
    script = hub.folder.parent / SCRIPT.name
    size = shutil.disk_usage(script).free
    script.write_text(script.read_text().replace("5000 * 2", str(size)))
    done = fetch(hub, "1")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1 and "GB free" in line and not hub.gets


NAME = "fineweb_train_000001.bin"


def waits(hub):
    """The waits that the script asked for, in seconds."""
    path = hub.folder.parent.parent / "waits"
    return [float(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_what_comes_damaged_is_fetched_again_once(hub):
    hub.damages = {NAME: 1}
    done = fetch(hub, "1")
    assert done.returncode == 0 and f"{NAME} came damaged" in done.stderr and same(hub, NAME)
    (hub.folder / NAME).unlink()
    hub.damages = {NAME: 2}
    failed(fetch(hub, "1"), f"{NAME} could not be fetched")
    assert hub.gets.count((NAME, 0)) == 4
    assert [path.name for path in hub.folder.glob("fineweb_*")] == ["fineweb_val_000000.bin"]


def test_verify(hub):
    """A whole shard with a wrong bit is found by --verify; without it no request is made."""
    assert fetch(hub, "1").returncode == 0
    (hub.folder / NAME).write_bytes(flipped(hub.files[NAME]))
    hub.asked = []
    assert fetch(hub, "1").returncode == 0 and not hub.asked
    hub.gets = []
    done = fetch(hub, "1", "--verify")
    assert done.returncode == 0 and f"{NAME} is damaged" in done.stderr and "1 of them new" in done.stdout
    assert hub.gets == [(NAME, 0)] and same(hub, NAME)
    done = fetch(hub, "1", "--verify")
    assert done.returncode == 0 and not done.stderr and len(hub.gets) == 1


@pytest.mark.parametrize("size", [4000, None, 50_000])
def test_a_damaged_partial_is_not_completed(hub, size):
    """Part of a shard with a wrong bit, all of it, and a file longer than the shard."""
    data = flipped(hub.files[NAME])
    hub.folder.mkdir()
    (hub.folder / NAME).with_suffix(".partial").write_bytes((data + bytes(50_000))[: size or len(data)])
    assert fetch(hub, "1").returncode == 0 and same(hub, NAME)
    assert not list(hub.folder.glob("*.partial"))


def test_a_file_without_sha256_is_refused(hub, monkeypatch):
    monkeypatch.setattr(Hub, "etag", staticmethod(lambda data: "0" * 40))
    failed(fetch(hub, "1"), "names no SHA-256")


def started(hub, *arguments):
    """A fetch under way."""
    command, environment = fetching(hub, *arguments)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def until(condition):
    """Wait for a condition, a minute at most."""
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_fetch_waits_for_the_first(hub, killed):
    """Also for one that is killed: its lock goes with it, and its part is gone on with."""
    hub.held = [NAME]
    first = started(hub, "1")
    until(lambda: ("GET", NAME) in hub.asked)
    second = started(hub, "1")
    assert "another fetch" in second.stderr.readline()
    if killed:
        first.kill()
    hub.release.set()
    assert second.wait(60) == 0 and first.wait(60) == (-signal.SIGKILL if killed else 0)
    assert same(hub, NAME) and ("0 of them new" in second.stdout.read()) == (not killed)


def test_ctrl_c(hub):
    hub.held = [NAME]
    child = started(hub, "1")
    until(lambda: ("GET", NAME) in hub.asked)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130
    assert errors.splitlines()[-1].endswith("stopped; the same command goes on from here")
    assert "Traceback" not in errors


TOO_MANY = (429, ("Retry-After", "3"))


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_passing_trouble(hub, method):
    """A server error, too many requests and a reset connection: each is tried again, after a wait."""
    hub.trouble = {(method, NAME): [(500,), TOO_MANY, (0,), (503,)]}
    assert fetch(hub, "1").returncode == 0 and same(hub, NAME)
    assert hub.asked.count((method, NAME)) == 5 and len(waits(hub)) == 4
    assert max(waits(hub)) >= 3  # as the server asks


@pytest.mark.parametrize(
    "method, trouble, tries",
    [("HEAD", (500,), 6), ("HEAD", TOO_MANY, 6), ("GET", (500,), 4), ("GET", TOO_MANY, 6), ("GET", (0,), 4)],
)
def test_lasting_trouble(hub, method, trouble, tries):
    """A few tries, with growing waits, then one line."""
    hub.trouble = {(method, NAME): [trouble] * 30}
    failed(fetch(hub, "1"), f"{NAME} could not be fetched")
    assert hub.asked.count((method, NAME)) == tries and sorted(waits(hub)) == waits(hub)


def test_a_refusal_is_not_tried_again(hub):
    hub.trouble = {("GET", NAME): [(403,)] * 30}
    failed(fetch(hub, "1"), f"{NAME} could not be fetched")
    assert hub.asked.count(("GET", NAME)) == 1 and not waits(hub)


def full_disk(folder):
    folder.mkdir()
    (folder / NAME).with_suffix(".partial").symlink_to("/dev/full")


@pytest.mark.parametrize(
    "damage, says",
    [
        (full_disk, "No space left on device"),
        (lambda folder: folder.touch(), "must be a folder"),
        (lambda folder: folder.symlink_to("/sys"), "can be written"),  # nobody writes there, root included
    ],
)
def test_folder_that_cannot_be_written(hub, damage, says):
    damage(hub.folder)
    failed(fetch(hub, "1"), says)


def test_help_writes_nothing(hub):
    done = fetch(hub, "--help")
    assert done.returncode == 0 and "--verify" in done.stdout and not hub.folder.exists()
