"""A backend of its own distribution: a chip with one kernel; docs/add-a-kernel.md explains it.

The chip multiplies signed 8-bit weights with one scale per tensor or channel, and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.platforms.base import Platform, PlatformProbe, ProbeReport
from bitgrain.weights import ActivationSpec, IntAffineWeight


class ToyLinear:
    """y = x codes^T * scale, codes int8."""

    name = "toychip.int8"
    rank = 50
    calls = 0

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        spec = problem.weight
        if spec.kind != "int_affine" or spec.bits != 8 or spec.granularity not in ("tensor", "channel"):
            return Refusal("the chip multiplies 8-bit integer weights with a scale per tensor or channel only")
        if spec.zero != "constant":
            return Refusal("the chip has no zero points")
        if not problem.activation.is_none:
            return Refusal("the chip does not quantize its input")
        return None

    def prepare(self, weight: IntAffineWeight, activation: ActivationSpec) -> Prepared:
        codes = weight.codes().to(torch.int16).sub_(int(weight.zero)).to(torch.int8)
        return Prepared(weight.shape, {"codes": codes, "scale": weight.scale.float()}, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        type(self).calls += 1
        y = torch.nn.functional.linear(x.float(), prepared.tensors["codes"].float()) * prepared.tensors["scale"].T
        return (y if bias is None else y + bias.float()).to(x.dtype)


def _probe() -> ProbeReport:
    return ProbeReport("toychip", "present", Platform("toychip", "cpu", frozenset({"int8"}), 1, 1 << 20))


KERNELS = [("linear", "toychip", ToyLinear())]
# a rank below the host's own: the toy is used only when it is asked for
PLATFORM = PlatformProbe("toychip", "cpu", -1, _probe)
