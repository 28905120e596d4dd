"""Root-mean-square normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from bitgrain.kernels.decode_step import NormOperation, Place, StepDescription
from bitgrain.kernels.reference.step import ReferenceNorm
from bitgrain.kernels.step import NormKernel

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder

PLAIN = ReferenceNorm()


class RMSNorm(nn.Module):
    """y = weight * (x / sqrt(mean(x^2) + eps)) + bias; the quotient in float32, rounded to x's dtype before the product.

    Args:
        weight: [K] of the activations' dtype; x is [..., K].
        bias:   the same, or None: some quantizers shift what they smooth.
        wide:   the product is float32 too, and rounded after it.
        offset: is added to the weight, in float32; only together with `wide`.
        kernel: what computes it.
    """

    def __init__(
        self, weight: Tensor, eps: float, bias: Tensor | None = None, wide: bool = False, offset: float = 0.0, kernel: NormKernel = PLAIN
    ) -> None:
        super().__init__()
        assert wide or not offset
        self.kernel = kernel
        self.weight, self.eps, self.bias, self.wide = weight.float() + offset if offset else weight, eps, bias, wide

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.apply(x, self.weight, self.bias, self.eps, self.wide)

    def describe_step(self, step: StepDescription, source: Place, name: str) -> Place:
        """Its operations in a decode step; see kernels.decode_step."""
        return self.describe_into(step, source, step.place(name, source.width))

    def describe_into(self, step: StepDescription, source: Place, target: Place) -> Place:
        """The same, for each of the source's neighbours of the norm's size."""
        step.add(NormOperation(self.kernel, source, target, self.weight.shape[0], self.weight, self.bias, self.eps, self.wide))
        return target

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


@dataclass(frozen=True, slots=True)
class NormStyle:
    """What all norms of a model have in common; see RMSNorm."""

    eps: float
    wide: bool = False
    offset: float = 0.0

    def build(self, builder: ModelBuilder, name: str, size: int) -> RMSNorm:
        """The norm over `size` values that is stored as `name`."""
        bias = builder.optional_vector(f"{name}.bias", size)
        return RMSNorm(builder.vector(f"{name}.weight", size), self.eps, bias, self.wide, self.offset, builder.step_kernel("norm", size))
