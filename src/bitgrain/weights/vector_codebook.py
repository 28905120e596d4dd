"""Vectors of consecutive rows of one column as codebook entries, with residual codes and columns of their own codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitgrain.errors import LayoutError, ShardError
from bitgrain.weights.base import Weight, WeightSpec, check_range

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_ENTRIES = 1 << 16
# Weights that are decoded at once: bounds the working set of dequantize().
CHUNK = 1 << 21


@dataclass(frozen=True, slots=True)
class VectorSizes:
    """The sizes of the codebooks of a VectorCodebookWeight; those of absent ones are 0.

    Args:
        length:   rows per vector.
        entries:  of each main codebook.
        residual: entries of each residual codebook.
        groups:   number of main codebooks.
        outlier_length:  rows per vector of the outlier columns.
        outlier_entries: of their codebook.
    """

    length: int
    entries: int
    residual: int = 0
    groups: int = 1
    outlier_length: int = 0
    outlier_entries: int = 0


def vector_spec(sizes: VectorSizes, scale_dtype: str = "", zero: bool = False) -> WeightSpec:
    """The spec of a VectorCodebookWeight; `parse_vector` reads its element back.

    Its bits are those of the main and residual codes per weight, rounded, at least 1.

    Args:
        scale_dtype: dtype of column_scale, "" if there is none.
        zero:        a column_offset is added.
    """
    residual = f" r{sizes.residual}" if sizes.residual else ""
    groups = f" G{sizes.groups}" if sizes.groups > 1 else ""
    outliers = f" o{sizes.outlier_length} e{sizes.outlier_entries}" if sizes.outlier_length else ""
    bits = (log2(sizes.entries) + log2(max(sizes.residual, 1))) / sizes.length
    element = f"v{sizes.length} c{sizes.entries}{residual}{groups}{outliers}"
    return WeightSpec("vector_codebook", element, max(1, round(bits)), zero="float" if zero else "none", scale_dtype=scale_dtype)


def parse_vector(element: str) -> VectorSizes:
    """The sizes of a vector_spec's element."""
    found = {word[0]: int(word[1:]) for word in element.split()}
    return VectorSizes(found["v"], found["c"], found.get("r", 0), found.get("G", 1), found.get("o", 0), found.get("e", 0))


def code_dtype(entries: int) -> torch.dtype:
    """The integer type in which indices of so many entries are held; int16 holds the bits of an unsigned one."""
    return torch.uint8 if entries <= 256 else torch.int16


def pack_codes(index: Tensor, entries: int) -> Tensor:
    """Indices of any integer type, each in [0, entries), in the type of `code_dtype`."""
    return index.to(torch.int32).to(code_dtype(entries))


def read_codes(codes: Tensor) -> Tensor:
    """int32: the unsigned values of codes as `pack_codes` makes them."""
    return codes.to(torch.int32) & 0xFFFF


@dataclass(frozen=True, slots=True, eq=False)
class VectorCodebookWeight(Weight):
    """W[n, k] = value[n, k] * column_scale[k] + column_offset[k], in float32, one rounding per operation.

    For outlier column number t, k = outlier_columns[t]:

        value[n, k] = outlier_centroids[outlier_codes[n // u, t], n % u]

    and for column number t of all others in ascending order, g = group_index[t]:

        value[n, k] = centroids[g, codes[n // v, t], n % v] + residual_centroids[g, residual_codes[n // v, t], n % v]

    Codes are uint8 up to 256 entries, else int16 that holds the bits of an unsigned number.  The last vector of a column may
    reach beyond N: the rest of it has no meaning.

    Args:
        out_features: N.
        codes:              [ceil(N / v), K - T].
        centroids:          floating point [G, n, v].
        group_index:        int32 [K - T], the codebooks of a column; None where G = 1.
        residual_codes:     [ceil(N / v), K - T] or None.
        residual_centroids: floating point [G, n_r, v] or None.
        outlier_codes:      [ceil(N / u), T] or None.
        outlier_centroids:  floating point [n_o, u] or None.
        outlier_columns:    int64 [T], ascending, or None.
        column_scale:       floating point [K] or None.
        column_offset:      floating point [K] or None.
    """

    out_features: int
    codes: Tensor
    centroids: Tensor
    group_index: Tensor | None = None
    residual_codes: Tensor | None = None
    residual_centroids: Tensor | None = None
    outlier_codes: Tensor | None = None
    outlier_centroids: Tensor | None = None
    outlier_columns: Tensor | None = None
    column_scale: Tensor | None = None
    column_offset: Tensor | None = None

    def __post_init__(self) -> None:
        problem = self._layout_problem()
        if problem:
            raise LayoutError("VectorCodebookWeight", problem, "the layout that the class documents", "correct the format that made it")

    def _layout_problem(self) -> str:
        n, k = self.shape
        groups, entries, v = self.centroids.shape
        columns = self.codes.shape[1]
        if self.codes.dtype != code_dtype(entries) or tuple(self.codes.shape) != (-(-n // v), columns):
            return f"codes {self.codes.dtype} {list(self.codes.shape)} for {n} rows, centroids {list(self.centroids.shape)}"
        if (self.group_index is None) != (groups == 1) or (self.group_index is not None and tuple(self.group_index.shape) != (columns,)):
            return f"{groups} groups, and a group_index that does not fit them"
        residual, book = self.residual_codes, self.residual_centroids
        if (residual is None) != (book is None):
            return "residual codes or residual centroids, but not both"
        if (
            residual is not None
            and book is not None
            and (
                residual.shape != self.codes.shape
                or residual.dtype != code_dtype(book.shape[1])
                or (book.shape[0], book.shape[2]) != (groups, v)
            )
        ):
            return f"residual codes {residual.dtype} {list(residual.shape)}, centroids {list(book.shape)}"
        wrong = [t.shape for t in (self.column_scale, self.column_offset) if t is not None and tuple(t.shape) != (k,)]
        if wrong:
            return f"a column scale or offset of shape {list(wrong[0])} for K = {k}"
        return self._outlier_problem(n)

    def _outlier_problem(self, n: int) -> str:
        codes, book, at = self.outlier_codes, self.outlier_centroids, self.outlier_columns
        if len({part is None for part in (codes, book, at)}) != 1:
            return "only some of the outliers' codes, centroids and columns"
        if codes is None or book is None or at is None:
            return ""
        fits = codes.dtype == code_dtype(book.shape[0]) and tuple(codes.shape) == (-(-n // book.shape[1]), len(at))
        return "" if fits else f"outlier codes {codes.dtype} {list(codes.shape)}, centroids {list(book.shape)}, {len(at)} columns"

    @property
    def shape(self) -> tuple[int, int]:
        outliers = 0 if self.outlier_columns is None else len(self.outlier_columns)
        return (self.out_features, self.codes.shape[1] + outliers)

    @property
    def sizes(self) -> VectorSizes:
        """The sizes of the codebooks."""
        groups, entries, v = self.centroids.shape
        residual = 0 if self.residual_centroids is None else self.residual_centroids.shape[1]
        outlier_entries, u = (0, 0) if self.outlier_centroids is None else self.outlier_centroids.shape
        return VectorSizes(v, entries, residual, groups, u, outlier_entries)

    @property
    def spec(self) -> WeightSpec:
        scale = "" if self.column_scale is None else str(self.column_scale.dtype).removeprefix("torch.")
        return vector_spec(self.sizes, scale, self.column_offset is not None)

    def dequantize(self) -> Tensor:
        n, k = self.shape
        result = torch.empty(n, k, device=self.codes.device)
        columns = self._main_columns() if self.outlier_columns is not None else slice(None)
        _, entries, v = self.centroids.shape
        step = max(1, CHUNK // (k * v))
        for first in range(0, self.codes.shape[0], step):
            part = slice(first, first + step)
            values = self._vectors(self.codes[part], self.centroids, entries)
            if self.residual_codes is not None and self.residual_centroids is not None:
                values += self._vectors(self.residual_codes[part], self.residual_centroids, self.residual_centroids.shape[1])
            result[v * first : v * (first + step), columns] = values[: n - v * first]
        if self.outlier_codes is not None and self.outlier_centroids is not None:
            result[:, self.outlier_columns] = _in_rows(self.outlier_centroids.float(), read_codes(self.outlier_codes))[:n]
        return self._scaled(result)

    def _vectors(self, codes: Tensor, centroids: Tensor, entries: int) -> Tensor:
        """float32 [v R, K - T] of codes [R, K - T]."""
        index = read_codes(codes)
        if self.group_index is not None:
            index = index + entries * self.group_index
        return _in_rows(centroids.float().flatten(0, 1), index)

    def gather_rows(self, index: Tensor) -> Tensor:
        values = self._main(index)
        if self.outlier_codes is not None and self.outlier_centroids is not None and self.outlier_columns is not None:
            u = self.outlier_centroids.shape[1]
            taken = read_codes(self.outlier_codes[torch.div(index, u, rounding_mode="floor")])
            outliers = self.outlier_centroids.float()[taken, (index % u)[:, None]]
            joined = torch.empty(len(index), self.shape[1], device=values.device)
            joined[:, self._main_columns()], joined[:, self.outlier_columns] = values, outliers
            values = joined
        return self._scaled(values)

    def _scaled(self, values: Tensor) -> Tensor:
        """`values` [M, K] itself, scaled and shifted in place."""
        if self.column_scale is not None:
            values *= self.column_scale.float()
        return values if self.column_offset is None else values.add_(self.column_offset.float())

    def _main(self, index: Tensor) -> Tensor:
        """float32 [len(index), K - T]: rows of the columns that are no outliers."""
        v = self.centroids.shape[2]
        vector, row = torch.div(index, v, rounding_mode="floor"), (index % v)[:, None]
        group: Tensor | int = 0 if self.group_index is None else self.group_index.long()
        values = self.centroids.float()[group, read_codes(self.codes[vector]), row]
        if self.residual_codes is not None and self.residual_centroids is not None:
            values += self.residual_centroids.float()[group, read_codes(self.residual_codes[vector]), row]
        return values

    def _is_outlier(self) -> Tensor:
        """bool [K]."""
        marks = torch.zeros(self.shape[1], dtype=torch.bool, device=self.codes.device)
        if self.outlier_columns is not None:
            marks[self.outlier_columns] = True
        return marks

    def _main_columns(self) -> Tensor:
        """int64 [K - T], ascending."""
        return (~self._is_outlier()).nonzero()[:, 0]

    def rows(self, start: int, stop: int) -> Self:
        check_range("rows of a VectorCodebookWeight", start, stop, self.out_features)
        main = self._vector_range(start, stop, self.centroids.shape[2])
        outlier = slice(0, 0) if self.outlier_centroids is None else self._vector_range(start, stop, self.outlier_centroids.shape[1])
        return replace(
            self, out_features=stop - start, codes=self.codes[main],
            residual_codes=None if self.residual_codes is None else self.residual_codes[main],
            outlier_codes=None if self.outlier_codes is None else self.outlier_codes[outlier],
        )  # fmt: skip

    def _vector_range(self, start: int, stop: int, length: int) -> slice:
        if start % length or (stop % length and stop != self.out_features):
            raise ShardError(
                "rows of a VectorCodebookWeight",
                f"[{start}, {stop})",
                f"multiples of {length}: a code stands for so many rows",
                "choose another parallel size",
            )
        return slice(start // length, -(-stop // length))

    def columns(self, start: int, stop: int) -> Self:
        k = self.shape[1]
        check_range("columns of a VectorCodebookWeight", start, stop, k)
        before = int(self._is_outlier()[:start].sum())
        inside = int(self._is_outlier()[start:stop].sum())
        main = slice(start - before, stop - before - inside)
        changes: dict[str, Tensor | None] = {"codes": self.codes[:, main].contiguous()}
        if self.group_index is not None:
            changes["group_index"] = self.group_index[main]
        if self.residual_codes is not None:
            changes["residual_codes"] = self.residual_codes[:, main].contiguous()
        if self.outlier_codes is not None and self.outlier_columns is not None:
            outliers = slice(before, before + inside)
            changes |= {
                "outlier_codes": self.outlier_codes[:, outliers].contiguous(),
                "outlier_columns": self.outlier_columns[outliers] - start,
            }
        for name in ("column_scale", "column_offset"):
            values: Tensor | None = getattr(self, name)
            changes[name] = None if values is None else values[start:stop]
        return replace(self, **changes)  # type: ignore[arg-type]

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        first = parts[0]
        changing = ("codes", "residual_codes", "outlier_codes")
        shared = [{name: t for name, t in p.data_tensors().items() if name not in changing} for p in parts]
        same = len({(p.spec, p.shape[1]) for p in parts}) == 1
        same = same and all(s.keys() == shared[0].keys() and all(torch.equal(s[name], shared[0][name]) for name in s) for s in shared)
        lengths = [size for size in (first.sizes.length, first.sizes.outlier_length) if size]
        if not same or any(p.out_features % size for p in parts[:-1] for size in lengths):
            raise ShardError(
                "concat of VectorCodebookWeights",
                "different codebooks or columns, or a height that ends inside a vector",
                "equal codebooks",
                "run the parts side by side",
            )
        stacked = {name: torch.cat([p.data_tensors()[name] for p in parts]) for name in changing if name in first.data_tensors()}
        return replace(first, out_features=sum(p.out_features for p in parts), **stacked)

    def data_tensors(self) -> dict[str, Tensor]:
        names = (
            "codes", "centroids", "group_index", "residual_codes", "residual_centroids", "outlier_codes", "outlier_centroids",
            "outlier_columns", "column_scale", "column_offset",
        )  # fmt: skip
        held = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in held.items() if tensor is not None}


def _in_rows(table: Tensor, index: Tensor) -> Tensor:
    """[v R, C] of entries of a table [E, v], index [R, C]: entry (r, c) is column c of rows v r ... v r + v - 1."""
    entries = table.index_select(0, index.flatten())
    (rows, columns), length = index.shape, table.shape[1]
    return entries.view(rows, columns, length).transpose(1, 2).reshape(rows * length, columns)
