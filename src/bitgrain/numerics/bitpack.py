"""Bit packing of unsigned codes, 1 to 8 bits: dense, padded and planar streams.

A packed row is a little-endian sequence of bytes; 32-bit words are the same bytes read four at a time.

    dense(b)   one bit stream: element i occupies bits [i*b, (i+1)*b), low bits first, crossing words.
    padded(b)  32 // b elements per 32-bit word, low bits first, spare top bits zero.
    planar(b)  per 32 elements b words: planes 3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1 bits, low plane first;
               inside a plane of width w, word j holds elements j*(32/w) ..., low bits first.

All three coincide for 1, 2, 4 and 8 bits.  dense and planar have the same size for every width.
Source: formats specification, section 0.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import LayoutError

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def dense_bytes(count: int, bits: int) -> int:
    """Bytes of a dense stream of `count` codes."""
    return -(-count * bits // 8)


def dense_words(count: int, bits: int) -> int:
    """32-bit words of a dense or planar stream of `count` codes."""
    return -(-count * bits // 32)


def padded_words(count: int, bits: int) -> int:
    """32-bit words of a padded stream of `count` codes."""
    return -(-count // (32 // bits))


def _check(bits: int, tensor: Tensor, what: str) -> None:
    if bits not in PLANES:
        raise LayoutError(what, f"{bits} bits", "1 to 8 bits", "check the configured width")
    if tensor.dim() != 2:
        raise LayoutError(what, f"{tensor.dim()} dimensions", "a matrix [rows, packed]", "flatten leading dimensions")


def _pad_columns(matrix: Tensor, multiple: int) -> Tensor:
    short = -matrix.shape[1] % multiple
    return torch.nn.functional.pad(matrix, (0, short)) if short else matrix


def _row_major(matrix: Tensor) -> Tensor:
    """`matrix` with the strides of its shape: dimensions of size 1 keep odd ones, which views to other dtypes refuse."""
    return matrix.contiguous().as_strided(matrix.shape, (matrix.shape[1], 1))


def words_as_bytes(words: Tensor) -> Tensor:
    """uint8 [R, 4 * W]: the little-endian bytes of int32 words [R, W]."""
    return _row_major(words).view(torch.uint8)


def bytes_as_words(stream: Tensor) -> Tensor:
    """int32 [R, ceil(B / 4)]: bytes [R, B] read as little-endian words, the last one padded with zeros."""
    return _row_major(_pad_columns(stream, 4)).view(torch.int32)


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into a dense little-endian bit stream per row.

    Args:
        codes: uint8 [R, n], each below 2**bits.
    Returns:
        uint8 [R, ceil(n * bits / 8)].
    """
    _check(bits, codes, "pack_dense")
    if bits == 8:
        return codes.clone()
    size = dense_bytes(codes.shape[1], bits)
    if bits in (1, 2, 4):
        per = 8 // bits
        lanes = _pad_columns(codes, per).view(codes.shape[0], -1, per)
        packed = lanes[:, :, 0].clone()
        for i in range(1, per):
            packed |= lanes[:, :, i] << (bits * i)
        return packed[:, :size].contiguous()
    lanes = _pad_columns(codes, 8).view(codes.shape[0], -1, 8)
    block = lanes[:, :, 0].to(torch.int64)
    for i in range(1, 8):
        block |= lanes[:, :, i].to(torch.int64) << (bits * i)
    return _row_major(block).view(torch.uint8).view(codes.shape[0], -1, 8)[:, :, :bits].flatten(1)[:, :size].contiguous()


def unpack_dense(stream: Tensor, bits: int, count: int) -> Tensor:
    """Codes of a dense bit stream.

    Args:
        stream: uint8 [R, B], B >= ceil(count * bits / 8); spare bytes are ignored.
    Returns:
        uint8 [R, count].
    """
    _check(bits, stream, "unpack_dense")
    size = dense_bytes(count, bits)
    if stream.shape[1] < size:
        raise LayoutError("unpack_dense", f"{stream.shape[1]} bytes per row", f"{size} for {count} codes of {bits} bits", "check bits and shape")
    stream = stream[:, :size]
    if bits == 8:
        return stream.clone()
    mask = (1 << bits) - 1
    if bits in (1, 2, 4):
        lanes = torch.empty((*stream.shape, 8 // bits), dtype=torch.uint8, device=stream.device)
        for i in range(8 // bits):
            torch.bitwise_and(stream >> (bits * i), mask, out=lanes[:, :, i])
        return lanes.flatten(1)[:, :count].contiguous()
    chunks = _pad_columns(stream, bits).unflatten(1, (-1, bits))
    block = torch.zeros(chunks.shape[:2], dtype=torch.int64, device=stream.device)
    for i in range(bits):
        block |= chunks[:, :, i].to(torch.int64) << (8 * i)
    lanes = torch.stack([((block >> (bits * i)) & mask).to(torch.uint8) for i in range(8)], dim=-1)
    return lanes.flatten(1)[:, :count].contiguous()


def pack_padded(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [R, n] (uint8) into padded words: int32 [R, ceil(n / (32 // bits))]."""
    _check(bits, codes, "pack_padded")
    per = 32 // bits
    lanes = _pad_columns(codes, per).view(codes.shape[0], -1, per).to(torch.int64)
    shifts = bits * torch.arange(per, device=codes.device)
    words = (lanes << shifts).sum(-1)
    return words.to(torch.uint32).view(torch.int32)


def unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes uint8 [R, count] of padded int32 words [R, W]."""
    _check(bits, words, "unpack_padded")
    per, mask = 32 // bits, (1 << bits) - 1
    lanes = torch.stack([((words >> (bits * i)) & mask).to(torch.uint8) for i in range(per)], dim=-1)
    return lanes.flatten(1)[:, :count].contiguous()


def pack_planar(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [R, n] (uint8) into planar words: int32 [R, ceil(n / 32) * bits]."""
    _check(bits, codes, "pack_planar")
    codes = _pad_columns(codes, 32)
    rows, blocks = codes.shape[0], codes.shape[1] // 32
    planes, shift = [], 0
    for width in PLANES[bits]:
        plane = (codes >> shift) & ((1 << width) - 1)
        planes.append(bytes_as_words(pack_dense(plane.contiguous(), width)).view(rows, blocks, width))
        shift += width
    return torch.cat(planes, dim=-1).flatten(1).contiguous()


def unpack_planar(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes uint8 [R, count] of planar int32 words [R, W], W = ceil(count / 32) * bits."""
    _check(bits, words, "unpack_planar")
    rows, blocks = words.shape[0], -(-count // 32)
    if words.shape[1] != blocks * bits:
        raise LayoutError("unpack_planar", f"{words.shape[1]} words per row", f"{blocks * bits} for {count} codes of {bits} bits", "check bits and shape")
    split = words.view(rows, blocks, bits)
    codes = torch.zeros(rows, blocks * 32, dtype=torch.uint8, device=words.device)
    word = shift = 0
    for width in PLANES[bits]:
        plane = split[:, :, word : word + width].reshape(rows, -1)
        codes |= unpack_dense(words_as_bytes(plane), width, blocks * 32) << shift
        word, shift = word + width, shift + width
    return codes[:, :count].contiguous()
