"""Every line of the list of ablations is a setting that the script takes, and every patch applies and trains."""

import json
import math
import re
import subprocess
import sys

import pytest
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
    assert {patch.name for entry in ENTRIES for patch in entry.patches} == {path.name for path in (record.RECORDS / "ablations").glob("*.patch")}


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if not entry.patches], ids=lambda entry: entry.name)
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


PROGRAM = """
import json, math, sys, torch, train_gpt
for name, flags, plain in json.loads(sys.argv[1]):
    s, world = train_gpt.parse_settings(flags), train_gpt.World()
    trainer, loader = train_gpt.Trainer(s, world), train_gpt.TrainLoader(s, world)
    torch.nn.init.normal_(trainer.model.head, std=0.02)
    for stack in trainer.normuon.stacks:
        stack.own.add_(0.01 * torch.randn_like(stack.own))  # the zeros of the start would hide a matrix that is not used
    steps = list(loader.stream(0, 2))
    trainer.model(steps[0][0], (128, 384)).sum().backward()
    new = {n: p for n, p in trainer.model.slots.named_parameters() if "mlp_middle" in n or "mlp_gate" in n}
    unused = [n for n, p in new.items() if not p.grad.abs().max() > 0]
    losses = [trainer.train_step(step, batches, (128, 384))[0].item() for step, batches in enumerate(steps)]
    alike = [p.double().sum().item() for p in train_gpt.GPT(train_gpt.parse_settings(plain), world).parameters()]
    print(json.dumps([name, len(new), unused, losses, alike]))
"""


@pytest.mark.parametrize("patches", sorted({entry.patches for entry in ENTRIES if entry.patches}), ids=lambda patches: patches[0].name)
def test_patches_train(patches, tmp_path):
    """A patched script: without its flags it is the model it was; with them two steps train it, its new matrices too."""
    plain = [*tiny_flags(tmp_path), "--num_scheduled_iterations=4", "--num_extension_iterations=0"]
    entries = [(entry.name, [*plain, *entry.flags, *plain[-2:]], plain) for entry in ENTRIES if entry.patches == patches]
    (tmp_path / "train_gpt.py").write_text(record.patched(SCRIPT, patches))
    command = [sys.executable, "-c", PROGRAM, json.dumps(entries)]  # on its own: the script names its operators for torch
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    wanted = [p.double().sum().item() for p in train_gpt.GPT(train_gpt.parse_settings(plain), train_gpt.World()).parameters()]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == [name for name, *_ in entries]
    for name, new, unused, losses, alike in found:
        assert new and not unused and all(map(math.isfinite, losses)) and losses[1] != losses[0], name
        assert alike == wanted, name
    assert len({losses[1] for _, _, _, losses, _ in found}) == len(found)  # no two lines are the same model
