"""Arguments that a group may name instead of writing them out.

Source: compressed-tensors 0.17 to 0.20 quantization/quant_scheme.py (names and values, written anew).
"""

from __future__ import annotations

from dataclasses import replace

from bitgrain.formats.compressed_tensors.arguments import QuantizationArgs

Pair = tuple[QuantizationArgs | None, QuantizationArgs | None]

_INT8_TOKEN = QuantizationArgs(8, strategy="token", dynamic=True)
_INT4_TOKEN = replace(_INT8_TOKEN, num_bits=4)
_FP8_TOKEN = replace(_INT8_TOKEN, type="float")
_FP8_TENSOR = QuantizationArgs(8, "float")
_FP8_GROUP = QuantizationArgs(8, "float", strategy="group", group_size=128, dynamic=True)
_NVFP4 = QuantizationArgs(4, "float", strategy="tensor_group", group_size=16, scale_type="e4m3")


def _int_groups(bits: int, symmetric: bool = True) -> QuantizationArgs:
    return QuantizationArgs(bits, "int", symmetric, "group", 128)


def _powers(bits: int, dynamic: bool = False) -> QuantizationArgs:
    return QuantizationArgs(bits, "float", strategy="group", group_size=32, dynamic=dynamic, scale_type="e8m0")


# Preset name to (weights, input_activations).
PRESETS: dict[str, Pair] = {
    "UNQUANTIZED": (None, None),
    **{f"W{bits}A16": (_int_groups(bits), None) for bits in range(2, 9)},
    **{f"W{bits}A8": (_int_groups(bits), _INT8_TOKEN) for bits in range(2, 8)},
    **{f"W{bits}A4": (_int_groups(bits), _INT4_TOKEN) for bits in range(2, 5)},
    "W4A16_ASYM": (_int_groups(4, symmetric=False), None),
    "W8A8": (QuantizationArgs(8, "int", strategy="channel"), _INT8_TOKEN),
    "INT8": (QuantizationArgs(8, "int", strategy="channel"), _INT8_TOKEN),
    "W4AFP8": (_int_groups(4), _FP8_TOKEN),
    "FP8": (_FP8_TENSOR, _FP8_TENSOR),
    "FP8_DYNAMIC": (QuantizationArgs(8, "float", strategy="channel"), _FP8_TOKEN),
    "FP8_BLOCK": (QuantizationArgs(8, "float", strategy="block", block=(128, 128)), _FP8_GROUP),
    "NVFP4A16": (_NVFP4, None),
    "NVFP4": (_NVFP4, replace(_NVFP4, dynamic=True, local=True)),
    "MXFP4A16": (_powers(4), None),
    "MXFP4": (_powers(4), _powers(4, dynamic=True)),
    "MXFP4XFP8": (_powers(4), _FP8_GROUP),
    "MXFP6A16": (_powers(6), None),
    "MXFP6A8": (_powers(6), _powers(8, dynamic=True)),
    "MXFP8A16": (_powers(8), None),
    "MXFP8": (_powers(8), _powers(8, dynamic=True)),
}
