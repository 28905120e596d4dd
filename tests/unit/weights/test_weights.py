"""Canonical weights: the formula, and that cutting and stacking commute with dequantizing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import LayoutError, ShardError
from bitgrain.weights import DenseWeight, FloatWeight, IntAffineWeight, WeightSpec
from bitgrain.weights.synthetic import sample_weight


@st.composite
def specs(draw):
    kind = draw(st.sampled_from(["dense", "int_affine", "float"]))
    if kind == "dense":
        element = draw(st.sampled_from(["bfloat16", "float16", "float32"]))
        return WeightSpec("dense", element, 32 if element == "float32" else 16)
    if kind == "float":
        granularity = draw(st.sampled_from(["tensor", "channel", "block"]))
        block = draw(st.sampled_from([(4, 8), (16, 16), (128, 128)])) if granularity == "block" else (0, 0)
        return WeightSpec("float", draw(st.sampled_from(["fp8_e4m3fn", "fp8_e5m2"])), 8, granularity, block=block, scale_dtype="float32")
    bits = draw(st.integers(1, 8))
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    size = draw(st.sampled_from([4, 8, 16, 32])) if granularity == "group" else 0
    index = granularity == "group" and draw(st.booleans())
    zero = draw(st.sampled_from(["constant", "integer", "float"]))
    return WeightSpec("int_affine", f"uint{bits}", bits, granularity, size, zero=zero, group_index=index, scale_dtype="float16")


@settings(max_examples=150, deadline=None)
@given(specs(), st.integers(2, 40), st.integers(33, 70), st.data())
def test_cutting_commutes_with_dequantizing(spec, n, k, data):
    weight = sample_weight(spec, n, k)
    whole = weight.dequantize()
    assert whole.dtype == torch.float32 and tuple(whole.shape) == weight.shape == (n, k)
    a = data.draw(st.integers(0, n - 1))
    b = data.draw(st.integers(a + 1, n))
    assert torch.equal(weight.rows(a, b).dequantize(), whole[a:b])
    a = data.draw(st.integers(0, k - 1))
    b = data.draw(st.integers(a + 1, k))
    assert torch.equal(weight.columns(a, b).dequantize(), whole[:, a:b])


@settings(max_examples=100, deadline=None)
@given(specs(), st.integers(1, 20), st.integers(1, 20), st.integers(33, 70))
def test_stacking_commutes_with_dequantizing(spec, n1, n2, k):
    a = sample_weight(spec, n1, k, seed=1)
    b = sample_weight(spec, n2, k, seed=2)
    if spec.group_index:
        b = sample_weight(spec, n2, k, seed=1)
        if not torch.equal(a.group_index, b.group_index):
            with pytest.raises(ShardError, match="group indices"):
                type(a).concat([a, b])
            return
    stacked = type(a).concat([a, b])
    assert torch.equal(stacked.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(2, 20), st.integers(33, 50))
def test_gathered_rows_equal_rows_of_the_whole(spec, n, k):
    weight = sample_weight(spec, n, k)
    index = torch.tensor([n - 1, 0, n - 1])
    assert torch.equal(weight.gather_rows(index), weight.dequantize()[index])


def test_sampled_weight_has_the_asked_spec():
    for spec in (
        WeightSpec("int_affine", "uint4", 4, "group", 32, zero="integer", scale_dtype="float16"),
        WeightSpec("float", "fp8_e4m3fn", 8, "block", block=(16, 16), scale_dtype="float32"),
        WeightSpec("float", "fp8_e4m3fn", 8, "tensor", scale_dtype="float32"),
        WeightSpec("int_affine", "uint8", 8, "channel", zero="constant", scale_dtype="bfloat16"),
    ):
        assert sample_weight(spec, 40, 96).spec == spec


def test_int_affine_by_hand():
    codes = torch.tensor([[0, 15, 7, 8]], dtype=torch.uint8)
    weight = IntAffineWeight.from_codes(codes, 4, torch.tensor([[0.5, 2.0]]), torch.tensor([[8, 7]], dtype=torch.int16), 2)
    assert weight.dequantize().tolist() == [[-4.0, 3.5, 0.0, 2.0]]


def test_int_affine_group_index_by_hand():
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    index = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    weight = IntAffineWeight.from_codes(codes, 4, torch.tensor([[1.0, 10.0]]), 0, 2, index)
    assert weight.dequantize().tolist() == [[10.0, 2.0, 30.0, 4.0]]


def test_float_block_scales_cover_short_edge_blocks():
    codes = torch.ones(3, 3).to(torch.float8_e4m3fn)
    weight = FloatWeight(codes, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (2, 2))
    assert weight.dequantize().tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]


def test_bits_per_weight_counts_scales_and_zeros():
    spec = WeightSpec("int_affine", "uint4", 4, "group", 32, zero="integer", scale_dtype="float16")
    weight = sample_weight(spec, 64, 128)
    assert weight.nbytes == 64 * 128 // 2 + 64 * 4 * 2 + 64 * 4 * 2
    assert weight.bits_per_weight == 5.0


def test_shard_of_an_indivisible_size_is_refused():
    weight = DenseWeight(torch.zeros(6, 4))
    assert weight.shard(0, 2, 3).shape == (2, 4)
    with pytest.raises(ShardError, match="a multiple of 4"):
        weight.shard(0, 0, 4)


def test_int_affine_with_a_wrong_scale_shape_is_refused():
    with pytest.raises(LayoutError, match="groups of 4"):
        IntAffineWeight.from_codes(torch.zeros(2, 16, dtype=torch.uint8), 4, torch.ones(2, 3), 8, 4)
