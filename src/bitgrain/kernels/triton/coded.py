"""Codes with scales as they are stored: integers, floats and blocks of floats through one decoder, whatever their grouping.

Other kernels are faster on what they take; this one takes the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.base import LinearProblem, Refusal
from bitgrain.kernels.triton.decoded import DecodedLinear, Layout, unable
from bitgrain.numerics.block_scales import decode_block_scale
from bitgrain.numerics.small_floats import SMALL_FLOATS, decode
from bitgrain.weights import BlockFloatWeight, FloatWeight, IntAffineWeight, Weight


class CodedLinear(DecodedLinear):
    """Integers, floats and blocks of floats with scales of every granularity, indices of groups and rows, and activations of every kind."""

    name = "triton.coded"
    rank = 20

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        if problem.weight.kind not in LAYOUTS:
            return Refusal(f"takes integers and floats with scales, not {problem.weight.kind} weights")
        why = unable(self, problem.dtype)
        return Refusal(why) if why else None

    def layout(self, weight: Weight) -> Layout:
        return coded_layout(weight)


def coded_layout(weight: Weight) -> Layout:
    """The stored tensors with the decoder that reads them; a table of at most 256 values beside them."""
    return LAYOUTS[weight.spec.kind](weight)


def _integers(weight: Weight) -> Layout:
    assert isinstance(weight, IntAffineWeight)
    constant = isinstance(weight.zero, int)
    zero = None if isinstance(weight.zero, int) else weight.zero
    table = torch.arange(1 << weight.bits, dtype=torch.float32, device=weight.packed.device) - (weight.zero if isinstance(weight.zero, int) else 0)
    shared = weight.row_index is None and weight.scale.shape[0] == 1
    parts = [weight.packed, table, weight.scale, zero, None, weight.group_index, weight.row_index, None]
    flags = (not constant, False, weight.group_index is not None, weight.row_index is not None, False)
    columns = weight.group_size if weight.scale.shape[1] > 1 else weight.in_features
    return _coded(parts, weight.bits, (columns, weight.shape[0] if shared else 1), (1, 1), flags)


def _floats(weight: Weight) -> Layout:
    assert isinstance(weight, FloatWeight)
    raw = weight.codes.view(torch.uint8)
    table = torch.arange(256, dtype=torch.uint8, device=raw.device).view(weight.codes.dtype).float()
    return _coded([raw, table, weight.scale, None, None, None, None, None], 8, (weight.block[1], weight.block[0]), (1, 1), (False,) * 5)


def _blocks(weight: Weight) -> Layout:
    assert isinstance(weight, BlockFloatWeight)
    codes = torch.arange(1 << weight.bits, dtype=torch.uint8, device=weight.packed.device)
    table = codes.view(torch.int8).float() / 64 if weight.element == "int8" else decode(codes, SMALL_FLOATS[weight.element])
    scales = decode_block_scale(torch.arange(256, dtype=torch.uint8, device=weight.packed.device), weight.scale_type)
    second = weight.second
    rows = weight.shape[0] if second is not None and second.shape[0] == 1 else 1
    parts = [weight.packed, table, weight.scale, None, second, None, None, scales]
    return _coded(parts, weight.bits, (weight.block, 1), (weight.second_group or weight.in_features, rows), (False, second is not None, False, False, True))


def _coded(parts: list[Tensor | None], bits: int, scale: tuple[int, int], second: tuple[int, int], flags: tuple[bool, ...]) -> Layout:
    """What decode_coded reads.

    Args:
        scale, second: (columns, rows) that share one.
        flags: there are zero points, seconds, a group index, a row index, a table of scales.
    """
    packed, scales, seconds = parts[0], parts[2], parts[4]
    assert packed is not None and scales is not None  # every kind has both
    sizes = (packed.shape[1], scales.shape[1], *scale, 1 if seconds is None else seconds.shape[1], *second)
    return Layout("row_decoders.decode_coded", parts, sizes, (bits, *(int(flag) for flag in flags)))


LAYOUTS = {"int_affine": _integers, "float": _floats, "block_float": _blocks}
