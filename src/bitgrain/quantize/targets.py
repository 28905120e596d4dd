"""The names under which a run asks for a quantized weight, and what each means."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitgrain.errors import RequestError
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.codebook import codebook_spec

_INT8 = WeightSpec("int_affine", "uint8", 8, "channel", zero="constant", scale_dtype="float32")
_INT4 = WeightSpec("int_affine", "uint4", 4, "group", 128, zero="integer", scale_dtype="float32")
_INT4_ROWS = WeightSpec("int_affine", "uint4", 4, "group", 128, zero="constant", scale_dtype="float32")
_FP8 = WeightSpec("float", "fp8_e4m3fn", 8, "channel", scale_dtype="float32")
_FP8_BLOCK = replace(_FP8, granularity="block", block=(128, 128))
_MXFP8 = block_float_spec("fp8_e4m3fn", 32, "e8m0")
_MXFP6 = block_float_spec("fp6_e2m3", 32, "e8m0")
_MXFP4 = block_float_spec("fp4_e2m1", 32, "e8m0")
_NVFP4 = block_float_spec("fp4_e2m1", 16, "e4m3", "tensor")

_TO_MXFP8 = ActivationSpec("fp8_e4m3fn", "group", 32, scale_type="e8m0", exponent_rule="ceil")
_TO_MXFP4 = replace(_TO_MXFP8, element="fp4_e2m1", exponent_rule="even")
_TO_NVFP4 = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="dynamic")


@dataclass(frozen=True, slots=True)
class Target:
    """What one name asks for.

    Args:
        weight:     spec of the quantized weight; group and block sizes are upper bounds, the last ones may be short.
        activation: quantization of the module's input.
    """

    name: str
    weight: WeightSpec
    activation: ActivationSpec
    meaning: str


def _named(name: str, weight: WeightSpec, activation: ActivationSpec, meaning: str) -> Target:
    return Target(name, weight, activation, meaning)


TARGETS = {
    t.name: t
    for t in (
        _named("int8", _INT8, ActivationSpec("int8", "token"), "int8 weights per channel, int8 activations per token"),
        _named("int8-a16", _INT8, NO_ACTIVATION, "int8 weights per channel"),
        _named("int4", _INT4, NO_ACTIVATION, "int4 weights in groups of 128 with zero points"),
        _named("int4-a8", _INT4_ROWS, ActivationSpec("int8", "token"), "symmetric int4 weights in groups of 128, int8 activations per token"),
        _named("fp8", _FP8, ActivationSpec("fp8_e4m3fn", "token"), "E4M3 weights per channel, E4M3 activations per token"),
        _named("fp8-a16", _FP8, NO_ACTIVATION, "E4M3 weights per channel"),
        _named("fp8-block", _FP8_BLOCK, ActivationSpec("fp8_e4m3fn", "group", 128), "E4M3 weights in 128 x 128 blocks, E4M3 activations per token and 128 columns"),
        _named("mxfp8", _MXFP8, _TO_MXFP8, "MXFP8 weights and activations"),
        _named("mxfp8-a16", _MXFP8, NO_ACTIVATION, "MXFP8 weights"),
        _named("mxfp6", _MXFP6, NO_ACTIVATION, "MXFP6 (E2M3) weights"),
        _named("mxfp4", _MXFP4, NO_ACTIVATION, "MXFP4 weights"),
        _named("mxfp4-a8", _MXFP4, _TO_MXFP8, "MXFP4 weights, MXFP8 activations"),
        _named("mxfp4-a4", _MXFP4, _TO_MXFP4, "MXFP4 weights and activations"),
        _named("nvfp4", _NVFP4, NO_ACTIVATION, "NVFP4 weights"),
        _named("nvfp4-a4", _NVFP4, _TO_NVFP4, "NVFP4 weights and activations"),
        _named("nf4", codebook_spec(4, 64), NO_ACTIVATION, "NF4 weights in groups of 64"),
    )
}
DENSE_WORDS = ("none", "16bit", "dense")


def find_target(name: str) -> Target | None:
    """The target of a name in any spelling of dashes, underscores and case; None if there is none."""
    return TARGETS.get(name.lower().replace("_", "-"))


def require_target(where: str, name: str) -> Target | None:
    """As find_target; None for the words that mean "leave it in 16 bits".

    Raises:
        RequestError: the name is neither.
    """
    target = find_target(name)
    if target is None and name.lower() not in DENSE_WORDS:
        raise RequestError(where, repr(name), f"one of {', '.join(TARGETS)}, or none", "choose one of them")
    return target
