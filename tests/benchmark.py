"""Time every kernel at the run's shapes, on one GPU, in about two minutes.

    python tests/benchmark.py
    python tests/benchmark.py --tiles    # instead, find the attention kernels' tile sizes for this GPU, in a few minutes

Columns: our kernel; the same by its reference under torch.compile, or for attention by compiled FlexAttention; the rate that the
kernel reaches; and the share of its floor, the larger of its arithmetic at the measured matrix rate and its bytes, each read
or written once, at the measured copy bandwidth. Medians over repeated launches on random data; nothing here is a test.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_gpt as g  # noqa: E402

DEVICE, T, HEADS, HEAD_DIM, WIDTH, CLASSES = "cuda", 32_768, 6, 128, 768, 50_304
WINDOWS = (384, 896, 1408, 1664)


def ms(function) -> float:
    return do_bench(function, warmup=10, rep=60, return_mode="median")


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def document_bounds(window: int):
    """first and last of documents like web text: lognormal lengths, median 453, mean 659, cut at 2048."""
    lengths = torch.empty(T // 64).log_normal_(6.116, 0.866, generator=torch.Generator().manual_seed(1)).long().clamp(1, 2048)
    ends = lengths.cumsum(0).clamp(max=T)
    spans = torch.diff(ends, prepend=ends.new_zeros(1))
    at, firsts, lasts = torch.arange(T), (ends - spans).repeat_interleave(spans), (ends - 1).repeat_interleave(spans)
    return [t.int().to(DEVICE) for t in (torch.maximum(firsts, at - window), torch.minimum(lasts, at + window))]


class Table:
    """Prints rows as they come, against ceilings measured first."""

    def __init__(self):
        a, b = random(8192, 8192), random(8192, 8192)
        self.flops = 2 * 8192**3 / ms(lambda: a @ b) * 1e3
        large, other = random(2**31), torch.empty(2**31, device=DEVICE, dtype=torch.bfloat16)
        self.bandwidth = 2 * 2 * 2**31 / ms(lambda: other.copy_(large)) * 1e3
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}: bf16 8192^3 {self.flops / 1e12:.0f} TFLOP/s, copy {self.bandwidth / 1e9:.0f} GB/s")
        print(f"{'kernel':<38}{'ms':>8}{'reference':>11}{'rate':>14}{'of floor':>10}")

    def row(self, name: str, ours, reference, flops: float, size: float):
        """One kernel, with the operations that it must do and the bytes that it must move."""
        took, other, floor = ms(ours), ms(reference) if reference else None, max(flops / self.flops, size / self.bandwidth) * 1e3
        rate = f"{flops / took / 1e9:.0f} TFLOP/s" if flops / self.flops > size / self.bandwidth else f"{size / took / 1e6:.0f} GB/s"
        print(f"{name:<38}{took:>8.3f}{'-' if other is None else f'{other:.3f}':>11}{rate:>14}{floor / took:>10.0%}", flush=True)


def attention_inputs() -> list:
    """x, weight, value, lambdas, gate, cos, sin and scale of the run's attention."""
    angles, width = torch.randn(T, HEAD_DIM // 2, device=DEVICE), HEADS * HEAD_DIM
    lambdas, scale = torch.tensor([1.0, 0.0, 0.5, 0.5], device=DEVICE), torch.tensor(0.1, device=DEVICE)
    x, weight, value = g.norm(random(T, width)), random(3 * width, width) / width**0.5, random(T, width)
    return [x, weight, value, lambdas, random(T, HEADS), angles.cos().bfloat16(), angles.sin().bfloat16(), scale]


def benchmark_attention(table: Table):
    """q, k and v; then the three kernels, beside attention without gates, norm, rotary embedding and mixing, of which ours do the backward pass

    too, a row of its own.
    """
    x, weight, value, lambdas, gate, cos, sin, scale = attention_inputs()
    shape, flops = (T, 3, HEADS, HEAD_DIM), 6 * T * WIDTH * WIDTH
    x8, weight8 = g.to_e4m3(x, 1 / g.normed_scale(x)), g.to_e4m3(weight, 1 / g.WEIGHT_SCALE)
    reference = torch.compile(lambda x, weight, value: g.heads_reference(F.linear(x, weight).view(shape), value, *lambdas[2:], cos, sin))
    for name, copies, rate in (("bf16", (None, None), 1), ("e4m3", (x8, weight8), 2)):
        ours = lambda: g.heads_forward(x, copies[0], weight, copies[1], value, lambdas, cos, sin)  # noqa: B023, E731
        table.row(f"q, k, v of x, {name}", ours, lambda: reference(x, weight, value), flops / rate, 6 * x.nbytes + weight.nbytes)
    leaves = [t.requires_grad_() for t in (F.linear(x, weight).view(shape), value.clone(), lambdas[2].clone(), lambdas[3].clone())]
    heads = torch.compile(g.heads_reference)(*leaves, cos, sin)
    grads = [torch.randn_like(t) for t in heads]
    table.row("norm, rotary, mixing: reference back", lambda: torch.autograd.grad(heads, leaves, grads, retain_graph=True), None, 0, 8 * x.nbytes)
    batched = [t.transpose(0, 1)[None].detach().requires_grad_() for t in heads]
    flex, gradient = torch.compile(flex_attention), random(1, HEADS, T, HEAD_DIM)
    launches = {name: attention_launches(name) for name in ("forward", "query", "key")}
    for window, forward, query, key in zip(WINDOWS, *launches.values(), strict=True):
        first, _ = document_bounds(window)
        mask = create_block_mask(lambda b, h, i, j, first=first: (first[i] <= j) & (j <= i), None, None, T, T, DEVICE, _compile=True)
        pairs = (torch.arange(T, device=DEVICE) - first + 1).sum().item() * HEADS * HEAD_DIM
        wanted = flex(*batched, block_mask=mask, scale=0.1)
        table.row(f"attention forward, W = {window}", forward, lambda: flex(*batched, block_mask=mask, scale=0.1), 4 * pairs, 4 * value.nbytes)
        table.row(f"attention backward, W = {window}", lambda: (query(), key()),
                  lambda: torch.autograd.grad(wanted, batched, gradient, retain_graph=True), 10 * pairs, 8 * value.nbytes)  # fmt: skip


def benchmark_head(table: Table):
    z, targets, dloss = 3 * random(T, CLASSES), torch.randint(CLASSES, (T,), device=DEVICE, dtype=torch.int32), torch.ones(T, device=DEVICE)
    _, lse = g.loss_forward(z, targets, exact=False)
    reference = torch.compile(g.loss_reference)
    table.row("loss forward", lambda: g.loss_forward(z, targets, exact=False), lambda: reference(z, targets), 0, z.nbytes)
    leaf = z.detach().requires_grad_()
    loss = reference(leaf, targets)
    backward = lambda: torch.autograd.grad(loss, leaf, dloss, retain_graph=True)  # noqa: E731
    table.row("loss backward, e5m2 both ways", lambda: g.loss_backward(z, targets, lse, dloss, True), backward, 0, z.nbytes * 2)
    del z, leaf, loss
    x = random(T, WIDTH)
    grad = torch.zeros(CLASSES, WIDTH, device=DEVICE)
    add = torch.compile(lambda grad, targets, x: grad.index_add_(0, targets, x.float()))
    table.row("scatter_add", lambda: g.scatter_add(grad, targets, x), lambda: add(grad, targets, x), 0, x.nbytes + 2 * 2 * x.nbytes)


def benchmark_mix(table: Table):
    """Both ways, with the e4m3 copy; beside the reference, whose gradient of x0 nobody has added to the other layers' yet."""
    x, x0, dmixed, dnormed = (random(T, WIDTH).requires_grad_() for _ in range(4))
    lambdas, shared = torch.tensor([[1.1, 0.2, 0.5, 0.5]], device=DEVICE, requires_grad=True), {}
    compiled = torch.compile(lambda x, x0, lambdas: g.mix_reference(x, x0, lambdas[0]))
    gradient = torch.zeros_like(x0)
    wanted, (*found, _) = compiled(x, x0, lambdas), g.mix(x, x0, lambdas, 0, shared, True)
    table.row("mix forward", lambda: g.mix(x, x0, lambdas, 0, {}, True), lambda: compiled(x, x0, lambdas), 0, 4.5 * x.nbytes)

    def backward():
        shared["gradient"] = gradient  # as if another layer had been there
        torch.autograd.grad(found, (x, x0), (dmixed, dnormed), retain_graph=True)

    table.row("mix backward", backward, lambda: torch.autograd.grad(wanted, (x, x0, lambdas), (dmixed, dnormed), retain_graph=True), 0, 7 * x.nbytes)


def benchmark_mlp(table: Table):
    x, w_in, w_out, dout = random(T, WIDTH), *(0.03 * random(WIDTH, 4 * WIDTH) for _ in range(2)), random(T, WIDTH)
    x = g.norm(x)
    x8, in8 = g.to_e4m3(x, 1 / g.normed_scale(x)), g.to_e4m3(w_in.t().contiguous(), 1 / g.WEIGHT_SCALE)
    inside = lambda: g.mlp_hidden(x8, in8, g.normed_scale(x) * g.WEIGHT_SCALE)  # noqa: E731
    hidden = inside()
    inward = torch.compile(lambda x, w: torch.relu(x @ w).square())
    slope = torch.compile(lambda dout, w, hidden: (dout @ w) * (2 * hidden.sqrt()))
    squares, flops, size = inward(x, w_in), 2 * T * WIDTH * 4 * WIDTH, x.nbytes + w_in.nbytes
    table.row("relu(x w_in)^2, e4m3", inside, lambda: inward(x, w_in), flops / 2, size // 2 + hidden.nbytes)
    back = lambda: g.mlp_hidden_backward(dout, w_out, hidden)  # noqa: E731
    table.row("its gradient, and it in bf16", back, lambda: slope(dout, w_out, squares), flops, size + 5 * hidden.nbytes)


def benchmark_products(table: Table):
    """cuBLAS at the block's shapes: what a kernel of ours would have to beat."""
    x, h, w = random(T, WIDTH), random(T, 4 * WIDTH), random(WIDTH, 4 * WIDTH)
    for name, product in (("cuBLAS x w_in", lambda: x @ w), ("cuBLAS h w_out^T", lambda: F.linear(h, w)), ("cuBLAS gradient of w", lambda: x.t() @ h)):
        table.row(name, product, None, 2 * T * WIDTH * 4 * WIDTH, x.nbytes + h.nbytes + w.nbytes)


def attention_launches(name: str) -> list:
    """A launch of one attention kernel for each of the run's windows; each reads its tiles when it is called."""
    kernel = {"forward": g._attention_forward_kernel, "query": g._attention_query_kernel, "key": g._attention_key_kernel}[name]
    x, weight, value, lambdas, gate, cos, sin, scale = attention_inputs()
    heads, raw, factors = g.heads_forward(x, None, weight, None, value, lambdas, cos, sin)
    dout, dqkv, dvalue, dgate, dlambdas = random(T, HEADS, HEAD_DIM), *(torch.empty_like(t) for t in (heads, value, gate)), torch.zeros_like(lambdas)
    launches = []
    for window in WINDOWS:
        first, last = document_bounds(window)
        out, lse = g.attention_forward(heads, gate, first, scale)
        delta = ((out.float() * dout.float()).sum(-1) / torch.sigmoid(gate)).t().float().contiguous()
        tensors = {
            "forward": ((heads,), (heads, out), gate, lse, first, scale),
            "query": ((heads,), (), heads, out, dout, cos, sin, dqkv, factors, gate, lse, delta, dgate, first, scale),
            "key": ((heads, dout), (heads,), heads, raw, value, dvalue, cos, sin, dqkv, factors, lse, delta, first, last, lambdas, dlambdas, scale),
        }[name]
        launches.append(functools.partial(g._attention_launch, kernel, name, *tensors))
    return launches


def find_tiles(tiles: dict[str, tuple], launches, time) -> dict[str, tuple]:
    """The fastest tiles for each kernel that runs with any, by the sum of its times over all windows; prints each that it tries.

    tiles: the table that the kernels read, left as it was found. launches: from a kernel's name to its launches. time: ms of one.
    """
    best = {}
    for name, before in list(tiles.items()):
        found, calls = {}, launches(name)
        shapes = ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
        for tile in dict.fromkeys((before, *((*shape, *rest) for shape in shapes for rest in ((4, 2), (4, 3), (8, 2), (8, 3))))):
            tiles[name] = tile
            try:
                found[tile] = sum(time(call) for call in calls)
                print(f"{name} {tile}: {found[tile]:.3f} ms", flush=True)
            except (OutOfResources, RuntimeError) as error:
                print(f"{name} {tile}: does not run ({str(error).splitlines()[0]})", flush=True)
        tiles[name] = before
        if found:
            best[name] = min(found, key=found.get)
            print(f"{name}: fastest {best[name]}, {found[best[name]]:.3f} ms; in use {before}, {found.get(before, float('nan')):.3f} ms", flush=True)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", action="store_true", help="find the attention kernels' tile sizes for this GPU")
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
    benchmark_mix(table)
    benchmark_mlp(table)
    benchmark_products(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
