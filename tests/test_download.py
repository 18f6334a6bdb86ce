"""The real downloader against a small Hub on loopback, which breaks off, forgets and lies when told to."""

import hashlib
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from shards import write_shard

SCRIPT = Path(__file__).parent.parent / "data" / "cached_fineweb10B.py"


class Hub(BaseHTTPRequestHandler):
    """Serves files as the Hub resolves them: a HEAD with ETag, commit and length, and GETs with ranges."""

    def log_message(self, *_):
        pass

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
        start = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.server.gets.append((name, start))
            self.wfile.write(data[start : self.server.breaks.get(name)])  # and hangs up there
            self.close_connection = True


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
    server.gets = []
    server.breaks = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "data").mkdir()
    # Shards of this size, or the check of the disk would want a gigabyte.
    text = SCRIPT.read_text()
    assert "100_000_000 * 2" in text
    (tmp_path / "data" / SCRIPT.name).write_text(text.replace("100_000_000 * 2", "5000 * 2"))
    server.folder = tmp_path / "data" / "fineweb10B"
    yield server
    server.shutdown()


def fetching(hub, *arguments):
    """The command that fetches shards, and its environment, in which the Hub is that server."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
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
    assert sorted(path.name for path in hub.folder.iterdir()) == names
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
