"""Every kernel compiles for Hopper with the Triton installed here, without a GPU, at the record's shapes.

The ptxas of Triton 3.7.1 has crashed on, or never finished, kernels that the interpreter ran well.
"""

import json
import os
import subprocess
import sys

import pytest

import train_gpt

PROGRAM = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import train_gpt as g

INTEGERS = ("T", "V", "C", "N", "K", "QUADS", "WORDS")
INTEGER_POINTERS = ("target_ptr", "tokens_ptr", "words_ptr")
E4M3 = "fp8e4nv"
FLOAT_POINTERS = (
    *("lse_ptr", "loss_ptr", "dloss_ptr", "table_ptr", "lambdas_ptr", "factor_ptr"),
)
TYPES = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(INTEGER_POINTERS, "*i32")
TYPES |= dict.fromkeys(FLOAT_POINTERS, "*fp32")
# Handles, a type a field; no type stands for no tensor.
WIDE, NARROW = "*fp32", "*bf16"
GATED = g.Attended(NARROW, NARROW, NARROW, NARROW, g.Mask("*i32", "*i32"), WIDE, NARROW, WIDE)
LAMBDAS = g.Weight(WIDE, WIDE)
MIXED = g.QKVEnd(NARROW, NARROW, NARROW, LAMBDAS, NARROW, WIDE)
GRADIENTS = g.AttentionGradients(*[NARROW] * 6, WIDE)
TYPES |= {"a": GATED, "end": MIXED, "d": GRADIENTS}
TYPES |= {"lambdas": LAMBDAS, "h": g.Normed(NARROW, "*fp8e4nv")}
UNGATED = {"a": GATED._replace(gate=None)}
PLAIN = UNGATED | {"end": g.QKVEnd(), "d": GRADIENTS._replace(gate=None, ve=None)}
WITHOUT_VE = {"end": MIXED._replace(ve=None), "d": GRADIENTS._replace(ve=None)}
IN_E4M3 = {"d": GRADIENTS._replace(**dict.fromkeys("qkv", "*fp8e4nv"))}
NORM = {"BLOCK": 1024}
ALONE = {"x0_ptr": None, "lambdas": None}
IN_BF16 = {"h": g.Normed(NARROW)}


def descriptor(kind, rows, columns):
    return f"tensordesc<{kind}[{rows}, {columns}]>"


def attention(name, handles=None, stride=3 * 768):
    BM, BN, warps, stages = g.HOPPER_TILES[name]
    keys = {"k_tiles", "v_tiles"}
    tiles = keys | {"q_tiles", "out_tiles", "dout_tiles"}
    types = {tile: descriptor("bf16", BN if tile in keys else BM, 128) for tile in tiles}
    sizes = {"H": 6} | ({} if name == "forward" else {"STRIDE": stride})
    sizes |= {"BM": BM} if name == "query" else {}
    return sizes, types | (handles or {}), warps, stages


def qkv(kind, depth, constants=None):
    BM, _, warps, stages = g.HOPPER_QKV
    types = {"h": descriptor(kind, BM, depth), "weight": descriptor(kind, 256, depth)}
    types |= dict.fromkeys(("qkv", "v_proj", "ve", "cos", "sin"), descriptor("bf16", BM, 64))
    return {"SCALE": 1.0, "H": 6} | (constants or {}), types, warps, stages


def mlp():
    BM, BN, BK, warps, stages = g.MLP_TILE
    types = {"h": descriptor(E4M3, BM, BK), "weight": descriptor(E4M3, BN, BK)}
    return {"SCALE": 1.0}, types | {"out": descriptor(E4M3, BM, BN // 2)}, warps, stages


def mlp_backward():
    BM, BN, BK, warps, stages = g.MLP_BACKWARD_TILE
    types = {"dy": descriptor(E4M3, BM, BK), "weight": descriptor(E4M3, BN, BK)}
    types |= {"hidden": descriptor(E4M3, BM, BN), "out": descriptor(E4M3, BM, BN // 2)}
    return {"SCALE": 1.0}, types, warps, stages


def transpose(constants, types):
    BM, BN, warps = g.TRANSPOSE_TILE
    return g._transpose_kernel, {"SCALE": 1.0, "BM": BM, "BN": BN} | constants, types, warps, 3


def loss_backward(constants, types):
    return g._loss_backward_kernel, {"BM": 16, "BN": 128} | constants, types, 4, 3


def mix_norm(constants, types):
    return g._mix_norm_kernel, NORM | {"SCALE": 0.0625, "ROWS": 4} | constants, types, 4, 3


KERNELS = {
    "qkv": (g._qkv_kernel, *qkv("bf16", 64)),
    "qkv fp8": (g._qkv_kernel, *qkv("fp8e4nv", 128)),
    "qkv fp8 without ve": (g._qkv_kernel, *qkv("fp8e4nv", 128, {"ve": None})),
    "forward": (g._attention_forward_kernel, *attention("forward")),
    "forward alone": (g._attention_forward_kernel, *attention("forward", UNGATED)),
    "query": (g._attention_query_kernel, *attention("query")),
    "query fp8": (g._attention_query_kernel, *attention("query", IN_E4M3)),
    "query alone": (g._attention_query_kernel, *attention("query", PLAIN, stride=768)),
    "key": (g._attention_key_kernel, *attention("key")),
    "key fp8": (g._attention_key_kernel, *attention("key", IN_E4M3)),
    "key without ve": (g._attention_key_kernel, *attention("key", WITHOUT_VE)),
    "key alone": (g._attention_key_kernel, *attention("key", PLAIN, stride=768)),
    "mlp": (g._mlp_kernel, *mlp()),
    "mlp backward": (g._mlp_backward_kernel, *mlp_backward()),
    "transpose": transpose({"out_ptr": None}, {"x_ptr": "*u8"}),
    "transpose to e4m3": transpose({}, {"out_ptr": "*fp8e4nv"}),
    "loss": (g._loss_kernel, {"EXACT": False, "BLOCK": 2048}, {}, 4, 3),
    "loss exact": (g._loss_kernel, {"EXACT": True, "BLOCK": 2048}, {}, 4, 3),
    "loss backward fp8": loss_backward({}, {"dz_ptr": "*u8"}),
    "loss backward bf16": loss_backward({"words_ptr": None}, {}),
    "mix_norm": mix_norm({}, {}),
    "mix_norm bf16": mix_norm({}, IN_BF16),
    "norm": mix_norm(ALONE, {}),
    "norm bf16": mix_norm(ALONE, IN_BF16),
    "mix_norm backward": (g._mix_norm_backward_kernel, NORM | {"ADD": True}, {}, 1, 3),
    "mix_norm backward first": (g._mix_norm_backward_kernel, NORM | {"ADD": False}, {}, 1, 3),
    "norm backward": (
        g._mix_norm_backward_kernel,
        NORM | ALONE | {"ADD": False, "dx0_ptr": None},
        {},
        1,
        3,
    ),
    "scatter": (g._scatter_add_kernel, {"BLOCK": 256}, {}, 2, 3),
}
if sys.argv[1] == "--list":
    print(json.dumps([list(KERNELS), sorted({entry[0].fn.__name__ for entry in KERNELS.values()})]))
    sys.exit()


def leaves(place, kind):
    # The (place, type) of everything in an argument's type, of which a handle's is a tuple.
    if not isinstance(kind, tuple):
        return [(place, kind)]
    return [leaf for i, each in enumerate(kind) for leaf in leaves((*place, i), each)]


def without_none(kind):
    # A handle's type as Triton takes it: what is not there is a constant.
    if isinstance(kind, tuple):
        return type(kind)(*map(without_none, kind))
    return kind or "constexpr"


def compile_kernel(kernel, constants, types, warps, stages):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else (TYPES | types).get(n, "*bf16") for n in names}
    given = [leaf for i, n in enumerate(names) for leaf in leaves((i,), signature[n])]
    absent = {place: None for place, kind in given if kind is None}
    pointers = [place for place, kind in given if kind and not kind.startswith(("tensordesc", "constexpr"))]
    source = ASTSource(
        fn=kernel,
        signature={name: without_none(kind) for name, kind in signature.items()},
        constexprs={(names.index(n),): value for n, value in constants.items()} | absent,
        attrs={place: [["tt.divisibility", 16]] for place in pointers},
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    products = compiled.asm["ptx"].count("wgmma.mma_async")
    found = {"wgmma": products, "shared": compiled.metadata.shared, "size": len(compiled.asm["cubin"])}
    return found


print(json.dumps({name: compile_kernel(*KERNELS[name]) for name in sys.argv[1:]}))
"""

# By process: to start one takes longer than to compile a kernel.
PRODUCTS = (
    ("qkv", "qkv fp8", "qkv fp8 without ve"),
    ("forward", "forward alone", "query", "query fp8", "query alone"),
    ("key", "key fp8", "key without ve", "key alone"),
    ("mlp", "mlp backward"),
)
OTHERS = (
    ("loss", "loss exact", "loss backward fp8", "loss backward bf16"),
    ("transpose", "transpose to e4m3"),
    ("mix_norm", "mix_norm bf16", "norm", "norm bf16"),
    ("mix_norm backward", "mix_norm backward first", "norm backward", "scatter"),
)


def run_program(tmp_path, *arguments):
    """What the program prints, with real Triton and a cache of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.path.dirname(train_gpt.__file__)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), *arguments]
    command = ["timeout", "--kill-after=5", "120", *command]  # ends ptxas too
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernels", PRODUCTS + OTHERS, ids=", ".join)
def test_kernels_compile_for_hopper(kernels, tmp_path):
    for name, found in run_program(tmp_path, *kernels).items():
        assert found["size"] > 1000 and found["shared"] <= 227 * 1024, name
        assert found["wgmma"] > 0 or kernels not in PRODUCTS, name  # else it is on a slower path


def test_every_kernel_is_compiled(tmp_path):
    """Each function of the script that is launched as a kernel is among them."""
    listed, functions = run_program(tmp_path, "--list")
    assert set(listed) == {name for kernels in PRODUCTS + OTHERS for name in kernels}
    kernels = [name for name in vars(train_gpt) if name.startswith("_") and name.endswith("_kernel")]
    assert functions == sorted(kernels)
