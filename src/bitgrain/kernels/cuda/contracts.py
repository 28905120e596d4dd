"""A model of the Marlin-class product of serving packages, for host tensors: its layout, its checks and where it rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitgrain.kernels.torch_library.contracts import need
from bitgrain.numerics.interleave import restore_marlin_scales, unpack_marlin_tiles

MIDDLE = 8


def type_id(bits: int, middle: int) -> int:
    """What packages call unsigned integers of some bits less a constant, where an operator takes a type as a number.

    From the low end: 8 bits of exponent, 8 of mantissa, 1 of sign, 32 of bias, 1 for "finite only", 8 of the kind of NaN (1: IEEE).
    Source: vLLM vllm/scalar_type.py, ScalarType.id.
    """
    return bits << 8 | middle << 17 | 1 << 50


UINT4_MIDDLE_8 = type_id(4, MIDDLE)


class _MarlinModel:
    """marlin_gemm with the schema of an installed one."""

    _schema = torch._C.parse_schema(
        "marlin_gemm(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, Tensor b_scales, Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, "
        "Tensor? g_idx_or_none, Tensor? perm_or_none, Tensor workspace, int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k, bool is_k_full, bool use_atomic_add, "
        "bool use_fp32_reduce, bool is_zp_float) -> Tensor"
    )

    def __call__(self, a: Tensor, b_q_weight: Tensor, b_scales: Tensor, workspace: Tensor, b_type_id: int, size_m: int, size_n: int, size_k: int, **others: Any) -> Tensor:
        """[M, N] of a's dtype: a times the transpose of (code - 8) * scale, each weight rounded to that dtype."""
        need(a.dtype in (torch.float16, torch.bfloat16) and b_scales.dtype is a.dtype, "16-bit activations, and scales of their dtype")
        need(tuple(a.shape) == (size_m, size_k) and tuple(b_q_weight.shape) == (size_k // 16, 2 * size_n), "a [M, K] and codes [K / 16, 2 N]")
        need(b_q_weight.dtype is torch.int32 and b_type_id == UINT4_MIDDLE_8, "int32 words of 4-bit codes less 8")
        need(size_n % 64 == 0 and size_k % 128 == 0 and workspace.numel() >= size_n // 64 * 16, "N a multiple of 64, K of 128, and a workspace")
        need(not bool(workspace.any()), "a workspace of zeros")
        need(others["use_fp32_reduce"] and not others["use_atomic_add"] and all(others[n] is None for n in others if n.endswith("_or_none")), "what the caller promises")
        scale = restore_marlin_scales(b_scales, b_scales.shape[0] > 1)
        codes = unpack_marlin_tiles(b_q_weight).to(a.dtype) - MIDDLE
        weight = codes * torch.repeat_interleave(scale, size_k // scale.shape[0], dim=0)
        return (a.float() @ weight.float()).to(a.dtype)


marlin_gemm = _MarlinModel()
