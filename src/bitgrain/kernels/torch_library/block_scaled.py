"""Small floats in blocks on both sides through torch's scaled product, on devices that multiply them so."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import LinearProblem, Prepared
from bitgrain.kernels.torch_library import contracts
from bitgrain.kernels.torch_library.operators import TorchLinear, finished, operator
from bitgrain.kernels.triton import availability
from bitgrain.numerics.bitpack import pack_dense
from bitgrain.numerics.block_scales import encode_block_scale
from bitgrain.platforms.probe import target
from bitgrain.weights import ActivationSpec, BlockFloatWeight, Weight

# (element, block, type of scales) that the operator multiplies by itself, and the dtypes that it knows them by
TAKEN = {
    ("fp4_e2m1", 16, "e4m3"): (torch.float4_e2m1fn_x2, torch.float8_e4m3fn) if hasattr(torch, "float4_e2m1fn_x2") else None,
    ("fp8_e4m3fn", 32, "e8m0"): (torch.float8_e4m3fn, torch.float8_e8m0fnu) if hasattr(torch, "float8_e8m0fnu") else None,
}
STEP = 32


class BlockScaledLinear(TorchLinear):
    """y = t_x t_w (sum over blocks of s_x s_w (q_x . q_w)) + b: blocks in the device's own products, second scales t afterwards in float32.

    Only where the layout of scales is one and known: not on HIP, whose libraries changed it between versions.
    """

    name = "torch.block_scaled"
    rank = 50
    operator = "_scaled_mm"

    def _problem(self, problem: LinearProblem) -> str:
        spec, act = problem.weight, problem.activation
        if "scaled_dot" not in target(self.platform).features:
            return "the device does not multiply blocks with scales"
        if spec.kind != "block_float" or TAKEN.get((spec.element, spec.group_size, spec.scale_dtype)) is None:
            return f"takes fp4_e2m1 in blocks of 16 with e4m3 scales and fp8_e4m3fn in blocks of 32 with e8m0 scales, not {spec.describe()}"
        if (act.element, act.group_size, act.scale_type) != (spec.element, spec.group_size, spec.scale_dtype) or act.granularity != "group":
            return f"takes activations in the blocks of the weight, not {act.describe()}"
        if spec.second_scale == "group" or act.second_scale not in ("none", "static") or act.clipped or act.outlier_threshold is not None:
            return "takes second scales per tensor or channel of the weight and stored ones of activations, no clipping or outliers"
        if problem.dtype == "float32":
            return "adds up with fewer bits than float32 outputs hold"
        if problem.n % STEP or problem.k % STEP:
            return f"takes N and K that are multiples of {STEP}, not {problem.n} and {problem.k}"
        return ""

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, BlockFloatWeight)  # _problem() asked for the kind
        codes, scales = _dtypes(weight.element)
        tensors = {"codes": weight.packed.view(codes), "scale": placed(weight.scale).view(scales)}
        factor = torch.ones(1, 1, device=weight.packed.device) if weight.second is None else weight.second.reshape(1, -1)
        if activation.second is not None:
            factor = factor / activation.second if activation.second_divides else factor * activation.second
        if weight.second is not None or activation.second is not None:
            tensors["factor"] = factor
        return Prepared(weight.shape, tensors, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        held, act, n = prepared.tensors, prepared.activation, prepared.shape[0]
        if x.shape[0] == 0:
            return x.new_zeros(0, n)
        codes, scale = self._quantized(x, act)
        product = operator(x, "_scaled_mm", contracts.scaled_mm)
        if "factor" not in held:
            return product(codes, held["codes"].t(), scale, held["scale"], bias=bias, out_dtype=x.dtype, use_fast_accum=False)
        sums = product(codes, held["codes"].t(), scale, held["scale"], out_dtype=torch.float32, use_fast_accum=False)
        return finished(sums * held["factor"], bias, x.dtype)

    def _quantized(self, x: Tensor, act: ActivationSpec) -> tuple[Tensor, Tensor]:
        """(codes, scales below the second one in the operator's order) of x."""
        wide, narrow = _dtypes(act.element)
        if x.device.type != "cpu" and not availability.missing(self.platform):
            from bitgrain.kernels.triton.activation_quantization import block_codes

            found = block_codes(act, x)
            return found.codes.view(wide), placed(found.scale).view(narrow)
        values, scale, _ = act.quantize(x)
        if act.second is not None:
            scale = scale * act.second if act.second_divides else scale / act.second
        # rounding again gives back the scale that was rounded before it met the second one
        scales = placed(encode_block_scale(scale, act.scale_type)).view(narrow)
        if act.element == "fp4_e2m1":
            return pack_dense(_e2m1(values), 4).view(wide), scales
        return values.to(wide), scales


def _dtypes(element: str) -> tuple[torch.dtype, torch.dtype]:
    found = next(dtypes for (name, _, _), dtypes in TAKEN.items() if name == element)
    assert found is not None  # _problem() asked for it
    return found


def _e2m1(values: Tensor) -> Tensor:
    """uint8 codes of values that the type holds; nothing is asked of the device, as numerics.encode does to find NaN.

    Twice the magnitudes are 0, 1, 2, 3, 4, 6, 8 and 12.
    """
    twice = (values.abs() * 2).to(torch.uint8)
    magnitude = twice - (twice > 4).to(torch.uint8) - (twice > 6).to(torch.uint8) - 3 * (twice > 8).to(torch.uint8)
    return magnitude | (torch.signbit(values).to(torch.uint8) << 3)


def placed(scale: Tensor) -> Tensor:
    """uint8 scales [R, G] in the operator's order, padded with zeros to whole tiles."""
    rows, blocks = scale.shape
    padded = torch.nn.functional.pad(scale, (0, -blocks % contracts.TILE_BLOCKS, 0, -rows % contracts.TILE_ROWS))
    return padded.flatten()[contracts.block_scale_order(padded.shape[0], padded.shape[1], scale.device)]
