"""Linear modules on the toychip."""

from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.platforms.probe import target
from bitgrain.weights import ActivationSpec, IntAffineWeight, WeightSpec


def weight_refusal(spec: WeightSpec) -> str:
    """Why the chip cannot hold such a weight; empty when it can."""
    if spec.kind != "int_affine" or spec.bits != 8:
        return "holds 8-bit integer weights only"
    if spec.granularity not in ("tensor", "channel"):
        return "multiplies with one scale per row or for all, not with one per group"
    if spec.zero != "constant":
        return "has no zero points"
    return ""


def codes_and_scale(weight: IntAffineWeight) -> dict[str, Tensor]:
    """int8 [N, K] and float32 [N]: canonical codes are unsigned, and the zero point of the symmetric ones is 128."""
    codes = (weight.codes().short() - int(weight.zero)).char()
    return {"codes": codes, "scale": weight.scale.float().flatten().expand(codes.shape[0]).contiguous()}


class WeightOnlyLinear:
    """y = x codes^T * scale, in float32; rounded once."""

    name = "toychip.int8_weights"
    rank = 40

    def __init__(self, platform: str) -> None:
        self.platform = platform

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        why = weight_refusal(problem.weight)
        if not why and not problem.activation.is_none:
            why = "does not quantize activations"
        return Refusal(why) if why else None

    def prepare(self, weight: IntAffineWeight, activation: ActivationSpec) -> Prepared:
        return Prepared(weight.shape, codes_and_scale(weight), activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        from toy_backend import chip

        y = chip.scaled_product(x.float(), prepared.tensors["codes"], prepared.tensors["scale"])
        return (y if bias is None else y + bias.float()).to(x.dtype)


class Int8Linear(WeightOnlyLinear):
    """y = (codes of x) codes^T * scale of x * scale: the scheme's own int8 activations, in integer arithmetic."""

    name = "toychip.int8_dot"
    rank = 50

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.NATIVE

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        why = weight_refusal(problem.weight) or self._input_refusal(problem.activation)
        return Refusal(why) if why else None

    def _input_refusal(self, activation: ActivationSpec) -> str:
        if "int8_dot" not in target(self.platform).features:
            return "the chip does not multiply int8 with int8"
        if activation.element != "int8" or not activation.is_plain:
            return "takes int8 activations with one scale per token or for all"
        return "" if activation.symmetric else "has no zero points of activations"

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        from toy_backend import chip

        codes, scale, _ = prepared.activation.quantize(x)
        y = chip.integer_product(codes, prepared.tensors["codes"]).float() * scale * prepared.tensors["scale"]
        return (y if bias is None else y + bias.float()).to(x.dtype)
