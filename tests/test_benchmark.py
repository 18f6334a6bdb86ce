"""The benchmark: that each row runs, and the part that chooses. Its times are a GPU's, and are not tested."""

import benchmark
import pytest
import torch

import train_gpt


def test_find_tiles(capsys):
    """The fastest of those that run, by the sum over the windows; the table is as it was, and a failure is told."""
    tiles = {"forward": (64, 64, 4, 3), "key": (64, 64, 4, 2)}
    before = dict(tiles)

    def launches(name):
        return [(name, window) for window in range(3)]

    def time(call):
        name, window = call
        queries, keys, warps, stages = tiles[name]
        if warps == 8 and stages == 3:
            raise RuntimeError("no room\nat all")
        return 10.0 + window if (queries, keys) != (128, 64) else window + stages + (name == "key") * (warps == 4)

    assert benchmark.find_tiles(tiles, launches, time) == {"forward": (128, 64, 4, 2), "key": (128, 64, 8, 2)}
    assert tiles == before
    printed = capsys.readouterr().out
    assert "key (64, 64, 8, 3): does not run (no room)" in printed and "forward: fastest (128, 64, 4, 2), 9.000 ms; in use (64, 64, 4, 3), 33.000 ms" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shapes are changed for the interpreter")
def test_attention_launches(monkeypatch):
    """Each launch is of its own window: what it writes is attention and its gradients there."""
    for name, value in {"DEVICE": "cpu", "T": 192, "HEADS": 1, "HEAD_DIM": 16, "WINDOWS": (20, 150)}.items():
        monkeypatch.setattr(benchmark, name, value)
    inputs = benchmark.attention_inputs()
    monkeypatch.setattr(benchmark, "attention_inputs", lambda: inputs)
    for name in ("forward", "query", "key"):
        for window, launch in zip(benchmark.WINDOWS, benchmark.attention_launches(name), strict=True):
            launch()
            others, own, *rest = launch.args[2:]
            first, last = benchmark.document_bounds(window)
            x, weight, value, lambdas, gate, cos, sin, scale = (t.double() for t in inputs)
            qkv = (x @ weight.t()).view(192, 3, 1, 16).requires_grad_()
            wanted = train_gpt.attention_reference(*train_gpt.heads_reference(qkv, value, *lambdas[2:], cos, sin), gate, first, scale)
            if name == "forward":
                pairs = [(own[1], wanted)]
            else:
                dout, dqkv, parts = (rest[2], rest[5], (0,)) if name == "query" else (others[1], rest[6], (1, 2))
                wanted.backward(dout.double())
                pairs = [(dqkv[:, part], qkv.grad[:, part]) for part in parts]
            for found, exact in pairs:
                assert (found.double() - exact).norm() < 3e-2 * exact.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shapes are changed for the interpreter")
def test_every_row_runs(monkeypatch, capsys):
    """Each row's kernel and what stands beside it run once, here uncompiled, and are timed."""
    small = {"DEVICE": "cpu", "T": 64, "HEADS": 2, "HEAD_DIM": 16, "WIDTH": 32, "CLASSES": 256, "WINDOWS": (20,), "ms": lambda call: (call(), 1.0)[1]}
    for name, value in small.items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "create_block_mask", lambda *_, **__: None)
    monkeypatch.setattr(benchmark, "flex_attention", lambda q, k, v, block_mask, scale: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale))
    monkeypatch.setattr(benchmark.Table, "__init__", lambda table: vars(table).update(flops=1e12, bandwidth=1e12))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(train_gpt, "MLP_TILE", (32, 64, 64, 4, 2))
    monkeypatch.setattr(train_gpt, "mix", train_gpt._Mix.apply)
    table = benchmark.Table()
    for name in ("attention", "head", "mix", "mlp", "products"):
        getattr(benchmark, f"benchmark_{name}")(table)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 15 and sum("W = 20" in row for row in rows) == 2
