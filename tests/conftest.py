"""Without a GPU, kernels run in Triton's interpreter: the variable must be set before triton is imported."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

_dot = InterpreterBuilder.create_dot


def _widened(handle: TensorHandle) -> TensorHandle:
    """The interpreter stores bf16 as its bits in uint16, and Triton 3.7.1's multiplies those as whole numbers."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)



def _inline_asm(self, asm, constraints, values, types, pure, pack):
    """The interpreter has no PTX; of what the kernels use, this is the exact counterpart."""
    (x,), (kind,) = values, types
    found = TensorHandle({"tanh.approx.f32 $0, $1;": np.tanh}[asm](x.data), kind.scalar)
    return SimpleNamespace(get_result=lambda i: [found][i])


InterpreterBuilder.create_inline_asm = _inline_asm
_fp_to_fp = InterpreterBuilder.create_fp_to_fp


def _rounded(self, source, kind, mode):
    """The interpreter of Triton 3.7.1 loses the carry of a mantissa that it rounds up to e4m3."""
    if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.float8e4nv):
        return _fp_to_fp(self, source, kind, mode)
    return TensorHandle(torch.from_numpy(source.data).to(torch.float8_e4m3fn).view(torch.uint8).numpy(), kind.scalar)


InterpreterBuilder.create_fp_to_fp = _rounded
InterpreterBuilder.create_dot = lambda self, a, b, d, *rest: _dot(self, _widened(a), _widened(b), d, *rest)
