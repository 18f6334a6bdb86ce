"""The model against its definition, read line by line, in float64."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from shards import tiny_flags

import train_gpt
from train_gpt import (
    GPT,
    WEIGHT_SCALE,
    Batch,
    Rotary,
    StepInputs,
    World,
    extend_context,
    make_banks,
    parse_settings,
)

MAX_TOKENS = 512
INPUTS = StepInputs(short_window=3, long_window=9)


def whole_flags(folder):
    """Flags of the tiny model with all of its layers."""
    return [*tiny_flags(folder), "--layers="]


def build(tmp_path, *flags):
    """A small model with random values where the record starts at zero, so that every part counts."""
    s = parse_settings([*whole_flags(tmp_path), "--model_dim=64", "--num_heads=2", *flags])
    model = GPT(s, MAX_TOKENS)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return s, model


def make_batch(T=50, vocab=257):
    starts = torch.tensor([0] * 20 + [20] * (T - 20), dtype=torch.int32)
    ends = torch.tensor([19] * 20 + [T - 1] * (T - 20), dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (T + 1,), dtype=torch.int32, generator=generator)
    return Batch(tokens[:-1], tokens[1:], starts, ends)


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def gate_of(x, w):
    return torch.sigmoid(x[:, :12] @ w.T)


def turn(y, angle):
    """Rotary embedding of one head (T, D) by angles (T, D / 2)."""
    low, high = y.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([low * cos + high * sin, high * cos - low * sin], -1)


def attend(P, i, y, batch, window, angle, H):
    """What attention of layer i adds, head by head, with every pair of tokens looked at."""
    T, d = y.shape
    D = d // H
    _, _, l0, l1 = P[f"blocks.{i}.lambdas"]
    q, k, v, o = P[f"blocks.{i}.qkvo.0"].reshape(4, d, d)
    value = {1: 1, 2: 2, 9: 0, 10: 1, 11: 2}.get(i)
    heads = []
    for h in range(H):
        part = slice(h * D, (h + 1) * D)
        vh = l0 * (y @ v.T)[:, part]
        if value is not None:
            vh = vh + l1 * P[f"value_embeds.{value}.weight"][batch.inputs.long()][:, part]
        scores = 0.1 * turn(rms((y @ q.T)[:, part]), angle) @ turn(rms((y @ k.T)[:, part]), angle).T
        for row in range(T):
            for column in range(T):
                same = batch.doc_start[row] == batch.doc_start[column]
                if not (same and row - window <= column <= row):
                    scores[row, column] = -math.inf
        heads.append(scores.softmax(-1) @ vh * gate_of(y, P[f"blocks.{i}.gate.0"])[:, h : h + 1])
    return torch.cat(heads, -1) @ o.T


def reference(model, s, batch, inputs, skips=((4, 7),), backout_layer=8, drop_mlp=()):
    """Losses by the definition: layer by layer, head by head, float64."""
    P = {name: p.detach().double() for name, p in model.named_parameters()}
    T, H = len(batch.inputs), s.num_heads
    D = s.model_dim // H
    e = P["embed"][batch.inputs.long()]
    x = e.clone()
    x[1:] = e[1:] + P["smear_lambda"] * gate_of(e, P["smear_gate"])[1:] * e[:-1]
    x = x0 = rms(x)
    freq = torch.cat([(1 / 1024) ** torch.linspace(0, 1, D // 4), torch.zeros(D // 4)]).double()
    angle = torch.arange(T)[:, None] * freq
    outputs = {}
    for i in range(12):
        for (source, target), w in zip(skips, P["skip_gates"], strict=True):
            if i == target:
                x = x + torch.sigmoid(w) * outputs[source]
        if i:
            a, b, _, _ = P[f"blocks.{i}.lambdas"]
            x = a * x + b * x0
            if i != 7:
                window = inputs.long_window if i in (4, 11) else inputs.short_window
                x = x + attend(P, i, rms(x), batch, window, angle, H)
            if i not in drop_mlp:
                x = x + (rms(x) @ P[f"blocks.{i}.c_fc.0"]).relu().square() @ P[f"blocks.{i}.c_proj.0"].T
        outputs[i] = x
    x = rms(x - P["backout_lambda"] * outputs[backout_layer])
    logits = 30 * torch.sigmoid(x @ P["lm_head.weight"].T / 7.5)
    return F.cross_entropy(logits, batch.targets.long(), reduction="none")


@pytest.mark.parametrize("T, windows", [(50, (3, 9)), (37, (128, 384))])
def test_loss_is_the_definition(tmp_path, T, windows):
    s, model = build(tmp_path)
    batch, inputs = make_batch(T), StepInputs(*windows)
    losses = model(batch, inputs)
    assert losses.shape == (T,) and losses.dtype == torch.float32
    assert torch.allclose(losses.double(), reference(model, s, batch, inputs), rtol=2e-4)
    model.eval()
    assert torch.allclose(model(batch, inputs), losses, rtol=1e-5)
    on_device = StepInputs(*(torch.tensor(x, dtype=torch.int32) for x in windows))  # as training gives them
    assert torch.equal(model(batch, on_device), model(batch, inputs))


def test_logits_are_those_of_the_loss(tmp_path):
    _, model = build(tmp_path)
    batch = make_batch()
    logits = model.logits(batch, INPUTS)
    assert logits.shape == (50, 384) and logits.dtype == torch.float32
    losses = F.cross_entropy(logits, batch.targets.long(), reduction="none")
    assert torch.allclose(losses, model(batch, INPUTS), rtol=1e-5)


def test_masks_of_queries_and_keys_agree(tmp_path, monkeypatch):
    """By a layer's mask, key j meets the queries from j to the last one that attends to it."""
    _, model = build(tmp_path)
    masks = []

    def attend(x, h, qkvo, gate, lambdas, ve, rotary, mask):
        masks.append(mask)
        return x

    monkeypatch.setattr(train_gpt.attention_, "run", attend)
    batch = make_batch()
    model(batch, INPUTS)
    at = torch.arange(50)
    for i, mask in zip((1, 2, 3, 4, 5, 6, 8, 9, 10, 11), masks, strict=True):
        window = INPUTS.long_window if i in (4, 11) else INPUTS.short_window
        near = (at[:, None] - window <= at) & (at <= at[:, None])
        seen = near & (batch.doc_start[:, None] == batch.doc_start)
        assert mask.first_key.tolist() == [row.nonzero().min() for row in seen]
        assert mask.last_query.tolist() == [column.nonzero().max() for column in seen.T]


def test_flags_change_the_layers(tmp_path):
    s, model = build(tmp_path, "--layers=5.mlp=0", "--skips=3-8,4-7", "--backout=9")
    batch = make_batch()
    wanted = reference(model, s, batch, INPUTS, skips=((3, 8), (4, 7)), backout_layer=9, drop_mlp=(5,))
    assert torch.allclose(model(batch, INPUTS).double(), wanted, rtol=2e-4)
    assert not model.blocks[5].c_fc and not model.blocks[5].c_proj


def test_parallel_paths_add_up(tmp_path):
    """Two paths in layer 3, the second of them silent, are one; no backout and no skip are allowed too."""
    _, one = build(tmp_path)
    flags = [*whole_flags(tmp_path), "--model_dim=64", "--num_heads=2", "--layers=3.attention=2,3.mlp=2"]
    two = GPT(parse_settings(flags), MAX_TOKENS)
    names = dict(one.named_parameters())
    with torch.no_grad():
        for name, p in two.named_parameters():
            if name in names:
                p.copy_(names[name])
        batch = make_batch()
        assert torch.allclose(one(batch, INPUTS), two(batch, INPUTS), rtol=1e-5)  # outputs start at zero
        two.blocks[3].c_proj[1].normal_()
        assert not torch.allclose(one(batch, INPUTS), two(batch, INPUTS), rtol=1e-3)
    bare = GPT(parse_settings([*flags, "--skips=", "--backout=-1"]), MAX_TOKENS)
    assert bare(batch, INPUTS).isfinite().all()


def test_first_loss_is_the_log_of_the_vocabulary(tmp_path):
    model = GPT(parse_settings(whole_flags(tmp_path)), MAX_TOKENS)
    assert torch.allclose(model(make_batch(), StepInputs(128, 384)), torch.tensor(math.log(384)))


def test_initial_parameters():
    s = parse_settings(["--vocab_size=257"])
    model = GPT(s, 64)
    bound = math.sqrt(3) * 0.5 * 768**-0.5
    spread = pytest.approx(bound / math.sqrt(3), rel=0.01)
    qkvo = model.blocks[1].qkvo[0].view(4, 768, 768)
    assert qkvo[:3].abs().max() <= bound and qkvo[:3].std().item() == spread
    assert not qkvo[3].any() and not model.blocks[1].c_proj[0].any() and not model.lm_head.weight.any()
    assert model.blocks[7].c_fc[0].std().item() == spread
    assert model.embed.std().item() == pytest.approx(1, rel=0.01) and len(model.value_embeds) == 3
    for block in model.blocks:
        assert torch.equal(block.lambdas, torch.tensor([1.1, 0.0, 0.5, 0.5]))
    assert model.smear_lambda == 0 and model.backout_lambda == 0.5 and model.skip_gates.tolist() == [-1.5]
    hidden = [p for block in model.blocks for p in (*block.qkvo, *block.c_fc, *block.c_proj)]
    assert len(hidden) == 32 and {p.shape for p in hidden} == {(768, 3072)}
    assert not any((model.blocks[0].qkvo, model.blocks[0].c_fc, model.blocks[7].qkvo))


def test_parameters_are_cast(tmp_path):
    """Tables, head and gates are in the model's dtype; hidden matrices and scalars are float32 masters."""
    model = GPT(parse_settings(whole_flags(tmp_path)), MAX_TOKENS, torch.bfloat16)
    block = model.blocks[1]
    cast = (
        model.embed,
        *model.value_embeds.parameters(),
        model.lm_head.weight,
        model.smear_gate,
        *block.gate,
    )
    exact = (block.lambdas, model.smear_lambda, model.backout_lambda, model.skip_gates)
    assert {p.dtype for p in cast} == {torch.bfloat16}
    assert {p.dtype for p in (*exact, *block.qkvo, *block.c_fc, *block.c_proj)} == {torch.float32}


def test_seed_decides_the_parameters(tmp_path):
    s = parse_settings(whole_flags(tmp_path))
    one, same, other = (GPT(dataclasses.replace(s, seed=seed), MAX_TOKENS) for seed in (1, 1, 2))
    assert torch.equal(one.embed, same.embed) and torch.equal(one.blocks[3].c_fc[0], same.blocks[3].c_fc[0])
    assert not torch.equal(one.embed, other.embed)


def test_yarn():
    rotary = Rotary(128, 300, torch.float32)
    start, scales = rotary.frequencies.clone().double(), [rotary.scale.item()]
    wanted = start.clone()
    for old, new in ((3, 7), (7, 11), (11, 13)):
        keep = ((128 * old * wanted / (2 * math.pi) - 1) / 31).clamp(0, 1)
        wanted = wanted * (old / new + keep * (1 - old / new))
        extend_context(rotary, 128 * old, 128 * new)
        scales.append(rotary.scale.item())
    assert scales == pytest.approx([0.1, 0.11695, 0.12752, 0.13178], abs=1e-5)
    assert torch.allclose(rotary.frequencies.double(), wanted, rtol=1e-6)
    angles = torch.outer(torch.arange(300.0).double(), wanted)
    assert torch.allclose(rotary.cos.double(), angles.cos(), atol=1e-4)
    assert torch.allclose(rotary.sin.double(), angles.sin(), atol=1e-4)
    assert rotary.frequencies[0] == 1 and not rotary.frequencies[32:].any()


def test_a_shrinking_window_leaves_the_rotary_embedding_alone(tmp_path):
    s = parse_settings([*whole_flags(tmp_path), "--windows=1/3,3/7,1/2"])
    model = GPT(s, MAX_TOKENS)
    scales = []
    for step in range(s.num_scheduled_iterations):
        train_gpt.begin_step(model, step, s)
        scales.append(round(model.rotary.scale.item(), 5))
    assert list(dict.fromkeys(scales)) == [0.1, 0.11695]


def test_norm_of_rotated_heads_is_kept():
    x = torch.randn(20, 3, 16)
    rotary = Rotary(16, 20, torch.float32)
    turned = train_gpt.apply_rotary(x, rotary.cos, rotary.sin)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------
# FP8 copies of the weights


@pytest.fixture
def in_fp8(monkeypatch):
    monkeypatch.setattr(train_gpt, "in_fp8", lambda device, part: True)


def give_to_banks(model):
    """Give a model's parameters to banks, with FP8 copies where they train in it."""
    for kind in ("normuon", "adam"):
        make_banks(model, kind, World())
    for p in model.parameters():
        p.bank.quantize(p)


def copied_weights(model):
    """The weights that have FP8 copies, and as how many matrices they are transposed."""
    weights = {model.lm_head.weight: 1}
    for block in model.blocks:
        for kind, matrices in (("qkvo", 4), ("c_fc", 1), ("c_proj", 1)):
            weights |= dict.fromkeys(getattr(block, kind), matrices)
    return weights


def transposed(w, matrices):
    """The transpose of a weight's values as its matrices one below the other."""
    return w.view(-1, w.size(1) // matrices).t()


def test_fp8_copies(tmp_path, in_fp8):
    """Of every matrix that trains in FP8, and transposed; renewed in place."""
    model = GPT(parse_settings(whole_flags(tmp_path)), MAX_TOKENS)
    give_to_banks(model)
    weights = copied_weights(model)
    before = {}
    for p in model.parameters():
        assert hasattr(p, "fp8_copies") == (p in weights)
    for p in weights:
        assert set(p.fp8_copies) == {"e4m3", "e4m3_t"}
        before[p] = {name: copy.data_ptr() for name, copy in p.fp8_copies.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    for p in weights:
        p.bank.quantize(p)
        assert {name: copy.data_ptr() for name, copy in p.fp8_copies.items()} == before[p]
        copy, other = (p.fp8_copies[name] for name in ("e4m3", "e4m3_t"))
        assert copy.dtype == other.dtype == torch.float8_e4m3fn and other.is_contiguous()
        wanted = p.detach().clamp(-0.875, 0.875)
        assert torch.allclose(copy.float() * WEIGHT_SCALE, wanted, rtol=1 / 16, atol=2**-19)
        assert torch.equal(other.float(), transposed(copy.float(), weights[p]))
    handle = train_gpt.weight_handle(model.blocks[3].qkvo[0])
    assert handle.e4m3 is model.blocks[3].qkvo[0].fp8_copies["e4m3"]
    assert handle.e4m3_t.shape == (model.embed.size(1), 4 * model.embed.size(1))


@pytest.mark.parametrize("parts", [set(), {"head"}, {"blocks"}])
def test_fp8_copies_of_the_parts_that_train_in_it(tmp_path, monkeypatch, parts):
    """Where the chip has FP8 for one of the two alone, the other has no copies."""
    monkeypatch.setattr(train_gpt, "in_fp8", lambda device, part: part in parts)
    model = GPT(parse_settings(whole_flags(tmp_path)), MAX_TOKENS)
    give_to_banks(model)
    for p in copied_weights(model):
        part = "head" if p is model.lm_head.weight else "blocks"
        assert hasattr(p, "fp8_copies") == (part in parts)


@pytest.mark.parametrize("layers", ["3.attention=2,5.mlp=3", "0.attention=1", "2.attention=0,9.mlp=0"])
def test_fp8_copies_of_any_layer_table(tmp_path, in_fp8, layers):
    """Each weight's copies are its own, however paths are spread over the layers."""
    model = GPT(parse_settings([*whole_flags(tmp_path), f"--layers={layers}"]), MAX_TOKENS)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    give_to_banks(model)
    for p, matrices in copied_weights(model).items():
        wanted = train_gpt.to_e4m3(p.detach(), WEIGHT_SCALE).float()
        assert torch.equal(p.fp8_copies["e4m3"].float(), wanted)
        assert torch.equal(p.fp8_copies["e4m3_t"].float(), transposed(wanted, matrices))


CHIPS = (((8, 0), set()), ((8, 9), {"head"}), ((9, 0), {"head", "blocks"}), ((10, 0), {"head"}))


@pytest.mark.parametrize("capability, parts", CHIPS)
def test_chips_that_train_in_fp8(capability, parts, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for part in ("head", "blocks"):
        assert train_gpt.in_fp8(torch.device("cuda"), part) == (part in parts)
        assert not train_gpt.in_fp8(torch.device("cpu"), part)


def test_evaluation_reads_no_copies(tmp_path, in_fp8, monkeypatch):
    """Handles of weights come with their FP8 copies in training alone."""
    _, model = build(tmp_path)
    give_to_banks(model)
    seen = []

    def watched(definition):
        def call(*args):
            handles = [train_gpt.weight_handle(a) for a in args if isinstance(a, torch.nn.Parameter)]
            fields = [t for handle in handles for t in (handle.grad, handle.e4m3, handle.e4m3_t)]
            seen.extend(t for t in fields if t is not None)
            return definition(*args)

        return call

    for operator in train_gpt.Operator.every:
        monkeypatch.setattr(operator, "run", watched(operator.definition))
    batch = make_batch()
    model.train()
    model(batch, INPUTS)
    found = {t.data_ptr() for t in seen}
    for p in copied_weights(model):
        assert {p.grad.data_ptr(), *(copy.data_ptr() for copy in p.fp8_copies.values())} <= found
    seen.clear()
    model.eval()
    with torch.no_grad():
        model(batch, INPUTS)
        model.logits(batch, INPUTS)
    assert not seen
