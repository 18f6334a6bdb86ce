"""Flags, presets, the layer table: what they accept, and the one line with which they refuse the rest."""

import dataclasses
import math

import pytest

import train_gpt
from train_gpt import UsageError, layer_table, parse_settings, skip_table


def test_every_field_is_a_flag_and_in_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    for f in dataclasses.fields(train_gpt.Hyperparameters):
        (line,) = [line for line in lines if line.startswith(f"  --{f.name} ")]
        assert f.metadata["help"] in line and line.endswith(f"[{f.default if f.default != '' else '(none)'}]")


def test_defaults_are_the_record():
    s = parse_settings([])
    assert s.total_steps == 2225
    assert s.train_batch_size == 262_144 and s.val_micro_batch_tokens == 262_144
    assert train_gpt.step_shape(0, s).micro_batch_tokens == 32_768
    assert s.padded_vocab_size == 50_304 and s.bos == 50_256


def test_flags_go_over_the_preset():
    s = parse_settings(["--seed", "5", "--preset=sample", "--model_dim=64", "--num_heads=2", "--muon_lr=0.5"])
    assert (s.seed, s.model_dim, s.vocab_size, s.muon_lr) == (5, 64, 257, 0.5)


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--sed=1", "unknown flag --sed; did you mean --seed?"),
        ("--val_tokenz=1", "did you mean --val_tokens?"),
        ("--seed=1.5", "--seed: invalid int value: '1.5'"),
        ("--muon_lr=fast", "--muon_lr: invalid float value: 'fast'"),
        ("--muon_lr=nan", "--muon_lr=nan"),
        ("--adam_beta1=1.0", "below 1"),
        ("--seed=-1", "--seed=-1"),
        ("--seed=18446744073709551616", "at most 9223372036854775807"),
        ("--seed=1" + 400 * "0", "at most 9223372036854775807"),
        ("--train_max_seq_len=99999999999999999999", "at most 2147483647"),
        ("--num_scheduled_iterations=100000000", "at most 1000000"),
        ("--head_lr_mul=1e300", "at most 1000000"),
        ("--log_dir=logs\udcff", "--log_dir='logs\\udcff': give printable text"),
        ("--log_dir=a\nb", "--log_dir='a\\nb': give printable text"),
        ("--micro_batches=0", "--micro_batches=0"),
        ("--micro_batches=3", "--train_batch_size=262144 is not a multiple of --micro_batches=3"),
        ("--val_batch_size=7", "--val_batch_size=7 has no token for each of --micro_batches=8"),
        ("--save_checkpoint=yes", "--save_checkpoint: invalid true_or_false value: 'yes'"),
        ("--profile=5", "--profile: cannot read '5'"),
        (f"--profile=1:{'9' * 5000}", "--profile: cannot read"),
        (f"--layers={'9' * 5000}.mlp=0", "--layers: cannot read"),
        (f"--skips={'9' * 5000}-7", "--skips: cannot read"),
        (f"--windows={'9' * 5000}/7", "--windows: cannot read"),
        ("--profile=5:2226", "at most 2225"),
        ("--num_heads=5", "--model_dim=768"),
        ("--vocab_size=70000", "--vocab_size=70000"),
        ("--preset=fast", "--preset=fast is not known; choose from record, sample"),
        ("--cooldown_frac=1.5", "--cooldown_frac=1.5"),
        ("--layers=12.mlp=0", "cannot read '12.mlp=0'"),
        ("--layers=5.window=wide", "cannot read '5.window=wide'"),
        ("--layers=5.depth=1", "cannot read '5.depth=1'"),
        ("--layers=5", "cannot read '5'"),
        ("--layers=5.value=500", "cannot read '5.value=500'"),
        ("--layers=5.mlp=-1", "cannot read '5.mlp=-1'"),
        ("--skips=8-3", "cannot read '8-3'"),
        ("--skips=3", "cannot read '3'"),
        ("--layers=7.mlp=0", "'4-7' ends at layer 7, which has no path"),
        ("--backout=12", "--backout=12"),
        ("--windows=3", "--windows: cannot read '3'"),
        ("--final_window=6/x", "--final_window: cannot read '6/x'"),
        ("stray", "unknown flag stray"),
    ],
)
def test_refusals(flag, says):
    with pytest.raises(UsageError) as error:
        parse_settings([flag])
    assert says in str(error.value) and "\n" not in str(error.value)


NUMBERS = [f for f in dataclasses.fields(train_gpt.Hyperparameters) if f.type in (int, float)]


@pytest.mark.parametrize("f", NUMBERS, ids=lambda f: f.name)
def test_bounds(f):
    """Beside each number stand its bounds, and beyond them, or not finite, it is refused in one line."""
    low, high = f.metadata["low"], f.metadata["high"]
    assert low <= f.default <= high
    step = 1 if f.type is int else 1e-3
    beyond = [low - step, high + step]
    if f.type is float:
        beyond += [math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.inf, math.nan]
    for value in beyond:
        with pytest.raises(UsageError) as error:
            parse_settings([f"--{f.name}={value!r}"])
        assert str(error.value).startswith(f"--{f.name}={value}: give a number of at least {low} and ")
        assert "\n" not in str(error.value)
    for value in (low, high):
        try:  # it may be at odds with another setting, but is within its bounds
            parse_settings([f"--{f.name}={value!r}"])
        except UsageError as error:
            assert "give a number" not in str(error)


def test_layer_table():
    table = layer_table(parse_settings([]))
    attention, mlp, window, value = (
        [getattr(layer, name) for layer in table] for name in ("attention", "mlp", "window", "value")
    )
    assert attention == [0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    assert mlp == [0] + [1] * 11
    assert [i for i in range(12) if attention[i] and window[i] == "long"] == [4, 11]
    assert value == [-1, 1, 2, -1, -1, -1, -1, -1, -1, 0, 1, 2]


def test_layer_changes():
    s = parse_settings(["--layers=5.mlp=0,0.attention=2,3.window=long,9.value=-1", "--skips=4-7,3-8"])
    table = layer_table(s)
    assert (table[5].mlp, table[0].attention, table[3].window, table[9].value) == (0, 2, "long", -1)
    assert skip_table(s) == ((4, 7), (3, 8))
    text = train_gpt.describe_settings(s)
    assert "layers=5.mlp=0," in text and "layer 5: window=short value=- attention=1 mlp=0" in text


def test_no_path_left():
    with pytest.raises(UsageError, match="no layer with a path"):
        parse_settings(
            ["--layers=" + ",".join(f"{i}.{name}=0" for i in range(12) for name in ("attention", "mlp"))]
        )
