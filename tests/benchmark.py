"""Time every kernel at the run's shapes, on one GPU, in about two minutes.

    python tests/benchmark.py
    python tests/benchmark.py --tiles    # instead, find the attention kernels' tiles for this GPU, in minutes

Columns: our kernel; the same by its reference under torch.compile, or for attention by compiled
FlexAttention; the rate that the kernel reaches; and the share of its floor, the larger of its arithmetic at
the measured matrix rate and its bytes, each read or written once, at the measured copy bandwidth. Medians
over repeated launches on random data; nothing here is a test.
"""

import argparse
import functools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

sys.path.append(str(Path(__file__).parent.parent))  # behind the folder of a SCRIPT that is tested
import train_gpt as g  # noqa: E402

DEVICE, T, HEADS, HEAD_DIM, WIDTH, VOCABULARY = "cuda", 32_768, 6, 128, 768, 50_304
WINDOWS = (384, 896, 1408, 1664)


def ms(function) -> float:
    return do_bench(function, warmup=10, rep=60, return_mode="median")


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def document_mask(window: int) -> g.Mask:
    """The mask of documents like web text: lognormal lengths, median 453, mean 659, cut at 2048."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.empty(T // 64).log_normal_(6.116, 0.866, generator=generator).long().clamp(1, 2048)
    ends = lengths.cumsum(0).clamp(max=T)
    spans = torch.diff(ends, prepend=ends.new_zeros(1))
    at = torch.arange(T)
    starts = (ends - spans).repeat_interleave(spans)
    lasts = (ends - 1).repeat_interleave(spans)
    bounds = torch.maximum(starts, at - window), torch.minimum(lasts, at + window)
    return g.Mask(*(t.int().to(DEVICE) for t in bounds))


class Table:
    """Prints rows as they come, against ceilings measured first."""

    def __init__(self):
        a, b = random(8192, 8192), random(8192, 8192)
        self.flops = 2 * 8192**3 / ms(lambda: a @ b) * 1e3
        large, other = random(2**31), torch.empty(2**31, device=DEVICE, dtype=torch.bfloat16)
        self.bandwidth = 2 * 2 * 2**31 / ms(lambda: other.copy_(large)) * 1e3
        ceilings = f"bf16 8192^3 {self.flops / 1e12:.0f} TFLOP/s, copy {self.bandwidth / 1e9:.0f} GB/s"
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: {ceilings}")
        print(f"{'kernel':<38}{'ms':>8}{'reference':>11}{'rate':>14}{'of floor':>10}")

    def row(self, name: str, ours, reference, flops: float, size: float):
        """One kernel, with the operations that it must do and the bytes that it must move."""
        took = ms(ours)
        other = f"{ms(reference):.3f}" if reference else "-"
        by_arithmetic, by_bytes = flops / self.flops, size / self.bandwidth
        floor = max(by_arithmetic, by_bytes) * 1e3
        rate = f"{size / took / 1e6:.0f} GB/s"
        if by_arithmetic > by_bytes:
            rate = f"{flops / took / 1e9:.0f} TFLOP/s"
        print(f"{name:<38}{took:>8.3f}{other:>11}{rate:>14}{floor / took:>10.0%}", flush=True)


class AttentionInputs(NamedTuple):
    """What the run's attention reads."""

    h: torch.Tensor
    qkvo: torch.Tensor
    ve: torch.Tensor
    gate: torch.Tensor
    lambdas: torch.Tensor
    rotary: SimpleNamespace


def attention_inputs() -> AttentionInputs:
    angles = torch.randn(T, HEAD_DIM // 2, device=DEVICE)
    scale = torch.tensor(0.1, device=DEVICE)
    rotary = SimpleNamespace(cos=angles.cos().bfloat16(), sin=angles.sin().bfloat16(), scale=scale)
    return AttentionInputs(
        h=g.rms_norm(random(T, WIDTH)),
        qkvo=random(WIDTH, 4 * WIDTH) / WIDTH**0.5,
        ve=random(T, WIDTH),
        gate=random(T, HEADS),
        lambdas=torch.tensor([1.0, 0.0, 0.5, 0.5], device=DEVICE),
        rotary=rotary,
    )


def mix_and_turn(q, k, v, ve, l0, l1, cos, sin):
    """Norm and rotary embedding of q and k, and mixing of v: what the kernel does after its product."""
    q = g.apply_rotary(g.rms_norm(q), cos, sin)
    k = g.apply_rotary(g.rms_norm(k), cos, sin)
    return q, k, l0 * v + l1 * ve.view_as(v)


def benchmark_qkv(table: Table, inputs: AttentionInputs) -> tuple:
    """q, k and v of h, by bf16 and by e4m3; and the backward pass of what is done to them, by the reference.

    Returns q, k and v.
    """
    h, qkvo, ve, _, lambdas, rotary = inputs
    w_qkv, shape = qkvo.view(4 * WIDTH, WIDTH)[: 3 * WIDTH], (T, 3, HEADS, HEAD_DIM)
    e4m3 = g.to_e4m3(h, g.normed_scale(WIDTH)), g.to_e4m3(qkvo, g.WEIGHT_SCALE)

    def plain(h, w_qkv, ve):
        return mix_and_turn(
            *F.linear(h, w_qkv).view(shape).unbind(1), ve, *lambdas[2:], rotary.cos, rotary.sin
        )

    reference = torch.compile(plain)
    flops, size = 2 * T * WIDTH * 3 * WIDTH, 6 * h.nbytes + w_qkv.nbytes
    for name, (h_e4m3, w_e4m3), rate in (("bf16", (None, None), 1), ("e4m3", e4m3, 2)):
        operands = g.Normed(h, h_e4m3), g.Weight(qkvo, e4m3=w_e4m3)
        ours = functools.partial(g.qkv_forward, *operands, ve, g.Weight(lambdas), rotary)
        table.row(f"q, k, v of h, {name}", ours, lambda: reference(h, w_qkv, ve), flops / rate, size)
    leaves = [t.contiguous() for t in F.linear(h, w_qkv).view(shape).unbind(1)]
    leaves = [t.detach().clone().requires_grad_() for t in (*leaves, ve, lambdas[2], lambdas[3])]
    made = torch.compile(mix_and_turn)(*leaves, rotary.cos, rotary.sin)
    grads = [torch.randn_like(t) for t in made]
    backward = functools.partial(torch.autograd.grad, made, leaves, grads, retain_graph=True)
    table.row("norm, rotary, mixing: reference back", backward, None, 0, 8 * h.nbytes)
    return tuple(t.detach() for t in made)


def benchmark_attention(table: Table):
    """The q, k, v kernel; then attention, fused and standing alone, beside FlexAttention.

    FlexAttention has no gates. Nor has it norm, rotary embedding and mixing, whose backward pass the fused
    kernels do too: they have a row of their own.
    """
    inputs = attention_inputs()
    qkv = benchmark_qkv(table, inputs)
    batched = [t.transpose(0, 1)[None].detach().requires_grad_() for t in qkv]
    alone = [t.detach().clone().requires_grad_() for t in qkv]
    flex, gradient, dout = (
        torch.compile(flex_attention),
        random(1, HEADS, T, HEAD_DIM),
        random(T, HEADS, HEAD_DIM),
    )
    launches = attention_launches("forward"), attention_launches("backward")
    size = inputs.ve.nbytes
    for window, forward, backward in zip(WINDOWS, *launches, strict=True):
        mask = document_mask(window)

        def visible(b, h, i, j, first_key=mask.first_key):
            return (first_key[i] <= j) & (j <= i)

        blocks = create_block_mask(visible, None, None, T, T, DEVICE, _compile=True)
        reach = torch.arange(T, device=DEVICE) - mask.first_key + 1
        flops = 4 * reach.sum().item() * HEADS * HEAD_DIM
        reference = functools.partial(flex, *batched, block_mask=blocks, scale=0.1)
        attend = functools.partial(g.flash_attention_fused, *alone, mask, inputs.rotary.scale)
        back = functools.partial(torch.autograd.grad, reference(), batched, gradient, retain_graph=True)
        back_alone = functools.partial(torch.autograd.grad, attend(), alone, dout, retain_graph=True)
        table.row(f"attention forward, W = {window}", forward, reference, flops, 4 * size)
        table.row(f"attention backward, W = {window}", backward, back, 2.5 * flops, 8 * size)
        table.row(f"flash_attention, W = {window}", attend, reference, flops, 4 * size)
        table.row(f"flash_attention backward, W = {window}", back_alone, back, 2.5 * flops, 8 * size)


def benchmark_head(table: Table):
    z, dloss = 3 * random(T, VOCABULARY), torch.ones(T, device=DEVICE)
    targets = torch.randint(VOCABULARY, (T,), device=DEVICE, dtype=torch.int32)
    _, lse = g.cross_entropy_forward(z, targets, exact=False)
    reference = torch.compile(g.softcapped_cross_entropy.definition)
    forward = functools.partial(g.cross_entropy_forward, z, targets, exact=False)
    table.row("loss forward", forward, functools.partial(reference, z, targets), 0, z.nbytes)
    leaf = z.detach().requires_grad_()
    loss = reference(leaf, targets)
    plain = functools.partial(torch.autograd.grad, loss, leaf, dloss, retain_graph=True)
    backward = functools.partial(g.cross_entropy_backward, z, targets, lse, dloss, fp8=True)
    table.row("loss backward, e5m2 both ways", backward, plain, 0, z.nbytes * 2)
    del z, leaf, loss, forward, plain, backward
    x, grad = random(T, WIDTH), torch.zeros(VOCABULARY, WIDTH, device=DEVICE)
    add = torch.compile(lambda grad, targets, x: grad.index_add_(0, targets, x.float()))
    ours = functools.partial(g.scatter_add_, grad, targets, x)
    table.row("scatter_add_", ours, lambda: add(grad, targets, x), 0, x.nbytes + 2 * 2 * x.nbytes)


def benchmark_mix_norm(table: Table):
    """Both ways, into e4m3; the reference does not add its gradient of x0 to other layers'."""
    x, x0, dmixed, dh = (random(T, WIDTH).requires_grad_() for _ in range(4))
    lambdas = torch.tensor([1.1, 0.2, 0.5, 0.5], device=DEVICE, requires_grad=True)
    handle = g.Weight(lambdas.detach(), torch.zeros_like(lambdas))
    shared, before = g.SharedGradient(), torch.zeros_like(x0)
    ours = functools.partial(g._MixNorm.apply, x, x0, handle, shared, True)
    reference = torch.compile(g.mix_norm.definition)
    plain = functools.partial(reference, x, x0, lambdas)
    table.row("mix_norm forward", ours, plain, 0, 3.5 * x.nbytes)
    mixed, h, _ = ours()
    wanted = plain()

    def backward():
        shared.total = before  # as if another layer had been there
        torch.autograd.grad((mixed, h), x, (dmixed, dh), retain_graph=True)

    leaves = (x, x0, lambdas)
    plain_back = functools.partial(torch.autograd.grad, wanted, leaves, (dmixed, dh), retain_graph=True)
    table.row("mix_norm backward", backward, plain_back, 0, 7 * x.nbytes)


def benchmark_mlp(table: Table):
    h, dout = g.rms_norm(random(T, WIDTH)), random(T, WIDTH)
    c_fc, c_proj = (0.03 * random(WIDTH, 4 * WIDTH) for _ in range(2))
    h_e4m3 = g.to_e4m3(h, g.normed_scale(WIDTH))
    c_fc_t, c_proj_t = (g.to_e4m3(w.t().contiguous(), g.WEIGHT_SCALE) for w in (c_fc, c_proj))
    ours = functools.partial(g.mlp_forward, h_e4m3, c_fc_t, g.normed_scale(WIDTH) * g.WEIGHT_SCALE)
    hidden = ours()
    inward = torch.compile(lambda h, w: torch.relu(h @ w).square())
    slope = torch.compile(lambda dout, w, hidden: (dout @ w) * (2 * hidden.sqrt()))
    squares, flops, size = inward(h, c_fc), 2 * T * WIDTH * 4 * WIDTH, h.nbytes + c_fc.nbytes
    table.row("relu(h c_fc)^2, e4m3", ours, lambda: inward(h, c_fc), flops / 2, size // 2 + hidden.nbytes)
    rounding = functools.partial(g.e4m3_and_transpose, dout, 1 / 16)
    dy, dy_t = rounding()

    def rounded_twice(x):
        e4m3 = g.to_e4m3(x, 1 / 16)
        return e4m3, e4m3.t().contiguous()

    rounded = torch.compile(rounded_twice)
    table.row("a gradient in e4m3, and transposed", rounding, lambda: rounded(dout), 0, 2 * dout.nbytes)
    back = functools.partial(g.mlp_backward, dy, c_proj_t, hidden, g.WEIGHT_SCALE / 8)
    plain = functools.partial(slope, dout, c_proj, squares)
    table.row("its gradient, and both transposed", back, plain, flops / 2, size // 2 + 4 * hidden.nbytes)
    hidden_t, grad = back()[2], torch.zeros_like(c_proj)
    ours = functools.partial(g.add_fp8_product_, grad, dy_t, hidden_t, 1.0)
    plain = functools.partial(grad.addmm_, dout.t(), squares)
    size = dy.nbytes + hidden.nbytes + 2 * grad.nbytes
    table.row("the gradient of c_proj", ours, plain, flops / 2, size)


def benchmark_products(table: Table):
    """cuBLAS at the block's shapes: what a kernel of ours would have to beat."""
    x, h, w = random(T, WIDTH), random(T, 4 * WIDTH), random(WIDTH, 4 * WIDTH)
    flops, size = 2 * T * WIDTH * 4 * WIDTH, x.nbytes + h.nbytes + w.nbytes
    table.row("cuBLAS h c_fc", lambda: x @ w, None, flops, size)
    table.row("cuBLAS hidden c_proj^T", lambda: F.linear(h, w), None, flops, size)
    table.row("cuBLAS gradient of a weight", lambda: x.t() @ h, None, flops, size)


def attention_launches(name: str) -> list:
    """For each window, what launches the "forward" kernel or, by any other name, both of the backward pass.

    They read their tiles when they are called.
    """
    h, qkvo, ve, gate, lambdas, rotary = attention_inputs()
    weight = g.Weight(lambdas, torch.zeros_like(lambdas))
    qkv, end = g.qkv_forward(g.Normed(h), g.Weight(qkvo), ve, weight, rotary)
    dout, fp8 = random(T, HEADS, HEAD_DIM), g.in_fp8(h.device, "blocks")
    launches = []
    for window in WINDOWS:
        given = (*qkv.unbind(1), gate, document_mask(window), rotary.scale)
        if name == "forward":
            launches.append(functools.partial(g.attention_forward, *given))
        else:
            a = g.attention_forward(*given)
            launches.append(functools.partial(g.attention_backward, dout, a, end, fp8))
    return launches


def candidate_tiles(before: tuple) -> list[tuple]:
    """The tiles to try: the one in use first."""
    shapes = ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
    options = ((4, 2), (4, 3), (8, 2), (8, 3))
    tiles = [(*shape, *rest) for shape in shapes for rest in options]
    return list(dict.fromkeys([before, *tiles]))


def find_tiles(tiles: dict[str, tuple], launches, time) -> dict[str, tuple]:
    """The fastest tiles for each kernel that runs with any, by the sum of its times over all windows.

    Prints each that it tries. tiles: the table that the kernels read, left as it was found. launches: from a
    kernel's name to its launches. time: ms of one.
    """
    best = {}
    for name, before in list(tiles.items()):
        found, calls = {}, launches(name)
        for tile in candidate_tiles(before):
            tiles[name] = tile
            try:
                found[tile] = sum(time(call) for call in calls)
                print(f"{name} {tile}: {found[tile]:.3f} ms", flush=True)
            except (OutOfResources, RuntimeError) as error:
                print(f"{name} {tile}: does not run ({str(error).splitlines()[0]})", flush=True)
        tiles[name] = before
        if found:
            best[name] = min(found, key=found.get)
            in_use = f"in use {before}, {found.get(before, float('nan')):.3f} ms"
            print(f"{name}: fastest {best[name]}, {found[best[name]]:.3f} ms; {in_use}", flush=True)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tiles", action="store_true", help="find the attention kernels' tile sizes for this GPU"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tests/benchmark.py: needs a CUDA GPU, and found none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    if arguments.tiles:
        hopper = torch.cuda.get_device_capability()[0] == 9
        best = find_tiles(g.HOPPER_TILES if hopper else g.SMALL_TILES, attention_launches, ms)
        print(f"for train_gpt.py: {'HOPPER' if hopper else 'SMALL'}_TILES = {best}")
        return 0
    table = Table()
    benchmark_attention(table)
    benchmark_head(table)
    benchmark_mix_norm(table)
    benchmark_mlp(table)
    benchmark_products(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
