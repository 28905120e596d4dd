"""Small floats in blocks: NVFP4, MXFP4, MXFP6 and MXFP8 as compressed-tensors stores them.

    weight_packed        uint8 [N, K * bits / 8], low bits first along K; one byte per element is `weight` float8_e4m3fn [N, K]
    weight_scale         float8_e4m3fn or uint8 (powers of two) [N, K / block]
    weight_global_scale  float32 [1], the reciprocal of the second scale; input_global_scale likewise for inputs
"""

from __future__ import annotations

from bitgrain.formats.block_float import BlockFloatScheme
from bitgrain.formats.compressed_tensors.arguments import QuantizationArgs
from bitgrain.weights import ActivationSpec

ELEMENTS = {4: "fp4_e2m1", 6: "fp6_e2m3", 8: "fp8_e4m3fn"}


def block_float_scheme(args: QuantizationArgs, shape: tuple[int, int], activation: ActivationSpec) -> BlockFloatScheme:
    """The scheme of a block-scaled weight; its activation keeps the stored divisor as a divisor."""
    return BlockFloatScheme(
        shape,
        ELEMENTS[args.num_bits],
        args.group_size,
        args.scale_type,
        activation,
        weight_name="weight_packed" if args.num_bits < 8 else "weight",
        second_name="weight_global_scale" if args.second_scaled else "",
        second_divides=True,
        input_name="input_global_scale" if activation.second_scale == "static" else "input_scale",
    )
