"""Every line of the list of ablations is a setting that the script takes; every patch applies and trains."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from fused import check_fused_versions
from shards import tiny_flags
from starts import forked, ranks_of

import train_gpt

sys.path.insert(0, str(Path(__file__).parent.parent / "records"))
import record  # noqa: E402

SEEDS, ENTRIES = record.read_sweep(record.RECORDS / "ablations" / "ablations.txt")
SCRIPT = record.ROOT / "train_gpt.py"
PATCHES = sorted((record.RECORDS / "ablations").glob("*.patch"))
SHORT = ["--micro_batches=4", "--num_scheduled_iterations=3", "--num_extension_iterations=0"]
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels run in the interpreter")
LONGER = {"batch_schedule", "multi_token"}  # may change 40 lines, where others may change 25


def test_the_list_is_whole():
    names = " ".join(entry.name for entry in ENTRIES)
    for i in range(1, 12):
        assert f"no-mlp-{i} " in names and f"mlp-0-no-{i} " in names
    for layer in (0, 7, 11):
        for count in (2, 4):
            assert f"attention-{layer}-x{count} " in names and f"mlp-{layer}-x{count} " in names
    assert {patch for entry in ENTRIES for patch in entry.patches} == set(PATCHES)


@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if not entry.patches], ids=lambda entry: entry.name
)
def test_flags_change_the_model(entry):
    """Each line differs from the baseline in the layer table or the skips, and says what its name says."""
    s, plain = train_gpt.parse_settings(entry.flags), train_gpt.parse_settings([])
    assert s.total_steps == 1705
    table, base = train_gpt.layer_table(s), train_gpt.layer_table(plain)
    assert (table != base) == (entry.name != "baseline")
    if found := re.fullmatch(r"(mlp-0-)?no-(?:mlp-)?(\d+)", entry.name):
        assert table[int(found[2])].mlp == 0 and table[0].mlp == (found[1] is not None)
    if found := re.fullmatch(r"(attention|mlp)-(\d+)-x(\d)", entry.name):
        assert getattr(table[int(found[2])], found[1]) == int(found[3])


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patches_are_small_and_leave_the_machine_alone(patch):
    """At most 5 hunks and 25 lines, all in Part I, which names no kernel, no device, no FP8 and no rank."""
    text = patch.read_text()
    lines = [line for line in text.splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
    assert len(re.findall("^@@", text, re.M)) <= 5
    assert len(lines) <= (40 if patch.stem in LONGER else 25)
    before, after = SCRIPT.read_text(), record.patched(SCRIPT, (patch,))
    rest = "# Part II: Machine"
    assert after.split(rest)[1] == before.split(rest)[1]
    part = after.split(rest)[0].split("# Part I: Recipe")[1]
    assert not re.search(r"triton|cuda|device|fp8|e4m3|\brank", part, re.I)
    assert all(len(line) <= 110 for line in after.splitlines())


PROGRAM = """
import json, sys, torch, train_gpt
import torch.distributed as dist

class Noisy(train_gpt.GPT):
    def __init__(self, *args):
        super().__init__(*args)
        torch.manual_seed(0)
        for p in self.parameters():
            p.data.add_(0.02 * torch.randn_like(p))  # the zeros of the start would hide what is not used

def two_steps(flags, world):
    s = train_gpt.parse_settings(flags)
    train_gpt.GPT = Noisy
    trainer, loader, losses = train_gpt.Trainer(s, world), train_gpt.TrainLoader(s, world), []
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for step, batches in enumerate(loader.stream(0, 2)):
        trainer.begin_step(step)
        losses.append(trainer.train_step(step, batches, train_gpt.step_inputs(step, s))[0].item())
    losses.append(trainer.validate(train_gpt.ValLoader(s, world).stream(), train_gpt.step_inputs(2, s)))
    trainer.wait()
    return losses, {name: not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters()}

dist.init_process_group("gloo")
rank = dist.get_rank()
for flags in json.loads(sys.argv[1]):
    alone = two_steps(flags, train_gpt.World()) if rank == 0 else None
    together = two_steps(flags, train_gpt.World(rank, 2))
    if rank == 0:
        print(json.dumps([alone, together]))
dist.destroy_process_group()
"""


def train_two_steps(folder, script, entries):
    """For each list of flags, in one and in two processes: losses of steps and a validation, what moved."""
    (folder / "train_gpt.py").write_text(script)
    done = forked(["-c", PROGRAM, json.dumps(entries)], ranks_of(2), folder=folder, timeout=250)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory):
    """The losses of the script itself, and its parameters."""
    folder = tmp_path_factory.mktemp("unpatched")
    ((alone, _),) = train_two_steps(folder, SCRIPT.read_text(), [[*tiny_flags(folder), *SHORT]])
    return alone


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patches_train(patch, tmp_path, unpatched):
    """Two steps are alike in one and in two processes, unlike those of the script, and train what is new."""
    own = [entry for entry in ENTRIES if entry.patches == (patch,)]
    own = own[:: max(1, len(own) // 2)]  # the lines of one patch differ only in their flags
    flags = [[*tiny_flags(tmp_path), *entry.flags, *SHORT] for entry in own]
    found = train_two_steps(tmp_path, record.patched(SCRIPT, (patch,)), flags)
    base, names = unpatched
    for entry, ((alone, moved), (together, _)) in zip(own, found, strict=True):
        assert all(map(math.isfinite, alone)), entry.name
        assert alone == pytest.approx(together, abs=1e-5), entry.name
        assert max(abs(a - b) for a, b in zip(alone, base, strict=True)) > 1e-5, entry.name
        new = {name: moves for name, moves in moved.items() if name not in names}
        kinds = {train_gpt.kind_of(name) for name in new}
        assert kinds == {train_gpt.kind_of(name) for name, moves in new.items() if moves}, entry.name
    assert len({tuple(alone) for (alone, _), _ in found}) == len(found)  # no two lines are the same model


@on_a_cpu
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patches_train_by_fused_versions(patch, tmp_path, monkeypatch):
    """In FP8 loss and gradients are the definitions': no patch takes a handle for a tensor."""
    path = tmp_path / "train_gpt.py"
    path.write_text(record.patched(SCRIPT, (patch,)))
    spec = importlib.util.spec_from_file_location(f"patched_{patch.stem}", path)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # its dataclasses look there
    spec.loader.exec_module(script)
    entry = next(entry for entry in ENTRIES if entry.patches == (patch,))
    small = ["--micro_batches=2", "--train_batch_size=64"]
    s = script.parse_settings([*tiny_flags(tmp_path), *entry.flags, *SHORT, *small])
    check_fused_versions(script, s, monkeypatch)
