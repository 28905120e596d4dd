"""How far a kernel may be from the float64 product, relative to the largest output of its row; one table, with reasons."""

from __future__ import annotations

from bitgrain.kernels.base import ExpertsProblem

# one rounding of the output to its dtype is half a unit in the last place; the rest is room for float32 summation
TOLERANCES = {
    ("float32", "exact"): (2e-5, "float32 accumulation over K up to a few hundred, zero points folded through sums of x"),
    ("bfloat16", "exact"): (6e-3, "output rounded to 8 bits of mantissa: 2^-8"),
    ("float16", "exact"): (8e-4, "output rounded to 11 bits of mantissa: 2^-11"),
    ("float32", "native"): (2e-6, "integer products are exact; only scales round"),
    ("bfloat16", "native"): (6e-3, "output rounded to 8 bits of mantissa: 2^-8"),
    ("float16", "native"): (8e-4, "output rounded to 11 bits of mantissa: 2^-11"),
    ("float32", "emulated"): (2e-5, "as exact, on inputs that went through the reference's quantizer"),
    ("bfloat16", "emulated"): (6e-3, "as exact"),
    ("float16", "emulated"): (8e-4, "as exact"),
    **{(dtype, "approximate"): (5e-2, "x rounded to int8 of the largest of 32 neighbours: 2^-8 of it, added up over K") for dtype in ("float32", "bfloat16", "float16")},
}


def allowed(dtype: str, fidelity: str) -> float:
    return TOLERANCES[dtype, fidelity][0]


# between the two largest codes of a type, relative to the largest
CODE_STEPS = {
    "none": 0.0, "int8": 1 / 127, "int4": 1 / 7, "fp4_e2m1": 1 / 3, "fp4_e0m3": 1 / 7,
    "fp6_e2m3": 1 / 15, "fp6_e3m2": 1 / 7, "fp8_e4m3fn": 1 / 14, "fp8_e4m3fnuz": 1 / 15, "fp8_e5m2": 1 / 7,
}  # fmt: skip


def allowed_of_experts(problem: ExpertsProblem, fidelity: str) -> tuple[float, float]:
    """Of experts, relative to the largest of the row's terms: (as two products, a join and a sum that round; with a value rounded
    the other way between the products, which moves an input of the second one by a step of its type)."""
    own = 4 * allowed(problem.dtype, fidelity)
    return own, own + CODE_STEPS[problem.down_activation.element]


# Hadamard transforms, relative to the largest output of a row: float32 sums of up to a few thousand entries, then one rounding
HADAMARD = {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# Steps between products, of 1 + |value|: as many roundings to the dtype as torch's own operations take
STEP = {"float32": 1e-6, "bfloat16": 2.0**-7, "float16": 2.0**-10}
STEP_FACTORS = {
    "norm": 2,  # the sum of squares in another order may round the quotient the other way, then a product rounds
    "rotary": 2,  # two products and a sum
    "gate": 4,  # each operation of the activation function rounds
    "attention": 4,  # scores in 16 bits are rounded before the softmax
}
