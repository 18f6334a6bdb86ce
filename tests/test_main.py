"""Whole runs, as users start them: the log, warm-up and rewind, changed scripts, every way to stop early."""

import gzip
import importlib.util
import inspect
import json
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from shards import documents, tiny_flags, write_shard
from starts import ENVIRONMENT, forked, ranks_of
from test_data import thirds, varied

import train_gpt
from train_gpt import Launch, StepInputs, Trainer, TrainLoader, UsageError, ValLoader, World, parse_settings

SCRIPT = Path(train_gpt.__file__)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def run(flags, ranks=1, script=SCRIPT):
    """A whole run, in forked processes: tests whose matter is the start itself start Python or torchrun."""
    return forked([script, *flags], ranks_of(ranks) if ranks > 1 else [{}])


def changed(folder, code):
    """A copy of the script that ends in this code, which replaces what it defines by its name."""
    start = '\n\nif __name__ == "__main__":'
    source, end = SCRIPT.read_text().split(start)
    path = folder / "train_gpt.py"
    path.write_text(f"{source}\n\n{inspect.cleandoc(code)}\n{start}{end}")
    return path


def shaped(shape):
    """Code for `changed`: the steps have the shapes of this function."""
    return f"{inspect.getsource(shape)}\n\nstep_shape = {shape.__name__}"


def loaded(path):
    """A changed script as a module."""
    spec = importlib.util.spec_from_file_location("changed_train_gpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def val_losses(text):
    return [float(x) for x in re.findall(r"val_loss:([\d.]+)", text)]


def only_log(folder):
    (path,) = (folder / "logs").iterdir()
    return path


def test_log(tmp_path):
    """The formats that people's tools read."""
    done = run(tiny_flags(tmp_path))
    assert done.returncode == 0, done.stderr
    path = only_log(tmp_path)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ_[0-9a-f]{8}\.txt", path.name)
    text = path.read_text()
    source, head, body = text.split("\n" + "=" * 100 + "\n")
    assert source.rstrip() == SCRIPT.read_text().rstrip()
    for part in (
        "Python 3.",
        "PyTorch 2.",
        "Triton 3.",
        "1 x CPU process",
        "head: float32",
        "seed=1337",
        "layer 11: window=long value=ve2 attention=1 mlp=1",
    ):
        assert part in head
    assert re.search(
        r"^start: [\d.]+ s from launch to step 0"
        r" \(import [\d.]+, build [\d.]+, warm-up [\d.]+, calibration [0-2]\.\d\)$",
        head,
        re.M,
    )
    assert re.search(
        r"^calibration rank 0: float32_gemm=[\d.]+TFLOP/s copy=[\d.]+GB/s launch=[\d.]+us$", head, re.M
    )
    assert f"\narguments: {shlex.join(tiny_flags(tmp_path))}\n" in head
    steps = [line for line in body.splitlines() if line.startswith("step:")]
    numbers = [int(re.match(r"step:(\d+)/20 ", line)[1]) for line in steps]
    assert numbers == sorted([*range(21), 5, 10, 15, 20])
    val = [line for line in steps if "val_loss" in line]
    assert len(val) == 5 and all(
        re.fullmatch(r"step:\d+/20 val_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms", line)
        for line in val
    )
    train = [line for line in steps if "val_loss" not in line]
    assert len(train) == 20 and all(
        re.fullmatch(r"step:\d+/20 train_time:\d+ms step_avg:\d+\.\d\dms", line) for line in train
    )
    times = [int(re.search(r"train_time:(\d+)ms", line)[1]) for line in steps]
    assert times == sorted(times) and times[-1] > 0
    report = body.splitlines()[-14:]
    assert (
        50 < int(re.fullmatch(r"peak memory allocated: (\d+) MiB reserved: \d+ MiB", report[0])[1]) < 10_000
    )
    assert report[1] == "layer 0: a=1.1000 b=0.0000 l0=0.5000 l1=0.5000" and report[12].startswith(
        "layer 11: a="
    )
    assert val_losses(body)[0] == 5.9506 and val_losses(body)[-1] < 5.9
    assert set(steps) <= set(done.stdout.splitlines())  # in a pipe the console shows the same lines


def test_learns_and_repeats(tmp_path):
    """Two runs are equal to the last digit, and so is a run without warm-up: the rewind is exact."""
    flags = tiny_flags(tmp_path)
    command = [sys.executable, str(SCRIPT), *flags]
    started = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    losses = [val_losses(started.stdout)]
    losses += [
        val_losses(run([*flags, *more]).stdout) for more in ([], ["--warmup_steps=0"], ["--warmup_steps=3"])
    ]
    assert len(losses[0]) == 5 and losses[0] == losses[1] == losses[2] == losses[3]


@pytest.mark.parametrize("shape", [train_gpt.step_shape, thirds, varied])
def test_rewind_is_bitwise(tmp_path, monkeypatch, shape):
    """Parameters, optimizer state, rotary tables and gradients after warm-up are those before it."""
    monkeypatch.setattr(train_gpt, "step_shape", shape)
    s, world = parse_settings([*tiny_flags(tmp_path), "--warmup_steps=3"]), World()
    trainer = Trainer(s, world)
    state = [*trainer.model.state_dict().values()]
    for bank in trainer.banks:
        state += [bank.param, bank.master, bank.grad, *bank.moments]
    before = [t.clone() for t in state]
    seen = []
    train_step = trainer.train_step
    monkeypatch.setattr(
        trainer, "train_step", lambda step, *rest: seen.append(step) or train_step(step, *rest)
    )
    trainer.warm_up(TrainLoader(s, world), ValLoader(s, world))
    assert {shape(step, s) for step in seen} == {shape(step, s) for step in range(s.total_steps)}
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


@pytest.mark.parametrize("steps", [0, 3])
def test_warm_up_leaves_fp8_copies(steps, tmp_path, monkeypatch):
    """Of the parameters as they are then, rewound or not: not every step's graph renews all."""
    monkeypatch.setattr(train_gpt, "in_fp8", lambda device, part: True)
    s, world = parse_settings([*tiny_flags(tmp_path), f"--warmup_steps={steps}"]), World()
    trainer = Trainer(s, world)
    trainer.warm_up(TrainLoader(s, world), ValLoader(s, world))
    with_copies = [p for p in trainer.model.parameters() if hasattr(p, "fp8_copies")]
    assert trainer.model.lm_head.weight in set(with_copies)
    for p in with_copies:
        for name, fresh in train_gpt.fp8_copies(p.detach(), p.bank.fp8_matrices[p]).items():
            assert torch.equal(p.fp8_copies[name].float(), fresh.float()), name


CHECKED = """
    def in_fp8(device, part):
        return True


    def check(module, _):
        lists = [child for child in module.children() if isinstance(child, nn.ParameterList)]
        for p in (p for owner in (module, *lists) for p in owner.parameters(recurse=False)):
            if module.training and p in p.bank.fp8_matrices:
                for name, fresh in fp8_copies(p.detach(), p.bank.fp8_matrices[p]).items():
                    same = torch.equal(p.fp8_copies[name].float(), fresh.float())
                    print(f"copies: {'new' if same else 'old'}", flush=True)


    class Checked(Trainer):
        def __init__(self, s, world):
            super().__init__(s, world)
            for module in self.model.modules():
                module.register_forward_pre_hook(check)


    Trainer = Checked
"""


def test_fp8_copies_are_new_where_they_are_read(tmp_path):
    """By two processes too, which renew those of a parameter when it has come from the other one."""
    script = changed(tmp_path, CHECKED)
    for ranks in (1, 2):
        done = run(tiny_flags(tmp_path), ranks, script)
        assert done.returncode == 0, done.stderr
        seen = Counter(re.findall("copies: (...)", done.stdout))
        assert seen["new"] > 100 and not seen["old"], seen


def test_step_returns_the_mean_loss(tmp_path):
    s, world = train_gpt.parse_settings(tiny_flags(tmp_path)), train_gpt.World()
    trainer, loader = train_gpt.Trainer(s, world), train_gpt.TrainLoader(s, world)
    (batches,) = loader.stream(0, 1)
    loss, stops = trainer.train_step(0, batches, StepInputs(128, 384)).tolist()
    assert loss == pytest.approx(5.950643, abs=1e-5) and stops == 0  # ln 384


def test_steps_return_their_own_loss(tmp_path):
    """Each step's is that of its parameters, batches and windows, and of nothing before."""
    windows = (StepInputs(2, 3), StepInputs(128, 384), StepInputs(3, 2))
    s, world = train_gpt.parse_settings(tiny_flags(tmp_path)), train_gpt.World()
    trainer, loader = train_gpt.Trainer(s, world), train_gpt.TrainLoader(s, world)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in (trainer.model.lm_head.weight, *trainer.model.blocks.parameters()):
            p.add_(0.2 * torch.randn_like(p))
    for step, (batches, inputs) in enumerate(zip(loader.stream(0, 3), windows, strict=True)):
        with torch.no_grad():
            wanted, other = (
                torch.cat([trainer.model(batch, w) for batch in batches]).mean().item()
                for w in (inputs, StepInputs(5, 8))
            )
        assert abs(wanted - other) > 1e-3
        assert trainer.train_step(step, batches, inputs)[0].item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("shape", [thirds, varied])
def test_steps_of_any_shape_return_their_mean_loss(tmp_path, monkeypatch, shape):
    """A new model's is ln 384, whatever a step's tokens."""
    monkeypatch.setattr(train_gpt, "step_shape", shape)
    s, world = parse_settings(tiny_flags(tmp_path)), World()
    trainer, loader = Trainer(s, world), TrainLoader(s, world)
    monkeypatch.setattr(trainer.normuon, "step", lambda *_: None)
    monkeypatch.setattr(trainer.adam, "step", lambda *_: None)
    for step, batches in enumerate(loader.stream(0, s.total_steps)):
        trainer.begin_step(step)
        loss = trainer.train_step(step, batches, train_gpt.step_inputs(step, s))[0].item()
        assert loss == pytest.approx(5.950643, abs=1e-5)


def test_validation_of_any_length(tmp_path):
    """A last micro-batch that is shorter counts by its tokens."""
    flags = [*tiny_flags(tmp_path), "--val_tokens=500", "--val_batch_size=512"]
    flags += ["--micro_batches=6", "--train_batch_size=480"]
    s, world, inputs = parse_settings(flags), World(), StepInputs(128, 384)
    trainer, val = train_gpt.Trainer(s, world), train_gpt.ValLoader(s, world)
    torch.nn.init.normal_(trainer.model.lm_head.weight, std=0.5)
    batches = list(val.stream())
    assert [len(batch.inputs) for batch in batches] == [85, 85, 85, 85, 85, 75]
    wanted = torch.from_numpy(val.data.tokens[1:501].astype("int32"))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), wanted)
    trainer.model.eval()
    with torch.no_grad():
        every = torch.cat([trainer.model(batch, inputs) for batch in batches])
    loss = trainer.validate(iter(batches), inputs)
    assert loss == pytest.approx(every.double().mean().item(), rel=1e-6)
    empty = train_gpt.ValLoader(s, train_gpt.World(rank=6, size=7))
    assert not list(empty.stream())  # a rank may have none


def test_adam_steps_on_odd_steps_and_counts_its_own(tmp_path, monkeypatch):
    s, world = train_gpt.parse_settings(tiny_flags(tmp_path)), train_gpt.World()
    trainer, loader, calls = train_gpt.Trainer(s, world), train_gpt.TrainLoader(s, world), []
    monkeypatch.setattr(trainer.adam, "set_step", lambda scale, t, count: calls.append((step, t, count)))
    for step, batches in enumerate(loader.stream(0, 6)):
        trainer.train_step(step, batches, StepInputs(128, 384))
    assert calls == [(1, 1, s.micro_batches), (3, 2, s.micro_batches), (5, 3, s.micro_batches)]


def test_optimizers_count_the_micro_batches_of_their_steps(tmp_path, monkeypatch):
    """NorMuon those of a step; Adam the mean of its two steps', since it has the gradients of both."""
    monkeypatch.setattr(train_gpt, "step_shape", thirds)
    s, world = parse_settings(tiny_flags(tmp_path)), World()
    trainer, loader, normuon, adam = Trainer(s, world), TrainLoader(s, world), [], []
    monkeypatch.setattr(trainer.normuon, "set_step", lambda lr, momentum, count: normuon.append(count))
    monkeypatch.setattr(trainer.adam, "set_step", lambda scale, t, count: adam.append(count))
    for step, batches in enumerate(loader.stream(0, s.total_steps)):
        trainer.train_step(step, batches, train_gpt.step_inputs(step, s))
    assert normuon == [2] * 7 + [4] * 7 + [6] * 6
    assert adam == [2] * 3 + [3] + [4] * 3 + [6] * 3


def test_profile(tmp_path):
    """A trace beside the log and, in the log, a line; the losses are those of a run without it."""
    flags = [*tiny_flags(tmp_path), "--num_scheduled_iterations=5", "--micro_batches=2"]
    done = run([*flags, "--profile=2:4"])
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "logs").glob("*.txt")
    trace = json.loads(gzip.decompress(log.with_suffix(".trace.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    text = log.read_text()
    (line,) = re.findall(r"^profile:.*", text, re.M)
    trace_file = log.with_suffix(".trace.json.gz")
    assert line == (f"profile: steps 2 to 3, trace {trace_file}; read it with: ./run.sh record profile {log}")
    assert val_losses(text.split("=" * 100)[-1]) == val_losses(run(flags).stdout)


def test_import_runs_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import train_gpt"],
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def refused(done, *says, code=2):
    """It ended in one line on stderr that says so, with nothing lost and no traceback."""
    assert done.returncode == code
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("train_gpt.py: ") and all(part in line for part in says), line


def test_unknown_flag():
    refused(run(["--sed=1"]), "--sed", "did you mean --seed?")


def test_wrong_type():
    refused(run(["--seed=x"]), "--seed", "invalid int value")


def test_no_shards(tmp_path):
    refused(
        run([f"--train_files={tmp_path}/none_*.bin"]),
        "--train_files",
        "matches no file",
        "cached_fineweb10B.py",
    )


def test_bad_shard(tmp_path):
    flags = tiny_flags(tmp_path)
    path = write_shard(tmp_path / "train_0.bin", documents(100, 60), magic=1)
    refused(run(flags), path, "magic number 1")


def test_too_few_tokens(tmp_path):
    refused(
        run([*tiny_flags(tmp_path), "--num_scheduled_iterations=3000"]),
        "feeds",
        "steps of the 3002",
        "cached_fineweb10B.py N",
    )


def test_validation_too_short(tmp_path):
    refused(run([*tiny_flags(tmp_path), "--val_tokens=51200"]), "val_0.bin", "--val_tokens=51200")


def test_log_folder(tmp_path):
    (tmp_path / "file").touch()
    refused(
        run([*tiny_flags(tmp_path), f"--log_dir={tmp_path}/file/logs"]), "--log_dir=", "cannot be written"
    )


def test_world_does_not_divide_the_micro_batches(tmp_path):
    command = [*TORCHRUN, "--nproc_per_node=2", str(SCRIPT), *tiny_flags(tmp_path), "--micro_batches=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    said = done.stderr.count("train_gpt.py: --micro_batches=1 cannot be dealt to 2 processes")
    assert done.returncode != 0 and said == 1


def test_world_does_not_divide_a_later_shape(monkeypatch):
    """Before any process waits for another, in one line, though the first steps could be dealt."""
    monkeypatch.setattr(train_gpt, "step_shape", thirds)
    s = parse_settings(["--preset=sample"])
    with pytest.raises(UsageError) as error:
        train_gpt.connect(s, Launch(size=4))
    assert str(error.value) in [
        f"--micro_batches={count} cannot be dealt to 4 processes; give a multiple of 4" for count in (2, 6)
    ]
    monkeypatch.setattr(train_gpt, "step_shape", lambda step, s: thirds(step, s)._replace(micro_batches=4))
    monkeypatch.setattr(train_gpt, "meet", lambda launch: None)
    monkeypatch.setattr(train_gpt.dist, "init_process_group", lambda *_, **more: None)
    assert train_gpt.connect(s, Launch(size=4)).size == 4
    odd = train_gpt.StepShape(5, 512, 512)
    monkeypatch.setattr(
        train_gpt, "step_shape", lambda step, s: odd if step == s.total_steps - 1 else thirds(0, s)
    )
    with pytest.raises(UsageError, match="--micro_batches=5 cannot be dealt to 2 processes"):
        train_gpt.connect(s, Launch(size=2))


PLAIN_PARAMETER = """
    class Changed(GPT):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.extra_scale = nn.Parameter(torch.ones(3))


    GPT = Changed
"""


def test_parameter_without_an_optimizer(tmp_path):
    """One that a speedrunner adds as a plain nn.Parameter is not left untrained in silence."""
    path = changed(tmp_path, PLAIN_PARAMETER)
    done = run(tiny_flags(tmp_path), script=path)
    refused(done, "the model's parameter extra_scale is trained by no optimizer", "trained(value,")
    assert only_log(tmp_path).read_text().splitlines()[-1].startswith("stopped: the model's parameter extra")


@pytest.mark.parametrize(
    "add, says",
    [
        (lambda: torch.nn.Parameter(torch.zeros(3)), "is trained by no optimizer"),
        (lambda: train_gpt.trained(torch.zeros(3), "muon"), "is trained by no optimizer"),
        (lambda: train_gpt.trained(torch.zeros(3), "normuon"), "is no matrix"),
        (lambda: train_gpt.trained(torch.zeros(2, 3, 4), "normuon"), "is no matrix"),
    ],
)
def test_registration(add, says):
    """Wherever in the model it is, a parameter that cannot be trained is named."""
    s = parse_settings(["--preset=sample", "--model_dim=16"])
    model = train_gpt.GPT(s, 64)
    train_gpt.check_registration(model)
    model.blocks[3].extra = torch.nn.ParameterList([add()])
    with pytest.raises(UsageError, match=f"the model's parameter blocks.3.extra.0 {says}") as error:
        train_gpt.check_registration(model)
    assert "\n" not in str(error.value)


MORE_PARAMETERS = """
    class Changed(GPT):
        def __init__(self, s, *arguments):
            super().__init__(s, *arguments)
            self.mixer = trained(torch.zeros(5, s.model_dim), "normuon")
            self.mixer_out = trained(torch.ones(s.model_dim, 5) / 5, "normuon", lr_mul=0.5)
            self.share = trained(torch.tensor(0.5), "adam", s.scalar_lr_mul)

        def trunk(self, batch, inputs):
            h = super().trunk(batch, inputs)
            return h + self.share * F.linear(F.linear(h, self.mixer), self.mixer_out)


    GPT = Changed
"""


def test_more_parameters(tmp_path):
    """A line each registers them: they train, are saved, and go on in two processes as in one."""
    flags = [*tiny_flags(tmp_path), "--val_loss_every=2"]
    path = changed(tmp_path, MORE_PARAMETERS)
    alone = run([*flags, "--save_every=11"], script=path)
    assert alone.returncode == 0, alone.stderr
    losses = val_losses(alone.stdout)
    resumed = run([*flags, "--resume=latest"], ranks=2, script=path)
    assert len(losses) == 11 and losses[10] < losses[0] - 0.2
    assert val_losses(resumed.stdout) == pytest.approx(losses[6:], abs=1e-3), resumed.stderr
    (checkpoint,) = (tmp_path / "logs").glob("*.pt")
    tensors = torch.load(checkpoint, weights_only=True)["tensors"]
    assert tensors["mixer"].abs().max() > 0 and tensors["share"] != 0.5
    assert abs(tensors["mixer_out"] - 0.2).max() > 0
    model = loaded(path).load_model(str(checkpoint))
    assert torch.equal(model.mixer, tensors["mixer"])


ANOTHER_INPUT = """
    class StepInputs(NamedTuple):
        short_window: int
        long_window: int
        share: float
        twice: bool


    def step_inputs(step, s):
        return StepInputs(*attention_windows(step, s), share=1 / (1 + step), twice=step % 3 == 1)


    class Changed(GPT):
        def forward(self, batch, inputs):
            losses = inputs.share * super().forward(batch, inputs)
            return 2 * losses if inputs.twice else losses


    GPT = Changed
"""


def test_another_step_input(tmp_path):
    """A field more is, without another line, a tensor in place that a recording would read anew each step.

    One that is true or false stays so, since each recording has it fixed.
    """
    script = loaded(changed(tmp_path, ANOTHER_INPUT))
    s, world = script.parse_settings(tiny_flags(tmp_path)), script.World()
    trainer, loader = script.Trainer(s, world), script.TrainLoader(s, world)
    assert sorted(script.first_steps(s).values()) == [0, 1]
    places = [tensor.data_ptr() for tensor in trainer.inputs[:3]]
    seen = []

    def look(module, arguments):
        seen.append((step, arguments[1], arguments[1].share.item()))

    trainer.model.register_forward_pre_hook(look)
    for step, batches in enumerate(loader.stream(0, 3)):
        inputs = script.step_inputs(step, s)
        loss = trainer.train_step(step, batches, inputs)[0].item()
        if step < 2:  # the head is zero until Adam's first step is over
            assert loss == pytest.approx(5.950643, abs=1e-5)  # in step 1 half of it, twice
        assert [tensor.item() for tensor in trainer.inputs[:3]] == pytest.approx(inputs[:3])
    assert len(seen) == 3 * s.micro_batches
    for step, given, share in seen:
        assert type(given) is script.StepInputs and share == pytest.approx(1 / (1 + step))
        assert given.twice is (step == 1)
        assert [tensor.data_ptr() for tensor in given[:3]] == places
        assert [tensor.dtype for tensor in given[:3]] == [torch.int32, torch.int32, torch.float32]
    done = run([*tiny_flags(tmp_path), "--val_loss_every=0"], script=tmp_path / "train_gpt.py")
    assert done.returncode == 0 and 0 < val_losses(done.stdout)[0] < 5.95 / 21 + 1e-3, done.stderr


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(train_gpt.UsageError, match="--nproc_per_node=3, but this machine has 2 GPUs"):
        train_gpt.connect(train_gpt.parse_settings([]), Launch(size=3, local_size=3))


@pytest.mark.parametrize("heads, width", [(3, 256), (8, 96), (96, 8)])
def test_heads_that_no_kernel_takes(heads, width, monkeypatch):
    """Before the GPU is touched: the kernels' tiles need a power of two, and hold no more than 128."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("was taken"))
    with pytest.raises(UsageError, match=f"--num_heads={heads} makes heads {width} wide .* from 16 to 128"):
        train_gpt.connect(train_gpt.parse_settings([f"--num_heads={heads}"]), Launch())


GOOD = dict(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_PORT="1", MASTER_ADDR="a")


@pytest.mark.parametrize(
    "change",
    [
        *({other: None for other in GOOD if other != name} for name in GOOD if not name.startswith("MASTER")),
        *({name: None} for name in GOOD),
        *(
            {name: text}
            for name in GOOD
            for text in ("", *["abc", "-1", "1.5", "9" * 20] * (name != "MASTER_ADDR"))
        ),
        dict(WORLD_SIZE="0"),
        dict(WORLD_SIZE="1"),
        dict(RANK="4"),
        dict(LOCAL_RANK="2"),
        dict(LOCAL_WORLD_SIZE="5"),
    ],
    ids=str,
)
def test_environment(monkeypatch, change):
    """What torchrun sets is read; where any of it is missing or wrong, one line says what there is."""
    for name, text in (GOOD | change).items():
        monkeypatch.delenv(name, raising=False)
        if text is not None:
            monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match="the environment has RANK=.*; start several processes by torchrun"):
        train_gpt.read_environment()
    for name, text in GOOD.items():
        monkeypatch.setenv(name, text)
    assert train_gpt.read_environment() == Launch(1, 4, 1, 2, 1, "a")
    for name in list(GOOD)[:4]:
        monkeypatch.delenv(name)
    assert train_gpt.read_environment() == Launch()


def test_random_environments(monkeypatch):
    """Each of 200 is read as it stands, or refused in one line; nothing else is raised."""
    rng, read, refused_ones = random.Random(1), 0, 0
    values = [*"023505", None, "", "-1", "1.5", "\u0663", "b"]
    for _ in range(200):
        found = {name: text if rng.random() < 0.8 else rng.choice(values) for name, text in GOOD.items()}
        for name, text in found.items():
            monkeypatch.delenv(name, raising=False)
            if text is not None:
                monkeypatch.setenv(name, text)
        try:
            launch = train_gpt.read_environment()
        except UsageError as error:
            refused_ones += 1
            assert "\n" not in str(error) and f"RANK={found['RANK']!a}" in str(error)
        else:
            read += 1
            assert list(map(str, launch[:4])) == list(found.values())[:4]
            assert launch.rank < launch.size >= launch.local_size > launch.local_rank
    assert read > 50 and refused_ones > 50, (read, refused_ones)


@pytest.mark.parametrize("address", ["no.such.host.invalid", "a..b", "256.256.256.256"])
def test_no_master(address):
    """An address that means nothing is refused at once, before torch tries it for half an hour."""
    s = parse_settings(["--preset=sample"])
    with pytest.raises(UsageError, match=f"2 processes do not meet at MASTER_ADDR='{address}'") as error:
        train_gpt.connect(s, Launch(size=2, local_size=2, master_port=1, master_addr=address))
    assert "\n" not in str(error.value)


def test_another_service_for_a_master(tmp_path):
    """What listens at the port and never answers as torch's store does is not waited for."""
    program = "import sys, train_gpt; train_gpt.PATIENCE = 1; sys.exit(train_gpt.main())"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(silent.getsockname()[1]))
        done = forked(["-c", program, *tiny_flags(tmp_path)], [GOOD | place], folder=SCRIPT.parent)
    refused(done, "rank 1: 4 processes do not meet at MASTER_ADDR='127.0.0.1'", "no answer in 1 s")


def test_loss_not_finite(tmp_path):
    """An absurd learning rate: the run names the step within ten of it and keeps its log."""
    done = run([*tiny_flags(tmp_path), "--muon_lr=1e6", "--val_loss_every=0"])
    refused(done, "not finite", "lower the learning rates")
    named = int(re.search(r"the loss of step (\d+) is", done.stderr)[1])
    text = only_log(tmp_path).read_text()
    assert named < 10 and f"step:{named}/20 train_time" in text and "stopped: the loss of step" in text
    assert "step:20/20" not in text  # it did not wait for the last validation


def test_last_update_not_finite(tmp_path):
    """What the last step breaks shows only in the last validation."""
    done = run(
        [
            *tiny_flags(tmp_path),
            "--muon_lr=1e6",
            "--num_scheduled_iterations=2",
            "--num_extension_iterations=0",
        ]
    )
    refused(done, "not finite")


@pytest.mark.parametrize(
    "error, code, says",
    [
        ("torch.OutOfMemoryError()", 1, "the GPU is out of memory; raise --micro_batches"),
        ("KeyboardInterrupt()", 130, "Ctrl-C"),
        ("torch.empty(2**60)", 1, "the machine is out of memory"),
        ("numpy.empty(2**50)", 1, "the machine is out of memory"),
        ("open('nowhere/file')", 1, "No such file or directory: 'nowhere/file'"),
        ("train_gpt.UsageError('two\\nlines')", 2, "two lines"),
    ],
)
def test_exit_codes(error, code, says):
    """Also with a reader thread still at work, for which no user waits."""
    program = f"""
import numpy, sys, threading, time, torch, train_gpt
def run(*_):
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise {error}
train_gpt.run, sys.argv = run, ["train_gpt.py"]
sys.exit(train_gpt.main())
"""
    refused(forked(["-c", program], folder=SCRIPT.parent, timeout=30), says, code=code)


def alive(group):
    """Processes of a process group that still run."""
    found = subprocess.run(
        ["ps", "-eo", "pgid=,pid=,stat="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line for line in found if int(line.split()[0]) == group and not line.split()[2].startswith("Z")]


@pytest.mark.parametrize(
    "number, stop",
    [
        (signal.SIGINT, KeyboardInterrupt),
        (signal.SIGTERM, train_gpt.Terminated),
        (signal.SIGHUP, train_gpt.Terminated),
    ],
)
def test_second_signal_is_not_heard(number, stop, tmp_path):
    """torchrun hands Ctrl-C on to processes that have had it: the log still says why it ends."""
    before = {each: signal.getsignal(each) for each in train_gpt.STOPS}
    s = train_gpt.parse_settings([f"--log_dir={tmp_path / 'logs'}"])
    try:
        for each in before:
            signal.signal(each, train_gpt.stop_once)
        with pytest.raises(stop), train_gpt.Log(s, train_gpt.World()):
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGHUP)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert only_log(tmp_path).read_text().startswith("stopped: ")


def test_pending_signal_is_heard_before_the_log_ends():
    """Another rank may end by the same Ctrl-C first: the wait for it fails, and then the signal comes."""
    before = signal.signal(signal.SIGALRM, lambda *_: signal.default_int_handler(signal.SIGINT, None))
    try:
        with pytest.raises(KeyboardInterrupt), train_gpt.hear_signals():
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            raise RuntimeError("gloo")
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(RuntimeError, match="gloo"), train_gpt.hear_signals():
        raise RuntimeError("gloo")


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c(tmp_path, ranks):
    """SIGINT to the foreground group, as a terminal sends it: a readable log, and nobody is left."""
    flags = [*tiny_flags(tmp_path), "--model_dim=128", "--num_heads=4"]
    command = [sys.executable] if ranks == 1 else [*TORCHRUN, f"--nproc_per_node={ranks}"]
    child = subprocess.Popen(
        [*command, str(SCRIPT), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # tests started in the background inherit it ignored
    )
    for line in child.stdout:
        if line.startswith("step:2/"):
            break
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode != 0 and (ranks > 1 or child.returncode == 130)
    assert "train_gpt.py: stopped by Ctrl-C" in errors and (ranks > 1 or "Traceback" not in errors)
    text = only_log(tmp_path).read_text()
    assert "step:2/20 train_time" in text and text.rstrip().splitlines()[-1].startswith(
        "stopped: KeyboardInterrupt"
    )
    deadline = time.time() + 20
    while alive(child.pid) and time.time() < deadline:
        time.sleep(0.2)
    assert not alive(child.pid)


def test_killed_run_keeps_its_lines(tmp_path):
    """What the console has shown is in the log, even when nothing could be closed."""
    child = subprocess.Popen(
        [sys.executable, str(SCRIPT), *tiny_flags(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    for line in child.stdout:
        if line.startswith("step:2/"):
            break
    child.kill()
    child.communicate()
    assert "step:2/20 train_time" in only_log(tmp_path).read_text()


def test_terminal_shows_a_bar(tmp_path):
    """On a terminal: a bar and the validation lines, but no line a step; the log has them all."""
    terminal, side = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, str(SCRIPT), *tiny_flags(tmp_path)],
        stdout=side,
        stderr=side,
        env=ENVIRONMENT | {"COLUMNS": "100"},
    )
    os.close(side)
    shown = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    assert child.wait(timeout=60) == 0
    shown = shown.decode()
    assert (
        "20/20" in shown
        and "step:20/20 val_loss" in shown
        and not re.search(r"step:\d+/20 train_time", shown)
    )
    assert len(re.findall(r"^step:\d+/20 train_time", only_log(tmp_path).read_text(), re.M)) == 20


def test_two_runs_never_share_a_log(tmp_path):
    s, world = train_gpt.parse_settings(tiny_flags(tmp_path)), train_gpt.World()
    with train_gpt.Log(s, world) as a, train_gpt.Log(s, world) as b:
        assert a.path != b.path


@pytest.mark.parametrize("console", ["reader leaves", "full", "closed"])
def test_console_gone(tmp_path, console):
    """Training goes on with the log alone, which is whole, and the run ends well."""
    flags = [*tiny_flags(tmp_path), "--num_scheduled_iterations=6", "--warmup_steps=0"]
    end = {"reader leaves": "| head -1", "full": "> /dev/full", "closed": ">&- 2>&-"}[console]
    command = f"set -o pipefail; {shlex.join([sys.executable, str(SCRIPT), *flags])} {end}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    source, head, body = only_log(tmp_path).read_text().split("\n" + "=" * 100 + "\n")
    assert source.rstrip() == SCRIPT.read_text().rstrip()
    assert "step:8/8 val_loss" in body and "smear=" in body
    assert (head + body).count("the console is gone (") == (console != "closed")


def test_terminal_lost(tmp_path):
    """A bar that can no longer be drawn, where no SIGHUP tells of it."""
    terminal, side = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, str(SCRIPT), *tiny_flags(tmp_path)],
        stdout=side,
        stderr=side,
        env=ENVIRONMENT | {"COLUMNS": "100"},
    )
    os.close(side)
    while b"/20" not in os.read(terminal, 65536):
        pass
    os.close(terminal)
    assert child.wait(timeout=60) == 0
    text = only_log(tmp_path).read_text()
    assert "step:20/20 val_loss" in text and "smear=" in text


def test_log_folder_deleted(tmp_path, capsys):
    """In mid-run: the log is there again with all its lines, and says so; so is a checkpoint's folder."""
    s = parse_settings([*tiny_flags(tmp_path), "--save_every=5", "--num_scheduled_iterations=8"])
    real = train_gpt.Log.step

    def step(log, text, number):
        real(log, text, number)
        if number == 7:
            shutil.rmtree(tmp_path / "logs")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Log, "step", step)
        train_gpt.run(s, World())
    (log,) = (tmp_path / "logs").glob("*.txt")
    text, shown = log.read_text(), capsys.readouterr().out
    steps = [int(n) for n in re.findall(r"^step:(\d+)/10 train_time", text, re.M)]
    assert (
        steps == list(range(1, 11)) and text.startswith(SCRIPT.read_text()) and "step:10/10 val_loss" in text
    )
    for seen in (text, shown):
        assert seen.count(f"log: {log} was deleted; it is here again\n") == 1
    assert torch.load(log.with_suffix(".step10.pt"), weights_only=True)["step"] == 10
    assert f"checkpoint: {log.with_suffix('.step10.pt')}" in shown


def test_profile_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    s = parse_settings([*tiny_flags(tmp_path), "--num_scheduled_iterations=4", "--profile=1:2"])
    real = train_gpt.Profiler.before

    def before(profiler, step):
        profiler.log.path.with_suffix(".trace.json.gz").mkdir(exist_ok=True)
        real(profiler, step)

    monkeypatch.setattr(train_gpt.Profiler, "before", before)
    train_gpt.run(s, World())
    (line,) = re.findall(r"^profile: .*", capsys.readouterr().out, re.M)
    assert "trace.json.gz cannot be written ([Errno 21] Is a directory" in line
    (log,) = (tmp_path / "logs").glob("*.txt")
    assert line in log.read_text() and "step:6/6 val_loss" in log.read_text()


def test_names_in_other_letters(tmp_path):
    """A folder in any script is written, and shown as the console's encoding allows."""
    flags = [*tiny_flags(tmp_path), "--num_scheduled_iterations=1", "--num_extension_iterations=0"]
    folder = tmp_path / "журнал"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags, f"--log_dir={folder}", "--save_checkpoint=true"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert r"log: " in done.stdout and r"\u0436\u0443" in done.stdout
    assert len(list(folder.iterdir())) == 2


def test_copy_says_its_own_name(tmp_path):
    """An idea's error lines are told apart from the script's."""
    idea = tmp_path / "idea.py"
    idea.write_text(SCRIPT.read_text())
    done = run(["--sed=1"], script=idea)
    assert done.stderr == "idea.py: unknown flag --sed; did you mean --seed? (--help lists all)\n"
