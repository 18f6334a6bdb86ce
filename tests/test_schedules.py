"""The schedules of the record, at the steps where they turn."""

import pytest

import train_gpt
from train_gpt import (
    StepInputs,
    StepShape,
    Variant,
    attention_windows,
    first_steps,
    learning_rate_scale,
    muon_momentum,
    parse_settings,
)

RECORD = parse_settings([])


@pytest.mark.parametrize(
    "step, blocks",
    [
        (0, (1, 3)),
        (728, (1, 3)),
        (729, (3, 7)),
        (1456, (3, 7)),
        (1457, (5, 11)),
        (2184, (5, 11)),
        (2185, (6, 13)),
        (2224, (6, 13)),
    ],
)
def test_windows(step, blocks):
    assert attention_windows(step, RECORD) == (128 * blocks[0], 128 * blocks[1])


@pytest.mark.parametrize(
    "step, scale",
    [
        (0, 1),
        (1092, 1),
        (1093, 0.9 * 2 * (1 - 1093 / 2185) + 0.1),
        (2000, 0.9 * 2 * 185 / 2185 + 0.1),
        (2224, 0.9 * 0.0002 + 0.1),
    ],
)
def test_learning_rate(step, scale):
    assert learning_rate_scale(step, RECORD) == pytest.approx(scale)


@pytest.mark.parametrize(
    "step, momentum",
    [
        (0, 0.85),
        (150, 0.90),
        (299, 0.85 + 0.1 * 299 / 300),
        (300, 0.95),
        (2175, 0.95),
        (2200, 0.90),
        (2224, 0.95 - 0.1 * 49 / 50),
    ],
)
def test_momentum(step, momentum):
    assert muon_momentum(step, RECORD) == pytest.approx(momentum)


def test_short_run_never_leaves_the_momentum_rise():
    s = parse_settings(["--num_scheduled_iterations=200", "--num_extension_iterations=8"])
    assert [muon_momentum(step, s) for step in (0, 180, 207)] == pytest.approx([0.85, 0.91, 0.919])


def test_no_cooldown():
    assert learning_rate_scale(10_000, parse_settings(["--cooldown_frac=0"])) == 1.0


def test_windows_of_the_last_validation():
    assert attention_windows(2225, RECORD) == (128 * 6, 128 * 20)
    assert train_gpt.step_inputs(2225, RECORD) == StepInputs(short_window=768, long_window=2560)


def test_steps_have_one_shape():
    """The record's; `test_data` and `test_main` have runs of several."""
    assert first_steps(RECORD) == {Variant(StepShape(8, 32_768, 2048), ()): 0}
    assert StepShape(8, 32_768, 2048).tokens == 262_144
    assert train_gpt.longest_sequence(RECORD) == 262_144  # a validation micro-batch


def test_shapes_by_the_step(monkeypatch):
    """Each is named once, with its first step, also where it comes back."""
    shapes = [StepShape(2, 10, 5), StepShape(4, 30, 5), StepShape(2, 10, 5), StepShape(2, 10, 6)]
    monkeypatch.setattr(train_gpt, "step_shape", lambda step, s: shapes[step])
    s = parse_settings(
        ["--num_scheduled_iterations=3", "--num_extension_iterations=1", "--val_batch_size=160"]
    )
    assert first_steps(s) == {Variant(shapes[0], ()): 0, Variant(shapes[1], ()): 1, Variant(shapes[3], ()): 3}
    assert train_gpt.longest_sequence(s) == 30


def test_variants_by_true_or_false(monkeypatch):
    """Numbers change from step to step within a variant; what is true or false makes another."""
    shape = train_gpt.step_shape(0, RECORD)
    monkeypatch.setattr(
        train_gpt, "step_inputs", lambda step, s: (step, 0.5 * step, step >= 100, step % 2 == 1)
    )
    wanted = {(False, False): 0, (False, True): 1, (True, False): 100, (True, True): 101}
    assert first_steps(RECORD) == {Variant(shape, choices): step for choices, step in wanted.items()}
