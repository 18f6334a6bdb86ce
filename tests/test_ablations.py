"""Every line of the list of ablations is a setting that the script takes, and every patch applies and trains."""

import math
import re
import sys

import pytest
import torch
from shards import tiny_flags

import train_gpt

sys.path.insert(0, str(train_gpt.Path(train_gpt.__file__).parent / "records"))
import record  # noqa: E402

SEEDS, ENTRIES = record.read_sweep(record.RECORDS / "ablations" / "ablations.txt")
SCRIPT = record.ROOT / "train_gpt.py"


def test_the_list_is_whole():
    names = " ".join(entry.name for entry in ENTRIES)
    for i in range(1, 12):
        assert f"no-mlp-{i} " in names and f"mlp-0-no-{i} " in names
    for layer in (0, 7, 11):
        for count in (2, 4):
            assert f"attention-{layer}-x{count} " in names and f"mlp-{layer}-x{count} " in names
    assert {entry.patch.name for entry in ENTRIES if entry.patch} == {path.name for path in (record.RECORDS / "ablations").glob("*.patch")}


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if not entry.patch], ids=lambda entry: entry.name)
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


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.patch], ids=lambda entry: entry.name)
def test_patches_train(entry, tmp_path):
    """A patched script, on the CPU: without its flags it is the model it was; with them it trains, its new matrices too."""
    flags = [*tiny_flags(tmp_path), *entry.flags, "--num_scheduled_iterations=4", "--num_extension_iterations=0"]
    module = type(sys)("patched")
    sys.modules["patched"] = module  # dataclasses look their module up
    exec(compile(record.patched(SCRIPT, entry.patch), "patched.py", "exec"), module.__dict__)
    s, world = module.parse_settings(flags), module.World()
    trainer, loader = module.Trainer(s, world), module.TrainLoader(s, world)
    torch.nn.init.normal_(trainer.model.head, std=0.02)
    for stack in trainer.normuon.stacks:
        stack.own.add_(0.01 * torch.randn_like(stack.own))  # the zeros of the start would hide a matrix that is not used
    steps = list(loader.stream(0, 2))
    trainer.model(steps[0][0], (128, 384)).sum().backward()
    extra = {name: p for name, p in trainer.model.slots.named_parameters() if "mlp_middle" in name or "mlp_gate" in name}
    assert extra and all(p.grad.abs().max() > 0 for p in extra.values())
    losses = [trainer.train_step(step, batches, (128, 384)).item() for step, batches in enumerate(steps)]
    assert all(map(math.isfinite, losses)) and losses[1] != losses[0]
    plain = module.GPT(module.parse_settings([flag for flag in flags if flag not in entry.flags]), world)
    same = train_gpt.GPT(train_gpt.parse_settings([flag for flag in flags if flag not in entry.flags]), train_gpt.World())
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), same.parameters(), strict=True))
