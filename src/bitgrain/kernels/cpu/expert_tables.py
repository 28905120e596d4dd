"""What native/include/experts.hpp calls ExpertMatrix and ExpertSide: tables of addresses and numbers, eight bytes each.

The tensors that they point into must live as long as the tables.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from bitgrain.errors import LayoutError
from bitgrain.kernels.base import Prepared
from bitgrain.kernels.cpu.int_dot import RANGES, STATIC, rules_of
from bitgrain.kernels.cpu.operators import DTYPE_IDS

# ten addresses, two sizes, three numbers, a zero point
_MATRIX = struct.Struct("<12q3dq")
_SIDE = struct.Struct("<8qdq")
GROUPED, INTEGER, BLOCKS = 0, 1, 2
_POINTERS = ("codes", "scale", "zero", "second", "table", "whole_table", "group_ends", "gather", "column_sums")


def is_integer(prepared: Prepared) -> bool:
    """The product is one of whole numbers, on both sides."""
    return "column_sums" in prepared.tensors


def is_blocks(prepared: Prepared) -> bool:
    """The product is one of native/include/block_kernels.hpp."""
    return "format" in prepared.tensors


def matrix_table(prepared: Sequence[Prepared], biases: Sequence[Tensor | None]) -> Tensor:
    """int64 [experts, 16]."""
    rows = [_matrix(one, bias) for one, bias in zip(prepared, biases, strict=True)]
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int64).view(len(rows), -1)


def _matrix(prepared: Prepared, bias: Tensor | None) -> bytes:
    held, activation = prepared.tensors, prepared.activation
    for name, tensor in held.items():
        if not tensor.is_contiguous():
            raise LayoutError("experts", f"{name} with strides {tensor.stride()}", "contiguous tensors", "correct the kernel that prepared it")
    if is_blocks(prepared):
        held = {"codes": held["packed"], "scale": held["format"], **({"second": held["factor"]} if "factor" in held else {})}
    addresses = [held[name].data_ptr() if name in held else 0 for name in _POINTERS]
    groups = held["group_ends"].numel() if "group_ends" in held else 0
    meta = prepared.meta
    scale = 1.0 if activation.scale is None else activation.scale
    return _MATRIX.pack(
        *addresses, 0 if bias is None else bias.data_ptr(), held["codes"].shape[1], groups, meta.get("zero", 0.0), meta.get("whole_step", 1.0), scale, activation.zero
    )


def side_table(prepared: Sequence[Prepared]) -> Tensor:
    """int64 [10]: what the experts have in common.

    Raises:
        LayoutError: they differ in it.
    """
    sides = {_side(one) for one in prepared}
    if len(sides) > 1:
        raise LayoutError("experts of one problem", f"{len(sides)} layouts", "one", "prepare experts of different schemes as separate problems")
    gathered = any("gather" in one.tensors for one in prepared)
    return torch.frombuffer(bytearray(_SIDE.pack(*next(iter(sides)), int(gathered))), dtype=torch.int64)


def _side(prepared: Prepared) -> tuple[int | float, ...]:
    (n, k), held, activation = prepared.shape, prepared.tensors, prepared.activation
    if is_integer(prepared):
        return n, k, INTEGER, 0, 0, 0, rules_of(activation), RANGES[activation.granularity] if activation.dynamic else STATIC, float(activation.top_code)
    if is_blocks(prepared):
        return n, k, BLOCKS, 0, 0, 0, 0, 0, 0.0
    scale, zero = held.get("scale"), held.get("zero")
    return n, k, GROUPED, prepared.meta["kind"], 0 if scale is None else DTYPE_IDS[scale.dtype], int(zero is not None and zero.is_floating_point()), 0, 0, 0.0
