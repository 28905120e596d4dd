"""Norms, rotary embedding and gates in plain torch: right on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, Join, Refusal, StepProblem


class ReferenceStep:
    """What the plain ones share.  Their rank is above 0: they are torch's own arithmetic, not a stand-in for a kernel that is missing."""

    rank = 1

    def fidelity(self, problem: StepProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: StepProblem) -> Refusal | None:
        return None


class ReferenceNorm(ReferenceStep):
    """See kernels.step.NormKernel."""

    name = "reference.norm"

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, wide: bool) -> Tensor:
        widened = x.float()
        scaled = widened * torch.rsqrt(widened.pow(2).mean(-1, keepdim=True) + eps)
        y = (weight * scaled).to(x.dtype) if wide else weight * scaled.to(x.dtype)
        return y if bias is None else y + bias


class ReferenceRotary(ReferenceStep):
    """See kernels.step.RotaryKernel."""

    name = "reference.rotary"

    def apply(self, x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
        return rotate(x, cosine, sine, interleaved)


class ReferenceGate(ReferenceStep):
    """See kernels.step.GateKernel."""

    name = "reference.gate"

    def apply(self, join: Join, gate: Tensor, up: Tensor) -> Tensor:
        return join(gate, up)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool = False) -> Tensor:
    """x [T, H, D] with its first R entries turned by the row's angles [T, 1, R], R <= D; a new tensor of x's dtype."""
    size = cosine.shape[-1]
    part = x[..., :size]
    if interleaved:
        turned = torch.stack((-part[..., 1::2], part[..., 0::2]), dim=-1).flatten(-2)
    else:
        turned = torch.cat((-part[..., size // 2 :], part[..., : size // 2]), dim=-1)
    rotated = (part * cosine + turned * sine).to(x.dtype)
    return rotated if size == x.shape[-1] else torch.cat((rotated, x[..., size:]), dim=-1)


class ReferenceDecodeStep(ReferenceStep):
    """The modules run one by one; see kernels.decode_step.DecodeStepKernel."""

    name = "reference.decode_step"

    def prepare(self, step: object) -> None:
        return None
