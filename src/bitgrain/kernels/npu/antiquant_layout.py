"""Integer weights as the weight-only products read them: signed codes [K, N], scales and added offsets per group of K."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitgrain.errors import BadValueError
from bitgrain.kernels.base import LinearProblem, Prepared
from bitgrain.kernels.npu.operators import OLD, features, missing
from bitgrain.weights import NO_ACTIVATION, IntAffineWeight

OPERATORS = ("npu_weight_quant_batchmatmul", "npu_convert_weight_to_int4pack")
GROUPED_OPERATORS = ("npu_grouped_matmul", "npu_convert_weight_to_int4pack")
# sums of a code and its offset reach twice this: whole numbers up to 256 are exact in every 16-bit type
LARGEST_OFFSET = 128
LARGEST_SIDE = 65535
# columns of N per call where one call cannot take all: whole words and whole tiles
WIDEST = 65504
WORD = 8
# float16 scales for which products with codes from 1 to 256 are normal and finite
HALF_RANGE = (2.0**-14, 2.0**7)


def layout_problem(platform: str, problem: LinearProblem, grouped: bool) -> str:
    """Why a weight cannot be multiplied so; empty when it can.

    Args:
        grouped: by the product for experts, which has groups for 4-bit integers only.
    """
    spec, found = problem.weight, features(platform)
    if spec.kind != "int_affine":
        return f"takes integer weights, not {spec.kind} ones"
    if not problem.activation.is_none:
        return f"takes 16-bit activations, and the scheme quantizes them: {problem.activation.describe()}"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"takes float16 and bfloat16 inputs, not {problem.dtype}"
    if OLD in found:
        return "products on the device take neither groups of columns nor 4-bit words"
    if problem.dtype == "bfloat16" and "bf16" not in found:
        return "the device has no bfloat16"
    if spec.row_index:
        return "takes groups along K, not along N"
    if grouped and spec.group_index:
        return "the grouped product takes columns in one order for all experts, not act-order"
    if spec.granularity == "group" and (spec.group_index or spec.group_size < problem.k):
        if spec.group_size % 32:
            return f"takes groups of multiples of 32 columns, not of {spec.group_size}"
        if grouped and spec.bits > 4:
            return "the grouped product has groups of columns for weights of up to 4 bits only"
    # a last group that is filled, or every group of an activation order
    longest = LARGEST_SIDE // 2 if spec.group_index else LARGEST_SIDE - spec.group_size
    if problem.k > longest or (grouped and problem.n > LARGEST_SIDE - WORD):
        return f"takes sides up to {LARGEST_SIDE}, filled groups included"
    return missing(platform, *(GROUPED_OPERATORS if grouped else OPERATORS))


def parts_of(n: int) -> list[slice]:
    """Columns [0, n) in pieces that one call takes."""
    return [slice(start, min(start + WIDEST, n)) for start in range(0, n, WIDEST)]


def lay_out(weight: IntAffineWeight, operators: object) -> Prepared:
    """Codes and scales, for any 16-bit dtype of x.

    tensors:
        weight, weight1, ...: int32 words of eight codes - 8 [K', N' / 8] for up to 4 bits; else int8 codes - 128 [K', N].
                              Beyond WIDEST columns in several pieces.
        scale:  [G, N'] as stored.
        offset: int16 or float32 [G, N'], what the operator adds to signed codes: the middle of the codes less the zero point.
        gather: int64 [K'], the column of x for each row of the weight, K for a column of zeros; where they are not in order.
    meta: group (0: one scale per row), widen (columns of zeros that x gets), bare (no offset differs from 0), scales (made on use).

    Raises:
        BadValueError: zero points farther than LARGEST_OFFSET from the middle.
    """
    (n, k), small = weight.shape, weight.bits <= 4
    middle = 8 if small else 128
    codes = weight.codes().to(torch.int16).sub_(middle).to(torch.int8).t()  # [K, N]
    scale = _per_row(weight.scale, n).t()
    zero = _per_row(weight.zero, n).t() if isinstance(weight.zero, Tensor) else torch.full(scale.shape, weight.zero, dtype=torch.int16, device=scale.device)
    offset = middle - (zero if zero.is_floating_point() else zero.to(torch.int32))
    far = int((offset.abs() > LARGEST_OFFSET).sum())
    if far:
        raise BadValueError("weight", f"{far} zero points beyond {LARGEST_OFFSET} from the middle of the codes", f"from {middle - LARGEST_OFFSET} to {middle + LARGEST_OFFSET}", "run it with another kernel")
    gather, group_of_block, group = _blocks(weight)
    tensors: dict[str, Tensor] = {}
    if gather is not None:
        tensors["gather"] = gather
        codes = pad(codes, (0, 0, 0, 1))[gather]
    widen = 0
    scale, offset = scale[group_of_block], offset[group_of_block]
    if group:
        widen = len(group_of_block) * group - codes.shape[0]
    spare = -n % WORD if small else 0
    codes = pad(codes, (0, spare, 0, widen))
    for place, part in enumerate(parts_of(n + spare)):
        piece = codes[:, part].contiguous()
        tensors[f"weight{place or ''}"] = operators.npu_convert_weight_to_int4pack(piece.to(torch.int32)) if small else piece  # type: ignore[attr-defined]
    tensors["scale"] = pad(scale, (0, spare), value=1.0).contiguous()
    tensors["offset"] = pad(offset, (0, spare)).to(torch.float32 if offset.is_floating_point() else torch.int16).contiguous()
    meta = {"group": group, "widen": widen, "bare": not bool(offset.any()), "scales": {}}
    return Prepared((n, k), tensors, NO_ACTIVATION, meta)


def _per_row(values: Tensor, n: int) -> Tensor:
    return values.expand(n, -1) if values.shape[0] == 1 else values


def _blocks(weight: IntAffineWeight) -> tuple[Tensor | None, list[int], int]:
    """(gather or None, the stored group of each block of rows, rows per block; 0 where all share one group).

    Groups of an activation order that are not whole multiples of the group size are filled with columns of zeros.
    """
    k, size = weight.in_features, weight.group_size
    if weight.group_index is None:
        groups = weight.scale.shape[1]
        return None, list(range(groups)), 0 if groups == 1 else size
    index = weight.group_index.to(torch.int64)
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=weight.scale.shape[1]).tolist()
    pieces, groups_of_blocks, start = [], [], 0
    for group, count in enumerate(counts):
        blocks = -(-count // size)
        pieces.append(pad(order[start : start + count], (0, blocks * size - count), value=k))
        groups_of_blocks += [group] * blocks
        start += count
    return torch.cat(pieces), groups_of_blocks, size if len(groups_of_blocks) > 1 else 0


@dataclass(slots=True)
class Scales:
    """Scales and offsets in x's dtype, as the operators take them.

    Args:
        scale, offset: [G, N']; no offset where none differs from 0.
        factor: float32 [N'], powers of two by which the product is multiplied, or None.
    """

    scale: Tensor
    offset: Tensor | None
    factor: Tensor | None


def scales_of(prepared: Prepared, dtype: torch.dtype) -> Scales:
    """The scales of a weight for inputs of one dtype, rounded to it; made once.

    float16 cannot hold every scale: rows with one outside of its normal numbers are moved into them by a power of two.
    """
    known: dict[torch.dtype, Scales] = prepared.meta["scales"]
    if dtype not in known:
        known[dtype] = _scales(prepared, dtype)
    return known[dtype]


def _scales(prepared: Prepared, dtype: torch.dtype) -> Scales:
    stored = prepared.tensors["scale"]
    offset = None if prepared.meta["bare"] else prepared.tensors["offset"].to(dtype)
    scale, factor = stored, None
    if dtype == torch.float16 and stored.dtype != dtype:
        # a few numbers, once: on the host, whose arithmetic has every type
        wide = stored.float().cpu()
        size = wide.abs()
        if bool((size < HALF_RANGE[0]).any() | (size > HALF_RANGE[1]).any()):
            _, exponent = torch.frexp(size.amax(0).clamp(min=2.0**-120))
            factor = torch.exp2(exponent.float())
            scale, factor = (wide / factor).to(stored.device), factor.to(stored.device)
    return Scales(scale.to(dtype), offset, factor)


def columns(x: Tensor, prepared: Prepared) -> Tensor:
    """x [M, K'] in the order of the weight's rows."""
    gather = prepared.tensors.get("gather")
    if gather is not None:
        return pad(x, (0, 1)).index_select(1, gather)
    return pad(x, (0, prepared.meta["widen"])) if prepared.meta["widen"] else x
