"""Walsh-Hadamard transforms by definition."""

from __future__ import annotations

from torch import Tensor

from bitgrain.kernels.base import Fidelity, HadamardProblem, Prepared, Refusal
from bitgrain.weights import Hadamard


class ReferenceHadamard:
    """What weights.transforms.Hadamard says, in float32 by torch.  Takes everything."""

    name = "reference.hadamard"
    rank = 0

    def fidelity(self, problem: HadamardProblem) -> Fidelity:
        return Fidelity.EXACT

    def refusal(self, problem: HadamardProblem) -> Refusal | None:
        return None

    def prepare(self, transform: Hadamard) -> Prepared:
        return Prepared((transform.size, transform.size), transform.data_tensors(), meta={"transform": transform})

    def apply(self, x: Tensor, prepared: Prepared) -> Tensor:
        transform: Hadamard = prepared.meta["transform"]
        return transform.apply(x)
