"""What each `quant_algo` means: how the weight is stored and how the input is quantized.

Source: formats specification, section 6; ModelOpt 0.47 export/quant_utils.py and the presets of its recipes.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitgrain.weights import NO_ACTIVATION, ActivationSpec

FP8 = "fp8_e4m3fn"
E2M1 = "fp4_e2m1"
STATIC_FP8 = ActivationSpec(FP8, "tensor", dynamic=False)
DYNAMIC_FP8 = ActivationSpec(FP8, "tensor")
# The scale of a block is rounded up to a power of two, so that no value is beyond the element's range.
MX_FP4 = ActivationSpec(E2M1, "group", 32, scale_type="e8m0", exponent_rule="ceil")
MX_FP8 = ActivationSpec(FP8, "group", 32, scale_type="e8m0", exponent_rule="ceil")


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One quantization algorithm.

    Args:
        storage:   "float8", "int8", "int4", "fp4_e4m3", "fp4_e8m0" or "fp8_e8m0": the weight's codes and their scales.
        strategy:  what shares a scale: "tensor", "channel", "block" (two-dimensional) or "group".
        group:     columns per scale, or rows and columns, unless the configuration says otherwise; 0 for none.
        activation: of the input; of "group" granularity the group follows the weight's.
        scaled:    the input may be multiplied by a stored `pre_quant_scale` first.
        second:    a `weight_scale_2` is stored.
        low_rank:  a low-rank correction is stored.
        dynamic_activation: of modules that store no input scale; None: they must store one if `activation` is static.
    """

    storage: str
    strategy: str
    group: int = 0
    activation: ActivationSpec = NO_ACTIVATION
    scaled: bool = False
    second: bool = False
    low_rank: bool = False
    dynamic_activation: ActivationSpec | None = None


def nvfp4_activation(group: int) -> ActivationSpec:
    """E2M1 in blocks: scale e4m3(amax / (6 * input_scale)) below the stored input_scale."""
    return ActivationSpec(E2M1, "group", group, scale_type="e4m3", second_scale="static")


ALGORITHMS = {
    "FP8": Algorithm("float8", "tensor", activation=STATIC_FP8),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm("float8", "channel", activation=ActivationSpec(FP8, "token")),
    "FP8_PB_WO": Algorithm("float8", "block", 128),
    "FP8_PB_REAL": Algorithm("float8", "block", 128),
    "NVFP4": Algorithm("fp4_e4m3", "group", 16, nvfp4_activation(16), second=True),
    "W4A16_NVFP4": Algorithm("fp4_e4m3", "group", 16, second=True),
    "NVFP4_AWQ": Algorithm("fp4_e4m3", "group", 16, nvfp4_activation(16), scaled=True, second=True),
    "NVFP4_SVD": Algorithm("fp4_e4m3", "group", 16, nvfp4_activation(16), scaled=True, second=True, low_rank=True),
    "W4A8_NVFP4_FP8": Algorithm("fp4_e4m3", "group", 32, STATIC_FP8, second=True),
    "MXFP4": Algorithm("fp4_e8m0", "group", 32, MX_FP4),
    "W4A8_MXFP4_FP8": Algorithm("fp4_e8m0", "group", 32, STATIC_FP8, dynamic_activation=DYNAMIC_FP8),
    "MXFP8": Algorithm("fp8_e8m0", "group", 32, MX_FP8),
    "W4A16_AWQ": Algorithm("int4", "group", 128, scaled=True),
    "W4A8_AWQ": Algorithm("int4", "group", 128, STATIC_FP8, scaled=True, second=True),
    "W8A8_SQ_PER_CHANNEL": Algorithm("int8", "channel", activation=ActivationSpec("int8", "tensor", dynamic=False), scaled=True),
    "W8A16": Algorithm("int8", "channel"),
}

# The names that the tool itself uses for its algorithms, which appear where it has no public one.
_INTERNAL = {
    "FP8_PC_PT": "FP8_PER_CHANNEL_PER_TOKEN",
    "NVFP4_STATIC": "NVFP4",
    "NVFP4_SVDQUANT": "NVFP4_SVD",
    "INT4_AWQ": "W4A16_AWQ",
    "INT8_SQ": "W8A8_SQ_PER_CHANNEL",
    "INT8_WO": "W8A16",
}

MIXED = "MIXED_PRECISION"

# KV-cache algorithm to the element type of the cache; an affine one stores biases too.
CACHES = {"FP8": "fp8_e4m3fn", "NVFP4": "nvfp4", "NVFP4_AFFINE": "nvfp4", "INT8": "int8"}


def algorithm_name(word: str) -> str:
    """The key of ALGORITHMS (or MIXED) that a word of the configuration stands for; the word itself, in capitals, if none."""
    upper = word.upper()
    return _INTERNAL.get(upper, upper)
