"""Checkpoints: a run goes on from one as it would have without it; no stopped save loses the last."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from shards import tiny_flags
from starts import ENVIRONMENT, forked
from test_data import thirds, varied
from test_main import SCRIPT, TORCHRUN, refused, run, val_losses

import train_gpt
from train_gpt import (
    Log,
    Saver,
    Trainer,
    TrainLoader,
    UsageError,
    ValLoader,
    World,
    attention_windows,
    parse_settings,
    step_inputs,
)


def checkpoint(folder):
    """The newest checkpoint of a folder's only run."""
    return max((folder / "logs").glob("*.pt"), key=lambda path: int(path.stem.partition(".step")[2]))


def train(trainer, loader, start, end):
    """As train_all, but for the log."""
    losses = []
    for step, batches in zip(range(start, end), loader.stream(start, end), strict=True):
        trainer.begin_step(step)
        losses.append(trainer.train_step(step, batches, step_inputs(step, trainer.s))[0].item())
    return losses


ONE_SHAPE = train_gpt.step_shape
PLACES = [(ONE_SHAPE, 7), (ONE_SHAPE, 8), (ONE_SHAPE, 12), (thirds, 7), (varied, 19)]


@pytest.mark.parametrize("shape, step", PLACES)
def test_resume_is_bitwise(tmp_path, monkeypatch, shape, step):
    """After an odd and an even number of steps, where the window grows and where the shape changes.

    Losses and all state are those of the unbroken run.
    """
    monkeypatch.setattr(train_gpt, "step_shape", shape)
    s, world = parse_settings(tiny_flags(tmp_path)), World()
    first, loader = Trainer(s, world), TrainLoader(s, world)
    assert attention_windows(11, s) != attention_windows(12, s)
    train(first, loader, 0, step)
    with Log(s, world) as log:
        saver = Saver(log, first)
        saver.save(first, step, 123.0)
        rest = train(first, loader, step, 20)  # while it is being written
        saver.check(wait=True)
    second = Trainer(s, world)
    assert train_gpt.resume(second, str(saver.path)) == (step, 123.0)
    assert train(second, loader, step, 20) == rest
    for (name, a), (_, b) in zip(first.whole_state(20), second.whole_state(20), strict=True):
        assert torch.equal(a, b), name


def test_resumed_run(tmp_path):
    """The command line: the log tells, the clock goes on, and the losses are the unbroken run's."""
    flags = [*tiny_flags(tmp_path), "--val_loss_every=1"]
    whole = run([*flags, "--save_every=7"])
    assert whole.returncode == 0, whole.stderr
    path = checkpoint(tmp_path)
    assert torch.load(path, weights_only=True)["step"] == 14
    kept = {file.name.partition(".")[2] for file in (tmp_path / "logs").iterdir()}
    assert kept == {"txt", "step7.pt", "step14.pt"}
    resumed = run([*flags, "--resume=latest"])
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed: step 14 of {path}" in resumed.stdout and "from launch to step 14" in resumed.stdout
    rest = val_losses(resumed.stdout)
    assert rest == val_losses(whole.stdout)[14:] and len(rest) == 7
    clock = [
        [int(ms) for ms in re.findall(r"^step:1[45]/20 train_time:(\d+)ms", text, re.M)]
        for text in (whole.stdout, resumed.stdout)
    ]
    assert clock[1][0] > clock[0][0] * 0.9  # the time of the first fourteen steps counts


def test_resume_in_another_world(tmp_path):
    """Saved by three ranks after an odd step, gone on with by two; saved by one, gone on with by three."""
    flags = [
        *tiny_flags(tmp_path),
        "--val_loss_every=1",
        "--train_batch_size=384",
        "--micro_batches=6",
        "--val_batch_size=384",
    ]
    alone = run([*flags, "--save_every=15"])
    ours = val_losses(alone.stdout)
    assert len(ours) == 21, alone.stderr
    shutil.copy(checkpoint(tmp_path), tmp_path / "one.pt")
    checkpoint(tmp_path).unlink()
    together = run([*flags, "--save_every=13"], ranks=3)
    assert together.returncode == 0, together.stderr
    for path, start, ranks in ((checkpoint(tmp_path), 13, 2), (tmp_path / "one.pt", 15, 3)):
        resumed = run([*flags, f"--resume={path}"], ranks)
        found = val_losses(resumed.stdout)
        assert len(found) == 21 - start, resumed.stderr
        assert max(abs(a - b) for a, b in zip(found, ours[start:], strict=True)) <= 1e-3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with shards, a log and a final checkpoint, its flags and what the run printed."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*tiny_flags(folder), "--num_scheduled_iterations=8", "--num_extension_iterations=1"]
    done = run([*flags, "--save_checkpoint=true"])
    assert done.returncode == 0, done.stderr
    return folder, flags, done.stdout


def test_saved_at_the_end(trained):
    folder, _, shown = trained
    assert f"checkpoint: {checkpoint(folder)}" in shown
    assert torch.load(checkpoint(folder), weights_only=True)["step"] == 9


def test_load_model(trained):
    """The loaded model has the run's last validation loss, and its logits are those behind its losses."""
    folder, flags, shown = trained
    model = train_gpt.load_model(str(checkpoint(folder)))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    start = train_gpt.Rotary(16, 8, torch.float32)
    # The windows grew.
    assert not torch.equal(model.rotary.frequencies, start.frequencies) and model.rotary.scale > start.scale
    assert torch.allclose(model.rotary.cos[5], (5 * model.rotary.frequencies).cos())
    assert torch.allclose(model.rotary.sin[5], (5 * model.rotary.frequencies).sin())
    s = parse_settings(flags)
    batches = list(ValLoader(s, World()).stream())
    loss = np.mean([model(batch, model.inputs).mean().item() for batch in batches])
    assert loss == pytest.approx(val_losses(shown)[-1], abs=1e-4)
    tokens = train_gpt.read_shard(str(folder / "val_0.bin"), s.vocab_size)[:50]
    batch = train_gpt.document_batch(tokens, model.bos, model.embed.device)
    logits = model.logits(batch, model.inputs)
    assert logits.shape == (49, 384) and logits.dtype == torch.float32
    direct = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(tokens[1:].astype(np.int64)), reduction="none"
    )
    assert torch.allclose(direct, model(batch, model.inputs), atol=1e-5)
    # On a GPU a recorded gradient would mean FP8.
    recorded = []
    model.blocks[1].register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    for call in (model, model.logits, model.trunk):
        call(batch, model.inputs)
    assert recorded == [False] * 3


def test_load_model_of_an_unfinished_run(trained, tmp_path):
    """What the model is and what it reads fit: both are of the last step, as a tied head needs."""
    folder, flags, _ = trained
    s = parse_settings(flags)
    state = train_gpt.read_checkpoint(str(checkpoint(folder)))
    for step, inputs_of in ((3, 2), (s.total_steps, s.total_steps)):
        train_gpt.write_checkpoint(tmp_path / "other.pt", state | {"step": step})
        inputs = train_gpt.load_model(str(tmp_path / "other.pt")).inputs
        assert inputs == train_gpt.step_inputs(inputs_of, s) != train_gpt.step_inputs(3, s)


def test_refused_checkpoints(trained, tmp_path):
    folder, flags, _ = trained
    path = checkpoint(folder)
    refused(
        run([*flags, f"--resume={path}", "--muon_lr=0.5"]),
        str(path),
        "made with --muon_lr=0.03",
        "this run has 0.5",
    )
    refused(run([*flags, f"--resume={tmp_path}/none.pt"]), "none.pt", "there is no such file")
    refused(
        run([*flags, "--resume=latest", f"--log_dir={tmp_path}/empty"]),
        "--resume=latest: no checkpoint in --log_dir=",
    )
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match="no checkpoint of this script"):
        train_gpt.load_model(str(tmp_path / "other.pt"))
    state = torch.load(path, weights_only=True)
    del state["tensors"]["lm_head.weight"]
    train_gpt.write_checkpoint(tmp_path / "older.pt", state)
    refused(
        run([*flags, f"--resume={tmp_path}/older.pt"]),
        "older.pt: made by another version of this script (lm_head.weight: missing",
    )
    with pytest.raises(UsageError, match="made by another version"):
        train_gpt.load_model(str(tmp_path / "older.pt"))
    state = torch.load(path, weights_only=True)
    state["tensors"]["bigram"] = state["tensors"]["bigram.first"] = torch.zeros(3)
    train_gpt.write_checkpoint(tmp_path / "newer.pt", state)
    with pytest.raises(
        UsageError, match=r"newer.pt: made by another version of this script \(bigram: missing"
    ):
        train_gpt.load_model(str(tmp_path / "newer.pt"))
    state = torch.load(path, weights_only=True)
    state["tensors"]["lm_head.weight"] = state["tensors"]["lm_head.weight"].bfloat16()
    train_gpt.write_checkpoint(tmp_path / "gpu.pt", state)
    refused(
        run([*flags, f"--resume={tmp_path}/gpu.pt"]),
        "gpu.pt: written on another kind of device (lm_head.weight: ",
    )
    refused(run([*flags, f"--resume={path}", "--profile=1:3"]), "--profile=1:3: the run goes on from step ")


# Parameters as scripts before the banks named them.
OLD_NAMES = [
    ("embed", "embedding"),
    (r"value_embeds\.(\d+)\.weight", r"values.\1"),
    (r"blocks\.(\d+)\.qkvo", r"slots.\1.attention"),
    (r"blocks\.(\d+)\.gate", r"slots.\1.gates"),
    (r"blocks\.(\d+)\.c_fc", r"slots.\1.mlp_in"),
    (r"blocks\.(\d+)\.c_proj", r"slots.\1.mlp_out"),
    (r"lm_head\.weight", "head"),
]


def old_name(name):
    """A tensor's name in an old checkpoint; moments and gradients end it as they do today."""
    for pattern, old in OLD_NAMES:
        name = re.sub(rf"^{pattern}(?=\.|$)", old, name)
    return name


def test_checkpoint_of_the_old_layout(trained, tmp_path):
    """One line refuses it, whether its settings tell it apart or only its tensors do."""
    folder, flags, _ = trained
    state = torch.load(checkpoint(folder), weights_only=True)
    tensors = {old_name(name): tensor for name, tensor in state["tensors"].items()}
    assert {"embedding", "values.0", "slots.1.attention.0", "slots.1.mlp_in.0.first", "head"} <= set(tensors)
    settings = dict(state["settings"])
    settings["mlp_in_lr_mul"] = settings.pop("c_fc_lr_mul")
    train_gpt.write_checkpoint(tmp_path / "old.pt", state | {"tensors": tensors, "settings": settings})
    train_gpt.write_checkpoint(tmp_path / "renamed.pt", state | {"tensors": tensors})
    refused(run([*flags, f"--resume={tmp_path}/old.pt"]), "old.pt: made ", "c_fc_lr_mul")
    trainer = Trainer(parse_settings(flags), World())
    with pytest.raises(UsageError, match="renamed.pt: made by another version of this script"):
        train_gpt.resume(trainer, str(tmp_path / "renamed.pt"))
    for name in ("old.pt", "renamed.pt"):
        with pytest.raises(UsageError, match=f"{name}: made by another version of this script") as error:
            train_gpt.load_model(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_resume_at_the_end_only_validates(trained):
    folder, flags, shown = trained
    done = run([*flags, f"--resume={checkpoint(folder)}"])
    assert done.returncode == 0 and val_losses(done.stdout) == val_losses(shown)[-1:]


KILLED = """
import os, sys, torch, train_gpt
kill_at, count = int(sys.argv.pop()), 0
def boundary(call):
    def wrapped(*arguments, **more):
        global count
        if saving and (count := count + 1) == kill_at:
            os._exit(9)
        result = call(*arguments, **more)
        if saving and (count := count + 1) == kill_at:
            os._exit(9)
        return result
    return wrapped
saving = False
real = train_gpt.Saver._write
def write(self, state, copied):
    global saving
    saving = state["step"] == 8  # the second save; the first is whole
    real(self, state, copied)
    if saving:
        print("boundaries", count, flush=True)
        os._exit(7)
train_gpt.Saver._write = write
train_gpt.calibrate = lambda *_: ""  # most of such a run's time
os.fsync, os.replace, torch.save = map(boundary, (os.fsync, os.replace, torch.save))
sys.exit(train_gpt.main())
"""


def test_killed_while_saving(tmp_path):
    """At each boundary of a save's file operations: latest finds the old or the new checkpoint, whole."""
    flags, seen = [*tiny_flags(tmp_path), "--save_every=4", "--warmup_steps=0", "--val_loss_every=0"], []
    for kill_at in range(1, 20):
        shutil.rmtree(tmp_path / "logs", ignore_errors=True)
        done = forked(["-c", KILLED, *flags, kill_at], folder=SCRIPT.parent)
        assert done.returncode in (7, 9), done.stderr
        s = parse_settings([*flags, "--resume=latest"])
        seen.append(train_gpt.read_checkpoint(*train_gpt.find_checkpoints(s, World()))["step"])
        if done.returncode == 7:
            break
    assert seen == 5 * [4] + 4 * [
        8
    ]  # two boundaries each: save, sync, replace, sync of the folder; then none


@pytest.mark.parametrize("ranks, number", [(1, signal.SIGHUP), (2, signal.SIGTERM)])
def test_signal_saves(tmp_path, ranks, number):
    """With checkpoints on: the step is finished, saved, and the run goes on from there to the same end."""
    flags = [*tiny_flags(tmp_path), "--model_dim=64", "--val_loss_every=20"]
    command = [sys.executable] if ranks == 1 else [*TORCHRUN, "--nproc_per_node=2"]
    child = subprocess.Popen(
        [*command, str(SCRIPT), *flags, "--num_scheduled_iterations=44", "--save_every=1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    for line in child.stdout:
        if line.startswith("step:3/"):
            break
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    code = child.returncode
    assert (code == 143) if ranks == 1 else code != 0, (ranks, code, errors)
    said = rf"train_gpt.py: stopped by {number.name} after step (\d+); go on with --resume=(\S+\.pt)"
    found = re.search(said, errors)
    assert found and 3 <= int(found[1]) < 40, errors
    assert torch.load(found[2], weights_only=True)["step"] == int(found[1]), errors
    assert ranks > 1 or "Traceback" not in errors
    resumed = run([*flags, "--num_scheduled_iterations=44", "--resume=latest"])
    assert "step:46/46 val_loss" in resumed.stdout, resumed.stderr


SIGNALLED = """
import os, sys, signal, time, train_gpt
numbers = [int(number) for number in sys.argv.pop().split(",")]
real = train_gpt.write_checkpoint
def slow_write(*arguments):
    while numbers:
        os.kill(os.getpid(), numbers.pop(0))
        time.sleep(0.2)
    real(*arguments)
train_gpt.write_checkpoint = slow_write
sys.exit(train_gpt.main())
"""


def signalled(folder, *numbers, ignored=signal.SIGCHLD):
    """A run with a save after step 5, in which these signals come."""

    def dispositions():  # tests started in the background inherit SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(ignored, signal.SIG_IGN)

    flags = [*tiny_flags(folder), "--save_every=5", "--val_loss_every=0", "--warmup_steps=0"]
    return subprocess.run(
        [sys.executable, "-c", SIGNALLED, *flags, ",".join(map(str, map(int, numbers)))],
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        preexec_fn=dispositions,
    )


def test_ctrl_c_while_saving(tmp_path):
    """After a SIGTERM one Ctrl-C does not break the save, and a second one ends it at once."""
    done = signalled(tmp_path / "a", signal.SIGTERM, signal.SIGINT)
    refused(done, "stopped by SIGTERM after step ", code=143)
    assert torch.load(checkpoint(tmp_path / "a"), weights_only=True)["step"] >= 5
    done = signalled(tmp_path / "b", signal.SIGTERM, signal.SIGINT, signal.SIGINT)
    refused(done, "stopped by Ctrl-C", code=130)
    assert not list((tmp_path / "b" / "logs").glob("*.pt"))


def test_nohup(tmp_path):
    """A hang-up that was ignored at the start stays so."""
    done = signalled(tmp_path, signal.SIGHUP, ignored=signal.SIGHUP)
    assert done.returncode == 0 and "step:20/20 val_loss" in done.stdout, done.stderr


@pytest.mark.parametrize("size", [1, 2])
def test_all_ranks_stop_after_the_same_step(tmp_path, size):
    """Each rank reads one rank's wish at a time of its own; they stop once all have read it."""
    s = parse_settings(tiny_flags(tmp_path))
    with Log(s, World()) as log:
        timer = train_gpt.Timer(log, 40, World(0, size), 0.0)
        timer.start()
        for step in range(1, 20):
            timer.step(step, torch.tensor([5.0, float(step >= 4)]))
    assert timer.stop_after == (4 if size == 1 else 4 + timer.LAG)


def test_sigterm_without_checkpoints(tmp_path):
    child = subprocess.Popen(
        [sys.executable, str(SCRIPT), *tiny_flags(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    for line in child.stdout:
        if line.startswith("step:1/"):
            break
    child.terminate()
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 143 and errors == "train_gpt.py: stopped by SIGTERM\n"


LIMITED = """
import resource, sys, train_gpt
limit = int(sys.argv.pop())
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(train_gpt.main())
"""


def limited(flags, limit):
    """A run that cannot write files beyond a size, as on a disk that fills up."""
    return forked(["-c", LIMITED, *flags, limit], folder=SCRIPT.parent)


def test_disk_full(tmp_path, trained):
    """While logging and while saving: one line, and the checkpoint before stays as it was."""
    folder, flags, _ = trained
    before = checkpoint(folder).read_bytes()
    script = SCRIPT.stat().st_size
    refused(limited([*flags, f"--log_dir={tmp_path}/a"], script + 1000), "cannot be written", "free space")
    (log,) = (tmp_path / "a").iterdir()
    assert log.read_text().startswith(SCRIPT.read_text())
    done = limited([*flags, f"--resume={checkpoint(folder)}", "--save_checkpoint=true"], len(before) // 2)
    refused(done, ".pt: the checkpoint cannot be written", "free space (there is none before it)")
    assert checkpoint(folder).read_bytes() == before and not list((folder / "logs").glob("*.tmp"))


def test_two_runs_in_one_folder(tmp_path):
    """At the same time: each has its own log and checkpoint."""
    flags = [*tiny_flags(tmp_path), "--save_every=5"]
    children = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *flags, f"--seed={seed}"],
            stdout=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        for seed in (1, 2)
    ]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    logs = sorted((tmp_path / "logs").glob("*.txt"))
    assert len(logs) == 2 and len(os.listdir(tmp_path / "logs")) == 6
    for log in logs:
        seed = int(re.search(r"^seed=(\d)$", log.read_text(), re.M)[1])
        for step in (15, 20):
            state = torch.load(log.with_suffix(f".step{step}.pt"), weights_only=True)
            assert state["settings"]["seed"] == seed and state["step"] == step


def damaged(data, fault, rng):
    """A checkpoint's bytes with a fault of a kind."""
    data, place = bytearray(data), rng.randrange(len(data))
    if fault == "bit":
        data[place] ^= 1 << rng.randrange(8)
    elif fault == "zeros":
        while not any(data[place : place + 4096]) or place > len(data) - 4096:
            place = rng.randrange(len(data))
        data[place : place + 4096] = bytes(4096)
    elif fault == "cut":
        del data[place:]
    return bytes(data)


@pytest.mark.parametrize("fault", ["bit", "zeros", "cut"])
def test_damaged_checkpoints(trained, tmp_path, fault):
    """Anywhere in the file, its ends included: 200 of 200 are refused, while the file as it was is not."""
    folder, _, _ = trained
    data, path, rng = checkpoint(folder).read_bytes(), tmp_path / "damaged.pt", random.Random(fault)
    for _ in range(200):
        path.write_bytes(damaged(data, fault, rng))
        with pytest.raises(UsageError, match="damaged, cut short or no checkpoint of this script"):
            train_gpt.read_checkpoint(str(path))
    for place in (0, 4096, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert not train_gpt.is_whole(path)
    for size in (0, 1, 4):
        path.write_bytes(bytes(size))
        assert not train_gpt.is_whole(path)
    path.write_bytes(data)
    assert train_gpt.read_checkpoint(str(path))["step"] == 9
    with pytest.raises(UsageError, match="damaged.pt: damaged"):
        path.write_bytes(damaged(data, fault, rng))
        train_gpt.load_model(str(path))


def test_latest_names_the_next_whole_one(trained, tmp_path):
    """Beside links to nowhere, and past another damaged one."""
    folder, flags, _ = trained
    data = checkpoint(folder).read_bytes()
    for i, name in enumerate(("oldest", "whole", "cut", "bad")):
        (tmp_path / f"{name}.pt").write_bytes(data[: 1000 if name in ("cut", "bad") else None])
        os.utime(tmp_path / f"{name}.pt", (i, i))
    (tmp_path / "dangling.pt").symlink_to("nowhere")
    s = parse_settings([*flags, "--resume=latest", f"--log_dir={tmp_path}"])
    found = train_gpt.find_checkpoints(s, World())
    assert [os.path.basename(path) for path in found] == ["bad.pt", "cut.pt", "whole.pt", "oldest.pt"]
    with pytest.raises(UsageError, match=f"bad.pt: damaged.*; give --resume={tmp_path}/whole.pt$"):
        train_gpt.resume(Trainer(s, World()), *found)
    with pytest.raises(UsageError, match="give another one$"):
        train_gpt.read_checkpoint(*found[:2])


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda state: state["tensors"].update(embed=state["tensors"]["embed"].t().clone()),
            "embed: (32, 384)",
        ),
        (lambda state: state["tensors"].update(embed=state["tensors"]["embed"].double()), "torch.float64"),
        (
            lambda state: state["tensors"].update(extra=torch.zeros(3)),
            "extra: (3,) torch.float32, here missing",
        ),
        (lambda state: state.update(step=10), "holds step 10 of a run of 9"),
    ],
)
def test_checkpoint_of_another_shape(trained, tmp_path, change, says):
    """Tensors of as many numbers in other shapes, others, and a step beyond the end; nothing is loaded."""
    folder, flags, _ = trained
    state = torch.load(checkpoint(folder), weights_only=True)
    change(state)
    train_gpt.write_checkpoint(tmp_path / "changed.pt", state)
    trainer = Trainer(parse_settings(flags), World())
    before = [bank.param.clone() for bank in trainer.banks]
    with pytest.raises(UsageError, match=re.escape(says)):
        train_gpt.resume(trainer, str(tmp_path / "changed.pt"))
    assert all(torch.equal(bank.param, kept) for bank, kept in zip(trainer.banks, before, strict=True))
    if "(32, 384)" in says:
        with pytest.raises(UsageError, match=re.escape(says)):
            train_gpt.load_model(str(tmp_path / "changed.pt"))
