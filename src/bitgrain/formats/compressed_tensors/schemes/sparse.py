"""Sparse storage: the numbers that are kept, and a bit for each place; it stands in for `weight`, whatever that holds.

    compressed   the kept numbers in row order: [N, K / 2] for 2:4, one dimension otherwise
    bitmask      uint8 [N, ceil(K / 8)], bit k % 8 of byte k // 8 says that column k is kept
    shape        int64 [2, 1] for 2:4, [2] otherwise: (N, K)
    row_offsets  int64 [N], where each row begins in `compressed`; not stored for 2:4, where two of each four are kept

Source: compressed-tensors 0.9 to 0.12 compressors/sparse_compressors (layout; written anew).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.errors import BadValueError, ShapeMismatchError
from bitgrain.formats.base import ModuleView, Scheme, TensorRule
from bitgrain.numerics.bitpack import dense_bytes, unpack_dense
from bitgrain.weights import ActivationSpec, Weight, WeightSpec

SPARSE_NAMES = frozenset({"compressed", "bitmask", "shape", "row_offsets"})
_DAMAGED = "the file is damaged; fetch or write it again"


@dataclass(frozen=True, slots=True)
class SparseScheme(Scheme):
    """Another scheme whose `weight` is stored sparse.

    Args:
        inner:      what the whole weight means; it declares `weight`, and has the same shape and activation.
        structured: two of each four numbers are kept, zeros among them where a row has fewer.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    inner: Scheme
    structured: bool

    @property
    def weight_spec(self) -> WeightSpec:
        return self.inner.weight_spec

    @property
    def label(self) -> str:
        return f"{self.inner.label}, stored {'2:4' if self.structured else 'sparse'}"

    def fusion_key(self) -> object:
        return self.inner.fusion_key()

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        whole = next(rule for rule in self.inner.tensors() if rule.name == "weight")
        kept = ((n, k // 2),) if self.structured else ((-1,),)
        rules = [
            TensorRule("compressed", whole.dtypes, kept),
            TensorRule("bitmask", ("U8",), ((n, dense_bytes(k, 1)),)),
            TensorRule("shape", ("I64", "I32"), ((2, 1), (2,))),
        ]
        if not self.structured:
            rules.append(TensorRule("row_offsets", ("I64", "I32"), ((n,),)))
        return (*rules, *(rule for rule in self.inner.tensors() if rule.name != "weight"))

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """The inner scheme's weight, zeros filled in; see Scheme.to_weight."""
        others = {name: tensor for name, tensor in tensors.items() if name not in SPARSE_NAMES}
        return self.inner.to_weight({**others, "weight": self._expanded(tensors)})

    def to_bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        return self.inner.to_bias(tensors)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return self.inner.to_activation(tensors)

    def _expanded(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[N, K] of the element type of `compressed`."""
        n, k = self.shape
        stored = tuple(int(v) for v in tensors["shape"].flatten())
        if stored != self.shape:
            raise ShapeMismatchError("shape", f"it says {list(stored)}", f"{list(self.shape)}, by the model's sizes and the other tensors", _DAMAGED)
        kept = self._places(tensors["bitmask"])
        values = tensors["compressed"].flatten()
        if int(kept.sum()) != values.numel():
            raise ShapeMismatchError(
                "compressed", f"{values.numel()} numbers, while bitmask has {int(kept.sum())} bits set", "a number for each bit", _DAMAGED
            )
        if not self.structured:
            counts = kept.sum(1)
            if not torch.equal(tensors["row_offsets"].long(), counts.cumsum(0) - counts):
                raise BadValueError("row_offsets", "rows begin elsewhere than bitmask says", "the number of bits before each row", _DAMAGED)
        # one-byte floats have no indexed assignment everywhere; their bytes have
        byte_wide = values.element_size() == 1
        whole = torch.zeros(n, k, dtype=torch.uint8 if byte_wide else values.dtype, device=values.device)
        whole[kept] = values.view(torch.uint8) if byte_wide else values
        return whole.view(values.dtype)

    def _places(self, bitmask: Tensor) -> Tensor:
        """bool [N, K].

        Raises:
            BadValueError: bits beyond the last column, or, in 2:4, other than two bits in a run of four.
        """
        k = self.shape[1]
        bits = unpack_dense(bitmask, 1, 8 * bitmask.shape[1])
        if bool(bits[:, k:].any()):
            raise BadValueError("bitmask", f"bits beyond column {k - 1}", "none: K ends there", _DAMAGED)
        kept = bits[:, :k].bool()
        # the producer takes runs of four along the flattened matrix
        if self.structured and (kept.numel() % 4 or not bool((kept.reshape(-1, 4).sum(1) == 2).all())):
            raise BadValueError("bitmask", "runs of four columns in which not two are kept", "two of each four", _DAMAGED)
        return kept


def without_zeros_left_out(module: ModuleView, shape: tuple[int, int] | None) -> ModuleView:
    """The module as if its sparse weight were stored whole, so that the rules of other storage apply.

    Args:
        shape: (N, K) that the stored `shape` tensor gives, where it was read; the architecture's shape goes before it.
    """
    values, mask = module.tensors.get("compressed"), module.tensors.get("bitmask")
    n = mask.shape[0] if mask is not None and len(mask.shape) == 2 else values.shape[0] if values is not None and values.shape else 0
    k = 8 * mask.shape[1] if mask is not None and len(mask.shape) == 2 else 0
    if values is not None and len(values.shape) == 2:
        k = 2 * values.shape[1]
    size = module.shape or shape or (n, k)
    dtype = values.dtype if values is not None else "BF16"
    whole = TensorHeader(module.full_name("weight"), dtype, size, "", 0, 0)
    others = {name: header for name, header in module.tensors.items() if name not in SPARSE_NAMES}
    return ModuleView(module.name, module.kind, {**others, "weight": whole}, module.shape)
