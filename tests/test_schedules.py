"""The schedules of the record, at the steps where they turn."""

import pytest

from train_gpt import lr_scale, muon_momentum, parse_settings, attention_windows

RECORD = parse_settings([])


@pytest.mark.parametrize("step, blocks", [(0, (1, 3)), (728, (1, 3)), (729, (3, 7)), (1456, (3, 7)), (1457, (5, 11)), (2184, (5, 11)), (2185, (6, 13)), (2224, (6, 13))])  # fmt: skip
def test_windows(step, blocks):
    assert attention_windows(step, RECORD) == (128 * blocks[0], 128 * blocks[1])


@pytest.mark.parametrize("step, scale", [(0, 1), (1092, 1), (1093, 0.9 * 2 * (1 - 1093 / 2185) + 0.1), (2000, 0.9 * 2 * 185 / 2185 + 0.1), (2224, 0.9 * 0.0002 + 0.1)])  # fmt: skip
def test_learning_rate(step, scale):
    assert lr_scale(step, RECORD) == pytest.approx(scale)


@pytest.mark.parametrize("step, momentum", [(0, 0.85), (150, 0.90), (299, 0.85 + 0.1 * 299 / 300), (300, 0.95), (2175, 0.95), (2200, 0.90), (2224, 0.95 - 0.1 * 49 / 50)])  # fmt: skip
def test_momentum(step, momentum):
    assert muon_momentum(step, RECORD) == pytest.approx(momentum)


def test_short_run_never_leaves_the_momentum_rise():
    s = parse_settings(["--num_scheduled_iterations=200", "--num_extension_iterations=8"])
    assert [muon_momentum(step, s) for step in (0, 180, 207)] == pytest.approx([0.85, 0.91, 0.919])


def test_no_cooldown():
    assert lr_scale(10_000, parse_settings(["--cooldown_frac=0"])) == 1.0
