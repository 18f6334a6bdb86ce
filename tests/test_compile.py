"""Every kernel compiles for Hopper with the Triton installed here, without a GPU, at the record's shapes.

Not a formality: the ptxas of Triton 3.7.1 has crashed on, or never finished, kernels that the interpreter ran well.
"""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import train_gpt as g

TYPES = {"T": "i32", "V": "i32", "C": "i32", "QUADS": "i32", "target_ptr": "*i32", "tokens_ptr": "*i32", "first_ptr": "*i32", "last_ptr": "*i32"}
FLOATS = ("lse_ptr", "delta_ptr", "scale_ptr", "loss_ptr", "dloss_ptr", "table_ptr", "lambdas_ptr", "dlambdas_ptr", "factor_ptr")
TYPES |= {name: "*fp32" for name in FLOATS} | {"words_ptr": "*i32"}
MIX, ALONE = {"EPS": g.EPS, "BLOCK": 1024}, {"x0_ptr": None, "lambdas_ptr": None}
CAP = {"CAP": g.TANH_CAP, "SLOPE": g.TANH_SLOPE}


def tiles(name, constants=None):
    BM, BN, warps, stages = g.HOPPER_TILES[name]
    types = dict.fromkeys(("q_tiles", "out_tiles", "dout_tiles"), f"tensordesc<bf16[{BM}, 128]>") | {"kv_tiles": f"tensordesc<bf16[{BN}, 128]>"}
    return {"H": 6, "D": 128, "BM": BM, "BN": BN} | (constants or {}), types, warps, stages


def heads(kind, depth, constants=None):
    BM, _, warps, stages = g.HOPPER_HEADS
    types = {"x": f"tensordesc<{kind}[{BM}, {depth}]>", "weight": f"tensordesc<{kind}[256, {depth}]>", "K": "i32", "PROGRAMS": "i32"}
    types |= dict.fromkeys(("heads", "raw", "value", "cos_tiles", "sin_tiles"), f"tensordesc<bf16[{BM}, 64]>")
    return {"SCALE": 1.0, "EPS": g.EPS, "H": 6, "D": 128, "BM": BM, "BK": depth} | (constants or {}), types, warps, stages


def mlp(backward):
    BM, BN, BK, warps, stages = g.MLP_TILE
    (kind, BK), half = ("bf16", BK // 2) if backward else ("fp8e4nv", BK), f"[{BM}, {BN // 2}]>"
    constants = {"SCALE": 1.0, "BM": BM, "BN": BN, "BK": BK} | ({} if backward else {"hidden": None, "wide": None})
    types = {"a": f"tensordesc<{kind}[{BM}, {BK}]>", "b": f"tensordesc<{kind}[{BK}, {BN}]>" if backward else f"tensordesc<{kind}[{BN}, {BK}]>"}
    types |= {"out": f"tensordesc<{kind}" + half, "wide": "tensordesc<bf16" + half, "hidden": f"tensordesc<fp8e4nv[{BM}, {BN}]>"}
    return constants, types | dict.fromkeys(("N", "K", "PROGRAMS"), "i32"), warps, stages


KERNELS = {
    "heads": (g._heads_kernel, *heads("bf16", 64)),
    "heads fp8": (g._heads_kernel, *heads("fp8e4nv", 128)),
    "heads fp8 without value": (g._heads_kernel, *heads("fp8e4nv", 128, {"value": None})),
    "forward": (g._attention_forward_kernel, *tiles("forward")),
    "query": (g._attention_query_kernel, *tiles("query")),
    "key": (g._attention_key_kernel, *tiles("key")),
    "key without value": (g._attention_key_kernel, *tiles("key", {"value_ptr": None, "dvalue_ptr": None})),
    "mlp": (g._mlp_kernel, *mlp(False)),
    "mlp backward": (g._mlp_kernel, *mlp(True)),
    "loss": (g._loss_kernel, CAP | {"EXACT": False, "BLOCK": 2048}, {}, 4, 3),
    "loss exact": (g._loss_kernel, CAP | {"EXACT": True, "BLOCK": 2048}, {}, 4, 3),
    "loss backward fp8": (g._loss_backward_kernel, CAP | {"GAIN": 448.0, "FP8": True, "BM": 16, "BN": 128}, {"dz_ptr": "*u8"}, 4, 3),
    "loss backward bf16": (g._loss_backward_kernel, CAP | {"GAIN": 1.0, "FP8": False, "words_ptr": None, "BM": 16, "BN": 128}, {}, 4, 3),
    "mix": (g._mix_kernel, MIX | {"SCALE": 0.0625, "ROWS": 4}, {"copy_ptr": "*fp8e4nv", "W": "i32"}, 4, 3),
    "norm": (g._mix_kernel, MIX | ALONE | {"SCALE": 0.0625, "ROWS": 4}, {"copy_ptr": "*fp8e4nv", "W": "i32"}, 4, 3),
    "mix backward": (g._mix_backward_kernel, MIX | {"ADD": True}, {"W": "i32", "PROGRAMS": "i32"}, 1, 3),
    "norm backward": (g._mix_backward_kernel, MIX | ALONE | {"ADD": False, "dx0_ptr": None, "dlambdas_ptr": None}, {"W": "i32", "PROGRAMS": "i32"}, 1, 3),
    "scatter": (g._scatter_add_kernel, {"BLOCK": 256}, {}, 2, 3),
}
kernel, constants, types, warps, stages = KERNELS[sys.argv[1]]
names = kernel.arg_names
signature = {n: "constexpr" if n in constants else (TYPES | types).get(n, "*bf16") for n in names}
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and not signature[n].startswith("tensordesc")}
source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): value for n, value in constants.items()}, attrs=aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
print(json.dumps({"wgmma": compiled.asm["ptx"].count("wgmma.mma_async"), "shared": compiled.metadata.shared, "size": len(compiled.asm["cubin"])}))
"""


@pytest.mark.parametrize("kernel", ["heads", "heads fp8", "heads fp8 without value", "forward", "query", "key", "key without value", "mlp", "mlp backward", "loss", "loss exact", "loss backward fp8", "loss backward bf16", "mix", "norm", "mix backward", "norm backward", "scatter"])
def test_kernel_compiles_for_hopper(kernel, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    (tmp_path / "program.py").write_text(PROGRAM)
    command = ["timeout", "--kill-after=5", "120", sys.executable, str(tmp_path / "program.py"), kernel]  # ends ptxas too
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["size"] > 1000 and found["shared"] <= 227 * 1024
    products = ("heads", "heads fp8", "heads fp8 without value", "forward", "query", "key", "key without value", "mlp", "mlp backward")
    assert found["wgmma"] > 0 or kernel not in products  # else it is on a slower path
