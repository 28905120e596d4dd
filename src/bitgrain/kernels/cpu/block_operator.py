"""The torch operator around the block kernels; see operators.py."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.cpu.library import check, native
from bitgrain.kernels.cpu.operators import DTYPE_IDS

_library = torch.library.Library("bitgrain", "FRAGMENT")
_library.define("block_linear(Tensor x, Tensor packed, Tensor format, Tensor? factor, Tensor? bias, int n, int precision) -> Tensor")

EXACT, INT8 = 0, 1


def _block_linear(x: Tensor, packed: Tensor, format: Tensor, factor: Tensor | None, bias: Tensor | None, n: int, precision: int) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(x.shape[0], n)
    if y.numel() == 0:
        return y
    status = native().bg_block_linear(
        x.data_ptr(), DTYPE_IDS[x.dtype], x.shape[0], x.shape[1], format.data_ptr(), packed.data_ptr(), None if factor is None else factor.data_ptr(), n,
        None if bias is None else bias.data_ptr(), y.data_ptr(), precision, torch.get_num_threads(),
    )  # fmt: skip
    check(status, "block_linear")
    return y


def _block_fake(x: Tensor, packed: Tensor, format: Tensor, factor: Tensor | None, bias: Tensor | None, n: int, precision: int) -> Tensor:
    return x.new_empty(x.shape[0], n)


_library.impl("block_linear", _block_linear, "CPU")
torch.library.register_fake("bitgrain::block_linear", _block_fake)

block_linear = torch.ops.bitgrain.block_linear.default
