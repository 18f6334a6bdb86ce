"""Any number of processes and nodes, ranks that no test machine has, and what can happen to a run from outside."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from shards import documents, tiny_flags, write_shard
from test_main import ENVIRONMENT, SCRIPT, TORCHRUN, run, val_losses
from torch.testing._internal.distributed.fake_pg import FakeStore

import train_gpt
from train_gpt import GPT, TrainLoader, Trainer, UsageError, World, parse_settings


def near(a, b):
    return len(a) == len(b) == 21 and max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1e-3


def test_one_to_four_processes_and_two_nodes(tmp_path):
    """12 micro-batches, which 2, 3 and 4 ranks share out; 32 hidden matrices, which 3 do not divide; two agents on loopback."""
    flags = [*tiny_flags(tmp_path), "--val_loss_every=1", "--train_batch_size=768", "--micro_batches=12", "--val_batch_size=768"]
    alone = val_losses(run(flags).stdout)
    for ranks in (2, 3, 4):
        done = run(flags, ranks)
        assert near(alone, val_losses(done.stdout)), (ranks, done.stderr)
    logs = [path.read_text() for path in sorted((tmp_path / "logs").iterdir())]  # only rank 0 writes one, with all ranks' calibration
    assert [re.findall(r"^calibration rank (\d): .*copy=\S+ (?:all_reduce=)?", text, re.M) for text in logs] == [list("0123")[:n] for n in (1, 2, 3, 4)]
    assert [text.count(" all_reduce=") - logs[0].count(" all_reduce=") for text in logs] == [0, 2, 3, 4]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, str(SCRIPT), *flags]
    nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) for _ in range(2)]
    shown = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], shown
    assert near(alone, max((val_losses(out) for out, _ in shown), key=len))


GRAPH = """
import sys
import train_gpt

class Graph:
    def __init__(self, trainer):
        self.trainer = trainer

    def replay(self):
        stacks, fetch = self.trainer.stacks, self.trainer.model.fetch
        assert not any(stack.gathers for stack in stacks)  # a graph waits for nothing
        armed = [stack.armed for stack in stacks]
        for stack in stacks:
            stack.armed = False
        self.trainer.model.fetch = lambda parameters: None
        self.trainer.micro_step(self.trainer.batch)
        self.trainer.model.fetch = fetch
        for stack, before in zip(stacks, armed):
            stack.armed = before

plain = train_gpt.Trainer.warm_up

def warm_up(self, train, val):
    plain(self, train, val)
    self.graph = Graph(self)

train_gpt.Trainer.warm_up = warm_up
sys.exit(train_gpt.main())
"""


def test_training_from_a_graph(tmp_path):
    """With a stand-in for the CUDA graph, which reads its own batch and windows and runs no hooks, losses are those without."""
    script = tmp_path / "graph.py"
    script.write_text(GRAPH)
    flags = [*tiny_flags(tmp_path), "--val_loss_every=5", "--micro_batches=4"]  # a validation would wait for the gathers
    alone = val_losses(run(flags).stdout)
    environment = ENVIRONMENT | {"PYTHONPATH": str(SCRIPT.parent)}
    for ranks in (1, 2):
        done = subprocess.run([*TORCHRUN, f"--nproc_per_node={ranks}", str(script), *flags], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        losses = val_losses(done.stdout)
        assert len(losses) == 5 and (losses == alone if ranks == 1 else losses == pytest.approx(alone, abs=1e-3))


@pytest.mark.parametrize("size", [2, 8, 16, 64])
def test_ranks_that_no_test_machine_has(tmp_path, size):
    """Under a fake process group: every parameter has one owner, nothing is dropped, and the bytes on the wire are as counted."""
    flags = [*tiny_flags(tmp_path), "--train_batch_size=2048", "--micro_batches=64", "--val_batch_size=2048"]
    s = parse_settings(flags)
    wanted = {name: p.detach().clone() for name, p in GPT(s, World()).named_parameters()}
    wire, owners = {"scattered": 0, "gathered": 0}, {}
    for rank in sorted({0, 1, size - 1}):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        trainer = Trainer(s, World(rank, size))
        for stack, moments in trainer.owned:
            assert stack.work.shape == (stack.chunks, size, stack.unit) and stack.own.shape == (stack.chunks, stack.unit)
            assert all(len(moment) == stack.chunks for moment in moments)
            padding = stack.work.numel() - stack.numel
            assert 0 <= padding < stack.unit * size and not stack.work.flatten()[stack.numel :].any()
            flat = torch.cat([wanted[name].flatten() for p in stack.parameters for name, q in trainer.model.named_parameters() if q is p])
            owned = torch.cat([flat, flat.new_zeros(padding)]).view(stack.chunks, size, -1)[:, rank]
            assert torch.equal(stack.own, owned)
            owners[rank] = owners.get(rank, 0) + stack.own.numel()
        assert sum(len(part[0]) for part in trainer.normuon.parts[0]) <= trainer.normuon.stacks[0].chunks
        if rank == 0:
            calls = {"scattered": train_gpt.reduce_scatter, "gathered": train_gpt.all_gather}

            def count(kind):
                def call(out, given, async_op=False):
                    wire[kind] += max(out.nbytes, given.nbytes)
                    return calls[kind](out, given, async_op=async_op)

                return call

            train_gpt.reduce_scatter, train_gpt.all_gather = count("scattered"), count("gathered")
            try:
                for step, batches in enumerate(TrainLoader(s, World(rank, size)).stream(0, 2)):
                    assert len(batches) == 64 // size
                    trainer.train_step(step, batches, (128, 384))
            finally:
                train_gpt.reduce_scatter, train_gpt.all_gather = calls.values()
            whole = lambda stacks: sum(stack.work.numel() for stack in stacks)  # noqa: E731
            assert wire["scattered"] == wire["gathered"] == 4 * (2 * whole(trainer.normuon.stacks) + whole(trainer.adam.stacks))
        dist.destroy_process_group()
    assert len(set(owners.values())) == 1


def start(flags, ranks, step=8):
    """A torchrun of the script, read up to a step; and its workers."""
    child = subprocess.Popen([*TORCHRUN, f"--nproc_per_node={ranks}", str(SCRIPT), *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env=ENVIRONMENT)  # fmt: skip
    for line in child.stdout:
        if line.startswith(f"step:{step}/"):
            break
    table = subprocess.run(["ps", "-eo", "ppid=,pid=,args="], capture_output=True, text=True, check=True).stdout.splitlines()
    workers = [int(line.split()[1]) for line in table if int(line.split()[0]) == child.pid and str(SCRIPT) in line]
    assert len(workers) == ranks
    return child, workers


def running(pid):
    """Whether a process is there and no zombie."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(found) and not found.startswith("Z")


def test_rank_killed(tmp_path):
    """In the middle of a step: everyone is gone within a minute, the log is whole, and the next run goes on."""
    flags = [*tiny_flags(tmp_path), "--model_dim=64", "--val_loss_every=20", "--num_scheduled_iterations=38", "--save_every=5"]
    child, workers = start(flags, 2, step=18)  # the first checkpoint has had time to be written
    os.kill(workers[-1], signal.SIGKILL)
    began = time.time()
    _, errors = child.communicate(timeout=60)
    assert child.returncode != 0 and time.time() - began < 60 and not any(map(running, workers))
    text = only_log_text(tmp_path)
    assert "step:18/40 train_time" in text and text.endswith("\n")
    done = run([*flags, "--resume=latest"])
    assert re.search(r"^resumed: step (5|10|15|20|25|30|35) of ", done.stdout, re.M) and "step:40/40 val_loss" in done.stdout, done.stderr


def only_log_text(folder):
    (path,) = (folder / "logs").glob("*.txt")
    return path.read_text()


def test_straggler(tmp_path):
    """A rank that stands still for a while only delays the others."""
    flags = [*tiny_flags(tmp_path), "--val_loss_every=1"]
    child, workers = start(flags, 2)
    os.kill(workers[1], signal.SIGSTOP)
    time.sleep(3)
    os.kill(workers[1], signal.SIGCONT)
    child.communicate(timeout=60)
    assert child.returncode == 0
    assert near(val_losses(only_log_text(tmp_path)), val_losses(run(flags).stdout))


@pytest.mark.parametrize("change, says", [("delete", "cannot be read"), ("cut", "where its header says"), ("replace", "changed since the run began")])
def test_shard_lost_between_start_and_use(tmp_path, change, says):
    s, world = parse_settings([*tiny_flags(tmp_path), "--num_scheduled_iterations=38"]), World()
    loader = TrainLoader(s, world)
    loader.check()
    path = tmp_path / "train_1.bin"
    if change == "delete":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        write_shard(path, documents(900, 60, seed=77))  # longer, with its documents elsewhere
    with pytest.raises(UsageError, match=says) as error:
        for step in range(40):
            loader.host_batches(step)
    assert str(path) in str(error.value)


def test_shard_lost_ends_in_one_line(tmp_path):
    """With two processes too: what the loader's thread met ends the run, and is said once."""
    flags = [*tiny_flags(tmp_path), "--num_scheduled_iterations=58", "--model_dim=64", "--save_every=5", "--val_loss_every=0"]
    for ranks in (1, 2):
        write_shard(tmp_path / "train_2.bin", documents(600, 60, seed=2))
        command = [sys.executable] if ranks == 1 else [*TORCHRUN, "--nproc_per_node=2"]
        program = [*command, str(SCRIPT), *flags]
        child = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for line in child.stdout:
            if line.startswith("start:"):
                break
        os.truncate(tmp_path / "train_2.bin", 3000)  # it is read again when the second one begins
        _, errors = child.communicate(timeout=60)
        said = [line for line in errors.splitlines() if line.startswith("train_gpt.py: ")]
        assert child.returncode != 0 and len(said) == 1 and "train_2.bin" in said[0], errors
        assert "Traceback" not in errors or ranks > 1


def draw(kind, rng):
    """A value of a flag's type, often an odd one."""
    if kind is bool:
        return rng.choice(["true", "false", "maybe"])
    if kind is int:
        return rng.choice([-1, 0, 1, 2, 3, 4, 6, 8, 12, 16, 31, 64, 257, 512, 768, 1000])
    if kind is float:
        return rng.choice([-1, 0, 1e-3, 0.03, 0.5, 0.9, 1, 2, 75, 1e30, "nan", "inf", "x"])
    return rng.choice(["", "0", "4-7", "3-8,1-2", "7-4", "5.mlp=0", "0.attention=2,3.window=long", "9.value=15", "x.y=z", "1/3", "1/3,5/6", "0/1", "6/0", "a/b",
                       "2:4", "4:2", "latest", "sample", "record", "nothing"])  # fmt: skip


def test_five_hundred_random_settings(tmp_path, monkeypatch):
    """Each trains, or is refused in one line; nothing else is raised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "calibrate", lambda s, world: "")
    base = [*tiny_flags(tmp_path), "--num_scheduled_iterations=2", "--num_extension_iterations=0", "--warmup_steps=0", "--val_loss_every=0", "--micro_batches=2"]
    fields = [f for f in train_gpt.dataclasses.fields(train_gpt.Hyperparameters) if f.name not in ("log_dir", "profile")]
    trained, refused, refusals = 0, 0, set()
    handler = signal.getsignal(signal.SIGTERM)
    rng = random.Random(1)
    while trained + refused < 500:
        changes = [f"--{f.name}={draw(f.type, rng)}" for f in rng.sample(fields, rng.randint(1, 3))]
        try:
            s = parse_settings([*base, *changes])
            if s.total_steps > 8 or s.model_dim > 64:  # legal, but too long for a test
                continue
            train_gpt.run(s, train_gpt.connect(s))
            trained += 1
        except UsageError as error:
            assert "\n" not in str(error) and len(str(error)) > 20
            refused += 1
            refusals.add(re.sub(r"[\d.]+", "#", str(error))[:40])
        except Exception as error:
            raise AssertionError(f"{changes}: {error!r}") from error
    signal.signal(signal.SIGTERM, handler)
    print(f"{trained} trained, {refused} refused in {len(refusals)} ways")
    assert trained > 100 and len(refusals) > 50
