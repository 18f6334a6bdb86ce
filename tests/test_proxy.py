"""The newest record in records/proxy: on one and two processes, resumed, and its fused versions."""

import functools
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from fused import check_fused_versions
from shards import tiny_flags
from test_main import run, val_losses

SCRIPT = Path(__file__).parent.parent / "records/proxy/2026-11-29_late-attention-e4m3/train_gpt.py"

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels run in the interpreter")
FALLING = [(2**0.5, 8 / 9), *((3**0.5, i / 9) for i in (6, 4, 2))]  # in steps 5 to 8 of 9


@pytest.fixture(scope="module")
def script():
    """The record's script as a module."""
    spec = importlib.util.spec_from_file_location("late_attention", SCRIPT)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # its dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_worlds_and_resume(tmp_path):
    """Two processes and one, which goes on from a checkpoint of theirs, train alike through every stage."""
    flags = [*tiny_flags(tmp_path), "--sampled_classes=250", "--num_scheduled_iterations=12"]
    flags += ["--num_extension_iterations=2", "--val_loss_every=2"]
    alone = val_losses(run(flags, script=SCRIPT).stdout)
    together = run([*flags, "--save_every=7"], ranks=2, script=SCRIPT)
    assert len(alone) == 8 and val_losses(together.stdout) == pytest.approx(alone, abs=2e-4), together.stderr
    (early,) = (tmp_path / "logs").glob("*.step7.pt")  # the head is untied at step 8, and sampled up to 10
    resumed = val_losses(run([*flags, f"--resume={early}"], script=SCRIPT).stdout)
    assert resumed == pytest.approx(alone[-4:], abs=2e-4)


def test_settings(script):
    for text in ("", "0", "1,,2", "1,a", "100", "1.5"):
        with pytest.raises(script.UsageError, match="--batch_stages: cannot read"):
            script.parse_settings([f"--batch_stages={text}"])
    s = script.parse_settings(["--num_scheduled_iterations=9", "--num_extension_iterations=1"])
    tokens = [script.step_shape(step, s).tokens for step in range(10)]
    assert tokens == [131_072] * 3 + [262_144] * 3 + [393_216] * 4
    rates = [script.learning_rate_scale(step, s) for step in range(10)]
    assert rates[:5] == [1, 1, 1, 2**0.5, 2**0.5]  # then it falls from the root of the batches to 0.1
    assert rates[5:9] == pytest.approx([peak * left + 0.1 * (1 - left) for peak, left in FALLING])
    assert [script.step_inputs(step, s).tied for step in (5, 6)] == [True, False]
    assert [script.step_inputs(step, s).sampled for step in (7, 8)] == [True, False]


@pytest.fixture
def trainer(script, tmp_path):
    """A tiny trainer of the record's script."""
    flags = [*tiny_flags(tmp_path), "--sampled_classes=250", "--num_scheduled_iterations=12"]
    return script.Trainer(script.parse_settings(flags), script.World())


def batches(script, trainer, step):
    return next(script.TrainLoader(trainer.s, trainer.world).stream(step, step + 1))


def test_gradients_count_by_tokens(script, tmp_path, monkeypatch):
    """In micro-batches of the first stage: Adam the mean of its two steps'."""
    flags = [*tiny_flags(tmp_path), "--num_scheduled_iterations=9"]
    trainer = script.Trainer(script.parse_settings(flags), script.World())
    normuon, adam = [], []
    monkeypatch.setattr(trainer.normuon, "set_step", lambda lr, momentum, count: normuon.append(count))
    monkeypatch.setattr(trainer.adam, "set_step", lambda scale, t, count: adam.append(count))
    for step in range(9):
        trainer.train_step(step, batches(script, trainer, step), script.step_inputs(step, trainer.s))
    assert normuon == [4] * 3 + [8] * 3 + [12] * 3 and adam == [4, 6, 8, 12]


def test_head_is_tied_and_untied(script, trainer):
    """The embedding begins small, as the head, has the gradients of both, and is copied when they part."""
    model, s = trainer.model, trainer.s
    assert model.embed.std().item() == pytest.approx(0.005, rel=0.02) and model.embed.lr_mul == s.head_lr_mul
    for step in range(9):
        trainer.begin_step(step)
        tied, head = step < 8, model.lm_head.weight
        assert bool(head.any()) == (not tied)
        if step == 8:
            assert torch.equal(head, model.embed)
        trainer.train_step(step, batches(script, trainer, step), script.step_inputs(step, s))
    assert head.grad.any()
    (batch, *_), inputs = batches(script, trainer, 0), script.step_inputs(0, s)
    model.train()
    h = model.trunk(batch, inputs)
    classes, places, bias = script.sample_classes(batch.targets, len(model.embed), 250, inputs.draw)
    logits = script.softcap(h @ model.embed[classes].T) + bias
    wanted = torch.nn.functional.cross_entropy(logits, places.long(), reduction="none")
    torch.testing.assert_close(model(batch, inputs), wanted)


def test_late_attention(script, trainer):
    """Layers behind layer 8 get the norm of its output; keys are offset where windows are long."""
    seen = {}

    def note(i, block, args):
        seen[i] = args[0], args[-1]

    for i, block in enumerate(trainer.model.blocks):
        assert block.offset == (i in (4, 11))
        block.register_forward_pre_hook(functools.partial(note, i))
    trainer.model(batches(script, trainer, 0)[0], script.step_inputs(0, trainer.s))
    assert [i for i, (_, late) in seen.items() if late is not None] == [9, 10, 11]
    for i in (9, 10, 11):  # layer 8 runs nothing here, so its output is the input of layer 9
        assert torch.equal(seen[i][1], script.rms_norm(seen[9][0]))


@on_a_cpu
@pytest.mark.parametrize("T, fp8", [(83, False), (128, False), (83, True)])
@pytest.mark.parametrize("offset", [True, False])
def test_attention(script, T, fp8, offset):
    """The fused version, with and without offset keys, has the definition's output and gradients."""
    torch.manual_seed(T)
    C, H = 64, 2
    rotary, index = script.Rotary(C // H, T, torch.float32), torch.arange(T, dtype=torch.int32)
    mask = script.Mask((index - 30).clamp(min=0), (index + 30).clamp(max=T - 1))
    shapes = {"x": (T, C), "h": (T, C), "qkvo": (C, 4 * C), "gate": (H, 12), "lambdas": (4,), "ve": (T, C)}
    given = {name: torch.randn(shape) * (C**-0.5 if name == "qkvo" else 1) for name, shape in shapes.items()}
    dy, found = torch.randn(T, C), []
    for fused in (False, True):
        p = {name: value.clone().requires_grad_() for name, value in given.items()}
        x, weights = p["x"] * 1, {name: p[name] for name in ("qkvo", "gate", "lambdas")}
        if fused:
            weights = {name: script.Weight(w.detach(), torch.zeros_like(w)) for name, w in weights.items()}
            if fp8:
                weights["qkvo"] = weights["qkvo"]._replace(**script.fp8_copies(given["qkvo"], 4))
        attend = script.attention_fused_ if fused else script.attention_.definition
        y = attend(x, p["h"], *weights.values(), p["ve"], rotary, mask, offset)
        y.backward(dy)
        grads = [weights[name].grad if name in weights else p[name].grad for name in shapes]
        found.append([y.detach(), *grads])
    for wanted, got in zip(*found, strict=True):
        if fp8:
            assert (got - wanted).norm() < (0.3 if wanted.numel() < 64 else 0.15) * wanted.norm()
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


@on_a_cpu
def test_mlp_in_fp8(script, monkeypatch):
    """Its gradients, by FP8 products and transposes, are the definition's but for rounding."""
    monkeypatch.setattr(script, "MLP_TILE", (32, 64, 64, 4, 2))
    monkeypatch.setattr(script, "MLP_BACKWARD_TILE", (256, 32, 64, 4, 2))
    torch.manual_seed(0)
    T, C, found = 300, 64, []
    x, h, dy = torch.randn(T, C), script.rms_norm(torch.randn(T, C)), 0.1 * torch.randn(T, C)
    weights = [0.1 * torch.randn(C, 4 * C) for _ in range(2)]
    for fused in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, h)]
        p = [w.clone().requires_grad_() for w in weights]
        if fused:
            p = [script.Weight(w, torch.zeros_like(w), **script.fp8_copies(w, 1)) for w in weights]
        y = (script.mlp_fused if fused else script.mlp.definition)(*leaves, *p)
        y.backward(dy)
        found.append([y.detach(), *(t.grad for t in (*leaves, *p))])
    for wanted, got in zip(*found, strict=True):
        assert (got - wanted).norm() < 0.1 * wanted.norm()


@on_a_cpu
@pytest.mark.parametrize("T, V", [(36, 300), (40, 128)])
def test_loss_with_a_bias(script, T, V):
    torch.manual_seed(V)
    z, targets, bias = 8 * torch.randn(T, V), torch.randint(V, (T,), dtype=torch.int32), 2 * torch.rand(V)
    bias[targets.long()] = 0
    dloss, found = torch.rand(T), []
    for loss_of in (script.softcapped_cross_entropy.definition, script.softcapped_cross_entropy_fused):
        logits = z.clone().requires_grad_()
        loss = loss_of(logits, targets, bias)
        loss.backward(dloss)
        found.append((loss.detach(), logits.grad))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    _, lse = script.cross_entropy_forward(z, targets, False, bias)
    dz, dzt = script.cross_entropy_backward(z, targets, lse, dloss, True, bias)
    wanted = found[0][1]
    assert (dz.float() * script.LOGIT_GRAD_SCALE - wanted).norm() < 0.06 * wanted.norm()  # e5m2 has two bits
    assert torch.equal(dz.view(torch.uint8).t(), dzt.view(torch.uint8))


def test_sampled_classes(script):
    """All targets are among them, and in the mean the others' share of the sum stands for all of theirs."""
    torch.manual_seed(0)
    size, count = 384, 160
    weights, sums, drawn = torch.rand(size), [], Counter()
    for draw in range(400):
        targets = torch.randint(100, (500,), dtype=torch.int32)
        classes, places, bias = script.sample_classes(targets, size, count, draw)
        assert len(classes.unique()) == count and torch.equal(classes[places.long()], targets)
        assert not bias[places.long()].any()
        sums.append((weights[classes.long()] * bias.exp()).sum())
        drawn.update(classes.tolist())
    assert torch.stack(sums).mean().item() == pytest.approx(weights.sum().item(), rel=0.02)
    assert len(drawn) == size  # each comes sometimes
    assert not torch.equal(classes, script.sample_classes(targets, size, count, draw + 1)[0])
    assert script.sample_classes(targets, size, 90, 1)[2].isnan().any()  # 100 targets


@on_a_cpu
def test_trains_by_fused_versions(script, tmp_path, monkeypatch):
    """In FP8 loss and gradients are the definitions': each idea's kernels get what they are to read."""
    flags = [*tiny_flags(tmp_path), "--sampled_classes=64", "--micro_batches=2", "--train_batch_size=64"]
    check_fused_versions(script, script.parse_settings(flags), monkeypatch)
