"""Train a GPT-2-class language model to 3.28 validation loss on FineWeb, fast: model, optimizers, loader and run in one file.

    torchrun --standalone --nproc_per_node=8 train_gpt.py [--name=value ...]    # any GPU count that divides --micro_batches
    python train_gpt.py --preset=sample                                         # a small model on a CPU
    python train_gpt.py --help                                                  # every setting

Measured on one NVIDIA H200 (torch 2.11, Triton 3.6): the record's 262,144-token steps took 320 ms and 15.6 GiB, with step 0 after 19
to 21 s from warm caches, 69 s from empty ones; a version before took 211 ms on two and 107 ms on four. README.md says on what data.

The rooms, in order: settings, kernels, model, optimizers, data, schedules, training, log, checkpoints, main.
A room uses only rooms above it.
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
import subprocess
import sys
import time
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from tqdm import tqdm
from triton.tools.tensor_descriptor import TensorDescriptor

IMPORTED = time.perf_counter()

# ======================================================================================================================
# Settings


class UsageError(Exception):
    """A mistake of the user's: its text is one line that names the file or flag and what to do."""


@dataclass(frozen=True)
class Layer:
    """One layer slot. Parallel paths read the same normed input, share the slot's lambdas, and their outputs are added."""

    window: str = "short"  # "short" or "long": how far attention looks back
    value: int = -1  # index of the value embedding mixed into v, -1 for none
    attention: int = 1  # parallel attention paths
    mlp: int = 1  # parallel MLP paths


# The layer table. A slot without paths runs nothing at all. --layers, --skips and --backout change it for one run.
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


def setting(default, description: str):
    """A dataclass field with its line for --help."""
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run; each is a flag --name=value. The defaults are the record's."""

    preset: str = setting("record", "start from these settings: record or sample")
    # data
    train_files: str = setting("data/fineweb10B/fineweb_train_*.bin", "training shards, read once in the order of their names")
    val_files: str = setting("data/fineweb10B/fineweb_val_*.bin", "validation shards, of which the first is read")
    val_tokens: int = setting(10_485_760, "validation tokens")
    train_batch_size: int = setting(262_144, "tokens a step")
    train_max_seq_len: int = setting(2048, "tokens of a document that training reads at most")
    micro_batches: int = setting(8, "packed sequences that each batch is split into; more need less memory")
    val_batch_size: int = setting(2_097_152, "validation tokens a batch")
    val_loss_every: int = setting(250, "steps between validations; 0 validates at the end only")
    # model
    vocab_size: int = setting(50_257, "token ids; the last one is BOS, which begins each document")
    model_dim: int = setting(768, "width of the residual stream")
    num_heads: int = setting(6, "attention heads a path")
    layers: str = setting("", "changes to the layer table, as 5.mlp=0,0.attention=2,3.window=long,9.value=-1")
    skips: str = setting("4-7", "long skips, from-to, as 4-7,3-8")
    backout: int = setting(8, "layer whose output is taken back before the head; -1 for none")
    # schedule
    num_scheduled_iterations: int = setting(2185, "steps of the learning rate and window schedules")
    num_extension_iterations: int = setting(40, "steps after those, at the final learning rate and the longest window")
    cooldown_frac: float = setting(0.5, "share of the scheduled steps over which the learning rate falls")
    final_lr_scale: float = setting(0.1, "learning rate at the end, as a share of its peak")
    windows: str = setting("1/3,3/7,5/11", "short/long windows in blocks of 128 tokens, each for an equal part of the scheduled steps")
    extension_window: str = setting("6/13", "windows of the extension")
    final_window: str = setting("6/20", "windows of the last validation")
    # optimizers
    muon_lr: float = setting(0.03, "NorMuon learning rate, for hidden and gate matrices")
    muon_weight_decay: float = setting(1.2, "NorMuon cautious weight decay")
    muon_beta2: float = setting(0.95, "NorMuon second-moment decay")
    momentum_low: float = setting(0.85, "NorMuon momentum at the first and the last step")
    momentum_high: float = setting(0.95, "NorMuon momentum in between")
    momentum_warmup: int = setting(300, "steps over which the momentum rises")
    momentum_cooldown: int = setting(50, "last steps over which it falls back")
    mlp_in_lr_mul: float = setting(2.0, "learning rate factor of the MLPs' input matrices")
    adam_lr: float = setting(0.008, "DistAdam learning rate, for embeddings, head and scalars")
    adam_beta1: float = setting(0.65, "DistAdam first-moment decay")
    adam_beta2: float = setting(0.95, "DistAdam second-moment decay")
    embed_lr_mul: float = setting(75.0, "learning rate factor of token and value embeddings")
    head_lr_mul: float = setting(1.0, "learning rate factor of the head")
    scalar_lr_mul: float = setting(5.0, "learning rate factor of the scalars")
    # run
    seed: int = setting(1337, "seed of the initial parameters")
    warmup_steps: int = setting(2, "throw-away steps before the clock, which compile everything; 0 for none")
    log_dir: str = setting("logs", "folder of the logs and checkpoints")
    save_every: int = setting(0, "steps between checkpoints, each in place of the one before; 0 for none")
    save_checkpoint: bool = setting(False, "save a checkpoint at the end")
    resume: str = setting("", "go on from this checkpoint, or from the latest in the folder of the logs")
    profile: str = setting("", "profile these steps, FROM:TO, as 20:22, into a trace beside the log")

    @property
    def total_steps(self) -> int:
        return self.num_scheduled_iterations + self.num_extension_iterations

    @property
    def train_tokens(self) -> int:
        """Tokens of a training micro-batch."""
        return self.train_batch_size // self.micro_batches

    @property
    def val_tokens_each(self) -> int:
        """Tokens of a validation micro-batch, but for the last, which may be shorter."""
        return self.val_batch_size // self.micro_batches

    @property
    def classes(self) -> int:
        """Rows of the head and of each table: the vocabulary padded to a multiple of 128."""
        return math.ceil(self.vocab_size / 128) * 128

    @property
    def bos(self) -> int:
        return self.vocab_size - 1


PRESETS = {
    "record": {},
    "sample": dict(
        train_files="data/sample/sample_train_*.bin", val_files="data/sample/sample_val_*.bin", vocab_size=257,
        model_dim=128, num_heads=4, train_batch_size=4096, train_max_seq_len=512, val_tokens=32_768, val_batch_size=8192,
        val_loss_every=25, num_scheduled_iterations=105, num_extension_iterations=5,
    ),
}  # fmt: skip


def parse_settings(arguments: list[str]) -> Hyperparameters:
    """Settings from the command line: defaults, then the preset, then the flags.

    Raises UsageError for an unknown flag (naming the closest one) and for a value of the wrong type; --help exits.
    """
    fields = dataclasses.fields(Hyperparameters)
    parser = argparse.ArgumentParser(
        usage="train_gpt.py [--name=value ...]", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=200),
    )  # fmt: skip
    parser.error = _refuse_flag
    for f in fields:
        default = str(f.default).replace("%", "%%") or "(none)"
        parser.add_argument(f"--{f.name}", type=true_or_false if f.type is bool else f.type, metavar=f.type.__name__.upper(), help=f"{f.metadata['help']} [{default}]")
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
    """Raise UsageError, naming the flag, when a value is out of range or does not fit another."""
    optional = ("seed", "val_loss_every", "num_extension_iterations", "momentum_warmup", "momentum_cooldown", "warmup_steps", "save_every")
    for f in dataclasses.fields(s):
        value = getattr(s, f.name)
        if f.type is float and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"--{f.name}={value}: give a finite number of at least 0")
        if f.type is int and f.name != "backout" and value < (f.name not in optional):
            raise UsageError(f"--{f.name}={value}: give a number of at least {int(f.name not in optional)}")
    for name in ("muon_beta2", "momentum_low", "momentum_high", "adam_beta1", "adam_beta2"):
        if getattr(s, name) >= 1:
            raise UsageError(f"--{name}={getattr(s, name)}: give a number below 1")
    if s.cooldown_frac > 1:
        raise UsageError(f"--cooldown_frac={s.cooldown_frac}: give a share of the scheduled steps, 0 to 1")
    if s.train_batch_size % s.micro_batches:
        raise UsageError(f"--train_batch_size={s.train_batch_size} is not a multiple of --micro_batches={s.micro_batches}; change one of them")
    if s.val_batch_size < s.micro_batches:
        raise UsageError(f"--val_batch_size={s.val_batch_size} has no token for each of --micro_batches={s.micro_batches}; raise it")
    if s.model_dim % (4 * s.num_heads) or s.model_dim < 12:
        raise UsageError(f"--model_dim={s.model_dim}: give a multiple of 4 x --num_heads={s.num_heads}, at least 12")
    if not 2 <= s.vocab_size <= 65_536:
        raise UsageError(f"--vocab_size={s.vocab_size}: token ids are uint16, so give 2 to 65536")
    for table in (layer_table, skip_table, window_table):
        table(s)
    for name in ("extension_window", "final_window"):
        parse_window(s, name)
    profiled_steps(s)
    if s.backout != -1 and not (0 <= s.backout < len(LAYERS)):
        raise UsageError(f"--backout={s.backout}: give a layer from 0 to {len(LAYERS) - 1}, or -1 for none")


def layer_table(s: Hyperparameters) -> tuple[Layer, ...]:
    """The layer table with the changes of --layers; raises UsageError for a change that it does not understand."""
    table = list(LAYERS)
    for change in filter(None, s.layers.split(",")):
        with contextlib.suppress(ValueError):
            place, value = change.split("=")
            index, column = place.split(".")
            value = value if column == "window" else int(value)
            legal = {"window": value in ("short", "long"), "value": column == "value" and -1 <= value < 16}
            if int(index) in range(len(table)) and legal.get(column, column in ("attention", "mlp") and 0 <= value <= 16):
                table[int(index)] = dataclasses.replace(table[int(index)], **{column: value})
                continue
        raise UsageError(f"--layers: cannot read {change!r}; write LAYER.COLUMN=VALUE with a layer from 0 to {len(LAYERS) - 1} and"
                         " window=short|long, value=INDEX (0 to 15, -1 for none), attention=PATHS or mlp=PATHS (0 to 16)")  # fmt: skip
    if not any(layer.attention or layer.mlp for layer in table):
        raise UsageError("--layers leaves no layer with a path; keep at least one")
    return tuple(table)


def skip_table(s: Hyperparameters) -> tuple[tuple[int, int], ...]:
    """The long skips as (from, to) pairs; raises UsageError when one does not run forward between two layers."""
    skips = []
    for text in filter(None, s.skips.split(",")):
        source, _, target = text.partition("-")
        if not (source.isdecimal() and target.isdecimal() and int(source) < int(target) < len(LAYERS)):
            raise UsageError(f"--skips: cannot read {text!r}; write FROM-TO, as 4-7, with FROM below TO below {len(LAYERS)}")
        if not (layer_table(s)[int(target)].attention or layer_table(s)[int(target)].mlp):
            raise UsageError(f"--skips: {text!r} ends at layer {target}, which has no path and so runs nothing; end it elsewhere")
        skips.append((int(source), int(target)))
    return tuple(skips)


def parse_window(s: Hyperparameters, name: str, text: str | None = None) -> tuple[int, int]:
    """(short, long) windows in tokens from a pair such as 3/7, in blocks; raises UsageError."""
    text = getattr(s, name) if text is None else text
    short, _, long = text.partition("/")
    if not (short.isdecimal() and long.isdecimal() and 1 <= int(long) <= 10_000 and int(short) <= 10_000):
        raise UsageError(f"--{name}: cannot read {text!r}; write SHORT/LONG in blocks of 128 tokens, as 3/7")
    return 128 * int(short), 128 * int(long)


def window_table(s: Hyperparameters) -> list[tuple[int, int]]:
    """The scheduled (short, long) windows, in tokens."""
    return [parse_window(s, "windows", text) for text in s.windows.split(",")]


def profiled_steps(s: Hyperparameters) -> range:
    """The steps of --profile, none by default; raises UsageError."""
    start, _, end = s.profile.partition(":")
    if s.profile and not (start.isdecimal() and end.isdecimal() and int(start) < int(end) <= s.total_steps):
        raise UsageError(f"--profile: cannot read {s.profile!r}; write FROM:TO, as 20:22, with FROM below TO, at most {s.total_steps}")
    return range(int(start), int(end)) if s.profile else range(0)


def describe_settings(s: Hyperparameters) -> str:
    """The effective settings and the layer table, a line each, for the log."""
    lines = [f"{f.name}={getattr(s, f.name)}" for f in dataclasses.fields(s)]
    for i, layer in enumerate(layer_table(s)):
        window = layer.window if layer.attention else "-"
        value = f"ve{layer.value}" if layer.attention and layer.value >= 0 else "-"
        lines.append(f"layer {i}: window={window} value={value} attention={layer.attention} mlp={layer.mlp}")
    return "\n".join(lines)


@dataclass(frozen=True)
class World:
    """Where this process stands: its rank, the number of processes and the device that it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    fp8: bool = False  # whether the head trains in FP8, and on Hopper most forward products of the blocks

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and products: bf16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def connect(s: Hyperparameters) -> World:
    """Join the processes that torchrun started, if it did; raises UsageError where they fit neither the GPUs nor the settings."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    gpus, local_size = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and local_size > gpus:
        raise UsageError(f"--nproc_per_node={local_size}, but this machine has {gpus} GPUs; start at most {gpus} processes")
    if s.micro_batches % size:
        raise UsageError(f"--micro_batches={s.micro_batches} cannot be dealt to {size} processes; give a multiple of {size}")
    head_dim = s.model_dim // s.num_heads
    if gpus and (head_dim < 16 or head_dim & (head_dim - 1) or s.train_tokens % 16):
        raise UsageError(f"--num_heads={s.num_heads} makes heads {head_dim} wide and --micro_batches={s.micro_batches} packs {s.train_tokens}"
                         " tokens; a GPU needs a power of two of at least 16, and a multiple of 16")  # fmt: skip
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if gpus else "gloo", device_id=device if gpus else None)
    return World(rank, size, device, fp8=bool(gpus) and torch.cuda.get_device_capability(device) >= (8, 9))


# ======================================================================================================================
# Kernels: each a plain reference, which is the definition, and its Triton twin, behind one function.


@functools.cache
def compiled(function):
    """A function of tensors as one graph for each set of shapes; the graph is made once a process."""
    return torch.compile(function, dynamic=False)


def fused(function, x: Tensor, *rest):
    """Call a function of tensors, compiled where x is on a GPU; numbers among its arguments must not change during a run."""
    return (compiled(function) if x.is_cuda else function)(x, *rest)


def on_hopper(x: Tensor) -> bool:
    """Whether a tensor is on an H100, an H200 or their like."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


EPS = torch.finfo(torch.float32).eps  # of every norm


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without a weight (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


WEIGHT_SCALE = 2.0**-9  # of every matrix in e4m3, so for entries up to 0.875


def to_e4m3(x: Tensor, factor: float) -> Tensor:
    """x times a factor, in e4m3; what is beyond its range becomes its largest number."""
    return (x.float() * factor).clamp(-448, 448).to(torch.float8_e4m3fn)


def transposed(x: Tensor) -> Tensor:
    """The transposes of matrices x (..., rows, columns), contiguous. FP8 goes as bytes, and apart from to_e4m3: see _e5m2_pair."""
    return x.mT.contiguous()


def normed_scale(x: Tensor) -> float:
    """The scale of normed x (T, width) in e4m3: the power of two with which the root of the width, norm's bound, is at most 448."""
    return 2.0 ** math.ceil(math.log2(x.size(1) ** 0.5 / 448))


def gradient(p: nn.Parameter) -> Tensor:
    """The tensor, zeros at first, in which the gradient of a parameter gathers."""
    if p.grad is None:
        p.grad = torch.zeros_like(p, dtype=p.grad_dtype)
    return p.grad


@functools.cache
def constant(value: float, device: torch.device) -> Tensor:
    """A float32 scalar tensor, made once."""
    return torch.full((), value, device=device)


def mix_reference(x: Tensor, x0: Tensor, lambdas: Tensor) -> tuple[Tensor, Tensor]:
    """The first two of lambdas times x and x0 (T, width), added; and that, normed."""
    x = lambdas[0] * x + lambdas[1] * x0
    return x, norm(x)


@triton.jit
def _mix_kernel(
    x_ptr, x0_ptr, lambdas_ptr, mixed_ptr, normed_ptr, copy_ptr, T, W,
    SCALE: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Without an x0, only the norm."""
    rows, columns = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at, inside = rows[:, None] * W + columns[None, :], (rows < T)[:, None] & (columns < W)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if x0_ptr is not None:
        x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(lambdas_ptr) * x + tl.load(lambdas_ptr + 1) * x0
        tl.store(mixed_ptr + at, x.to(mixed_ptr.dtype.element_ty), mask=inside)
    x *= tl.rsqrt(tl.sum(x * x, 1) / W + EPS)[:, None]
    if copy_ptr is not None:
        copy = tl.clamp(x * (1 / SCALE), -448.0, 448.0, tl.PropagateNan.ALL).to(copy_ptr.dtype.element_ty)
        tl.store(copy_ptr + at, copy, mask=inside)
        x = copy.to(tl.float32) * SCALE  # what the products read, so their gradients are exact, and fewer bits take matrix units less power
    tl.store(normed_ptr + at, x.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mix_backward_kernel(
    x_ptr, x0_ptr, lambdas_ptr, dmixed_ptr, dnormed_ptr, dx_ptr, dx0_ptr, dlambdas_ptr, T, W, PROGRAMS,
    ADD: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of x; that of x0, added to what is there or in its place; and that of lambdas, added to what is there."""
    columns = tl.arange(0, BLOCK)
    inside = columns < W
    sum_a, sum_b = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for row in range(tl.program_id(0), T, PROGRAMS):
        at = row * W.to(tl.int64) + columns
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mixed = x
        if x0_ptr is not None:
            a, b = tl.load(lambdas_ptr), tl.load(lambdas_ptr + 1)
            x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
            mixed = a * x + b * x0
        dnormed = tl.load(dnormed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dmixed = tl.load(dmixed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            before = tl.load(dx0_ptr + at, mask=inside, other=0.0)
        factor = tl.rsqrt(tl.sum(mixed * mixed, 0) / W + EPS)
        along = tl.sum(dnormed * mixed, 0) * factor * factor / W
        dmixed += (dnormed - mixed * along) * factor
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
        tl.atomic_add(dlambdas_ptr, sum_a, sem="relaxed")
        tl.atomic_add(dlambdas_ptr + 1, sum_b, sem="relaxed")


class _Mix(torch.autograd.Function):
    """The Triton twin of `mix_reference`; without an x0 that of norm, which hands x on, so that one kernel has both its gradients.

    All layers add to one gradient of x0, which the first of them hands on.
    """

    @staticmethod
    def forward(ctx, x, x0, lambdas, layer, shared, fp8):
        (T, W), normed, copy = x.shape, torch.empty_like(x), torch.empty_like(x, dtype=torch.float8_e4m3fn) if fp8 else None
        mixed, row = (x, None) if x0 is None else (torch.empty_like(x), lambdas[layer])
        _mix_kernel[(triton.cdiv(T, 4),)](
            x, x0, row, mixed, normed, copy, T, W, SCALE=normed_scale(x), EPS=EPS, ROWS=4, BLOCK=triton.next_power_of_2(W), num_warps=4
        )
        ctx.save_for_backward(x, x0)
        ctx.lambdas, ctx.layer, ctx.shared, ctx.first = lambdas, layer, shared, "first" not in shared
        shared["first"] = True
        ctx.set_materialize_grads(False)  # the copy has none
        return mixed, normed, copy

    @staticmethod
    def backward(ctx, dmixed, dnormed, _):
        x, x0 = ctx.saved_tensors
        (T, W), dx, count, row, drow, dx0 = x.shape, torch.empty_like(x), min(4096, len(x)), None, None, None
        add = "gradient" in ctx.shared
        if x0 is not None:
            row, drow = ctx.lambdas[ctx.layer], gradient(ctx.lambdas)[ctx.layer]
            if not add:
                ctx.shared["gradient"] = torch.empty_like(x0)
            dx0 = ctx.shared["gradient"]
        _mix_backward_kernel[(count,)](
            x, x0, row, dmixed.contiguous(), dnormed.contiguous(), dx, dx0, drow, T, W, count,
            ADD=add, EPS=EPS, BLOCK=triton.next_power_of_2(W), num_warps=1,
        )  # fmt: skip
        return dx, ctx.shared.pop("gradient") if x0 is not None and ctx.first else None, None, None, None, None


def mix(x: Tensor, x0: Tensor, lambdas: Tensor, layer: int, shared: dict, fp8: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The residual stream x (T, width) mixed with x0 by the first two of a layer's row of lambdas (layers, 4), float32; and that, normed.

    With fp8, that in e4m3 too, whose values are then those of the second. shared: one dict, empty at first, for all layers that
    mix this x0 in.
    """
    return _Mix.apply(x, x0, lambdas, layer, shared, fp8) if x.is_cuda else (*mix_reference(x, x0, lambdas[layer]), None)


def renorm(x: Tensor, fp8: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The residual stream x (T, width), to go on with; that, normed; and with fp8 that in e4m3, as in `mix`."""
    return _Mix.apply(x, None, None, 0, {}, fp8) if x.is_cuda else (x, norm(x), None)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (T, heads, head_dim), the halves of a head being the pairs' two parts."""
    x1, x2 = x.chunk(2, dim=-1)
    cos, sin = cos[: len(x), None], sin[: len(x), None]
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def heads_reference(qkv: Tensor, value: Tensor | None, l0: Tensor, l1: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of attention from qkv (T, 3, heads, head_dim): q and k normed and turned, v mixed by l0 and l1, float32 scalar tensors."""
    q, k, v = qkv.unbind(1)
    v = l0 * v if value is None else l0 * v + l1 * value.view_as(v)
    return rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v


@triton.jit
def _store_head(
    x, heads, raw, value, cos, sin, lambdas_ptr, factor_ptr, row, column, T,
    EPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    low, high = x.reshape(BM, 2, D // 2).permute(0, 2, 1).split()
    if column < 2 * H * D:
        factor = tl.rsqrt(tl.sum(low * low + high * high, 1) / D + EPS)
        rows = row + tl.arange(0, BM)
        tl.store(factor_ptr + column // D * T + rows, factor, mask=rows < T)
        low, high = low * factor[:, None], high * factor[:, None]
        low, high = low * cos + high * sin, high * cos - low * sin
    else:
        within = column - 2 * H * D
        raw.store([row, within], low.to(raw.dtype))
        raw.store([row, within + D // 2], high.to(raw.dtype))
        low, high = low * tl.load(lambdas_ptr + 2), high * tl.load(lambdas_ptr + 2)
        if value is not None:
            low += tl.load(lambdas_ptr + 3) * value.load([row, within]).to(tl.float32)
            high += tl.load(lambdas_ptr + 3) * value.load([row, within + D // 2]).to(tl.float32)
    heads.store([row, column], low.to(heads.dtype))
    heads.store([row, column + D // 2], high.to(heads.dtype))


@triton.jit
def _heads_kernel(
    x, weight, heads, raw, value, cos_tiles, sin_tiles, lambdas_ptr, factor_ptr, T, K, PROGRAMS,
    SCALE: tl.constexpr, EPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """q, k and v of attention, SCALE x weight^T, normed and turned or mixed before they are stored; v also as it was.

    factor: what the norm scaled q and k by. A tile is two heads wide, so that the product reads less;
    what an odd last one has beyond v is neither read nor stored.
    """
    across = tl.cdiv(3 * H, 2)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BM) * across, PROGRAMS, flatten=True):  # the next tile loads while this one is stored
        row, column = tile // across * BM, tile % across * 2 * D
        y = tl.zeros([BM, 2 * D], tl.float32)
        for k in range(0, K, BK):
            y = tl.dot(x.load([row, k]), tl.trans(weight.load([column, k])), y, input_precision="ieee")
        cos, sin = tl.zeros([BM, D // 2], cos_tiles.dtype), tl.zeros([BM, D // 2], cos_tiles.dtype)
        if column < 2 * H * D:
            cos, sin = cos_tiles.load([row, 0]), sin_tiles.load([row, 0])
        left, right = (y * SCALE).reshape(BM, 2, D).permute(0, 2, 1).split()
        _store_head(left, heads, raw, value, cos, sin, lambdas_ptr, factor_ptr, row, column, T, EPS, H, D, BM)
        _store_head(right, heads, raw, value, cos, sin, lambdas_ptr, factor_ptr, row, column + D, T, EPS, H, D, BM)


HOPPER_HEADS, SMALL_HEADS = (128, 128, 8, 3), (64, 64, 4, 2)  # rows, depth in bytes, warps, stages


def programs(x: Tensor) -> int:
    """How many persistent programs fill the device of x: one a multiprocessor; a few in Triton's interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3


def heads_forward(
    x: Tensor, x8: Tensor | None, weight: Tensor, weight8: Tensor | None, value: Tensor | None, lambdas: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The Triton twin of a product, by e4m3 copies where there are any, and `heads_reference`.

    x: normed, (T, width). weight: (3 width, width). lambdas: float32 (4,), of which the last two mix v with value (T, width). cos, sin:
    (at least T, head_dim / 2). Returns q, k and v, (T, 3, heads, head_dim); for the backward pass v unmixed, (T, width), and the
    factors of the norm of q and k, float32 (2, heads, T).
    """
    (T, W), D = x.shape, 2 * cos.size(1)
    heads, raw, factors = x.new_empty(T, 3, W // D, D), torch.empty_like(x), x.new_empty(2, W // D, T, dtype=torch.float32)
    a, b, scale = (x, weight, 1.0) if weight8 is None else (x8, weight8, normed_scale(x) * WEIGHT_SCALE)
    BM, depth, warps, stages = HOPPER_HEADS if on_hopper(x) else SMALL_HEADS
    BK = depth // a.element_size()
    stored = [t if t is None else TensorDescriptor.from_tensor(t, [BM, D // 2]) for t in (heads.view(T, 3 * W), raw, value, cos, sin)]
    _heads_kernel[(programs(x),)](
        TensorDescriptor.from_tensor(a, [BM, BK]), TensorDescriptor.from_tensor(b, [2 * D, BK]), *stored, lambdas, factors, T, W, programs(x),
        SCALE=scale, EPS=EPS, H=W // D, D=D, BM=BM, BK=BK, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return heads, raw, factors


def attention_reference(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, first: Tensor, scale: Tensor) -> Tensor:
    """Attention of q, k and v (T, heads, head_dim), in which query i sees the keys first[i] to i, times the sigmoid of gate (T, heads)."""
    at = torch.arange(q.size(0), device=q.device)
    visible = (first[:, None] <= at) & (at <= at[:, None])
    q, k, v = (t.transpose(0, 1)[None] for t in (q * scale, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=1.0)[0].transpose(0, 1)
    return out * torch.sigmoid(gate)[:, :, None]


@triton.jit
def _mask(scores, low, key, high, needed):
    """Scores, but in a tile where a mask is needed, minus infinity unless low <= key <= high.

    All three count from the tile's start: from the sequence's, compilers make 64-bit numbers of them, which takes thrice as long.
    """
    if needed:
        scores = tl.where((low <= key) & (key <= high), scores, -float("inf"))
    return scores


@triton.jit
def _load_tile(ptr, start, column, T, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a (T, width) matrix, zero beyond it."""
    rows = tl.arange(0, ROWS)[:, None]
    return tl.load(ptr + start.to(tl.int64) * width + column + (rows * width + tl.arange(0, COLUMNS)[None, :]), mask=start + rows < T, other=0.0)


@triton.jit
def _store_tile(ptr, start, column, T, width, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    at = ptr + start.to(tl.int64) * width + column + (rows * width + tl.arange(0, COLUMNS)[None, :])
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=start + rows < T)


@triton.jit
def _attention_forward_kernel(
    kv_tiles, q_tiles, out_tiles, gate_ptr, lse_ptr, first_ptr, scale_ptr, T,
    H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A gate g only scales a row's probabilities, so what the backward pass reads is the log-sum-exp less log2(g)."""
    head = tl.program_id(1)
    start = tl.program_id(0) * BM
    rows = start + tl.arange(0, BM)
    inside = rows < T
    scale = tl.load(scale_ptr) * 1.4426950408889634  # log2(e), for exp2
    first = tl.load(first_ptr + rows, mask=inside, other=T)
    low = tl.load(first_ptr + start) // BN * BN
    full = tl.load(first_ptr + tl.minimum(start + BM, T) - 1)  # from this key on, all rows see a key before them
    gate = tl.load(gate_ptr + rows * H + head, mask=inside, other=0.0).to(tl.float32)
    q = q_tiles.load([start, head * D])  # last of all: loads by descriptor wait
    top = tl.full([BM], -1e30, tl.float32)  # finite: a row may see nothing in its tile's first keys
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, D], tl.float32)
    key = tl.arange(0, BN)[None, :]
    for n in range(low, tl.minimum(start + BM, T), BN):
        k = kv_tiles.load([n, (H + head) * D])
        v = kv_tiles.load([n, (2 * H + head) * D])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = _mask(scores, (first - n)[:, None], key, (rows - n)[:, None], (n < full) | (n + BN > start))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = new_top
    total *= 1.0 + tl.exp(-gate)  # over the gate, a sigmoid
    out_tiles.store([start, head * D], (out / total[:, None]).to(out_tiles.dtype))
    tl.store(lse_ptr + head * T + rows, top + tl.log2(total), mask=inside)


@triton.jit
def _store_before_norm(ptr, start, column, T, width, dx, x, factor, cos_ptr, sin_ptr, ROWS: tl.constexpr, D: tl.constexpr):
    """Store the gradient of rows, given that of x, the same normed by a factor and turned."""
    cos = _load_tile(cos_ptr, start, 0, T, D // 2, ROWS, D // 2).to(tl.float32)
    sin = _load_tile(sin_ptr, start, 0, T, D // 2, ROWS, D // 2).to(tl.float32)
    along = tl.sum(dx * x, 1) / D  # a norm's gradient has no part along its input
    dx = (dx - x * along[:, None]) * factor[:, None]
    low, high = dx.reshape(ROWS, 2, D // 2).permute(0, 2, 1).split()
    _store_tile(ptr, start, column, T, width, low * cos - high * sin, ROWS, D // 2)
    _store_tile(ptr, start, column + D // 2, T, width, low * sin + high * cos, ROWS, D // 2)


@triton.jit
def _attention_query_kernel(
    kv_tiles, heads_ptr, out_ptr, dout_ptr, cos_ptr, sin_ptr, dqkv_ptr,
    factor_ptr, gate_ptr, lse_ptr, delta_ptr, dgate_ptr, first_ptr, scale_ptr, T,
    H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradients of q before its norm and of gate, and delta = sum(out * dout) over the gate, which the gradients of k and v need."""
    head = tl.program_id(1)
    start = tl.program_id(0) * BM
    rows = start + tl.arange(0, BM)
    inside = rows < T
    scale = tl.load(scale_ptr)
    first = tl.load(first_ptr + rows, mask=inside, other=T)
    lse = tl.load(lse_ptr + head * T + rows, mask=inside, other=float("inf"))
    low = tl.load(first_ptr + start) // BN * BN
    full = tl.load(first_ptr + tl.minimum(start + BM, T) - 1)
    q = _load_tile(heads_ptr, start, head * D, T, 3 * H * D, BM, D)
    dout = _load_tile(dout_ptr, start, head * D, T, H * D, BM, D)
    out = _load_tile(out_ptr, start, head * D, T, H * D, BM, D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    gate = tl.sigmoid(tl.load(gate_ptr + rows * H + head, mask=inside, other=0.0).to(tl.float32))
    tl.store(dgate_ptr + rows * H + head, (delta * (1.0 - gate)).to(dgate_ptr.dtype.element_ty), mask=inside)
    delta = delta / tl.maximum(gate, 1e-30)  # where the gate is less, out is zero
    tl.store(delta_ptr + head * T + rows, delta, mask=inside)
    dq = tl.zeros([BM, D], tl.float32)
    key = tl.arange(0, BN)[None, :]
    for n in range(low, tl.minimum(start + BM, T), BN):
        k = kv_tiles.load([n, (H + head) * D])
        v = kv_tiles.load([n, (2 * H + head) * D])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = _mask(scores, (first - n)[:, None], key, (rows - n)[:, None], (n < full) | (n + BN > start))
        p = tl.exp2(scores * (scale * 1.4426950408889634) - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    factor = tl.load(factor_ptr + head * T + rows, mask=inside, other=0.0)
    q = _load_tile(heads_ptr, start, head * D, T, 3 * H * D, BM, D)  # again: the loop has no registers to keep it in
    _store_before_norm(dqkv_ptr, start, head * D, T, 3 * H * D, dq * scale, q.to(tl.float32), factor, cos_ptr, sin_ptr, BM, D)


@triton.jit
def _attention_key_kernel(
    q_tiles, dout_tiles, kv_tiles, heads_ptr, raw_ptr, value_ptr, dvalue_ptr, cos_ptr, sin_ptr, dqkv_ptr,
    factor_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, lambdas_ptr, dlambdas_ptr, scale_ptr, T,
    H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradients of k before its norm, of v before it is mixed, and of value; and that of lambdas, added to what is there.

    A tile of keys meets every query that sees one of them.
    """
    head = tl.program_id(1)
    start = tl.program_id(0) * BN
    scale = tl.load(scale_ptr)
    end = tl.load(last_ptr + tl.minimum(start + BN, T) - 1) + 1
    full = tl.load(last_ptr + start) + 1  # up to this query, all see every key of the tile that is before them
    k = kv_tiles.load([start, (H + head) * D])
    v = kv_tiles.load([start, (2 * H + head) * D])
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    key = tl.arange(0, BN)[:, None]
    for m in range(start // BM * BM, end, BM):
        rows = m + tl.arange(0, BM)
        inside = rows < T
        q = q_tiles.load([m, head * D])
        dout = dout_tiles.load([m, head * D])
        lse = tl.load(lse_ptr + head * T + rows, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + head * T + rows, mask=inside, other=0.0)
        first = tl.load(first_ptr + rows, mask=inside, other=0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        scores = _mask(scores, (first - start)[None, :], key, (rows - start)[None, :], (m + BM > full) | (m < start + BN))
        p = tl.exp2(scores * (scale * 1.4426950408889634) - lse[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    # What the end reads is asked for before it is needed, at most two tiles at a time: more do not fit in the registers.
    keys = start + tl.arange(0, BN)
    raw = _load_tile(raw_ptr, start, head * D, T, H * D, BN, D)
    if value_ptr is not None:
        value = _load_tile(value_ptr, start, head * D, T, H * D, BN, D)
    l0, l1 = tl.load(lambdas_ptr + 2), tl.load(lambdas_ptr + 3)
    factor = tl.load(factor_ptr + (H + head) * T + keys, mask=keys < T, other=0.0)
    _store_tile(dqkv_ptr, start, (2 * H + head) * D, T, 3 * H * D, dv * l0, BN, D)
    tl.atomic_add(dlambdas_ptr + 2, tl.sum(dv * raw.to(tl.float32)), sem="relaxed")
    if value_ptr is not None:
        _store_tile(dvalue_ptr, start, head * D, T, H * D, dv * l1, BN, D)
        tl.atomic_add(dlambdas_ptr + 3, tl.sum(dv * value.to(tl.float32)), sem="relaxed")
    k = _load_tile(heads_ptr, start, (H + head) * D, T, 3 * H * D, BN, D)  # again: the loop has no registers to keep it in
    _store_before_norm(dqkv_ptr, start, (H + head) * D, T, 3 * H * D, dk * scale, k.to(tl.float32), factor, cos_ptr, sin_ptr, BN, D)


# Tile sizes by kernel: (queries, keys, warps, stages). Fixed, so that no start pays for tuning; found on an H200.
HOPPER_TILES = {"forward": (64, 64, 4, 3), "query": (64, 32, 4, 3), "key": (64, 64, 4, 2)}
SMALL_TILES = {"forward": (64, 32, 4, 2), "query": (64, 32, 4, 2), "key": (32, 64, 4, 2)}  # for chips with less shared memory


def _attention_launch(kernel, name: str, others: tuple[Tensor, ...], own: tuple[Tensor, ...], *rest: Tensor | None):
    """Run one attention kernel over (tiles of queries, or in the key kernel of keys) x heads.

    others: what its loop reads, tiles of the other kind, of which the first is q, k and v, (T, 3, heads, head_dim); own: tiles of its
    own kind. Both go through tensor descriptors. rest: its other tensors; several tiles read at once go by pointers, for such
    loads do not wait for each other.
    """
    T, _, H, D = others[0].shape
    BM, BN, warps, stages = (HOPPER_TILES if on_hopper(others[0]) else SMALL_TILES)[name]
    rows, columns = (BN, BM) if name == "key" else (BM, BN)
    groups = ((others, columns), (own, rows))
    tiles = [TensorDescriptor.from_tensor(t.flatten(1), [size, D]) for tensors, size in groups for t in tensors]
    kernel[triton.cdiv(T, rows), H](*tiles, *rest, T, H=H, D=D, BM=BM, BN=BN, num_warps=warps, num_stages=stages)


def attention_forward(heads: Tensor, gate: Tensor, first: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The Triton twin of `attention_reference`, in the manner of FlashAttention (arXiv 2205.14135), for q, k and v in one (T, 3, heads, head_dim).

    Returns the output and, for the backward pass, the base-2 log-sum-exp of each row's scores over its gate, float32 (heads, T).
    """
    T, _, H, D = heads.shape
    out, lse = heads.new_empty(T, H, D), heads.new_empty(H, T, dtype=torch.float32)
    _attention_launch(_attention_forward_kernel, "forward", (heads,), (heads, out), gate, lse, first, scale)
    return out, lse


def attention_backward(
    dout: Tensor, out: Tensor, lse: Tensor, heads: Tensor, raw: Tensor, value: Tensor | None, factors: Tensor, gate: Tensor,
    lambdas: Tensor, dlambdas: Tensor, cos: Tensor, sin: Tensor, first: Tensor, last: Tensor, scale: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of what `heads_forward` made heads (T, 3, heads, head_dim) of, of value, if there is one, and of gate.

    That of lambdas (4,) is added to dlambdas. last: int32 (T); key j is seen by the queries j to last[j].
    """
    dqkv, dgate, delta = torch.empty_like(heads), torch.empty_like(gate), torch.empty_like(lse)
    dvalue = None if value is None else torch.empty_like(value)
    _attention_launch(_attention_query_kernel, "query", (heads,), (), heads, out, dout, cos, sin, dqkv, factors, gate, lse, delta, dgate, first, scale)
    _attention_launch(_attention_key_kernel, "key", (heads, dout), (heads,), heads, raw, value, dvalue, cos, sin, dqkv,
                      factors, lse, delta, first, last, lambdas, dlambdas, scale)  # fmt: skip
    return dqkv, dvalue, dgate


class _Attention(torch.autograd.Function):
    """`attention` on a GPU, added to x in place. Gradients of its weights are added straight into theirs."""

    @staticmethod
    def forward(ctx, x, normed, copy, qkvo, gate, qkvo8, lambdas, layer, value, rotary, visible):
        (T, W), (cos, sin, scale), (first, _) = x.shape, rotary, visible
        gates = F.linear(normed[:, : gate.size(1)], gate)
        weight, weight8, read = (t if t is None else t.view(4 * W, W)[: 3 * W] for t in (qkvo, *(qkvo8 or (None, qkvo))))
        heads, raw, factors = heads_forward(normed, copy, weight, weight8, value, lambdas[layer], cos, sin)
        out, lse = attention_forward(heads, gates, first, scale)
        ctx.save_for_backward(normed, value, gates, heads, raw, factors, out, lse)
        ctx.rest = qkvo, read, gate, lambdas, layer, rotary, visible
        ctx.mark_dirty(x)
        return x.addmm_(out.view(T, W), qkvo.view(4, W, W)[3].t())

    @staticmethod
    def backward(ctx, dx):
        normed, value, gates, heads, raw, factors, out, lse = ctx.saved_tensors
        qkvo, read, gate, lambdas, layer, (cos, sin, scale), (first, last) = ctx.rest
        (T, W), channels, dx = dx.shape, gate.size(1), dx.contiguous()
        dweight = gradient(qkvo).view(4 * W, W)
        dweight[3 * W :].addmm_(dx.t(), out.view(T, W))
        dout = (dx @ qkvo.view(4, W, W)[3]).view_as(out)
        dqkv, dvalue, dgates = attention_backward(
            dout, out, lse, heads, raw, value, factors, gates, lambdas[layer], gradient(lambdas)[layer], cos, sin, first, last, scale
        )
        dqkv = dqkv.view(T, 3 * W)
        dweight[: 3 * W].addmm_(dqkv.t(), normed)
        gradient(gate).addmm_(dgates.t(), normed[:, :channels])
        dnormed = dqkv @ read
        dnormed[:, :channels].addmm_(dgates, gate)
        return dx, dnormed, None, None, None, None, None, None, dvalue, None, None


def attention(
    x: Tensor, normed: Tensor, copy: Tensor | None, qkvo: Tensor, gate: Tensor, qkvo8: tuple[Tensor, Tensor] | None, lambdas: Tensor, layer: int,
    value: Tensor | None, rotary: tuple[Tensor, Tensor, Tensor], visible: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """The residual stream x (T, width), plus one attention path over what is normed of it (T, width). On a GPU x itself is changed.

    Attention over packed documents, each row of a head times a gate. qkvo: (width, 4 width), the row-major view of Q, K, V and O,
    each output x input. gate: (heads, 12), which gives one sigmoid gate a head. copy: normed in e4m3, or None. qkvo8: qkvo in e4m3
    with its values in normed's dtype, or None. The last two of a layer's row of lambdas (layers, 4), float32, mix v with value,
    rows of a value embedding (T, width; value residual, arXiv 2410.17897), if there is one. rotary: cos, sin and scale of
    Rotary. visible: first and last, int32 (T); query i sees the keys first[i] to i, and key j is seen by the queries j to
    last[j]; neither may decrease, so that a tile's bounds are those of its ends, and windows and documents of any length cost
    no new compilation.
    """
    if x.is_cuda:
        return _Attention.apply(x, normed, copy, qkvo, gate, qkvo8, lambdas, layer, value, rotary, visible)
    (T, W), (cos, sin, scale), (_, _, l0, l1) = x.shape, rotary, lambdas[layer].unbind()
    weights = qkvo.view(4, W, W)
    qkv = F.linear(normed, weights[:3].flatten(0, 1)).view(T, 3, len(gate), -1)
    gates = F.linear(normed[:, : gate.size(1)], gate)
    y = attention_reference(*heads_reference(qkv, value, l0, l1, cos, sin), gates, visible[0], scale)
    return x + F.linear(y.reshape(T, W), weights[3])


def relu_squared(x: Tensor) -> Tensor:
    """ReLU^2 (arXiv 2109.08668)."""
    return torch.relu(x).square()


def relu_squared_(x: Tensor) -> Tensor:
    """`relu_squared` in place, where no gradient is recorded: the hidden units of a validation batch are large."""
    return x.copy_(relu_squared(x))


def relu_squared_backward(dout: Tensor, squares: Tensor) -> Tensor:
    """The gradient of what ReLU^2 made squares of."""
    return (dout * (2 * squares.float().sqrt())).to(dout.dtype)


@triton.jit
def _store_squares(x, out, row, column, SCALE: tl.constexpr):
    x = tl.maximum(x * SCALE, 0.0)
    out.store([row, column], tl.minimum(x * x, 448.0).to(out.dtype))  # the largest e4m3


@triton.jit
def _store_gradient(x, squares, out, wide, row, column):
    squares = squares.to(tl.float32)
    wide.store([row, column], squares.to(wide.dtype))
    out.store([row, column], (x * (2.0 * tl.sqrt(squares))).to(out.dtype))


@triton.jit
def _mlp_kernel(a, b, out, hidden, wide, T, N, K, PROGRAMS, SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """out (T, N) = relu(SCALE a b^T)^2, in e4m3 as a (T, K) and b (N, K) are.

    Given such a hidden (T, N), out is a b times the slope there, twice the root of hidden, for b (K, N); and wide is hidden in their dtype.
    """
    across = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(T, BM) * across, PROGRAMS, flatten=True):  # the next tile loads while this one is stored
        row, column = tile // across * BM, tile % across * BN
        x = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            factor = tl.trans(b.load([column, k])) if hidden is None else b.load([k, column])
            x = tl.dot(a.load([row, k]), factor, x, input_precision="ieee")
        # By halves, one after the other: so they are stored by way of half the shared memory.
        left, right = x.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        if hidden is None:
            _store_squares(left, out, row, column, SCALE)
            _store_squares(right, out, row, column + BN // 2, SCALE)
        else:
            low, high = hidden.load([row, column]).reshape(BM, 2, BN // 2).permute(0, 2, 1).split()  # one load, since each waits
            _store_gradient(left, low, out, wide, row, column)
            _store_gradient(right, high, out, wide, row, column + BN // 2)


MLP_TILE = (128, 256, 128, 8, 3)  # rows, columns, depth in bytes, warps, stages: what fits an H100's shared memory and registers


def _mlp_launch(a: Tensor, b: Tensor, out: Tensor, hidden: Tensor | None = None, wide: Tensor | None = None, scale: float = 1.0):
    """Run `_mlp_kernel`."""
    (T, K), N = a.shape, out.size(1)
    BM, BN, BK, warps, stages = MLP_TILE
    BK //= a.element_size()
    tiles = [t if t is None else TensorDescriptor.from_tensor(t, [BM, width]) for t, width in ((out, BN // 2), (hidden, BN), (wide, BN // 2))]
    _mlp_kernel[(programs(a),)](
        TensorDescriptor.from_tensor(a, [BM, BK]), TensorDescriptor.from_tensor(b, [BN, BK] if hidden is None else [BK, BN]), *tiles,
        T, N, K, programs(a), SCALE=scale, BM=BM, BN=BN, BK=BK, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def mlp_hidden(x8: Tensor, in8: Tensor, scale: float) -> Tensor:
    """Hidden units relu(scale x8 in8^T)^2 (T, hidden), of x8 (T, width) and in8 (hidden, width), all in e4m3."""
    hidden = x8.new_empty(len(x8), len(in8))
    _mlp_launch(x8, in8, hidden, scale=scale)
    return hidden


def mlp_hidden_backward(dy: Tensor, w_out: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of what ReLU^2 made hidden of, given dy (T, width), that of hidden w_out^T; and hidden in dy's dtype."""
    dhidden, wide = torch.empty_like(hidden, dtype=dy.dtype), torch.empty_like(hidden, dtype=dy.dtype)
    _mlp_launch(dy, w_out, dhidden, hidden, wide)
    return dhidden, wide


class _MLP(torch.autograd.Function):
    """`mlp` on a GPU. Gradients of its weights are added straight into theirs."""

    @staticmethod
    def forward(ctx, x, normed, copy, w_in, w_out, in8, out8):
        ctx.weights = w_in, w_out, *((w_in, w_out) if in8 is None else (in8[1], out8[1]))
        if in8 is None:
            hidden = fused(relu_squared_, normed @ w_in)
            y = F.linear(hidden, w_out)
        else:
            hidden = mlp_hidden(copy, in8[0], normed_scale(x) * WEIGHT_SCALE)
            scales = constant(1.0, x.device), constant(WEIGHT_SCALE, x.device)
            y = torch._scaled_mm(hidden, out8[0].t(), *scales, out_dtype=x.dtype, use_fast_accum=True)
        ctx.save_for_backward(normed, hidden)
        return x + y

    @staticmethod
    def backward(ctx, dx):
        (normed, hidden), (w_in, w_out, in_read, out_read), dx = ctx.saved_tensors, ctx.weights, dx.contiguous()
        if hidden.dtype == dx.dtype:
            dhidden = fused(relu_squared_backward, dx @ w_out, hidden)
        else:
            dhidden, hidden = mlp_hidden_backward(dx, out_read, hidden)
        gradient(w_out).addmm_(dx.t(), hidden)
        gradient(w_in).addmm_(normed.t(), dhidden)
        return dx, dhidden @ in_read.t(), None, None, None, None, None


def mlp(x: Tensor, normed: Tensor, copy: Tensor | None, w_in: Tensor, w_out: Tensor, in8=None, out8=None) -> Tensor:
    """The residual stream x (T, width), plus one MLP path over what is normed of it: relu(normed w_in)^2 w_out^T.

    Both weights (width, hidden). copy: normed in e4m3, or None. in8, out8: in e4m3 the transposed w_in and w_out, each with
    its values in normed's dtype, not transposed; or None. With copies, hidden units are kept in e4m3 alone: that is what w_out
    multiplies, and what its gradient and ReLU^2's slope are taken of.
    """
    if x.is_cuda:
        return _MLP.apply(x, normed, copy, w_in, w_out, in8, out8)
    return x + F.linear(relu_squared(normed @ w_in), w_out)


SOFTCAP, SOFTCAP_SLOPE = 30.0, 7.5  # logits are 30 * sigmoid(z / 7.5) = 15 * (1 + tanh(z / 15))
TANH_CAP, TANH_SLOPE = SOFTCAP / 2 / math.log(2), 0.5 / SOFTCAP_SLOPE  # the same in base 2: TANH_CAP * (1 + tanh(TANH_SLOPE * z))
GRAD_SCALE = 1 / 448  # of the FP8 gradient of z, whose values lie within -1 and 1


def softcap(z: Tensor) -> Tensor:
    """Logits, float32, of head outputs z of any shape: bounded (arXiv 2408.00118)."""
    return SOFTCAP * torch.sigmoid(z.float() / SOFTCAP_SLOPE)


def loss_reference(z: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row of head outputs z (T, classes), softcapped, in float32: (T,)."""
    return F.cross_entropy(softcap(z), targets.long(), reduction="none")


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """tanh of float32 x; unless exact, to 2^-11 in one instruction, where three bound the loss kernels."""
    if EXACT:
        return 2 * tl.sigmoid(2 * x) - 1
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _loss_kernel(
    z_ptr, target_ptr, loss_ptr, lse_ptr, V, CAP: tl.constexpr, SLOPE: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Loss and base-2 log-sum-exp of one row. In base 2 logits are CAP (1 + tanh(SLOPE z)), so 2 CAP stands in for the largest."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * V + at, mask=at < V, other=0.0).to(tl.float32)
        total += tl.where(at < V, tl.exp2(CAP * _tanh(SLOPE * z, EXACT) - CAP), 0.0)
    lse = tl.log2(tl.sum(total, 0)) + 2 * CAP
    z = tl.load(z_ptr + row * V + tl.load(target_ptr + row)).to(tl.float32)
    tl.store(loss_ptr + row, (lse - CAP - CAP * _tanh(SLOPE * z, EXACT)) * 0.6931471805599453)  # ln(2)
    tl.store(lse_ptr + row, lse)


@triton.jit
def _e5m2_pair(low, high):
    """The bits of two numbers in e5m2, as the upper bytes of a uint32's halves: float16's upper halves, rounded to nearest even.

    By hand, since ptxas of Triton 3.6 and 3.7.1 miscompiles, or never ends on, bytes taken from converted FP8.
    """
    pair = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.uint32, is_pure=True, pack=1)
    return pair + 0x7F007F + ((pair >> 8) & 0x10001)


@triton.jit
def _e5m2_bytes(pair):
    """The low ones and the high ones of such pairs, four columns in as many instructions."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 a, b; prmt.b32 a, $2, $3, 0x7351; prmt.b32 b, $4, $5, 0x7351; prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; }",
        "=r,=r,r,r,r,r", [pair], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _loss_gradient(
    z_ptr, target_ptr, lse_ptr, dloss_ptr, rows, columns, T, V, GAIN: tl.constexpr, CAP: tl.constexpr, SLOPE: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """The gradient of z at rows x columns, float32, where GAIN stands for the softcap's slope at 0; and what of it is inside."""
    inside = (rows[:, None] < T) & (columns[None, :] < V)
    z = tl.load(z_ptr + rows[:, None] * V + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    base = CAP - tl.load(lse_ptr + rows, mask=rows < T, other=0.0)
    target = tl.load(target_ptr + rows, mask=rows < T, other=0)
    dloss = tl.load(dloss_ptr + rows, mask=rows < T, other=0.0) * GAIN
    tanh = _tanh(SLOPE * z, EXACT)
    p = tl.exp2(CAP * tanh + base[:, None])
    p = tl.where(columns.to(tl.int32)[None, :] == target[:, None], p - 1.0, p)
    return p * (1.0 - tanh * tanh) * dloss[:, None], inside


@triton.jit
def _loss_backward_kernel(
    z_ptr, target_ptr, lse_ptr, dloss_ptr, dz_ptr, words_ptr, T, V, QUADS, GAIN: tl.constexpr,
    CAP: tl.constexpr, SLOPE: tl.constexpr, FP8: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of z for 4 BM rows, in dz's dtype; or in the bits of e5m2, and its transpose in words of four rows."""
    quads = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    columns = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    before = tl.zeros([BM, BN], tl.uint32)
    for half in tl.static_range(2):
        rows = 4 * quads + 2 * half
        at = rows[:, None] * V + columns[None, :]
        low, low_inside = _loss_gradient(z_ptr, target_ptr, lse_ptr, dloss_ptr, rows, columns, T, V, GAIN, CAP, SLOPE, not FP8)
        high, high_inside = _loss_gradient(z_ptr, target_ptr, lse_ptr, dloss_ptr, rows + 1, columns, T, V, GAIN, CAP, SLOPE, not FP8)
        if FP8:
            pair = _e5m2_pair(low, high)
            words = tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7531;", "=r,r,r", [before, pair], dtype=tl.uint32, is_pure=True, pack=1)
            before = pair
            low, high = _e5m2_bytes(pair)
        tl.store(dz_ptr + at, low.to(dz_ptr.dtype.element_ty), mask=low_inside)
        tl.store(dz_ptr + at + V, high.to(dz_ptr.dtype.element_ty), mask=high_inside)
    if FP8:
        at = columns[:, None] * QUADS + quads[None, :]
        tl.store(words_ptr + at, tl.trans(words), mask=(columns[:, None] < V) & (quads[None, :] < QUADS))


def loss_forward(z: Tensor, targets: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """The Triton twin of `loss_reference`: loss and base-2 log-sum-exp of each row, float32 (T,); unless exact, tanh is to 2^-11."""
    T, V = z.shape
    loss, lse = z.new_empty(T, dtype=torch.float32), z.new_empty(T, dtype=torch.float32)
    _loss_kernel[(T,)](z, targets, loss, lse, V, CAP=TANH_CAP, SLOPE=TANH_SLOPE, EXACT=exact, BLOCK=2048, num_warps=4)
    return loss, lse


def loss_backward(z: Tensor, targets: Tensor, lse: Tensor, dloss: Tensor, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient of z (T, classes), given that of each row's loss, in z's dtype; or in e5m2, divided by GRAD_SCALE, and its transpose.

    lse is that of `loss_forward`, exact but for e5m2. For e5m2, T must be a multiple of 4.
    """
    T, V = z.shape
    dz = torch.empty_like(z, dtype=torch.float8_e5m2 if fp8 else z.dtype)
    dzt = dz.new_empty(V, T) if fp8 else None
    out, words = (dz.view(torch.uint8), dzt.view(torch.int32)) if fp8 else (dz, None)
    _loss_backward_kernel[triton.cdiv(V, 128), triton.cdiv(T, 64)](
        z, targets, lse, dloss, out, words, T, V, T // 4, GAIN=SOFTCAP / 2 * TANH_SLOPE * (1 / GRAD_SCALE if fp8 else 1),
        CAP=TANH_CAP, SLOPE=TANH_SLOPE, FP8=fp8, BM=16, BN=128, num_warps=4,
    )  # fmt: skip
    return dz, dzt


class _HeadLoss(torch.autograd.Function):
    """The head's product and its loss on a GPU. In FP8 the gradients contract the FP8 copies too."""

    @staticmethod
    def forward(ctx, x, weight, targets, copies):
        ctx.fp8 = copies is not None
        if ctx.fp8:
            x8, w8, w8t = copies
            scales = [constant(scale, x.device) for scale in (normed_scale(x), WEIGHT_SCALE, GRAD_SCALE)]
            z = torch._scaled_mm(x8, w8.t(), scales[0], scales[1], out_dtype=torch.bfloat16, use_fast_accum=True)
            operands = (x8, w8t, *scales)
        else:
            z = x @ weight.t()
            operands = (x, weight)
        loss, lse = loss_forward(z, targets, exact=not ctx.fp8)
        ctx.z = z  # not a saved tensor: the largest of all, it goes before the products of the backward pass
        ctx.save_for_backward(targets, lse, *operands)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        targets, lse, *operands = ctx.saved_tensors
        dz, dzt = loss_backward(ctx.z, targets, lse, dloss.contiguous(), ctx.fp8)
        ctx.z = None
        if not ctx.fp8:
            x, weight = operands
            return dz @ weight, (dz.t() @ x).float(), None, None
        x8, w8t, x_scale, w_scale, z_scale = operands
        x8t = fused(transposed, x8.view(torch.uint8)).view(x8.dtype)  # FP8 products want both operands contiguous along the sum
        dx = torch._scaled_mm(dz, w8t.t(), z_scale, w_scale, out_dtype=torch.bfloat16)
        dw = torch._scaled_mm(dzt, x8t.t(), z_scale, x_scale, out_dtype=torch.float32)
        return dx, dw, None, None


def head_loss(x: Tensor, weight: Tensor, targets: Tensor, copies: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
    """Loss of each token, float32 (T,), for normed activations x (T, width), head weight (classes, width), targets int32 (T,).

    On a GPU the gradient of the weight comes out in float32. Given e4m3 copies of x, of the weight and of its
    transpose, the products are e4m3 x e4m3 forward, e5m2 x e4m3 back, and the softcap is approximate.
    """
    return _HeadLoss.apply(x, weight, targets, copies) if x.is_cuda else loss_reference(x @ weight.t(), targets)


@triton.jit
def _scatter_add_kernel(table_ptr, tokens_ptr, rows_ptr, C, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    x = tl.load(rows_ptr + row * C + columns, mask=columns < C, other=0.0).to(tl.float32)
    tl.atomic_add(table_ptr + token * C + columns, x, mask=columns < C, sem="relaxed")


def scatter_add(table: Tensor, tokens: Tensor, rows: Tensor):
    """The Triton twin of `table.index_add_(0, tokens, rows)`, for a float32 table (classes, width) and rows (T, width) of any dtype."""
    T, C = rows.shape
    _scatter_add_kernel[T, triton.cdiv(C, 256)](table, tokens, rows, C, BLOCK=256, num_warps=2)


class _Lookup(torch.autograd.Function):
    """Rows of a table, whose gradient is added straight into the table's .grad: no dense gradient is made on the way."""

    @staticmethod
    def forward(ctx, tokens, table):
        ctx.save_for_backward(tokens)
        ctx.table = table
        return F.embedding(tokens, table)

    @staticmethod
    def backward(ctx, dout):
        (tokens,), grad = ctx.saved_tensors, gradient(ctx.table)
        if grad.is_cuda:
            scatter_add(grad, tokens, dout.contiguous())
        else:
            grad.index_add_(0, tokens, dout)
        return None, None


def lookup(tokens: Tensor, table: nn.Parameter) -> Tensor:
    """Rows (T, width) of a table (classes, width) for tokens int32 (T,)."""
    return _Lookup.apply(tokens, table)


# ======================================================================================================================
# Model

GATE_CHANNELS = 12  # gates read only the first channels


@dataclass
class Batch:
    """Packed documents, int32 (T,) each: inputs, targets, and the first and last index of each token's document."""

    inputs: Tensor
    targets: Tensor
    first: Tensor
    last: Tensor


class Rotary(nn.Module):
    """Half-truncated rotary tables and the softmax scale, rescaled as the window grows (YaRN, arXiv 2309.00071).

    cos, sin: (max_tokens, head_dim / 2); a quarter of head_dim turns, the rest stands still. Positions are indices in the
    packed sequence. frequencies (radians a token) and scale stay float32.
    """

    def __init__(self, head_dim: int, max_tokens: int, dtype: torch.dtype):
        super().__init__()
        turning = (1 / 1024) ** torch.linspace(0, 1, head_dim // 4)
        self.register_buffer("frequencies", torch.cat([turning, torch.zeros(head_dim // 4)]))
        self.register_buffer("scale", torch.tensor(0.1))
        self.register_buffer("cos", torch.empty(max_tokens, head_dim // 2, dtype=dtype))
        self.register_buffer("sin", torch.empty(max_tokens, head_dim // 2, dtype=dtype))
        self.fill()

    def fill(self):
        """Write the tables anew, in place."""
        angles = torch.outer(torch.arange(len(self.cos), dtype=torch.float32, device=self.cos.device), self.frequencies)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def extend(self, old: int, new: int):
        """Adapt to a long window that grows from old to new tokens: slow frequencies stretch with it, fast ones stay."""
        rotations = old * self.frequencies / (2 * math.pi)
        keep = ((rotations - 1) / (32 - 1)).clamp(0, 1)
        self.frequencies.mul_(old / new + keep * (1 - old / new))
        self.scale.mul_(1 + 0.2 * math.log(new / old))
        self.fill()


def embed(e: Tensor, gate: Tensor, s: Tensor) -> Tensor:
    """Smear each raw embedding (T, width) forward by one token, by its own gate (1, 12) and the scalar s; then norm."""
    mixed = s * torch.sigmoid(F.linear(e[1:, :GATE_CHANNELS], gate)) * e[:-1]
    return norm(torch.cat([e[:1], e[1:] + mixed]))


def join(x: Tensor, gate: Tensor, kept: Tensor) -> Tensor:
    """A long skip: the residual stream x (T, width) and what was kept of it, times its gate's sigmoid."""
    return x + torch.sigmoid(gate) * kept


def block(x: Tensor, x0: Tensor, lambdas: Tensor, layer: int, attention_paths, mlp_paths, value: Tensor | None, rotary, visible, shared: dict) -> Tensor:
    """One layer slot: the residual stream x (T, width), mixed with x0, plus its attention paths, plus its MLP paths.

    A path: its matrices, then their pairs of copies or None. The other arguments as in `mix` and `attention`.
    """
    fp8 = any(path[-1] is not None for path in (*attention_paths, *mlp_paths))
    x, normed, copy = mix(x, x0, lambdas, layer, shared, fp8)
    for path in attention_paths:
        x = attention(x, normed, copy, *path, lambdas, layer, value, rotary, visible)
    if attention_paths and mlp_paths:
        x, normed, copy = renorm(x, fp8)
    for path in mlp_paths:
        x = mlp(x, normed, copy, *path)
    return x


def leave(x: Tensor, backout: Tensor, kept: Tensor | None, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """The head's input: the residual stream (T, width) without its share, backout, of an earlier layer's output; then norm. With fp8, its e4m3 copy."""
    x = norm(x if kept is None else x - backout * kept)
    return x, to_e4m3(x.detach(), 1 / normed_scale(x)) if fp8 else None


class Slot(nn.Module):
    """The matrices of one layer slot, by path: attention (width, 4 width), gate (heads, 12), mlp_in and mlp_out (width, 4 width)."""

    def __init__(self, layer: Layer, width: int, heads: int, dtype: torch.dtype, generator: torch.Generator):
        super().__init__()
        bound = 3**0.5 * 0.5 * width**-0.5

        def matrices(count: int, live: int):
            """Matrices of which the first `live` of four quarters are uniform and the rest zero."""
            stack = torch.zeros(count, 4, width, width)
            stack[:, :live].uniform_(-bound, bound, generator=generator)
            return nn.ParameterList(stack.view(count, width, 4 * width).unbind())

        self.attention = matrices(layer.attention, live=3)
        self.gate = nn.ParameterList(torch.zeros(layer.attention, heads, GATE_CHANNELS, dtype=dtype).unbind())
        self.mlp_in = matrices(layer.mlp, live=4)
        self.mlp_out = matrices(layer.mlp, live=0)


class GPT(nn.Module):
    """The language model.

    Parameters are drawn in float32 on the CPU from the seed. Embeddings, head and gates are cast to the world's dtype at
    once, the hidden matrices by the optimizer, which keeps the float32 masters; scalars stay float32.
    """

    def __init__(self, s: Hyperparameters, world: World):
        super().__init__()
        generator = torch.Generator().manual_seed(s.seed)
        self.layers, self.skips, self.backout_layer = layer_table(s), skip_table(s), s.backout
        self.kinds, self.copies = {}, {}  # e4m3 copies, with their values: of all matrices of a kind, and of each parameter, as it is or transposed
        classes, width = s.classes, s.model_dim
        draw = lambda: nn.Parameter(torch.randn(classes, width, generator=generator).to(world.dtype))  # noqa: E731
        self.embedding = draw()
        self.values = nn.ParameterList(draw() for _ in range(1 + max(layer.value for layer in self.layers)))
        self.slots = nn.ModuleList(Slot(layer, width, s.num_heads, world.dtype, generator) for layer in self.layers)
        self.head = nn.Parameter(torch.zeros(classes, width, dtype=world.dtype))
        self.smear_gate = nn.Parameter(torch.zeros(1, GATE_CHANNELS, dtype=world.dtype))
        # One row a layer: a (of x), b (of x0), l0 (of v), l1 (of the value embedding).
        self.lambdas = nn.Parameter(torch.tensor([[1.1, 0.0, 0.5, 0.5]] * len(self.layers)))
        # Smear, backout, then a gate a skip.
        self.scalars = nn.Parameter(torch.tensor([0.0, 0.5] + [-1.5] * len(self.skips)))
        self.rotary = Rotary(width // s.num_heads, max(s.train_tokens, s.val_tokens_each), world.dtype)
        self.to(world.device)
        self.fetch = lambda parameters: None  # called before parameters are read; Trainer waits there for their communication
        self.compiled = [compiled(f) if world.device.type == "cuda" else f for f in (embed, join, leave)]  # for training alone

    @torch.no_grad()
    def quantize(self):
        """Make the e4m3 copies of weights by which training goes on in FP8; later calls renew them in place, as a CUDA graph needs.

        The blocks' have their values beside them, not transposed, in the weights' dtype: gradients go by what the products read, and
        their few bits take matrix units less power.
        """
        slots = self.slots if on_hopper(self.head) else ()
        of = lambda name: [p for slot in slots for p in getattr(slot, name)]  # noqa: E731
        kinds = ((of("attention"), False), (of("mlp_in"), True), (of("mlp_out"), False), ([self.head], False), ([self.head], True))
        for kind, (parameters, turned) in enumerate(kinds):
            if parameters:
                copy = fused(to_e4m3, torch.stack(parameters), 1 / WEIGHT_SCALE)
                values = [] if parameters[0] is self.head else [copy.to(self.head.dtype).mul_(WEIGHT_SCALE)]
                new = [fused(transposed, copy.view(torch.uint8)).view(copy.dtype) if turned else copy, *values]
                if kind in self.kinds:
                    for kept, renewed in zip(self.kinds[kind], new, strict=True):
                        kept.copy_(renewed)
                else:
                    self.kinds[kind] = new
                    self.copies |= {(p, turned): pair for p, pair in zip(parameters, zip(*new, strict=True), strict=True)}

    def trunk(self, batch: Batch, windows: tuple[int, int] | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What the head reads: (T, width), normed, and in FP8 training its e4m3 copy. windows: how many tokens back short and long layers see.

        They may be int32 tensors, which a CUDA graph reads anew.
        """
        self.fetch((self.smear_gate, self.scalars, self.lambdas, self.embedding, *self.values))
        embed_, join_, leave_ = self.compiled if self.training else (embed, join, leave)
        copies = self.copies if self.training else {}
        at = torch.arange(len(batch.inputs), dtype=torch.int32, device=batch.inputs.device)
        visible = {
            name: (torch.maximum(batch.first, at - window), torch.minimum(batch.last, at + window))
            for name, window in zip(("short", "long"), windows, strict=True)
        }
        rotary = (self.rotary.cos, self.rotary.sin, self.rotary.scale)
        smear, backout, *skip_gates = self.scalars.unbind()
        values = [lookup(batch.inputs, table) for table in self.values]
        x0 = embed_(lookup(batch.inputs, self.embedding), self.smear_gate, smear)
        x, shared = x0, {}
        kept, wanted = {}, {self.backout_layer, *(source for source, _ in self.skips)}
        for i, (layer, slot) in enumerate(zip(self.layers, self.slots, strict=True)):
            if layer.attention or layer.mlp:
                self.fetch(slot.parameters())
                for (source, target), gate in zip(self.skips, skip_gates, strict=True):
                    x = join_(x, gate, kept[source]) if target == i else x
                attention_paths = tuple((w, gate, copies.get((w, False))) for w, gate in zip(slot.attention, slot.gate, strict=True))
                mlp_paths = tuple((w, v, copies.get((w, True)), copies.get((v, False))) for w, v in zip(slot.mlp_in, slot.mlp_out, strict=True))
                value = values[layer.value] if layer.attention and layer.value >= 0 else None
                x = block(x, x0, self.lambdas, i, attention_paths, mlp_paths, value, rotary, visible[layer.window], shared)
            if i in wanted:
                kept[i] = x
        return leave_(x, backout, kept.get(self.backout_layer), bool(copies))

    def forward(self, batch: Batch, windows: tuple[int, int] | tuple[Tensor, Tensor]) -> Tensor:
        """Loss of each token of the batch, float32 (T,); arguments as in `trunk`."""
        x, x8 = self.trunk(batch, windows)
        self.fetch((self.head,))
        if self.training:
            copies = (x8, *self.copies[self.head, False], *self.copies[self.head, True]) if self.copies else None
            return head_loss(x, self.head, batch.targets, copies)
        # Evaluation: no FP8, and a slice at a time, since all logits at once would not fit.
        slices = zip(x.split(8192), batch.targets.split(8192), strict=True)
        return torch.cat([head_loss(part, self.head, targets) for part, targets in slices])

    def logits(self, batch: Batch, windows: tuple[int, int] | tuple[Tensor, Tensor]) -> Tensor:
        """Softcapped logits, float32 (T, classes), the classes beyond the vocabulary included; arguments as in `trunk`."""
        return softcap(self.trunk(batch, windows)[0] @ self.head.t())


# ======================================================================================================================
# Optimizers


# torch 2.13 has renamed these two, and 2.11 knows only the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Stack:
    """Parameters laid end to end in one buffer, cut into chunks of one unit a rank, and their gradients in another.

    The parameters become views of `work`, (chunks, ranks, unit), their gradients of a like buffer in grad_dtype; the end is
    padded with zeros to a whole chunk. Rank r owns unit r of each chunk: `own`, (chunks, unit), in the parameters' first dtype,
    which stays exact where work is rounded to dtype. Chunks are reduced as their last gradient arrives and gathered when updated.
    """

    def __init__(self, parameters: list[nn.Parameter], unit: int | None, world: World, dtype: torch.dtype, grad_dtype: torch.dtype):
        numel = sum(p.numel() for p in parameters)
        unit = unit or math.ceil(numel / world.size)
        self.numel, self.unit, self.chunks = numel, unit, math.ceil(numel / (unit * world.size))
        self.parameters, self.world, self.armed, self.reduces, self.gathers = parameters, world, False, [], {}
        exact = torch.zeros(self.chunks, world.size, unit, dtype=parameters[0].dtype, device=world.device)
        exact.view(-1)[:numel].copy_(torch.cat([p.data.flatten() for p in parameters]))
        self.work = exact.to(dtype)
        self.own = self.work[:, world.rank] if dtype == exact.dtype else exact[:, world.rank].clone()
        self.grad = torch.zeros_like(exact, dtype=grad_dtype)
        self.own_grad = self.grad[:, 0] if world.size == 1 else torch.zeros_like(self.grad[:, 0])
        self.members = [set() for _ in range(self.chunks)]  # the parameters with a part in each chunk
        start = 0
        for p in parameters:
            end = start + p.numel()
            for chunk in range(start // (unit * world.size), math.ceil(end / (unit * world.size))):
                self.members[chunk].add(p)
            p.data = self.work.view(-1)[start:end].view_as(p)
            p.grad_dtype = grad_dtype
            p.grad = self.grad.view(-1)[start:end].view_as(p)
            if world.size > 1:
                p.register_post_accumulate_grad_hook(self._arrived)
            start = end

    def arm(self):
        """Before the last backward pass of a step: from now on, reduce each chunk as soon as its gradients are whole."""
        self.missing, self.armed = [set(members) for members in self.members], self.world.size > 1

    def _arrived(self, parameter: nn.Parameter):
        if self.armed:
            for chunk, missing in enumerate(self.missing):
                if parameter in missing:
                    missing.remove(parameter)
                    if not missing:
                        self._reduce(chunk)

    def _reduce(self, chunk: int):
        self.reduces.append(reduce_scatter(self.own_grad[chunk], self.grad[chunk].view(-1), async_op=True))

    def finish_reduce(self):
        """After that backward pass: reduce what no hook announced, in the same order on every rank, and wait for all."""
        if self.armed:
            for chunk, missing in enumerate(self.missing):
                if missing:
                    self._reduce(chunk)
        self.armed = False
        for handle in self.reduces:
            handle.wait()
        self.reduces.clear()

    def publish(self):
        """After the update of `own`: start to send it to every rank's `work`; `fetch` ends it. Gradients begin at zero again."""
        self.fetch()
        if self.own.data_ptr() != self.work[:, self.world.rank].data_ptr():
            self.work[:, self.world.rank].copy_(self.own)
        self.grad.zero_()
        if self.world.size > 1:
            for i in reversed(range(self.chunks)):  # the first layers lie at the end, and are read first
                self.gathers[i] = all_gather(self.work[i].view(-1), self.work[i, self.world.rank], async_op=True)

    def fetch(self, parameter: nn.Parameter | None = None):
        """Before a parameter, or all of them, are read from `work`: wait for their chunks."""
        for chunk in [i for i in self.gathers if parameter is None or parameter in self.members[i]]:
            self.gathers.pop(chunk).wait()

    def collect(self, shard: Tensor) -> Tensor:
        """The whole of a state of which each rank holds (chunks, n), n for each unit of `own`: flat, without padding."""
        full = shard.new_empty(self.chunks, self.world.size, shard.size(1))
        for chunk, mine in zip(full, shard, strict=True):
            if self.world.size > 1:
                all_gather(chunk.view(-1), mine.contiguous())
            else:
                chunk[0] = mine
        return full.view(-1)[: self.numel * shard.size(1) // self.unit]

    def deal(self, full: Tensor, shard: Tensor):
        """The inverse of `collect`: write this rank's share of a whole state into shard, (chunks, n)."""
        padded = full.new_zeros(self.chunks * self.world.size * shard.size(1))
        padded[: full.numel()] = full
        shard.copy_(padded.view(self.chunks, self.world.size, -1)[:, self.world.rank])


POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(u: Tensor) -> Tensor:
    """Near the orthogonal polar factor of each matrix (..., rows, cols), in u's dtype (Polar Express, arXiv 2505.16932)."""
    x = u.flatten(0, -3)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = x @ x.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        x = torch.baddbmm(x, B, x, beta=a)
    return (x.mT if tall else x).view_as(u)


def nesterov(g: Tensor, m: Tensor, momentum: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """Nesterov's direction, in dtype, by the mean of gradients of which g is the sum over parts; updates the momentum m in place.

    g, m: of one shape. momentum: float32 scalar tensor.
    """
    g = g.to(m.dtype) / parts
    m.lerp_(g, 1 - momentum)
    return g.lerp(m, momentum).to(dtype)


def normuon_update(w: Tensor, u: Tensor, v: Tensor, lr: Tensor, lr_mul: Tensor, decay: float, beta2: float):
    """Update matrices w (..., rows, cols) and second moment v (..., 1, cols) in place, by their orthogonal directions u.

    A second moment per column (NorMuon, arXiv 2510.05491) that keeps the Frobenius norm, and cautious weight decay
    (arXiv 2510.12402). lr: float32 scalar tensor. lr_mul: (..., 1, 1), not applied to the decay.
    """
    mean = u.float().square().mean(-2, keepdim=True)
    v.lerp_(mean.to(v.dtype), 1 - beta2)
    floored = v.float().clamp(min=1e-10)
    rows = w.size(-2)
    before = (rows * mean.sum(-1, keepdim=True)).sqrt()
    after = (rows * (mean / floored).sum(-1, keepdim=True)).sqrt()
    u = u * (floored.rsqrt() * (before / after.clamp(min=1e-10)))
    u = u + (lr * decay) * w * (u * w >= 0)
    w -= (lr * max(1, rows / w.size(-1)) ** 0.5) * lr_mul * u


class NorMuon:
    """NorMuon for the hidden matrices, one stack of equal shape, and for the gates. Steps every step."""

    def __init__(self, model: GPT, s: Hyperparameters, world: World):
        self.s, self.world, self.stacks, self.moments, self.parts = s, world, [], [], []
        order = list(reversed(model.slots))  # as the backward pass reaches them
        # Each matrix with the number of square ones that it holds and its learning rate factor.
        hidden = [entry for slot in order for w_out, w_in in zip(slot.mlp_out, slot.mlp_in, strict=True)
                  for entry in ((w_out, 1, 1.0), (w_in, 1, s.mlp_in_lr_mul))]  # fmt: skip
        hidden += [(p, 4, 1.0) for slot in order for p in slot.attention]
        gates = [(p, 1, 1.0) for slot in order for p in slot.gate]
        for entries in filter(None, (hidden, gates, [(model.smear_gate, 1, 1.0)])):
            parameters = [p for p, _, _ in entries]
            stack = Stack(parameters, parameters[0].numel(), world, world.dtype, world.dtype)
            self.stacks.append(stack)
            self.moments.append((torch.zeros_like(stack.own), stack.own.new_zeros(stack.chunks, stack.unit // parameters[0].size(0))))
            mine = enumerate(entries[world.rank :: world.size])
            runs = (list(run) for _, run in itertools.groupby(mine, key=lambda entry: entry[1][1]))
            self.parts.append([self._part(stack, *self.moments[-1], run) for run in runs])

    def _part(self, stack: Stack, m: Tensor, v: Tensor, run: list):
        """Views (n, squares, rows, cols) of this rank's matrices of one kind and their gradients, with their moments."""
        (first, (p, squares, _)), last = run[0], run[-1][0]
        rows, cols = p.size(0), p.size(1) // squares
        w, g, m = (t[first : last + 1].view(-1, squares, rows, cols) for t in (stack.own, stack.own_grad, m))
        lr_mul = torch.tensor([rate for _, (_, _, rate) in run], device=w.device).view(-1, 1, 1, 1)
        return w, g, m, v[first : last + 1].view(-1, squares, 1, cols), lr_mul

    def step(self, lr: float, momentum: float):
        """Update all matrices with the mean of the gradients summed over the step's micro-batches."""
        s = self.s
        lr, momentum = (torch.full((), x, device=self.world.device) for x in (lr, momentum))  # tensors: numbers would be compiled in
        for stack, parts in zip(self.stacks, self.parts, strict=True):
            stack.finish_reduce()
            for w, g, m, v, lr_mul in parts:
                u = polar_express(fused(nesterov, g, m, momentum, s.micro_batches, self.world.dtype))
                fused(normuon_update, w, u, v, lr, lr_mul, s.muon_weight_decay, s.muon_beta2)


def adam_update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, rate: Tensor, parts: int, beta1: float, beta2: float):
    """An Adam step (arXiv 1412.6980), in place, of parameters p by the mean of gradients of which g is the sum over parts.

    m, v: moments; all of one shape. rate: float32 scalar tensor, the learning rate times Adam's correction of the moments' bias.
    """
    g = g / parts
    m.lerp_(g, 1 - beta1)
    v.lerp_(g.square(), 1 - beta2)
    p -= m / (v.sqrt() + 1e-8) * rate


class DistAdam:
    """Adam with its state sharded over the ranks, for embeddings, head and scalars. Steps on odd steps only."""

    def __init__(self, model: GPT, s: Hyperparameters, world: World):
        self.s = s
        groups = [(model.head, s.head_lr_mul)] + [(p, s.embed_lr_mul) for p in (*model.values, model.embedding)]
        groups += [(p, s.scalar_lr_mul) for p in (model.scalars, model.lambdas)]
        self.stacks = [Stack([p], None, world, p.dtype, torch.float32) for p, _ in groups]
        self.rates = [s.adam_lr * factor for _, factor in groups]
        self.moments = [(torch.zeros_like(k.own, dtype=torch.float32), torch.zeros_like(k.own, dtype=torch.float32)) for k in self.stacks]

    def step(self, lr_scale: float, t: int):
        """The t-th update, t from 1, with the mean over micro-batches of the gradients gathered since the last."""
        s = self.s
        correction = (1 - s.adam_beta2**t) ** 0.5 / (1 - s.adam_beta1**t)
        for stack, rate, (m, v) in zip(self.stacks, self.rates, self.moments, strict=True):
            stack.finish_reduce()
            rate = torch.full((), rate * lr_scale * correction, device=m.device)  # a tensor: a number would be compiled in
            fused(adam_update, stack.own, stack.own_grad, m, v, rate, s.micro_batches, s.adam_beta1, s.adam_beta2)


# ======================================================================================================================
# Data

MAGIC, VERSION, HEADER = 20240520, 1, 256  # of a shard: that many little-endian int32, then uint16 tokens
FETCH = "python data/cached_fineweb10B.py"


def read_shard(path: str, vocab_size: int) -> np.ndarray:
    """The tokens of a shard, uint16. Raises UsageError, naming the file, when it is not a whole shard of this vocabulary."""
    try:
        with open(path, "rb") as file:
            header = np.fromfile(file, "<i4", HEADER)
            tokens = np.fromfile(file, "<u2")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); fetch it again with: {FETCH}") from None
    if len(header) < HEADER or header[0] != MAGIC:
        found = header[0] if len(header) else "nothing"
        raise UsageError(f"{path}: not a token shard (magic number {found}, want {MAGIC}); remove it and run: {FETCH}")
    if header[1] != VERSION:
        raise UsageError(f"{path}: shard version {header[1]}, want {VERSION}; remove it and run: {FETCH}")
    if len(tokens) != header[2]:
        raise UsageError(f"{path}: holds {len(tokens)} tokens where its header says {header[2]}; remove it and run: {FETCH}")
    if len(tokens) and tokens.max() >= vocab_size:
        raise UsageError(f"{path}: token {tokens.max()} is beyond the vocabulary; give a --vocab_size above it or other shards")
    return tokens


def find_shards(pattern: str, flag: str) -> list[str]:
    """The shards that match a pattern, by name; raises UsageError when there is none."""
    if not (paths := sorted(glob.glob(pattern))):
        raise UsageError(f"--{flag}={pattern} matches no file; fetch FineWeb with: {FETCH}, or make the sample with: python data/sample.py")
    return paths


def pack(starts: np.ndarray, end: int, tokens: int, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents, given where each starts and where the last ends, into micro-batches of tokens + 1.

    Each document gives its first max_len tokens at most. Returns the pieces' lengths (before the cut that fills a
    micro-batch) and the first document of each micro-batch, with the end of the last one: documents cuts[i] to cuts[i+1].
    """
    lengths = np.minimum(np.diff(starts, append=end), max_len)
    ends = np.cumsum(lengths)
    cuts = [0]
    while cuts[-1] < len(ends):
        before = ends[cuts[-1] - 1] if cuts[-1] else 0
        cut = int(np.searchsorted(ends, before + tokens + 1)) + 1
        if cut > len(ends):
            break
        cuts.append(cut)
    return lengths, np.array(cuts)


def make_batch(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """A micro-batch from its T + 1 tokens and the places, from 0, where documents start: int32 (4, T), as the fields of Batch."""
    T = len(tokens) - 1
    bounds = np.append(starts[starts < T], T)
    spans = np.diff(bounds)
    return np.stack([tokens[:-1], tokens[1:], np.repeat(bounds[:-1], spans), np.repeat(bounds[1:] - 1, spans)]).astype(np.int32)


def document_batch(tokens: np.ndarray, bos: int, device: torch.device) -> Batch:
    """A Batch of T tokens from T + 1 token ids, in which a document starts at the first and at every BOS."""
    starts = np.union1d([0], np.flatnonzero(tokens == bos))
    return Batch(*torch.from_numpy(make_batch(tokens, starts)).to(device))


class TrainLoader:
    """BOS-aligned training batches: a pure function of the step, so the stream is the same for any world, and rewinds.

    All shards that the run needs are indexed in the background from the start; tokens are read again when their shard's
    turn comes, one shard ahead, and batches are made, pinned and sent to the device ahead of use.
    """

    def __init__(self, s: Hyperparameters, world: World):
        self.s, self.world = s, world
        self.paths = find_shards(s.train_files, "train_files")
        self.readers, self.makers = ThreadPoolExecutor(2), ThreadPoolExecutor(1)
        self.indexes = [self.readers.submit(self._index, path) for path in self.paths]
        self.loads = {}

    def _index(self, path: str):
        """Document starts, piece lengths and micro-batch cuts of a shard."""
        tokens = read_shard(path, self.s.vocab_size)
        starts = np.flatnonzero(tokens == self.s.bos)
        if not len(starts):
            raise UsageError(f"{path}: holds no BOS token {self.s.bos}, so no document starts; give other --train_files or --vocab_size")
        return starts, *pack(starts, len(tokens), self.s.train_tokens, self.s.train_max_seq_len)

    def _steps(self, shard: int) -> int:
        return (len(self.indexes[shard].result()[2]) - 1) // self.s.micro_batches

    def check(self):
        """Wait until the index covers the run; raise UsageError when the shards feed too few steps."""
        steps = 0
        for shard in range(len(self.paths)):
            steps += self._steps(shard)
            if steps >= self.s.total_steps:
                return [index.cancel() for index in self.indexes[shard + 1 :]]
        raise UsageError(f"--train_files={self.s.train_files} feeds {steps} steps of the {self.s.total_steps}; fetch more with: {FETCH} N"
                         " (N shards, up to 103), or lower --num_scheduled_iterations")  # fmt: skip

    def _tokens(self, shard: int) -> np.ndarray:
        """A shard's tokens; the next shard begins to load, and earlier ones are let go."""
        for near in range(shard, min(shard + 2, len(self.paths))):
            if near not in self.loads:
                self.loads[near] = self.readers.submit(read_shard, self.paths[near], self.s.vocab_size)
        for done in [key for key in self.loads if key < shard]:
            del self.loads[done]
        tokens, starts = self.loads[shard].result(), self.indexes[shard].result()[0]
        if len(tokens) <= starts[-1] or not (tokens[starts] == self.s.bos).all():
            raise UsageError(f"{self.paths[shard]}: changed since the run began; restore it, and go on with --resume=latest if checkpoints are on")
        return tokens

    def host_batches(self, step: int) -> Tensor:
        """This rank's micro-batches of a step, int32 (micro-batches a rank, 4, T), in pinned memory where there is a GPU."""
        shard = 0
        while step >= self._steps(shard):
            step, shard = step - self._steps(shard), shard + 1
        tokens, (starts, lengths, cuts) = self._tokens(shard), self.indexes[shard].result()
        count, room, batches = self.s.micro_batches // self.world.size, self.s.train_tokens + 1, []
        first = step * self.s.micro_batches + self.world.rank * count
        for i in range(first, first + count):
            chosen = slice(cuts[i], cuts[i + 1])
            pieces = [tokens[at : at + length] for at, length in zip(starts[chosen], lengths[chosen], strict=True)]
            batches.append(make_batch(np.concatenate(pieces)[:room], np.cumsum(lengths[chosen]) - lengths[chosen]))
        batches = torch.from_numpy(np.stack(batches))
        return batches.pin_memory() if self.world.device.type == "cuda" else batches

    def stream(self, step: int, end: int):
        """Yield each step's list of Batch on the device; the next step's is on its way, and two more are being made."""
        made = deque(self.makers.submit(self.host_batches, i) for i in range(step, min(step + 3, end)))
        send = lambda: made.popleft().result().to(self.world.device, non_blocking=True)  # noqa: E731
        ready = send()
        for i in range(step, end):
            if i + 3 < end:
                made.append(self.makers.submit(self.host_batches, i + 3))
            following = send() if made else None
            yield [Batch(*micro_batch) for micro_batch in ready]
            ready = following


class ValLoader:
    """The validation set, straight through the first shard: micro-batches that start a document at their first token and at every BOS."""

    def __init__(self, s: Hyperparameters, world: World):
        self.s, self.world = s, world
        path = find_shards(s.val_files, "val_files")[0]
        self.tokens = read_shard(path, s.vocab_size)
        if len(self.tokens) <= s.val_tokens:
            raise UsageError(f"{path}: holds {len(self.tokens)} tokens, but validation needs --val_tokens={s.val_tokens} and one more;"
                             " lower it or give a larger --val_files")  # fmt: skip

    def stream(self):
        """Yield this rank's share of the micro-batches, each a Batch on the device."""
        size = self.s.val_tokens_each
        for start in range(self.world.rank * size, self.s.val_tokens, self.world.size * size):
            tokens = self.tokens[start : min(start + size, self.s.val_tokens) + 1]
            yield document_batch(tokens, self.s.bos, self.world.device)


# ======================================================================================================================
# Schedules: pure functions of the step


def lr_scale(step: int, s: Hyperparameters) -> float:
    """Factor of every learning rate: 1, then a linear fall over the last cooldown_frac of the scheduled steps."""
    progress = min(0.9999, step / s.num_scheduled_iterations)
    if progress < 1 - s.cooldown_frac:
        return 1.0
    left = (1 - progress) / s.cooldown_frac
    return left + s.final_lr_scale * (1 - left)


def muon_momentum(step: int, s: Hyperparameters) -> float:
    """NorMuon's momentum: a rise at the start, which goes first in a short run, and a fall at the end."""
    span, falling = s.momentum_high - s.momentum_low, s.total_steps - s.momentum_cooldown
    if step < s.momentum_warmup:
        return s.momentum_low + span * step / s.momentum_warmup
    if step > falling:
        return s.momentum_high - span * (step - falling) / s.momentum_cooldown
    return s.momentum_high


def attention_windows(step: int, s: Hyperparameters) -> tuple[int, int]:
    """(short, long) attention windows in tokens, when training begins the step."""
    if step >= s.num_scheduled_iterations:
        return parse_window(s, "extension_window")
    table = window_table(s)
    return table[step * len(table) // s.num_scheduled_iterations]


# ======================================================================================================================
# Training


class Trainer:
    """The model and its optimizers, and what one step does with them."""

    def __init__(self, s: Hyperparameters, world: World):
        self.s, self.world, self.stop = s, world, False  # stop: set by SIGTERM, passed on to all ranks with the next loss
        self.model = GPT(s, world)
        self.normuon, self.adam = NorMuon(self.model, s, world), DistAdam(self.model, s, world)
        model = self.model
        early = [model.smear_gate, model.scalars, model.lambdas, *(p for slot in model.slots for p in slot.gate), model.embedding, *model.values]
        turns = {p: turn for turn, p in enumerate(early)} | {model.head: len(early) + 1}
        owned = zip(self.normuon.stacks + self.adam.stacks, self.normuon.moments + self.adam.moments, strict=True)
        self.owned = sorted(owned, key=lambda pair: turns.get(pair[0].parameters[0], len(early)))  # as the forward pass reads them
        self.stacks = [stack for stack, _ in self.owned]
        self.stack_of = {p: stack for stack in self.stacks for p in stack.parameters}
        self.model.fetch = self.fetch
        # What a CUDA graph reads and writes stays in place: the windows, the step's loss so far, and a micro-batch.
        self.windows = torch.zeros(2, dtype=torch.int32, device=world.device).unbind()
        self.total = torch.zeros((), device=world.device)
        self.batch, self.graph = Batch(*torch.zeros(4, s.train_tokens, dtype=torch.int32, device=world.device)), None

    def fetch(self, parameters):
        """Wait until these parameters have come from the ranks that updated them."""
        if self.world.size > 1:
            for p in parameters:
                self.stack_of[p].fetch(p)

    def micro_step(self, batch: Batch):
        """Add a micro-batch's loss to `total` and its gradients to the parameters'."""
        loss = self.model(batch, self.windows).sum()
        loss.backward()
        self.total += loss.detach()

    def capture(self):
        """Record a micro-batch as a CUDA graph for `train_step`: launched one by one, its kernels take the host longer than the GPU.

        All kernels must have been compiled. With several GPUs the graph waits for all parameters, and gradients travel after it.
        """
        for stack in self.stacks:
            stack.fetch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the loader's threads go on
            self.micro_step(self.batch)
        self.graph = graph

    def train_step(self, step: int, batches: list[Batch], windows: tuple[int, int]) -> Tensor:
        """One step over this rank's micro-batches.

        Returns, float32 (2,) on the device, the mean loss of the whole step and how many ranks want to stop.
        """
        self.model.train()
        if self.world.fp8:
            self.fetch(self.stack_of)
            self.model.quantize()
        self.total.zero_()
        for kept, window in zip(self.windows, windows, strict=True):
            kept.fill_(window)
        for i, batch in enumerate(batches):
            if i == len(batches) - 1:
                for stack in self.normuon.stacks + (self.adam.stacks if step % 2 else []):
                    stack.arm()
            if self.graph:
                for stack in self.stacks:
                    stack.fetch()
                for kept, new in zip(vars(self.batch).values(), vars(batch).values(), strict=True):
                    kept.copy_(new)
                self.graph.replay()
            else:
                self.micro_step(batch)
        scale = lr_scale(step, self.s)
        self.normuon.step(self.s.muon_lr * scale, muon_momentum(step, self.s))
        if step % 2:
            self.adam.step(scale, t=step // 2 + 1)
        result = torch.stack([self.total / self.s.train_batch_size, torch.full_like(self.total, self.stop)])
        if self.world.size > 1:
            dist.all_reduce(result)
        for stack in self.stacks:
            if step % 2 or stack in self.normuon.stacks:
                stack.publish()
        return result

    @torch.no_grad()
    def validate(self, batches, windows: tuple[int, int]) -> float:
        """Mean loss over the validation micro-batches, nats a token: that of their means, but for a shorter last one."""
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)  # a rank may have no micro-batch
        for batch in batches:
            losses = self.model(batch, windows)
            total += torch.stack([losses.sum(dtype=torch.float64), total.new_full((), len(losses))])
        if self.world.size > 1:
            dist.all_reduce(total)
        return (total[0] / total[1]).item()

    @torch.no_grad()
    def warm_up(self, train: TrainLoader, val: ValLoader):
        """Run throw-away steps and a validation micro-batch, which compile all that the run will use; capture; then rewind."""
        steps = min(self.s.warmup_steps, self.s.total_steps)
        if not steps:
            return
        state = [*self.model.buffers(), *(t for stack, moments in self.owned for t in (stack.work, stack.own, stack.grad, *moments))]
        saved = [tensor.to("cpu", copy=True) for tensor in state]
        windows = attention_windows(0, self.s)
        with torch.enable_grad():
            for step, batches in enumerate(train.stream(0, steps)):
                self.train_step(step, batches, windows)
        self.validate(itertools.islice(val.stream(), 1), windows)
        for stack in self.stacks:
            stack.fetch()
        if self.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            with torch.enable_grad():
                self.model.train()
                self.capture()
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)

    def whole_state(self, step: int):
        """Yield (name, tensor) of all that training after `step` steps goes on from, whole on every rank; all ranks must ask.

        A parameter goes by its name, its moments by that and .first and .second, and after an even step, which Adam leaves out,
        the gradient that it has gathered by .gradient. Each tensor is flat, but for parameters and buffers.
        """
        names = {p: name for name, p in self.model.named_parameters()}
        yield "rotary.frequencies", self.model.rotary.frequencies
        yield "rotary.scale", self.model.rotary.scale
        for stack, moments in self.owned:
            stack.fetch()
            whole = {"": stack.collect(stack.own), ".first": stack.collect(moments[0]), ".second": stack.collect(moments[1])}
            if step % 2 and stack in self.adam.stacks:
                whole[".gradient"] = stack.grad.flatten()[: stack.numel].clone()
                if self.world.size > 1:
                    dist.all_reduce(whole[".gradient"])
            for suffix, full in whole.items():
                share = [p.numel() * full.numel() // stack.numel for p in stack.parameters]
                for p, part in zip(stack.parameters, full.split(share), strict=True):
                    yield names[p] + suffix, part if suffix else part.view(p.shape)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], step: int):
        """The inverse: take what `whole_state` gave, perhaps in a world of another size."""
        names = {p: name for name, p in self.model.named_parameters()}
        self.model.rotary.frequencies.copy_(tensors["rotary.frequencies"])
        self.model.rotary.scale.copy_(tensors["rotary.scale"])
        self.model.rotary.fill()
        for stack, moments in self.owned:
            whole = lambda suffix: torch.cat([tensors[names[p] + suffix].flatten() for p in stack.parameters]).to(self.world.device)  # noqa: B023, E731
            stack.work.view(-1)[: stack.numel] = whole("")
            for suffix, shard in (("", stack.own), (".first", moments[0]), (".second", moments[1])):
                stack.deal(whole(suffix), shard)
            if step % 2 and stack in self.adam.stacks and self.world.rank == 0:  # one rank brings what all had gathered
                stack.grad.view(-1)[: stack.numel] = whole(".gradient")


# ======================================================================================================================
# Log

SEPARATOR = "=" * 100


def seconds_since_launch() -> float:
    """Age of this process in seconds, by the kernel's clock where /proc has it, else since this module was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.perf_counter() - IMPORTED


class Log:
    """The run's log file, which rank 0 writes a line at a time, and the console: a bar on a terminal, else the same lines."""

    def __init__(self, s: Hyperparameters, world: World):
        self.path, self.file, self.bar = None, None, None
        if world.rank == 0:
            self.path = Path(s.log_dir) / f"{time.strftime('%Y-%m-%dT%H-%M-%SZ', time.gmtime())}_{uuid.uuid4().hex[:8]}.txt"
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(self.path, "x", buffering=1, encoding="utf-8")
            except OSError as error:
                raise UsageError(f"--log_dir={s.log_dir} cannot be written ({error.strerror}); give another folder") from None
            print(f"log: {self.path}", flush=True)
            if sys.stdout.isatty():
                self.bar = tqdm(total=s.total_steps, unit="step", dynamic_ncols=True, file=sys.stdout)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.file:
            with contextlib.suppress(OSError):  # a full disk has been told of already
                if error is not None:
                    self.file.write(f"stopped: {str(error) or kind.__name__}\n")
                self.file.close()
        if self.bar is not None:
            self.bar.close()

    def write(self, text: str, show: bool = True):
        """A line, or several, for the file and, if shown, for the console."""
        if self.file:
            try:
                self.file.write(text + "\n")
            except OSError as error:
                raise UsageError(f"{self.path}: cannot be written ({error.strerror}); free space, or give another --log_dir") from None
            if show and self.bar is not None:
                self.bar.write(text, file=sys.stdout)
            elif show:
                print(text, flush=True)

    def step(self, text: str, step: int):
        """The line of a training step, for which a terminal only moves its bar."""
        self.write(text, show=self.bar is None)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)


def describe_machine(world: World) -> str:
    """Versions, devices and the products' precision, for the log."""
    gpu = world.device.type == "cuda"
    head = "fp8 in training, bf16 in validation" if world.fp8 else "bf16 (this chip has no FP8)" if gpu else "float32"
    hopper = world.fp8 and on_hopper(torch.empty(0, device=world.device))
    blocks = "forward products of q, k, v and the MLPs fp8 in training, all else bf16" if hopper else str(world.dtype)[6:]
    lines = [
        f"Python {sys.version}",
        f"PyTorch {torch.__version__} Triton {triton.__version__} CUDA {torch.version.cuda}",
        f"devices: {world.size} x {torch.cuda.get_device_name(world.device) if gpu else 'CPU process'}",
        f"head: {head}",
        f"blocks: {blocks}",
        "not deterministic: gradients of embeddings and lambdas, added by atomics in no fixed order" if gpu else "deterministic: the same settings give the same bits",
    ]
    if gpu and shutil.which("nvidia-smi"):
        found = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
        lines.append(re.sub(r"\s*\+-+\+\s*\| Processes:.*", "", found, flags=re.DOTALL).rstrip())  # programs' paths are no one's business
    return "\n".join(lines)


def calibrate(s: Hyperparameters, world: World) -> str:
    """How fast this machine is, a line a rank, so that a slower idea can be told from a slower machine; takes about a second.

    The GEMMs are an MLP's first product and the head's, on normal random numbers; all_reduce counts the bytes that a ring
    sends, 2 (ranks - 1) / ranks of the tensor; launch is the host's time to start a small operation. Clocks are read under load.
    """
    gpu, T, width, classes = world.device.type == "cuda", s.train_tokens, s.model_dim, s.classes

    def seconds(call, repeats: int | None = None) -> float:
        """Of a call, the middle of three bursts: of so many calls, or of as many as fill 50 ms (on a CPU 15)."""
        bursts, count = [], repeats or 1
        while len(bursts) < 3:
            if gpu:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(count):
                call()
            if gpu:
                torch.cuda.synchronize()
            spent = time.perf_counter() - began
            if repeats or spent > (0.05 if gpu else 0.015):
                bursts.append(spent / count)
            else:
                count *= 2
        return sorted(bursts)[1]

    normal = lambda *shape: torch.randn(*shape, device=world.device).to(world.dtype)  # noqa: E731
    x, w, small = normal(T, width), normal(width, 4 * width), normal(1)
    out, big = normal(T, 4 * width), torch.ones(2**26 if gpu else 2**23, device=world.device)
    other = big.clone()
    part = other[: len(other) // 4]
    ask = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader,nounits"]
    if has_smi := gpu and shutil.which("nvidia-smi"):
        smi = subprocess.Popen([*ask, f"--id=GPU-{torch.cuda.get_device_properties(world.device).uuid}"], stdout=subprocess.PIPE, text=True)
    figures = [f"{str(world.dtype)[6:]}_gemm={8e-12 * T * width**2 / seconds(lambda: torch.mm(x, w, out=out)):.4g}TFLOP/s"]
    if world.fp8:
        one, x8, w8 = torch.ones((), device=world.device), x.to(torch.float8_e4m3fn), normal(classes, width).to(torch.float8_e4m3fn)
        spent = seconds(lambda: torch._scaled_mm(x8, w8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
        figures.append(f"fp8_gemm={2e-12 * T * width * classes / spent:.4g}TFLOP/s")
    figures.append(f"copy={2e-9 * big.nbytes / seconds(lambda: other.copy_(big)):.4g}GB/s")
    if world.size > 1:
        spent = seconds(lambda: dist.all_reduce(part), repeats=5)
        figures.append(f"all_reduce={2e-9 * (world.size - 1) / world.size * part.nbytes / spent:.4g}GB/s")
    figures.append(f"launch={1e6 * seconds(lambda: small.add_(1)):.3g}us")
    if has_smi:
        units = zip(("sm_clock", "memory_clock", "power_limit"), smi.communicate()[0].split(","), ("MHz", "MHz", "W"), strict=False)
        figures += [f"{name}={value.strip()}{unit}" for name, value, unit in units]
    lines = [f"calibration rank {world.rank}: {' '.join(figures)}"]
    if world.size > 1:
        own, lines = lines[0], [None] * world.size
        dist.all_gather_object(lines, own)
    return "\n".join(lines)


def final_report(model: GPT) -> str:
    """Peak memory since warm-up and the final lambdas, for the end of the log."""
    if model.lambdas.is_cuda:
        allocated, reserved = (f() >> 20 for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
    else:  # a CPU has no such allocator: the process's largest resident size stands for both
        allocated = reserved = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    lines = [f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB"]
    for i, row in enumerate(model.lambdas.tolist()):
        lines.append(f"layer {i}: " + " ".join(f"{name}={value:.4f}" for name, value in zip(("a", "b", "l0", "l1"), row, strict=True)))
    smear, backout, *gates = model.scalars.tolist()
    skips = "".join(f" skip {a}-{b}={gate:.4f}" for (a, b), gate in zip(model.skips, gates, strict=True))
    return "\n".join([*lines, f"smear={smear:.4f} backout={backout:.4f}{skips}"])


class Meter:
    """The training clock, which stops for validation, and the watch over the losses and over the ranks' wish to stop.

    A step's time and loss are read once the device has passed it, a few steps later, so training never waits for them.
    """

    LAG = 8  # steps after which a loss is waited for

    def __init__(self, log: Log, total_steps: int, world: World, elapsed: float):
        self.log, self.total_steps, self.gpu, self.alone = log, total_steps, world.device.type == "cuda", world.size == 1
        self.before, self.pending = elapsed, deque()  # ms on the clock when it last started; steps not yet reported
        self.stop_after = math.inf  # the step after which all ranks stop

    def _now(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _train_time(self, now) -> float:
        return self.before + (self.origin.elapsed_time(now) if self.gpu else 1000 * (now - self.origin))

    def start(self):
        self.origin = self._now()

    def stop(self) -> float:
        """Wait for the device, report every step that it has passed, and return the training time so far in ms."""
        now = self._now()
        if self.gpu:
            now.synchronize()
        self.report(0)
        self.before = self._train_time(now)
        return self.before

    def step(self, step: int, result: Tensor):
        """Note that `step` steps are queued on the device and that the last of them gives this result of Trainer.train_step."""
        host = torch.empty(2, pin_memory=self.gpu)
        host.copy_(result, non_blocking=True)
        self.pending.append((step, host, self._now()))
        self.report(self.LAG)

    def report(self, lag: int):
        """Log the steps that are done, waiting while more than lag are not; raise UsageError at a loss that is not finite."""
        while self.pending:
            step, result, mark = self.pending[0]
            if self.gpu and len(self.pending) <= lag and not mark.query():
                return
            if self.gpu:
                mark.synchronize()
            self.pending.popleft()
            ms = self._train_time(mark)
            self.log.step(f"step:{step}/{self.total_steps} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms", step)
            loss, stops = result.tolist()
            if stops and self.stop_after == math.inf:  # by then every rank has read this, so they stop after the same step
                self.stop_after = step if self.alone else step + self.LAG
            self.check(step, loss)

    def check(self, step: int, loss: float):
        """Raise UsageError when a loss is not finite."""
        if not math.isfinite(loss):
            raise UsageError(f"the loss of step {step} is {loss}, not finite; lower the learning rates (log: {self.log.path})")


PARTS = (  # of a profile, by kernel names (on a CPU, operators'); the first that fits counts
    ("fused by the compiler", r"^triton_"), ("communication", r"nccl|gloo|c10d"), ("attention", r"attention|_heads_"), ("loss", r"_loss_|log_softmax|nll"),
    ("embeddings", r"_scatter_add|index_add|embedding"), ("products", r"_mlp_kernel|nvjet|gemm|cutlass|cublas|splitK|mm$"), ("copies", r"Memcpy|Memset|copy_"),
    ("other", r""),
)  # fmt: skip


def part_of(name: str) -> str:
    """The part of a step that a kernel, or on a CPU an operator, belongs to."""
    return next(title for title, pattern in PARTS if re.search(pattern, name))


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, -math.inf
    for low, high in sorted(spans):
        total, end = total + max(0.0, high - max(low, end)), max(end, high)
    return total


class Profiler:
    """--profile: a Chrome trace of rank 0's steps beside the log, and their time by part and by kernel in it."""

    def __init__(self, s: Hyperparameters, world: World, log: Log):
        self.steps, self.gpu, self.log = profiled_steps(s) if log.path else range(0), world.device.type == "cuda", log
        self.profiler = None

    def before(self, step: int):
        if self.steps and step == self.steps[0]:
            kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * self.gpu
            self.profiler = torch.profiler.profile(activities=kinds, acc_events=True)
            self.profiler.start()

    def ends(self, step: int) -> bool:
        return self.profiler is not None and step == self.steps[-1]

    def write(self):
        """Once the device has passed the last profiled step: write the trace and the report."""
        self.profiler.stop()
        trace = self.log.path.with_suffix(".trace.json.gz")
        self.profiler.export_chrome_trace(str(trace))
        self.log.write(f"profile: steps {self.steps[0]} to {self.steps[-1]}, trace {trace}; their time on the clock includes the profiler's")
        self.log.write("\n".join(self.report()))

    def report(self) -> list[str]:
        """Lines of time a step, by part and for the longest kernels (on a CPU, operators without what they call)."""
        if self.gpu:
            events = [e for e in self.profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith("ProfilerStep")]
            found = {}
            for e in events:
                spent, calls = found.get(e.name, (0.0, 0))
                found[e.name] = spent + e.time_range.end - e.time_range.start, calls + 1
        else:
            found = {e.key: (e.self_cpu_time_total, e.count) for e in self.profiler.key_averages()}
        sums, steps = dict.fromkeys((title for title, _ in PARTS), 0.0), len(self.steps)
        for name, (spent, _) in found.items():
            sums[part_of(name)] += spent
        lines = [f"profile: {title} {spent / 1000 / steps:.2f} ms a step" for title, spent in sums.items() if spent]
        if self.gpu:
            spans = [(e.time_range.start, e.time_range.end, part_of(e.name) == "communication") for e in events]
            computing, all_of_it = covered([span[:2] for span in spans if not span[2]]), covered([span[:2] for span in spans])
            lines.append(f"profile: computing {computing / 1000 / steps:.2f} ms a step, communication not hidden {(all_of_it - computing) / 1000 / steps:.2f} ms")
        longest = sorted(found.items(), key=lambda item: -item[1][0])[:30]
        return lines + [f"profile: {spent / 1000 / steps:9.3f} ms {calls / steps:7.1f} calls a step  {name[:120]}" for name, (spent, calls) in longest]


# ======================================================================================================================
# Checkpoints

# What may differ between a checkpoint's run and the one that goes on from it: where things lie, and what is looked at when.
FREE_SETTINGS = ("preset", "train_files", "val_files", "val_tokens", "val_batch_size", "val_loss_every", "warmup_steps", "log_dir", "save_every",
                 "save_checkpoint", "resume", "profile")  # fmt: skip


class Saver:
    """Writes a run's checkpoint beside its log, in the background; a new one takes the old one's place when it is whole."""

    def __init__(self, log: Log, trainer: Trainer):
        self.path = log.path and log.path.with_suffix(".pt")
        self.gpu, self.writer, self.pending = trainer.world.device.type == "cuda", ThreadPoolExecutor(1), None
        self.buffers = {}
        for name, tensor in trainer.whole_state(trainer.s.save_every):  # pinned memory takes a second to get: before the clock
            self._copy(name, tensor)

    def _copy(self, name: str, tensor: Tensor) -> Tensor | None:
        """A copy in this tensor's host buffer, under way; on rank 0 only."""
        if self.path and name not in self.buffers:
            self.buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=self.gpu)
        return self.buffers[name].copy_(tensor, non_blocking=True) if self.path else None

    def save(self, trainer: Trainer, step: int, elapsed: float):
        """Take the state after `step` steps and `elapsed` ms of training, and begin to write it; raises UsageError as `check`."""
        self.check(wait=True)  # its buffers are about to be written anew
        tensors = {name: self._copy(name, tensor) for name, tensor in trainer.whole_state(step)}
        state = {"settings": dataclasses.asdict(trainer.s), "step": step, "elapsed": elapsed, "tensors": tensors}
        if self.path:
            copied = torch.cuda.Event() if self.gpu else None
            if copied:
                copied.record()
            self.pending = self.writer.submit(self._write, state, copied)

    def _write(self, state: dict, copied):
        if copied:
            copied.synchronize()
        temporary = self.path.with_suffix(".pt.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        except (OSError, RuntimeError) as error:  # torch.save may turn a full disk into a RuntimeError
            temporary.unlink(missing_ok=True)
            kept = "the one before it is whole" if self.path.exists() else "there is none before it"
            raise UsageError(f"{self.path}: the checkpoint cannot be written ({error}); free space ({kept})") from None

    def check(self, wait: bool = False):
        """Raise UsageError if the last checkpoint could not be written, as far as that is known or once it is waited for."""
        if self.pending and (wait or self.pending.done()):
            self.pending.result()
            self.pending = None


def find_checkpoint(s: Hyperparameters, world: World) -> str:
    """The file that --resume means, on every rank that of rank 0; raises UsageError when there is none."""
    found = [s.resume]
    if s.resume == "latest":
        files = sorted(Path(s.log_dir).glob("*.pt"), key=lambda path: path.stat().st_mtime)
        found = [str(files[-1]) if files else None]
        if world.size > 1:
            dist.broadcast_object_list(found, device=world.device)
    if found[0] is None:
        raise UsageError(f"--resume=latest: no checkpoint in --log_dir={s.log_dir}; start without --resume")
    return found[0]


def read_checkpoint(path: str) -> dict:
    """A checkpoint: settings, step, elapsed (ms) and tensors by name, on the CPU. Raises UsageError for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        whole = state.keys() == {"settings", "step", "elapsed", "tensors"}
    except FileNotFoundError:
        raise UsageError(f"{path}: does not exist; give --resume=latest or a checkpoint's path") from None
    except Exception:  # whatever a file that is none makes the reader trip over
        whole = False
    if not whole:
        raise UsageError(f"{path}: not a checkpoint of this script; give another one")
    return state


def resume(trainer: Trainer, path: str) -> tuple[int, float]:
    """Put a checkpoint's state into the trainer; returns its step and the training time in ms so far.

    The world may be of another size. Raises UsageError, naming the setting, for a checkpoint of other settings.
    """
    state, settings = read_checkpoint(path), dataclasses.asdict(trainer.s)
    for name in sorted(settings.keys() | state["settings"].keys()):
        theirs, own = (values.get(name, "(not a setting)") for values in (state["settings"], settings))
        if theirs != own and name not in FREE_SETTINGS:
            raise UsageError(f"{path}: made with --{name}={theirs}, and this run has {own}; give that, or another checkpoint")
    try:
        trainer.load(state["tensors"], state["step"])
    except (KeyError, RuntimeError) as error:  # a tensor is missing or of another shape
        raise UsageError(f"{path}: made by another version of this script ({str(error).splitlines()[0]}); resume it with that one") from None
    return state["step"], state["elapsed"]


def load_model(path: str) -> GPT:
    """The trained model of a checkpoint for evaluation, on this machine's GPU, else its CPU. Raises UsageError for any other file.

    Its `windows` are those of the last validation; it takes as many tokens as model.rotary.cos has rows. Documents that begin
    with BOS, end to end in one array of token ids, go in as

        model = load_model("logs/....pt")
        batch = document_batch(tokens, model.bos, model.lambdas.device)
        losses = model(batch, model.windows)         # nats of each token but the first, float32 (T - 1,)
        logits = model.logits(batch, model.windows)  # float32 (T - 1, classes)
    """
    state = read_checkpoint(path)
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        s = Hyperparameters(**state["settings"])
        model = GPT(s, world).eval().requires_grad_(False)
        for name, p in model.named_parameters():
            p.data = state["tensors"][name].to(world.device, world.dtype if name.startswith("slots.") else p.dtype)
        for name in ("frequencies", "scale"):
            getattr(model.rotary, name).copy_(state["tensors"][f"rotary.{name}"])
    except (TypeError, KeyError) as error:  # a setting is unknown, or a tensor missing
        raise UsageError(f"{path}: made by another version of this script ({error}); load it with that one") from None
    model.rotary.fill()
    model.windows, model.bos = parse_window(s, "final_window"), s.bos
    return model


# ======================================================================================================================
# Main


class Terminated(BaseException):
    """SIGTERM came; the text says where training stands."""


def stop_once(number, _):
    """The handler of Ctrl-C and, until checkpoints are on, of SIGTERM: the first one ends the run, and no other, such as torchrun hands on, cuts that short."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated("SIGTERM")


@contextlib.contextmanager
def hear_signals():
    """Let a Ctrl-C that has cost this run another rank first be raised in here, and not where the log is about to be ended."""
    try:
        yield
    except RuntimeError:
        time.sleep(0.1)
        raise


def run(s: Hyperparameters, world: World):
    """The whole run: set up, warm up and rewind, then train and validate, then report."""
    train, val = TrainLoader(s, world), ValLoader(s, world)
    with Log(s, world) as log, hear_signals():
        log.write(f"{Path(__file__).read_text()}\n{SEPARATOR}\n{describe_machine(world)}", show=False)
        log.write(f"arguments: {shlex.join(sys.argv[1:])}\n{describe_settings(s)}", show=False)
        began = seconds_since_launch()
        trainer, start, elapsed = Trainer(s, world), 0, 0.0
        if s.resume:
            start, elapsed = resume(trainer, path := find_checkpoint(s, world))
            log.write(f"resumed: step {start} of {path}")
        train.check()
        built = seconds_since_launch()
        trainer.warm_up(train, val)
        warm = seconds_since_launch()
        log.write(calibrate(s, world), show=False)
        ready = seconds_since_launch()
        parts = f"import {began:.1f}, build {built - began:.1f}, warm-up {warm - built:.1f}, calibration {ready - warm:.1f}"
        log.write(f"start: {ready:.1f} s from launch to step {start} ({parts})")
        log.write(SEPARATOR, show=False)

        meter, saver = Meter(log, s.total_steps, world, elapsed), None
        if s.save_every or s.save_checkpoint:
            saver = Saver(log, trainer)
            signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stop", True))  # from now on it saves first
        train_all(trainer, start, train, val, meter, saver)
        log.write(final_report(trainer.model))


def train_all(trainer: Trainer, start: int, train: TrainLoader, val: ValLoader, meter: Meter, saver: Saver | None):
    """Every step from start on, with its validations and checkpoints; raises Terminated once all ranks stop for a SIGTERM."""
    s, log, stream = trainer.s, meter.log, train.stream(start, trainer.s.total_steps)
    profiler = Profiler(s, trainer.world, log)
    meter.start()
    for step in range(start, s.total_steps + 1):
        last = step == s.total_steps
        windows = parse_window(s, "final_window") if last else attention_windows(step, s)
        if 0 < step < s.total_steps and windows[1] != (old := attention_windows(step - 1, s)[1]):
            trainer.model.rotary.extend(old, windows[1])
        if last or (s.val_loss_every and step % s.val_loss_every == 0):
            ms = meter.stop()
            loss = trainer.validate(val.stream(), windows)
            log.write(f"step:{step}/{s.total_steps} val_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms")
            meter.check(step, loss)
            meter.start()
        if last:
            break
        profiler.before(step)
        meter.step(step + 1, trainer.train_step(step, next(stream), windows))
        if profiler.ends(step):
            meter.stop()
            profiler.write()
            meter.start()
        stopping = step + 1 >= meter.stop_after
        if saver:
            saver.check()
            if stopping or (s.save_every and (step + 1) % s.save_every == 0):
                ms = meter.stop()
                meter.start()  # at once: a save is on the clock
                saver.save(trainer, step + 1, ms)
        if stopping:
            saver.check(wait=True)
            raise Terminated(f"SIGTERM after step {step + 1}; go on with --resume={saver.path}")
    if saver:
        if s.save_checkpoint:
            saver.save(trainer, s.total_steps, ms)
        saver.check(wait=True)
        log.write(f"checkpoint: {saver.path}")


def main() -> int:
    """Parse the flags and run; returns 0. Whatever stops it ends in one line and its own exit code, 2 for a user's mistake."""
    rank, alike = os.environ.get("RANK", "0"), False
    try:
        signal.signal(signal.SIGTERM, stop_once)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background a shell has it ignored
            signal.signal(signal.SIGINT, stop_once)
        settings = parse_settings(sys.argv[1:])
        run(settings, connect(settings))
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    except UsageError as error:
        message, code = str(error), 2
    except torch.OutOfMemoryError:
        message, code = "the GPU is out of memory; raise --micro_batches, which makes the packed sequences smaller", 1
    except KeyboardInterrupt:
        message, code, alike = "stopped by Ctrl-C", 130, True
    except Terminated as error:
        message, code, alike = f"stopped by {error}", 143, True
    except RuntimeError as error:
        if not (dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))):
            raise
        message, code = "lost the other processes of this run; the one that ended first says why, and with checkpoints --resume=latest goes on", 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank != "0" and not alike:
        time.sleep(5)  # rank 0, if it stops alike, says so, and torchrun then ends this process in its sleep
    if rank == "0" or not alike:
        print(f"train_gpt.py: {'' if rank == '0' else f'rank {rank}: '}{message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # an orderly end would wait for shards still to be read, and for ranks that wait in a collective


if __name__ == "__main__":
    sys.exit(main())
