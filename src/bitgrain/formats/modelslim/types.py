"""The type strings of a description file, taken apart: what a weight is, how its input is quantized, and which marks it has.

    W8A8  W8A8S  W8A8_MIX  W8A8_DYNAMIC  W8A16  W4A16  W4A8_DYNAMIC  W4A4_DYNAMIC      integers
    WFP8AFP8_DYNAMIC  W8A8_MXFP8  W4A8_MXFP  W4A4_MXFP4  W4A4_MXFP4_DUALSCALE          small floats
    FLOAT  W16A16S                                                                     dense
Two marks may stand anywhere after the first word: FLATQUANT (the input is transformed first) and SVD (a low-rank correction
is added), as in W4A4_FLATQUANT_DYNAMIC or W4A4_MXFP4_SVD.

Dynamic integer inputs are symmetric per token, the largest magnitude at 127 or 7.  MX inputs have blocks of 32; the power of
two is OCP's for e4m3, and for e2m1 the one after the peak was rounded to the type (the producer's quantizer divides the peak
by 7/8 first, which is the same).
Source: formats specification, part 2, sections 2.2 and 2.3; msmodelslim 26.1.0 ir/ and saver (formulas).
"""

from __future__ import annotations

from dataclasses import dataclass

from bitgrain.weights import NO_ACTIVATION, ActivationSpec

MARKS = ("FLATQUANT", "SVD")

DYNAMIC_INT8 = ActivationSpec("int8", "token", top=127.0)
DYNAMIC_INT4 = ActivationSpec("int4", "token", top=7.0)
STATIC_INT8 = ActivationSpec("int8", "tensor", symmetric=False, dynamic=False)
DYNAMIC_FP8 = ActivationSpec("fp8_e4m3fn", "token")
MXFP8 = ActivationSpec("fp8_e4m3fn", "group", 32, scale_type="e8m0", exponent_rule="floor")
MXFP4 = ActivationSpec("fp4_e2m1", "group", 32, scale_type="e8m0", exponent_rule="round")


@dataclass(frozen=True, slots=True)
class WeightType:
    """What a type string says without its marks.

    Args:
        storage:    "dense", "int", "static" (int8 with the scale of its static input folded in), "float8", "mx" or "dual"
                    (mx with a second scale).
        bits:       of a weight.
        activation: of the input.
        may_shift:  "int": zero points may be other than zero.
        both:       "static": scales of the weight alone are stored too, and the input is quantized dynamically.
    """

    storage: str
    bits: int
    activation: ActivationSpec
    may_shift: bool = False
    both: bool = False


TYPES = {
    "FLOAT": WeightType("dense", 16, NO_ACTIVATION),
    # zeros among ordinary 16-bit values: the producer's own layer is a plain product
    "W16A16S": WeightType("dense", 16, NO_ACTIVATION),
    "W8A8": WeightType("static", 8, STATIC_INT8),
    "W8A8S": WeightType("static", 8, STATIC_INT8),
    "W8A8_MIX": WeightType("static", 8, DYNAMIC_INT8, both=True),
    "W8A8_DYNAMIC": WeightType("int", 8, DYNAMIC_INT8),
    "W8A16": WeightType("int", 8, NO_ACTIVATION, may_shift=True),
    "W4A16": WeightType("int", 4, NO_ACTIVATION, may_shift=True),
    "W4A8_DYNAMIC": WeightType("int", 4, DYNAMIC_INT8),
    "W4A4_DYNAMIC": WeightType("int", 4, DYNAMIC_INT4, may_shift=True),
    "WFP8AFP8_DYNAMIC": WeightType("float8", 8, DYNAMIC_FP8),
    "W8A8_MXFP8": WeightType("mx", 8, MXFP8),
    "W4A8_MXFP": WeightType("mx", 4, MXFP8),
    "W4A4_MXFP4": WeightType("mx", 4, MXFP4),
    "W4A4_MXFP4_DUALSCALE": WeightType("dual", 4, MXFP4),
}

# Types that are known and cannot be run, with the reason.
REFUSED = {
    "W8A8SC": "weights compressed by a tool whose decompressor is not public",
    "W16A16SC": "weights compressed by a tool whose decompressor is not public",
    "W8A8_TIMESTEP": "input scales per step of a diffusion process, which a language model does not have",
    "NF4": "codes whose block maxima the producer does not store",
}
# Types of tensors that are not weights of a module.
OTHER_TYPES = ("C8", "FAQuant")


def split_type(text: str) -> tuple[str, frozenset[str]]:
    """(type without marks, its marks)."""
    words = text.split("_")
    marks = frozenset(words).intersection(MARKS)
    return "_".join(w for w in words if w not in marks), marks


def type_problem(text: str) -> tuple[str, str] | None:
    """(what is wrong, what to do) of a type string that cannot be used; None if it can."""
    base, _ = split_type(text)
    if base in TYPES or text in OTHER_TYPES:
        return None
    if base in REFUSED:
        return f"{text!r}: {REFUSED[base]}", "write the checkpoint again with another type for these modules"
    return repr(text), "correct the description, or update bitgrain if the writer is newer"
