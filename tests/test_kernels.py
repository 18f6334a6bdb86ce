"""Kernels against their plain PyTorch references, forward and backward: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

import train_gpt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_device():
    """New tensors land on the device under test."""
    with torch.device(DEVICE):
        yield


def visible(lengths, T, window):
    """first and last, int32 (T,), of packed documents of these lengths (the last one is cut at T)."""
    ends = torch.tensor(lengths).cumsum(0).clamp(max=T)
    spans = torch.diff(ends, prepend=ends.new_zeros(1))
    starts, at = (ends - spans).repeat_interleave(spans), torch.arange(T)
    lasts = (ends - 1).repeat_interleave(spans)
    return torch.maximum(starts, at - window).int(), torch.minimum(lasts, at + window).int()


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


ATTENTION_CASES = {
    "documents of length 1": ([1] * 70 + [30], 100, 16),
    "one document, T no multiple of a tile": ([77], 77, 200),
    "window longer than any document": ([40, 5, 90, 20], 155, 1000),
    "window shorter than documents": ([150, 43], 193, 33),
    "window 0": ([60, 10], 70, 0),
    "one token": ([1], 1, 128),
    "whole tiles": ([64, 64, 128], 256, 64),
}


def attention_inputs(T, heads, head_dim, mixed=True):
    """qkv, value, l0, l1, gate, cos and sin of `attention`."""
    value, angles = torch.randn(T, heads * head_dim), torch.randn(T + 5, head_dim // 2)
    return [torch.randn(T, 3, heads, head_dim), value if mixed else None, torch.tensor(0.7), torch.tensor(-0.4), 3 * torch.randn(T, heads), angles.cos(), angles.sin()]


def plain_attention(qkv, value, l0, l1, gate, cos, sin, first, last, scale):
    return train_gpt.attention_reference(*train_gpt.heads_reference(qkv, value, l0, l1, cos, sin), gate, first, scale)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(case, dtype, tolerance):
    lengths, T, window = ATTENTION_CASES[case]
    torch.manual_seed(T)
    first, last = visible(lengths, T, window)
    mixed = case != "window longer than any document"
    inputs, dout = [t if t is None or not t.dim() else t.to(dtype) for t in attention_inputs(T, 2, 32, mixed)], torch.randn(T, 2, 32).to(dtype)
    results = []
    for function, move in ((plain_attention, lambda t: t.double()), (lambda *tensors: train_gpt.attention_forward(*tensors)[0], lambda t: t.clone())):
        tensors = [None if t is None else move(t).requires_grad_(i < 5) for i, t in enumerate(inputs)]
        out = function(*tensors, first, last, move(torch.tensor(0.117)))
        out.backward(move(dout))
        results.append((out.detach(), *(t.grad for t in tensors[:5] if t is not None)))
    (wanted, dqkv, *exact), (out, found_dqkv, *found) = results
    assert out.dtype == dtype and relative(out, wanted) < tolerance
    for part in range(3):
        if part == 2 or window and case != "one token":  # else q and k have no gradient
            # The output, from which the gradients of q and k come, is rounded behind its gate.
            assert relative(found_dqkv[:, part], dqkv[:, part]) < (tolerance if part == 2 else 3 * tolerance)
        else:
            assert found_dqkv[:, part].abs().max() < 5 * tolerance
    for ours, grad in zip(found, exact, strict=True):
        assert ours == 0 if grad is None else relative(ours, grad) < 3 * tolerance


def test_attention_gate_that_is_shut():
    """Where a gate's sigmoid underflows, output and gradients are zero and nothing is lost to infinities."""
    first, last = visible([40], 40, 40)
    inputs = attention_inputs(40, 1, 16)
    inputs[4].fill_(-200.0)
    results = train_gpt.attention_forward(*inputs, first, last, torch.tensor(0.1))
    grads = train_gpt.attention_backward(torch.randn(40, 1, 16), *inputs, first, last, torch.tensor(0.1), *results)
    assert all(t.abs().max() == 0 for t in (results[0], *grads))


def test_attention_mask_is_the_interval():
    """A key outside first[i]..i has no influence, one inside has, in the reference and in the kernel."""
    first, last = visible([20, 30], 50, 7)
    inputs = attention_inputs(50, 1, 16)
    for attend in (plain_attention, lambda *tensors: train_gpt.attention_forward(*tensors)[0]):
        changed = inputs[0].clone()
        changed[24, 2] += 1
        outs = [attend(qkv, *inputs[1:], first, last, torch.tensor(0.1)) for qkv in (inputs[0], changed)]
        moved = (outs[0] != outs[1]).any(-1).any(-1)
        assert moved.nonzero().flatten().tolist() == list(range(24, 32))


@pytest.mark.parametrize("T, width, hidden", [(129, 72, 264), (1, 16, 64), (40, 64, 32)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_mlp(T, width, hidden, dtype, tolerance, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(train_gpt, "MLP_TILE", (32, 64, 128, 4, 2))
    elif dtype == torch.float32:
        pytest.skip("a tile of float32 does not fit the shared memory; a GPU trains in bf16")
    torch.manual_seed(T)
    x, w_in, w_out, dout = (torch.randn(*shape).to(dtype) for shape in ((T, width), (width, hidden), (width, hidden), (T, width)))
    exact = [t.double().requires_grad_() for t in (x, w_in, w_out)]
    wanted = train_gpt.mlp_reference(*exact)
    wanted.backward(dout.double())
    out, squares = train_gpt.mlp_forward(x, w_in, w_out, None, None, None)
    grads = train_gpt.mlp_backward(dout, x, w_in, w_out, squares)
    assert relative(out, wanted.detach()) < tolerance
    for grad, tensor in zip(grads, exact, strict=True):
        assert grad.dtype == dtype and relative(grad, tensor.grad) < tolerance


@pytest.mark.parametrize("T, width, hidden", [(144, 64, 272), (16, 32, 64)])
def test_fp8_products(T, width, hidden, monkeypatch):
    """Of the block: they are those of the operands rounded to e4m3, and 1 for 16 off the exact ones; gradients are exact ones'."""
    if DEVICE == "cpu":
        monkeypatch.setattr(train_gpt, "MLP_TILE", (32, 64, 32, 4, 2))
    torch.manual_seed(T)
    x = train_gpt.norm(torch.randn(T, width).bfloat16())
    w_in, w_out, w = (0.1 * torch.randn(width, hidden).bfloat16() for _ in range(3))

    def rounded(t, scale):
        return (t.double() / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale

    x8, in8, out8, w8 = rounded(x, width**0.5 / 448), *(rounded(t, 2.0**-9) for t in (w_in, w_out, w))
    wanted = torch.relu(x8 @ in8).square()
    copy = lambda t: train_gpt.to_e4m3(t, 1 / train_gpt.WEIGHT_SCALE)  # noqa: E731
    xe = train_gpt.to_e4m3(x, 1 / train_gpt.normed_scale(x))
    out, squares = train_gpt.mlp_forward(x, w_in, w_out, xe, copy(w_in.t().contiguous()), copy(w_out))
    spike = train_gpt.norm(torch.eye(width))
    assert train_gpt.to_e4m3(spike, 1 / train_gpt.normed_scale(spike)).float().max() == 448  # what norm can give fills the range
    assert relative(squares, wanted) < 1e-2
    assert relative(out, rounded(wanted, 1.0) @ out8.t()) < 2e-2
    assert 1e-3 < relative(out, train_gpt.mlp_reference(x.double(), w_in.double(), w_out.double())) < 1 / 16
    leaves = [x.clone().requires_grad_(), w.t().contiguous().requires_grad_()]
    (product, _), dout = train_gpt.linear_forward(leaves[0], xe, leaves[1], copy(leaves[1].detach()), None), torch.randn(T, hidden).bfloat16()
    product.backward(dout)
    assert relative(product.detach(), x8 @ w8) < 1e-2
    assert relative(leaves[0].grad, dout.double() @ w.t().double()) < 1e-2 and relative(leaves[1].grad, dout.t().double() @ x.double()) < 1e-2


APPROXIMATE = 2e-3 if DEVICE == "cuda" else 1e-5  # the interpreter's tanh is exact


@pytest.mark.parametrize("T, V", [(5, 384), (67, 300), (1, 129)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_loss(T, V, dtype, tolerance):
    torch.manual_seed(V)
    z = (8 * torch.randn(T, V)).to(dtype)
    targets, dloss = torch.randint(V, (T,), dtype=torch.int32), torch.rand(T)
    exact = z.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(30 * torch.sigmoid(exact / 7.5), targets.long(), reduction="none")
    wanted.backward(dloss.double())
    loss, lse = train_gpt.loss_forward(z, targets, exact=True)
    dz, _ = train_gpt.loss_backward(z, targets, lse, dloss, fp8=False)
    assert relative(train_gpt.loss_reference(z, targets), wanted.detach()) < 1e-5
    assert relative(loss, wanted.detach()) < 1e-5
    assert relative(train_gpt.loss_forward(z, targets, exact=False)[0], wanted.detach()) < APPROXIMATE
    assert relative(dz, exact.grad) < tolerance


def test_loss_fp8_gradient_and_its_transpose():
    z, targets = 4 * torch.randn(140, 300), torch.randint(300, (140,), dtype=torch.int32)
    _, lse = train_gpt.loss_forward(z, targets, exact=True)
    wanted, _ = train_gpt.loss_backward(z, targets, lse, torch.ones(140), fp8=False)
    _, lse = train_gpt.loss_forward(z, targets, exact=False)
    dz, dzt = train_gpt.loss_backward(z, targets, lse, torch.ones(140), fp8=True)
    assert dz.dtype == dzt.dtype == torch.float8_e5m2
    assert torch.equal(dz.float(), dzt.float().t())
    rounded = (wanted / train_gpt.GRAD_SCALE).half().to(torch.float8_e5m2).float()
    assert (dz.float() != rounded).float().mean() < (0.01 if DEVICE == "cuda" else 1e-3)  # where one is next to the middle of two
    assert relative(dz.float() * train_gpt.GRAD_SCALE, wanted) < 0.1  # e5m2 has two bits of mantissa


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, C", [(1, 5), (50, 300)])
def test_scatter_add(T, C, dtype):
    table, tokens, rows = torch.randn(9, C), torch.randint(9, (T,), dtype=torch.int32), torch.randn(T, C).to(dtype)
    wanted = table.clone().index_add_(0, tokens, rows.float())
    train_gpt.scatter_add(table, tokens, rows)
    assert torch.allclose(table, wanted, atol=1e-5)


@pytest.mark.parametrize("fp8, loss_tolerance, tolerance", [(False, 1e-3, 1e-2), (True, 1e-2, 5e-2)])
def test_head_products(fp8, loss_tolerance, tolerance):
    x = train_gpt.norm(torch.randn(256, 768).bfloat16()).requires_grad_()
    weight, targets = (0.02 * torch.randn(1024, 768)).bfloat16().requires_grad_(), torch.randint(1024, (256,), dtype=torch.int32)
    weight.grad_dtype = torch.float32
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = torch.nn.functional.cross_entropy(30 * torch.sigmoid(exact[0] @ exact[1].t() / 7.5), targets.long(), reduction="none")
    wanted.sum().backward()
    w8 = train_gpt.to_e4m3(weight.detach(), 1 / train_gpt.WEIGHT_SCALE)
    copies = (train_gpt.to_e4m3(x.detach(), 1 / train_gpt.normed_scale(x)), w8, w8.t().contiguous()) if fp8 else None
    loss = train_gpt._HeadLoss.apply(x, weight, targets, copies)  # the path of a GPU, also where there is none
    loss.sum().backward()
    assert relative(loss, wanted) < loss_tolerance and weight.grad.dtype == torch.float32
    assert relative(x.grad, exact[0].grad) < tolerance and relative(weight.grad, exact[1].grad) < tolerance


def test_lookup_adds_to_the_gradient():
    table = torch.nn.Parameter(torch.randn(10, 4))
    tokens = torch.tensor([3, 3, 7], dtype=torch.int32)
    for _ in range(2):
        (train_gpt.lookup(tokens, table) * torch.tensor([[1.0], [2.0], [5.0]])).sum().backward()
    wanted = torch.zeros(10, 4)
    wanted[3], wanted[7] = 6.0, 10.0
    assert torch.equal(table.grad, wanted)


def test_norm():
    x = torch.randn(7, 33, dtype=torch.double) * 1e-3
    wanted = x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()
    assert relative(train_gpt.norm(x.float()), wanted) < 1e-6


@pytest.mark.parametrize("T, width", [(37, 48), (130, 768)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_mix(T, width, dtype, tolerance):
    """Two layers that mix the same x0: outputs, the e4m3 copy and all gradients, of which that of x0 is one for both."""
    torch.manual_seed(T)
    x, x0 = (torch.randn(T, width).to(dtype).requires_grad_() for _ in range(2))
    lambdas = [torch.tensor([1.1, 0.3, 0.5, 0.5], requires_grad=True), torch.tensor([0.9, -0.2, 0.5, 0.5], requires_grad=True)]
    douts = [torch.randn(T, width).to(dtype) for _ in range(3)]

    def run(mix, x, x0, douts, first, second):
        once, normed = mix(x, x0, first)
        twice, again = mix(once + 0.5 * normed, x0, second)
        torch.autograd.backward((normed, twice, again), douts)
        return normed, twice, again, x.grad, x0.grad, first.grad, second.grad

    shared, copies = {}, []

    def ours(*tensors):
        *outputs, copy = train_gpt._Mix.apply(*tensors, shared, True)
        copies.append(copy)
        return outputs

    found = run(ours, x, x0, douts, *lambdas)
    exact = [t.detach().double().requires_grad_() for t in (x, x0)]
    wanted = run(train_gpt.mix_reference, *exact, [t.double() for t in douts], *(t.detach().double().requires_grad_() for t in lambdas))
    for ours, theirs in zip(found, wanted, strict=True):
        assert relative(ours.detach(), theirs.detach()) < tolerance
    assert relative(copies[1].double() * train_gpt.normed_scale(x), wanted[2].detach()) < 1 / 16


@pytest.mark.parametrize("mixed, fp8", [(True, False), (False, False), (True, True)])
def test_compiled_block(mixed, fp8, monkeypatch):
    """The block as a GPU trains it, traced as one graph around the kernels, which run where they can: output and gradients are the plain ones'."""
    dtype, backend, tolerance = (torch.bfloat16, "inductor", 3e-2) if DEVICE == "cuda" else (torch.float32, "aot_eager", 1e-4)
    if DEVICE == "cpu":
        monkeypatch.setattr(train_gpt, "attention", lambda *tensors: train_gpt.attention_forward(*tensors)[0])
        monkeypatch.setattr(train_gpt, "on_hopper", lambda x: True)
        monkeypatch.setattr(train_gpt, "linear", lambda *tensors: train_gpt.linear_forward(*tensors, *[None] * (5 - len(tensors))))
        monkeypatch.setattr(train_gpt, "MLP_TILE", (32, 64, 32, 4, 2))
    torch.manual_seed(0)
    T, heads, width = 96, 2, 64
    first, last = visible([40, 56], T, 30)
    angles = torch.randn(T, 16)
    rotary = (angles.cos(), angles.sin(), torch.tensor(0.1))
    shapes = ((T, width), (T, width), (T, width), (width, 4 * width), (heads, 12), (width, 4 * width), (width, 4 * width))
    leaves = [torch.randn(shape) * (0.1 if shape == (width, 4 * width) else 1.0) for shape in shapes]
    scalars, dout = [torch.tensor([1.1, 0.2, 0.5, 0.4])], torch.randn(T, width)

    def run(block, move, fp8):
        x, x0, value, qkvo, gate, w_in, w_out, lambdas = tensors = [move(t).detach().requires_grad_() for t in leaves + scalars]
        cos, sin, scale = (move(t) for t in rotary)
        bounds = (first.to(x.device), last.to(x.device))
        copies = [train_gpt.to_e4m3(w.detach(), 1 / train_gpt.WEIGHT_SCALE) if fp8 else None for w in (qkvo, w_in.t().contiguous(), w_out)]
        mixed = train_gpt.mix_reference(x, x0, lambdas)
        copy = train_gpt.to_e4m3(mixed[1].detach(), 1 / train_gpt.normed_scale(x)) if fp8 else None
        out = block(*mixed, copy, lambdas, ((qkvo, gate, copies[0]),), ((w_in, w_out, *copies[1:]),), value if mixed else None, (cos, sin, scale), bounds)
        out.backward(move(dout))
        return out.detach(), *(t.grad for t in tensors if mixed or t is not value)

    ours = run(torch.compile(train_gpt.block, dynamic=False, backend=backend, fullgraph=True), lambda t: t.to(dtype, copy=True) if t.dim() > 1 else t.clone(), fp8)
    monkeypatch.undo()
    wanted = run(train_gpt.block, lambda t: t.double().cpu(), False)
    for found, exact in zip(ours, wanted, strict=True):
        assert relative(found.cpu(), exact) < (1 / 16 if fp8 else tolerance)
