"""Integer weights as compressed-tensors stores them: one int8 per value, or packed 32-bit words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TORCH_DTYPES
from bitgrain.errors import BadValueError, LabelMismatchError, ShapeMismatchError
from bitgrain.formats.base import Scheme, TensorRule
from bitgrain.formats.stored_scales import (
    ZERO_CODES,
    checked_scale,
    filled_activation,
    grid_of,
    grid_shapes,
    require_no_zero_point,
    static_input_rules,
)
from bitgrain.numerics.bitpack import dense_bytes, dense_words, pack_dense, padded_words, unpack_dense, unpack_padded, words_as_bytes
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight, WeightSpec

PACKINGS = ("plain", "dense", "padded")


def packed_words(count: int, bits: int, packing: str) -> int:
    """32-bit words that `count` codes take under "dense" or "padded" packing."""
    return padded_words(count, bits) if packing == "padded" else dense_words(count, bits)


@dataclass(frozen=True, slots=True)
class IntScheme(Scheme):
    """W[n, k] = (q[n, k] - z) * s with signed codes q in [-2**(bits-1), 2**(bits-1) - 1].

    plain:  `weight` int8 [N, K] holds q.
    packed: `weight_packed` int32 [N, words(K)] holds q + 2**(bits-1), low bits first; `weight_shape` holds (N, K).
    `weight_scale` one per cell; `weight_zero_point` z: int8 of the scale's shape, or, where `packed_zero`, int32
    [words(N), G] holding z + 2**(bits-1) packed along N.  `weight_g_idx` int32 [K] gives each column's group; if one of
    its values is -1 it was never set and columns are in order.

    Args:
        cell:         (rows, columns) that share a scale.
        packing:      "plain", "dense" (one bit stream per row) or "padded" (no code crosses a word).
        packed_zero:  zero points are packed.
        scale_dtype:  element type of the scales as safetensors spells it.
        act_order:    columns look their group up in `weight_g_idx`.
        stored_index: a `weight_g_idx` is stored though there is no act-order; it must name the natural order.
        signed_scale: the writer may be one whose scales carry a sign; the values decide.
    """

    shape: tuple[int, int]
    activation: ActivationSpec
    bits: int
    cell: tuple[int, int]
    symmetric: bool = True
    packing: str = "plain"
    packed_zero: bool = False
    scale_dtype: str = "BF16"
    act_order: bool = False
    stored_index: bool = False
    signed_scale: bool = False

    @property
    def weight_spec(self) -> WeightSpec:
        rows, columns = self._expanded_grid()
        grouped = columns > 1 or self.act_order
        granularity = "group" if grouped else "channel" if rows == self.shape[0] else "tensor"
        return WeightSpec(
            "int_affine",
            f"uint{self.bits}",
            self.bits,
            granularity,
            self.cell[1] if grouped else 0,
            zero="constant" if self.symmetric else "integer",
            group_index=self.act_order,
            scale_dtype=str(TORCH_DTYPES[self.scale_dtype]).removeprefix("torch."),
        )

    def _expanded_grid(self) -> tuple[int, int]:
        """Scales after rows of two-dimensional blocks are written out."""
        rows, columns = grid_of(self.shape, self.cell)
        return (1 if rows == 1 else self.shape[0], columns)

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        shapes = grid_shapes(grid_of(self.shape, self.cell))
        if self.packing == "plain":
            rules = [TensorRule("weight", ("I8",), (self.shape,))]
        else:
            words = packed_words(k, self.bits, self.packing)
            rules = [TensorRule("weight_packed", ("I32",), ((n, words),)), TensorRule("weight_shape", ("I64", "I32"), ((2,),))]
        rules.append(TensorRule("weight_scale", FLOAT_CODES, shapes))
        rules.append(self._zero_rule(shapes))
        if self.act_order or self.stored_index:
            rules.append(TensorRule("weight_g_idx", ("I32", "I64"), ((k,),)))
        return (*rules, *static_input_rules(self.activation))

    def _zero_rule(self, shapes: tuple[tuple[int, ...], ...]) -> TensorRule:
        if self.symmetric:
            return TensorRule("weight_zero_point", ZERO_CODES, shapes, required=False)
        if self.packed_zero:
            words = packed_words(self.shape[0], self.bits, self.packing)
            return TensorRule("weight_zero_point", ("I32",), ((words, grid_of(self.shape, self.cell)[1]),))
        return TensorRule("weight_zero_point", ("I8", "I16", "I32"), shapes)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        """IntAffineWeight with unsigned codes q + 2**(bits-1); see Scheme.to_weight."""
        packed = self._plain_codes(tensors["weight"]) if self.packing == "plain" else self._packed_codes(tensors)
        scale = tensors["weight_scale"]
        grid = grid_of(self.shape, self.cell)
        if not bool(scale.any()):
            empty = 1 << (self.bits - 1)
            checked_scale("weight_scale", scale, unpack_dense(packed, self.bits, self.shape[1]), empty)
        else:
            signed = self.signed_scale and self._signs_are_meant(packed, scale.reshape(grid))
            checked_scale("weight_scale", scale, packed, signed=signed)
        zero: int | Tensor = 1 << (self.bits - 1)
        if self.symmetric:
            require_no_zero_point("weight_zero_point", tensors.get("weight_zero_point"))
        else:
            zero = self._expand_rows(self._zero_points(tensors["weight_zero_point"], grid))
        index = self._group_index(tensors.get("weight_g_idx"))
        group = self.cell[1] if grid[1] > 1 or index is not None else self.shape[1]
        return IntAffineWeight(packed, self.bits, self.shape[1], self._expand_rows(scale.reshape(grid)), zero, group, index)

    def to_activation(self, tensors: Mapping[str, Tensor]) -> ActivationSpec:
        return filled_activation(self.activation, dict(tensors))

    def _signs_are_meant(self, packed: Tensor, scale: Tensor) -> bool:
        """Whether negative scales look written so: of both signs, and nearly every negative one with the lowest code in its cell.

        A quantizer that gives the value of largest magnitude the lowest code leaves such scales; one that divides by an
        absolute maximum has the lowest code in about half of its cells, which a scale of the wrong sign would keep.
        """
        negative = self._expand_rows(scale) < 0
        if bool(negative.all()) or not bool(negative.any()):
            return False
        lowest = unpack_dense(packed, self.bits, self.shape[1]) == 0
        group = torch.arange(self.shape[1], device=packed.device) // self.cell[1]
        count = torch.zeros(negative.shape, device=packed.device).index_add_(1, group, lowest.float())
        return float((count[negative] > 0).float().mean()) > 0.75

    def _plain_codes(self, weight: Tensor) -> Tensor:
        """Dense stream of unsigned codes, uint8 [N, ceil(K * bits / 8)], of signed codes int8 [N, K]."""
        if self.bits == 8:
            return weight.contiguous().view(torch.uint8) ^ 0x80
        self._check_signed("weight", weight, "codes")
        return pack_dense((weight + (1 << (self.bits - 1))).to(torch.uint8), self.bits)

    def _check_signed(self, name: str, values: Tensor, what: str) -> None:
        """Raise BadValueError unless the values are signed numbers of `bits` bits."""
        half = 1 << (self.bits - 1)
        low, high = (int(v) for v in values.aminmax())
        if low < -half or high >= half:
            found, needed = f"{what} from {low} to {high}", f"{self.bits}-bit {what} in [{-half}, {half - 1}]"
            raise BadValueError(name, found, needed, "correct num_bits, or fetch the right checkpoint: the file may be damaged")

    def _packed_codes(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The same stream of packed words, whose size the file says a second time."""
        stored = tuple(int(v) for v in tensors["weight_shape"])
        if stored != self.shape:
            raise ShapeMismatchError(
                "weight_shape",
                f"it says {list(stored)}",
                f"{list(self.shape)}, by the model's sizes and the other tensors",
                "correct num_bits and the sizes, or fetch the right checkpoint",
            )
        words = tensors["weight_packed"]
        if self.packing == "padded":
            return pack_dense(unpack_padded(words, self.bits, self.shape[1]), self.bits)
        return words_as_bytes(words)[:, : dense_bytes(self.shape[1], self.bits)].contiguous()

    def _zero_points(self, stored: Tensor, grid: tuple[int, int]) -> Tensor:
        """int16 of the grid's shape, in the unsigned domain of the codes."""
        if not self.packed_zero:
            self._check_signed("weight_zero_point", stored, "zero points")
            return stored.reshape(grid).to(torch.int16) + (1 << (self.bits - 1))
        words = stored.t().contiguous()
        if self.packing == "padded":
            codes = unpack_padded(words, self.bits, self.shape[0])
        else:
            codes = unpack_dense(words_as_bytes(words), self.bits, self.shape[0])
        return codes.t().contiguous().to(torch.int16)

    def _expand_rows(self, values: Tensor) -> Tensor:
        """[N, columns] of values that blocks of rows share; one row stays one."""
        if values.shape[0] in (1, self.shape[0]):
            return values.contiguous()
        return torch.repeat_interleave(values, self.cell[0], dim=0)[: self.shape[0]].contiguous()

    def _group_index(self, stored: Tensor | None) -> Tensor | None:
        """int32 [K] where columns look their group up, else None; what is stored must be possible."""
        if stored is None:
            return None
        k, size = self.shape[1], self.cell[1]
        natural = torch.arange(k, dtype=torch.int32, device=stored.device) // size
        unset = bool((stored == -1).any())
        index = natural if unset and int(stored.min()) == -1 else stored.to(torch.int32)
        groups = grid_of(self.shape, self.cell)[1]
        low, high = (int(v) for v in index.aminmax())
        if low < 0 or high >= groups:
            raise BadValueError(
                "weight_g_idx",
                f"groups from {low} to {high}",
                f"groups in [0, {groups - 1}], or -1 for not set",
                "the file is damaged, or group_size is wrong",
            )
        if self.act_order:
            most = int(torch.bincount(index.long(), minlength=groups).max())
            if most > size:
                raise BadValueError(
                    "weight_g_idx",
                    f"a group of {most} columns",
                    f"at most {size} columns per group",
                    "the file is damaged, or group_size is wrong",
                )
            return index.contiguous()
        if not torch.equal(index, natural):
            raise LabelMismatchError(
                "weight_g_idx",
                "columns are out of their natural order",
                "`actorder: group` in the configuration for such an index",
                "correct `actorder`",
            )
        return None
