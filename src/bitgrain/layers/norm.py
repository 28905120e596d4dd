"""Root-mean-square normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = weight * (x / sqrt(mean(x^2) + eps)) + bias; the quotient in float32, rounded to x's dtype before the product.

    Args:
        weight: [K] of the activations' dtype; x is [..., K].
        bias:   the same, or None: some quantizers shift what they smooth.
        wide:   the product is float32 too, and rounded after it.
    """

    def __init__(self, weight: Tensor, eps: float, bias: Tensor | None = None, wide: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.bias, self.wide = weight, eps, bias, wide

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        y = (self.weight * scaled).to(x.dtype) if self.wide else self.weight * scaled.to(x.dtype)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
