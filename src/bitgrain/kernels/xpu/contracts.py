"""Models of what torch's operators for Intel GPUs take and compute, for host tensors.

Source: pytorch, aten/src/ATen/native/mkldnn/xpu/Blas.cpp (stored version of 2026).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.torch_library.contracts import need
from bitgrain.numerics.bitpack import unpack_dense, words_as_bytes

GROUP_STEP = 32


def weight_int4pack_mm_with_scales_and_zeros(x: Tensor, words: Tensor, group: int, scale: Tensor, zero: Tensor) -> Tensor:
    """[M, N] of x's dtype for x [M, K] and W[n, k] = (code - zero[g, n]) * scale[g, n], g = k // group, rounded to that dtype.

    Args:
        words: int32 [N, K / 8], column 8 r + j in bits 4 j to 4 j + 3 of word r.
        scale: of x's dtype [K / group, N].
        zero:  int8 [K / group, N].
    """
    need(x.dim() == 2 and x.is_contiguous() and x.is_floating_point(), "contiguous float x [M, K]")
    need(words.dtype is torch.int32 and words.dim() == 2 and words.is_contiguous() and words.shape[1] * 8 == x.shape[1], "int32 words [N, K / 8]")
    need(zero.dtype is torch.int8, "int8 zero points")
    need(group > 1 and group % GROUP_STEP == 0, f"groups of a multiple of {GROUP_STEP}, got {group}")
    need(scale.dtype is x.dtype and tuple(scale.shape) == tuple(zero.shape) == (x.shape[1] // group, words.shape[0]), "scales and zero points [K / group, N]")
    codes = unpack_dense(words_as_bytes(words), 4, x.shape[1]).to(torch.int16)
    wide = [torch.repeat_interleave(part.t(), group, dim=1) for part in (scale, zero)]
    weight = ((codes - wide[1]).float() * wide[0].float()).to(x.dtype)
    return (x.float() @ weight.float().t()).to(x.dtype)
