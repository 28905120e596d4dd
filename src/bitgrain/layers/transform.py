"""Transforms of a module's input or output that a kernel runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitgrain.kernels.base import HadamardKernel, Prepared
from bitgrain.weights import Transform


@dataclass(frozen=True, slots=True, eq=False)
class KernelTransform(Transform):
    """`inner`, computed by a kernel.

    Args:
        prepared: the transform in the kernel's layout.
    """

    inner: Transform
    kernel: HadamardKernel
    prepared: Prepared

    def apply(self, x: Tensor) -> Tensor:
        return self.kernel.apply(x, self.prepared)

    def fits(self, k: int) -> bool:
        return self.inner.fits(k)

    def data_tensors(self) -> dict[str, Tensor]:
        return self.prepared.tensors

    def describe(self) -> str:
        return self.inner.describe()
