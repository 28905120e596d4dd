"""Which of torch's own operators a platform has, and what stands in for them on the host's tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.triton import availability
from bitgrain.platforms.probe import target
from bitgrain.weights import ActivationSpec, Weight

# Said wherever these kernels' results are shown; a record of a run on a device replaces it in the support matrix.
PROOF = "contract-tested, not run on hardware"


def missing_operator(platform: str, name: str) -> str:
    """Why aten's operator cannot run on a platform; empty when it can."""
    return "" if f"op:aten::{name}" in target(platform).features else f"torch registers no aten::{name} for {platform}"


def operator(x: Tensor, name: str, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """aten's operator, or on the host's tensors the model of what it does on the device."""
    if x.device.type == "cpu":
        return model
    found: Callable[..., Tensor] = getattr(torch.ops.aten, name)
    return found


def quantized(platform: str, activation: ActivationSpec, x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """ActivationSpec.quantize(x) with float codes of `dtype`: in one pass on a device where Triton is, in torch elsewhere; the same bits."""
    if x.device.type != "cpu" and not availability.missing(platform):
        from bitgrain.kernels.triton.activation_quantization import quantize

        return quantize(activation, x, dtype)
    codes, scale, zero = activation.quantize(x)
    return (codes if dtype is None else codes.to(dtype)), scale, zero


def missing_dtype(platform: str, dtype: str) -> str:
    """Why the devices of a platform do not multiply a 16-bit type; empty when they do."""
    needed = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype)
    return "" if needed is None or needed in target(platform).features else f"the device does not multiply {dtype}"


class TorchLinear:
    """What linear kernels over torch's own operators share.

    A row's result does not depend on the values of other rows.  The libraries below torch choose tiles by the number of rows, so that
    float sums of a row may be added in another order, and differ in the last bits, between calls of different sizes.
    """

    name = ""
    rank = 50
    proof = PROOF
    # aten's name of the operator; "" for one that every torch has
    operator = ""

    def __init__(self, platform: str) -> None:
        self.platform = platform

    @property
    def build(self) -> str:
        """What a remembered self-test depends on besides the kernel's name."""
        return f"{torch.__version__} {target(self.platform).state} {sorted(target(self.platform).features)}"

    def state(self) -> str:
        """ "available (torch's version; proof)", or why not."""
        return self._absent() or f"available (torch {torch.__version__}; {PROOF})"

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT if problem.activation.is_none else Fidelity.NATIVE

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        why = self._absent() or self._problem(problem)
        return Refusal(why) if why else None

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        raise NotImplementedError

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _absent(self) -> str:
        return missing_operator(self.platform, self.operator) if self.operator else ""

    def _problem(self, problem: LinearProblem) -> str:
        """Why the kernel does not take the problem; empty when it does."""
        raise NotImplementedError


def finished(sums: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """float32 sums [M, N], the bias added to them, rounded once to `dtype`."""
    return (sums if bias is None else sums + bias.float()).to(dtype)
