"""The model against its definition, read line by line, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from shards import tiny_flags

import train_gpt
from train_gpt import GPT, Batch, Rotary, World, parse_settings


def build(tmp_path, *flags):
    """A small model with random values where the record starts at zero, so that every part counts."""
    s = parse_settings([*tiny_flags(tmp_path), "--model_dim=64", "--num_heads=2", *flags])
    model = GPT(s, World())
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return s, model


def make_batch(T=50, vocab=257):
    first = torch.tensor([0] * 20 + [20] * (T - 20), dtype=torch.int32)
    last = torch.tensor([19] * 20 + [T - 1] * (T - 20), dtype=torch.int32)
    tokens = torch.randint(vocab, (T + 1,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    return Batch(tokens[:-1], tokens[1:], first, last)


def reference(model, s, batch, windows, skips=((4, 7),), backout_layer=8, drop_mlp=()):
    """Losses by the definition: layer by layer, head by head, float64."""
    P = {name: p.detach().double() for name, p in model.named_parameters()}
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()  # noqa: E731
    gate = lambda x, w: torch.sigmoid(x[:, :12] @ w.T)  # noqa: E731
    T, d, H = len(batch.inputs), s.model_dim, s.num_heads
    e = P["embedding"][batch.inputs.long()]
    x = e.clone()
    smear, backout, *skip_gates = P["scalars"]
    x[1:] = e[1:] + smear * gate(e, P["smear_gate"])[1:] * e[:-1]
    x = x0 = rms(x)
    D = d // H
    freq = torch.cat([(1 / 1024) ** torch.linspace(0, 1, D // 4), torch.zeros(D // 4)]).double()
    angle = torch.arange(T)[:, None] * freq
    rotary = lambda y: torch.cat([y[:, : D // 2] * angle.cos() + y[:, D // 2 :] * angle.sin(), y[:, D // 2 :] * angle.cos() - y[:, : D // 2] * angle.sin()], -1)  # noqa: E501, E731
    outputs = {}
    for i in range(12):
        for (source, target), w in zip(skips, skip_gates, strict=True):
            if i == target:
                x = x + torch.sigmoid(w) * outputs[source]
        if i:
            a, b, l0, l1 = P["lambdas"][i]
            x = a * x + b * x0
            if i != 7:
                y = rms(x)
                q, k, v, o = P[f"slots.{i}.attention.0"].reshape(4, d, d)
                value = {1: 1, 2: 2, 9: 0, 10: 1, 11: 2}.get(i)
                W = windows[1] if i in (4, 11) else windows[0]
                heads = []
                for h in range(H):
                    part = slice(h * D, (h + 1) * D)
                    vh = l0 * (y @ v.T)[:, part]
                    if value is not None:
                        vh = vh + l1 * P[f"values.{value}"][batch.inputs.long()][:, part]
                    scores = 0.1 * rotary(rms((y @ q.T)[:, part])) @ rotary(rms((y @ k.T)[:, part])).T
                    for row in range(T):
                        for column in range(T):
                            same = batch.first[row] == batch.first[column]
                            if not (same and row - W <= column <= row):
                                scores[row, column] = -math.inf
                    heads.append(scores.softmax(-1) @ vh * gate(y, P[f"slots.{i}.gate.0"])[:, h : h + 1])
                x = x + torch.cat(heads, -1) @ o.T
            if i not in drop_mlp:
                x = x + (rms(x) @ P[f"slots.{i}.mlp_in.0"]).relu().square() @ P[f"slots.{i}.mlp_out.0"].T
        outputs[i] = x
    x = rms(x - backout * outputs[backout_layer])
    return F.cross_entropy(30 * torch.sigmoid(x @ P["head"].T / 7.5), batch.targets.long(), reduction="none")


@pytest.mark.parametrize("T, windows", [(50, (3, 9)), (37, (128, 384))])
def test_loss_is_the_definition(tmp_path, T, windows):
    s, model = build(tmp_path)
    batch = make_batch(T)
    losses = model(batch, windows)
    assert losses.shape == (T,) and losses.dtype == torch.float32
    assert torch.allclose(losses.double(), reference(model, s, batch, windows), rtol=2e-4)
    model.eval()
    assert torch.allclose(model(batch, windows), losses, rtol=1e-5)


def test_flags_change_the_layers(tmp_path):
    s, model = build(tmp_path, "--layers=5.mlp=0", "--skips=3-8,4-7", "--backout=9")
    batch = make_batch()
    wanted = reference(model, s, batch, (3, 9), skips=((3, 8), (4, 7)), backout_layer=9, drop_mlp=(5,))
    assert torch.allclose(model(batch, (3, 9)).double(), wanted, rtol=2e-4)
    assert not model.slots[5].mlp_in and not model.slots[5].mlp_out


def test_parallel_paths_add_up(tmp_path):
    """Two paths in layer 3, the second of them silent, are one; no backout and no skip are allowed too."""
    s, one = build(tmp_path)
    flags = [*tiny_flags(tmp_path), "--model_dim=64", "--num_heads=2", "--layers=3.attention=2,3.mlp=2"]
    two = GPT(parse_settings(flags), World())
    names = dict(one.named_parameters())
    with torch.no_grad():
        for name, p in two.named_parameters():
            if name in names:
                p.copy_(names[name])
        batch = make_batch()
        assert torch.allclose(one(batch, (3, 9)), two(batch, (3, 9)), rtol=1e-5)  # output matrices start at zero
        two.slots[3].mlp_out[1].normal_()
        assert not torch.allclose(one(batch, (3, 9)), two(batch, (3, 9)), rtol=1e-3)
    assert GPT(parse_settings([*flags, "--skips=", "--backout=-1"]), World())(batch, (3, 9)).isfinite().all()


def test_first_loss_is_the_log_of_the_classes(tmp_path):
    model = GPT(parse_settings(tiny_flags(tmp_path)), World())
    assert torch.allclose(model(make_batch(), (128, 384)), torch.tensor(math.log(384)))


def test_initial_parameters():
    s = parse_settings(["--vocab_size=257", "--micro_batches=128", "--val_batch_size=131072"])
    model = GPT(s, World())
    bound = math.sqrt(3) * 0.5 * 768**-0.5
    attention = model.slots[1].attention[0].view(4, 768, 768)
    assert attention[:3].abs().max() <= bound and attention[:3].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert not attention[3].any() and not model.slots[1].mlp_out[0].any() and not model.head.any()
    assert model.slots[7].mlp_in[0].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert model.embedding.std().item() == pytest.approx(1, rel=0.01) and len(model.values) == 3
    assert torch.allclose(model.lambdas, torch.tensor([1.1, 0.0, 0.5, 0.5])) and model.scalars.tolist() == [0.0, 0.5, -1.5]
    hidden = [p for slot in model.slots for p in (*slot.attention, *slot.mlp_in, *slot.mlp_out)]
    assert len(hidden) == 32 and {p.shape for p in hidden} == {(768, 3072)}
    assert not list(model.slots[0].parameters()) and not model.slots[7].attention


def test_seed_decides_the_parameters(tmp_path):
    models = [GPT(parse_settings([*tiny_flags(tmp_path), f"--seed={seed}"]), World()) for seed in (1, 1, 2)]
    assert torch.equal(models[0].embedding, models[1].embedding)
    assert not torch.equal(models[0].embedding, models[2].embedding)


def test_yarn():
    rotary = Rotary(128, 300, torch.float32)
    start, scales = rotary.frequencies.clone().double(), [rotary.scale.item()]
    wanted = start.clone()
    for old, new in ((3, 7), (7, 11), (11, 13)):
        keep = ((128 * old * wanted / (2 * math.pi) - 1) / 31).clamp(0, 1)
        wanted = wanted * (old / new + keep * (1 - old / new))
        rotary.extend(128 * old, 128 * new)
        scales.append(rotary.scale.item())
    assert scales == pytest.approx([0.1, 0.11695, 0.12752, 0.13178], abs=1e-5)
    assert torch.allclose(rotary.frequencies.double(), wanted, rtol=1e-6)
    assert torch.allclose(rotary.cos.double(), torch.outer(torch.arange(300.0).double(), wanted).cos(), atol=1e-4)
    assert rotary.frequencies[0] == 1 and not rotary.frequencies[32:].any()


def test_norm_of_rotated_heads_is_kept():
    x = torch.randn(20, 3, 16)
    rotary = Rotary(16, 20, torch.float32)
    assert torch.allclose(train_gpt.rotate(x, rotary.cos, rotary.sin).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_e4m3_copies(tmp_path, monkeypatch):
    """Of every matrix that trains in FP8, some transposed; renewed in place."""
    s = train_gpt.parse_settings(tiny_flags(tmp_path))
    model = GPT(s, World())
    monkeypatch.setattr(train_gpt, "on_hopper", lambda x: True)
    model.quantize()
    before = {key: [copy.data_ptr() for copy in pair] for key, pair in model.copies.items()}
    turned = [p for slot in model.slots for p in slot.mlp_in]
    plain = [p for slot in model.slots for p in (*slot.attention, *slot.mlp_out)]
    assert set(before) == {(model.head, False), (model.head, True)} | {(p, True) for p in turned} | {(p, False) for p in plain}
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.quantize()
    for (p, transposed), (copy, *values) in model.copies.items():
        assert [t.data_ptr() for t in (copy, *values)] == before[p, transposed] and copy.is_contiguous()
        scaled = copy.float() * train_gpt.WEIGHT_SCALE
        scaled = scaled.t() if transposed else scaled
        assert torch.allclose(scaled, p.detach().clamp(-0.875, 0.875), rtol=1 / 16, atol=2**-19)
        assert len(values) == (p is not model.head) and all(torch.equal(t, scaled) for t in values)


def test_evaluation_reads_no_copies(tmp_path, monkeypatch):
    """Products of blocks and head get the e4m3 copies in training alone."""
    s, model = build(tmp_path)
    monkeypatch.setattr(train_gpt, "on_hopper", lambda x: True)
    model.quantize()
    monkeypatch.setattr(train_gpt, "on_hopper", lambda x: False)
    seen, plain = [], {name: getattr(train_gpt, name) for name in ("attention", "mlp", "head_loss")}

    def watch(name):
        def call(*given):
            flat = [t for item in given for t in (item if isinstance(item, tuple) else (item,))]
            seen.extend(t for t in flat if torch.is_tensor(t) and t.dtype == torch.float8_e4m3fn)
            return plain[name](*given)

        return call

    for name in plain:
        monkeypatch.setattr(train_gpt, name, watch(name))
    batch = make_batch()
    model.train()
    model(batch, (3, 9))
    assert len({t.data_ptr() for t in seen}) == len(model.copies) + 1  # and that of the head's input
    seen.clear()
    model.eval()
    model(batch, (3, 9))
    model.logits(batch, (3, 9))
    assert not seen
