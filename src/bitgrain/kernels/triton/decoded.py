"""What kernels that decode a weight while they read it have in common; the weight's kind brings a layout and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.triton.availability import TritonKernel, missing
from bitgrain.platforms.probe import target
from bitgrain.weights import ActivationSpec, Weight, WeightSpec

if TYPE_CHECKING:
    from bitgrain.kernels.triton.weight_product import Decoding

BLOCK_K = 64  # columns that are decoded at once, where a layout does not say


@dataclass(frozen=True, slots=True)
class Layout:
    """A weight as a decoder reads it; the decoder's docstring says what its parts, sizes and settings are.

    Args:
        decoder: "module.function" of this package.
        exact:   decoded values are exact in 16-bit floats of either kind.
        block_k: columns that are decoded at once.
    """

    decoder: str
    parts: Sequence[Tensor | None]
    sizes: tuple[int, ...]
    settings: tuple[int | float, ...]
    exact: bool = False
    block_k: int = BLOCK_K

    def prepared(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        """The layout as a kernel keeps it."""
        # what is absent is an empty tensor, which no decoder reads
        nothing = torch.empty(0, dtype=torch.uint8, device=next(part.device for part in self.parts if part is not None))
        held = {str(place): nothing if part is None else part.contiguous() for place, part in enumerate(self.parts)}
        meta = {"decoder": self.decoder, "sizes": self.sizes, "settings": self.settings, "exact": self.exact, "block_k": self.block_k}
        return Prepared(weight.shape, held, activation, meta)


def decoding_of(prepared: Prepared) -> Decoding:
    """The decoder with what it reads."""
    from bitgrain.kernels.triton.weight_product import Decoding

    meta = prepared.meta
    module, _, function = meta["decoder"].partition(".")
    decode = getattr(import_module(f"bitgrain.kernels.triton.{module}"), function)
    parts = tuple(prepared.tensors[str(place)] for place in range(len(prepared.tensors)))
    return Decoding(decode, parts, tuple(meta["sizes"]), tuple(meta["settings"]), meta["exact"], meta["block_k"])


def unable(kernel: TritonKernel, dtype: str) -> str:
    """Why a kernel's platform does not compute in a dtype; "" where it does."""
    feature = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "")
    if feature and feature not in kernel.target.features:
        return f"takes a device that computes in {dtype}"
    return missing(kernel.platform)


class DecodedLinear(TritonKernel):
    """y = x W^T (+ bias), W decoded in registers; sums are float32.  A scheme's activation quantization is applied to x before.

    Products are exact: a decoded value that 16 bits do not hold is multiplied as the sum of three bfloat16, or in float32.
    """

    kind = ""

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.EXACT if problem.activation.is_none else Fidelity.EMULATED

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        if problem.weight.kind != self.kind:
            return Refusal(f"takes {self.kind.replace('_', ' ')} weights, not {problem.weight.kind} ones")
        why = self.limit(problem.weight) or unable(self, problem.dtype)
        return Refusal(why) if why else None

    def limit(self, weight: WeightSpec) -> str:
        """What of its kind the kernel does not decode; "" if nothing stands in the way."""
        return ""

    def layout(self, weight: Weight) -> Layout:
        """The weight in the kernel's own layout."""
        raise NotImplementedError

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        return self.layout(weight).prepared(weight, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        from bitgrain.kernels.triton.weight_product import multiply

        dtype = x.dtype
        if not prepared.activation.is_none:
            x = prepared.activation.fake_quantize(x)
        return multiply(x, decoding_of(prepared), prepared.shape[0], bias, dtype, "bf16" in target(self.platform).features)
