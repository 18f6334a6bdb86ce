"""Each optimizer against a dense float64 reference on random gradients, and its shards against the whole."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from shards import tiny_flags
from starts import server
from torch import nn

import train_gpt
from train_gpt import (
    GPT,
    POLAR_EXPRESS,
    Bank,
    DistAdam,
    NorMuon,
    Trainer,
    UsageError,
    World,
    check_registration,
    parse_settings,
    polar_express,
    trained,
)

STEPS = 5


def reference_polar(u):
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (1.02 * x.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def reference_normuon(w, grads, lrs, lr_mul, decay, momentum, beta2):
    """One matrix through all steps, in float64: momentum, polar factor, second moment, decay."""
    w, m, v = w.double(), torch.zeros_like(w).double(), torch.zeros(w.shape[1]).double()
    for g, lr in zip(grads, lrs, strict=True):
        g = g.double()
        m = momentum * m + (1 - momentum) * g
        u = reference_polar((1 - momentum) * g + momentum * m)
        before = u.norm()
        v = beta2 * v + (1 - beta2) * (u**2).mean(0)
        u = u / v.clamp(min=1e-10).sqrt()
        u = u * before / u.norm().clamp(min=1e-10)
        u = torch.where(u * w >= 0, u + lr * decay * w, u)
        w = w - lr * lr_mul * max(1, w.shape[0] / w.shape[1]) ** 0.5 * u
    return w


def reference_adam(p, grads, lr, beta1, beta2):
    p, m, v = p.double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()
    for t, g in enumerate(grads, 1):
        g = g.double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        p = p - lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) * m / (v.sqrt() + 1e-8)
    return p


class BF16World(World):
    """A CPU that computes as a GPU would."""

    dtype = torch.bfloat16


def build(tmp_path, world):
    flags = ["--micro_batches=4", "--model_dim=64", "--num_heads=4", "--seed=3"]
    s = parse_settings([*tiny_flags(tmp_path), *flags])
    model = GPT(s, 512, world.dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # zero matrices would hide a missing factor
    return s, model


def distance(found, wanted, start):
    """Relative error of the parameters and of how far they moved."""
    found, wanted, start = found.double(), wanted.double(), start.double()
    error = (found - wanted).norm()
    return (error / wanted.norm()).item(), (error / (wanted - start).norm()).item()


def master_of(banks, parameter):
    """A parameter's exact value, of a process that is alone."""
    for bank in banks:
        start = 0
        for p in bank.parameters:
            if p is parameter:
                return bank.master.reshape(-1)[start : start + p.numel()].view_as(p)
            start += p.numel()


def normuon_distances(tmp_path, world, seed):
    """Some matrices after some steps: the error of all, and by name those of how far each moved."""
    torch.manual_seed(seed)
    s, model = build(tmp_path, world)
    block = model.blocks[4]
    chosen = {
        "qkvo": block.qkvo[0],
        "c_fc": block.c_fc[0],
        "c_proj": block.c_proj[0],
        "gate": block.gate[0],
        "smear_gate": model.smear_gate,
    }
    starts = {name: p.detach().clone() for name, p in chosen.items()}
    optimizer = NorMuon(model, s, world)
    lrs = [s.muon_lr * (1 - 0.1 * t) for t in range(STEPS)]
    grads = {name: [] for name in chosen}
    for t in range(STEPS):
        for bank in optimizer.banks:
            bank.grad.copy_(torch.randn_like(bank.grad))
            for p in bank.parameters:
                columns = min(64, p.size(1))
                p.grad.mul_(torch.linspace(0.3, 3, columns).repeat(p.size(1) // columns))  # unlike columns
        for name, p in chosen.items():
            grads[name].append(p.grad.double() / 4)
        optimizer.set_step(lrs[t], 0.9, 4)
        optimizer.step()
        assert all(not bank.grad.any() for bank in optimizer.banks)
    everything, movements = [], {}
    for name, p in chosen.items():
        found = master_of(optimizer.banks, p)
        shape = (4, 64, 64) if name == "qkvo" else (1, *p.shape)
        factor = s.c_fc_lr_mul if name == "c_fc" else 1.0
        rest = lrs, factor, s.muon_weight_decay, 0.9, s.muon_beta2
        wanted = []
        for k, w in enumerate(starts[name].view(shape)):
            wanted.append(reference_normuon(w, [g.view(shape)[k] for g in grads[name]], *rest))
        wanted = torch.stack(wanted).view_as(p)
        everything.append([t.double().flatten() for t in (found, wanted, starts[name])])
        movements[name] = distance(found, wanted, starts[name])[1]
        assert torch.equal(p.detach(), found.to(p.dtype))
    return distance(*map(torch.cat, zip(*everything, strict=True)))[0], movements


def rounding(shape):
    """What bf16 leaves of a direction: 20 roundings to 2^-8, 3 an iteration, 1 a step, add up at random."""
    x = 1 / (1.02 * min(shape) ** 0.5)  # the singular values of the first iteration, whose terms cancel most
    a, b, c = POLAR_EXPRESS[0]
    terms = a * x, b * x**3, c * x**5
    return 20**0.5 * 2**-8 * sum(map(abs, terms)) / abs(sum(terms))


SHAPES = {"qkvo": (64, 64), "c_fc": (64, 256), "c_proj": (64, 256), "gate": (4, 12), "smear_gate": (1, 12)}


@pytest.mark.parametrize("world", [World(), BF16World()], ids=["float32", "bf16"])
def test_normuon(tmp_path, world):
    exact = world.dtype == torch.float32
    error, movements = normuon_distances(tmp_path, world, seed=1)
    assert error < (5e-5 if exact else 1e-2)
    for name, movement in movements.items():
        # In float32 an entry of a direction that is nearly zero may or may not decay.
        assert movement < (5e-4 if exact else rounding(SHAPES[name])), name


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_normuon_update_of_one_matrix(tmp_path, shape):
    """A tall matrix moves farther, by the root of its height over its width."""
    torch.manual_seed(1)
    s = parse_settings(tiny_flags(tmp_path))
    start, u = torch.randn(shape), torch.randn(shape)
    w, v = start.clone(), 0.01 * torch.ones(1, shape[1])
    lr, lr_mul = torch.tensor(0.05), torch.tensor([[2.0]])
    train_gpt.normuon_update(w, u, v, lr, lr_mul, s)
    second = 0.95 * 0.01 + 0.05 * u.double().square().mean(0)
    direction = u.double() / second.sqrt()
    direction *= u.double().norm() / direction.norm()
    direction += torch.where(direction * start >= 0, 0.05 * s.muon_weight_decay * start, 0)
    farther = max(1, shape[0] / shape[1]) ** 0.5
    assert torch.allclose(v.double(), second[None], rtol=1e-5)
    assert torch.allclose(w.double(), start - 0.05 * farther * 2.0 * direction, atol=1e-6)


ADAM_FACTORS = {"embed": 75, "value_embeds.1.weight": 75, "lm_head.weight": 1, "blocks.4.lambdas": 5}
ADAM_FACTORS |= {"smear_lambda": 5, "backout_lambda": 5, "skip_gates": 5}


@pytest.mark.parametrize("world, tolerance", [(World(), 1e-5), (BF16World(), 1e-2)], ids=["float32", "bf16"])
def test_adam(tmp_path, world, tolerance):
    torch.manual_seed(2)
    s, model = build(tmp_path, world)
    chosen = {name: model.get_parameter(name) for name in ADAM_FACTORS}
    starts = {name: p.detach().clone() for name, p in chosen.items()}
    optimizer, grads = DistAdam(model, s, world), {name: [] for name in chosen}
    for t in range(1, STEPS + 1):
        for name, p in chosen.items():
            p.grad.copy_(torch.randn_like(p.grad))
            grads[name].append(p.grad.double() / 4)
        optimizer.set_step(0.5, t, 4)
        optimizer.step()
    for name, p in chosen.items():
        wanted = reference_adam(starts[name], grads[name], 0.5 * 0.008 * ADAM_FACTORS[name], 0.65, 0.95)
        assert distance(p.detach(), wanted, starts[name])[0] < tolerance, name


def test_moments_are_of_mean_gradients(tmp_path):
    """Gradients of 4 micro-batches are summed; no update would show it, since both forget their scale."""
    s, model = build(tmp_path, World())
    normuon, adam = NorMuon(model, s, World()), DistAdam(model, s, World())
    for bank in normuon.banks + adam.banks:
        bank.grad.fill_(8.0)
    normuon.set_step(0.03, 0.9, 4)
    adam.set_step(1.0, 1, 4)
    normuon.step()
    adam.step()
    for bank in normuon.banks:
        assert torch.allclose(bank.moments.first.view(-1)[: bank.numel], torch.tensor(0.2))
    for bank in adam.banks:
        first, second = (moment.view(-1)[: bank.numel] for moment in bank.moments)
        assert torch.allclose(first, torch.tensor(0.7)) and torch.allclose(second, torch.tensor(0.2))


def test_zero_gradient_only_decays(tmp_path):
    """As in the first two steps, where the zero head leaves every hidden gradient exactly zero."""
    s, model = build(tmp_path, World())
    weight = model.blocks[4].c_proj[0]
    start = weight.detach().clone()
    optimizer = NorMuon(model, s, World())
    optimizer.set_step(0.03, 0.85, 4)
    optimizer.step()
    assert torch.allclose(weight, start * (1 - 0.03 * 0.03 * 1.2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_polar_express_orthogonalises(shape):
    """Singular values come near 1, wide or tall."""
    torch.manual_seed(0)
    u = torch.randn(2, *shape)
    values = torch.linalg.svdvals(polar_express(u))
    assert values.min() > 0.7 and values.max() < 1.3


# ------------------------------------------------------------------------------------------------------
# Ranks and banks


def _step_sharded(rank, size, folder, flags, results):
    dist.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=size)
    torch.set_num_threads(1)
    s, world = parse_settings(flags), World(rank, size)
    model = GPT(s, 512)
    normuon, adam = NorMuon(model, s, world), DistAdam(model, s, world)
    banks = normuon.banks + adam.banks
    for t in range(3):
        for i, bank in enumerate(banks):
            if size > 1:
                bank.require_grad_sync()
            for j, p in enumerate(bank.parameters):
                whole = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * t + 100 * i + j))
                p.grad.add_(whole * (rank + 1) / sum(range(1, size + 1)))  # the ranks' parts make the whole
            bank.finish_grad_sync()
        normuon.set_step(0.03, 0.9, s.micro_batches)
        adam.set_step(1.0, t + 1, s.micro_batches)
        normuon.step()
        adam.step()
        for bank in banks:
            for chunk in range(bank.chunks if size > 1 else 0):
                bank.all_gather(chunk)
    for bank in banks:
        for p in bank.parameters:
            bank.wait(p)
    results[rank] = [p.detach().clone() for p in model.parameters()]
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_shards_give_what_one_process_gives(tmp_path, size):
    """Three ranks divide neither the 32 hidden matrices nor most tables."""
    flags = [*tiny_flags(tmp_path), "--train_batch_size=512", "--micro_batches=8"]
    with mp.Manager() as manager:
        alone, together = manager.dict(), manager.dict()
        for results, ranks in ((alone, 1), (together, size)):
            folder = tmp_path / f"ranks{ranks}"
            folder.mkdir()
            arguments = (ranks, folder, flags, results)
            mp.start_processes(_step_sharded, arguments, ranks, start_method=server().get_start_method())
        for rank in range(size):
            pairs = zip(alone[0], together[rank], strict=True)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def make_bank(tensors, unit, world):
    parameters = {f"p.{i}": nn.Parameter(t) for i, t in enumerate(tensors)}
    return Bank(parameters, unit, world, torch.float32, torch.float32)


def test_bank_pads_and_never_drops():
    matrices = [torch.full((3, 2), float(i)) for i in range(5)]
    assert make_bank(matrices, 6, World()).param.shape == (5, 1, 6)
    bank = make_bank(matrices, 6, World(1, 4))
    assert bank.param.shape == (2, 4, 6) and bank.master.shape == (2, 6)
    assert bank.master[0].eq(1).all() and bank.master[1].eq(0).all()  # the second is padding
    assert [p[0, 0].item() for p in bank.parameters] == [0, 1, 2, 3, 4]
    assert make_bank([torch.arange(10.0)], 4, World(2, 3)).master.tolist() == [[8, 9, 0, 0]]


def test_bank_shares_a_table_out_over_all_ranks(tmp_path):
    """Each rank updates as much of a table as any other, but for what pads it."""
    s = parse_settings(tiny_flags(tmp_path))
    for bank in DistAdam(GPT(s, 512), s, World(2, 3)).banks:
        assert bank.chunks == 1 and 3 * bank.unit - bank.numel < 3


@pytest.mark.parametrize("rank", range(3))
def test_bank_scatters_a_whole_state(rank):
    """A rank's share of a state is where its master's is, for a number an entry and for one a column."""
    bank = make_bank([torch.arange(6.0).view(3, 2) + 6 * i for i in range(5)], 6, World(rank, 3))
    shares = torch.full((2, 6), -1.0), torch.full((2, 2), -1.0)
    bank.scatter(torch.arange(30.0), shares[0])
    bank.scatter(torch.arange(10.0), shares[1])
    assert torch.equal(shares[0], bank.master)
    columns = torch.arange(12.0).where(torch.arange(12) < 10, 0).view(2, 3, 2)
    assert torch.equal(shares[1], columns[:, rank])


# ------------------------------------------------------------------------------------------------------
# Registration


def widened(monkeypatch, parameter):
    """From now on every GPT has one more parameter, which its loss reads."""
    start, forward = GPT.__init__, GPT.forward

    def init(self, *args):
        start(self, *args)
        self.extra = parameter()

    monkeypatch.setattr(GPT, "__init__", init)
    monkeypatch.setattr(GPT, "forward", lambda self, *args: forward(self, *args) + self.extra.sum())


UNTRAINED = {
    "plain": lambda: nn.Parameter(torch.zeros(3)),
    "unknown optimizer": lambda: trained(torch.zeros(3), "sgd"),
    "no matrix": lambda: trained(torch.zeros(3), "normuon"),
}


@pytest.mark.parametrize("kind", UNTRAINED)
def test_a_parameter_that_no_optimizer_trains(tmp_path, monkeypatch, kind):
    """Before the first step, one line names it."""
    s = parse_settings(tiny_flags(tmp_path))
    check_registration(GPT(s, 512))
    widened(monkeypatch, UNTRAINED[kind])
    for refused in (lambda: check_registration(GPT(s, 512)), lambda: Trainer(s, World())):
        with pytest.raises(UsageError, match=r"\bextra\b") as error:
            refused()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer, shape", [("adam", (3,)), ("adam", (4, 5)), ("normuon", (4, 5))])
def test_a_new_parameter_is_trained(tmp_path, monkeypatch, optimizer, shape):
    """It needs no more than `trained`: its optimizer has it, at its rate."""
    s = parse_settings(tiny_flags(tmp_path))
    widened(monkeypatch, lambda: trained(torch.ones(shape), optimizer, lr_mul=3.0))
    trainer = Trainer(s, World())
    extra = trainer.model.extra
    owner = trainer.normuon if optimizer == "normuon" else trainer.adam
    (bank,) = (bank for bank in owner.banks if any(p is extra for p in bank.parameters))
    bank.grad.zero_()
    extra.grad.fill_(2.0)
    if optimizer == "adam":
        trainer.adam.set_step(1.0, 1, 2)
        trainer.adam.step()
        wanted = 1 - 3.0 * s.adam_lr  # Adam's first step is by the sign
    else:
        trainer.normuon.set_step(0.01, 0.9, 2)
        trainer.normuon.step()
        wanted = None
    assert (extra < 1).all() and (wanted is None or torch.allclose(extra, torch.tensor(wanted)))
