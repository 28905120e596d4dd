"""torch operators around the native products of experts; they read what their tables point at."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import RequestError
from bitgrain.kernels.cpu.library import check, native
from bitgrain.kernels.cpu.operators import DTYPE_IDS

UNKNOWN_EXPERT = 4

_library = torch.library.Library("bitgrain", "FRAGMENT")
_library.define("experts(Tensor x, Tensor weight, Tensor chosen, Tensor gate_up, Tensor down, Tensor sides, int size, int join, float alpha, float limit) -> Tensor")
_library.define("experts_product(Tensor x, Tensor ends, Tensor matrices, Tensor side, Tensor? row_scale, int n, ScalarType dtype) -> Tensor")


def _experts(
    x: Tensor, weight: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor, sides: Tensor, size: int, join: int, alpha: float, limit: float
) -> Tensor:
    x, weight, chosen = x.contiguous(), weight.contiguous(), chosen.contiguous()
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    status = native().bg_experts(
        gate_up.data_ptr(), down.data_ptr(), sides.data_ptr(), gate_up.shape[0], size, x.data_ptr(), DTYPE_IDS[x.dtype], x.shape[0],
        weight.data_ptr(), DTYPE_IDS[weight.dtype], chosen.data_ptr(), chosen.shape[1], join, alpha, limit, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if status == UNKNOWN_EXPERT:
        raise RequestError("experts", f"expert {int(chosen.max())} was chosen", f"indices below {gate_up.shape[0]}, or -1 for none", "correct the routing")
    check(status, "experts")
    return y


def _experts_product(x: Tensor, ends: Tensor, matrices: Tensor, side: Tensor, row_scale: Tensor | None, n: int, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(x.shape[0], n, dtype=dtype)
    if y.numel() == 0:
        return y
    status = native().bg_experts_product(
        matrices.data_ptr(), side.data_ptr(), matrices.shape[0], x.data_ptr(), DTYPE_IDS[x.dtype], ends.data_ptr(),
        None if row_scale is None else row_scale.data_ptr(), y.data_ptr(), DTYPE_IDS[dtype], torch.get_num_threads(),
    )  # fmt: skip
    check(status, "experts_product")
    return y


_library.impl("experts", _experts, "CPU")
_library.impl("experts_product", _experts_product, "CPU")


def _experts_fake(
    x: Tensor, weight: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor, sides: Tensor, size: int, join: int, alpha: float, limit: float
) -> Tensor:
    return torch.empty_like(x)


def _experts_product_fake(x: Tensor, ends: Tensor, matrices: Tensor, side: Tensor, row_scale: Tensor | None, n: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], n, dtype=dtype)


torch.library.register_fake("bitgrain::experts", _experts_fake)
torch.library.register_fake("bitgrain::experts_product", _experts_product_fake)

experts = torch.ops.bitgrain.experts.default
experts_product = torch.ops.bitgrain.experts_product.default
