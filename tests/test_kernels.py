"""Fused versions against their operators' definitions in float64: on a GPU, else in Triton's interpreter."""

import dataclasses
import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_gpt
from train_gpt import WEIGHT_SCALE, Mask, Normed, Operator, Weight, normed_scale, to_e4m3

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32 = (torch.float32, 1e-5)
BF16 = (torch.bfloat16, 1e-2)


@pytest.fixture(autouse=True)
def on_device():
    """New tensors land on the device under test."""
    with torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def train_in_fp8(monkeypatch):
    """Switch FP8 on for the parts that are named; no part trains in it at first."""

    def switch(*parts):
        monkeypatch.setattr(train_gpt, "in_fp8", lambda device, part: part in parts)

    switch()
    return switch


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of the MLP that suit the interpreter; a GPU keeps its own."""
    if DEVICE == "cpu":
        monkeypatch.setattr(train_gpt, "MLP_TILE", (32, 64, 64, 4, 2))
        monkeypatch.setattr(train_gpt, "MLP_BACKWARD_TILE", (256, 32, 64, 4, 2))


@pytest.fixture
def operators(monkeypatch):
    """Undo what a test does to the operators; definitions are not compiled where there is no GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(train_gpt, "compiled", lambda function: function)
    monkeypatch.setattr(Operator, "every", list(Operator.every))
    yield
    for operator in Operator.every:
        operator.run = operator.definition


def value(h):
    """A normalized activation's tensor."""
    return h.value if isinstance(h, Normed) else h


def relative(found, wanted):
    """The norm of the difference over that of what is wanted."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


def make_mask(lengths, T, window):
    """The mask of packed documents of these lengths, the last of which is cut at T."""
    ends = torch.tensor(lengths).cumsum(0).clamp(max=T)
    spans = torch.diff(ends, prepend=ends.new_zeros(1))
    starts = (ends - spans).repeat_interleave(spans)
    lasts = (ends - 1).repeat_interleave(spans)
    at = torch.arange(T)
    return Mask(torch.maximum(starts, at - window).int(), torch.minimum(lasts, at + window).int())


def make_rotary(T, head_dim):
    """Random angles for more tokens than T, and a softmax scale."""
    angles = torch.randn(T + 5, head_dim // 2)
    return SimpleNamespace(cos=angles.cos(), sin=angles.sin(), scale=torch.tensor(0.117))


def leaf(*shape, scale=1.0):
    """A random activation that wants a gradient."""
    return (scale * torch.randn(*shape)).requires_grad_()


def weight(*shape, scale=1.0):
    """A random parameter."""
    return nn.Parameter(scale * torch.randn(*shape))


def table(*shape, scale=1.0):
    """A random parameter whose gradient is float32 whatever its dtype, as those of DistAdam's."""
    p = weight(*shape, scale=scale)
    p.is_table = True
    return p


def make_lambdas():
    return nn.Parameter(torch.tensor([0.9, -0.3, 0.7, -0.4]))


def cast(a, dtype, device=DEVICE):
    """A copy of an argument in dtype; vectors and numbers stay float32 where matrices are bf16."""
    if isinstance(a, tuple):
        return type(a)(*(cast(each, dtype, device) for each in a))
    if isinstance(a, SimpleNamespace):
        return SimpleNamespace(**{name: cast(each, dtype, device) for name, each in vars(a).items()})
    if not torch.is_tensor(a):
        return a
    kept = not a.is_floating_point()
    narrow = a.dim() < 2 and dtype == torch.bfloat16
    copy = a.detach().to(device, a.dtype if kept else torch.float32 if narrow else dtype, copy=True)
    if isinstance(a, nn.Parameter):
        copy = nn.Parameter(copy)
        if hasattr(a, "is_table"):
            copy.grad_dtype = torch.float32
        copy.grad = torch.ones_like(copy, dtype=copy.grad_dtype)
        return copy
    return copy.requires_grad_(a.requires_grad)


def passes(version, args, douts):
    """What a version returns, and its arguments' gradients, which for weights are added to ones."""
    outs = version(*args)
    outs = [value(t) for t in (outs if type(outs) is tuple else (outs,))]
    douts = [d.to(out) for d, out in zip(douts, outs, strict=True)]
    torch.autograd.backward(outs, douts)
    grads = []
    for a in args:
        a = a.value if isinstance(a, Weight) else a
        if isinstance(a, nn.Parameter):
            grads.append(a.grad - 1)
        elif torch.is_tensor(a) and a.requires_grad:
            grads.append(a.grad)
    return [*outs, *grads]


def exact_passes(operator, args, douts):
    """Those of the operator's definition in float64."""
    return passes(operator.definition, [cast(a, torch.float64, "cpu") for a in args], douts)


def fused_passes(operator, args, douts, dtype):
    """Those of its fused version in dtype, with weights as handles."""
    args = [cast(a, dtype) for a in args]
    args = [train_gpt.weight_handle(a) if isinstance(a, nn.Parameter) else a for a in args]
    return passes(operator.fused, args, [d.to(dtype) if d.dim() > 1 else d for d in douts])


def check(found, wanted, tolerance):
    """Compare outputs and gradients, one by one; a zero is one but for rounding."""
    for i, (ours, exact) in enumerate(zip(found, wanted, strict=True)):
        if exact.norm() < 1e-9:
            assert ours.abs().max() < 5 * tolerance, i
        else:
            assert relative(ours, exact) < tolerance, i


# ------------------------------------------------------------------------------------------------------
# Operators, and how their versions are chosen


def operator_cases():
    """For each operator, arguments and gradients of what it returns."""
    T, C, H, V = 37, 48, 3, 60
    mask, rotary = make_mask([20, 17], T, 9), make_rotary(T, C // H)
    tokens = torch.randint(V, (T,), dtype=torch.int32)
    x, h, qkvo, gate = leaf(T, C), leaf(T, C), weight(C, 4 * C, scale=0.2), weight(H, 12)
    q, k, v = (leaf(T, H, C // H) for _ in range(3))
    dx, dh = torch.randn(2, T, C)
    dloss = torch.rand(T)
    return {
        "embedding": ([tokens, table(V, C)], [dx]),
        "smear": ([x, weight(1, 12), nn.Parameter(torch.tensor(0.3))], [dx]),
        "mix_norm": ([x, leaf(T, C), make_lambdas()], [dx, dh]),
        "norm": ([x], [dx, dh]),
        "flash_attention": ([q, k, v, mask, rotary.scale], [torch.randn(T, H, C // H)]),
        "attention_": ([x, h, qkvo, gate, make_lambdas(), leaf(T, C), rotary, mask], [dx]),
        "mlp": ([x, h, weight(C, 4 * C, scale=0.2), weight(C, 4 * C, scale=0.2)], [dx]),
        "skip": ([x, leaf(T, C), nn.Parameter(torch.tensor(-1.5))], [dx]),
        "backout": ([x, leaf(T, C), nn.Parameter(torch.tensor(0.5))], [dx]),
        "softcapped_cross_entropy": ([leaf(T, V, scale=8.0), tokens], [dloss]),
        "head_loss": ([h, table(V, C, scale=0.2), tokens], [dloss]),
    }


NAMES = [operator.__name__ for operator in Operator.every]
FUSED = [operator.__name__ for operator in Operator.every if getattr(operator, "fused", None)]


@pytest.mark.parametrize("name", NAMES)
def test_definition_in_float32(name):
    """A definition in float32 gives what it gives in float64, outputs and gradients."""
    torch.manual_seed(0)
    operator = getattr(train_gpt, name)
    args, douts = operator_cases()[name]
    found = passes(operator.definition, [cast(a, torch.float32) for a in args], douts)
    check(found, exact_passes(operator, args, douts), 1e-5)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_fused_version(name, dtype, tolerance, operators):
    """An operator's fused version gives what its definition gives in float64."""
    torch.manual_seed(0)
    operator = getattr(train_gpt, name)
    args, douts = operator_cases()[name]
    check(fused_passes(operator, args, douts, dtype), exact_passes(operator, args, douts), tolerance)


def test_gradients_in_float32_of_weights_in_bf16():
    """A matrix may be Adam's, whose gradients are float32 and then have no rounding of a sum."""
    torch.manual_seed(0)
    args, douts = operator_cases()["attention_"]
    for p in args[2:4]:
        p.is_table = True
    found = fused_passes(train_gpt.attention_, args, douts, torch.bfloat16)
    check(found, exact_passes(train_gpt.attention_, args, douts), 2e-2)


def test_operators_with_fused_versions():
    """Those that a GPU spends its time on, and the parts of two of them."""
    spent = {"embedding", "mix_norm", "norm", "attention_", "mlp", "head_loss"}
    assert set(FUSED) >= spent | {"flash_attention", "softcapped_cross_entropy"}


def test_operators_run_their_definitions_at_first(operators):
    """Then `run_operators_on_gpu` makes each run its fused version, if it has one."""
    for operator in Operator.every:
        assert operator.run is operator.definition
    train_gpt.run_operators_on_gpu()
    for operator in Operator.every:
        assert operator.run is not operator.definition


def test_a_fused_version_gets_handles(operators):
    """A parameter comes as a Weight, with its gradient and copies in training alone; the rest as it is."""
    seen = []

    @Operator
    def weighed(x, w):
        return x * w

    @train_gpt.fused(weighed)
    def weighed_fused(x, w):
        seen.append((x, w))
        return value(x) * w.value

    x, p = torch.randn(3), weight(3)
    assert torch.equal(weighed(x, p), x * p)
    assert not seen and p.grad is None
    train_gpt.run_operators_on_gpu()
    p.fp8_copies = {"e4m3": to_e4m3(p.detach(), WEIGHT_SCALE)}
    assert torch.equal(weighed(x, p), x * p)
    with torch.no_grad():
        weighed(Normed(x), p)
    (first, handle), (second, bare) = seen
    assert first is x and isinstance(second, Normed)
    assert handle.value is p and handle.grad is p.grad and handle.e4m3 is p.fp8_copies["e4m3"]
    assert not p.grad.any() and bare == (p, None, None, None)


def test_an_unfused_operator_runs_as_it_stands(operators):
    """Its fused version is not taken; its definition gets tensors, in training and evaluation."""
    seen = []

    @train_gpt.unfused
    def weighed(x, w):
        seen.append((x, w))
        return x * w

    @train_gpt.fused(weighed)
    def weighed_fused(x, w):
        raise AssertionError("not this one")

    assert weighed.fused is None
    train_gpt.run_operators_on_gpu()
    x, p = torch.randn(3), weight(3)
    assert torch.equal(weighed(Normed(x), p), x * p)
    with torch.no_grad():
        assert torch.equal(weighed(Normed(x), p), x * p)
    if DEVICE == "cpu":  # else the compiler has traced it
        assert all(first is x and second is p for first, second in seen)


# ------------------------------------------------------------------------------------------------------
# Norm


@pytest.mark.parametrize("T, C", [(37, 48), (130, 768)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_mix_norm(T, C, dtype, tolerance):
    """Two layers that mix the same x0, with a norm between: that of x0 is one gradient for both."""
    torch.manual_seed(T)
    douts = list(torch.randn(4, T, C))

    def chain(mix_norm, norm):
        def run(x, x0, first, second):
            once, normed = mix_norm(x, x0, first)
            kept, between = norm(once + 0.5 * value(normed))
            twice, again = mix_norm(kept + 0.3 * value(between), x0, second)
            return normed, between, twice, again

        return run

    operator = SimpleNamespace(
        definition=chain(train_gpt.mix_norm.definition, train_gpt.norm.definition),
        fused=chain(train_gpt.mix_norm_fused, train_gpt.norm_fused),
    )
    args = [leaf(T, C), leaf(T, C), nn.Parameter(torch.tensor([1.1, 0.3, 0.5, 0.5])), make_lambdas()]
    check(fused_passes(operator, args, douts, dtype), exact_passes(operator, args, douts), tolerance)


def test_mix_norm_fp8(train_in_fp8):
    """In training the norm is in e4m3 alone; `read` gives its numbers and takes their gradient."""
    train_in_fp8("blocks")
    x, x0 = leaf(33, 80), torch.randn(33, 80)
    lambdas = train_gpt.weight_handle(make_lambdas())
    for mixed, normed in (train_gpt.mix_norm_fused(x, x0, lambdas), train_gpt.norm_fused(x)):
        wanted = train_gpt.rms_norm(mixed)
        assert torch.equal(normed.e4m3.float(), to_e4m3(wanted.detach(), normed_scale(80)).float())
        assert torch.equal(normed.read(), normed.e4m3.float() * normed_scale(80))
        assert normed.value.isnan().all() and not any(normed.value.stride())  # one number in memory
        assert Normed(x.bfloat16(), normed.e4m3).read().dtype == torch.bfloat16
        dh = torch.randn(33, 80)
        found = torch.autograd.grad(normed.read(), x, dh, retain_graph=True)
        assert relative(*found, *torch.autograd.grad(wanted, x, dh)) < 1e-5
        with pytest.raises(RuntimeError, match="a Normed's e4m3 takes no gradient"):
            normed.e4m3.float().sum().backward()
    with torch.no_grad():
        for mixed, normed in (train_gpt.mix_norm_fused(x, x0, lambdas), train_gpt.norm_fused(x)):
            assert normed.e4m3 is None and relative(normed.value, train_gpt.rms_norm(mixed)) < 1e-6


def test_norm_is_the_rms_norm():
    x = torch.randn(7, 33, dtype=torch.double) * 1e-3
    wanted = x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()
    assert relative(train_gpt.rms_norm(x.float()), wanted) < 1e-6
    assert relative(train_gpt.norm(x.float())[1], wanted) < 1e-6
    assert relative(train_gpt.norm_fused(x.float())[1].value, wanted) < 1e-6


def two_streams(mix_norm):
    """Layers that mix one x0 or another, by turns, the first of them into itself."""

    def run(x0, other, first, second):
        x, h = mix_norm(x0, x0, first)
        x, g = mix_norm(x + value(h), other, second)
        x, h = mix_norm(x * value(g), x0, second)
        return mix_norm(x + value(h), other, first)

    return run


def plain_readers(mix_norm):
    """Plain reads of x0 before, between and after two layers that mix it."""

    def run(x0, scale, first, second):
        before = x0 * scale
        x, h = mix_norm(before, x0, first)
        between = x0.sin() * value(h)
        x, h = mix_norm(x + between, x0, second)
        return x * x0, value(h) + x0.square()

    return run


@pytest.mark.parametrize("network", [two_streams, plain_readers])
def test_gradient_of_x0(network):
    """Each x0 of a model gets the gradients of all its own readers, fused or plain, and no other's."""
    torch.manual_seed(1)
    operator = SimpleNamespace(
        definition=network(train_gpt.mix_norm.definition), fused=network(train_gpt.mix_norm_fused)
    )
    args = [leaf(21, 40), leaf(21, 40), nn.Parameter(torch.tensor([1.1, 0.3, 0.5, 0.5])), make_lambdas()]
    douts = list(torch.randn(2, 21, 40))
    check(fused_passes(operator, args, douts, torch.float32), exact_passes(operator, args, douts), 1e-5)


@pytest.mark.parametrize("first_runs_first", [False, True])
def test_gradient_of_x0_in_either_order(first_runs_first):
    """Backward passes of its readers may come in the order in which they were made, too, which is unusual."""
    torch.manual_seed(1)
    order = []

    def network(mix_norm):
        def run(x, x0, first, second):
            one, _ = mix_norm(x, x0, first)
            # Of ready nodes autograd runs the one with the highest number, and each thread counts anew.
            with ThreadPoolExecutor(1) as pool:
                late = pool.submit(mix_norm, x, x0, second) if first_runs_first else None
                two, _ = late.result() if late else mix_norm(x, x0, second)
            one.grad_fn.register_hook(lambda *_: order.append("first"))
            two.grad_fn.register_hook(lambda *_: order.append("second"))
            return one, two

        return run

    operator = SimpleNamespace(fused=network(train_gpt.mix_norm_fused))
    args = [leaf(21, 40), leaf(21, 40), nn.Parameter(torch.tensor([1.1, 0.3, 0.5, 0.5])), make_lambdas()]
    douts = list(torch.randn(2, 21, 40))
    found = fused_passes(operator, args, douts, torch.float32)
    assert order == (["first", "second"] if first_runs_first else ["second", "first"])
    operator.definition = network(train_gpt.mix_norm.definition)
    check(found, exact_passes(operator, args, douts), 1e-5)


def test_gradient_of_x0_comes_anew():
    """A second backward pass through the same layers finds nothing left of the first."""
    x0 = leaf(9, 16)
    handle = train_gpt.weight_handle(make_lambdas())
    x, _ = train_gpt.mix_norm_fused(x0 * 2, x0, handle)
    x, h = train_gpt.mix_norm_fused(x, x0, handle)
    total = (x * h.value).sum()
    once, again = (torch.autograd.grad(total, x0, retain_graph=True)[0] for _ in range(2))
    assert once.any() and torch.equal(once, again)


@pytest.mark.parametrize("training", [True, False])
def test_x0_is_let_go(training):
    """Once nobody reads an x0 any more its memory is free: it does not hold itself."""

    class Canary:
        pass

    def run():
        with torch.set_grad_enabled(training):
            x0 = leaf(5, 16) * 1
            x0.canary = Canary()
            x, h = train_gpt.mix_norm_fused(x0, x0, train_gpt.weight_handle(make_lambdas()))
            if training:
                (x + h.value).sum().backward()
            return weakref.ref(x0.canary)

    canary = run()
    gc.collect()
    assert canary() is None


# ------------------------------------------------------------------------------------------------------
# Attention

ATTENTION_CASES = {
    "documents of length 1": ([1] * 70 + [30], 100, 16),
    "one document, T no multiple of a tile": ([77], 77, 200),
    "window longer than any document": ([40, 5, 90, 20], 155, 1000),
    "window shorter than documents": ([150, 43], 193, 33),
    "window 0": ([60, 10], 70, 0),
    "one token": ([1], 1, 128),
    "whole tiles": ([64, 64, 128], 256, 64),
}


@pytest.mark.parametrize("dtype, tolerance", [FLOAT32, BF16])
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_flash_attention(case, dtype, tolerance):
    """Attention that stands alone: its output, and the gradients of q, k and v."""
    lengths, T, window = ATTENTION_CASES[case]
    torch.manual_seed(T)
    heads = 3 if case == "whole tiles" else 2
    args = [*(leaf(T, heads, 32) for _ in range(3)), make_mask(lengths, T, window), torch.tensor(0.117)]
    args = [cast(a, dtype) for a in args]  # both sides read what is rounded
    douts = [torch.randn(T, heads, 32).to(dtype)]
    found = fused_passes(train_gpt.flash_attention, args, douts, dtype)
    assert found[0].dtype == dtype and all(t.dtype == dtype for t in found)
    check(found, exact_passes(train_gpt.flash_attention, args, douts), 3 * tolerance)


def test_flash_attention_of_views():
    """q, k and v may be parts of one tensor, or transposed ones."""
    torch.manual_seed(3)
    mask, scale, dout = make_mask([30, 20], 50, 12), torch.tensor(0.2), torch.randn(50, 2, 16)

    def attend(attention):
        def run(qk, v_t):
            q, k = qk.unbind(1)
            mask_here = cast(mask, torch.float32, qk.device)
            return attention(q, k, v_t.transpose(0, 1), mask_here, scale.to(qk.device))

        return run

    args = [leaf(50, 2, 2, 16), leaf(2, 50, 16)]
    operator = SimpleNamespace(
        definition=attend(train_gpt.flash_attention.definition), fused=attend(train_gpt.flash_attention_fused)
    )
    check(fused_passes(operator, args, [dout], torch.float32), exact_passes(operator, args, [dout]), 1e-5)


def plain_attention(qkv, ve, lambdas, gate, rotary, mask):
    """Gated attention from q, k and v as they are projected, (T, 3, H, D): the middle of `attention_`."""
    q, k, v = qkv.unbind(1)
    q = train_gpt.apply_rotary(train_gpt.rms_norm(q), rotary.cos, rotary.sin)
    k = train_gpt.apply_rotary(train_gpt.rms_norm(k), rotary.cos, rotary.sin)
    v = lambdas[2] * v if ve is None else lambdas[2] * v + lambdas[3] * ve.view_as(v)
    y = train_gpt.flash_attention.definition(q, k, v, mask, rotary.scale)
    return y * torch.sigmoid(gate)[:, :, None]


def attention_inputs(T, heads, head_dim, mixed=True):
    """h, w_qkv, ve, gate, lambdas and a rotary."""
    width = heads * head_dim
    ve = torch.randn(T, width) if mixed else None
    matrix = torch.randn(width, 4 * width) / width**0.5
    return (
        torch.randn(T, width),
        matrix,
        ve,
        3 * torch.randn(T, heads),
        make_lambdas(),
        make_rotary(T, head_dim),
    )


def kernel_attention(h, qkvo, ve, gate, lambdas, rotary, mask, dout):
    """Run the attention kernels both ways: out, dqkv, and the gradients of ve, lambdas and gate."""
    lambdas = train_gpt.weight_handle(lambdas)
    qkv, end = train_gpt.qkv_forward(Normed(h), Weight(qkvo), ve, lambdas, rotary)
    a = train_gpt.attention_forward(*qkv.unbind(1), gate, mask, rotary.scale)
    dqkv, d = train_gpt.attention_backward(dout, a, end)
    return a.out, dqkv, d.ve, lambdas.grad, d.gate


@pytest.mark.parametrize("dtype, tolerance", [FLOAT32, BF16])
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_kernels(case, dtype, tolerance):
    """From h to gated attention and back to q, k and v before norm, rotary embedding and mixing."""
    lengths, T, window = ATTENTION_CASES[case]
    torch.manual_seed(T)
    mask = make_mask(lengths, T, window)
    mixed, heads = case != "window longer than any document", 3 if case == "whole tiles" else 2
    width = 32 * heads
    inputs = [cast(t, dtype) for t in attention_inputs(T, heads, 32, mixed)]
    dout = torch.randn(T, heads, 32).to(dtype)
    h, qkvo, ve, gate, lambdas, rotary = (cast(t, torch.float64, "cpu") for t in inputs)
    qkv = (h @ qkvo.view(4 * width, width)[: 3 * width].t()).view(T, 3, heads, 32)
    exact = [None if t is None else t.detach().requires_grad_() for t in (qkv, ve, lambdas, gate)]
    wanted = plain_attention(*exact, rotary, cast(mask, torch.float64, "cpu"))
    wanted.backward(dout.to(wanted))
    wanted_dqkv, *others = (None if t is None else t.grad for t in exact)
    out, dqkv, dve, dlambdas, dgate = kernel_attention(*inputs, mask, dout)
    assert out.dtype == dtype and relative(out, wanted) < tolerance
    for part in range(3):
        if part == 2 or window and case != "one token":  # else q and k have no gradient
            # The output, from which the gradients of q and k come, is rounded behind its gate.
            bound = tolerance if part == 2 else 3 * tolerance
            assert relative(dqkv[:, part], wanted_dqkv[:, part]) < bound
        else:
            assert dqkv[:, part].abs().max() < 5 * tolerance
    for ours, grad in zip((dve, dlambdas - 1, dgate), others, strict=True):  # lambdas' is added to ones
        assert ours is grad is None or relative(ours, grad) < 3 * tolerance


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("T, heads", [(77, 2), (130, 3), (1, 1)])
def test_attention(T, heads, mixed):
    """The whole operator, in odd sizes, with the gradients of its weights."""
    torch.manual_seed(T)
    C = 16 * heads
    ve = leaf(T, C) if mixed else None
    args = [leaf(T, C), leaf(T, C), weight(C, 4 * C, scale=C**-0.5)]
    args += [weight(heads, 12, scale=0.3), make_lambdas(), ve]
    args += [make_rotary(T, 16), make_mask([T // 3 + 1, T], T, 20)]
    douts = [torch.randn(T, C)]
    found = fused_passes(train_gpt.attention_, args, douts, torch.float32)
    wanted = exact_passes(train_gpt.attention_, args, douts)
    check(found, wanted, 3e-5)


def test_attention_writes_over_x_only_where_it_may():
    """An x that `mix_norm` has just made is written over; another one keeps its values."""
    T, C = 20, 32
    h, qkvo, gate, lambdas = torch.randn(T, C), weight(C, 4 * C), weight(2, 12), make_lambdas()
    weights = [train_gpt.weight_handle(p) for p in (qkvo, gate, lambdas)]
    rest = (None, make_rotary(T, 16), make_mask([T], T, 9))
    x = leaf(T, C)
    kept = x.detach().clone()
    out = train_gpt.attention_fused_(x, h, *weights, *rest)
    assert out.data_ptr() != x.data_ptr() and torch.equal(x, kept)
    mixed, _ = train_gpt.mix_norm_fused(x, leaf(T, C), weights[2])
    assert train_gpt.attention_fused_(mixed, h, *weights, *rest).data_ptr() == mixed.data_ptr()


def test_attention_gate_that_is_shut():
    """Where a gate's sigmoid underflows, output and gradients are zero and nothing is lost to infinities."""
    h, qkvo, ve, gate, lambdas, rotary = attention_inputs(40, 1, 16)
    lambdas.grad = torch.zeros_like(lambdas)
    dout = torch.randn(40, 1, 16)
    found = kernel_attention(h, qkvo, ve, gate.fill_(-200.0), lambdas, rotary, make_mask([40], 40, 40), dout)
    assert all(t.abs().max() == 0 for t in found)


def test_attention_mask_is_the_interval():
    """A key outside first_key[i] to i has no influence, one inside has, in the definition and the kernels."""
    mask = make_mask([20, 30], 50, 7)
    qkv, gate, scale = torch.randn(50, 3, 1, 16), torch.randn(50, 1), torch.tensor(0.1)

    def gated(q, k, v, mask, scale):
        return train_gpt.attention_forward(q, k, v, gate, mask, scale).out

    for attend in (train_gpt.flash_attention.definition, train_gpt.flash_attention_fused, gated):
        changed = qkv.clone()
        changed[24, 2] += 1
        outs = [attend(*t.unbind(1), mask, scale) for t in (qkv, changed)]
        moved = (outs[0] != outs[1]).any(-1).any(-1)
        assert moved.nonzero().flatten().tolist() == list(range(24, 32))


@pytest.mark.parametrize("mixed", [True, False])
def test_qkv_fp8(mixed):
    """By e4m3 copies, q, k and v are those of the rounded operands."""
    torch.manual_seed(1)
    h, qkvo, ve, _, lambdas, rotary = attention_inputs(70, 3, 32, mixed)
    h, lambdas = train_gpt.rms_norm(h), lambdas.detach()
    h_e4m3, w_e4m3 = to_e4m3(h, normed_scale(96)), to_e4m3(qkvo, WEIGHT_SCALE)
    qkvo_e4m3 = Weight(qkvo, e4m3=w_e4m3)
    qkv, end = train_gpt.qkv_forward(Normed(h, h_e4m3), qkvo_e4m3, ve, Weight(lambdas), rotary)

    def plain(h, qkvo):
        """q, k and v turned and mixed, and v before."""
        q, k, v = (h @ qkvo.view(4 * 96, 96)[:288].t()).view(70, 3, 3, 32).unbind(1)
        q, k = (train_gpt.apply_rotary(train_gpt.rms_norm(t), rotary.cos, rotary.sin) for t in (q, k))
        return q, k, lambdas[2] * v + (lambdas[3] * ve.view_as(v) if mixed else 0), v

    wanted = plain(h_e4m3.double() * normed_scale(96), w_e4m3.double() * WEIGHT_SCALE)
    found = (*qkv.unbind(1), end.v_proj.view(70, 3, 32))
    tolerance = 1e-3 if DEVICE == "cuda" else 1e-5  # an H100 does not add up e4m3 products in full float32
    assert all(relative(t, exact) < tolerance for t, exact in zip(found, wanted, strict=True))
    assert 1e-3 < relative(found[0], plain(h, qkvo)[0]) < 1 / 16


@pytest.mark.parametrize("dtype, tolerance", [FLOAT32, BF16])
def test_attention_at_the_records_width(dtype, tolerance):
    """Six heads of 128 columns."""
    if DEVICE == "cuda" and dtype == torch.float32:
        pytest.skip("tiles of float32 do not fit the shared memory; a GPU trains in bf16")
    torch.manual_seed(5)
    T, H, C = 70, 6, 768
    args = [leaf(T, C), leaf(T, C), weight(C, 4 * C, scale=C**-0.5), weight(H, 12), make_lambdas()]
    args += [leaf(T, C), make_rotary(T, 128), make_mask([41, 29], T, 37)]
    args = [cast(a, dtype) for a in args]
    douts = [torch.randn(T, C).to(dtype)]
    found = fused_passes(train_gpt.attention_, args, douts, dtype)
    check(found, exact_passes(train_gpt.attention_, args, douts), 3 * tolerance)


def test_attention_gradients_keep_within_e4m3():
    """Those of q, k and v in FP8 are over their scale, and what is beyond its range becomes its largest."""
    torch.manual_seed(0)
    h, qkvo, ve, gate, lambdas, rotary = attention_inputs(77, 2, 32)
    qkv, end = train_gpt.qkv_forward(Normed(h), Weight(qkvo), ve, train_gpt.weight_handle(lambdas), rotary)
    a = train_gpt.attention_forward(*qkv.unbind(1), gate, make_mask([40, 37], 77, 30), rotary.scale)
    dout = 100 * torch.randn(77, 2, 32)
    exact, _ = train_gpt.attention_backward(dout, a, end)
    rounded, _ = train_gpt.attention_backward(dout, a, end, fp8=True)
    wanted = (exact / train_gpt.BLOCK_GRAD_SCALE.value).clamp(-448, 448)
    assert rounded.dtype == torch.float8_e4m3fn and rounded.float().abs().max() == 448
    assert torch.allclose(rounded.float(), wanted, rtol=1 / 15, atol=2**-9)


@pytest.mark.parametrize("name, places, matrices", [("attention_", [2], 4), ("mlp", [2, 3], 1)])
def test_fp8_with_a_gradient_of_any_strides(name, places, matrices):
    """A backward pass takes a gradient that is no contiguous matrix, as that of a sum."""
    torch.manual_seed(0)
    args, _ = operator_cases()[name]
    found = []
    for dout in (torch.full((1, 1), 0.05).expand(37, 48), torch.full((37, 48), 0.05)):
        given = [cast(a, torch.float32) for a in args]
        for i in places:
            given[i].fp8_copies = train_gpt.fp8_copies(given[i].detach(), matrices)
        given = [train_gpt.weight_handle(a) if isinstance(a, nn.Parameter) else a for a in given]
        found.append(passes(getattr(train_gpt, name).fused, given, [dout]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ------------------------------------------------------------------------------------------------------
# MLP


def same(a, b):
    """Whether all numbers are the same, or none at all in the same places."""
    return torch.allclose(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def packed(x):
    """The packed transpose of a matrix of tokens in FP8, with zeros to whole words' 256."""
    padded = torch.zeros(-(-len(x) // 256) * 256, x.size(1))
    padded[: len(x)] = x.float()
    # Of a token's number, 128 i + 16 w + 8 h + r, the word is (w, r), and its byte (i, h).
    return padded.unflatten(0, (-1, 2, 8, 2, 8)).permute(5, 0, 2, 4, 1, 3).flatten(1)


@pytest.mark.parametrize("T, width", [(512, 128), (300, 48), (1, 160)])
def test_fp8_transposes(T, width):
    """Packed transposes have each byte in its place, and rounding keeps what is too large at the bounds."""
    torch.manual_seed(T)
    x = torch.randn(T, width).bfloat16()
    x[0, :3] = torch.tensor([1e4, -1e4, float("nan")])
    e4m3, transpose = train_gpt.e4m3_and_transpose(x, 2.0**-5)
    assert same(e4m3, to_e4m3(x, 2.0**-5)) and e4m3[0, :2].tolist() == [448, -448]
    assert same(transpose, packed(e4m3))
    assert same(train_gpt.packed_transpose(e4m3), transpose)


@pytest.mark.parametrize("T, width, hidden", [(288, 64, 272), (129, 80, 96), (1, 32, 64)])
def test_mlp_kernels(T, width, hidden):
    """Hidden units and their gradient are those of the e4m3 operands, rounded, and so are transposes."""
    torch.manual_seed(T)
    h = train_gpt.rms_norm(torch.randn(T, width))
    c_fc, c_proj = 0.1 * torch.randn(width, hidden), 0.3 * torch.randn(width, hidden)
    check_mlp_kernels(h, c_fc, c_proj, torch.randn(T, width))


def check_mlp_kernels(h, c_fc, c_proj, dy):
    """Compare the kernels with products in float64."""
    scale = normed_scale(h.size(1))
    h, dy = to_e4m3(h, scale), to_e4m3(dy, 2.0**-5)
    c_fc_t, c_proj_t = (to_e4m3(w.t().contiguous(), WEIGHT_SCALE) for w in (c_fc, c_proj))
    squares = train_gpt.mlp_forward(h, c_fc_t, scale * WEIGHT_SCALE)
    wanted = torch.relu((h.double() * scale) @ (c_fc_t.double() * WEIGHT_SCALE).t()).square()
    assert squares.dtype == torch.float8_e4m3fn
    assert torch.allclose(squares.double(), wanted, rtol=1 / 15, atol=2**-9)
    assert relative(squares, wanted) < 0.04
    dhidden, dhidden_t, squares_t = train_gpt.mlp_backward(dy, c_proj_t, squares, WEIGHT_SCALE / 8)
    wanted = (dy.double() @ c_proj_t.double().t()) * (WEIGHT_SCALE / 4) * squares.double().sqrt()
    assert wanted.abs().max() < 448 and wanted.std() > 1  # nothing is cut off, little is below e4m3's range
    assert torch.allclose(dhidden.double(), wanted, rtol=1 / 15, atol=2**-9)
    for x, found in ((dhidden, dhidden_t), (squares, squares_t)):
        assert found.dtype == torch.float8_e4m3fn and torch.equal(found.float(), packed(x))
    for a, x, b, y in (
        (train_gpt.packed_transpose(dy), dy, squares_t, squares),
        (train_gpt.packed_transpose(h), h, dhidden_t, dhidden),
    ):
        grad = torch.ones(len(a), len(b))
        train_gpt.add_fp8_product_(grad, a, b, 2.0**-7)
        wanted = 2.0**-7 * x.double().t() @ y.double()
        # Fast sums, of 13 bits or so, would be off by more on a GPU.
        assert relative(grad - 1, wanted) < (2e-3 if grad.is_cuda else 1e-5)


def sparse(path, *shape):
    """An int32 tensor of zeros that takes room only where it is written."""
    size = torch.Size(shape).numel()
    with open(path, "wb") as file:
        file.truncate(4 * size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.int32).view(shape)


@pytest.mark.skipif(DEVICE == "cuda", reason="takes a file for memory")
def test_offsets_beyond_32_bits(tmp_path, monkeypatch):
    """Each word of a transpose goes where it belongs, by both kernels, and each byte comes from there."""
    count = 2**26  # words a column, of which the first 64 are written
    sizes = (256, 32), (48, 32), (256, 48)
    dy, weight, hidden = (torch.rand(*size).to(torch.float8_e4m3fn) for size in sizes)
    _, *wanted = train_gpt.mlp_backward(dy, weight, hidden, 1.0)
    monkeypatch.setattr(train_gpt, "empty_words", lambda x, n: sparse(tmp_path / "two", n, x.size(1), count))
    _, *found = train_gpt.mlp_backward(dy, weight, hidden, 1.0)
    assert all(torch.equal(a[:, :256].float(), b.float()) for a, b in zip(found, wanted, strict=True))
    words = sparse(tmp_path / "one", 48, count)
    given = hidden.view(torch.uint8), None, words, 256, 48, count
    train_gpt._transpose_kernel[1, 1](*given, SCALE=1.0, BM=64, BN=64)
    assert torch.equal(words[:, :64].contiguous().view(hidden.dtype).float(), packed(hidden))
    wide = sparse(tmp_path / "wide", 256, 2**22).view(
        torch.uint8
    )  # of which the first 48 columns are written
    wide[:, :48] = hidden.view(torch.uint8)
    words = torch.empty(64, 64, dtype=torch.int32)
    train_gpt._transpose_kernel[1, 1](wide, None, words, 256, 2**24, 64, SCALE=1.0, BM=64, BN=64)
    assert torch.equal(words[:48].view(hidden.dtype).float(), packed(hidden))


def test_mlp_backward_keeps_within_e4m3():
    """What is beyond its range becomes its largest number, in the transpose too."""
    dy, weight = torch.full((16, 32), 100.0), torch.full((64, 32), 100.0)
    weight[1::2] *= -1
    made = [t.to(torch.float8_e4m3fn) for t in (dy, weight, torch.ones(16, 64))]
    dhidden, dhidden_t, _ = train_gpt.mlp_backward(*made, 1.0)
    wanted = torch.tensor([448.0, -448.0]).repeat(16, 32)
    assert torch.equal(dhidden.float(), wanted) and torch.equal(dhidden_t.float(), packed(wanted))


def test_mlp_kernels_at_the_records_width(monkeypatch):
    """With the tiles that an H100 has, which do not divide T."""
    if DEVICE == "cpu":
        monkeypatch.undo()
    torch.manual_seed(4)
    h = train_gpt.rms_norm(torch.randn(150, 768)).bfloat16()
    c_fc, c_proj = (0.02 * torch.randn(768, 3072).bfloat16() for _ in range(2))
    check_mlp_kernels(h, c_fc, 5 * c_proj, torch.randn(150, 768).bfloat16())


def test_which_fp8_products_take_fast_sums(train_in_fp8, monkeypatch):
    """Those over the width or the hidden units do; weights' gradients, and the head's both, do not."""
    train_in_fp8("head", "blocks")
    seen, product = [], train_gpt.fp8_product

    def noted(a, b, scale, dtype, fast=True):
        seen.append((a.size(1), fast))
        return product(a, b, scale, dtype, fast)

    monkeypatch.setattr(train_gpt, "fp8_product", noted)
    T, C = 16, 48
    x, h = leaf(T, C), leaf(T, C)
    c_fc, c_proj, lm_head = weight(C, 4 * C), weight(C, 4 * C), weight(64, C)
    for p in (c_fc, c_proj, lm_head):
        p.fp8_copies = train_gpt.fp8_copies(p.detach(), 1)
    handles = [train_gpt.weight_handle(p) for p in (c_fc, c_proj, lm_head)]
    y = train_gpt.mlp_fused(x, h, *handles[:2])
    targets = torch.zeros(T, dtype=torch.int32)
    train_gpt.head_loss_fused(y.bfloat16(), handles[2], targets).sum().backward()
    head = [(C, True), (64, False), (T, False)]
    mlp = [(256, False), (256, False), (4 * C, True)]
    assert seen == [(4 * C, True), *head, *mlp]


def test_normed_scale():
    """What norm can give fits into e4m3, and no bit of it is wasted."""
    width = 64
    spike = train_gpt.rms_norm(torch.eye(width))
    largest = to_e4m3(spike, normed_scale(width)).float().max()
    assert 224 < largest <= 448 and math.log2(normed_scale(width)).is_integer()


# ------------------------------------------------------------------------------------------------------
# Loss

APPROXIMATE = 2e-3 if DEVICE == "cuda" else 1e-5  # the interpreter's tanh is exact


def plain_loss(z, targets):
    """The softcapped cross-entropy, every step in z's dtype."""
    return F.cross_entropy(30 * torch.sigmoid(z / 7.5), targets.long(), reduction="none")


@pytest.mark.parametrize("T, V", [(5, 384), (67, 300), (1, 129)])
@pytest.mark.parametrize("dtype, tolerance", [FLOAT32, BF16])
def test_softcapped_cross_entropy(T, V, dtype, tolerance):
    """The loss that stands alone and its gradient; and the loss with an approximate softcap."""
    torch.manual_seed(V)
    z = (8 * torch.randn(T, V)).to(dtype).requires_grad_()
    targets, dloss = torch.randint(V, (T,), dtype=torch.int32), torch.rand(T)
    exact = z.detach().double().requires_grad_()
    wanted = plain_loss(exact, targets)
    wanted.backward(dloss.double())
    loss = train_gpt.softcapped_cross_entropy_fused(z, targets)
    loss.backward(dloss)
    assert loss.dtype == torch.float32 and z.grad.dtype == dtype
    assert relative(train_gpt.softcapped_cross_entropy.definition(z, targets), wanted) < 1e-5
    assert relative(loss, wanted) < 1e-5
    with torch.no_grad():
        assert relative(train_gpt.softcapped_cross_entropy_fused(z, targets), wanted) < 1e-5
    assert (
        relative(train_gpt.cross_entropy_forward(z.detach(), targets, exact=False)[0], wanted) < APPROXIMATE
    )
    assert relative(z.grad, exact.grad) < tolerance


def test_loss_at_the_records_vocabulary():
    """Its gradient takes the interpreter half a minute, so it is tested on a GPU."""
    torch.manual_seed(1)
    z = (4 * torch.randn(2, 50_304)).bfloat16().requires_grad_()
    targets = torch.tensor([50_256, 0], dtype=torch.int32)
    exact = z.detach().double().requires_grad_()
    wanted = plain_loss(exact, targets)
    loss = train_gpt.softcapped_cross_entropy_fused(z, targets)
    assert relative(loss, wanted) < 1e-5
    assert (
        relative(train_gpt.cross_entropy_forward(z.detach(), targets, exact=False)[0], wanted) < APPROXIMATE
    )
    if DEVICE == "cuda":
        wanted.sum().backward()
        loss.sum().backward()
        assert relative(z.grad, exact.grad) < 1e-2


def test_softcapped_cross_entropy_of_a_transposed_tensor():
    z, targets = leaf(40, 12), torch.randint(40, (12,), dtype=torch.int32)
    exact = cast(z, torch.float64)
    plain_loss(exact.t(), targets).sum().backward()
    train_gpt.softcapped_cross_entropy_fused(z.t(), targets).sum().backward()
    assert relative(z.grad, exact.grad) < 1e-5


def test_loss_fp8_gradient_and_its_transpose():
    z, targets = 4 * torch.randn(140, 300), torch.randint(300, (140,), dtype=torch.int32)
    _, lse = train_gpt.cross_entropy_forward(z, targets, exact=True)
    wanted, _ = train_gpt.cross_entropy_backward(z, targets, lse, torch.ones(140), fp8=False)
    _, lse = train_gpt.cross_entropy_forward(z, targets, exact=False)
    dz, dzt = train_gpt.cross_entropy_backward(z, targets, lse, torch.ones(140), fp8=True)
    assert dz.dtype == dzt.dtype == torch.float8_e5m2
    assert torch.equal(dz.float(), dzt.float().t())
    rounded = (wanted / train_gpt.LOGIT_GRAD_SCALE).half().to(torch.float8_e5m2).float()
    limit = 0.01 if DEVICE == "cuda" else 1e-3  # where one is next to the middle of two
    assert (dz.float() != rounded).float().mean() < limit
    assert relative(dz.float() * train_gpt.LOGIT_GRAD_SCALE, wanted) < 0.1  # e5m2 has two bits of mantissa


@pytest.mark.parametrize(
    "T, fp8, copies, loss_tolerance, tolerance",
    [(256, False, False, 1e-3, 1e-2), (256, True, True, 1e-2, 5e-2), (32, True, False, 1e-2, 5e-2)],
)
def test_head_loss(T, fp8, copies, loss_tolerance, tolerance, operators, train_in_fp8):
    """In bf16 and in FP8, with a bank's copies or, for a table that has none, with copies made on the way."""
    train_in_fp8(*["head"] * fp8)
    torch.manual_seed(T)
    C, V = 768, 1024
    h = train_gpt.rms_norm(torch.randn(T, C).bfloat16()).requires_grad_()
    p = nn.Parameter((0.02 * torch.randn(V, C)).bfloat16())
    p.grad_dtype = torch.float32
    p.grad = torch.ones(V, C)
    targets = torch.randint(V, (T,), dtype=torch.int32)
    exact_h, exact_p = (t.detach().double().requires_grad_() for t in (h, p))
    wanted = plain_loss(exact_h @ exact_p.t(), targets)
    wanted.sum().backward()
    if copies:
        p.fp8_copies = train_gpt.fp8_copies(p.detach(), 1)
    loss = train_gpt.head_loss_fused(h, train_gpt.weight_handle(p), targets)
    loss.sum().backward()
    assert relative(loss, wanted) < loss_tolerance and p.grad.dtype == torch.float32
    assert relative(h.grad, exact_h.grad) < tolerance and relative(p.grad - 1, exact_p.grad) < tolerance
    with torch.no_grad():  # an evaluation reads the weight itself, and takes no short cut
        loss = train_gpt.head_loss_fused(h, train_gpt.weight_handle(p), targets)
    plain = plain_loss((h @ p.t()).detach().double(), targets)
    assert relative(loss, plain) < 1e-5


# ------------------------------------------------------------------------------------------------------
# Embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, C", [(1, 5), (50, 300)])
def test_scatter_add(T, C, dtype):
    table, tokens, rows = torch.randn(9, C), torch.randint(9, (T,), dtype=torch.int32), torch.randn(T, C)
    rows = rows.to(dtype)
    wanted = table.clone().index_add_(0, tokens, rows.float())
    train_gpt.scatter_add_(table, tokens, rows)
    assert torch.allclose(table, wanted, atol=1e-5)


@pytest.mark.parametrize("version", ["definition", "fused"])
def test_embedding_adds_to_the_gradient(version):
    table = nn.Parameter(torch.randn(10, 4))
    tokens = torch.tensor([3, 3, 7], dtype=torch.int32)
    for _ in range(2):
        given = train_gpt.weight_handle(table) if version == "fused" else table
        rows = getattr(train_gpt.embedding, version)(tokens, given)
        assert torch.equal(rows, table[tokens.long()])
        (rows * torch.tensor([[1.0], [2.0], [5.0]])).sum().backward()
    wanted = torch.zeros(10, 4)
    wanted[3], wanted[7] = 6.0, 10.0
    assert torch.equal(table.grad, wanted)


# ------------------------------------------------------------------------------------------------------
# Blocks and the whole model, as a GPU trains them

SIZES = dataclasses.replace(
    train_gpt.Hyperparameters(), model_dim=64, num_heads=2, vocab_size=257, micro_batches=1
)


def randomized(module, scale=0.1):
    """Move every parameter away from where it starts, often zero, so that every part counts."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module


def in_float64(make, module):
    """The same module in float64 on the CPU, made anew; gradients start at ones."""
    with torch.device("cpu"):
        exact = make(torch.float64)
    for p, q in zip(exact.parameters(), module.parameters(), strict=True):
        p.data = q.detach().double().cpu()
        p.grad = torch.ones_like(p)
    return exact


def in_banks(module):
    """Give a module's parameters to banks, as training does, with FP8 copies; gradients start at ones."""
    world = train_gpt.World(device=torch.device(DEVICE))
    banks = [bank for kind in ("normuon", "adam") for bank in train_gpt.make_banks(module, kind, world)]
    for bank in banks:
        for p in bank.parameters:
            bank.quantize(p)
        bank.grad.fill_(1)
    return banks


def parameter_gradients(module):
    """Each parameter's gradient by name, less the ones that it started with."""
    return {name: p.grad.double().cpu() - 1 for name, p in module.named_parameters()}


def run_block(block, tensors, dout, mixed, rotary, mask, dtype, device):
    """A block's output, and all gradients by name."""
    leaves = [cast(t, dtype, device).requires_grad_() for t in tensors]
    x, x0, ve = leaves
    out = block(x, x0, ve if mixed else None, cast(rotary, dtype, device), cast(mask, dtype, device))
    out.backward(dout.to(out))
    grads = {name: t.grad for name, t in zip(("x", "x0", "ve"), leaves, strict=True) if t.grad is not None}
    return {"out": out.detach()} | grads | parameter_gradients(block)


def compare_blocks(mixed, paths, fp8, unfused=()):
    """A block as a GPU trains it, some operators by their definitions, beside the definitions in float64."""
    dtype, tolerance = (torch.bfloat16, 3e-2) if DEVICE == "cuda" else (torch.float32, 1e-4)
    torch.manual_seed(0)
    T, width = 96, 64
    layer = train_gpt.Layer(attention=paths[0], mlp=paths[1])

    def make(dtype):
        return train_gpt.Block(SIZES, layer, dtype, torch.Generator())

    with torch.device("cpu"):
        block = make(dtype)
    randomized(block)
    for gate in block.gate:
        gate.data = torch.randn_like(gate)
    block.to(DEVICE)
    inputs = [torch.randn(T, width) for _ in range(3)], 0.02 * torch.randn(T, width), mixed
    inputs += make_rotary(T, 32), make_mask([40, 56], T, 30)
    wanted = run_block(in_float64(make, block), *inputs, torch.float64, "cpu")
    in_banks(block)
    train_gpt.run_operators_on_gpu()
    found = run_block(block, *inputs, dtype, DEVICE)
    assert found.keys() == wanted.keys() and len(found) > 4
    for name, exact in wanted.items():
        # Lambdas and gates are few sums, of which no rounding averages out; kernels have tests without it.
        rounded = 0.4 if name == "lambdas" else 0.15 if "gate" in name else 0.1
        if exact.norm() == 0:
            assert not found[name].any(), name
        else:
            assert relative(found[name], exact) < (rounded if fp8 else tolerance), name


BLOCKS = [
    (True, (1, 1), False),
    (False, (1, 1), False),
    (True, (1, 1), True),
    (True, (2, 2), False),
    (True, (2, 2), True),
    (False, (0, 1), True),
    (True, (1, 0), True),
]


@pytest.mark.parametrize("mixed, paths, fp8", BLOCKS)
def test_block(mixed, paths, fp8, operators, train_in_fp8):
    """A layer by its kernels: output and gradients, added to what was there, are the definitions'."""
    train_in_fp8(*["blocks"] * fp8)
    compare_blocks(mixed, paths, fp8)


@pytest.mark.parametrize("in_fp8", [{"qkvo": 4}, {"c_fc": 1, "c_proj": 1}, {"c_fc": 1}, {"c_proj": 1}])
def test_block_of_which_a_part_is_in_fp8(in_fp8, operators, train_in_fp8, monkeypatch):
    """A weight without FP8 copies keeps its products in their dtype, whatever activations have."""
    train_in_fp8("blocks")
    monkeypatch.setattr(train_gpt, "FP8_WEIGHTS", in_fp8)
    compare_blocks(True, (1, 1), True)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("name", ["mix_norm", "norm", "attention_", "flash_attention", "mlp"])
def test_block_with_an_unfused_operator(name, fp8, operators, train_in_fp8, monkeypatch):
    """Any operator may run by its definition among fused ones, which then give it what it asks for."""
    train_in_fp8(*["blocks"] * fp8)
    monkeypatch.setattr(getattr(train_gpt, name), "fused", None)
    compare_blocks(True, (1, 1), fp8)


def run_model(model, batch, inputs):
    """The loss of each token, and the gradient of every parameter by name."""
    losses = model(batch, inputs)
    losses.sum().backward()
    return losses.detach(), parameter_gradients(model)


@pytest.mark.parametrize("fp8", [False, True])
def test_model(fp8, operators, train_in_fp8, monkeypatch):
    """A whole model by its fused versions: losses and every gradient are the definitions'.

    In FP8 all else is in bf16, on a CPU too: there a dtype that does not fit another shows.
    """
    train_in_fp8(*["head", "blocks"] * fp8)
    dtype = torch.bfloat16 if fp8 or DEVICE == "cuda" else torch.float32
    monkeypatch.setattr(train_gpt.World, "dtype", dtype)
    exactness = 3e-2 if dtype == torch.bfloat16 else 1e-4
    loss_tolerance, tolerance = (3e-2, 0.3) if fp8 else (exactness, exactness)
    torch.manual_seed(0)
    T = 32

    def make(dtype):
        return train_gpt.GPT(SIZES, T, dtype)

    with torch.device("cpu"):
        model = make(dtype)
    randomized(model).to(DEVICE)
    tokens = torch.randint(257, (T + 1,), dtype=torch.int32)
    bounds = torch.tensor([[0] * 14 + [14] * (T - 14), [13] * 14 + [T - 1] * (T - 14)], dtype=torch.int32)
    batch = train_gpt.Batch(tokens[:-1], tokens[1:], *bounds)
    inputs = train_gpt.StepInputs(*torch.tensor([5, 12], dtype=torch.int32))
    exact = in_float64(make, model)
    losses, grads = run_model(exact, *(cast(t, torch.float64, "cpu") for t in (batch, inputs)))
    in_banks(model)
    train_gpt.run_operators_on_gpu()
    found_losses, found = run_model(model, batch, inputs)
    assert relative(found_losses, losses) < loss_tolerance
    assert found.keys() == grads.keys() and not found["blocks.0.lambdas"].any()
    few = [name for name, grad in grads.items() if grad.numel() < 64]
    for name in grads.keys() - set(few):
        # Near one, at which gradients start, numbers in bf16 are 2^-7 apart.
        spacing = 2**-7 if model.get_parameter(name).grad.dtype == torch.bfloat16 else 0
        bound = tolerance * grads[name].norm() + spacing * (grads[name].numel() / 12) ** 0.5
        assert (found[name] - grads[name]).norm() < bound, name
    # The few sums together: where they cancel, one is rough.
    few_found, few_wanted = (torch.cat([each[name].flatten() for name in few]) for each in (found, grads))
    assert relative(few_found, few_wanted) < tolerance
    with torch.no_grad():
        model.eval()
        assert relative(model(batch, inputs), losses) < exactness  # an evaluation is not in FP8


def test_fp8_gradients_are_those_of_what_the_products_read():
    """Both kinds of path, with e4m3 copies far from the weights: the definitions' with the copies' values.

    Gradients of the MLP and of q, k and v are rounded to e4m3 besides, by 2.5 % or so.
    """
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    torch.manual_seed(0)
    T, heads, width = 48, 2, 64  # a norm's scale is another one for T columns
    x, dout = leaf(T, width), 0.05 * torch.randn(T, width)
    scale = normed_scale(width)
    h_e4m3 = to_e4m3(train_gpt.rms_norm(torch.randn(T, width)), scale)
    h = (h_e4m3.float() * scale).requires_grad_()
    e4m3 = [to_e4m3(0.1 * torch.randn(width, 4 * width), WEIGHT_SCALE) for _ in range(3)]
    values = [t.float() * WEIGHT_SCALE for t in e4m3]
    off = [nn.Parameter(1.3 * t) for t in values]  # what the weights are, beside what is read of them
    o_off = torch.cat([values[0].view(4, -1)[:3], off[0].detach().view(4, -1)[3:]])  # O is not in e4m3
    gate, lambdas, rotary = weight(heads, 12), make_lambdas(), make_rotary(T, 32)
    mask = make_mask([20, 28], T, 30)

    def with_copies(w, i, columns):
        return w._replace(e4m3=e4m3[i], e4m3_t=e4m3[i].view(-1, columns).t().contiguous())

    def attend(x, h, qkvo, gate, lambdas):
        qkvo = with_copies(qkvo, 0, width)
        turned = cast(rotary, dtype)
        return train_gpt.attention_fused_(x, Normed(h, h_e4m3), qkvo, gate, lambdas, None, turned, mask)

    def attend_exactly(x, h, qkvo, gate, lambdas):
        rest = (cast(t, torch.float64, "cpu") for t in (rotary, mask))
        return train_gpt.attention_.definition(x, h, qkvo, gate, lambdas, None, *rest)

    def transform(x, h, c_fc, c_proj):
        c_fc, c_proj = with_copies(c_fc, 1, 4 * width), with_copies(c_proj, 2, 4 * width)
        return train_gpt.mlp_fused(x, Normed(h, h_e4m3), c_fc, c_proj)

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            squares = torch.relu(x).square().float().to(torch.float8_e4m3fn).to(x)
            ctx.save_for_backward(squares)
            return squares

        @staticmethod
        def backward(ctx, dout):
            return dout * 2 * ctx.saved_tensors[0].sqrt()

    def transform_exactly(x, h, c_fc, c_proj):
        return x + Rounded.apply(h @ c_fc) @ c_proj.t()

    attention = SimpleNamespace(fused=attend, definition=attend_exactly)
    mlp = SimpleNamespace(fused=transform, definition=transform_exactly)
    read = [nn.Parameter(o_off.view_as(values[0])), *map(nn.Parameter, values[1:])]
    for operator, ours, theirs in (
        (attention, [off[0], gate, lambdas], [read[0], gate, lambdas]),
        (mlp, off[1:], read[1:]),
    ):
        found = fused_passes(operator, [x, h, *ours], [dout], dtype)
        check(found, exact_passes(operator, [x, h, *theirs], [dout]), 4e-2)
