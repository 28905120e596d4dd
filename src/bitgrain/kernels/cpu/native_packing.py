"""Packing in the native library: stored codes to panels; the structures of native/include/pack.hpp.

Codes are a dense little-endian bit stream per row (numerics.bitpack), as canonical weights keep them: none is unpacked first.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, byref, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from bitgrain.kernels.cpu.library import check, native
from bitgrain.kernels.cpu.panels import PANEL, UNIT
from bitgrain.numerics.bitpack import dense_bytes
from bitgrain.platforms.host_memory import kept_weight

NIBBLES, QUADS, COLUMNS = range(3)


class _CodeStream(Structure):
    _fields_ = [("data", c_void_p), ("row_bytes", c_int64), ("n", c_int64), ("k", c_int64), ("bits", c_int32)]


class _PackedField(Structure):
    _fields_ = [("values", c_void_p), ("row_values", c_int64), ("step", c_int64), ("bytes", c_int64)]


def pack_units(stream: Tensor, bits: int, k: int, gather: Tensor | None, units: int, layout: int, fill: int = 0, flip: int = 0) -> Tensor:
    """uint8 [panels, units, 64 (NIBBLES) or 128 bytes]: codes in the places of `gather`; see kernels.cpu.panels for the layouts.

    Args:
        stream: uint8 [N, bytes], codes of `bits` bits, k of them in a row.
        gather: int32 [units * 8], the in feature of each place or -1; None: places are in features.
        fill:   the code of padding.
        flip:   bits of every byte, padding included, that are inverted.
    """
    codes, held = _stream(stream, bits, k)
    out = kept_weight(-(-codes.n // PANEL), units, UNIT * PANEL // (2 if layout == NIBBLES else 1))
    places = None if gather is None else gather.contiguous()
    address = None if places is None else places.data_ptr()
    check(native().bg_pack_units(byref(codes), address, units, layout, fill, flip, out.data_ptr(), torch.get_num_threads()), "packing weights")
    del held
    return out


def pack_blocks(stream: Tensor, bits: int, k: int, fields: Sequence[tuple[Tensor, int]], layout: list[int]) -> Tensor:
    """uint8 [panels, bytes]: records of native/include/block_kernels.hpp.

    Args:
        stream: uint8 [N, bytes], codes of `bits` bits, k of them in a row.
        fields: (values [N, count], in features that one covers) of what stands before the codes, in that order.
        layout: the seven numbers of BlockFormat.
    """
    codes, held = _stream(stream, bits, k)
    values = [(tensor.contiguous(), step) for tensor, step in fields]
    table = (_PackedField * max(len(values), 1))(*(_PackedField(t.data_ptr(), t.shape[1], step, t.element_size()) for t, step in values))
    form = (c_int32 * len(layout))(*layout)
    size = native().bg_block_panel_bytes(form, k)
    out = kept_weight(-(-codes.n // PANEL), size)
    check(native().bg_pack_blocks(byref(codes), table, len(values), form, size, out.data_ptr(), torch.get_num_threads()), "packing weights")
    del held
    return out


def _stream(stream: Tensor, bits: int, k: int) -> tuple[_CodeStream, Tensor]:
    """(the structure, the tensor that it points into)."""
    held = stream.view(torch.uint8).contiguous()
    assert held.shape[1] >= dense_bytes(k, bits)
    return _CodeStream(held.data_ptr(), held.shape[1], held.shape[0], k, bits), held
