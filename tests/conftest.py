"""Without a GPU, kernels run in Triton's interpreter: the variable must be set before triton is imported.

The tests are of train_gpt.py or, under that name, of the script that the variable SCRIPT names.
"""

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
if os.environ.get("SCRIPT"):
    # Tests find it, and start it, in a folder of its own, which goes when they end.
    _folder = tempfile.TemporaryDirectory()
    (Path(_folder.name) / "train_gpt.py").symlink_to(Path(os.environ["SCRIPT"]).resolve(strict=True))
    sys.path.insert(0, _folder.name)

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

_dot = InterpreterBuilder.create_dot


def _widened(handle: TensorHandle) -> TensorHandle:
    """The interpreter stores bf16 as its bits in uint16; Triton 3.7.1 multiplies those as whole numbers."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _bytes(*numbers):
    """The bytes of uint32 arrays, one array after the other, along a last axis."""
    return np.stack(numbers, -1).view(np.uint8)


def _half_pair(low, high):
    """Two float32 numbers as float16, in the halves of a uint32."""
    return [np.stack([low, high], -1).astype(np.float16).view(np.uint32)[..., 0]]


def _odd_bytes(a, b):
    """The odd bytes of two uint32, together in one."""
    return [np.ascontiguousarray(_bytes(a, b)[..., 1::2]).view(np.uint32)[..., 0]]


def _odd_bytes_apart(pair):
    """The odd bytes of uint32, the lower ones and the higher ones."""
    return [_bytes(pair)[..., 1], _bytes(pair)[..., 3]]


def _to_fp8(x, dtype):
    """Bytes of float32 numbers in FP8, where what is beyond its range becomes its largest number."""
    largest = torch.finfo(dtype).max
    return torch.from_numpy(x).clamp(-largest, largest).to(dtype).view(torch.uint8).numpy()


def _word(dtype, *numbers):
    """Four float32 numbers in FP8 as the bytes of a uint32."""
    return [_to_fp8(np.stack(numbers, -1), dtype).view(np.uint32)[..., 0]]


# The interpreter has no PTX: these are the exact counterparts of what the kernels use; others are a KeyError.
_ASM = {
    "tanh.approx.f32 $0, $1;": lambda x: [np.tanh(x)],
    "cvt.rn.f16x2.f32 $0, $2, $1;": _half_pair,
    "prmt.b32 $0, $1, $2, 0x7531;": _odd_bytes,
    "{ .reg .b32 a, b; prmt.b32 a, $2, $3, 0x7351; prmt.b32 b, $4, $5, 0x7351;"
    " prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; }": _odd_bytes_apart,
}
for kind, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
    word = (
        f"{{ .reg .b16 low, high; cvt.rn.satfinite.{kind}x2.f32 low, $2, $1;"
        f" cvt.rn.satfinite.{kind}x2.f32 high, $4, $3; mov.b32 $0, {{low, high}}; }}"
    )
    _ASM[word] = partial(_word, dtype)


def _inline_asm(self, asm, constraints, values, types, pure, pack):
    found = [
        TensorHandle(data, kind.scalar)
        for data, kind in zip(_ASM[asm](*(value.data for value in values)), types, strict=True)
    ]
    return SimpleNamespace(get_result=lambda i: found[i])


InterpreterBuilder.create_inline_asm = _inline_asm
_fp_to_fp = InterpreterBuilder.create_fp_to_fp


def _rounded(self, source, kind, mode):
    """To FP8 as a GPU does it: the interpreter of Triton 3.7.1 loses the carry of a mantissa rounded up."""
    dtypes = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    if source.dtype.scalar != tl.float32 or kind.scalar not in dtypes:
        return _fp_to_fp(self, source, kind, mode)
    return TensorHandle(_to_fp8(source.data, dtypes[kind.scalar]), kind.scalar)


InterpreterBuilder.create_fp_to_fp = _rounded
InterpreterBuilder.create_dot = lambda self, a, b, d, *rest: _dot(self, _widened(a), _widened(b), d, *rest)
_scaled_mm = torch._scaled_mm


def _as_on_a_gpu(a, b, *rest, **options):
    """A GPU's product in FP8 asks for contiguous rows of a and columns of b, of whole 16 bytes."""
    assert a.stride(1) == 1 and b.stride(0) == 1 and not (a.size(1) % 16 or b.size(1) % 16)
    return _scaled_mm(a, b, *rest, **options)


if not torch.cuda.is_available():
    torch._scaled_mm = _as_on_a_gpu


def pytest_collection_modifyitems(items):
    """The longest tests first, so that workers that share tests out end together."""
    items.sort(key=lambda item: item.path.name != "test_worlds.py")
