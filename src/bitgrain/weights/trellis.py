"""Tiles of a matrix as circular bit streams whose overlapping windows stand for values (trellis-coded quantization)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.numerics.trellis_codes import COMPUTED, MAX_WINDOW, TABLED, bit_windows, state_values
from bitgrain.weights.base import Weight, WeightSpec, check_range

if TYPE_CHECKING:
    from typing_extensions import Self

TILE = 16  # rows and columns of a tile
TILE_BYTES_PER_BIT = TILE * TILE // 8
ORDERS = ("rows", "fragments")
# Weights that are decoded at once: bounds the working set of dequantize(), some 30 bytes each.
CHUNK = 1 << 21


def trellis_spec(bits: int, decoder: str, window: int, step: int, table_bits: int = 0, order: str = "rows") -> WeightSpec:
    """The spec of a TrellisWeight with a table of 2**table_bits rows (0: none); `parse_element` reads its element back."""
    table = f" T{table_bits}" if table_bits else ""
    return WeightSpec("trellis", f"trellis{bits} {decoder} L{window} V{step}{table}{' fragments' if order == 'fragments' else ''}", bits)


def parse_element(element: str) -> tuple[str, int, int, int, str]:
    """(decoder, window, step, table_bits, order) of a trellis_spec's element."""
    _, decoder, *rest = element.split()
    order = "fragments" if rest[-1] == "fragments" else "rows"
    sizes = {word[0]: int(word[1:]) for word in rest if word != "fragments"}
    return decoder, sizes["L"], sizes["V"], sizes.get("T", 0), order


@dataclass(frozen=True, slots=True, eq=False)
class TrellisWeight(Weight):
    """Tile (r, c) holds W[16 r : 16 r + 16, 16 c : 16 c + 16]; window t of its stream stands for its values V t ... V t + V - 1.

    Args:
        packed:  uint8 [N / 16, K / 16, 32 bits]: the tile's circular bit stream, most significant bit first.
        bits:    bits per weight; windows begin `bits * step` bits apart.
        window:  bits of a window (L).
        step:    values per window (V), a divisor of 256.
        decoder: how a window becomes values, see numerics.trellis_codes.
        table:   floating point [2**b, step] for "lut" (b = window), "quantlut" and "quantlut_sym"; None otherwise.
        order:   where value p of a tile stands: "rows": row p // 16, column p % 16; "fragments" (of a 16 x 16 matrix
                 instruction): row (p >> 5) + 8 bit_1(p), column 8 bit_2(p) + 2 ((p >> 3) & 3) + bit_0(p).
    """

    packed: Tensor
    bits: int
    window: int
    step: int
    decoder: str
    table: Tensor | None = None
    order: str = "rows"

    def __post_init__(self) -> None:
        problem = self._layout_problem()
        if problem:
            raise LayoutError("TrellisWeight", problem, "the layout that the class documents", "correct the format that made it")

    def _layout_problem(self) -> str:
        if self.packed.dtype != torch.uint8 or self.packed.dim() != 3 or self.packed.shape[2] != TILE_BYTES_PER_BIT * self.bits:
            return f"packed {self.packed.dtype} {list(self.packed.shape)} for {self.bits} bits"
        if self.order not in ORDERS or self.step < 1 or TILE * TILE % self.step or not self.bits * self.step <= self.window <= MAX_WINDOW:
            return f"windows of {self.window} bits, {self.step} values of {self.bits} bits each, order {self.order!r}"
        if self.decoder in COMPUTED:
            return "" if self.table is None and self.step == 1 else f"{self.decoder} with a table, or {self.step} values per window"
        if self.decoder not in TABLED or self.table is None:
            return f"{self.decoder} {'with' if self.table is not None else 'without'} a table"
        rows, largest = self.table.shape[0], {"lut": self.window, "quantlut": 16, "quantlut_sym": 15}[self.decoder]
        power = rows > 0 and not rows & (rows - 1) and rows <= 1 << largest
        if not power or (self.decoder == "lut" and rows != 1 << self.window) or tuple(self.table.shape[1:]) != (self.step,):
            return f"table {list(self.table.shape)} for {self.decoder}, windows of {self.window} bits, {self.step} values each"
        return ""

    @property
    def shape(self) -> tuple[int, int]:
        return (TILE * self.packed.shape[0], TILE * self.packed.shape[1])

    @property
    def spec(self) -> WeightSpec:
        table_bits = 0 if self.table is None else self.table.shape[0].bit_length() - 1
        return trellis_spec(self.bits, self.decoder, self.window, self.step, table_bits, self.order)

    def dequantize(self) -> Tensor:
        (high, wide), (n, k) = self.packed.shape[:2], self.shape
        values = state_values(self.decoder, self.window, self.table).to(self.packed.device)
        result = torch.empty(n, k, device=self.packed.device)
        at_once = max(1, CHUNK // (TILE * k))
        for start in range(0, high, at_once):
            stop = min(high, start + at_once)
            states = bit_windows(self.packed[start:stop].reshape(-1, self.packed.shape[2]), self.window, self.bits * self.step)
            tiles = values.index_select(0, states.reshape(-1)).view(stop - start, wide, TILE, TILE)
            if self.order == "fragments":
                tiles = tiles.reshape(stop - start, wide, 8, 4, 2, 2, 2).permute(0, 1, 5, 2, 4, 3, 6).reshape(stop - start, wide, TILE, TILE)
            result[start * TILE : stop * TILE] = tiles.permute(0, 2, 1, 3).reshape(-1, k)
        return result

    def gather_rows(self, index: Tensor) -> Tensor:
        tiles, place = torch.unique(torch.div(index, TILE, rounding_mode="floor"), return_inverse=True)
        return replace(self, packed=self.packed[tiles]).dequantize()[place * TILE + index % TILE]

    def rows(self, start: int, stop: int) -> Self:
        first, last = self._tiles("rows", start, stop, self.shape[0])
        return replace(self, packed=self.packed[first:last])

    def columns(self, start: int, stop: int) -> Self:
        first, last = self._tiles("columns", start, stop, self.shape[1])
        return replace(self, packed=self.packed[:, first:last])

    @staticmethod
    def _tiles(what: str, start: int, stop: int, size: int) -> tuple[int, int]:
        check_range(f"{what} of a TrellisWeight", start, stop, size)
        if start % TILE or stop % TILE:
            raise ShardError(f"{what} of a TrellisWeight", f"[{start}, {stop})", f"multiples of {TILE}: a tile is one bit stream", "choose another parallel size")
        return start // TILE, stop // TILE

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        first = parts[0]
        same = len({(p.spec, p.shape[1]) for p in parts}) == 1
        if not same or any(p.table is not None and first.table is not None and not torch.equal(p.table, first.table) for p in parts):
            raise ShardError("concat of TrellisWeights", "different widths, settings or tables", "equal ones", "run the parts side by side")
        return replace(first, packed=torch.cat([p.packed for p in parts]))

    def data_tensors(self) -> dict[str, Tensor]:
        return {"packed": self.packed} if self.table is None else {"packed": self.packed, "table": self.table}
