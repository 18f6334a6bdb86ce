"""The benchmark: that each row runs, and the part that chooses. Its times are a GPU's, and are not tested."""

import benchmark
import pytest
import torch

import train_gpt


def test_find_tiles(capsys):
    """The fastest of those that run, by the sum over windows; the table stays; a failure is told."""
    tiles = {"forward": (64, 64, 4, 3), "key": (64, 64, 4, 2)}
    before = dict(tiles)

    def launches(name):
        return [(name, window) for window in range(3)]

    def time(call):
        name, window = call
        queries, keys, warps, stages = tiles[name]
        if warps == 8 and stages == 3:
            raise RuntimeError("no room\nat all")
        return (
            10.0 + window
            if (queries, keys) != (128, 64)
            else window + stages + (name == "key") * (warps == 4)
        )

    found = benchmark.find_tiles(tiles, launches, time)
    assert found == {"forward": (128, 64, 4, 2), "key": (128, 64, 8, 2)}
    assert tiles == before
    printed = capsys.readouterr().out
    assert "key (64, 64, 8, 3): does not run (no room)" in printed
    assert "forward: fastest (128, 64, 4, 2), 9.000 ms; in use (64, 64, 4, 3), 33.000 ms" in printed


def exact_attention(inputs, mask):
    """q, k and v as they are projected, in float64, and the attention that is made of them, gated."""
    h, qkvo, ve, gate, lambdas, rotary = inputs
    qkv = (h.double() @ qkvo.double().view(64, 16)[:48].t()).view(192, 3, 1, 16).requires_grad_()
    turned = benchmark.mix_and_turn(
        *qkv.unbind(1), ve.double(), *lambdas[2:].double(), rotary.cos.double(), rotary.sin.double()
    )
    out = train_gpt.flash_attention.definition(*turned, mask, rotary.scale.double())
    return qkv, out * torch.sigmoid(gate.double())[:, :, None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shapes are changed for the interpreter")
@pytest.mark.parametrize("name", ["forward", "query"])
def test_attention_launches(monkeypatch, name):
    """Each launch is of its own window: what it writes is attention and its gradients there."""
    small = {"DEVICE": "cpu", "T": 192, "HEADS": 1, "HEAD_DIM": 16, "WIDTH": 16, "WINDOWS": (20, 150)}
    for constant, value in small.items():
        monkeypatch.setattr(benchmark, constant, value)
    inputs = benchmark.attention_inputs()
    monkeypatch.setattr(benchmark, "attention_inputs", lambda: inputs)
    for window, launch in zip(benchmark.WINDOWS, benchmark.attention_launches(name), strict=True):
        qkv, wanted = exact_attention(inputs, benchmark.document_mask(window))
        result = launch()
        if name == "forward":
            pairs = [(result.out, wanted)]
        else:
            wanted.backward(launch.args[0].double())
            pairs = list(zip(result[0].unbind(1), qkv.grad.unbind(1), strict=True))
        for found, exact in pairs:
            assert (found.double() - exact).norm() < 3e-2 * exact.norm()


def plain_attention(q, k, v, block_mask, scale):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shapes are changed for the interpreter")
def test_every_row_runs(monkeypatch, capsys):
    """Each row's kernel and what stands beside it run once, here uncompiled, and are timed."""
    small = {"DEVICE": "cpu", "T": 64, "HEADS": 2, "HEAD_DIM": 16, "WIDTH": 32, "VOCABULARY": 256}
    small |= {"WINDOWS": (20,), "ms": lambda call: (call(), 1.0)[1]}
    small |= {"create_block_mask": lambda *_, **__: None, "flex_attention": plain_attention}
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    ceilings = {"flops": 1e12, "bandwidth": 1e12}
    monkeypatch.setattr(benchmark.Table, "__init__", lambda table: vars(table).update(ceilings))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(train_gpt, "MLP_TILE", (32, 64, 64, 4, 2))
    monkeypatch.setattr(train_gpt, "MLP_BACKWARD_TILE", (256, 32, 64, 4, 2))
    table = benchmark.Table()
    for name in ("attention", "head", "mix_norm", "mlp", "products"):
        getattr(benchmark, f"benchmark_{name}")(table)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 19 and sum("W = 20" in row for row in rows) == 4
    assert sum(row.startswith("flash_attention") for row in rows) == 2


def test_main_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmark.py"])
    assert benchmark.main() == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
