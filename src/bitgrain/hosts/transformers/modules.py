"""Linear layers and embeddings that run chosen kernels where the library's modelling code calls its own."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from bitgrain.errors import UnsupportedArchitectureError
from bitgrain.layers.embedding import Embedding
from bitgrain.layers.linear import Linear


class _Facts:
    """What modelling code may ask of a weight that is packed: its type and size, nothing that needs its data."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, owner: str) -> None:
        self.shape, self.dtype, self.device, self._owner = torch.Size(shape), dtype, device, owner

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __getattr__(self, name: str) -> Any:
        raise _needs_data(self._owner)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _needs_data(next((a._owner for a in args if isinstance(a, _Facts)), "a module"))


class _Factor(_Facts):
    """The weight [N, K] of a linear layer, which modelling code may also multiply with: linear(x, w), linear(x, w, bias), x @ w.T, x @ w.t()."""

    def __init__(self, module: HostedLinear, turned: bool = False) -> None:
        n, k = module.chosen.prepared.shape
        super().__init__((k, n) if turned else (n, k), module.hosted_dtype, module.device, module.chosen.name)
        self.module, self.turned = module, turned

    @property
    def T(self) -> _Factor:
        return _Factor(self.module, not self.turned)

    def t(self) -> _Factor:
        return self.T

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.linear and len(args) >= 2 and isinstance(args[1], _Factor) and not args[1].turned:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            y = args[1].module.product(args[0])
            return y if bias is None else y + bias
        if function in (Tensor.matmul, torch.matmul, Tensor.__matmul__) and len(args) == 2 and isinstance(args[1], _Factor) and args[1].turned:
            return args[1].module.product(args[0])
        return super().__torch_function__(function, types, args, kwargs)


def _needs_data(owner: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(owner, "modelling code that computes with the weight itself", "modelling code that calls the module", "run this checkpoint with another program")


class HostedLinear(nn.Linear):
    """A linear layer of the library; its product is a chosen kernel's."""

    chosen: Linear
    plain: Linear  # the same without its bias
    hosted_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.chosen.prepared.tensors.values())).device

    @property
    def weight(self) -> Any:  # type: ignore[override]
        return _Factor(self)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        return self.chosen.bias

    def forward(self, input: Tensor) -> Tensor:
        """[..., N] for input [..., K]."""
        return self._run(self.chosen, input)

    def product(self, input: Tensor) -> Tensor:
        """[..., N] without the bias."""
        return self._run(self.plain, input)

    def _run(self, linear: Linear, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1]).contiguous()
        if not len(rows):
            return input.new_zeros(*input.shape[:-1], self.chosen.prepared.shape[0])
        y: Tensor = linear(rows)
        return y.view(*input.shape[:-1], -1)

    def extra_repr(self) -> str:
        return self.chosen.extra_repr()


class HostedEmbedding(nn.Embedding):
    """An embedding of the library; only the rows that are asked for are dequantized."""

    chosen: Embedding

    @property
    def weight(self) -> Any:  # type: ignore[override]
        tensors = list(self.chosen.prepared.tensors.values())
        return _Facts(self.chosen.prepared.shape, self.chosen.dtype, tensors[0].device, self.chosen.name)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] for ids [...]."""
        rows: Tensor = self.chosen(input.reshape(-1))
        return rows.view(*input.shape, -1)

    def extra_repr(self) -> str:
        return self.chosen.extra_repr()


def host_linear(module: nn.Module, chosen: Linear, dtype: torch.dtype) -> None:
    """Turn a linear layer of the library into one that runs `chosen`; forward code of a subclass stays in place around it."""
    _release(module, ("weight", "bias"))
    kind = type(module)
    module.__class__ = type(f"Hosted{kind.__name__}", (kind, HostedLinear) if kind is not nn.Linear and issubclass(kind, nn.Linear) else (HostedLinear,), {})
    plain = copy(chosen)
    plain.bias = None
    module.chosen, module.plain, module.hosted_dtype = chosen, plain, dtype  # type: ignore[assignment]


def host_embedding(module: nn.Embedding, chosen: Embedding) -> None:
    """The same for an embedding."""
    _release(module, ("weight",))
    kind = type(module)
    module.__class__ = type(f"Hosted{kind.__name__}", (HostedEmbedding,) if kind is nn.Embedding else (kind, HostedEmbedding), {})
    module.chosen = chosen


def _release(module: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        module._parameters.pop(name, None)
