"""How far a kernel may be from the float64 product, relative to the largest output of its row; one table, with reasons."""

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
}


def allowed(dtype: str, fidelity: str) -> float:
    return TOLERANCES[dtype, fidelity][0]
