"""Four-bit lookup codes with a scale per block of the flattened matrix, and int8 rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TORCH_DTYPES
from bitgrain.errors import BadValueError
from bitgrain.formats.base import Scheme, TensorRule
from bitgrain.formats.bitsandbytes.quant_state import STATE_PREFIX, QuantState
from bitgrain.formats.grouped import int_affine_spec
from bitgrain.formats.value_checks import require_finite, require_scale
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, CodebookWeight, IntAffineWeight, Weight, WeightSpec
from bitgrain.weights.codebook import codebook_spec

# The writer packs bytes and may then view them as any of these (bnb_4bit_quant_storage).
STORAGE_CODES = ("U8", "I8", "BF16", "F16", "F32", "F64")
CODE_SCALE = 127.0


@dataclass(frozen=True, slots=True)
class LookupScheme(Scheme):
    """W[n, k] = quant_map[code[i]] * absmax[i // block], i = n * K + k: blocks run over the flattened matrix, across rows.

    weight    bytes [ceil(N * K / 2), 1], perhaps viewed as a wider type; element 2i in the high nibble of byte i
    absmax    float [ceil(N * K / block)]; nested: uint8, absmax = nested_quant_map[u8] * nested_absmax[b // nested block] + offset

    The canonical weight needs groups that divide a row, so its group is the greatest common divisor of K and the block:
    the same scales, repeated where a block is cut.
    Source: bitsandbytes 0.50.2, functional.py (QuantState, dequantize_4bit) and backends/default/ops.py.

    Args:
        state:   what the stored state says.
        storage: element type under which the bytes are stored, as safetensors spells it.
    """

    state: QuantState
    storage: str = "U8"
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.state.shape

    @property
    def group_size(self) -> int:
        """Columns of a row that are sure to share a block."""
        return gcd(self.shape[1], self.state.block)

    @property
    def weight_spec(self) -> WeightSpec:
        return codebook_spec(4, self.group_size if self.group_size < self.shape[1] else 0)

    def tensors(self) -> tuple[TensorRule, ...]:
        state, nested = self.state, self.state.nested_block
        items = -(-((state.numel + 1) // 2) // TORCH_DTYPES[self.storage].itemsize)
        rules = [
            TensorRule("weight", (self.storage,), ((items, 1),)),
            TensorRule("weight.absmax", ("U8",) if nested else FLOAT_CODES, ((state.blocks,),)),
            TensorRule("weight.quant_map", FLOAT_CODES, ((16,),)),
            TensorRule(f"{STATE_PREFIX}{state.quant_type}", ("U8",), ((-1,),)),
        ]
        if nested:
            rules.append(TensorRule("weight.nested_absmax", FLOAT_CODES, ((-(-state.blocks // nested),),)))
            rules.append(TensorRule("weight.nested_quant_map", FLOAT_CODES, ((256,),)))
        return tuple(rules)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """CodebookWeight with float32 scales; see Scheme.to_weight."""
        table = _lookup_table("weight.quant_map", tensors["weight.quant_map"])
        codes = self._codes(tensors["weight"])
        absmax = self._nested_absmax(tensors) if self.state.nested_block else self._absmax(tensors, table, codes)
        first = torch.arange(0, self.state.numel, self.group_size)
        scale = absmax[torch.div(first, self.state.block, rounding_mode="floor")].view(self.shape[0], -1)
        return CodebookWeight.from_codes(codes, 4, table.view(1, 16), scale.contiguous(), self.group_size)

    def _codes(self, stored: Tensor) -> Tensor:
        """uint8 [N, K]."""
        count = self.state.numel
        packed = stored.contiguous().view(-1).view(torch.uint8)[: (count + 1) // 2]
        return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:count].view(self.shape)

    def _absmax(self, tensors: Mapping[str, Tensor], table: Tensor, codes: Tensor) -> Tensor:
        """float32 [blocks] of plain scales."""
        name = "weight.absmax"
        absmax = tensors[name]
        worthless = not bool(absmax.any()) and not bool(table[codes.long()].any())
        return require_scale(name, absmax, codes_are_zero=worthless).float()

    def _nested_absmax(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """float32 [blocks] of scales that are quantized themselves; a small one may come out below zero."""
        inner = tensors["weight.nested_absmax"]
        require_scale("weight.nested_absmax", inner, codes_are_zero=not bool(inner.any()))
        table = _lookup_table("weight.nested_quant_map", tensors["weight.nested_quant_map"])
        stored = tensors["weight.absmax"]
        block = torch.div(torch.arange(stored.numel()), self.state.nested_block, rounding_mode="floor")
        absmax = table[stored.long()].mul_(inner.float()[block]).add_(self.state.nested_offset)
        if not bool(absmax.any()):
            raise BadValueError("weight.absmax", "every scale is zero", "a scale that is not zero", "the file is damaged; fetch or write it again")
        return require_finite("weight.absmax", absmax)


def _lookup_table(name: str, stored: Tensor) -> Tensor:
    """float32 copy of a stored table.

    Raises:
        BadValueError: a value is not finite, or all are zero.
    """
    table = require_finite(name, stored).float().clone()
    if not bool(table.any()):
        raise BadValueError(name, "every value of the table is zero", "a table of values", "the file is damaged; fetch or write it again")
    return table


@dataclass(frozen=True, slots=True)
class Int8RowScheme(Scheme):
    """`weight` int8 [N, K] and `SCB` [N], the largest magnitude of each row: W = weight * (SCB / 127).

    Args:
        needs_format: `weight_format` must be there, because other modules of the checkpoint have it.
    """

    shape: tuple[int, int]
    activation: ActivationSpec = NO_ACTIVATION
    needs_format: bool = False

    @property
    def weight_spec(self) -> WeightSpec:
        return int_affine_spec(8, self.shape[1], self.shape[1], "constant", "F32")

    def tensors(self) -> tuple[TensorRule, ...]:
        return (
            TensorRule("weight", ("I8",), (self.shape,)),
            TensorRule("SCB", FLOAT_CODES, ((self.shape[0],),)),
            TensorRule("weight_format", ("U8",), ((), (1,)), required=self.needs_format),
        )

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """IntAffineWeight of codes + 128 with float32 scales per row; see Scheme.to_weight."""
        signed, largest = tensors["weight"], tensors["SCB"]
        worthless = not bool(largest.any()) and not bool(signed.any())
        scale = require_scale("SCB", largest, codes_are_zero=worthless).float() / CODE_SCALE
        codes = signed.contiguous().view(torch.uint8) ^ 0x80
        return IntAffineWeight.from_codes(codes, 8, scale.view(-1, 1), 128, self.shape[1])
