"""Interleaves and tiles are permutations: exact inverses, and in the documented order."""

import pytest
import torch

from bitgrain.errors import LayoutError
from bitgrain.numerics import interleave


def test_even_odd_order_of_one_run():
    assert interleave.interleave_even_odd(torch.arange(8)[None]).tolist() == [[0, 2, 4, 6, 1, 3, 5, 7]]


def test_even_odd_inverse_restores():
    codes = torch.randint(0, 16, (3, 40), dtype=torch.uint8)
    assert torch.equal(interleave.deinterleave_even_odd(interleave.interleave_even_odd(codes)), codes)


def test_even_odd_of_a_ragged_run_is_refused():
    with pytest.raises(LayoutError, match="multiple of 8"):
        interleave.interleave_even_odd(torch.zeros(1, 12))


def test_marlin_tile_order_is_a_permutation():
    assert sorted(interleave.marlin_tile_order().tolist()) == list(range(1024))


def test_marlin_tiles_unpack_of_pack_is_identity():
    codes = torch.randint(0, 16, (48, 128), dtype=torch.uint8)
    words = interleave.pack_marlin_tiles(codes)
    assert tuple(words.shape) == (3, 256) and words.dtype == torch.int32
    assert torch.equal(interleave.unpack_marlin_tiles(words), codes)


def test_marlin_first_word_holds_the_fragment_of_lane_zero():
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    # lane 0 owns rows 0, 1, 8, 9 of columns 0 and 8; stored even-odd
    for value, (row, column) in enumerate([(0, 0), (1, 0), (8, 0), (9, 0), (0, 8), (1, 8), (8, 8), (9, 8)], 1):
        codes[row, column] = value
    word = int(interleave.pack_marlin_tiles(codes)[0, 0])
    assert [(word >> (4 * i)) & 15 for i in range(8)] == [1, 3, 5, 7, 2, 4, 6, 8]


@pytest.mark.parametrize("grouped", [True, False])
def test_marlin_scales_restore_of_permute_is_identity(grouped):
    scales = torch.randn(3, 128)
    permuted = interleave.permute_marlin_scales(scales, grouped)
    assert not torch.equal(permuted, scales)
    assert torch.equal(interleave.restore_marlin_scales(permuted, grouped), scales)


def test_marlin_tiles_of_an_odd_shape_are_refused():
    with pytest.raises(LayoutError, match="K % 16"):
        interleave.pack_marlin_tiles(torch.zeros(8, 64, dtype=torch.uint8))
