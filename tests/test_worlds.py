"""Any number of processes and nodes, ranks that no test machine has, and what befalls a run from outside."""

import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from shards import documents, tiny_flags, write_shard
from starts import ENVIRONMENT, forked, ranks_of
from test_data import thirds, varied
from test_main import SCRIPT, TORCHRUN, changed, run, shaped, val_losses
from torch.testing._internal.distributed.fake_pg import FakeStore

import train_gpt
from train_gpt import (
    GPT,
    Log,
    StepInputs,
    Trainer,
    TrainLoader,
    UsageError,
    World,
    parse_settings,
    step_inputs,
)


def near(a, b):
    return len(a) == len(b) > 10 and max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1e-3


def test_one_to_four_processes_and_two_nodes(tmp_path):
    """12 micro-batches, which 2 to 4 ranks share out; matrices, which 3 do not divide; two agents."""
    flags = [
        *tiny_flags(tmp_path),
        "--num_scheduled_iterations=8",
        "--val_loss_every=1",
        "--train_batch_size=768",
        "--micro_batches=12",
        "--val_batch_size=768",
    ]
    alone = val_losses(run(flags).stdout)
    for ranks in (3, 4):  # two come as two nodes
        done = run(flags, ranks)
        assert near(alone, val_losses(done.stdout)), (ranks, done.stderr)
    # Only rank 0 writes a log, with all ranks' calibration.
    logs = [path.read_text() for path in sorted((tmp_path / "logs").iterdir())]
    assert [
        re.findall(r"^calibration rank (\d): .*copy=\S+ (?:all_reduce=)?", text, re.M) for text in logs
    ] == [list("0123")[:n] for n in (1, 3, 4)]
    assert [text.count(" all_reduce=") - logs[0].count(" all_reduce=") for text in logs] == [0, 3, 4]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=test",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, str(SCRIPT), *flags]
    nodes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(2)
    ]
    shown = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], shown
    assert near(alone, max((val_losses(out) for out, _ in shown), key=len))


GRAPH = """
import sys
import torch
import train_gpt

class Graph:
    def __init__(self, trainer, batch, part, choices):
        self.trainer, self.batch, self.part, self.choices = trainer, batch, part, choices

    def replay(self):
        assert [x for x in self.trainer.inputs if type(x) is bool] == list(self.choices)
        stale = [bank.stale for bank in self.trainer.banks]
        self.trainer.micro_step(self.batch, self.part)
        for bank, before in zip(self.trainer.banks, stale):  # a graph sets nothing in Python
            bank.stale = before
        replayed.append((len(self.batch.inputs), *self.choices))

plain = train_gpt.Trainer.warm_up
replayed = []

def warm_up(self, train, val):
    plain(self, train, val)
    for step in range(self.s.total_steps):
        variant = train_gpt.step_variant(step, self.s)
        for part in self.parts(step):
            batch = train_gpt.Batch(*torch.zeros(4, variant.shape.micro_batch_tokens, dtype=torch.int32))
            graph = Graph(self, batch, part, variant.choices)
            self.recordings[variant, part] = train_gpt.Recording(graph, batch)

train_gpt.Trainer.warm_up = warm_up
code = train_gpt.main()
sys.stdout.write(f"replayed {replayed}\\n")  # at once: two ranks share a pipe
sys.exit(code)
"""


A_CHOICE = """


class StepInputs(NamedTuple):
    short_window: int
    long_window: int
    narrow: bool


def step_inputs(step, s):
    return StepInputs(*attention_windows(step, s), narrow=step % 5 == 3)


class Changed(GPT):
    def trunk(self, batch, inputs):
        if inputs.narrow:
            inputs = inputs._replace(long_window=inputs.short_window)
        return super().trunk(batch, inputs)


GPT = Changed
"""


def test_training_from_a_graph(tmp_path):
    """Stand-ins for CUDA graphs, one a variant, have their own batches and no hooks: losses are the same."""
    script, changed_script = tmp_path / "graph.py", changed(tmp_path, shaped(varied) + A_CHOICE)
    script.write_text(GRAPH)
    # A validation would wait for the gathers: a few steps lie between two.
    flags = [*tiny_flags(tmp_path), "--val_loss_every=5", "--micro_batches=4"]
    alone = val_losses(run(flags, script=changed_script).stdout)
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    for ranks in (1, 2):
        done = forked([script, *flags], ranks_of(ranks), environment)
        assert done.returncode == 0, done.stderr
        s, replays = parse_settings(flags), []
        for step in range(s.total_steps):
            shape = varied(step, s)
            replays += [(shape.micro_batch_tokens, step % 5 == 3)] * (shape.micro_batches // ranks)
        assert done.stdout.count(f"replayed {replays}") == ranks
        losses = val_losses(done.stdout)
        assert len(losses) == 5
        assert losses == alone if ranks == 1 else losses == pytest.approx(alone, abs=1e-3)


def test_step_shapes(tmp_path):
    """Steps of several shapes train in two processes as in one, without warm-up, and from a checkpoint."""
    flags = [*tiny_flags(tmp_path), "--val_loss_every=1"]
    script = changed(tmp_path, shaped(thirds))
    whole = run([*flags, "--save_every=13"], script=script)
    alone = val_losses(whole.stdout)
    assert len(alone) == 21, whole.stderr
    together = run(flags, 2, script)
    assert near(alone, val_losses(together.stdout)), together.stderr
    resumed = run([*flags, "--resume=latest", "--warmup_steps=0"], 2, script)
    assert "resumed: step 13 of" in resumed.stdout, resumed.stderr
    assert val_losses(resumed.stdout) == pytest.approx(alone[13:], abs=1e-3)


@pytest.fixture
def fake_rank():
    """Rank 0 of two under a fake process group, whose collectives move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield World(0, 2)
    dist.destroy_process_group()


def test_begin_step_waits_where_the_shape_changes(tmp_path, monkeypatch, fake_rank):
    """There a schedule may change parameters; elsewhere they are still on their way when a step begins."""
    monkeypatch.setattr(train_gpt, "step_shape", thirds)
    s = parse_settings(tiny_flags(tmp_path))
    trainer, loader, whole = Trainer(s, fake_rank), TrainLoader(s, fake_rank), {}
    plain = train_gpt.begin_step

    def begin_step(model, step, settings):
        whole[step] = not any(bank.gathers or bank.stale for bank in trainer.banks)
        plain(model, step, settings)

    monkeypatch.setattr(train_gpt, "begin_step", begin_step)
    for step, batches in enumerate(loader.stream(0, s.total_steps)):
        trainer.begin_step(step)
        trainer.train_step(step, batches, step_inputs(step, s))
    assert [step for step in whole if whole[step]] == [0, 7, 14]


def test_parameters_are_waited_for_where_they_are_read(tmp_path, fake_rank):
    """A module waits for its own and its lists' parameters, and for no other bank's."""
    s = parse_settings(tiny_flags(tmp_path))
    trainer, loader = Trainer(s, fake_rank), TrainLoader(s, fake_rank)
    for step, batches in enumerate(loader.stream(0, 2)):
        trainer.train_step(step, batches, step_inputs(step, s))
    assert all(bank.stale for bank in trainer.banks)
    trainer.gather(trainer.banks)
    read = []

    def missing(parameter):
        return any(parameter in parameter.bank.members[chunk] for chunk in parameter.bank.gathers)

    assert all(missing(p) for p in trainer.model.parameters())

    def look(module, _):
        mine = list(module.parameters(recurse=False))
        for child in module.children():
            mine += child.parameters(recurse=False) if type(child) is torch.nn.ParameterList else []
        assert not any(missing(p) for p in mine)
        read.extend(mine)
        head = trainer.model.lm_head.weight
        assert missing(head) == (module is not trainer.model.lm_head)

    for module in trainer.model.modules():
        module.register_forward_pre_hook(look)  # called after the trainer's
    with torch.no_grad():
        trainer.model(batches[0], step_inputs(2, s))
    layers = zip(trainer.model.layers, trainer.model.blocks, strict=True)
    idle = [p for layer, block in layers if not (layer.attention or layer.mlp) for p in block.parameters()]
    assert {*map(id, read), *map(id, idle)} == {*map(id, trainer.model.parameters())}


SHARED = """
import sys
import train_gpt

train_gpt.World.shared = True
sys.exit(train_gpt.main())
"""


def test_a_group_of_one(tmp_path):
    """One process that sends all to itself, and goes on from a checkpoint: losses are the same to the bit."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    flags = [*tiny_flags(tmp_path), "--val_loss_every=4", "--save_every=3"]
    alone = val_losses(run(flags).stdout)
    odd, _ = sorted((tmp_path / "logs").glob("*.pt"))  # 15 of 20 steps, with gradients for Adam
    environment = ENVIRONMENT | {"PYTHONPATH": str(SCRIPT.parent)}
    done = forked([script, *flags, f"--resume={odd}"], ranks_of(1), environment)
    found = val_losses(done.stdout)
    assert done.returncode == 0 and len(found) == 2 and found == alone[-2:], (alone, done.stdout, done.stderr)


def watch_reductions(monkeypatch, banks):
    """What banks send, as (bank, chunk, a copy), in their order."""
    sent = []

    def reduce_scatter(out, given, async_op):
        (found,) = (
            (b, i) for b in banks for i in range(b.chunks) if b.sent[i].data_ptr() == given.data_ptr()
        )
        sent.append((*found, given.clone()))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(train_gpt, "reduce_scatter", reduce_scatter)
    return sent


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_travel_once_they_are_whole(tmp_path, monkeypatch, fake_rank, fused):
    """From the second pass on before the backward pass ends; and what is sent lacks nothing.

    Whether fused versions add gradients in place or autograd does; two tables get some from both.
    """
    for operator in train_gpt.Operator.every:
        monkeypatch.setattr(operator, "run", operator.run)
    if fused:
        train_gpt.run_operators_on_gpu()
        monkeypatch.setattr(train_gpt, "compiled", lambda function: function)
    empty = ",".join(f"{i}.attention=0,{i}.mlp=0" for i in (2, 3, 5, 6, 8, 9, 10))
    flags = ["--model_dim=64", "--train_batch_size=64", f"--layers={empty}"]
    s = parse_settings([*tiny_flags(tmp_path), *flags])
    trainer = Trainer(s, fake_rank)
    model, banks = trainer.model, trainer.banks
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    (batch, *_), inputs = next(iter(TrainLoader(s, fake_rank).stream(0, 1))), step_inputs(0, s)
    sent = watch_reductions(monkeypatch, banks)
    for number in range(2):
        sent.clear()
        for bank in banks:
            bank.require_grad_sync()
        loss = model(batch, inputs).sum() + (model.value_embeds[0].weight.float() * model.embed.float()).sum()
        loss.backward()
        early = len(sent)
        for bank in banks:
            bank.finish_grad_sync()
        for bank, chunk, copy in sent:
            assert copy.any() and torch.equal(copy, bank.sent[chunk].view(-1))
        assert len(sent) == sum(bank.chunks for bank in banks) and bool(early) == bool(number)
        for bank in banks:
            bank.wait_for_grads()
            bank.publish()
    # One vector holds what layers without paths would train by: they get no gradient.
    assert {bank.names[0] for bank, *_ in sent[early:]} == {"blocks.11.lambdas"}


def test_gradients_travel_in_the_parameters_dtype(monkeypatch, fake_rank):
    """Those of a bf16 table are summed in float32 and sent in bf16."""
    p = torch.nn.Parameter(torch.ones(6, dtype=torch.bfloat16))
    bank = train_gpt.Bank({"table": p}, 3, fake_rank, torch.bfloat16, torch.float32)
    sent = watch_reductions(monkeypatch, [bank])
    p.grad.copy_(torch.arange(6.0) + 1e-4)
    bank.require_grad_sync()
    bank.finish_grad_sync()
    ((_, _, copy),) = sent
    assert p.grad.dtype == torch.float32 and bank.grad_shard.dtype == copy.dtype == torch.bfloat16
    assert torch.equal(copy, p.grad.bfloat16())


def test_a_gradient_that_comes_late_is_sent_again(monkeypatch, fake_rank):
    """From autograd, for a parameter that only fused versions had read before, when its chunk has gone."""
    p = torch.nn.Parameter(torch.ones(6))
    bank = train_gpt.Bank({"late": p}, 3, fake_rank, torch.float32, torch.float32)
    sent = watch_reductions(monkeypatch, [bank])
    for late in (False, True, True):
        bank.require_grad_sync()
        read = p.detach().requires_grad_() * 2
        bank.expect_grad(p, read.grad_fn)
        read.sum().backward()
        p.grad.fill_(1)  # as a fused version does
        if late:
            p.sum().backward()
        bank.finish_grad_sync()
        bank.wait_for_grads()
        bank.publish()
    assert [copy.unique().tolist() for *_, copy in sent] == [[1], [0], [2], [2]]


@pytest.mark.parametrize("size", [2, 8, 16, 64])
def test_ranks_that_no_test_machine_has(tmp_path, size):
    """Under a fake process group: each parameter has one owner, and the bytes on the wire are as counted."""
    flags = [*tiny_flags(tmp_path), "--train_batch_size=2048", "--micro_batches=64", "--val_batch_size=2048"]
    s = parse_settings(flags)
    wanted = dict(GPT(s, train_gpt.longest_sequence(s)).named_parameters())
    wire, owners = {"scattered": 0, "gathered": 0}, {}
    calls = {"scattered": train_gpt.reduce_scatter, "gathered": train_gpt.all_gather}

    def count(kind):
        def call(out, given, async_op=False):
            wire[kind] += max(out.nbytes, given.nbytes)
            return calls[kind](out, given, async_op=async_op)

        return call

    def size_of(banks):
        return sum(bank.param.numel() for bank in banks)

    for rank in sorted({0, 1, size - 1}):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        trainer = Trainer(s, World(rank, size))
        assert sorted(name for bank in trainer.banks for name in bank.names) == sorted(wanted)
        for bank in trainer.banks:
            assert bank.param.shape == (bank.chunks, size, bank.unit)
            assert bank.master.shape == (bank.chunks, bank.unit)
            assert all(len(moment) == bank.chunks for moment in bank.moments)
            padding = bank.param.numel() - bank.numel
            assert 0 <= padding < bank.unit * size and not bank.param.flatten()[bank.numel :].any()
            assert all(
                trainer.model.get_parameter(name) is p
                for name, p in zip(bank.names, bank.parameters, strict=True)
            )
            flat = torch.cat([wanted[name].detach().flatten() for name in bank.names])
            owned = torch.cat([flat, flat.new_zeros(padding)]).view(bank.chunks, size, -1)[:, rank]
            assert torch.equal(bank.master, owned)
            owners[rank] = owners.get(rank, 0) + bank.master.numel()
        for bank, runs in zip(trainer.normuon.banks, trainer.normuon.runs, strict=True):
            assert sum(len(run.w) for run in runs) == len(bank.parameters[rank::size]) <= bank.chunks
        if rank == 0:
            train_gpt.reduce_scatter, train_gpt.all_gather = count("scattered"), count("gathered")
            try:
                for step, batches in enumerate(TrainLoader(s, World(rank, size)).stream(0, 2)):
                    assert len(batches) == 64 // size
                    trainer.train_step(step, batches, StepInputs(128, 384))
            finally:
                train_gpt.reduce_scatter, train_gpt.all_gather = calls.values()
            # Float32 on a CPU: NorMuon's banks in both steps, Adam's in the second.
            expected = 4 * (2 * size_of(trainer.normuon.banks) + size_of(trainer.adam.banks))
            assert wire["scattered"] == wire["gathered"] == expected
        dist.destroy_process_group()
    assert len(set(owners.values())) == 1


def start(flags, ranks, step=8):
    """A torchrun of the script, read up to a step; and its workers."""
    child = subprocess.Popen(
        [*TORCHRUN, f"--nproc_per_node={ranks}", str(SCRIPT), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    for line in child.stdout:
        if line.startswith(f"step:{step}/"):
            break
    table = subprocess.run(
        ["ps", "-eo", "ppid=,pid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    workers = [
        int(line.split()[1]) for line in table if int(line.split()[0]) == child.pid and str(SCRIPT) in line
    ]
    assert len(workers) == ranks
    return child, workers


def running(pid):
    """Whether a process is there and no zombie."""
    found = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()
    return bool(found) and not found.startswith("Z")


def test_rank_killed(tmp_path):
    """In the middle of a step: everyone is gone within a minute, the log is whole, the next run goes on."""
    flags = [
        *tiny_flags(tmp_path),
        "--model_dim=64",
        "--val_loss_every=20",
        "--num_scheduled_iterations=38",
        "--save_every=5",
    ]
    child, workers = start(flags, 2, step=18)  # the first checkpoint has had time to be written
    os.kill(workers[-1], signal.SIGKILL)
    began = time.time()
    _, errors = child.communicate(timeout=60)
    assert child.returncode != 0 and time.time() - began < 60 and not any(map(running, workers))
    text = only_log_text(tmp_path)
    assert "step:18/40 train_time" in text and text.endswith("\n")
    done = run([*flags, "--resume=latest"])
    assert (
        re.search(r"^resumed: step (5|10|15|20|25|30|35) of ", done.stdout, re.M)
        and "step:40/40 val_loss" in done.stdout
    ), done.stderr


@pytest.mark.parametrize("median, patience", [(0.02, 60.0), (3.0, 300.0)])
def test_a_device_that_hangs_is_noticed(tmp_path, monkeypatch, median, patience):
    """A step that takes a minute and 100 times the median ends the run; a shorter one is waited for."""
    now, ends = [0.0], [math.inf]
    monkeypatch.setattr(train_gpt.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train_gpt.time, "sleep", lambda _: now.__setitem__(0, now[0] + 1))
    with Log(parse_settings(tiny_flags(tmp_path)), World()) as log:
        timer = train_gpt.Timer(log, 40, World(), 0.0)
        timer.gpu = True
        timer.durations.extend([1000 * median] * 5 + [1e9])
        mark = SimpleNamespace(query=lambda: now[0] >= ends[0])
        timer.pending.append((7, None, mark))
        with pytest.raises(TimeoutError, match=f"step 7 does not end.* {median:g} s.*--resume=latest"):
            timer._wait(mark)
        assert patience < now[0] < patience + 3
        now[0], ends[0] = 0.0, patience - 3
        timer._wait(mark)
        assert now[0] == pytest.approx(ends[0], abs=1)


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


@pytest.mark.parametrize(
    "change, says",
    [
        ("delete", "cannot be read"),
        ("cut", "where its header says"),
        ("replace", "changed since the run began"),
    ],
)
def test_shard_lost_between_start_and_use(tmp_path, change, says):
    flags = [*tiny_flags(tmp_path), "--num_scheduled_iterations=78"]
    s, world = parse_settings(flags), World()
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
        for step in range(80):
            loader.host_batches(step)
    assert str(path) in str(error.value)


def test_shard_lost_ends_in_one_line(tmp_path):
    """With two processes too: what the loader's thread met ends the run, and is said once."""
    flags = [
        *tiny_flags(tmp_path),
        "--num_scheduled_iterations=58",
        "--train_batch_size=512",  # the last shard begins after the time that losing it takes
        "--micro_batches=8",
        "--model_dim=64",
        "--save_every=5",
        "--val_loss_every=0",
    ]
    for ranks in (1, 2):
        write_shard(tmp_path / "train_2.bin", documents(600, 60, seed=2))
        command = [sys.executable] if ranks == 1 else [*TORCHRUN, "--nproc_per_node=2"]
        program = [*command, str(SCRIPT), *flags]
        child = subprocess.Popen(
            program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
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
        return rng.choice(
            [-1, 0, 1, 2, 3, 4, 6, 8, 12, 16, 31, 64, 257, 512, 768, 1000, 2**32, 2**64, 10**400]
        )
    if kind is float:
        return rng.choice([-1, 0, 1e-3, 0.03, 0.5, 0.9, 1, 2, 75, 1e30, 1e300, "nan", "inf", "x"])
    return rng.choice(
        [
            "",
            "0",
            "4-7",
            "3-8,1-2",
            "7-4",
            "5.mlp=0",
            "0.attention=2,3.window=long",
            "9.value=15",
            "x.y=z",
            "1/3",
            "1/3,5/6",
            "0/1",
            "6/0",
            "a/b",
            "2:4",
            "4:2",
            "latest",
            "sample",
            "record",
            "nothing",
        ]
    )


def test_random_settings(tmp_path, monkeypatch):
    """Each trains, or is refused in one line; nothing else is raised."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt, "calibrate", lambda s, world: "")
    base = [
        *tiny_flags(tmp_path),
        "--num_scheduled_iterations=2",
        "--num_extension_iterations=0",
        "--warmup_steps=0",
        "--val_loss_every=0",
        "--micro_batches=2",
    ]
    fields = [
        f
        for f in train_gpt.dataclasses.fields(train_gpt.Hyperparameters)
        if f.name not in ("log_dir", "profile")
    ]
    trained, refused, refusals = 0, 0, set()
    rng = random.Random(1)
    while trained + refused < 500:
        changes = [f"--{f.name}={draw(f.type, rng)}" for f in rng.sample(fields, rng.randint(1, 3))]
        try:
            s = parse_settings([*base, *changes])
            if s.total_steps > 8 or s.model_dim > 64:  # legal, but too long for a test
                continue
            train_gpt.run(s, World())
            trained += 1
        except UsageError as error:
            assert "\n" not in str(error) and len(str(error)) > 20
            refused += 1
            refusals.add(re.sub(r"[\d.]+", "#", str(error))[:40])
        except Exception as error:
            raise AssertionError(f"{changes}: {error!r}") from error
    print(f"{trained} trained, {refused} refused in {len(refusals)} ways")
    assert trained > 50 and len(refusals) > 40
