"""torch operators around the native codebook products and Hadamard transforms, with fakes so that torch.compile traces them.

The operators own no state: every tensor that a kernel reads is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from bitgrain.kernels.cpu import codebook_calls as calls
from bitgrain.kernels.cpu.codebook_calls import DTYPE_IDS, pointer, product
from bitgrain.kernels.cpu.library import check, native

_UNIT = 8
_library = torch.library.Library("bitgrain", "FRAGMENT")


def _define(name: str, arguments: str, run: Callable[..., Tensor]) -> Any:
    """Operator `name`(x, `arguments`, bias, n, dtype) -> [rows, n], run on the host processor by `run`."""
    _library.define(f"{name}(Tensor x, {arguments}, Tensor? bias, int n, ScalarType dtype) -> Tensor")
    _library.impl(name, run, "CPU")

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(x.shape[0], rest[-2], dtype=rest[-1])

    torch.library.register_fake(f"bitgrain::{name}", fake)
    return getattr(torch.ops.bitgrain, name).default


def _additive(x: Tensor, codes: Tensor, books: Tensor, scale: Tensor, bias: Tensor | None, n: int, dtype: torch.dtype) -> Tensor:
    count, entries, h, g = books.shape
    described = calls.AdditiveCodes(codes.data_ptr(), codes.element_size(), entries.bit_length() - 1, count, books.data_ptr(), DTYPE_IDS[books.dtype], h, g)
    return product("bg_additive", described, x, n, -(-x.shape[1] // _UNIT), dtype, bias, scale=scale, scale_rows=h)


def _lattice(
    x: Tensor, codes: Tensor, residual: Tensor | None, magnitudes: Tensor, signs: Tensor, shifts: Tensor, second: Tensor, factor: float, bias: Tensor | None, n: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    size = 0 if residual is None else residual.element_size()
    described = calls.LatticeCodes(codes.data_ptr(), pointer(residual), size, factor, magnitudes.data_ptr(), signs.data_ptr(), shifts.data_ptr(), second.data_ptr())
    return product("bg_lattice", described, x, n, codes.shape[1], dtype, bias)


def _trellis(
    x: Tensor, packed: Tensor, table: Tensor | None, bits: int, window: int, step: int, decoder: int, fragments: bool, factor: float, bias: Tensor | None, n: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    table_bits = 0 if table is None else table.shape[0].bit_length() - 1
    described = calls.TrellisCodes(packed.data_ptr(), bits, window, step, decoder, table_bits, int(fragments), pointer(table))
    return product("bg_trellis", described, x, n, x.shape[1] // _UNIT, dtype, bias, factor=factor)


def _book(codes: Tensor | None, book: Tensor | None, start: Tensor | None) -> calls.VectorBook:
    if codes is None or book is None:
        return calls.VectorBook(None, None, 0, None)
    return calls.VectorBook(codes.data_ptr(), book.data_ptr(), codes.element_size(), pointer(start))


def _vector(
    x: Tensor, codes: Tensor, book: Tensor, start: Tensor | None, residual_codes: Tensor | None, residual_book: Tensor | None, residual_start: Tensor | None, length: int,
    outlier_codes: Tensor | None, outlier_book: Tensor | None, outlier_length: int, gather: Tensor | None, column_scale: Tensor | None, column_offset: Tensor | None,
    bias: Tensor | None, n: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    none, kind = calls.VectorBook(None, None, 0, None), DTYPE_IDS[book.dtype]
    columns = codes.shape[1]
    main, residual = _book(codes, book, start), _book(residual_codes, residual_book, residual_start)
    sections = [calls.VectorCodes(main, residual, kind, length, columns, -(-columns // _UNIT))] if columns else []
    if outlier_codes is not None:
        outliers = outlier_codes.shape[1]
        sections.append(calls.VectorCodes(_book(outlier_codes, outlier_book, None), none, kind, outlier_length, outliers, -(-outliers // _UNIT)))
    units = sum(section.units for section in sections)
    described = (calls.VectorCodes * len(sections))(*sections)
    return product("bg_vector", described, x, n, units, dtype, bias, gather, column_scale, column_offset)


def _lookup(
    x: Tensor, packed: Tensor, row_bytes: int, bits: int, table: Tensor, scale: Tensor, units: int, units_per_group: int, gather: Tensor | None, bias: Tensor | None,
    n: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    stride = table.shape[1] if table.shape[0] > 1 else 0
    described = calls.LookupCodes(
        packed.data_ptr(), row_bytes, bits, table.data_ptr(), stride, scale.data_ptr(), DTYPE_IDS[scale.dtype], scale.shape[1], units_per_group
    )
    return product("bg_lookup", described, x, n, units, dtype, bias, gather)


additive_linear = _define("additive_linear", "Tensor codes, Tensor books, Tensor scale", _additive)
lattice_linear = _define(
    "lattice_linear", "Tensor codes, Tensor? residual, Tensor magnitudes, Tensor signs, Tensor shifts, Tensor second, float factor", _lattice
)
trellis_linear = _define(
    "trellis_linear", "Tensor packed, Tensor? table, int bits, int window, int step, int decoder, bool fragments, float factor", _trellis
)
vector_linear = _define(
    "vector_linear",
    "Tensor codes, Tensor book, Tensor? start, Tensor? residual_codes, Tensor? residual_book, Tensor? residual_start, int length, "
    "Tensor? outlier_codes, Tensor? outlier_book, int outlier_length, Tensor? gather, Tensor? column_scale, Tensor? column_offset",
    _vector,
)
lookup_linear = _define(
    "lookup_linear", "Tensor packed, int row_bytes, int bits, Tensor table, Tensor scale, int units, int units_per_group, Tensor? gather", _lookup
)


def _hadamard(x: Tensor, base: Tensor | None, size: int, factor: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if y.numel():
        order = 1 if base is None else base.shape[0]
        args = calls.HadamardArgs(
            x.data_ptr(), y.data_ptr(), DTYPE_IDS[x.dtype], x.numel() // size, size, pointer(base), order, factor, torch.get_num_threads(), None
        )
        check(native().bg_hadamard(byref(args)), "bg_hadamard")
    return y


_library.define("hadamard(Tensor x, Tensor? base, int size, float factor) -> Tensor")
_library.impl("hadamard", _hadamard, "CPU")
torch.library.register_fake("bitgrain::hadamard", lambda x, base, size, factor: torch.empty_like(x, memory_format=torch.contiguous_format))
hadamard = torch.ops.bitgrain.hadamard.default
