"""Train a GPT-2-class language model to 3.28 validation loss on FineWeb, fast: the whole run in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py [--name=value ...]    # 8 GPUs, or fewer
    python train_gpt.py --preset=sample                                         # a small model on a CPU
    python train_gpt.py --help                                                  # every setting

Part I, the recipe, is plain PyTorch: the settings, the model, the schedules, the optimizers' mathematics
and the data. An idea is written there. Part II, the machine, makes it fast: Triton kernels for the model's
operators, and parameters sharded over GPUs. Part III runs it: training, log, checkpoints, main.
Each part is made of rooms, and a room uses only rooms above it.

Measured on one NVIDIA H200 (torch 2.11, Triton 3.6): the record's 262,144-token steps take 282 ms and
15.0 GiB. README.md says on what data.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import glob
import itertools
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import uuid
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.utils import benchmark
from tqdm import tqdm
from triton.tools.tensor_descriptor import TensorDescriptor

IMPORTED = time.perf_counter()
NAME = Path(__file__).name  # in error lines: a copy's are told apart

# Part I: Recipe
# ======================================================================================================
# Settings


class UsageError(Exception):
    """A mistake of the user's: its text is one line that names the file or flag and what to do."""


@dataclass(frozen=True)
class Layer:
    """One layer slot. Parallel paths read the same normalized input, and their outputs are added."""

    window: str = "short"  # "short" or "long": how far attention looks back
    value: int = -1  # index of the value embedding mixed into v, -1 for none
    attention: int = 1  # parallel attention paths
    mlp: int = 1  # parallel MLP paths


# The layer table. A slot without paths runs nothing. --layers, --skips and --backout change it for one run.
LAYERS = (
    Layer(attention=0, mlp=0),  # 0
    Layer(value=1),  # 1
    Layer(value=2),  # 2
    Layer(),  # 3
    Layer(window="long"),  # 4
    Layer(),  # 5
    Layer(),  # 6
    Layer(attention=0),  # 7
    Layer(),  # 8
    Layer(value=0),  # 9
    Layer(value=1),  # 10
    Layer(window="long", value=2),  # 11
)


def setting(default, description: str, low: float | None = None, high: float | None = None):
    """A field with its line for --help and its bounds: of a whole number 1 and 2^31 - 1, unless given."""
    bounds = (1, 2**31 - 1) if type(default) is int else (0, 1e6)
    low, high = (b if given is None else given for given, b in zip((low, high), bounds, strict=True))
    return field(default=default, metadata={"help": description, "low": low, "high": high})


BELOW_1 = math.nextafter(1, 0)


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run; each is a flag --name=value. The defaults are the record's."""

    preset: str = setting("record", "start from these settings: record or sample")
    # data
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "training shards, read once, by name")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "validation shards; the first is read")
    val_tokens: int = setting(10_485_760, "validation tokens")
    train_batch_size: int = setting(262_144, "tokens a step")
    train_max_seq_len: int = setting(2048, "tokens of a document that training reads at most")
    micro_batches: int = setting(8, "packed sequences that each batch is split into; more need less memory")
    val_batch_size: int = setting(2_097_152, "validation tokens a batch")
    val_loss_every: int = setting(250, "steps between validations; 0 validates at the end only", low=0)
    # model
    vocab_size: int = setting(50_257, "token ids; the last, BOS, begins each document", low=2, high=65_536)
    model_dim: int = setting(768, "width of the residual stream", low=12, high=2**16)
    num_heads: int = setting(6, "attention heads a path")
    layers: str = setting("", "changes to the layer table, as 5.mlp=0,0.attention=2,3.window=long,9.value=-1")
    skips: str = setting("4-7", "long skip connections, from-to, as 4-7,3-8")
    backout: int = setting(8, "layer that the head's input subtracts; -1: none", low=-1, high=len(LAYERS) - 1)
    # schedule
    num_scheduled_iterations: int = setting(2185, "steps of the rate and window schedules", high=10**6)
    num_extension_iterations: int = setting(40, "steps after those, at the lowest rate", low=0, high=10**6)
    cooldown_frac: float = setting(0.5, "share of the scheduled steps in which the rate falls", high=1)
    final_lr_scale: float = setting(0.1, "learning rate at the end, as a share of its peak")
    windows: str = setting(
        "1/3,3/7,5/11", "short/long windows in blocks of 128 tokens, by equal parts of the run"
    )
    extension_window: str = setting("6/13", "windows of the extension")
    final_window: str = setting("6/20", "windows of the last validation")
    # optimizers
    muon_lr: float = setting(0.03, "NorMuon learning rate, for hidden and gate matrices")
    muon_weight_decay: float = setting(1.2, "NorMuon cautious weight decay")
    muon_beta2: float = setting(0.95, "NorMuon second-moment decay", high=BELOW_1)
    momentum_low: float = setting(0.85, "NorMuon momentum at the first and the last step", high=BELOW_1)
    momentum_high: float = setting(0.95, "NorMuon momentum in between", high=BELOW_1)
    momentum_warmup: int = setting(300, "steps in which the momentum rises", low=0)
    momentum_cooldown: int = setting(50, "last steps, in which it falls back", low=0)
    c_fc_lr_mul: float = setting(2.0, "learning rate factor of the MLPs' input matrices")
    adam_lr: float = setting(0.008, "DistAdam learning rate, for embeddings, head and scalars")
    adam_beta1: float = setting(0.65, "DistAdam first-moment decay", high=BELOW_1)
    adam_beta2: float = setting(0.95, "DistAdam second-moment decay", high=BELOW_1)
    embed_lr_mul: float = setting(75.0, "learning rate factor of token and value embeddings")
    head_lr_mul: float = setting(1.0, "learning rate factor of the head")
    scalar_lr_mul: float = setting(5.0, "learning rate factor of the scalars")
    # run
    seed: int = setting(1337, "seed of the initial parameters", low=0, high=2**63 - 1)
    warmup_steps: int = setting(
        2, "throw-away steps before the clock, which compile everything; 1 means 2", low=0
    )
    log_dir: str = setting("logs", "folder of the logs and checkpoints")
    save_every: int = setting(0, "steps between checkpoints, the last two stay; 0 for none", low=0)
    save_checkpoint: bool = setting(False, "save a checkpoint at the end")
    resume: str = setting("", "go on from this checkpoint, or from the latest in the folder of the logs")
    profile: str = setting("", "profile these steps, FROM:TO, as 20:22, into a trace beside the log")

    @property
    def total_steps(self) -> int:
        return self.num_scheduled_iterations + self.num_extension_iterations

    @property
    def val_micro_batch_tokens(self) -> int:
        """Tokens of a validation micro-batch, but for the last, which may be shorter."""
        return self.val_batch_size // self.micro_batches

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the head and of each embedding: the vocabulary, padded to a multiple of 128."""
        return math.ceil(self.vocab_size / 128) * 128

    @property
    def bos(self) -> int:
        return self.vocab_size - 1


PRESETS = {
    "record": {},
    "sample": {
        "train_files": "data/sample/sample_train_*.bin",
        "val_files": "data/sample/sample_val_*.bin",
        "vocab_size": 257,
        "model_dim": 128,
        "num_heads": 4,
        "train_batch_size": 4096,
        "train_max_seq_len": 512,
        "val_tokens": 32_768,
        "val_batch_size": 8192,
        "val_loss_every": 25,
        "num_scheduled_iterations": 105,
        "num_extension_iterations": 5,
    },
}


def parse_settings(arguments: list[str]) -> Hyperparameters:
    """Settings from the command line: defaults, then the preset, then the flags.

    Raises UsageError for an unknown flag (naming the closest one) and for a value that is of the wrong type,
    out of bounds or at odds with another; --help exits.
    """
    fields = dataclasses.fields(Hyperparameters)
    parser = argparse.ArgumentParser(
        usage=f"{NAME} [--name=value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=40, width=200),
    )
    parser.error = _refuse_flag
    for f in fields:
        kind = true_or_false if f.type is bool else f.type
        default = str(f.default).replace("%", "%%") or "(none)"
        text = f"{f.metadata['help']} [{default}]"
        parser.add_argument(f"--{f.name}", type=kind, metavar=f.type.__name__.upper(), help=text)
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name, [f"--{f.name}" for f in fields], n=1, cutoff=0.0)
        raise UsageError(f"unknown flag {name}; did you mean {close[0]}? (--help lists all)")
    flags = vars(flags)
    preset = flags.get("preset", "record")
    if preset not in PRESETS:
        raise UsageError(f"--preset={preset} is not known; choose from {', '.join(PRESETS)}")
    settings = Hyperparameters(**PRESETS[preset] | flags)
    check_settings(settings)
    return settings


def true_or_false(text: str) -> bool:
    """The value of a yes-or-no flag; raises ValueError for anything else."""
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _refuse_flag(message: str):
    raise UsageError(message.replace("argument --", "--", 1))


def check_settings(s: Hyperparameters):
    """Raise UsageError, naming the flag, when a value is out of its bounds or does not fit another."""
    for f in dataclasses.fields(s):
        value, low, high = getattr(s, f.name), f.metadata["low"], f.metadata["high"]
        if f.type is str and not value.isprintable():
            raise UsageError(f"--{f.name}={value!a}: give printable text, in UTF-8")
        if f.type in (int, float) and not low <= value <= high:
            upper = "below 1" if high == BELOW_1 else f"at most {high}"
            raise UsageError(f"--{f.name}={value}: give a number of at least {low} and {upper}")
    if s.train_batch_size % s.micro_batches:
        raise UsageError(
            f"--train_batch_size={s.train_batch_size} is not a multiple of --micro_batches={s.micro_batches};"
            " change one of them"
        )
    if s.val_batch_size < s.micro_batches:
        raise UsageError(
            f"--val_batch_size={s.val_batch_size} has no token for each of --micro_batches={s.micro_batches};"
            " raise it"
        )
    if s.model_dim % (4 * s.num_heads):
        raise UsageError(f"--model_dim={s.model_dim}: give a multiple of 4 x --num_heads={s.num_heads}")
    for table in (layer_table, skip_table, window_table, profiled_steps):
        table(s)
    for name in ("extension_window", "final_window"):
        parse_window(name, getattr(s, name))


def whole_number(text: str) -> int | None:
    """The number that text of 1 to 9 digits writes; None for other text."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def layer_table(s: Hyperparameters) -> tuple[Layer, ...]:
    """The layer table with the changes of --layers; raises UsageError for one that it does not understand."""
    table = list(LAYERS)
    for change in filter(None, s.layers.split(",")):
        place, _, value = change.partition("=")
        index, _, column = place.partition(".")
        index = whole_number(index)
        columns = {f.name for f in dataclasses.fields(Layer)}
        if index is None or index >= len(table) or column not in columns:
            value = None
        elif column == "window":
            value = value if value in ("short", "long") else None
        else:
            low, high = (-1, 15) if column == "value" else (0, 16)
            value = int(value) if re.fullmatch(r"-?\d{1,3}", value) and low <= int(value) <= high else None
        if value is None:
            raise UsageError(
                f"--layers: cannot read {change!r}; write LAYER.COLUMN=VALUE with a layer from 0 to"
                f" {len(LAYERS) - 1} and window=short|long, value=INDEX (0 to 15, -1 for none),"
                " attention=PATHS or mlp=PATHS (0 to 16)"
            )
        table[index] = dataclasses.replace(table[index], **{column: value})
    if not any(layer.attention or layer.mlp for layer in table):
        raise UsageError("--layers leaves no layer with a path; keep at least one")
    return tuple(table)


def skip_table(s: Hyperparameters) -> tuple[tuple[int, int], ...]:
    """The long skip connections as (from, to) pairs; raises UsageError when one cannot run."""
    skips = []
    for text in filter(None, s.skips.split(",")):
        source, _, target = text.partition("-")
        source, target = whole_number(source), whole_number(target)
        if source is None or target is None or not source < target < len(LAYERS):
            raise UsageError(
                f"--skips: cannot read {text!r}; write FROM-TO, as 4-7, FROM below TO below {len(LAYERS)}"
            )
        layer = layer_table(s)[target]
        if not (layer.attention or layer.mlp):
            raise UsageError(
                f"--skips: {text!r} ends at layer {target}, which has no path and so runs nothing;"
                " end it elsewhere"
            )
        skips.append((source, target))
    return tuple(skips)


def parse_window(name: str, text: str) -> tuple[int, int]:
    """(short, long) windows in tokens from a pair such as 3/7, in blocks; raises UsageError for others."""
    short, _, long = text.partition("/")
    short, long = whole_number(short), whole_number(long)
    if short is None or long is None or short > 10_000 or not 1 <= long <= 10_000:
        raise UsageError(f"--{name}: cannot read {text!r}; write SHORT/LONG in blocks of 128 tokens, as 3/7")
    return 128 * short, 128 * long


def window_table(s: Hyperparameters) -> list[tuple[int, int]]:
    """The scheduled (short, long) windows, in tokens."""
    return [parse_window("windows", text) for text in s.windows.split(",")]


def profiled_steps(s: Hyperparameters) -> range:
    """The steps of --profile, none by default; raises UsageError."""
    if not s.profile:
        return range(0)
    start, _, end = s.profile.partition(":")
    start, end = whole_number(start), whole_number(end)
    if start is None or end is None or not start < end <= s.total_steps:
        raise UsageError(
            f"--profile: cannot read {s.profile!r}; write FROM:TO, as 20:22, with FROM below TO,"
            f" at most {s.total_steps}"
        )
    return range(start, end)


def describe_settings(s: Hyperparameters) -> str:
    """The effective settings and the layer table, a line each, for the log."""
    lines = [f"{f.name}={getattr(s, f.name)}" for f in dataclasses.fields(s)]
    for i, layer in enumerate(layer_table(s)):
        window = layer.window if layer.attention else "-"
        value = f"ve{layer.value}" if layer.attention and layer.value >= 0 else "-"
        lines.append(f"layer {i}: window={window} value={value} attention={layer.attention} mlp={layer.mlp}")
    return "\n".join(lines)


# ======================================================================================================
# Model: every operator is defined here, in plain PyTorch, and the definitions are the model. T is the
# number of packed tokens, C the width, H the number of heads, D = C / H, V the padded vocabulary.

GATE_CHANNELS = 12  # gates read only the first channels of their input
SOFTCAP, SOFTCAP_SLOPE = 30.0, 7.5


class Operator:
    """A function of tensors. Its definition is the model; Part II may have a fused version that runs instead.

    To change a definition, write `@unfused` above it in place of `@Operator`: then it runs as it stands, with
    the fused versions of the operators that it calls. Operators take whole parameters. One whose name ends in
    an underscore may write over its first argument, which nobody may read afterwards.
    """

    every: list["Operator"] = []

    def __init__(self, definition, fusible: bool = True):
        functools.update_wrapper(self, definition)
        self.definition, self.fusible = definition, fusible
        self.run, self.fused = definition, None
        Operator.every.append(self)

    def __call__(self, *args):
        return self.run(*args)


unfused = functools.partial(Operator, fusible=False)


class Batch(NamedTuple):
    """Packed documents, int32 (T,): tokens, next tokens, first and last index of each token's document."""

    inputs: Tensor
    targets: Tensor
    doc_start: Tensor
    doc_end: Tensor


class StepInputs(NamedTuple):
    """What a step sets for the model. In training, numbers come as tensors and true or false as it is."""

    short_window: int  # how many tokens back the layers of each kind attend
    long_window: int


class Mask(NamedTuple):
    """Query i attends to keys first_key[i] to i, so key j meets queries j to last_query[j]: int32 (T,)."""

    first_key: Tensor  # neither ever decreases
    last_query: Tensor


def rms_norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without a weight (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=torch.finfo(torch.float32).eps)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (T, H, D): column i turns with column i + D / 2 of a head."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[: len(x), None], sin[: len(x), None]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


@Operator
def embedding(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows (T, C) of a table (V, C) for tokens, int32 (T,)."""
    return F.embedding(tokens, table)


@Operator
def smear(e: Tensor, gate: Tensor, smear_lambda: Tensor) -> Tensor:
    """Add to each embedding (T, C) a gated share of the one before it, then normalize. gate: (1, 12)."""
    shares = smear_lambda * torch.sigmoid(F.linear(e[1:, :GATE_CHANNELS], gate))
    return rms_norm(torch.cat([e[:1], e[1:] + shares * e[:-1]]))


@Operator
def mix_norm(x: Tensor, x0: Tensor, lambdas: Tensor) -> tuple[Tensor, Tensor]:
    """Return x = a x + b x0 and its RMS norm. lambdas: a layer's a, b, l0, l1, float32 (4,)."""
    a, b, _, _ = lambdas.unbind()
    x = a * x + b * x0
    return x, rms_norm(x)


@Operator
def norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and its RMS norm: both, so that one backward pass covers them."""
    return x, rms_norm(x)


@Operator
def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: Tensor) -> Tensor:
    """Attention of q, k and v (T, H, D) under a mask, with the softmax scale given (arXiv 2205.14135)."""
    position = torch.ones_like(mask.first_key).cumsum(0) - 1  # 0 to T - 1
    visible = (mask.first_key[:, None] <= position) & (position <= position[:, None])
    q, k, v = (t.transpose(0, 1)[None] for t in (q * scale, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=1.0)[0].transpose(0, 1)


@Operator
def attention_(x, h, qkvo, gate, lambdas, ve, rotary, mask: Mask) -> Tensor:
    """The residual stream x (T, C) plus self-attention over its norm h.

    qkvo: (C, 4 C), the row-major view of Q, K, V and O, each (C, C), output by input. gate: (H, 12), the gate
    of each head's output. lambdas: as in `mix_norm`; l0 and l1 weigh v and each token's value embedding ve
    (T, C), if the layer has one (value residual, arXiv 2410.17897). rotary: a `Rotary`.
    """
    T, C = x.shape
    H = len(gate)
    _, _, l0, l1 = lambdas.unbind()
    w_qkv, w_o = qkvo.view(4 * C, C).split([3 * C, C])
    q, k, v = F.linear(h, w_qkv).view(T, 3, H, C // H).unbind(1)
    q = apply_rotary(rms_norm(q), rotary.cos, rotary.sin)
    k = apply_rotary(rms_norm(k), rotary.cos, rotary.sin)
    v = l0 * v if ve is None else l0 * v + l1 * ve.view_as(v)
    y = flash_attention(q, k, v, mask, rotary.scale)
    y = y * torch.sigmoid(F.linear(h[:, :GATE_CHANNELS], gate))[:, :, None]
    return x + F.linear(y.reshape(T, C), w_o)


@Operator
def mlp(x: Tensor, h: Tensor, c_fc: Tensor, c_proj: Tensor) -> Tensor:
    """The residual stream x (T, C) plus a ReLU^2 MLP (arXiv 2109.08668) over h. Both weights: (C, 4 C)."""
    return x + F.linear(torch.relu(h @ c_fc).square(), c_proj)


@Operator
def skip(x: Tensor, earlier: Tensor, gate: Tensor) -> Tensor:
    """A long skip connection: add an earlier layer's output, times its gate's sigmoid."""
    return x + torch.sigmoid(gate) * earlier


@Operator
def backout(x: Tensor, earlier: Tensor | None, backout_lambda: Tensor) -> Tensor:
    """Subtract a share of an earlier layer's output, if one is given, then normalize: the head's input."""
    return rms_norm(x if earlier is None else x - backout_lambda * earlier)


def softcap(z: Tensor) -> Tensor:
    """Bound logits smoothly, in float32 (arXiv 2408.00118)."""
    return SOFTCAP * torch.sigmoid(z.float() / SOFTCAP_SLOPE)


@Operator
def softcapped_cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of targets, int32 (T,), under logits z (T, V) once they are softcapped: float32 (T,)."""
    return F.cross_entropy(softcap(z), targets.long(), reduction="none")


@Operator
def head_loss(h: Tensor, lm_head: Tensor, targets: Tensor) -> Tensor:
    """Loss of each token, float32 (T,), from the head's input h (T, C). lm_head: (V, C)."""
    return softcapped_cross_entropy(F.linear(h, lm_head), targets)


def trained(value: Tensor, optimizer: str, lr_mul: float = 1.0, matrices: int = 1) -> nn.Parameter:
    """A parameter, registered with its optimizer, "normuon" or "adam", and a factor of that one's rate.

    NorMuon takes it as so many matrices, end to end in memory. Modules create parameters in the order in
    which they read them, so that those whose gradients come together lie together.
    """
    parameter = nn.Parameter(value)
    parameter.optimizer = optimizer
    parameter.lr_mul = lr_mul
    parameter.matrices = matrices
    return parameter


def hidden_matrices(count: int, C: int, drawn: int, generator, lr_mul=1.0, matrices=1) -> nn.ParameterList:
    """Matrices (C, 4 C) of four (C, C) parts, of which the first `drawn` are uniform and the rest zero."""
    bound = 3**0.5 * 0.5 * C**-0.5
    stack = torch.zeros(count, 4, C, C)
    stack[:, :drawn].uniform_(-bound, bound, generator=generator)
    return nn.ParameterList(trained(w, "normuon", lr_mul, matrices) for w in stack.view(count, C, 4 * C))


class Rotary(nn.Module):
    """Half-truncated rotary embedding: half of a head's columns turn, by their index in the packed sequence.

    Frequencies (radians a token) and softmax scale change when the long window grows (`extend_context`).
    """

    def __init__(self, head_dim: int, max_tokens: int, dtype: torch.dtype):
        super().__init__()
        turning = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4)
        self.register_buffer("position", torch.arange(max_tokens, dtype=torch.int32))
        self.register_buffer("frequencies", torch.cat([turning, torch.zeros(head_dim // 4)]))
        self.register_buffer("scale", torch.tensor(0.1))
        self.register_buffer("cos", torch.empty(max_tokens, head_dim // 2, dtype=dtype))
        self.register_buffer("sin", torch.empty(max_tokens, head_dim // 2, dtype=dtype))
        self.fill()

    def fill(self):
        """Compute the tables from the frequencies, in place."""
        theta = torch.outer(self.position.float(), self.frequencies)
        self.cos.copy_(theta.cos())
        self.sin.copy_(theta.sin())


class TokenEmbedding(nn.Module):
    """A table of embeddings, looked up where it is called: until then its rows may be on their way."""

    def __init__(self, rows: nn.Parameter):
        super().__init__()
        self.weight = rows

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight)


class Block(nn.Module):
    """One layer: attention paths, then MLP paths. A path's matrices are entry i of each list."""

    def __init__(self, s: Hyperparameters, layer: Layer, dtype: torch.dtype, generator: torch.Generator):
        super().__init__()
        C, H = s.model_dim, s.num_heads
        gates = torch.zeros(layer.attention, H, GATE_CHANNELS, dtype=dtype)
        self.lambdas = trained(torch.tensor([1.1, 0.0, 0.5, 0.5]), "adam", s.scalar_lr_mul)  # a, b, l0, l1
        self.qkvo = hidden_matrices(layer.attention, C, 3, generator, matrices=4)
        self.gate = nn.ParameterList(trained(gate, "normuon") for gate in gates)
        self.c_fc = hidden_matrices(layer.mlp, C, 4, generator, lr_mul=s.c_fc_lr_mul)
        self.c_proj = hidden_matrices(layer.mlp, C, 0, generator)

    def forward(self, x: Tensor, x0: Tensor, ve: Tensor | None, rotary: nn.Module, mask: Mask) -> Tensor:
        x, h = mix_norm(x, x0, self.lambdas)
        for qkvo, gate in zip(self.qkvo, self.gate, strict=True):
            x = attention_(x, h, qkvo, gate, self.lambdas, ve, rotary, mask)
        if self.qkvo and self.c_fc:
            x, h = norm(x)
        for c_fc, c_proj in zip(self.c_fc, self.c_proj, strict=True):
            x = mlp(x, h, c_fc, c_proj)
        return x


class Head(nn.Module):
    """The language-model head and its loss."""

    def __init__(self, s: Hyperparameters, dtype: torch.dtype):
        super().__init__()
        self.weight = trained(
            torch.zeros(s.padded_vocab_size, s.model_dim, dtype=dtype), "adam", s.head_lr_mul
        )

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        if self.training:
            return head_loss(h, self.weight, targets)
        # A slice at a time: all logits of a validation batch would not fit in memory at once.
        parts = zip(h.split(8192), targets.split(8192), strict=True)
        return torch.cat([head_loss(part, self.weight, wanted) for part, wanted in parts])


class GPT(nn.Module):
    """The language model, for packed sequences of at most max_tokens.

    Parameters are drawn in float32 from the seed; embeddings, head and gates' matrices are cast to dtype.
    """

    def __init__(self, s: Hyperparameters, max_tokens: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(s.seed)
        self.layers, self.skips, self.backout_layer = layer_table(s), skip_table(s), s.backout

        def table() -> nn.Parameter:
            rows = torch.randn(s.padded_vocab_size, s.model_dim, generator=generator)
            return trained(rows.to(dtype), "adam", s.embed_lr_mul)

        self.smear_gate = trained(torch.zeros(1, GATE_CHANNELS, dtype=dtype), "normuon")
        self.smear_lambda = trained(torch.tensor(0.0), "adam", s.scalar_lr_mul)
        self.backout_lambda = trained(torch.tensor(0.5), "adam", s.scalar_lr_mul)
        self.skip_gates = trained(torch.full((len(self.skips),), -1.5), "adam", s.scalar_lr_mul)
        self.embed = table()
        count = 1 + max(layer.value for layer in self.layers)
        self.value_embeds = nn.ModuleList(TokenEmbedding(table()) for _ in range(count))
        self.blocks = nn.ModuleList(Block(s, layer, dtype, generator) for layer in self.layers)
        self.lm_head = Head(s, dtype)
        self.rotary = Rotary(s.model_dim // s.num_heads, max_tokens, dtype)

    def trunk(self, batch: Batch, inputs: StepInputs) -> Tensor:
        """The head's input (T, C)."""
        position = self.rotary.position[: len(batch.inputs)]
        masks = {}
        for kind, window in (("short", inputs.short_window), ("long", inputs.long_window)):
            first_key = torch.maximum(batch.doc_start, position - window)
            masks[kind] = Mask(first_key, torch.minimum(batch.doc_end, position + window))
        x = x0 = smear(embedding(batch.inputs, self.embed), self.smear_gate, self.smear_lambda)
        outputs, values, skip_gates = {}, {-1: None}, self.skip_gates.unbind()
        for i, (layer, block) in enumerate(zip(self.layers, self.blocks, strict=True)):
            if layer.attention or layer.mlp:
                for (source, target), gate in zip(self.skips, skip_gates, strict=True):
                    if target == i:
                        x = skip(x, outputs[source], gate)
                if layer.value not in values:
                    values[layer.value] = self.value_embeds[layer.value](batch.inputs)
                x = block(x, x0, values[layer.value], self.rotary, masks[layer.window])
            if i == self.backout_layer or any(i == source for source, _ in self.skips):
                outputs[i] = x
        return backout(x, outputs.get(self.backout_layer), self.backout_lambda)

    def forward(self, batch: Batch, inputs: StepInputs) -> Tensor:
        """Loss of each token, float32 (T,)."""
        return self.lm_head(self.trunk(batch, inputs), batch.targets)

    def logits(self, batch: Batch, inputs: StepInputs) -> Tensor:
        """Softcapped logits, float32 (T, V), those beyond the vocabulary included."""
        return softcap(F.linear(self.trunk(batch, inputs), self.lm_head.weight))


# ======================================================================================================
# Schedules: functions of the step, which counts from 0


class StepShape(NamedTuple):
    """What a step's batch is made of."""

    micro_batches: int  # packed sequences, dealt to all processes
    micro_batch_tokens: int
    max_seq_len: int  # tokens of a document that are read at most

    @property
    def tokens(self) -> int:
        return self.micro_batches * self.micro_batch_tokens


def step_shape(step: int, s: Hyperparameters) -> StepShape:
    """The shape of a step."""
    return StepShape(s.micro_batches, s.train_batch_size // s.micro_batches, s.train_max_seq_len)


def longest_sequence(s: Hyperparameters) -> int:
    """The most tokens that a micro-batch of training or validation may have."""
    return max(s.val_micro_batch_tokens, *(step_shape(i, s).micro_batch_tokens for i in range(s.total_steps)))


def learning_rate_scale(step: int, s: Hyperparameters) -> float:
    """Factor of every learning rate: 1, then a linear fall in the last cooldown_frac of the schedule."""
    progress = min(0.9999, step / s.num_scheduled_iterations)
    if progress < 1 - s.cooldown_frac:
        return 1.0
    left = (1 - progress) / s.cooldown_frac
    return left + s.final_lr_scale * (1 - left)


def muon_momentum(step: int, s: Hyperparameters) -> float:
    """NorMuon's momentum: a rise at the start and a fall at the end; in a short run the rise wins."""
    span = s.momentum_high - s.momentum_low
    falling = s.total_steps - s.momentum_cooldown
    if step < s.momentum_warmup:
        return s.momentum_low + span * step / s.momentum_warmup
    if step > falling:
        return s.momentum_high - span * (step - falling) / s.momentum_cooldown
    return s.momentum_high


def is_adam_step(step: int) -> bool:
    """Whether Adam updates in a step: in every odd one, by the gradients of two."""
    return step % 2 == 1


def attention_windows(step: int, s: Hyperparameters) -> tuple[int, int]:
    """(short, long) attention windows in tokens; after the last step, those of the last validation."""
    if step >= s.total_steps:
        return parse_window("final_window", s.final_window)
    if step >= s.num_scheduled_iterations:
        return parse_window("extension_window", s.extension_window)
    table = window_table(s)
    return table[step * len(table) // s.num_scheduled_iterations]


def step_inputs(step: int, s: Hyperparameters) -> StepInputs:
    """The numbers that the model reads in a step, and in a validation before it."""
    short, long = attention_windows(step, s)
    return StepInputs(short_window=short, long_window=long)


class Variant(NamedTuple):
    """What a step's code depends on. A run compiles and records each of its variants once, at the start."""

    shape: StepShape
    choices: tuple[bool, ...]  # the step inputs that are true or false


def step_variant(step: int, s: Hyperparameters) -> Variant:
    """The variant of a step."""
    return Variant(step_shape(step, s), tuple(x for x in step_inputs(step, s) if type(x) is bool))


def first_steps(s: Hyperparameters) -> dict[Variant, int]:
    """Every variant of the run, with the first step that has it, in their order."""
    first = {}
    for step in range(s.total_steps):
        first.setdefault(step_variant(step, s), step)
    return first


def extend_context(rotary: Rotary, old: int, new: int):
    """Adapt to a long window that grows from old to new tokens: slow frequencies stretch, fast ones stay.

    This is YaRN (arXiv 2309.00071), which also raises the softmax scale.
    """
    rotations = old * rotary.frequencies / (2 * math.pi)
    keep = ((rotations - 1) / (32 - 1)).clamp(0, 1)
    rotary.frequencies.mul_(old / new + keep * (1 - old / new))
    rotary.scale.mul_(1 + 0.2 * math.log(new / old))
    rotary.fill()


def begin_step(model: GPT, step: int, s: Hyperparameters):
    """Change in the model what changes between steps. Parameters may change only where the variant does."""
    if step and (new := attention_windows(step, s)[1]) > (old := attention_windows(step - 1, s)[1]):
        extend_context(model.rotary, old, new)


# ======================================================================================================
# Optimizers' mathematics. Learning rates, momentum and counts are float32 scalar tensors.

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(u: Tensor) -> Tensor:
    """Approximate the orthogonal polar factor of each matrix (..., rows, cols) (arXiv 2505.16932)."""
    x = u.flatten(0, -3)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = x @ x.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        x = torch.baddbmm(x, B, x, beta=a)
    return (x.mT if tall else x).view_as(u)


def nesterov(g: Tensor, m: Tensor, momentum: Tensor, grad_accum_steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Nesterov's direction, in dtype, by the mean of accumulated gradients g; updates momentum m in place."""
    g = g.to(m.dtype) / grad_accum_steps
    m.lerp_(g, 1 - momentum)
    return g.lerp(m, momentum).to(dtype)


def normuon_update(w: Tensor, u: Tensor, v: Tensor, lr: Tensor, lr_mul: Tensor, s: Hyperparameters):
    """Update matrices w (..., rows, cols) and second moment v (..., 1, cols) by directions u, in place.

    A second moment a column that keeps the Frobenius norm (NorMuon, arXiv 2510.05491), and cautious weight
    decay (arXiv 2510.12402). lr_mul: (..., 1, 1), not applied to the decay.
    """
    mean = u.float().square().mean(-2, keepdim=True)
    v.lerp_(mean.to(v.dtype), 1 - s.muon_beta2)
    floored = v.float().clamp(min=1e-10)
    rows = w.size(-2)
    norm_before = (rows * mean.sum(-1, keepdim=True)).sqrt()
    norm_after = (rows * (mean / floored).sum(-1, keepdim=True)).sqrt()
    u = u * (floored.rsqrt() * (norm_before / norm_after.clamp(min=1e-10)))
    u = u + (lr * s.muon_weight_decay) * w * (u * w >= 0)
    w -= (lr * max(1, rows / w.size(-1)) ** 0.5) * lr_mul * u


class Moments(NamedTuple):
    """An optimizer's memory of gradients (first) and of their squares (second)."""

    first: Tensor
    second: Tensor


def adam_rate(t: int, s: Hyperparameters) -> float:
    """Factor of the learning rate in Adam's t-th update, from 1, that corrects the moments' bias."""
    return (1 - s.adam_beta2**t) ** 0.5 / (1 - s.adam_beta1**t)


def adam_update(
    p: Tensor, g: Tensor, moments: Moments, lr: Tensor, grad_accum_steps: Tensor, s: Hyperparameters
):
    """An Adam step (arXiv 1412.6980), in place, by accumulated gradients g. All of one shape.

    grad_accum_steps: what g is divided by, half the micro-batches of the two steps whose sum it is.
    """
    g = g.float() / grad_accum_steps
    moments.first.lerp_(g, 1 - s.adam_beta1)
    moments.second.lerp_(g.square(), 1 - s.adam_beta2)
    p -= moments.first / (moments.second.sqrt() + 1e-8) * lr


# ======================================================================================================
# Data: shards, and which documents make which step

MAGIC, VERSION, HEADER = 20240520, 1, 256  # a shard: that many little-endian int32, then uint16 tokens
FETCH = "python data/cached_fineweb10B.py"
SOURCES = f"fetch FineWeb with: {FETCH}, or make the sample with: python data/sample.py"


def read_shard(path: str, vocab_size: int) -> np.ndarray:
    """The tokens of a shard, uint16. Raises UsageError unless the file is whole and of this vocabulary."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise OSError(0, "no regular file")
        with open(path, "rb") as file:
            header = np.fromfile(file, "<i4", HEADER)
            tokens = np.fromfile(file, "<u2")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); {SOURCES}") from None
    found = header[0] if len(header) else "nothing"
    if len(header) < HEADER or header[0] != MAGIC:
        problem = f"not a token shard (magic number {found}, want {MAGIC})"
    elif header[1] != VERSION:
        problem = f"shard version {header[1]}, want {VERSION}"
    elif len(tokens) != header[2]:
        problem = f"holds {len(tokens)} tokens where its header says {header[2]}"
    else:
        problem = None
    if problem:
        raise UsageError(f"{path}: {problem}; give other shards, or remove it and {SOURCES}")
    if len(tokens) and tokens.max() >= vocab_size:
        raise UsageError(
            f"{path}: token {tokens.max()} is beyond the vocabulary; raise --vocab_size or give other shards"
        )
    return tokens


def find_shards(pattern: str, flag: str) -> list[str]:
    """The shards that match a pattern, by name; raises UsageError when there is none."""
    if not (paths := sorted(glob.glob(pattern))):
        raise UsageError(f"--{flag}={pattern} matches no file; {SOURCES}")
    return paths


def pack(ends: np.ndarray, first: int, shape: StepShape) -> np.ndarray | None:
    """Deal the documents of a shard, from the first-th on, to the micro-batches of a step.

    ends: the sum of the documents' lengths, as far as training reads them, up to each. Micro-batch i gets the
    documents cuts[i] to cuts[i + 1], which fill its tokens and one more. None when the shard cannot fill all.
    """
    cuts = [first]
    for _ in range(shape.micro_batches):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        cuts.append(int(np.searchsorted(ends, before + shape.micro_batch_tokens + 1)) + 1)
        if cuts[-1] > len(ends):
            return None
    return np.array(cuts)


def packed(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The fields of a Batch, int32 (4, T), from T + 1 tokens and the indices at which documents start."""
    T = len(tokens) - 1
    bounds = np.append(starts[starts < T], T)
    spans = np.diff(bounds)
    doc_start, doc_end = np.repeat(bounds[:-1], spans), np.repeat(bounds[1:] - 1, spans)
    return np.stack([tokens[:-1], tokens[1:], doc_start, doc_end]).astype(np.int32)


class PlannedStep(NamedTuple):
    """Which documents of which shard a step's micro-batches get, as `pack` says."""

    shard: int
    cuts: np.ndarray


class TrainData:
    """BOS-aligned training batches: a pure function of the step.

    Documents come in the order of files and tokens; each gives its first max_seq_len tokens at most. A step's
    micro-batches come from one shard: when it cannot fill all, the next begins. All shards are indexed in the
    background from the start, and read again one ahead of their turn.
    """

    def __init__(self, s: Hyperparameters):
        self.s = s
        self.paths = find_shards(s.train_files, "train_files")
        self.readers = ThreadPoolExecutor(2)
        self.starts = [self.readers.submit(self._document_starts, path) for path in self.paths]
        self.loads, self.ends = {}, {}
        self.plan: list[PlannedStep] = []

    def _document_starts(self, path: str) -> np.ndarray:
        """Where documents start in a shard and, as the last, where the last one ends."""
        tokens = read_shard(path, self.s.vocab_size)
        starts = np.flatnonzero(tokens == self.s.bos)
        if not len(starts):
            raise UsageError(
                f"{path}: holds no BOS token {self.s.bos}, so no document starts; give other --train_files or"
                " --vocab_size"
            )
        return np.append(starts, len(tokens))

    def _ends(self, shard: int, max_seq_len: int) -> np.ndarray:
        """The sums of document lengths that `pack` takes; the last ones are kept."""
        if (shard, max_seq_len) not in self.ends:
            lengths = np.minimum(np.diff(self.starts[shard].result()), max_seq_len)
            self.ends = {(shard, max_seq_len): lengths.cumsum()}
        return self.ends[shard, max_seq_len]

    def planned(self, step: int) -> PlannedStep | None:
        """The plan of a step; None when the shards end before it."""
        while len(self.plan) <= step:
            shape = step_shape(len(self.plan), self.s)
            shard, first = (self.plan[-1].shard, self.plan[-1].cuts[-1]) if self.plan else (0, 0)
            while (cuts := pack(self._ends(shard, shape.max_seq_len), first, shape)) is None:
                shard, first = shard + 1, 0
                if shard == len(self.paths):
                    return None
            self.plan.append(PlannedStep(shard, cuts))
        return self.plan[step]

    def check(self):
        """Wait until the plan covers the run; raise UsageError when the shards feed too few steps."""
        if not (last := self.planned(self.s.total_steps - 1)):
            if not self.plan:
                raise UsageError(
                    f"--train_files={self.s.train_files}: no shard fills a step; give larger ones or lower"
                    " --train_batch_size"
                )
            raise UsageError(
                f"--train_files={self.s.train_files} feeds {len(self.plan)} steps of the"
                f" {self.s.total_steps}; fetch more with: {FETCH} N (N shards, up to 103), or lower"
                " --num_scheduled_iterations"
            )
        for unread in self.starts[last.shard + 1 :]:
            unread.cancel()

    def _tokens(self, shard: int) -> np.ndarray:
        """A shard's tokens; the next shard begins to load, and earlier ones are let go."""
        for near in range(shard, min(shard + 2, len(self.paths))):
            if near not in self.loads:
                self.loads[near] = self.readers.submit(read_shard, self.paths[near], self.s.vocab_size)
        for done in [key for key in self.loads if key < shard]:
            del self.loads[done]
        tokens, starts = self.loads[shard].result(), self.starts[shard].result()
        if len(tokens) != starts[-1] or not (tokens[starts[:-1]] == self.s.bos).all():
            raise UsageError(
                f"{self.paths[shard]}: changed since the run began; restore it, and go on with"
                " --resume=latest if checkpoints are on"
            )
        return tokens

    def micro_batches(self, step: int, chosen: range) -> np.ndarray:
        """The chosen micro-batches of a step, int32 (micro-batches, 4, T): the fields of a Batch each."""
        shape, plan = step_shape(step, self.s), self.planned(step)
        tokens, starts = self._tokens(plan.shard), self.starts[plan.shard].result()
        batches = []
        for i in chosen:
            documents = slice(plan.cuts[i], plan.cuts[i + 1])
            begins = starts[documents]
            lengths = np.minimum(starts[plan.cuts[i] + 1 : plan.cuts[i + 1] + 1] - begins, shape.max_seq_len)
            text = [tokens[at : at + length] for at, length in zip(begins, lengths, strict=True)]
            room = shape.micro_batch_tokens + 1
            batches.append(packed(np.concatenate(text)[:room], np.cumsum(lengths) - lengths))
        return np.stack(batches)


class ValData:
    """The validation set, straight through the first shard; micro-batches cut documents at their ends."""

    def __init__(self, s: Hyperparameters):
        self.s = s
        path = find_shards(s.val_files, "val_files")[0]
        self.tokens = read_shard(path, s.vocab_size)
        if len(self.tokens) <= s.val_tokens:
            raise UsageError(
                f"{path}: holds {len(self.tokens)} tokens, but validation needs --val_tokens={s.val_tokens}"
                " and one more; lower it or give a larger --val_files"
            )
        if not (self.tokens[: s.val_tokens] == s.bos).any():
            raise UsageError(
                f"{path}: holds no BOS token {s.bos} where validation reads; give other --val_files or"
                " --vocab_size"
            )
        for other in filter(os.path.exists, glob.glob(s.train_files)):
            if os.path.samefile(path, other):
                raise UsageError(f"{path}: --train_files={s.train_files} reads it too; keep them apart")

    def micro_batches(self, first: int = 0, stride: int = 1):
        """Yield every stride-th micro-batch from the first on, as T + 1 tokens."""
        size = self.s.val_micro_batch_tokens
        for start in range(first * size, self.s.val_tokens, stride * size):
            yield self.tokens[start : min(start + size, self.s.val_tokens) + 1]


# Part II: Machine
# ======================================================================================================
# Kernels: fused versions of the model's operators for a GPU, in Triton, and what they have in common.
# Each version takes handles where its definition takes tensors, and is tested against it.

WEIGHT_SCALE = 2.0**-9  # of every weight in e4m3, so for entries up to 0.875
LOGIT_GRAD_SCALE = 1 / 448  # of the logits' gradients in e5m2: they lie within -1 and 1
# Scale of the gradients of q, k and v and of an MLP's hidden units and output in e4m3, which so reaches from
# 2^-15 to 7; the largest seen in 62 steps was 2. The loss must be a sum over tokens: a mean's would vanish.
BLOCK_GRAD_SCALE = tl.constexpr(2.0**-6)


class Normed(NamedTuple):
    """A normalized activation (T, C), in value or, over `normed_scale`, in e4m3.

    With an e4m3, value may hold NaN instead of numbers: then it only takes the gradient. An autograd function
    takes both and returns the gradient for value.
    """

    value: Tensor
    e4m3: Tensor | None = None

    def read(self) -> Tensor:
        """Its numbers in value's dtype, rounded to e4m3 if it has one."""
        return self.value if self.e4m3 is None else _Dequantize.apply(*self)


class _Dequantize(torch.autograd.Function):
    """The numbers of a `Normed` with an e4m3; their gradient goes to its value."""

    @staticmethod
    def forward(ctx, value, e4m3):
        return e4m3.to(value.dtype) * normed_scale(e4m3.size(1))

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Weight(NamedTuple):
    """A parameter as fused versions see it. In training, those that FP8_WEIGHTS names have FP8 copies."""

    value: Tensor
    grad: Tensor | None = None  # where fused backward passes add its gradient
    e4m3: Tensor | None = None
    e4m3_t: Tensor | None = None  # the transpose, contiguous, since FP8 products sum along rows


# Weights with FP8 copies, and how many matrices lie one below the other in each, as products read them.
FP8_WEIGHTS = {"qkvo": 4, "c_fc": 1, "c_proj": 1, "lm_head": 1}


def in_fp8(device: torch.device, part: str) -> bool:
    """Whether a chip trains the "head" or the "blocks" in FP8: the one place that decides.

    The head's products from sm_89 on; of the blocks those of q, k, v and the MLP, not of O, on Hopper.
    """
    if device.type != "cuda":
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability >= (8, 9) if part == "head" else capability[0] == 9


@functools.cache
def compiled(function):
    """A function of tensors as one graph for each set of shapes, made once a process."""
    return torch.compile(function, dynamic=False)


def call_compiled(function, x: Tensor, *rest):
    """Call a function of tensors, compiled where x is on a GPU; other arguments must not vary in a run."""
    return (compiled(function) if x.is_cuda else function)(x, *rest)


def to_e4m3(x: Tensor, scale: float) -> Tensor:
    """x over a scale, in e4m3; what is beyond its range becomes its largest number."""
    return (x.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn)


def transposed(x: Tensor) -> Tensor:
    """The transposes of matrices x (..., rows, cols), contiguous."""
    return x.mT.contiguous()


def fp8_copies(w: Tensor, matrices: int) -> dict[str, Tensor]:
    """FP8 copies of a weight (rows, cols), fields of Weight: e4m3, and e4m3_t.

    The latter is the transpose of w as (matrices * rows, cols / matrices).
    """
    e4m3 = call_compiled(to_e4m3, w, WEIGHT_SCALE)
    # As bytes, and in a kernel of its own: see _e5m2_pair.
    stacked = e4m3.view(torch.uint8).view(-1, w.size(1) // matrices)
    return {"e4m3": e4m3, "e4m3_t": call_compiled(transposed, stacked).view(e4m3.dtype)}


def normed_scale(width: int) -> float:
    """The scale of normalized activations in e4m3, a power of two that brings sqrt(width) below 448."""
    return 2.0 ** math.ceil(math.log2(width**0.5 / 448))


def gradient(p: nn.Parameter) -> Tensor:
    """The tensor, zeros at first, in which the gradient of a parameter accumulates."""
    if p.grad is None:
        p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
    return p.grad


def add_product_(grad: Tensor, a: Tensor, b: Tensor):
    """Add a b to a gradient: NorMuon's have the dtype of the factors, Adam's are float32."""
    if grad.dtype == a.dtype:
        grad.addmm_(a, b)
    else:
        grad.add_(a @ b)


def weight_handle(p: nn.Parameter) -> Weight:
    """A parameter's handle. Its FP8 copies are those that its `Bank` keeps."""
    if not torch.is_grad_enabled():
        return Weight(p)
    return Weight(p, gradient(p), **getattr(p, "fp8_copies", {}))


def normed_handle(h: Tensor | Normed, w: Weight) -> Normed:
    """A normalized activation's handle for a product with w: with an e4m3 if, and only if, w has one."""
    h = h if isinstance(h, Normed) else Normed(h)
    if w.e4m3 is None:
        return Normed(h.read())
    if h.e4m3 is None:
        return Normed(h.value, call_compiled(to_e4m3, h.value.detach(), normed_scale(h.value.size(1))))
    return h


def fused(operator: Operator):
    """Decorator: register a fused version of an operator, unless its definition is to run as it stands.

    It adds its weights' gradients when autograd runs the node of its result, the first if it has several.
    """

    def register(function):
        operator.fused = function if operator.fusible else None
        return function

    return register


def run_operators_on_gpu():
    """From now on run each operator's fused version or, without one, its definition, in training compiled."""
    for operator in Operator.every:
        if operator.fused:
            # The compiler of a definition that calls this must not look inside.
            operator.run = torch.compiler.disable(functools.partial(_call_fused, operator.fused))
        else:
            operator.run = functools.partial(run_definition, operator)


def _call_fused(version, *args):
    banked = [a for a in args if hasattr(a, "bank")]
    for p in banked:
        p.bank.ready(p)
    out = version(*(weight_handle(a) if isinstance(a, nn.Parameter) else a for a in args))
    for p in banked if torch.is_grad_enabled() else ():
        p.bank.expect_grad(p, (out[0] if isinstance(out, tuple) else out).grad_fn)
    return out


def run_definition(operator: Operator, *args):
    """Call an operator's definition, in training compiled, with tensors in place of handles."""
    args = [a.read() if isinstance(a, Normed) else a.value if isinstance(a, Weight) else a for a in args]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return compiled(operator.definition)(*args)
    return operator.definition(*args)


def on_hopper(x: Tensor) -> bool:
    """Whether a tensor is on an H100, an H200 or their like, for which the tiles were tuned."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


def programs(x: Tensor) -> int:
    """How many persistent programs fill the device of x: one a multiprocessor, a few in the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


@functools.cache
def constant(value: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A scalar tensor, made once."""
    return torch.full((), value, dtype=dtype, device=device)


def fp8_product(a: Tensor, b: Tensor, scale: float, dtype: torch.dtype, fast: bool = True) -> Tensor:
    """scale a b in a dtype, for a (M, K), contiguous, and b (K, N), of contiguous columns, in FP8.

    fast: let tensor cores, whose sums have some 13 bits, add up all of it; else parts are added in float32.
    """
    scales = constant(scale, a.device), constant(1.0, a.device)
    return torch._scaled_mm(a, b, *scales, out_dtype=dtype, use_fast_accum=fast)


def _descriptor(x: Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
    """What kernels load and store tiles of a matrix by; None where there is no matrix."""
    return None if x is None else TensorDescriptor.from_tensor(x, [rows, columns])


@triton.jit
def _load_tile(ptr, start, column, T, stride, ROWS, COLUMNS):
    """A tile of a matrix of T rows, zero beyond it."""
    rows = tl.arange(0, ROWS)[:, None]
    offsets = rows * stride + tl.arange(0, COLUMNS)[None, :]
    return tl.load(ptr + start.to(tl.int64) * stride + column + offsets, mask=start + rows < T, other=0.0)


@triton.jit
def _store_tile(ptr, start, column, T, stride, tile, ROWS, COLUMNS):
    rows = tl.arange(0, ROWS)[:, None]
    offsets = rows * stride + tl.arange(0, COLUMNS)[None, :]
    at = ptr + start.to(tl.int64) * stride + column + offsets
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=start + rows < T)


# ------------------------------------------------------------------------------------------------------
# Norm: `mix_norm` and `norm`

EPS = tl.constexpr(torch.finfo(torch.float32).eps)  # as `rms_norm` has it


@triton.jit
def _mix_norm_kernel(
    x_ptr, x0_ptr, lambdas, mixed_ptr, h, T, C, SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Mix a tile of rows with x0, if there is one, and normalize it.

    lambdas: a Weight. h: a Normed; the norm goes into its e4m3, if it has one, else into its value.
    """
    rows, columns = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = rows[:, None] * C + columns[None, :]
    inside = (rows < T)[:, None] & (columns < C)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if x0_ptr is not None:
        x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(lambdas.value) * x + tl.load(lambdas.value + 1) * x0
        tl.store(mixed_ptr + at, x.to(mixed_ptr.dtype.element_ty), mask=inside)
    x *= tl.rsqrt(tl.sum(x * x, 1) / C + EPS)[:, None]
    if h.e4m3 is not None:
        tl.store(h.e4m3 + at, (x * (1 / SCALE)).to(h.e4m3.dtype.element_ty), mask=inside)
    else:
        tl.store(h.value + at, x.to(h.value.dtype.element_ty), mask=inside)


@triton.jit
def _mix_norm_backward_kernel(
    x_ptr, x0_ptr, lambdas, dmixed_ptr, dh_ptr, dx_ptr, dx0_ptr, T, C, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the gradient of x, store or add that of x0, and add those of a and b to what is there."""
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    sum_a, sum_b = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for row in range(tl.program_id(0), T, tl.num_programs(0)):
        at = row * C.to(tl.int64) + columns
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mixed = x
        if x0_ptr is not None:
            a, b = tl.load(lambdas.value), tl.load(lambdas.value + 1)
            x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
            mixed = a * x + b * x0
        dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dmixed = tl.load(dmixed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            before = tl.load(dx0_ptr + at, mask=inside, other=0.0)
        factor = tl.rsqrt(tl.sum(mixed * mixed, 0) / C + EPS)
        along = tl.sum(dh * mixed, 0) * factor * factor / C
        dmixed += (dh - mixed * along) * factor
        if x0_ptr is None:
            tl.store(dx_ptr + at, dmixed.to(dx_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(dx_ptr + at, (a * dmixed).to(dx_ptr.dtype.element_ty), mask=inside)
            sum_a += tl.sum(dmixed * x, 0)
            sum_b += tl.sum(dmixed * x0, 0)
            dx0 = b * dmixed
            if ADD:
                dx0 += before.to(tl.float32)
            tl.store(dx0_ptr + at, dx0.to(dx0_ptr.dtype.element_ty), mask=inside)
    if x0_ptr is not None:
        tl.atomic_add(lambdas.grad, sum_a, sem="relaxed")
        tl.atomic_add(lambdas.grad + 1, sum_b, sem="relaxed")


class SharedGradient:
    """One gradient to which every reader of a tensor adds in place."""

    total: Tensor | None = None


class _Share(torch.autograd.Function):
    """Forward: the identity. Backward: return the gradient that all readers have summed."""

    @staticmethod
    def forward(ctx, x, shared):
        ctx.shared = shared
        ctx.set_materialize_grads(False)
        return x.detach()  # no view, whose base would be x: x holds what this returns

    @staticmethod
    def backward(ctx, _):
        total, ctx.shared.total = ctx.shared.total, None
        return total, None


class _MixNorm(torch.autograd.Function):
    """`mix_norm` and, without an x0, `norm`: one kernel has both of its gradients."""

    @staticmethod
    def forward(ctx, x, x0, lambdas, shared, quantize):
        T, C = x.shape
        if quantize:
            # One number in memory, for autograd alone; NaN, so that it shows where someone reads it.
            placeholder = constant(math.nan, x.device, x.dtype).expand_as(x)
            h = Normed(placeholder, torch.empty_like(x, dtype=torch.float8_e4m3fn))
        else:
            h = Normed(torch.empty_like(x))
        mixed = x if x0 is None else torch.empty_like(x)
        sizes = {"SCALE": normed_scale(C), "ROWS": 4, "BLOCK": triton.next_power_of_2(C)}
        _mix_norm_kernel[(triton.cdiv(T, 4),)](x, x0, lambdas, mixed, h, T, C, **sizes, num_warps=4)
        ctx.save_for_backward(x, x0)
        ctx.lambdas, ctx.shared = lambdas, shared
        ctx.set_materialize_grads(False)
        return mixed, *h

    @staticmethod
    def backward(ctx, dmixed, dh, de4m3):
        if de4m3 is not None:
            raise RuntimeError("a Normed's e4m3 takes no gradient; take its numbers by read()")
        x, x0 = ctx.saved_tensors
        T, C = x.shape
        dmixed, dh = (torch.zeros_like(x) if d is None else d.contiguous() for d in (dmixed, dh))
        dx, dx0, add = torch.empty_like(x), None, False
        if x0 is not None:
            add = ctx.shared.total is not None
            dx0 = ctx.shared.total = ctx.shared.total if add else torch.empty_like(x0)
        sizes = {"ADD": add, "BLOCK": triton.next_power_of_2(C)}
        given = (x, x0, ctx.lambdas, dmixed, dh, dx, dx0)
        _mix_norm_backward_kernel[(min(4096, T),)](*given, T, C, **sizes, num_warps=1)
        return dx, None, None, None, None


@fused(mix_norm)
def mix_norm_fused(x: Tensor, x0: Tensor, lambdas: Weight) -> tuple[Tensor, Normed]:
    """As `mix_norm`. All layers that mix the same x0 add to one gradient of it in place."""
    if not hasattr(x0, "sharing"):
        shared = SharedGradient()
        x0.sharing = _Share.apply(x0, shared), shared
    quantize = torch.is_grad_enabled() and in_fp8(x.device, "blocks")
    mixed, h, e4m3 = _MixNorm.apply(x, x0.sharing[0], lambdas, x0.sharing[1], quantize)
    mixed.unsaved = True  # its norm's backward pass computes it anew, so `attention_` may write over it
    return mixed, Normed(h, e4m3)


@fused(norm)
def norm_fused(x: Tensor) -> tuple[Tensor, Normed]:
    """As `norm`."""
    quantize = torch.is_grad_enabled() and in_fp8(x.device, "blocks")
    x, h, e4m3 = _MixNorm.apply(x, None, None, None, quantize)
    return x, Normed(h, e4m3)


# ------------------------------------------------------------------------------------------------------
# FP8 gradients. FP8 products sum along rows, so weights' gradients, which sum over tokens, take transposed
# factors. A packed transpose has four tokens of a column in a word, a uint32: of each 256 tokens, word
# 8 w + r has 16 w + r, and 8, 128 and 136 after it, which one thread of `_mlp_backward_kernel` holds. Any
# order of tokens serves, as long as both factors have it. Zeros fill the last 256.

TRANSPOSE_TILE = (64, 64, 8)  # words (a divisor of 64), columns, warps


@triton.jit
def _e4m3_word(a, b, c, d):
    """Four numbers in e4m3, from the lowest byte of a uint32 on; those beyond its range as its largest.

    No byte is taken out of a word here, which is what fails in `_e5m2_pair`.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f",
        [a, b, c, d],
        tl.uint32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _by_words(x):
    """The four numbers of each word of a tile of 256 tokens: (8, 8, columns) each."""
    even, odd = x.reshape(2, 8, 2, 8, x.shape[1]).permute(1, 3, 4, 0, 2).split()
    a, c = even.split()
    b, d = odd.split()
    return a, b, c, d


@triton.jit
def _token_offsets(word, columns, i, T, C):
    """Where the i-th token of each word is in a matrix (T, C), and which of them are within."""
    rows = word // 64 * 256 + word % 64 // 8 * 16 + word % 8 + i % 2 * 8 + i // 2 * 128
    inside = (rows < T)[:, None] & (columns < C)[None, :]
    return rows.to(tl.int64)[:, None] * C + columns[None, :], inside


@triton.jit
def _transpose_kernel(
    x_ptr, out_ptr, words_ptr, T, C, WORDS, SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Write x (T, C) over SCALE to out in e4m3, and the packed transpose of that to words (C, WORDS).

    Without out, x is bytes, and only its packed transpose is written.
    """
    word = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    if out_ptr is None:
        words = tl.zeros([BM, BN], tl.uint32)
        for i in tl.static_range(4):
            at, inside = _token_offsets(word, columns, i, T, C)
            words |= tl.load(x_ptr + at, mask=inside, other=0).to(tl.uint32) << 8 * i
    else:
        parts = ()
        for i in tl.static_range(4):
            at, inside = _token_offsets(word, columns, i, T, C)
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * (1 / SCALE)
            tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)
            parts = parts + (x,)
        words = _e4m3_word(*parts)
    at = columns[None, :].to(tl.int64) * WORDS + word[:, None]
    tl.store(words_ptr + at, words, mask=(columns < C)[None, :])


def empty_words(x: Tensor, count: int = 1) -> Tensor:
    """Room for packed transposes of count matrices like x (T, C): words, int32 (count, C, WORDS)."""
    T, C = x.shape
    return torch.empty(count, C, triton.cdiv(T, 256) * 64, dtype=torch.int32, device=x.device)


def _transpose(x: Tensor, out: Tensor | None, scale: float) -> Tensor:
    T, C = x.shape
    words = empty_words(x)
    BM, BN, warps = TRANSPOSE_TILE
    grid = triton.cdiv(C, BN), words.size(2) // BM
    _transpose_kernel[grid](x, out, words, T, C, words.size(2), SCALE=scale, BM=BM, BN=BN, num_warps=warps)
    return words[0]


def e4m3_and_transpose(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """x (T, C), contiguous, over scale in e4m3, and the packed transpose of that, (C, tokens)."""
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    return out, _transpose(x, out, scale).view(out.dtype)


def packed_transpose(x: Tensor) -> Tensor:
    """The packed transpose, (C, tokens), of x (T, C), in FP8 and contiguous."""
    return _transpose(x.view(torch.uint8), None, 1.0).view(x.dtype)


def add_fp8_product_(grad: Tensor, a: Tensor, b: Tensor, scale: float):
    """Add scale a b^T to a gradient (M, N), for packed transposes a (M, tokens) and b (N, tokens).

    It sums over so many tokens that it takes no fast sums.
    """
    grad.add_(fp8_product(a, b.t(), scale, torch.float32, fast=False))


# ------------------------------------------------------------------------------------------------------
# Attention: `flash_attention` and `attention_`

# Rows, depth in bytes, warps, stages of the product; queries, keys, warps, stages of the others. Found on an
# H200 and fixed, so that no start pays for tuning; the small ones are for chips with less shared memory.
HOPPER_QKV, SMALL_QKV = (128, 128, 8, 3), (64, 64, 4, 2)
HOPPER_TILES = {"forward": (64, 64, 4, 3), "query": (64, 32, 4, 3), "key": (64, 64, 4, 2)}
SMALL_TILES = {"forward": (64, 32, 4, 2), "query": (64, 32, 4, 2), "key": (32, 64, 4, 2)}


@triton.jit
def _store_head(x, qkv, v_proj, ve, cos, sin, lambdas_ptr, factor_ptr, row, column, T, H, D, BM):
    """Norm and rotary embedding of a head of q or k, or mixing of one of v, on its way to memory."""
    low, high = x.reshape(BM, 2, D // 2).permute(0, 2, 1).split()
    if column < 2 * H * D:
        factor = tl.rsqrt(tl.sum(low * low + high * high, 1) / D + EPS)
        rows = row + tl.arange(0, BM)
        tl.store(factor_ptr + column // D * T + rows, factor, mask=rows < T)
        low, high = low * factor[:, None], high * factor[:, None]
        low, high = low * cos + high * sin, high * cos - low * sin
    else:
        within = column - 2 * H * D
        v_proj.store([row, within], low.to(v_proj.dtype))
        v_proj.store([row, within + D // 2], high.to(v_proj.dtype))
        low, high = low * tl.load(lambdas_ptr + 2), high * tl.load(lambdas_ptr + 2)
        if ve is not None:
            low += tl.load(lambdas_ptr + 3) * ve.load([row, within]).to(tl.float32)
            high += tl.load(lambdas_ptr + 3) * ve.load([row, within + D // 2]).to(tl.float32)
    qkv.store([row, column], low.to(qkv.dtype))
    qkv.store([row, column + D // 2], high.to(qkv.dtype))


@triton.jit
def _qkv_kernel(
    h, weight, qkv, v_proj, ve, cos, sin, lambdas_ptr, factor_ptr, T, C, SCALE: tl.constexpr, H: tl.constexpr
):
    """q, k and v of attention: SCALE h weight^T, and what `_store_head` does.

    A tile is two heads wide, so that the product reads less; what an odd last one has beyond v goes nowhere.
    """
    BM: tl.constexpr = h.block_shape[0]
    BK: tl.constexpr = h.block_shape[1]
    D: tl.constexpr = weight.block_shape[0] // 2
    across = tl.cdiv(3 * H, 2)
    # Flattened, so that the next tile loads while this one is stored.
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BM) * across, tl.num_programs(0), flatten=True):
        row, column = tile // across * BM, tile % across * 2 * D
        y = tl.zeros([BM, 2 * D], tl.float32)
        for k in range(0, C, BK):
            y = tl.dot(h.load([row, k]), tl.trans(weight.load([column, k])), y, input_precision="ieee")
        c, s = tl.zeros([BM, D // 2], cos.dtype), tl.zeros([BM, D // 2], cos.dtype)
        if column < 2 * H * D:
            c, s = cos.load([row, 0]), sin.load([row, 0])
        left, right = (y * SCALE).reshape(BM, 2, D).permute(0, 2, 1).split()
        _store_head(left, qkv, v_proj, ve, c, s, lambdas_ptr, factor_ptr, row, column, T, H, D, BM)
        _store_head(right, qkv, v_proj, ve, c, s, lambdas_ptr, factor_ptr, row, column + D, T, H, D, BM)


class QKVEnd(NamedTuple):
    """What attention's backward pass needs to go on through norm, rotary and mixing; nothing without."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    ve: Tensor | None = None
    lambdas: Weight | None = None
    v_proj: Tensor | None = None  # v before it is mixed: (T, C)
    factors: Tensor | None = None  # what the norm scaled q and k by: float32 (2, H, T)


def qkv_forward(h: Normed, qkvo: Weight, ve: Tensor | None, lambdas: Weight, rotary) -> tuple[Tensor, QKVEnd]:
    """q and k of `attention_`, normalized and turned, and v, mixed: (T, 3, H, D), by one kernel."""
    (T, C), D, x = h.value.shape, 2 * rotary.cos.size(1), h.value
    qkv, v_proj = x.new_empty(T, 3, C // D, D), x.new_empty(T, C)
    factors = x.new_empty(2, C // D, T, dtype=torch.float32)
    a, b, scale = x, qkvo.value, 1.0
    if h.e4m3 is not None:
        a, b, scale = h.e4m3, qkvo.e4m3, normed_scale(C) * WEIGHT_SCALE
    BM, depth, warps, stages = HOPPER_QKV if on_hopper(x) else SMALL_QKV
    BK = depth // a.element_size()
    tiles = [_descriptor(a, BM, BK), _descriptor(b.view(4 * C, C)[: 3 * C], 2 * D, BK)]
    tiles += [_descriptor(t, BM, D // 2) for t in (qkv.view(T, 3 * C), v_proj, ve, rotary.cos, rotary.sin)]
    options = {"SCALE": scale, "H": C // D, "num_warps": warps, "num_stages": stages}
    _qkv_kernel[(programs(x),)](*tiles, lambdas.value, factors, T, C, **options)
    return qkv, QKVEnd(rotary.cos, rotary.sin, ve, lambdas, v_proj, factors)


class Attended(NamedTuple):
    """What attention's forward pass read and made, as the backward pass needs it. q, k and v: (T, H, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None  # of each head's output, before the sigmoid: (T, H)
    mask: Mask
    scale: Tensor
    out: Tensor  # (T, H, D)
    lse: Tensor  # base-2 log-sum-exp of each row's scores, less log2 of its gate: float32 (H, T)


class AttentionGradients(NamedTuple):
    """What attention's backward kernels read, out's gradient, and those that they write."""

    out: Tensor
    q: Tensor  # with an end, of q before norm and rotary embedding, and so on
    k: Tensor
    v: Tensor
    gate: Tensor | None
    ve: Tensor | None
    delta: Tensor  # sum(out * its gradient) over the gate, which those of k and v need: float32 (H, T)


@triton.jit
def _masked(scores, low, key, high, needed):
    """Scores, but in a tile where a mask is needed, minus infinity unless low <= key <= high.

    All three count from the tile's start: from the sequence's, compilers make 64-bit numbers of them, three
    times as slow.
    """
    if needed:
        scores = tl.where((low <= key) & (key <= high), scores, -float("inf"))
    return scores


@triton.jit
def _attention_forward_kernel(k_tiles, v_tiles, q_tiles, out_tiles, a, T, H: tl.constexpr):
    """Attention of a tile of queries in one head, and the base-2 log-sum-exp of their scores.

    A gate g only scales a row's probabilities, so the log-sum-exp less log2(g) is what the backward pass
    reads.
    """
    BM: tl.constexpr = q_tiles.block_shape[0]
    BN: tl.constexpr = k_tiles.block_shape[0]
    D: tl.constexpr = k_tiles.block_shape[1]
    head = tl.program_id(1)
    start = tl.program_id(0) * BM
    rows = start + tl.arange(0, BM)
    inside = rows < T
    scale = tl.load(a.scale) * 1.4426950408889634  # log2(e), for exp2
    first_key = tl.load(a.mask.first_key + rows, mask=inside, other=T)
    low = tl.load(a.mask.first_key + start) // BN * BN
    # From here on, all rows see every key before them.
    full = tl.load(a.mask.first_key + tl.minimum(start + BM, T) - 1)
    if a.gate is not None:
        gate = tl.load(a.gate + rows * H + head, mask=inside, other=0.0).to(tl.float32)
    q = q_tiles.load([start, head * D])  # last of all: loads by descriptor wait
    m_i = tl.full([BM], -1e30, tl.float32)  # finite: a row may see nothing in its tile's first keys
    l_i = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, D], tl.float32)
    key = tl.arange(0, BN)[None, :]
    for n in range(low, tl.minimum(start + BM, T), BN):
        k = k_tiles.load([n, head * D])
        v = v_tiles.load([n, head * D])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        partial = (n < full) | (n + BN > start)
        scores = _masked(scores, (first_key - n)[:, None], key, (rows - n)[:, None], partial)
        m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * alpha[:, None], input_precision="ieee")
        m_i = m_new
    if a.gate is not None:
        l_i *= 1.0 + tl.exp(-gate)  # over the gate, a sigmoid
    out_tiles.store([start, head * D], (out / l_i[:, None]).to(out_tiles.dtype))
    tl.store(a.lse + head * T + rows, m_i + tl.log2(l_i), mask=inside)


@triton.jit
def _store_gradient(ptr, start, column, T, stride, x, ROWS, COLUMNS):
    """Store a tile of a gradient, over BLOCK_GRAD_SCALE where it goes into e4m3."""
    if ptr.dtype.element_ty == tl.float8e4nv:
        x *= 1 / BLOCK_GRAD_SCALE
    _store_tile(ptr, start, column, T, stride, x, ROWS, COLUMNS)


@triton.jit
def _store_before_norm(ptr, start, column, T, stride, dx, x, factor, cos_ptr, sin_ptr, ROWS, D):
    """Backward through rotary embedding and QK norm: dx is the gradient of the turned, normalized x."""
    cos = _load_tile(cos_ptr, start, 0, T, D // 2, ROWS, D // 2).to(tl.float32)
    sin = _load_tile(sin_ptr, start, 0, T, D // 2, ROWS, D // 2).to(tl.float32)
    along = tl.sum(dx * x, 1) / D  # a norm's gradient has no part along its input
    dx = (dx - x * along[:, None]) * factor[:, None]
    low, high = dx.reshape(ROWS, 2, D // 2).permute(0, 2, 1).split()
    _store_gradient(ptr, start, column, T, stride, low * cos - high * sin, ROWS, D // 2)
    _store_gradient(ptr, start, column + D // 2, T, stride, low * sin + high * cos, ROWS, D // 2)


@triton.jit
def _attention_query_kernel(
    k_tiles, v_tiles, a, end, d, T, STRIDE: tl.constexpr, H: tl.constexpr, BM: tl.constexpr
):
    """The gradients of q and gate, and delta. With an end, q's is that of q before norm and rotary."""
    BN: tl.constexpr = k_tiles.block_shape[0]
    D: tl.constexpr = k_tiles.block_shape[1]
    head = tl.program_id(1)
    start = tl.program_id(0) * BM
    rows = start + tl.arange(0, BM)
    inside = rows < T
    scale = tl.load(a.scale)
    first_key = tl.load(a.mask.first_key + rows, mask=inside, other=T)
    lse = tl.load(a.lse + head * T + rows, mask=inside, other=float("inf"))
    low = tl.load(a.mask.first_key + start) // BN * BN
    full = tl.load(a.mask.first_key + tl.minimum(start + BM, T) - 1)
    q = _load_tile(a.q, start, head * D, T, STRIDE, BM, D)
    dout = _load_tile(d.out, start, head * D, T, H * D, BM, D)
    out = _load_tile(a.out, start, head * D, T, H * D, BM, D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if a.gate is not None:
        gate = tl.sigmoid(tl.load(a.gate + rows * H + head, mask=inside, other=0.0).to(tl.float32))
        dgate = delta * (1.0 - gate)
        tl.store(d.gate + rows * H + head, dgate.to(d.gate.dtype.element_ty), mask=inside)
        delta = delta / tl.maximum(gate, 1e-30)  # where the gate is less, out is zero
    tl.store(d.delta + head * T + rows, delta, mask=inside)
    dq = tl.zeros([BM, D], tl.float32)
    key = tl.arange(0, BN)[None, :]
    for n in range(low, tl.minimum(start + BM, T), BN):
        k = k_tiles.load([n, head * D])
        v = v_tiles.load([n, head * D])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        partial = (n < full) | (n + BN > start)
        scores = _masked(scores, (first_key - n)[:, None], key, (rows - n)[:, None], partial)
        p = tl.exp2(scores * (scale * 1.4426950408889634) - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq *= scale
    if end.factors is None:
        _store_gradient(d.q, start, head * D, T, 3 * H * D, dq, BM, D)
    else:
        factor = tl.load(end.factors + head * T + rows, mask=inside, other=0.0)
        # Once more: the loop has no registers to keep it in.
        q = _load_tile(a.q, start, head * D, T, STRIDE, BM, D).to(tl.float32)
        _store_before_norm(d.q, start, head * D, T, 3 * H * D, dq, q, factor, end.cos, end.sin, BM, D)


@triton.jit
def _attention_key_kernel(
    q_tiles, dout_tiles, k_tiles, v_tiles, a, end, d, T, STRIDE: tl.constexpr, H: tl.constexpr
):
    """The gradients of k and v for one tile of keys, over all queries that attend to it.

    With an end, they are those of k before norm and rotary embedding and of v before it is mixed; then that
    of ve is stored too, and those of l0 and l1 are added to what is there.
    """
    BM: tl.constexpr = q_tiles.block_shape[0]
    BN: tl.constexpr = k_tiles.block_shape[0]
    D: tl.constexpr = k_tiles.block_shape[1]
    head = tl.program_id(1)
    start = tl.program_id(0) * BN
    scale = tl.load(a.scale)
    stop = tl.load(a.mask.last_query + tl.minimum(start + BN, T) - 1) + 1
    # Up to here, all queries see every key of the tile that is before them.
    full = tl.load(a.mask.last_query + start) + 1
    k = k_tiles.load([start, head * D])
    v = v_tiles.load([start, head * D])
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    key = tl.arange(0, BN)[:, None]
    for m in range(start // BM * BM, stop, BM):
        rows = m + tl.arange(0, BM)
        inside = rows < T
        q = q_tiles.load([m, head * D])
        dout = dout_tiles.load([m, head * D])
        lse = tl.load(a.lse + head * T + rows, mask=inside, other=0.0)
        delta = tl.load(d.delta + head * T + rows, mask=inside, other=0.0)
        first_key = tl.load(a.mask.first_key + rows, mask=inside, other=0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        partial = (m + BM > full) | (m < start + BN)
        scores = _masked(scores, (first_key - start)[None, :], key, (rows - start)[None, :], partial)
        p = tl.exp2(scores * (scale * 1.4426950408889634) - lse[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    if end.factors is None:
        _store_gradient(d.v, start, head * D, T, 3 * H * D, dv, BN, D)
        _store_gradient(d.k, start, head * D, T, 3 * H * D, dk * scale, BN, D)
    else:
        # The end asks early for what it reads, at most two tiles at a time: registers hold no more.
        keys = start + tl.arange(0, BN)
        v_proj = _load_tile(end.v_proj, start, head * D, T, H * D, BN, D)
        if end.ve is not None:
            ve = _load_tile(end.ve, start, head * D, T, H * D, BN, D)
        l0, l1 = tl.load(end.lambdas.value + 2), tl.load(end.lambdas.value + 3)
        factor = tl.load(end.factors + (H + head) * T + keys, mask=keys < T, other=0.0)
        _store_gradient(d.v, start, head * D, T, 3 * H * D, dv * l0, BN, D)
        tl.atomic_add(end.lambdas.grad + 2, tl.sum(dv * v_proj.to(tl.float32)), sem="relaxed")
        if end.ve is not None:
            _store_tile(d.ve, start, head * D, T, H * D, dv * l1, BN, D)
            tl.atomic_add(end.lambdas.grad + 3, tl.sum(dv * ve.to(tl.float32)), sem="relaxed")
        k = _load_tile(a.k, start, head * D, T, STRIDE, BN, D).to(tl.float32)  # again, as q above
        dk *= scale
        _store_before_norm(d.k, start, head * D, T, 3 * H * D, dk, k, factor, end.cos, end.sin, BN, D)


def _attention_tile(name: str, x: Tensor) -> tuple[int, int, dict]:
    """How many queries and keys an attention kernel's tiles have on the device of x, and launch options."""
    BM, BN, warps, stages = (HOPPER_TILES if on_hopper(x) else SMALL_TILES)[name]
    return BM, BN, {"num_warps": warps, "num_stages": stages}


def _head_tiles(rows: int, *tensors: Tensor) -> list[TensorDescriptor]:
    """Descriptors of so many rows of one head of tensors (T, H, D)."""
    return [_descriptor(t.flatten(1), rows, t.size(2)) for t in tensors]


def attention_forward(q, k, v, gate: Tensor | None, mask: Mask, scale: Tensor) -> Attended:
    """`flash_attention`, times a gate's sigmoid if one is given, as FlashAttention (arXiv 2205.14135)."""
    T, H, D = q.shape
    a = Attended(q, k, v, gate, mask, scale, q.new_empty(T, H, D), q.new_empty(H, T, dtype=torch.float32))
    BM, BN, options = _attention_tile("forward", q)
    tiles = [*_head_tiles(BN, k, v), *_head_tiles(BM, q, a.out)]
    _attention_forward_kernel[triton.cdiv(T, BM), H](*tiles, a, T, H, **options)
    return a


def attention_backward(
    dout: Tensor, a: Attended, end: QKVEnd, fp8: bool = False
) -> tuple[Tensor, AttentionGradients]:
    """Gradients of q, k and v as one, (T, 3, H, D), and all by name. With an end, lambdas' are added to.

    fp8: whether those of q, k and v are in e4m3 over BLOCK_GRAD_SCALE, else in the dtype of dout.
    """
    T, H, D = a.q.shape
    dqkv = dout.new_empty(T, 3, H, D, dtype=torch.float8_e4m3fn if fp8 else None)
    delta = torch.empty_like(a.lse)
    dgate, dve = (None if t is None else torch.empty_like(t) for t in (a.gate, end.ve))
    d = AttentionGradients(dout, *dqkv.unbind(1), dgate, dve, delta)
    BM, BN, options = _attention_tile("query", dout)
    tiles, stride = _head_tiles(BN, a.k, a.v), a.q.stride(0)
    _attention_query_kernel[triton.cdiv(T, BM), H](*tiles, a, end, d, T, stride, H, BM, **options)
    BM, BN, options = _attention_tile("key", dout)
    tiles = [*_head_tiles(BM, a.q, dout), *_head_tiles(BN, a.k, a.v)]
    _attention_key_kernel[triton.cdiv(T, BN), H](*tiles, a, end, d, T, stride, H, **options)
    return dqkv, d


class _FlashAttention(torch.autograd.Function):
    """`flash_attention`."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        a = attention_forward(q.contiguous(), k.contiguous(), v.contiguous(), None, mask, scale)
        ctx.save_for_backward(a.q, a.k, a.v, a.out, a.lse)
        ctx.rest = mask, scale
        return a.out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        a = Attended(q, k, v, None, *ctx.rest, out, lse)
        _, d = attention_backward(dout.contiguous(), a, QKVEnd())
        return d.q, d.k, d.v, None, None


@fused(flash_attention)
def flash_attention_fused(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: Tensor) -> Tensor:
    """As `flash_attention`. Windows and documents of any length cost no new compilation."""
    return _FlashAttention.apply(q, k, v, mask, scale)


class _Attention(torch.autograd.Function):
    """`attention_`. Gradients of its weights are added straight into theirs."""

    @staticmethod
    def forward(ctx, x, h, ve, e4m3, weights, rotary, mask):
        qkvo, gate, lambdas = weights
        T, C = x.shape
        if e4m3 is None:
            gate_h = h[:, :GATE_CHANNELS].contiguous()
        else:
            gate_h = e4m3[:, :GATE_CHANNELS].to(x.dtype) * normed_scale(C)
        gates = F.linear(gate_h, gate.value)
        qkv, end = qkv_forward(Normed(h, e4m3), qkvo, ve, lambdas, rotary)
        a = attention_forward(*qkv.unbind(1), gates, mask, rotary.scale)
        h = h if e4m3 is None else None  # else the backward pass reads e4m3
        ctx.save_for_backward(h, e4m3, gate_h, ve, gates, qkv, end.v_proj, end.factors, a.out, a.lse)
        ctx.rest = weights, rotary, mask
        w_o = qkvo.value.view(4, C, C)[3]
        if not getattr(x, "unsaved", False):
            return torch.addmm(x, a.out.view(T, C), w_o.t())
        ctx.mark_dirty(x)
        return x.addmm_(a.out.view(T, C), w_o.t())  # not in place it would copy x first

    @staticmethod
    def backward(ctx, dx):
        h, e4m3, gate_h, ve, gates, qkv, v_proj, factors, out, lse = ctx.saved_tensors
        (qkvo, gate, lambdas), rotary, mask = ctx.rest
        (T, C), dx = dx.shape, dx.contiguous()
        dqkvo = qkvo.grad.view(4 * C, C)
        add_product_(dqkvo[3 * C :], dx.t(), out.view(T, C))
        dout = (dx @ qkvo.value.view(4, C, C)[3]).view_as(out)
        a = Attended(*qkv.unbind(1), gates, mask, rotary.scale, out, lse)
        end = QKVEnd(rotary.cos, rotary.sin, ve, lambdas, v_proj, factors)
        fp8 = e4m3 is not None
        dqkv, d = attention_backward(dout, a, end, fp8)
        dqkv = dqkv.view(T, 3 * C)
        if fp8:
            scale, h_t = BLOCK_GRAD_SCALE.value, packed_transpose(e4m3)
            add_fp8_product_(dqkvo[: 3 * C], packed_transpose(dqkv), h_t, scale * normed_scale(C))
            dh = fp8_product(dqkv, qkvo.e4m3_t[:, : 3 * C].t(), scale * WEIGHT_SCALE, dx.dtype)
        else:
            add_product_(dqkvo[: 3 * C], dqkv.t(), h)
            dh = dqkv @ qkvo.value.view(4 * C, C)[: 3 * C]
        add_product_(gate.grad, d.gate.t(), gate_h)
        dh[:, :GATE_CHANNELS].addmm_(d.gate, gate.value)
        return dx, dh, d.ve, None, None, None, None


@fused(attention_)
def attention_fused_(x, h, qkvo: Weight, gate: Weight, lambdas: Weight, ve, rotary, mask: Mask) -> Tensor:
    """As `attention_`."""
    h = normed_handle(h, qkvo)
    return _Attention.apply(x, h.value, ve, h.e4m3, (qkvo, gate, lambdas), rotary, mask)


# ------------------------------------------------------------------------------------------------------
# MLP: `mlp`

# Rows, columns, depth in bytes, warps, stages: what an H100 holds. Packed transposes take 256 rows backward.
MLP_TILE, MLP_BACKWARD_TILE = (128, 256, 128, 8, 3), (256, 128, 128, 8, 3)


@triton.jit
def _store_hidden(x, out, row, column, SCALE):
    x = tl.maximum(x * SCALE, 0.0)
    out.store([row, column], (x * x).to(out.dtype))


@triton.jit
def _mlp_kernel(h, weight, out, T, N, K, SCALE: tl.constexpr):
    """out (T, N) = relu(SCALE h weight^T)^2, in e4m3 as h (T, K) and weight (N, K) are."""
    BM: tl.constexpr = h.block_shape[0]
    BK: tl.constexpr = h.block_shape[1]
    BN: tl.constexpr = weight.block_shape[0]
    across = tl.cdiv(N, BN)
    # Flattened, so that the next tile loads while this one is stored.
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BM) * across, tl.num_programs(0), flatten=True):
        row, column = tile // across * BM, tile % across * BN
        x = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            x = tl.dot(h.load([row, k]), tl.trans(weight.load([column, k])), x)
        # By halves, one after the other: so they are stored by way of half the shared memory.
        left, right = x.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        _store_hidden(left, out, row, column, SCALE)
        _store_hidden(right, out, row, column + BN // 2, SCALE)


@triton.jit
def _store_hidden_gradient(x, squares, out, words_ptr, row, column, N, WORDS, SCALE):
    BM: tl.constexpr = x.shape[0]
    BN: tl.constexpr = x.shape[1]
    squares = squares.to(tl.float32)
    x *= tl.sqrt(squares) * (2 * SCALE)
    out.store([row, column], x.to(out.dtype))
    # Joined, for else hidden is loaded twice, the second time by single bytes.
    both = tl.join(_e4m3_word(*_by_words(x)), _e4m3_word(*_by_words(squares)))
    columns = column + tl.arange(0, BN)[None, :, None]
    at = columns.to(tl.int64) * WORDS + row // 4 + tl.arange(0, BM // 4)[:, None, None]
    at += tl.arange(0, 2)[None, None, :] * N.to(tl.int64) * WORDS
    tl.store(words_ptr + at, both.reshape(BM // 4, BN, 2), mask=columns < N)


@triton.jit
def _mlp_backward_kernel(dy, weight, hidden, out, words_ptr, T, N, K, WORDS, SCALE: tl.constexpr):
    """out (T, N) = SCALE dy weight^T times the slope of ReLU^2, twice the root of hidden, all in e4m3.

    dy: (T, K); weight: (N, K). The packed transposes of out and hidden go to words (2, N, WORDS).
    """
    BM: tl.constexpr = dy.block_shape[0]
    BK: tl.constexpr = dy.block_shape[1]
    BN: tl.constexpr = weight.block_shape[0]
    across = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BM) * across, tl.num_programs(0), flatten=True):
        row, column = tile // across * BM, tile % across * BN
        x = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            x = tl.dot(dy.load([row, k]), tl.trans(weight.load([column, k])), x)
        # By halves, as above; hidden at once, for each load waits.
        left, right = x.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        low, high = hidden.load([row, column]).reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        _store_hidden_gradient(left, low, out, words_ptr, row, column, N, WORDS, SCALE)
        _store_hidden_gradient(right, high, out, words_ptr, row, column + BN // 2, N, WORDS, SCALE)


def mlp_forward(h: Tensor, weight: Tensor, scale: float) -> Tensor:
    """relu(scale h weight^T)^2 in e4m3, as h (T, K) and weight (N, K) are: (T, N)."""
    T, K = h.shape
    N = len(weight)
    out = h.new_empty(T, N)
    BM, BN, BK, warps, stages = MLP_TILE
    tiles = _descriptor(h, BM, BK), _descriptor(weight, BN, BK), _descriptor(out, BM, BN // 2)
    _mlp_kernel[(programs(h),)](*tiles, T, N, K, SCALE=scale, num_warps=warps, num_stages=stages)
    return out


def mlp_backward(dy: Tensor, weight: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of hidden units' inputs, scale dy weight^T times the slope of ReLU^2, (T, N), in e4m3.

    Also returns its packed transpose and that of the units hidden (T, N). dy: (T, K); weight: (N, K).
    """
    T, N = hidden.shape
    K = dy.size(1)
    out = torch.empty_like(hidden)
    words = empty_words(hidden, 2)
    BM, BN, BK, warps, stages = MLP_BACKWARD_TILE
    tiles = [_descriptor(dy, BM, BK), _descriptor(weight, BN, BK)]
    tiles += [_descriptor(hidden, BM, BN), _descriptor(out, BM, BN // 2)]
    options = {"SCALE": scale, "num_warps": warps, "num_stages": stages}
    _mlp_backward_kernel[(programs(dy),)](*tiles, words, T, N, K, words.size(-1), **options)
    return out, *words.view(out.dtype)


class _MLP(torch.autograd.Function):
    """`mlp` in FP8 training. Gradients of its weights are added straight into theirs.

    Hidden units are kept in e4m3 alone: that is what c_proj multiplies, and what its gradient and the slope
    of ReLU^2 are taken of. Gradients of the output and of hidden units are in e4m3 over BLOCK_GRAD_SCALE.
    """

    @staticmethod
    def forward(ctx, x, h, e4m3, c_fc, c_proj):
        hidden = mlp_forward(e4m3, c_fc.e4m3_t, normed_scale(h.size(1)) * WEIGHT_SCALE)
        y = fp8_product(hidden, c_proj.e4m3.t(), WEIGHT_SCALE, x.dtype)
        ctx.save_for_backward(e4m3, hidden)
        ctx.weights = c_fc, c_proj
        return x + y

    @staticmethod
    def backward(ctx, dx):
        e4m3, hidden = ctx.saved_tensors
        c_fc, c_proj = ctx.weights
        scale = BLOCK_GRAD_SCALE.value
        dy, dy_t = e4m3_and_transpose(dx.contiguous(), scale)
        dhidden, dhidden_t, hidden_t = mlp_backward(dy, c_proj.e4m3_t, hidden, WEIGHT_SCALE)
        add_fp8_product_(c_proj.grad, dy_t, hidden_t, scale)
        add_fp8_product_(c_fc.grad, packed_transpose(e4m3), dhidden_t, normed_scale(e4m3.size(1)) * scale)
        dh = fp8_product(dhidden, c_fc.e4m3.t(), scale * WEIGHT_SCALE, dx.dtype)
        return dx, dh, None, None, None


@fused(mlp)
def mlp_fused(x: Tensor, h: Tensor | Normed, c_fc: Weight, c_proj: Weight) -> Tensor:
    """As `mlp`, which runs as it stands where one of its weights has no FP8 copies."""
    if c_fc.e4m3 is None or c_proj.e4m3 is None:
        return run_definition(mlp, x, h, c_fc, c_proj)
    h = normed_handle(h, c_fc)
    return _MLP.apply(x, h.value, h.e4m3, c_fc, c_proj)


# ------------------------------------------------------------------------------------------------------
# Loss: `softcapped_cross_entropy` and `head_loss`. Logits are 30 sigmoid(z / 7.5) = 15 (1 + tanh(z / 15)),
# in base 2 CAP (1 + tanh(SLOPE z)). Triton's interpreter asks that such constants stand on the right.

CAP = tl.constexpr(SOFTCAP / 2 / math.log(2))
SLOPE = tl.constexpr(0.5 / SOFTCAP_SLOPE)
GAIN = tl.constexpr(SOFTCAP / (4 * SOFTCAP_SLOPE))  # the softcap's slope at 0
E5M2_GAIN = tl.constexpr(GAIN.value * (1 / LOGIT_GRAD_SCALE))


@triton.jit
def _tanh(x, EXACT):
    """tanh of float32 x; unless exact, to 2^-11 in one instruction, where three bound the loss kernels."""
    if EXACT:
        return 2 * tl.sigmoid(2 * x) - 1
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _loss_kernel(z_ptr, target_ptr, loss_ptr, lse_ptr, V, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """Loss and base-2 log-sum-exp of one row; 2 CAP stands in for its largest logit."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * V + at, mask=at < V, other=0.0).to(tl.float32)
        total += tl.where(at < V, tl.exp2(_tanh(z * SLOPE, EXACT) * CAP - CAP), 0.0)
    lse = tl.log2(tl.sum(total, 0)) + 2 * CAP
    z = tl.load(z_ptr + row * V + tl.load(target_ptr + row)).to(tl.float32)
    loss = (lse - CAP - _tanh(z * SLOPE, EXACT) * CAP) * 0.6931471805599453  # ln(2)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)


@triton.jit
def _e5m2_pair(low, high):
    """The bits of two numbers in e5m2, as the upper bytes of a uint32's halves: float16's, rounded.

    By hand, since ptxas of Triton 3.6 and 3.7.1 miscompiles, or never ends on, bytes of converted FP8.
    """
    pair = tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.uint32, is_pure=True, pack=1
    )
    return pair + 0x7F007F + ((pair >> 8) & 0x10001)


@triton.jit
def _e5m2_bytes(pair):
    """The low ones and the high ones of such pairs, four columns in as many instructions."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a, b; prmt.b32 a, $2, $3, 0x7351; prmt.b32 b, $4, $5, 0x7351;"
        " prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; }",
        "=r,=r,r,r,r,r",
        [pair],
        (tl.uint8, tl.uint8),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _loss_gradient(z_ptr, target_ptr, lse_ptr, dloss_ptr, rows, columns, T, V, FP8):
    """The gradient of z at rows x columns, float32; for e5m2 over LOGIT_GRAD_SCALE, by approximate tanh."""
    inside = (rows[:, None] < T) & (columns[None, :] < V)
    z = tl.load(z_ptr + rows[:, None] * V + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(lse_ptr + rows, mask=rows < T, other=0.0) - CAP
    target = tl.load(target_ptr + rows, mask=rows < T, other=0)
    dloss = tl.load(dloss_ptr + rows, mask=rows < T, other=0.0) * (E5M2_GAIN if FP8 else GAIN)
    tanh = _tanh(z * SLOPE, not FP8)
    p = tl.exp2(tanh * CAP - shift[:, None])
    p = tl.where(columns.to(tl.int32)[None, :] == target[:, None], p - 1.0, p)
    return p * (1.0 - tanh * tanh) * dloss[:, None]


@triton.jit
def _loss_backward_kernel(
    z_ptr, target_ptr, lse_ptr, dloss_ptr, dz_ptr, words_ptr, T, V, QUADS, BM: tl.constexpr, BN: tl.constexpr
):
    """Gradient of z for 4 BM rows, in dz's dtype; or in e5m2's bits, and its transpose in words of 4 rows."""
    FP8: tl.constexpr = words_ptr is not None
    quads = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inside = (columns < V)[None, :]
    before = tl.zeros([BM, BN], tl.uint32)
    for half in tl.static_range(2):
        rows = 4 * quads + 2 * half
        at = rows[:, None] * V + columns[None, :]
        low = _loss_gradient(z_ptr, target_ptr, lse_ptr, dloss_ptr, rows, columns, T, V, FP8)
        high = _loss_gradient(z_ptr, target_ptr, lse_ptr, dloss_ptr, rows + 1, columns, T, V, FP8)
        if FP8:
            pair = _e5m2_pair(low, high)
            words = tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, 0x7531;", "=r,r,r", [before, pair], tl.uint32, is_pure=True, pack=1
            )
            before = pair
            low, high = _e5m2_bytes(pair)
        tl.store(dz_ptr + at, low.to(dz_ptr.dtype.element_ty), mask=(rows < T)[:, None] & inside)
        tl.store(dz_ptr + at + V, high.to(dz_ptr.dtype.element_ty), mask=(rows + 1 < T)[:, None] & inside)
    if FP8:
        at = columns[:, None] * QUADS + quads[None, :]
        tl.store(words_ptr + at, tl.trans(words), mask=(columns < V)[:, None] & (quads < QUADS)[None, :])


def cross_entropy_forward(z: Tensor, targets: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Loss and base-2 log-sum-exp of each row of z (T, V), float32 (T,); unless exact, tanh is to 2^-11."""
    T, V = z.shape
    loss, lse = z.new_empty(T, dtype=torch.float32), z.new_empty(T, dtype=torch.float32)
    _loss_kernel[(T,)](z, targets, loss, lse, V, EXACT=exact, BLOCK=2048, num_warps=4)
    return loss, lse


def cross_entropy_backward(z, targets, lse, dloss, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient of z (T, V) in its dtype; or in e5m2, divided by LOGIT_GRAD_SCALE, and its transpose.

    lse is that of `cross_entropy_forward`, exact but for e5m2. For e5m2, T must be a multiple of 4.
    """
    T, V = z.shape
    dz = torch.empty_like(z, dtype=torch.float8_e5m2 if fp8 else z.dtype)
    dzt = dz.new_empty(V, T) if fp8 else None
    out, words = (dz.view(torch.uint8), dzt.view(torch.int32)) if fp8 else (dz, None)
    _loss_backward_kernel[triton.cdiv(V, 128), triton.cdiv(T, 64)](
        z, targets, lse, dloss, out, words, T, V, T // 4, BM=16, BN=128, num_warps=4
    )
    return dz, dzt


class _CrossEntropy(torch.autograd.Function):
    """`softcapped_cross_entropy`."""

    @staticmethod
    def forward(ctx, z, targets):
        loss, lse = cross_entropy_forward(z.contiguous(), targets, exact=True)
        ctx.save_for_backward(z, targets, lse)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        z, targets, lse = ctx.saved_tensors
        return cross_entropy_backward(z.contiguous(), targets, lse, dloss.contiguous(), fp8=False)[0], None


@fused(softcapped_cross_entropy)
def softcapped_cross_entropy_fused(z: Tensor, targets: Tensor) -> Tensor:
    """As `softcapped_cross_entropy`."""
    return _CrossEntropy.apply(z, targets)


class _HeadLoss(torch.autograd.Function):
    """`head_loss` in FP8 training: e4m3 x e4m3 forward, e5m2 x e4m3 back, and an approximate softcap."""

    @staticmethod
    def forward(ctx, h, weight, targets, h_e4m3, e4m3, e4m3_t):
        z = fp8_product(h_e4m3, e4m3.t(), normed_scale(h.size(1)) * WEIGHT_SCALE, torch.bfloat16)
        loss, lse = cross_entropy_forward(z, targets, exact=False)
        ctx.z = z  # not a saved tensor: the largest of all, it goes before the products of the backward pass
        ctx.save_for_backward(targets, lse, h_e4m3, e4m3_t)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        targets, lse, h_e4m3, e4m3_t = ctx.saved_tensors
        dz, dzt = cross_entropy_backward(ctx.z, targets, lse, dloss.contiguous(), fp8=True)
        ctx.z = None
        h_t = call_compiled(transposed, h_e4m3.view(torch.uint8)).view(h_e4m3.dtype)
        scale = LOGIT_GRAD_SCALE * normed_scale(h_e4m3.size(1))
        dh = fp8_product(dz, e4m3_t.t(), LOGIT_GRAD_SCALE * WEIGHT_SCALE, torch.bfloat16, fast=False)
        dw = fp8_product(dzt, h_t.t(), scale, torch.float32, fast=False)
        return dh, dw, None, None, None, None


@fused(head_loss)
def head_loss_fused(h: Tensor, lm_head: Weight, targets: Tensor) -> Tensor:
    """As `head_loss`, which runs as it stands but for FP8 training."""
    if not (torch.is_grad_enabled() and in_fp8(h.device, "head")):
        return run_definition(head_loss, h, lm_head, targets)
    if lm_head.e4m3 is None:  # some other table stands in for the head
        lm_head = lm_head._replace(**fp8_copies(lm_head.value.detach(), matrices=1))
    h = normed_handle(h, lm_head)
    return _HeadLoss.apply(h.value, lm_head.value, targets, h.e4m3, lm_head.e4m3, lm_head.e4m3_t)


# ------------------------------------------------------------------------------------------------------
# Embedding: `embedding`


@triton.jit
def _scatter_add_kernel(table_ptr, tokens_ptr, rows_ptr, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    x = tl.load(rows_ptr + row * C + columns, mask=columns < C, other=0.0).to(tl.float32)
    tl.atomic_add(table_ptr + token * C + columns, x, mask=columns < C, sem="relaxed")


def scatter_add_(table: Tensor, tokens: Tensor, rows: Tensor):
    """Add rows (T, C) of any dtype to the rows of a float32 table (V, C) that tokens name."""
    T, C = rows.shape
    _scatter_add_kernel[T, triton.cdiv(C, 256)](table, tokens, rows, C, BLOCK=256, num_warps=2)


class _Embedding(torch.autograd.Function):
    """`embedding`, whose gradient is added straight into the table's: no dense one is made on the way."""

    @staticmethod
    def forward(ctx, tokens, table, grad):
        ctx.save_for_backward(tokens)
        ctx.grad = grad
        return F.embedding(tokens, table)

    @staticmethod
    def backward(ctx, dout):
        scatter_add_(ctx.grad, *ctx.saved_tensors, dout.contiguous())
        return None, None, None


@fused(embedding)
def embedding_fused(tokens: Tensor, table: Weight) -> Tensor:
    """As `embedding`."""
    return _Embedding.apply(tokens, table.value, table.grad)


# ======================================================================================================
# Sharding: processes and devices, banks of parameters, and the optimizers over them


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank, the number of processes and the device that it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def shared(self) -> bool:
        """Whether gradients and parameters travel between processes."""
        return self.size > 1

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and products: bf16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


class Launch(NamedTuple):
    """Which process this is, in all and on its machine, of how many each, and where all meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_port: int = 0
    master_addr: str = ""


def read_environment() -> Launch:
    """What torchrun, if it has started this process, says of it; raises UsageError where that cannot be."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    *numbers, address = values = [os.environ.get(name) for name in names]
    if values[:4] == [None] * 4:
        return Launch()
    if address and all(re.fullmatch("[0-9]{1,9}", number or "") for number in numbers):
        launch = Launch(*map(int, numbers), address)
        if launch.rank < launch.size and launch.local_rank < launch.local_size <= launch.size:
            return launch
    found = ", ".join(f"{name}={value!a}" for name, value in zip(names, values, strict=True))
    raise UsageError(f"the environment has {found}; start several processes by torchrun, or unset all these")


PATIENCE = 12  # s, twice, for other processes where torchrun does not see to it that all come


def meet(launch: Launch) -> dist.Store:
    """The store that all processes share; raises OSError, ValueError or RuntimeError if they do not meet."""
    if dist.is_torchelastic_launched():
        return next(dist.rendezvous("env://"))[0]
    place, end = (launch.master_addr, launch.master_port), time.monotonic() + PATIENCE
    socket.getaddrinfo(*place)  # where torch would try a wrong name, or no rank 0, for long and with a stack
    while launch.rank:
        try:
            socket.create_connection(place, timeout=PATIENCE).close()
            break
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    # In a thread, since torch may wait for ever for another service that it finds there.
    meeting = dist.rendezvous("env://", timeout=timedelta(seconds=PATIENCE))
    try:
        return ThreadPoolExecutor(1).submit(next, meeting).result(PATIENCE + 1)[0]
    except TimeoutError:
        raise TimeoutError(f"no answer in {PATIENCE} s") from None


def connect(s: Hyperparameters, launch: Launch) -> World:
    """Join the other processes, if there are any; raises UsageError if they do not fit the run or come."""
    rank, size, local_rank, local_size, *_ = launch
    gpus = torch.cuda.device_count()
    if gpus and local_size > gpus:
        raise UsageError(
            f"--nproc_per_node={local_size}, but this machine has {gpus} GPUs; start at most {gpus} processes"
        )
    head_dim = s.model_dim // s.num_heads
    for shape in dict.fromkeys(variant.shape for variant in first_steps(s)):
        if shape.micro_batches % size:
            raise UsageError(
                f"--micro_batches={shape.micro_batches} cannot be dealt to {size} processes; give a multiple"
                f" of {size}"
            )
        if gpus and (head_dim not in (16, 32, 64, 128) or shape.micro_batch_tokens % 16):
            raise UsageError(
                f"--num_heads={s.num_heads} makes heads {head_dim} wide and"
                f" --micro_batches={shape.micro_batches} packs {shape.micro_batch_tokens} tokens; a GPU needs"
                " a power of two from 16 to 128, and a multiple of 16"
            )
    device = torch.device("cpu")
    if gpus:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        run_operators_on_gpu()
    world = World(rank, size, device)
    if world.shared:
        try:
            store = meet(launch)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"{size} processes do not meet at MASTER_ADDR={launch.master_addr!a}"
                f" MASTER_PORT={launch.master_port} ({str(error).splitlines()[0]}); start them by torchrun"
            ) from None
        backend, device_id = ("nccl", device) if gpus else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
    return world


# torch 2.13 has renamed these two, and 2.11 knows only the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def kind_of(name: str) -> str:
    """What a parameter is, by its name: blocks.3.c_fc.0 is a c_fc, lm_head.weight an lm_head."""
    return [part for part in name.split(".") if not part.isdecimal() and part != "weight"][-1]


class Bank:
    """Owns parameters of one optimizer, end to end: values, masters, gradients, moments and FP8 copies.

    They become views of `param`, (chunks, ranks, unit), in dtype, and their gradients views of a like `grad`
    in grad_dtype; zeros pad the end to a whole chunk. Rank r updates unit r of each chunk: `master`, (chunks,
    unit), in the parameters' first dtype, which stays exact where `param` is rounded. Beside it lie
    `grad_shard` and the optimizer's `moments`.

    Between processes all travels in dtype: a chunk's gradients once its last one is whole, and its parameters
    when the next step begins. Each is awaited where it is needed, so that a CUDA graph may hold it all.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], unit: int, world: World, dtype, grad_dtype):
        self.names, self.parameters, self.world = list(parameters), list(parameters.values()), world
        self.numel = sum(p.numel() for p in self.parameters)
        self.unit, self.chunks = unit, math.ceil(self.numel / (unit * world.size))
        first = self.parameters[0]
        exact = torch.zeros(self.chunks, world.size, unit, dtype=first.dtype, device=world.device)
        exact.view(-1)[: self.numel].copy_(torch.cat([p.data.flatten() for p in self.parameters]))
        self.param = exact.to(dtype)
        own = self.param if dtype == exact.dtype else exact
        self.master = own[:, world.rank] if own is self.param else own[:, world.rank].clone()
        self.grad = torch.zeros_like(exact, dtype=grad_dtype)
        self.sent = torch.zeros_like(self.param) if world.shared and dtype != grad_dtype else self.grad
        self.grad_shard = torch.zeros_like(self.sent[:, 0]) if world.shared else self.grad[:, 0]
        self.moments: Moments | None = None  # the optimizer's
        self.members = [set() for _ in range(self.chunks)]  # the parameters with a part in each chunk
        # In a backward pass that reduces: each chunk's members whose gradient is not whole, and how many more
        # additions each gets; whether one such pass has been seen, and to whom autograd adds.
        self.syncing, self.missing, self.awaited = False, [], Counter()
        self.observed, self.by_autograd = False, set()
        self.reduces, self.gathers = {}, {}  # under way, by chunk
        self.stale = False  # whether parameters were updated and are not yet gathered
        self.old_copies: set[nn.Parameter] = set()  # whose FP8 copies are of values before those gathered
        start = 0
        for p in self.parameters:
            end = start + p.numel()
            for chunk in range(start // (unit * world.size), math.ceil(end / (unit * world.size))):
                self.members[chunk].add(p)
            p.data = self.param.view(-1)[start:end].view_as(p)
            p.grad_dtype = grad_dtype
            p.grad = self.grad.view(-1)[start:end].view_as(p)
            p.bank = self
            if world.shared:
                p.register_post_accumulate_grad_hook(self._grad_accumulated)
            start = end
        self.fp8_matrices = {}  # of each parameter with FP8 copies, as in FP8_WEIGHTS
        for name, p in parameters.items():
            kind = kind_of(name)
            if kind in FP8_WEIGHTS and in_fp8(world.device, "head" if kind == "lm_head" else "blocks"):
                p.fp8_copies = {}
                self.fp8_matrices[p] = FP8_WEIGHTS[kind]

    @torch.no_grad()
    def quantize(self, p: nn.Parameter):
        """Make a parameter's FP8 copies, if it has any, or renew them in place, as a CUDA graph needs."""
        if matrices := self.fp8_matrices.get(p):
            for name, new in fp8_copies(p.detach(), matrices).items():
                if name in p.fp8_copies:
                    p.fp8_copies[name].copy_(new)
                else:
                    p.fp8_copies[name] = new

    def require_grad_sync(self):
        """Before the last forward pass of a step: reduce each chunk as soon as its gradients are whole.

        Not in the first backward pass, which shows which parameters get gradients from autograd.
        """
        self.syncing, self.missing = True, [set(members) for members in self.members]
        self.awaited = Counter(self.by_autograd)

    def expect_grad(self, p: nn.Parameter, node):
        """A fused version has read p: when autograd has run its node, its gradient has been added to p's."""
        if self.syncing:
            self.awaited[p] += 1
            node.register_hook(lambda *_: self._grad_arrived(p))

    def _grad_accumulated(self, p: nn.Parameter):
        if p in self.by_autograd:
            self._grad_arrived(p)
        else:  # for the first time, perhaps when its chunk has gone: then `finish_grad_sync` sends it again
            self.by_autograd.add(p)
            for chunk in [i for i in self.reduces if p in self.members[i]]:
                self.reduces.pop(chunk).wait()

    def _grad_arrived(self, p: nn.Parameter):
        self.awaited[p] -= 1
        if self.syncing and self.observed and not self.awaited[p]:
            for chunk, missing in enumerate(self.missing):
                if p in missing:
                    missing.remove(p)
                    if not missing:
                        self._reduce(chunk)

    def _reduce(self, chunk: int):
        if self.sent is not self.grad:
            self.sent[chunk].copy_(self.grad[chunk])
        handle = reduce_scatter(self.grad_shard[chunk], self.sent[chunk].view(-1), async_op=True)
        self.reduces[chunk] = handle

    def finish_grad_sync(self):
        """After that backward pass: reduce the chunks that lack a gradient, in one order on all ranks."""
        for chunk in range(self.chunks if self.syncing else 0):
            if chunk not in self.reduces:
                self._reduce(chunk)
        self.syncing, self.observed = False, True

    def wait_for_grads(self):
        """Before `grad_shard` is read: wait until all chunks are reduced."""
        for handle in self.reduces.values():
            handle.wait()
        self.reduces.clear()

    def publish(self):
        """After the update of `master`: `param` takes its values here, and gradients begin at zero again."""
        mine = self.param[:, self.world.rank]
        if self.master.data_ptr() != mine.data_ptr():
            mine.copy_(self.master)
        self.grad.zero_()

    def all_gather(self, chunk: int):
        """Start to send each rank's parameters of a chunk to all others."""
        param = self.param[chunk]
        self.gathers[chunk] = all_gather(param.view(-1), param[self.world.rank], async_op=True)
        self.old_copies |= self.members[chunk]

    def wait(self, parameter: nn.Parameter | None = None):
        """Before a parameter, or all of them, are read: wait for their chunks."""
        for chunk in [i for i in self.gathers if parameter is None or parameter in self.members[i]]:
            self.gathers.pop(chunk).wait()

    def ready(self, p: nn.Parameter):
        """Before a parameter is read: wait for it, and renew its FP8 copies if it has just come."""
        self.wait(p)
        if p in self.old_copies:
            self.old_copies.remove(p)
            self.quantize(p)

    def gather(self, shard: Tensor) -> Tensor:
        """The whole of a state of which each rank holds (chunks, n): flat, without padding."""
        full = shard.new_empty(self.chunks, self.world.size, shard.size(1))
        for chunk, mine in zip(full, shard, strict=True):
            if self.world.shared:
                all_gather(chunk.view(-1), mine.contiguous())
            else:
                chunk[0] = mine
        return full.view(-1)[: self.numel * shard.size(1) // self.unit]

    def scatter(self, full: Tensor, shard: Tensor):
        """The inverse of `gather`: write this rank's share of a whole state into shard, (chunks, n)."""
        padded = full.new_zeros(self.chunks * self.world.size * shard.size(1))
        padded[: full.numel()] = full
        shard.copy_(padded.view(self.chunks, self.world.size, -1)[:, self.world.rank])


def make_banks(model: GPT, optimizer: str, world: World) -> list[Bank]:
    """The banks of an optimizer's parameters, each in the order in which the backward pass reaches them.

    NorMuon's parameters of one shape make one bank, so that they are shared out over the ranks together, and
    in it those that are one matrix each come before those of four. Of Adam's parameters each table makes one,
    and the vectors of one rate make one.
    """
    groups = {}
    for name, p in reversed(list(model.named_parameters())):
        if getattr(p, "optimizer", None) == optimizer:
            key = p.dtype, (p.shape if optimizer == "normuon" else name if p.dim() > 1 else p.lr_mul)
            groups.setdefault(key, {})[name] = p
    if optimizer == "normuon":
        # Equal parts of equal numbers of matrices: an update takes as many as it can at once.
        groups = [dict(sorted(group.items(), key=lambda item: item[1].matrices)) for group in groups.values()]
        sizes = [next(iter(group.values())).numel() for group in groups]
        return [
            Bank(group, n, world, world.dtype, world.dtype) for group, n in zip(groups, sizes, strict=True)
        ]
    banks = []
    for group in groups.values():
        unit = math.ceil(sum(p.numel() for p in group.values()) / world.size)
        banks.append(Bank(group, unit, world, next(iter(group.values())).dtype, torch.float32))
    return banks


def check_registration(model: GPT):
    """Raise UsageError for a parameter of the model that no optimizer can train."""
    for name, p in model.named_parameters():
        optimizer = getattr(p, "optimizer", None)
        if optimizer not in ("normuon", "adam"):
            raise UsageError(
                f"the model's parameter {name} is trained by no optimizer; make it with"
                " trained(value, 'normuon' or 'adam')"
            )
        if optimizer == "normuon" and p.dim() != 2:
            raise UsageError(
                f"the model's parameter {name} is no matrix, as NorMuon needs; make it 'adam' trained"
            )


class MatrixRun(NamedTuple):
    """A rank's matrices that are divided alike: views (n, matrices, rows, cols) of its shards of a bank."""

    w: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    lr_mul: Tensor


class NorMuon:
    """NorMuon over the ranks, for hidden and gate matrices. Steps every step."""

    def __init__(self, model: GPT, s: Hyperparameters, world: World):
        self.s, self.world, self.runs = s, world, []
        # A CUDA graph reads them, so they stay where they are.
        self.lr, self.momentum, self.count = (torch.zeros((), device=world.device) for _ in range(3))
        self.banks = make_banks(model, "normuon", world)
        for bank in self.banks:
            columns = bank.unit // bank.parameters[0].size(0)
            bank.moments = Moments(torch.zeros_like(bank.master), bank.master.new_zeros(bank.chunks, columns))
            mine = list(enumerate(bank.parameters[world.rank :: world.size]))
            runs = itertools.groupby(mine, key=lambda entry: entry[1].matrices)
            self.runs.append([self._run(bank, matrices, list(run)) for matrices, run in runs])

    def _run(self, bank: Bank, matrices: int, members: list[tuple[int, nn.Parameter]]) -> MatrixRun:
        (first, p), last = members[0], members[-1][0]
        rows, cols = p.size(0), p.size(1) // matrices
        shards = (bank.master, bank.grad_shard, bank.moments.first)
        w, g, m = (t[first : last + 1].view(-1, matrices, rows, cols) for t in shards)
        v = bank.moments.second[first : last + 1].view(-1, matrices, 1, cols)
        lr_mul = torch.tensor([p.lr_mul for _, p in members], device=w.device).view(-1, 1, 1, 1)
        return MatrixRun(w, g, m, v, lr_mul)

    def set_step(self, lr: float, momentum: float, grad_accum_steps: float):
        """Set the next update's numbers; it is by the mean of gradients of so many micro-batches."""
        for kept, new in zip(
            (self.lr, self.momentum, self.count), (lr, momentum, grad_accum_steps), strict=True
        ):
            kept.fill_(new)

    def step(self):
        """Update all matrices."""
        for bank, runs in zip(self.banks, self.runs, strict=True):
            bank.wait_for_grads()
            for run in runs:
                u = call_compiled(nesterov, run.g, run.m, self.momentum, self.count, self.world.dtype)
                u = polar_express(u)
                call_compiled(normuon_update, run.w, u, run.v, self.lr, run.lr_mul, self.s)
            bank.publish()


class DistAdam:
    """Adam over the ranks, for embeddings, head and scalars. Its steps are those of `is_adam_step`."""

    def __init__(self, model: GPT, s: Hyperparameters, world: World):
        self.s, self.banks = s, make_banks(model, "adam", world)
        self.lrs = [torch.zeros((), device=world.device) for _ in self.banks]
        self.count = torch.zeros((), device=world.device)
        for bank in self.banks:
            first, second = (torch.zeros_like(bank.master, dtype=torch.float32) for _ in range(2))
            bank.moments = Moments(first, second)

    def set_step(self, lr_scale: float, t: int, grad_accum_steps: float):
        """Set the t-th update's numbers, t from 1; it is by the gradients of all steps since the last."""
        lr = self.s.adam_lr * lr_scale * adam_rate(t, self.s)
        for kept, bank in zip(self.lrs, self.banks, strict=True):
            kept.fill_(lr * bank.parameters[0].lr_mul)
        self.count.fill_(grad_accum_steps)

    def step(self):
        """Update all parameters."""
        for bank, lr in zip(self.banks, self.lrs, strict=True):
            bank.wait_for_grads()
            call_compiled(adam_update, bank.master, bank.grad_shard, bank.moments, lr, self.count, self.s)
            bank.publish()


# Part III: Run
# ======================================================================================================
# Training


class TrainLoader:
    """This rank's training micro-batches, made, pinned and sent to the device ahead of use."""

    def __init__(self, s: Hyperparameters, world: World):
        self.s, self.world, self.data = s, world, TrainData(s)
        self.makers = ThreadPoolExecutor(1)

    def check(self):
        """Wait until it is known that the shards feed the whole run; raises UsageError when they do not."""
        self.data.check()

    def host_batches(self, step: int) -> Tensor:
        """This rank's micro-batches of a step, int32 (micro-batches, 4, T), pinned where there is a GPU."""
        count = step_shape(step, self.s).micro_batches // self.world.size
        mine = range(self.world.rank * count, (self.world.rank + 1) * count)
        batches = torch.from_numpy(self.data.micro_batches(step, mine))
        return batches.pin_memory() if self.world.device.type == "cuda" else batches

    def stream(self, step: int, end: int):
        """Yield each step's list of Batch on the device; the next is on its way, two more are being made."""
        made = deque(self.makers.submit(self.host_batches, i) for i in range(step, min(step + 3, end)))
        ready = made.popleft().result().to(self.world.device, non_blocking=True)
        for i in range(step, end):
            if i + 3 < end:
                made.append(self.makers.submit(self.host_batches, i + 3))
            following = made.popleft().result().to(self.world.device, non_blocking=True) if made else None
            yield [Batch(*micro_batch) for micro_batch in ready]
            ready = following


class ValLoader:
    """This rank's share of the validation set."""

    def __init__(self, s: Hyperparameters, world: World):
        self.s, self.world, self.data = s, world, ValData(s)

    def stream(self):
        """Yield this rank's micro-batches, each a Batch on the device."""
        for tokens in self.data.micro_batches(self.world.rank, self.world.size):
            yield document_batch(tokens, self.s.bos, self.world.device)


def document_batch(tokens: np.ndarray | list[int], bos: int, device: torch.device) -> Batch:
    """A Batch of T tokens from T + 1 token ids, in which a document starts at the first and at every BOS."""
    tokens = np.asarray(tokens)
    starts = np.union1d([0], np.flatnonzero(tokens == bos))
    return Batch(*torch.from_numpy(packed(tokens, starts)).to(device))


class Part(NamedTuple):
    """What goes with a micro-batch of a step that processes share; a single one does it around them all."""

    gathers: tuple[str, ...] = ()  # the first: optimizers whose parameters the step before has updated
    updates: tuple[str, ...] = ()  # the last: optimizers whose gradients are reduced and parameters updated


def updating(step: int) -> tuple[str, ...]:
    """The optimizers that update in a step."""
    return ("normuon", "adam") if is_adam_step(step) else ("normuon",)


class Recording(NamedTuple):
    """A micro-batch's work as a CUDA graph, and the Batch that it reads."""

    graph: "torch.cuda.CUDAGraph"
    batch: Batch


class Trainer:
    """The model and its optimizers, and what one step does with them.

    On a GPU a micro-batch is replayed from a graph, one for each variant and part: launched one by one, its
    kernels take the host longer than the GPU. What a graph reads anew stays in place: `inputs` and the
    optimizers' numbers, which each step sets, the Batch of its `Recording`, the parameters and their FP8
    copies; what it writes: `total`, the step's loss so far, the gradients and, where processes share a step,
    also parameters, FP8 copies, masters and moments.
    """

    def __init__(self, s: Hyperparameters, world: World):
        self.s, self.world = s, world
        self.stop = False  # set by SIGTERM, passed on to all ranks with the next loss
        self.model = GPT(s, longest_sequence(s), world.dtype).to(world.device)
        check_registration(self.model)
        self.normuon, self.adam = NorMuon(self.model, s, world), DistAdam(self.model, s, world)
        self.banks = self.normuon.banks + self.adam.banks
        self.total = torch.zeros((), device=world.device)
        kinds = (torch.float32 if type(x) is float else torch.int32 for x in step_inputs(0, s))
        self.inputs = StepInputs(*(torch.zeros((), dtype=kind, device=world.device) for kind in kinds))
        self.recordings: dict[tuple[Variant, Part], Recording] = {}
        self.read_at: dict[nn.Parameter, int] = {}  # when a forward pass of training reads each
        if world.shared:
            for module in self.model.modules():
                module.register_forward_pre_hook(self._before_module)

    def _before_module(self, module: nn.Module, _):
        """Wait for what a module reads, itself or from its lists, and make FP8 copies of it anew."""
        lists = [child for child in module.children() if isinstance(child, nn.ParameterList)]
        for p in itertools.chain(*(owner.parameters(recurse=False) for owner in (module, *lists))):
            p.bank.ready(p)
            if self.model.training:
                self.read_at.setdefault(p, len(self.read_at))

    def banks_of(self, optimizers: tuple[str, ...]) -> list[Bank]:
        """The banks of optimizers by name."""
        return [bank for name in optimizers for bank in getattr(self, name).banks]

    def gather(self, banks: list[Bank]):
        """Start to gather the parameters of banks, chunk by chunk in the order in which they are read."""
        chunks = [(bank, i) for bank in banks for i in range(bank.chunks)]
        last = len(self.read_at)
        chunks.sort(key=lambda chunk: min(self.read_at.get(p, last) for p in chunk[0].members[chunk[1]]))
        for bank, i in chunks:
            bank.all_gather(i)
            bank.stale = False

    def wait(self):
        """Gather what has been updated since it last was, and wait until all parameters have come."""
        self.gather([bank for bank in self.banks if bank.stale])
        for bank in self.banks:
            bank.wait()

    @torch.no_grad()
    def begin_step(self, step: int):
        """Change what the schedules change in the model; parameters are whole where the variant is new."""
        if step and step_variant(step, self.s) != step_variant(step - 1, self.s):
            self.wait()
        begin_step(self.model, step, self.s)

    def _set_inputs(self, inputs: StepInputs):
        """Take a step's inputs: numbers into their tensors, where a graph reads them, choices as they are."""
        pairs = zip(self.inputs, inputs, strict=True)
        self.inputs = StepInputs(*(new if type(new) is bool else kept.fill_(new) for kept, new in pairs))

    def parts(self, step: int) -> list[Part]:
        """The parts of this rank's micro-batches in a step, in their order."""
        parts = [Part()] * (step_shape(step, self.s).micro_batches // self.world.size)
        if self.world.shared:
            parts[0] = Part(gathers=updating(step - 1))
            parts[-1] = parts[-1]._replace(updates=updating(step))
        return parts

    def quantize(self):
        """Make the FP8 copies of all parameters, or renew them."""
        for p in self.model.parameters():
            p.bank.quantize(p)

    def micro_step(self, batch: Batch, part: Part):
        """Add a micro-batch's loss to `total` and its gradients to the parameters'; and do its part."""
        self.gather(self.banks_of(part.gathers))
        for bank in self.banks_of(part.updates):
            bank.require_grad_sync()
        loss = self.model(batch, self.inputs).sum()
        loss.backward()
        self.total += loss.detach()
        for bank in self.banks_of(part.gathers):
            bank.wait()  # for what no module has read
        self.update(part.updates)

    def update(self, optimizers: tuple[str, ...]):
        """Update parameters, while the last gradients of those that come later are still on their way."""
        for bank in self.banks_of(optimizers):
            bank.finish_grad_sync()
        for name in optimizers:
            getattr(self, name).step()

    def record(self):
        """Record every part of each variant; all kernels must have been compiled."""
        self.wait()
        pool, batches = torch.cuda.graph_pool_handle(), {}
        for step in range(self.s.total_steps):
            variant = step_variant(step, self.s)
            if variant not in batches:
                fields = torch.zeros(4, variant.shape.micro_batch_tokens, dtype=torch.int32)
                batches[variant] = Batch(*fields.to(self.world.device))
            for part in self.parts(step):
                if (variant, part) not in self.recordings:
                    self._set_inputs(step_inputs(step, self.s))
                    graph = torch.cuda.CUDAGraph()
                    # The loader's threads go on meanwhile.
                    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                        self.micro_step(batches[variant], part)
                    self.recordings[variant, part] = Recording(graph, batches[variant])

    def train_step(self, step: int, batches: list[Batch], inputs: StepInputs) -> Tensor:
        """One step over this rank's micro-batches.

        Returns, float32 (2,) on the device, the mean loss of the whole step and how many ranks want to stop.
        """
        shape, variant = step_shape(step, self.s), step_variant(step, self.s)
        self.model.train()
        self.total.zero_()
        self._set_inputs(inputs)
        lr_scale = learning_rate_scale(step, self.s)
        self.normuon.set_step(self.s.muon_lr * lr_scale, muon_momentum(step, self.s), shape.micro_batches)
        if is_adam_step(step):
            before = step_shape(step - 1, self.s).micro_batches
            self.adam.set_step(lr_scale, step // 2 + 1, (before + shape.micro_batches) / 2)
        if not self.world.shared:
            self.quantize()
        for batch, part in zip(batches, self.parts(step), strict=True):
            if recording := self.recordings.get((variant, part)):
                for kept, new in zip(recording.batch, batch, strict=True):
                    kept.copy_(new)
                recording.graph.replay()
            else:
                self.micro_step(batch, part)
        if not self.world.shared:
            self.update(updating(step))
        for bank in self.banks:  # as a graph does not say
            bank.stale = self.world.shared and bank in self.banks_of(updating(step))
        result = torch.stack([self.total / shape.tokens, torch.full_like(self.total, self.stop)])
        if self.world.shared:
            dist.all_reduce(result)
        return result

    @torch.no_grad()
    def validate(self, batches, inputs: StepInputs) -> float:
        """Mean loss over the validation tokens, in nats a token."""
        self.model.eval()
        self.wait()
        # Sums of losses and tokens: a rank may have no micro-batch.
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for batch in batches:
            losses = self.model(batch, inputs)
            total += torch.stack([losses.sum(dtype=torch.float64), total.new_full((), len(losses))])
        if self.world.shared:
            dist.all_reduce(total)
        return (total[0] / total[1]).item()

    @torch.no_grad()
    def warm_up(self, train: TrainLoader, val: ValLoader):
        """Compile and record all that the run will use, by throw-away steps and a validation; then rewind."""
        if not self.s.warmup_steps:
            self.quantize()  # with several processes no step does before it has gathered
            return
        state = list(self.model.buffers())
        for bank in self.banks:
            state += [bank.param, bank.master, bank.grad, *bank.moments]
        saved = [tensor.to("cpu", copy=True) for tensor in state]
        count = max(2, self.s.warmup_steps)  # one with Adam's update and one without
        with torch.enable_grad():
            for first in first_steps(self.s).values():
                steps = range(first, min(first + count, self.s.total_steps))
                for step, batches in zip(steps, train.stream(first, steps.stop), strict=True):
                    self.train_step(step, batches, step_inputs(step, self.s))
        self.validate(itertools.islice(val.stream(), 1), step_inputs(0, self.s))
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            with torch.enable_grad():
                self.model.train()
                self.record()
        self.wait()
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
        self.quantize()  # a step gathers, and so renews, only what the step before has updated

    def whole_state(self, step: int):
        """Yield (name, tensor) of all that training goes on from after `step` steps; all ranks must ask.

        A parameter goes by its name, its moments by that and .first and .second, and its gradient by
        .gradient where Adam has left one for its next update. Each tensor is flat, but for parameters and
        buffers.
        """
        yield "rotary.frequencies", self.model.rotary.frequencies
        yield "rotary.scale", self.model.rotary.scale
        for bank in self.banks:
            whole = {"": bank.gather(bank.master)}
            whole[".first"], whole[".second"] = map(bank.gather, bank.moments)
            if bank in self.adam.banks and is_adam_step(step):
                whole[".gradient"] = bank.grad.flatten()[: bank.numel].clone()
                if self.world.shared:
                    dist.all_reduce(whole[".gradient"])
            for suffix, full in whole.items():
                shares = [p.numel() * full.numel() // bank.numel for p in bank.parameters]
                parts = full.split(shares)
                for name, p, part in zip(bank.names, bank.parameters, parts, strict=True):
                    yield name + suffix, part if suffix else part.view(p.shape)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], step: int):
        """The inverse: take what `whole_state` gave, perhaps in a world of another size."""
        self.model.rotary.frequencies.copy_(tensors["rotary.frequencies"])
        self.model.rotary.scale.copy_(tensors["rotary.scale"])
        self.model.rotary.fill()
        for bank in self.banks:
            whole = {"": bank.master, ".first": bank.moments.first, ".second": bank.moments.second}
            pending = bank in self.adam.banks and is_adam_step(step) and self.world.rank == 0
            if pending:  # one rank brings what all had accumulated
                whole[".gradient"] = bank.grad
            for suffix, target in whole.items():
                full = torch.cat([tensors[name + suffix].flatten() for name in bank.names]).to(
                    self.world.device
                )
                if suffix == ".gradient":
                    target.view(-1)[: bank.numel] = full
                else:
                    bank.scatter(full, target)
                if not suffix:
                    bank.param.view(-1)[: bank.numel] = full


# ======================================================================================================
# Log

SEPARATOR = "=" * 100


def seconds_since_launch() -> float:
    """Age of this process in seconds, by the kernel's clock where /proc has it, else since the import."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.perf_counter() - IMPORTED


class Log:
    """The run's log file, which rank 0 writes by lines, and the console: a bar on a terminal, else lines.

    A log that is deleted comes back with all its lines; a console that goes away leaves the run to its log.
    """

    def __init__(self, s: Hyperparameters, world: World):
        self.path, self.file, self.bar = None, None, None
        if world.rank == 0:
            name = f"{time.strftime('%Y-%m-%dT%H-%M-%SZ', time.gmtime())}_{uuid.uuid4().hex[:8]}.txt"
            self.path = Path(s.log_dir) / name
            try:
                self._open()
            except OSError as error:
                raise UsageError(
                    f"--log_dir={s.log_dir} cannot be written ({error.strerror}); give another folder"
                ) from None
            if sys.stdout.isatty():
                self.bar = tqdm(total=s.total_steps, unit="step", dynamic_ncols=True, file=sys.stdout)

    def _open(self):
        """Make the file and its folder, with the lines that it had before it was deleted, if it was."""
        before = self.file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "x+", buffering=1, encoding="utf-8", errors="backslashreplace")
        if before:
            before.seek(0)
            shutil.copyfileobj(before, self.file)
            self.write(f"log: {self.path} was deleted; it is here again")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.file:
            with contextlib.suppress(UsageError, OSError):  # a full disk has been told of already
                if error is not None:
                    self.write(f"stopped: {str(error) or kind.__name__}", show=False)
                self.file.close()
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()

    def write(self, text: str, show: bool = True):
        """A line, or several, for the file and, if shown, for the console."""
        if self.file:
            try:
                if not self.path.exists():
                    self._open()
                self.file.write(text + "\n")
            except OSError as error:
                raise UsageError(
                    f"{self.path}: cannot be written ({error.strerror}); free space or give another --log_dir"
                ) from None
            if show:
                self._show(text)

    def _show(self, text: str = "", step: int | None = None):
        """Show a line on the console, or move its bar to a step."""
        try:
            if step is not None:
                self.bar.update(step - self.bar.n)
            elif self.bar is not None:
                self.bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)
        except OSError as error:
            self.bar = None
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.write(f"the console is gone ({error.strerror}); the run goes on with its log", show=False)

    def step(self, text: str, step: int):
        """The line of a training step, for which a terminal only moves its bar."""
        self.write(text, show=self.bar is None)
        if self.bar is not None:
            self._show(step=step)


def describe_machine(world: World) -> str:
    """Versions, devices, the products' precision and the definitions that run unfused, for the log."""
    gpu = world.device.type == "cuda"
    head = "float32" if not gpu else "bf16 (this chip has no FP8)"
    if in_fp8(world.device, "head"):
        head = "fp8 in training, bf16 in validation"
    blocks = str(world.dtype)[6:]
    if in_fp8(world.device, "blocks"):
        blocks = "q, k, v and MLPs fp8 in training, forward and backward, all else bf16"
    repeats = "deterministic: the same settings give the same bits"
    if gpu:
        repeats = (
            "not deterministic: gradients of embeddings and lambdas are added by atomics in no fixed order"
        )
    lines = [
        f"Python {sys.version}",
        f"PyTorch {torch.__version__} Triton {triton.__version__} CUDA {torch.version.cuda}",
        f"devices: {world.size} x {torch.cuda.get_device_name(world.device) if gpu else 'CPU process'}",
        f"head: {head}",
        f"blocks: {blocks}",
        repeats,
    ]
    if unfused_names := [operator.__name__ for operator in Operator.every if not operator.fusible]:
        lines.append(f"unfused: {', '.join(unfused_names)}")
    if gpu and shutil.which("nvidia-smi"):
        found = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
        # Programs' paths are no one's business.
        lines.append(re.sub(r"\s*\+-+\+\s*\| Processes:.*", "", found, flags=re.DOTALL).rstrip())
    return "\n".join(lines)


def seconds_a_call(call, repeats: int = 0) -> float:
    """Of a call, the device included: the median over 0.1 s, or the mean of so many repeats."""
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return (timer.timeit(repeats) if repeats else timer.blocked_autorange(min_run_time=0.1)).median


def calibrate(s: Hyperparameters, world: World) -> str:
    """How fast this machine is, a line a rank, to tell a slower idea from a slower machine; takes a second.

    The GEMMs are an MLP's first product and the head's, on normal random numbers; all_reduce counts the bytes
    that a ring sends, 2 (ranks - 1) / ranks of the tensor; launch is the host's time to start a small
    operation. Clocks are read under load.
    """
    device, gpu, C, V = world.device, world.device.type == "cuda", s.model_dim, s.padded_vocab_size
    T = step_shape(0, s).micro_batch_tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(world.dtype)

    smi = None
    if gpu and shutil.which("nvidia-smi"):
        query = "--query-gpu=clocks.sm,clocks.mem,power.limit"
        own = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", own]
        smi = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    x, w, out, small = normal(T, C), normal(C, 4 * C), normal(T, 4 * C), normal(1)
    spent = seconds_a_call(lambda: torch.mm(x, w, out=out))
    figures = [f"{str(world.dtype)[6:]}_gemm={8e-12 * T * C**2 / spent:.4g}TFLOP/s"]
    if in_fp8(device, "head"):
        a, b = x.to(torch.float8_e4m3fn), normal(V, C).to(torch.float8_e4m3fn).t()
        kinds = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        one = constant(1.0, device)
        spent = seconds_a_call(lambda: torch._scaled_mm(a, b, one, one, **kinds))
        figures.append(f"fp8_gemm={2e-12 * T * C * V / spent:.4g}TFLOP/s")
    big = torch.ones(2**26 if gpu else 2**23, device=device)
    other = big.clone()
    figures.append(f"copy={2e-9 * big.nbytes / seconds_a_call(lambda: other.copy_(big)):.4g}GB/s")
    if world.size > 1:
        part = other[: len(other) // 4]
        spent = seconds_a_call(lambda: dist.all_reduce(part), repeats=5)
        figures.append(f"all_reduce={2e-9 * (world.size - 1) / world.size * part.nbytes / spent:.4g}GB/s")
    figures.append(f"launch={1e6 * seconds_a_call(lambda: small.add_(1)):.3g}us")
    if smi:
        units = zip(("sm_clock", "memory_clock", "power_limit"), ("MHz", "MHz", "W"), strict=True)
        for (name, unit), value in zip(units, smi.communicate()[0].split(","), strict=False):
            figures.append(f"{name}={value.strip()}{unit}")
    lines = [f"calibration rank {world.rank}: {' '.join(figures)}"]
    if world.size > 1:
        mine, lines = lines[0], [None] * world.size
        dist.all_gather_object(lines, mine)
    return "\n".join(lines)


def final_report(model: GPT) -> str:
    """Peak memory since warm-up and the final lambdas, for the end of the log."""
    if model.embed.is_cuda:
        peaks = torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
    else:  # a CPU has no such allocator: the process's largest resident size stands for both
        peaks = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,) * 2
    lines = [f"peak memory allocated: {peaks[0]} MiB reserved: {peaks[1]} MiB"]
    for i, block in enumerate(model.blocks):
        values = zip(("a", "b", "l0", "l1"), block.lambdas.tolist(), strict=True)
        lines.append(f"layer {i}: " + " ".join(f"{name}={value:.4f}" for name, value in values))
    skips = zip(model.skips, model.skip_gates.tolist(), strict=True)
    last = "".join(f" skip {a}-{b}={gate:.4f}" for (a, b), gate in skips)
    lines.append(f"smear={model.smear_lambda.item():.4f} backout={model.backout_lambda.item():.4f}{last}")
    return "\n".join(lines)


class Timer:
    """The training clock, which stops for validation, and the watch over losses and over the wish to stop.

    A step's time and loss are read once the device has passed it, a few steps later: training never waits for
    them. A wait of over a minute and over 100 times the median step means that the device hangs, as one does
    in a collective of a CUDA graph when another process has gone. The first step has ten minutes.
    """

    LAG = 8  # steps after which a loss is waited for
    PATIENCE, FIRST_PATIENCE = 60.0, 600.0  # s

    def __init__(self, log: Log, total_steps: int, world: World, elapsed: float):
        self.log, self.total_steps, self.world = log, total_steps, world
        self.gpu = world.device.type == "cuda"
        self.before, self.pending = elapsed, deque()  # ms when it last started; steps not yet reported
        self.stop_after = math.inf  # the step after which all ranks stop
        self.last, self.durations = elapsed, deque(maxlen=101)  # ms: the clock at the last step; steps

    def _now(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _train_time(self, now) -> float:
        return self.before + (self.origin.elapsed_time(now) if self.gpu else 1000 * (now - self.origin))

    def _wait(self, mark):
        """Wait until the device has passed a mark; raises TimeoutError when it seems to hang."""
        median = statistics.median(self.durations) / 1000 if self.durations else 0.0
        end = time.monotonic() + (max(self.PATIENCE, 100 * median) if self.durations else self.FIRST_PATIENCE)
        while self.gpu and not mark.query():
            if time.monotonic() > end:
                step = f"step {self.pending[0][0]}" if self.pending else "a step"
                raise TimeoutError(
                    f"{step} does not end, where one takes {median:.3g} s: a GPU or another process hangs;"
                    " start again, with --resume=latest if checkpoints are on"
                )
            time.sleep(2e-4)

    def start(self):
        self.origin = self._now()

    def stop(self) -> float:
        """Wait for the device and report every step that it has passed; returns the training time in ms."""
        now = self._now()
        self.report(0)
        self._wait(now)
        self.before = self._train_time(now)
        return self.before

    def step(self, step: int, result: Tensor):
        """Note that `step` steps are queued, and that the last gives this result of Trainer.train_step."""
        host = torch.empty(2, pin_memory=self.gpu)
        host.copy_(result, non_blocking=True)
        self.pending.append((step, host, self._now()))
        self.report(self.LAG)

    def report(self, lag: int):
        """Log the steps that are done, waiting while more than lag are not; raises UsageError as `check`."""
        while self.pending:
            step, result, mark = self.pending[0]
            if self.gpu and len(self.pending) <= lag and not mark.query():
                return
            self._wait(mark)
            self.pending.popleft()
            ms = self._train_time(mark)
            self.durations.append(ms - self.last)
            self.last = ms
            line = f"step:{step}/{self.total_steps} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms"
            self.log.step(line, step)
            loss, stops = result.tolist()
            if stops and self.stop_after == math.inf:  # all ranks have read this after as many steps more
                self.stop_after = step + (self.LAG if self.world.size > 1 else 0)
            self.check(step, loss)

    def check(self, step: int, loss: float):
        """Raise UsageError when a loss is not finite."""
        if not math.isfinite(loss):
            raise UsageError(
                f"the loss of step {step} is {loss}, not finite; lower the learning rates (log:"
                f" {self.log.path})"
            )


class Profiler:
    """--profile: a Chrome trace of rank 0's steps beside the log."""

    def __init__(self, s: Hyperparameters, world: World, log: Log):
        self.steps, self.log = profiled_steps(s) if log.path else range(0), log
        self.gpu = world.device.type == "cuda"
        self.profiler = None

    def before(self, step: int):
        if self.steps and step == self.steps[0]:
            kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * self.gpu
            self.profiler = torch.profiler.profile(activities=kinds, acc_events=True)
            self.profiler.start()

    def ends(self, step: int) -> bool:
        return self.profiler is not None and step == self.steps[-1]

    def write(self):
        """Once the device has passed the last profiled step: write the trace."""
        self.profiler.stop()
        trace = self.log.path.with_suffix(".trace.json.gz")
        line = f"profile: steps {self.steps[0]} to {self.steps[-1]}, trace {trace}"
        try:
            self.profiler.export_chrome_trace(str(trace))
            self.log.write(f"{line}; read it with: ./run.sh record profile {self.log.path}")
        except (OSError, RuntimeError) as error:
            self.log.write(f"{line} cannot be written ({error}); the run goes on")


# ======================================================================================================
# Checkpoints

# What may differ between a checkpoint's run and the one that goes on from it.
FREE_SETTINGS = {
    *("preset", "train_files", "val_files", "val_tokens", "val_batch_size", "val_loss_every", "warmup_steps"),
    *("log_dir", "save_every", "save_checkpoint", "resume", "profile"),
}


class Saver:
    """Writes a run's checkpoints beside its log, in the background, and keeps the last two that are whole."""

    def __init__(self, log: Log, trainer: Trainer):
        self.log, self.path, self.previous = log, None, None
        self.step, self.stopped_by = None, "SIGTERM"
        self.gpu, self.writer = trainer.world.device.type == "cuda", ThreadPoolExecutor(1)
        self.pending, self.buffers = None, {}
        # Pinned memory takes a second to get, so it is got before the clock starts.
        for name, tensor in trainer.whole_state(trainer.s.save_every):
            self._copy(name, tensor)

    def _copy(self, name: str, tensor: Tensor) -> Tensor | None:
        """A copy in this tensor's host buffer, under way; on rank 0 only."""
        if not self.log.path:
            return None
        if name not in self.buffers:
            self.buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=self.gpu)
        return self.buffers[name].copy_(tensor, non_blocking=True)

    def save(self, trainer: Trainer, step: int, elapsed: float):
        """Take the state after `step` steps and `elapsed` ms and begin to write it; raises as `check`."""
        self.check(wait=True)  # its buffers are about to be written anew
        if trainer.world.shared:  # all wait here for a slow disk, not in a step that would seem to hang
            written = torch.zeros((), device=trainer.world.device)
            dist.all_reduce(written)
            written.item()
        tensors = {name: self._copy(name, tensor) for name, tensor in trainer.whole_state(step)}
        settings = dataclasses.asdict(trainer.s)
        state = {"settings": settings, "step": step, "elapsed": elapsed, "tensors": tensors}
        self.step = step
        if self.log.path:
            copied = torch.cuda.Event() if self.gpu else None
            if copied:
                copied.record()
            self.pending = self.writer.submit(self._write, state, copied)

    def _write(self, state: dict, copied):
        if copied:
            copied.synchronize()
        path = self.log.path.with_suffix(f".step{state['step']}.pt")
        try:
            write_checkpoint(path, state)
        except (OSError, RuntimeError) as error:  # torch.save may turn a full disk into a RuntimeError
            kept = f"{self.path} is whole" if self.path else "there is none before it"
            raise UsageError(
                f"{path}: the checkpoint cannot be written ({error}); free space ({kept})"
            ) from None
        if self.previous:
            self.previous.unlink(missing_ok=True)
        self.previous, self.path = self.path, path

    def check(self, wait: bool = False):
        """Raise UsageError if the last checkpoint could not be written, as far as is known or awaited."""
        if self.pending and (wait or self.pending.done()):
            self.pending.result()
            self.pending = None


def checksum(data: np.ndarray) -> bytes:
    """Four bytes that change with any bit of data, uint8: the CRC-32 of the CRC-32s of its 16 MiB blocks."""
    blocks = [data[i : i + 2**24] for i in range(0, len(data), 2**24)]
    with ThreadPoolExecutor(4) as threads:
        sums = np.array(list(threads.map(zlib.crc32, blocks)), "<u4")
    return zlib.crc32(sums).to_bytes(4, "little")


def write_checkpoint(path: Path, state: dict):
    """Write a file of torch.save and, at its end, the checksum; raises OSError or RuntimeError."""
    temporary = path.with_suffix(".pt.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it since
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            file.write(checksum(np.memmap(temporary, np.uint8, "r")))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError):
        temporary.unlink(missing_ok=True)
        raise


def find_checkpoints(s: Hyperparameters, world: World) -> list[str]:
    """What --resume means, the latest and those before it or one, as rank 0 finds; UsageError if none."""
    found = [s.resume]
    if s.resume == "latest":
        files = filter(Path.is_file, Path(s.log_dir).glob("*.pt"))
        found = [str(path) for path in sorted(files, key=lambda path: -path.stat().st_mtime_ns)]
        if world.size > 1:
            dist.broadcast_object_list(shared := [found], device=world.device)
            found = shared[0]
    if not found:
        raise UsageError(f"--resume=latest: no checkpoint in --log_dir={s.log_dir}; start without --resume")
    return found


def is_whole(path: str) -> bool:
    """Whether a file ends in the checksum of all before it, as `write_checkpoint` leaves it."""
    if os.path.getsize(path) <= 4:
        return False
    data = np.memmap(path, np.uint8, "r")
    return checksum(data[:-4]) == data[-4:].tobytes()


def read_checkpoint(path: str, *older: str) -> dict:
    """A checkpoint: settings, step, elapsed (ms) and tensors, on the CPU.

    Raises UsageError for any other file, and for a damaged one, naming the first older one that is whole.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{path}: there is no such file; give --resume=latest or a checkpoint's path")
    if not is_whole(path):
        other = next(filter(is_whole, older), None)
        advice = f"give --resume={other}" if other else "give another one"
        raise UsageError(f"{path}: damaged, cut short or no checkpoint of this script; {advice}")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def other_version(path: str, reason: Exception | str) -> UsageError:
    """The refusal of a checkpoint whose settings or tensors are another script's."""
    reason = str(reason).splitlines()[0]
    return UsageError(f"{path}: made by another version of this script ({reason}); use it with that one")


def check_tensors(path: str, found, wanted):
    """Raise UsageError unless these (name, tensor) have the names, shapes and dtypes of those wanted."""
    kinds = [{name: (tuple(t.shape), t.dtype) for name, t in tensors} for tensors in (found, wanted)]
    for name in sorted(kinds[0].keys() | kinds[1].keys()):
        theirs, ours = (kind.get(name, ("missing",)) for kind in kinds)
        both = f"{name}: {' '.join(map(str, theirs))}, here {' '.join(map(str, ours))}"
        if theirs[0] != ours[0]:
            raise other_version(path, both)
        if theirs != ours:
            raise UsageError(f"{path}: written on another kind of device ({both}); go on there")


def resume(trainer: Trainer, path: str, *older: str) -> tuple[int, float]:
    """Put a checkpoint's state into the trainer; returns its step and the training time in ms so far.

    The world may be of another size. Raises UsageError where settings or tensors differ, naming the first.
    """
    state, settings = read_checkpoint(path, *older), dataclasses.asdict(trainer.s)
    for name in sorted(settings.keys() | state["settings"].keys()):
        if name not in settings or name not in state["settings"]:
            raise other_version(path, f"--{name}")
        theirs, ours = state["settings"][name], settings[name]
        if theirs != ours and name not in FREE_SETTINGS:
            raise UsageError(
                f"{path}: made with --{name}={theirs}, and this run has {ours}; give that, or another one"
            )
    step, tensors = state["step"], state["tensors"]
    if step > trainer.s.total_steps:
        raise UsageError(f"{path}: holds step {step} of a run of {trainer.s.total_steps}; give another one")
    check_tensors(path, tensors.items(), trainer.whole_state(step))
    trainer.load(tensors, step)
    return step, state["elapsed"]


def load_model(path: str) -> GPT:
    """The trained model of a checkpoint for evaluation, on this machine's GPU, else its CPU.

    Its `inputs` are those of the last validation or, of an unfinished run, of the last step; its `bos` is the
    token that begins a document; it takes as many tokens as model.rotary.position has. Documents end to end
    in one array of token ids go in as

        model = load_model("logs/....pt")
        batch = document_batch(tokens, model.bos, model.embed.device)
        losses = model(batch, model.inputs)         # nats of each token but the first, float32 (T - 1,)
        logits = model.logits(batch, model.inputs)  # float32 (T - 1, padded vocabulary)

    Raises UsageError for any other file, and for one that is not as it was written.
    """
    state = read_checkpoint(path)
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if world.device.type == "cuda":
        run_operators_on_gpu()
    try:
        s = Hyperparameters(**state["settings"])
        model = GPT(s, longest_sequence(s), world.dtype).to(world.device).eval().requires_grad_(False)
        for name, p in model.named_parameters():
            normuon = p.optimizer == "normuon"  # hidden matrices' masters are float32
            value = state["tensors"][name].to(world.device, world.dtype if normuon else p.dtype)
            check_tensors(path, [(name, value.to(p.dtype))], [(name, p)])
            p.data = value
        theirs = {name.removesuffix(".first") for name in state["tensors"] if name.endswith(".first")}
        if unknown := sorted(theirs - dict(model.named_parameters()).keys()):
            raise other_version(path, f"{unknown[0]}: missing here")
        for name in ("frequencies", "scale"):
            getattr(model.rotary, name).copy_(state["tensors"][f"rotary.{name}"])
    except (TypeError, KeyError) as error:  # a setting is unknown, or a tensor missing
        raise other_version(path, error) from None
    model.rotary.fill()
    finished = state["step"] == s.total_steps
    model.inputs, model.bos = step_inputs(state["step"] - (not finished), s), s.bos
    # A recorded gradient means training, and so FP8, to the fused versions.
    for name in ("trunk", "forward", "logits"):
        setattr(model, name, torch.no_grad()(getattr(model, name)))
    return model


# ======================================================================================================
# Main


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """SIGTERM came, or SIGHUP from a terminal that closes; the text names it and any checkpoint."""


def stop_once(number, _):
    """Handle Ctrl-C and, until checkpoints are on, the others: the first ends the run, no other is heard."""
    for each in STOPS:  # torchrun hands them on once more
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(signal.Signals(number).name)


def save_first(trainer: Trainer, saver: Saver):
    """From now on SIGTERM and SIGHUP save before they end the run, which then takes two Ctrl-C to break."""

    def stop_after_step(number, _):
        if not trainer.stop and signal.getsignal(signal.SIGINT) is stop_once:
            signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, stop_once))
        trainer.stop, saver.stopped_by = True, signal.Signals(number).name

    for each in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) is stop_once:
            signal.signal(each, stop_after_step)


@contextlib.contextmanager
def hear_signals():
    """Let a Ctrl-C that has cost this run another rank first be raised in here, before the log is ended."""
    try:
        yield
    except RuntimeError:
        time.sleep(0.1)
        raise


def run(s: Hyperparameters, world: World):
    """The whole run: set up, warm up and rewind, then train and validate, then report."""
    train, val = TrainLoader(s, world), ValLoader(s, world)
    with Log(s, world) as log, hear_signals():
        log.write(
            f"{Path(__file__).read_text(encoding='utf-8')}\n{SEPARATOR}\n{describe_machine(world)}",
            show=False,
        )
        log.write(f"arguments: {shlex.join(sys.argv[1:])}\n{describe_settings(s)}", show=False)
        log.write(f"log: {log.path}")
        imported = seconds_since_launch()
        trainer, start, elapsed = Trainer(s, world), 0, 0.0
        if s.resume:
            found = find_checkpoints(s, world)
            start, elapsed = resume(trainer, *found)
            log.write(f"resumed: step {start} of {found[0]}")
            if s.profile and profiled_steps(s)[0] < start:
                raise UsageError(
                    f"--profile={s.profile}: the run goes on from step {start}; give later steps"
                )
        train.check()
        built = seconds_since_launch()
        trainer.warm_up(train, val)
        warm = seconds_since_launch()
        log.write(calibrate(s, world), show=False)
        ready = seconds_since_launch()
        parts = f"import {imported:.1f}, build {built - imported:.1f}, warm-up {warm - built:.1f}"
        parts += f", calibration {ready - warm:.1f}"
        log.write(f"start: {ready:.1f} s from launch to step {start} ({parts})")
        log.write(SEPARATOR, show=False)

        timer, saver = Timer(log, s.total_steps, world, elapsed), None
        if s.save_every or s.save_checkpoint:
            saver = Saver(log, trainer)
            save_first(trainer, saver)
        try:
            train_all(trainer, start, train, val, timer, saver)
        finally:
            trainer.recordings.clear()  # graphs that hold collectives go before the process group
        log.write(final_report(trainer.model))


def train_all(
    trainer: Trainer, start: int, train: TrainLoader, val: ValLoader, timer: Timer, saver: Saver | None
):
    """Every step from start on, with validations and checkpoints; raises Terminated when told to stop."""
    s, log, stream = trainer.s, timer.log, train.stream(start, trainer.s.total_steps)
    profiler = Profiler(s, trainer.world, log)
    timer.start()
    for step in range(start, s.total_steps + 1):
        last = step == s.total_steps
        inputs = step_inputs(step, s)
        if not last:
            trainer.begin_step(step)
        if last or (s.val_loss_every and step % s.val_loss_every == 0):
            ms = timer.stop()
            loss = trainer.validate(val.stream(), inputs)
            times = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
            log.write(f"step:{step}/{s.total_steps} val_loss:{loss:.4f} {times}")
            timer.check(step, loss)
            timer.start()
        if last:
            break
        profiler.before(step)
        timer.step(step + 1, trainer.train_step(step, next(stream), inputs))
        if profiler.ends(step):
            timer.stop()
            profiler.write()
            timer.start()
        stopping = step + 1 >= timer.stop_after
        if saver:
            saver.check()
            if stopping or (s.save_every and (step + 1) % s.save_every == 0):
                ms = timer.stop()
                timer.start()  # at once: a save is on the clock
                saver.save(trainer, step + 1, ms)
        if stopping:
            saver.check(wait=True)
            raise Terminated(f"{saver.stopped_by} after step {step + 1}; go on with --resume={saver.path}")
    if saver:
        if s.save_checkpoint and saver.step != s.total_steps:
            saver.save(trainer, s.total_steps, ms)
        saver.check(wait=True)
        if saver.path:
            log.write(f"checkpoint: {saver.path}")


def main() -> int:
    """Parse the flags and run; returns 0. What stops it ends in a line and an exit code, 2 for a mistake."""
    launch, alike = Launch(), False
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        for each in STOPS:
            if signal.getsignal(each) != signal.SIG_IGN:  # as nohup and a shell's background have them
                signal.signal(each, stop_once)
        launch = read_environment()
        settings = parse_settings(sys.argv[1:])
        run(settings, connect(settings, launch))
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except UsageError as error:
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code, alike = "stopped by Ctrl-C", 130, True
    except Terminated as error:
        message, code, alike = f"stopped by {error}", 143, True
    except OSError as error:
        message, code = str(error), 1
    except (RuntimeError, MemoryError) as error:
        code, gpu = 1, isinstance(error, torch.OutOfMemoryError)
        if gpu or isinstance(error, MemoryError) or "allocate memory" in str(error):
            message = f"the {'GPU' if gpu else 'machine'} is out of memory; raise --micro_batches"
        elif dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            message = (
                "lost the other processes; the one that ended first says why, and --resume=latest goes on"
            )
        else:
            raise
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if launch.rank and not alike:
        time.sleep(5)  # rank 0, if it stops alike, says so, and torchrun then ends this process in its sleep
    with contextlib.suppress(OSError):  # nobody may be there to read it
        if not (launch.rank and alike):
            message = " ".join(message.splitlines())
            rank = f"rank {launch.rank}: " if launch.rank else ""
            print(f"{NAME}: {rank}{message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    # An orderly end would wait for shards still to be read, and for ranks that wait in a collective.
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
