"""Model of the grouped matrix product: what the vendor documents, as torch code on host tensors.

Source: torch_npu's API reference, npu_grouped_matmul (repository Ascend/op-plugin, docs/zh/custom_APIs/torch_npu), read 2026;
outputs of int32 as in its table of types for tuning, which is also how vllm-ascend's mixture-of-experts code calls it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitgrain.kernels.npu.contract_checks import need, need_absent, need_dtype, need_filled, need_shape, product, unpacked_matrix
from bitgrain.kernels.npu.contract_matmul import HALF, antiquant, check_bias

LONGEST_LIST = 128
MOST_GROUPS = 1024
_NAME = "npu_grouped_matmul"
# what int8 matrices take: output to type of scale
INT8_OUTPUTS = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}


def npu_grouped_matmul(
    x: Sequence[Tensor], weight: Sequence[Tensor], *, bias: Sequence[Tensor] | None = None, scale: Sequence[Tensor] | None = None,
    offset: object = None, antiquant_scale: Sequence[Tensor] | None = None, antiquant_offset: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None, group_list: Tensor | None = None, activation_input: object = None,
    activation_quant_scale: object = None, activation_quant_offset: object = None, split_item: int = 0, group_type: int | None = None,
    group_list_type: int = 0, act_type: int = 0, tuning_config: object = None, output_dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """[y]: rows of one x [M, K], in groups one after another, each times its own weight [K, N].

    int8:  (x w + bias) * scale * per_token_scale; x w + bias for an int32 output, without scales
    other: x ((w + antiquant_offset) * antiquant_scale) + bias.  The offset is ADDED.

    Args:
        x:      one matrix: int8, float16 or bfloat16.
        weight: one tensor [groups, K, N], or up to 128 of [K, N]: int8, or int32 words of eight 4-bit integers.
        bias:   per weight [N]: int32 of int8 x, float16 of float16 x, float32 of bfloat16 x.
        scale:  per weight [N]: bfloat16 for bfloat16 outputs, float32 for float16 ones.
        antiquant_scale, antiquant_offset: per weight of x's dtype, both: [N] or, of 4-bit integers, [G, N] with G dividing K.
        per_token_scale: one float32 [M].
        group_list: int64 [groups], last rows of the groups (group_list_type 0: cumulative) or their sizes (1: of two groups or more).
        split_item, group_type: 2 or 3, and 0: rows are grouped, one output.
    Raises:
        LayoutError: the call breaks the contract.
    """
    need_absent(_NAME, offset=offset, activation_input=activation_input, activation_quant_scale=activation_quant_scale,
                activation_quant_offset=activation_quant_offset, tuning_config=tuning_config)  # fmt: skip
    need(split_item in (2, 3) and group_type == 0 and act_type == 0, _NAME, f"{split_item}, {group_type}, {act_type}", "split_item 2 or 3, group_type 0, no activation")
    need(len(x) == 1 and x[0].dim() == 2, _NAME, f"{len(x)} inputs", "one matrix")
    need_filled(_NAME, x=x[0])
    matrices, lists = _per_group(weight, (bias, scale, antiquant_scale, antiquant_offset))
    sizes = _sizes(group_list, group_list_type, len(matrices), x[0].shape[0])
    need(len({m.shape for m in matrices}) == 1, _NAME, "weights of several shapes", "one shape")
    pertoken = per_token_scale[0] if per_token_scale is not None else None
    run = _int8_rows if x[0].dtype == torch.int8 else _float_rows
    tokens = [None] * len(sizes) if pertoken is None else pertoken.split(sizes)
    outputs = [run(rows, matrices[i], [part[i] for part in lists], tokens[i], output_dtype) for i, rows in enumerate(x[0].split(sizes))]
    return [torch.cat(outputs)]


def _per_group(weight: Sequence[Tensor], lists: Sequence[Sequence[Tensor] | None]) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """([K, N or N / 8] of each group, each of the lists as one entry per group)."""
    first = weight[0]
    if len(weight) == 1 and first.dim() == 3:
        need(first.shape[0] <= MOST_GROUPS, _NAME, f"{first.shape[0]} groups", f"at most {MOST_GROUPS}")
        need(all(values is None or len(values) == 1 for values in lists), _NAME, "lists of several tensors", "one, as there is one weight")
        return list(first), [[None] * len(first) if values is None else list(values[0]) for values in lists]
    need(all(w.dim() == 2 for w in weight) and len(weight) <= LONGEST_LIST, _NAME, f"{len(weight)} weights", f"at most {LONGEST_LIST} matrices")
    need(all(values is None or len(values) == len(weight) for values in lists), _NAME, "lists of other lengths", "one tensor per weight")
    return list(weight), [[None] * len(weight) if values is None else list(values) for values in lists]


def _sizes(group_list: Tensor | None, kind: int, groups: int, rows: int) -> list[int]:
    need(group_list is not None and group_list.dtype == torch.int64 and group_list.dim() == 1, _NAME, "no group_list", "an int64 vector")
    assert group_list is not None
    need(len(group_list) == groups, _NAME, f"{len(group_list)} groups for {groups} weights", "one per weight")
    need(kind in (0, 1) and (kind == 0 or groups > 1), _NAME, f"group_list_type {kind} of {groups} groups", "0, or 1 for several groups")
    sizes = torch.diff(group_list, prepend=torch.zeros_like(group_list[:1])) if kind == 0 else group_list
    need(bool((sizes >= 0).all()) and int(sizes.sum()) == rows, _NAME, f"group_list {group_list.tolist()} for {rows} rows", "sizes that add up to the rows")
    found: list[int] = sizes.tolist()
    return found


def _int8_rows(rows: Tensor, weight: Tensor, values: list[Tensor | None], token: Tensor | None, output: torch.dtype | None) -> Tensor:
    bias, scale, antiquant_scale, antiquant_offset = values
    need_absent(_NAME, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    need_dtype(weight, (torch.int8,), _NAME, "weight of int8 x")
    n = weight.shape[1]
    total = product(rows, weight)
    if bias is not None:
        need_dtype(bias, (torch.int32,), _NAME, "bias of int8 x")
        need_shape(bias, ((n,),), _NAME, "bias")
        total = total + bias.double()
    if output == torch.int32:
        need_absent(_NAME, scale=scale, per_token_scale=token)
        return total.to(torch.int32)
    need(output in INT8_OUTPUTS and scale is not None, _NAME, f"output {output} of int8 x", "int32, or float16 or bfloat16 with a scale")
    assert output is not None and scale is not None
    need_dtype(scale, (INT8_OUTPUTS[output],), _NAME, "scale")
    need_shape(scale, ((n,),), _NAME, "scale")
    y = total * scale.double()
    if token is not None:
        need_dtype(token, (torch.float32,), _NAME, "per_token_scale")
        need(token.dim() == 1 and token.shape[0] == rows.shape[0], _NAME, f"per_token_scale {list(token.shape)}", "one per row")
        y = y * token.double()[:, None]
    return y.float().to(output)


def _float_rows(rows: Tensor, weight: Tensor, values: list[Tensor | None], token: Tensor | None, output: torch.dtype | None) -> Tensor:
    bias, scale, antiquant_scale, antiquant_offset = values
    need_absent(_NAME, scale=scale, per_token_scale=token)
    need_dtype(rows, HALF, _NAME, "x")
    need(output in (None, rows.dtype), _NAME, f"output {output}", "x's dtype")
    need(antiquant_scale is not None and antiquant_offset is not None, _NAME, "a scale or an offset is missing", "both of an integer weight")
    assert antiquant_scale is not None and antiquant_offset is not None
    words = weight.dtype == torch.int32
    need_dtype(weight, (torch.int8, torch.int32), _NAME, "weight")
    matrix = unpacked_matrix(weight, _NAME) if words else weight
    (k, n), groups = matrix.shape, antiquant_scale.shape[0] if antiquant_scale.dim() == 2 else 0
    need(rows.shape[1] == k, _NAME, f"x of {rows.shape[1]} columns", f"K = {k}")
    if groups:
        need(words and k % groups == 0, _NAME, f"{groups} groups of K = {k}, weight {weight.dtype}", "groups that divide K, of 4-bit integers")
        need_shape(antiquant_scale, ((groups, n),), _NAME, "antiquant_scale")
    else:
        need_shape(antiquant_scale, ((n,),), _NAME, "antiquant_scale")
    y = product(rows, antiquant(matrix, rows.dtype, antiquant_scale, antiquant_offset, k // groups if groups else 0, _NAME))
    if bias is not None:
        check_bias(bias, rows.dtype, ((n,),), _NAME)
        y = y + bias.double()
    return y.float().to(rows.dtype)
