"""Bit packing: hand-worked bytes, and unpack(pack(x)) == x for every width, size and stream."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import LayoutError
from bitgrain.numerics import bitpack

WIDTHS = range(1, 9)


@st.composite
def code_matrices(draw):
    bits = draw(st.integers(1, 8))
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 131))
    seed = draw(st.integers(0, 2**20))
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return bits, codes


@settings(max_examples=150, deadline=None)
@given(code_matrices())
def test_dense_unpack_of_pack_is_identity(case):
    bits, codes = case
    stream = bitpack.pack_dense(codes, bits)
    assert stream.shape[1] == bitpack.dense_bytes(codes.shape[1], bits)
    assert torch.equal(bitpack.unpack_dense(stream, bits, codes.shape[1]), codes)


@settings(max_examples=100, deadline=None)
@given(code_matrices())
def test_padded_unpack_of_pack_is_identity(case):
    bits, codes = case
    words = bitpack.pack_padded(codes, bits)
    assert words.shape[1] == bitpack.padded_words(codes.shape[1], bits)
    assert torch.equal(bitpack.unpack_padded(words, bits, codes.shape[1]), codes)


@settings(max_examples=100, deadline=None)
@given(code_matrices())
def test_planar_unpack_of_pack_is_identity(case):
    bits, codes = case
    words = bitpack.pack_planar(codes, bits)
    assert words.shape[1] == -(-codes.shape[1] // 32) * bits
    assert torch.equal(bitpack.unpack_planar(words, bits, codes.shape[1]), codes)


def test_dense_three_bits_crosses_byte_borders_low_bits_first():
    # 1 | 2<<3 | 3<<6 | 4<<9 | 5<<12 | 6<<15 | 7<<18 | 1<<21
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 1]], dtype=torch.uint8)
    value = sum(int(c) << (3 * i) for i, c in enumerate(codes[0]))
    assert bitpack.pack_dense(codes, 3).tolist() == [list(value.to_bytes(3, "little"))]


def test_padded_three_bits_leaves_two_top_bits_of_each_word_zero():
    words = bitpack.pack_padded(torch.full((1, 20), 7, dtype=torch.uint8), 3)
    assert words.tolist() == [[(1 << 30) - 1, (1 << 30) - 1]]


def test_planar_three_bits_puts_two_low_bits_before_the_high_plane():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 16], codes[0, 31] = 0b101, 0b010, 0b100
    words = bitpack.pack_planar(codes, 3)
    assert words.tolist() == [[0b01, 0b10, -(1 << 31) + 1]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_streams_coincide_for_powers_of_two(bits):
    codes = torch.randint(0, 1 << bits, (3, 64), dtype=torch.uint8)
    dense = bitpack.bytes_as_words(bitpack.pack_dense(codes, bits))
    assert torch.equal(dense, bitpack.pack_padded(codes, bits))
    assert torch.equal(dense, bitpack.pack_planar(codes, bits))


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_dense_and_planar_have_equal_sizes_and_different_bits(bits):
    codes = torch.arange(64, dtype=torch.uint8).remainder(1 << bits)[None]
    dense, planar = bitpack.bytes_as_words(bitpack.pack_dense(codes, bits)), bitpack.pack_planar(codes, bits)
    assert dense.shape == planar.shape and not torch.equal(dense, planar)


def test_unpack_of_too_short_a_stream_is_refused():
    with pytest.raises(LayoutError, match="3 bytes per row"):
        bitpack.unpack_dense(torch.zeros(1, 3, dtype=torch.uint8), 4, 8)


def test_nine_bits_are_refused():
    with pytest.raises(LayoutError, match="9 bits"):
        bitpack.pack_dense(torch.zeros(1, 8, dtype=torch.uint8), 9)
