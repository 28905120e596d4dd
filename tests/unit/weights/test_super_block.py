"""Weights of packed blocks: cutting between blocks, stacking and gathering commute with dequantizing."""

import pytest
import torch

from bitgrain.errors import LayoutError, ShardError
from bitgrain.numerics.block_types import BLOCK_TYPES
from bitgrain.numerics.super_blocks import SUPER_BLOCKS
from bitgrain.weights import SuperBlockWeight
from bitgrain.weights.super_block import super_block_spec
from bitgrain.weights.synthetic import sample_weight


def sample(kind, n=5, blocks=4, seed=0):
    return sample_weight(super_block_spec(kind), n, blocks * BLOCK_TYPES[kind].elements, seed)


@pytest.mark.parametrize("kind", SUPER_BLOCKS)
def test_cutting_and_stacking_commute_with_dequantizing(kind):
    weight, size = sample(kind), BLOCK_TYPES[kind].elements
    whole = weight.dequantize()
    assert weight.shape == tuple(whole.shape) == (5, 4 * size) and weight.spec == super_block_spec(kind)
    assert torch.equal(weight.rows(1, 4).dequantize(), whole[1:4])
    assert torch.equal(weight.columns(size, 3 * size).dequantize(), whole[:, size : 3 * size])
    assert torch.equal(weight.shard(1, 1, 2).dequantize(), whole[:, 2 * size :])
    other = sample(kind, n=2, seed=1)
    assert torch.equal(SuperBlockWeight.concat([weight, other]).dequantize(), torch.cat((whole, other.dequantize())))
    index = torch.tensor([4, 0, 4])
    assert torch.equal(weight.gather_rows(index), whole[index])


@pytest.mark.parametrize("kind", SUPER_BLOCKS)
def test_size_is_that_of_the_blocks_and_values_are_of_order_one(kind):
    weight, layout = sample(kind, n=64), BLOCK_TYPES[kind]
    assert weight.bits_per_weight == 8 * layout.nbytes / layout.elements
    assert 0.3 < float(weight.dequantize().square().mean().sqrt()) * weight.shape[1] ** 0.5 < 3


def test_cut_inside_a_block_is_refused_with_its_size():
    weight = sample("Q4_K")
    for start, stop in ((0, 100), (128, 512), (255, 256)):
        with pytest.raises(ShardError, match="256"):
            weight.columns(start, stop)
    with pytest.raises(ShardError, match="256"):
        weight.shard(1, 0, 8)


def test_parts_of_different_types_or_widths_do_not_stack():
    for other in (sample("Q5_K"), sample("Q4_K", blocks=3)):
        with pytest.raises(ShardError, match="side by side"):
            SuperBlockWeight.concat([sample("Q4_K"), other])


@pytest.mark.parametrize(
    ("packed", "kind"),
    [
        (torch.zeros(2, 100, dtype=torch.uint8), "Q4_K"),
        (torch.zeros(2, 144, dtype=torch.int8), "Q4_K"),
        (torch.zeros(288, dtype=torch.uint8), "Q4_K"),
        (torch.zeros(2, 34, dtype=torch.uint8), "Q8_0"),
        (torch.zeros(2, 144, dtype=torch.uint8), "q4_k"),
    ],
)
def test_wrong_layout_is_refused(packed, kind):
    with pytest.raises(LayoutError, match="SuperBlockWeight"):
        SuperBlockWeight(packed, kind)


def test_sample_needs_whole_blocks():
    with pytest.raises(LayoutError, match="256"):
        sample_weight(super_block_spec("Q6_K"), 4, 100)
