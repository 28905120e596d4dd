"""Token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitgrain.kernels.base import EmbeddingKernel, Prepared


class Embedding(nn.Module):
    """[T, K] rows of a table [N, K] for ids int64 [T]; only the gathered rows are dequantized."""

    def __init__(self, name: str, kernel: EmbeddingKernel, prepared: Prepared, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.kernel, self.prepared, self.dtype = name, kernel, prepared, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return self.kernel.apply(ids, self.prepared, self.dtype)

    def extra_repr(self) -> str:
        return f"{self.name} {list(self.prepared.shape)} {self.kernel.name}"
