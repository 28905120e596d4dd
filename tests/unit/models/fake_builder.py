"""A builder that serves dense weights from a state dict, in place of a planned checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitgrain.kernels.base import Kernel, StepProblem
from bitgrain.kernels.registry import candidates
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.layers.linear import FusedLinear
from bitgrain.models.causal_lm import CausalLM
from bitgrain.models.config import ModelConfig
from bitgrain.models.registry import model_class
from bitgrain.plan import ExpertGroup


def row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear whose rows never share a matrix product, so that they cannot depend on each other's number."""
    return torch.stack([functional.linear(row, weight, bias) for row in x])


class DenseLinear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.product = weight, bias, product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


class SideBySide(nn.Module):
    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part(x) for part in self.parts)


class Lookup(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class FakeBuilder:
    """Serves `tensors`; `taken` records the modules in the order in which they were asked for."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        cache: KVCacheSpec | None = None,
        product: Callable[..., Tensor] = functional.linear,
    ) -> None:
        self.config, self.dtype, self.product = config, dtype, product
        self.tensors, self.cache = tensors, cache or KVCacheSpec()
        self.reader = SimpleNamespace(plan=SimpleNamespace(expert_groups=self._expert_groups()))
        self.taken: list[str] = []

    def _take(self, name: str) -> Tensor:
        module, _, local = name.rpartition(".")
        self.taken.append(module if local == "weight" else name)  # a bare vector has a name of its own
        return self.tensors[name].to(self.dtype)

    def _expert_groups(self) -> dict[str, tuple[ExpertGroup, ...]]:
        """All experts of a layer in one group that no kernel runs together."""
        members: dict[str, set[int]] = {}
        for name in self.tensors:
            layer, found, rest = name.partition(".experts.")
            if found:
                members.setdefault(f"{layer}.experts", set()).add(int(rest.partition(".")[0]))
        parts = self.config.mixtures.parts
        return {layer: (ExpertGroup(layer, tuple(sorted(own)), parts, False, "each by itself"),) for layer, own in members.items()}

    def linears_of_experts(self, name: str, why: str) -> AbstractContextManager[None]:
        return nullcontext()

    def linear(self, name: str) -> DenseLinear:
        bias = self.tensors.get(f"{name}.bias")
        return DenseLinear(self._take(f"{name}.weight"), None if bias is None else bias.to(self.dtype), self.product)

    def linears(self, names: Sequence[str]) -> SideBySide:
        return SideBySide([self.linear(name) for name in names])

    def joint_linear(self, name: str, heights: Sequence[int]) -> FusedLinear:
        return FusedLinear(self.linear(name), heights)

    def embedding(self, name: str) -> Lookup:
        return Lookup(self._take(f"{name}.weight"))

    def lm_head(self, name: str, tied_to: str | None) -> DenseLinear:
        self.taken.append(name)
        return DenseLinear(self.tensors[f"{tied_to or name}.weight"].to(self.dtype), None, self.product)

    def decode_step(self, step: object, obstacle: str) -> None:
        """Steps run by modules."""

    def step_kernel(self, operation: str, size: int = 0, detail: str = "") -> Kernel:
        """Plain torch's, whose rows do not depend on each other's number either."""
        return next(k for k in candidates(operation, "none") if k.refusal(StepProblem(operation, size, "float32", detail)) is None)

    def vector(self, name: str, size: int) -> Tensor:
        vector = self._take(name)
        assert vector.shape == (size,)
        return vector

    def optional_vector(self, name: str, size: int) -> Tensor | None:
        return None

    def head_transforms(self, attention: str, head_dim: int) -> tuple[tuple, tuple]:
        return (), ()

    def kv_cache_spec(self, attention: str) -> KVCacheSpec:
        return self.cache


def build(config: Mapping[str, object], tensors: Mapping[str, Tensor], **options: object) -> CausalLM:
    """The model of a config.json over a state dict."""
    parsed = ModelConfig.from_dict(config, "config.json")
    return model_class(parsed.architecture)(FakeBuilder(parsed, tensors, **options)).eval()
