"""Linear layers: one prepared matrix, or several that share an input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitgrain.kernels.base import LinearKernel, Prepared


class Linear(nn.Module):
    """y[M, N] = kernel(x[M, K]) + bias.

    Args:
        bias: [N] of the activations' dtype, or None.
    """

    def __init__(self, name: str, kernel: LinearKernel, prepared: Prepared, bias: Tensor | None) -> None:
        super().__init__()
        self.name, self.kernel, self.prepared, self.bias = name, kernel, prepared, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.apply(x, self.prepared, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the prepared weight and the bias."""
        return self.prepared.nbytes + (self.bias.numel() * self.bias.element_size() if self.bias is not None else 0)

    def extra_repr(self) -> str:
        return f"{self.name} {list(self.prepared.shape)} {self.kernel.name}"


class FusedLinear(nn.Module):
    """Several linears as one matrix; returns one output per part.

    Args:
        sizes: N of each part, in order.
    """

    def __init__(self, linear: Linear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.linear, self.sizes = linear, list(sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(self.linear(x), self.sizes, dim=-1)


class ParallelLinear(nn.Module):
    """Several linears side by side on one input; returns one output per part."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in self.parts)
