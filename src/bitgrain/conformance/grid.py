"""The specs, activations and shapes over which every registered kernel is held against the definition."""

from __future__ import annotations

from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec
from bitgrain.weights.additive import additive_spec
from bitgrain.weights.block_float import ELEMENT_BITS, block_float_spec
from bitgrain.weights.codebook import codebook_spec
from bitgrain.weights.lattice import lattice_spec
from bitgrain.weights.super_block import super_block_spec
from bitgrain.weights.trellis import trellis_spec
from bitgrain.weights.vector_codebook import VectorSizes, vector_spec


def int_affine(bits: int, granularity: str, group: int = 0, zero: str = "constant", index: bool = False, scale: str = "float16") -> WeightSpec:
    return WeightSpec("int_affine", f"uint{bits}", bits, granularity, group, zero=zero, group_index=index, scale_dtype=scale)


def float8(element: str, granularity: str, block: tuple[int, int] = (0, 0)) -> WeightSpec:
    return WeightSpec("float", element, 8, granularity, block=block, scale_dtype="float32")


WEIGHTS = [
    *(WeightSpec("dense", d, 32 if d == "float32" else 16) for d in ("bfloat16", "float16", "float32")),
    # every width once, symmetric; then each property on 4 and 8 bits
    *(int_affine(bits, "group", 32) for bits in range(1, 9)),
    *(int_affine(bits, "group", 32, zero) for bits in (3, 4, 8) for zero in ("integer", "float")),
    *(int_affine(bits, granularity, scale=scale) for bits in (4, 8) for granularity, scale in (("channel", "bfloat16"), ("tensor", "float32"))),
    *(int_affine(bits, "group", 32, "integer", index=True) for bits in (4, 8)),
    int_affine(4, "group", 12, "integer"),  # groups that no vector width divides
    int_affine(4, "group", 128, scale="float32"),
    *(int_affine(4, "group", 128, zero) for zero in ("constant", "integer")),
    *(float8(e, g, b) for e in ("fp8_e4m3fn", "fp8_e5m2") for g, b in (("tensor", (0, 0)), ("channel", (0, 0)), ("block", (128, 128)), ("block", (16, 24)))),
    float8("fp8_e4m3fnuz", "channel"),
    *(block_float_spec(element, 32, "e8m0") for element in ELEMENT_BITS),
    *(block_float_spec("fp4_e2m1", 16, scale, second) for scale, second in (("e4m3", "tensor"), ("e4m3", "channel"), ("e4m3", "group"), ("e5m3", "none"))),
    codebook_spec(4, 64),
    codebook_spec(4, 0, "bfloat16"),
    WeightSpec("int_affine", "uint4", 4, "group", 1, zero="float", scale_dtype="float32", row_index=True),
]
# one of each way to decode: a product and a sum, sub-block scales with and without minima, tables with signs, base-3 digits
SUPER_BLOCKS = [super_block_spec(kind) for kind in ("Q4_1", "Q4_K", "Q6_K", "IQ2_XXS", "IQ1_M", "IQ4_XS", "TQ1_0")]
# lattice points of each width; trellises of each decoder, in both orders
CODES = [
    *(lattice_spec(bits) for bits in (2, 3, 4)),
    *(trellis_spec(bits, decoder, 16, 1) for bits, decoder in ((3, "1mad"), (4, "2mad"), (2, "3inst"))),
    trellis_spec(2, "lut", 10, 2, 10),
    trellis_spec(3, "quantlut", 16, 1, 7),
    *(trellis_spec(bits, "quantlut_sym", 16, 2, 9, "fragments") for bits in (2, 3, 4)),
    # sums of codebooks: one and several, one and two rows per code; vectors with residuals, outlier columns, groups
    additive_spec(1, 16, (1, 8), "float16"),
    additive_spec(2, 8, (1, 8), "float32"),
    additive_spec(4, 8, (2, 8), "bfloat16"),
    vector_spec(VectorSizes(8, 4096, 256), "float16", zero=True),
    vector_spec(VectorSizes(8, 256, 16, 2, 4, 64), "float16", zero=True),
    vector_spec(VectorSizes(4, 500)),
]
# weights that come in blocks, and so in sizes of their own
BLOCKED = [*SUPER_BLOCKS, *CODES]
ACTIVATIONS = [
    NO_ACTIVATION,
    ActivationSpec("int8", "token"),
    ActivationSpec("int8", "token", top=127.0),
    ActivationSpec("int8", "token", symmetric=False),
    ActivationSpec("int8", "tensor"),
    ActivationSpec("int8", "tensor", dynamic=False, scale=0.03),
    ActivationSpec("int8", "tensor", symmetric=False, dynamic=False, scale=0.031, zero=-7),
    ActivationSpec("fp8_e4m3fn", "token"),
    ActivationSpec("fp8_e4m3fn", "group", group_size=32),
    ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False, scale=0.01),
    ActivationSpec("int4", "token", top=7.0),
    ActivationSpec("int4", "token", top=7.0, clipped=True, clip=0.9),
    ActivationSpec("int8", "token", top=127.0, outlier_threshold=2.0),
    ActivationSpec("fp8_e4m3fn", "group", 32, scale_type="e8m0", exponent_rule="floor"),
    ActivationSpec("fp4_e2m1", "group", 32, scale_type="e8m0", exponent_rule="floor"),
    ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="static", second=0.002),
]
DTYPES = ["float32", "bfloat16", "float16"]
# (M, N, K): one row, few rows, a full tile and a tail; sizes that are and are not multiples of panels, units and groups
SHAPES = [(1, 64, 128), (3, 37, 100), (17, 80, 264)]
# of kernels that take none of these: multiples of what vendors' tiles ask for
LARGE = (5, 256, 512)


def shapes_of(spec: WeightSpec) -> list[tuple[int, int, int]]:
    """SHAPES, with N and K rounded up to multiples of the block where a type has no shorter one."""
    rows, columns = steps_of(spec)
    return [(m, -(-n // rows) * rows, -(-k // columns) * columns) for m, n, k in SHAPES]


def steps_of(spec: WeightSpec) -> tuple[int, int]:
    """What N and K are multiples of in weights of a spec."""
    return {"super_block": (1, spec.group_size), "lattice": (1, 8), "trellis": (16, 16), "additive": (2, 8)}.get(spec.kind, (1, 1))


# Experts: (M, per token, hidden, size): one token, few tokens with ragged sizes, many tokens
EXPERT_SHAPES = [(1, 2, 128, 64), (5, 3, 100, 36), (40, 2, 136, 72)]
LARGE_EXPERTS = (5, 2, 256, 256)
EXPERT_COUNT = 5
JOINS = ["silu", "clamped(1.702, 7)", "gelu_new"]
# (entries per block, order of the base): powers of two below, at and above a vector; bases times powers of two
HADAMARDS = [(1, 1), (2, 1), (4, 1), (8, 1), (64, 1), (128, 1), (4096, 1), (12, 12), (24, 12), (48, 12), (96, 12), (20 * 16, 20), (28 * 64, 28), (172 * 4, 172)]
# (rows, blocks)
HADAMARD_ROWS = [(1, 1), (5, 3), (64, 1), (0, 1)]
NORMS = [(1, 64), (3, 255), (2, 2048), (130, 1000), (0, 16)]
# (tokens, heads, entries of a head, entries that turn)
ROTARIES = [(1, 1, 64, 64), (7, 5, 128, 32), (7, 3, 6, 6), (3, 2, 576, 64), (0, 2, 64, 64)]
GATES = ["silu", "gelu", "gelu_new", "relu", "clamped(1.702, 7)"]
# (M, K)
GATE_SHAPES = [(1, 64), (5, 1201), (0, 16)]
# (tokens asked, tokens in the cache, heads, groups, entries of a head, entries of a value)
ATTENTIONS = [(1, 1, 4, 4, 16, 16), (1, 37, 8, 2, 64, 64), (3, 40, 6, 3, 24, 24), (8, 300, 4, 1, 96, 96), (2, 20, 4, 2, 48, 32), (33, 33, 4, 2, 32, 32), (17, 50, 2, 2, 64, 64)]
