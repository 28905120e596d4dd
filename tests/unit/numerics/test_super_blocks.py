"""Packed blocks against a decoder that reads one element at a time, written from the specification alone."""

import struct

import numpy as np
import pytest
import torch

from bitgrain.numerics.block_types import BLOCK_TYPES
from bitgrain.numerics.lattice_grids import GRIDS, lattice_grid
from bitgrain.numerics.plain_blocks import INTEGER_BLOCKS
from bitgrain.numerics.super_blocks import SUPER_BLOCKS, block_scales, decode_blocks, write_block_scales
from tests.unit.checkpoint.gguf_bytes import TYPES, random_blocks

# sum of (row + 1) * entry, as the gguf package 0.19 has the tables
SUMS = {"IQ2_XXS": 5279153, "IQ2_XS": 22790903, "IQ2_S": 90103557, "IQ3_XXS": 3737846, "IQ3_S": 3605870, "IQ1_S": 1337958}
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
f32 = np.float32


def half(block, at):
    return f32(struct.unpack_from("<e", block, at)[0])


def word(block, at):
    return struct.unpack_from("<H", block, at)[0]


def long(block, at):
    return struct.unpack_from("<I", block, at)[0]


def nibble(stored, j, size):
    """Element j of `size` in halves: the low nibbles first."""
    return stored[j] & 15 if j < size // 2 else stored[j - size // 2] >> 4


def bit(value, j):
    return value >> j & 1


def parity_sign(index, j):
    signs = index | (bin(index).count("1") & 1) << 7
    return f32(-1 if bit(signs, j) else 1)


def six_bit(stored, s):
    """(scale, minimum) of sub-block s of Q4_K and Q5_K."""
    if s < 4:
        return stored[s] & 63, stored[s + 4] & 63
    return stored[s + 4] & 15 | (stored[s - 4] >> 6) << 4, stored[s + 4] >> 4 | (stored[s] >> 6) << 4


def k_value(kind, b, e):
    h, r = divmod(e, 128)
    if kind == "Q2_K":
        q = b[16 + 32 * h + r % 32] >> 2 * (r // 32) & 3
        s = b[e // 16]
        return half(b, 80) * f32(s & 15) * f32(q) - half(b, 82) * f32(s >> 4)
    if kind == "Q3_K":
        q = (b[32 + 32 * h + r % 32] >> 2 * (r // 32) & 3) - (0 if bit(b[e % 32], e // 32) else 4)
        s, stored = e // 16, b[96:108]
        low = stored[s] & 15 if s < 8 else stored[s - 8] >> 4
        scale = (low | (stored[8 + s % 4] >> 2 * (s // 4) & 3) << 4) - 32
        return half(b, 108) * f32(scale) * f32(q)
    if kind in ("Q4_K", "Q5_K"):
        s, position = divmod(e, 32)
        scale, minimum = six_bit(b[4:16], s)
        q = b[(48 if kind == "Q5_K" else 16) + 32 * (e // 64) + position] >> 4 * (s % 2) & 15
        if kind == "Q5_K":
            q |= bit(b[16 + position], s) << 4
        return half(b, 0) * f32(scale) * f32(q) - half(b, 2) * f32(minimum)
    lane, position = divmod(r, 32)
    low = b[64 * h + position + 32 * (lane % 2)] >> 4 * (lane // 2) & 15
    q = (low | (b[128 + 32 * h + position] >> 2 * lane & 3) << 4) - 32
    return half(b, 208) * f32(struct.unpack_from("<b", b, 192 + e // 16)[0]) * f32(q)


def plain_value(kind, b, e):
    if kind in ("Q4_1", "Q5_1"):
        q = nibble(b[8 if kind == "Q5_1" else 4 :], e, 32)
        if kind == "Q5_1":
            q |= bit(long(b, 4), e) << 4
        return half(b, 0) * f32(q) + half(b, 2)
    if kind == "Q1_0":
        return half(b, 0) if bit(b[2 + e // 8], e % 8) else -half(b, 0)
    start, stride, position = (0, 32, e) if e < 160 else (32, 16, e - 160) if e < 240 else (48, 4, e - 240)
    digit, index = divmod(position, stride)
    return half(b, 52) * f32((b[start + index] * 3**digit % 256 * 3 >> 8) - 1)


def lattice_value(kind, b, e):
    d, group, inside = half(b, 0), e // 32, e % 32
    if kind in ("IQ2_XXS", "IQ3_XXS"):
        size = 8 if kind == "IQ2_XXS" else 4
        at = 2 + 8 * group
        signs = long(b, at + 4) if size == 8 else long(b, 66 + 4 * group)
        index = b[at + inside // size]
        scale = d * (f32(0.5) + f32(signs >> 28)) * f32(0.25 if size == 8 else 0.5)
        return scale * grid(kind)[index][e % size] * parity_sign(signs >> 7 * (inside // 8) & 127, e % 8)
    if kind == "IQ2_XS":
        w = word(b, 2 + 2 * (e // 8))
        return d * (f32(0.5) + f32(b[66 + e // 32] >> 4 * (e // 16 % 2) & 15)) * f32(0.25) * grid(kind)[w & 511][e % 8] * parity_sign(w >> 9, e % 8)
    if kind == "IQ2_S":
        i = e // 8
        index = b[2 + i] | (b[66 + i // 4] >> 2 * (i % 4) & 3) << 8
        scale = d * (f32(0.5) + f32(b[74 + e // 32] >> 4 * (e // 16 % 2) & 15)) * f32(0.25)
        return scale * grid(kind)[index][e % 8] * f32(-1 if bit(b[34 + i], e % 8) else 1)
    if kind == "IQ3_S":
        i = e // 4
        index = b[2 + i] | bit(b[66 + i // 8], i % 8) << 8
        scale = d * f32(1 + 2 * (b[106 + e // 64] >> 4 * (group % 2) & 15))
        return scale * grid(kind)[index][e % 4] * f32(-1 if bit(b[74 + e // 8], e % 8) else 1)
    if kind == "IQ1_S":
        high = word(b, 34 + 2 * group)
        index = b[2 + e // 8] | (high >> 3 * (inside // 8) & 7) << 8
        return d * f32(2 * (high >> 12 & 7) + 1) * (grid("IQ1_S")[index][e % 8] + f32(-0.125 if high & 0x8000 else 0.125))
    if kind == "IQ1_M":
        words = [word(b, 48 + 2 * i) for i in range(4)]
        d = half(struct.pack("<H", sum((w >> 12) << 4 * i for i, w in enumerate(words))), 0)
        scale = d * f32(2 * (words[e // 64] >> 3 * (e // 16 % 4) & 7) + 1)
        high = b[32 + e // 16] >> 4 * (e // 8 % 2) & 15
        return scale * (grid("IQ1_S")[b[e // 8] | (high & 7) << 8][e % 8] + f32(-0.125 if high & 8 else 0.125))
    if kind == "IQ4_NL":
        return d * f32(LEVELS[nibble(b[2:], e, 32)])
    scale = (b[4 + group // 2] >> 4 * (group % 2) & 15 | (word(b, 2) >> 2 * group & 3) << 4) - 32
    return d * f32(scale) * f32(LEVELS[nibble(b[8 + 16 * group :], inside, 32)])


def integer_value(kind, b, e):
    if kind == "Q4_0":
        return half(b, 0) * f32(nibble(b[2:], e, 32) - 8)
    if kind == "Q5_0":
        return half(b, 0) * f32((nibble(b[6:], e, 32) | bit(long(b, 2), e) << 4) - 16)
    if kind == "Q8_0":
        return f32(struct.unpack_from("<b", b, 2 + e)[0]) * half(b, 0)
    if kind == "Q2_0":
        return half(b, 0) * f32((b[2 + e // 4] >> 2 * (e % 4) & 3) - 1)
    h, r = divmod(e, 128)
    return half(b, 64) * f32((b[32 * h + r % 32] >> 2 * (r // 32) & 3) - 1)


def grid(name):
    return lattice_grid(name).numpy()


def naive(kind, data):
    value = k_value if kind.startswith("Q") and kind.endswith("_K") else lattice_value if kind.startswith("IQ") else integer_value if kind in INTEGER_BLOCKS else plain_value
    _, elements, nbytes = TYPES[kind]
    blocks = [data[i : i + nbytes] for i in range(0, len(data), nbytes)]
    return torch.tensor(np.array([value(kind, block, e) for block in blocks for e in range(elements)], dtype=np.float32))


@pytest.mark.parametrize("kind", SUPER_BLOCKS)
def test_values_equal_those_of_a_naive_decoder(kind):
    k = 2 * BLOCK_TYPES[kind].elements
    made = random_blocks(kind, (3, k), seed=1)
    packed = torch.frombuffer(bytearray(made.data), dtype=torch.uint8).view(3, -1)
    got = decode_blocks(packed, kind)
    assert got.dtype == torch.float32 and torch.equal(got, naive(kind, made.data).view(3, k))
    assert got.unique().numel() > 1


@pytest.mark.parametrize("kind", INTEGER_BLOCKS)
def test_codes_equal_those_of_a_naive_decoder(kind):
    made = random_blocks(kind, (2, 3 * BLOCK_TYPES[kind].elements), seed=2)
    blocks = torch.frombuffer(bytearray(made.data), dtype=torch.uint8).view(-1, BLOCK_TYPES[kind].nbytes)
    codes, zero = INTEGER_BLOCKS[kind]
    values = (codes(blocks).float() - zero) * block_scales(blocks, kind)
    assert torch.equal(values.flatten(), naive(kind, made.data))


def test_table_of_types_equals_the_containers(kinds=("I32", "F64", "F32", "F16", "BF16")):
    sizes = {name: (elements, nbytes) for name, (_, elements, nbytes) in TYPES.items() if name not in kinds}
    assert {name: (t.elements, t.nbytes) for name, t in BLOCK_TYPES.items()} == sizes


def test_more_blocks_than_are_decoded_at_once(monkeypatch):
    made = random_blocks("Q6_K", (5, 512))
    packed = torch.frombuffer(bytearray(made.data), dtype=torch.uint8).view(5, -1)
    whole = decode_blocks(packed, "Q6_K")
    monkeypatch.setattr("bitgrain.numerics.super_blocks.BLOCKS_AT_ONCE", 3)
    assert torch.equal(decode_blocks(packed, "Q6_K"), whole)


@pytest.mark.parametrize("kind", [k for k in BLOCK_TYPES if k not in ("MXFP4", "NVFP4")])
def test_scales_are_written_where_they_are_read(kind):
    blocks = torch.randint(0, 256, (4, BLOCK_TYPES[kind].nbytes), dtype=torch.uint8)
    write_block_scales(blocks, kind, torch.tensor([0.5, -1.5, 3e-5, 0.0]))
    scales = block_scales(blocks, kind)
    assert scales.shape[1] >= 1 and torch.equal(scales, torch.tensor([0.5, -1.5, 3e-5, 0.0]).half().float()[:, None].expand_as(scales))


def test_tables_have_the_published_levels():
    sums = {name: int((lattice_grid(name).double().sum(1) * torch.arange(1, GRIDS[name].rows + 1)).sum()) for name in GRIDS}
    assert {name: tuple(lattice_grid(name).shape) for name in GRIDS} == {
        "IQ2_XXS": (256, 8), "IQ2_XS": (512, 8), "IQ2_S": (1024, 8), "IQ3_XXS": (256, 4), "IQ3_S": (512, 4), "IQ1_S": (2048, 8),
    }  # fmt: skip
    assert lattice_grid("IQ1_S")[0].tolist() == [-1.0] * 8 and lattice_grid("IQ3_XXS")[0].tolist() == [4.0] * 4
    assert sums == SUMS
