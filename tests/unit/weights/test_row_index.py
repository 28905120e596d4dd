"""IntAffineWeight.row_index: rows that look their scales up; the formula, cutting, stacking and gathering."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import LayoutError, ShardError
from bitgrain.weights import IntAffineWeight

ZEROS = ("constant", "integer", "float")


def indexed(n=7, k=10, rows=3, size=4, bits=3, zero="float", seed=0, dtype=torch.float32, index=None):
    """(weight, its values worked out element by element)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    groups = -(-k // size)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).to(dtype)
    zeros = {
        "constant": 2,
        "integer": torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.int16),
        "float": torch.rand(rows, groups, generator=generator) * 5,
    }[zero]
    index = torch.randint(0, rows, (n,), generator=generator, dtype=torch.int32) if index is None else index
    want = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            at = (int(index[row]), column // size)
            shift = zeros if isinstance(zeros, int) else float(zeros[at])
            want[row, column] = (torch.tensor(float(codes[row, column])) - shift) * scale[at].float()
    return IntAffineWeight.from_codes(codes, bits, scale, zeros, size, row_index=index), want


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("size", [1, 4, 10])
def test_rows_use_the_scales_that_the_index_names(zero, size):
    weight, want = indexed(size=size, zero=zero)
    assert torch.equal(weight.dequantize(), want)


def test_scales_along_n_equal_groups_of_rows():
    # groups of 4 rows per column, strided by 3: row n uses row n % 3 of the scales
    codes = torch.arange(12 * 5, dtype=torch.uint8).view(12, 5) % 16
    scale, zero = torch.rand(3, 5) + 0.1, torch.rand(3, 5)
    weight = IntAffineWeight.from_codes(codes, 4, scale, zero, 1, row_index=(torch.arange(12) % 3).to(torch.int32))
    want = ((codes.float().view(4, 3, 5) - zero) * scale).view(12, 5)
    assert torch.equal(weight.dequantize(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spec_says_that_rows_are_indexed(dtype):
    spec = indexed(size=4, dtype=dtype)[0].spec
    assert (spec.granularity, spec.group_size, spec.row_index) == ("group", 4, True)
    assert spec.scale_dtype == str(dtype).removeprefix("torch.")
    assert "along N" in spec.describe()
    assert indexed(size=10)[0].spec.granularity == "channel"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 17), st.integers(1, 4), st.integers(1, 8), st.sampled_from(ZEROS), st.sampled_from([1, 2, 3, 5, 17]), st.data())
def test_cutting_commutes_with_dequantizing(n, k, rows, bits, zero, size, data):
    weight, want = indexed(n, k, rows, min(size, k), bits, zero, seed=n * k)
    assert torch.equal(weight.dequantize(), want)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    part = weight.rows(start, stop)
    assert part.shape == (stop - start, k)
    assert torch.equal(part.dequantize(), want[start:stop])
    start = data.draw(st.integers(0, k - 1))
    stop = data.draw(st.integers(start + 1, k))
    part = weight.columns(start, stop)
    assert part.shape == (n, stop - start)
    assert torch.equal(part.dequantize(), want[:, start:stop])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_put_together_are_the_whole(dim, count):
    weight, want = indexed(n=6, k=12, size=3)
    parts = [weight.shard(dim, rank, count).dequantize() for rank in range(count)]
    assert torch.equal(torch.cat(parts, dim), want)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(ZEROS), st.sampled_from([1, 4, 10]))
def test_stacking_commutes_with_dequantizing(heights, zero, size):
    parts = [indexed(n, 10, rows=i + 1, size=size, zero=zero, seed=i) for i, n in enumerate(heights)]
    stacked = IntAffineWeight.concat([weight for weight, _ in parts])
    assert torch.equal(stacked.dequantize(), torch.cat([want for _, want in parts]))
    assert stacked.spec == parts[0][0].spec.stacked(tuple(heights))


def test_stacked_parts_can_be_cut_again():
    (a, want_a), (b, want_b) = indexed(5, seed=1), indexed(4, rows=2, seed=2)
    both = IntAffineWeight.concat([a, b])
    assert torch.equal(both.rows(3, 8).dequantize(), torch.cat([want_a, want_b])[3:8])
    assert torch.equal(IntAffineWeight.concat([both, a]).dequantize(), torch.cat([want_a, want_b, want_a]))


def test_stacking_different_constants_makes_zero_points_of_them():
    (a, want_a), (b, want_b) = indexed(3, zero="constant"), indexed(4, zero="constant", seed=3)
    lower = IntAffineWeight.from_codes(b.codes(), 3, b.scale, 1, b.group_size, row_index=b.row_index)
    both = IntAffineWeight.concat([a, lower])
    shift = b.scale.float()[b.row_index.long()].repeat_interleave(4, 1)[:, :10]
    torch.testing.assert_close(both.dequantize(), torch.cat([want_a, want_b + shift]), rtol=1e-6, atol=1e-6)
    assert both.spec.zero == "integer"


def test_stacking_with_rows_that_are_not_indexed_is_refused():
    a, _ = indexed(3)
    b = IntAffineWeight.from_codes(a.codes(), 3, torch.rand(3, 3), torch.rand(3, 3), 4)
    with pytest.raises(ShardError, match="row indices"):
        IntAffineWeight.concat([a, b])


@pytest.mark.parametrize("other", ["integer", "constant"])
def test_stacking_other_kinds_of_zero_points_is_refused(other):
    with pytest.raises(ShardError, match="zero points"):
        IntAffineWeight.concat([indexed(3)[0], indexed(3, zero=other)[0]])


@pytest.mark.parametrize("zero", ZEROS)
def test_gathered_rows_equal_rows_of_the_whole(zero):
    weight, want = indexed(zero=zero)
    picked = torch.tensor([6, 0, 0, 3])
    assert torch.equal(weight.gather_rows(picked), want[picked])


def test_moving_and_counting_include_the_index():
    weight, want = indexed(n=7, k=10, rows=3, size=4, bits=3, zero="float")
    copy = weight.map_tensors(torch.clone)
    assert copy.row_index is not weight.row_index
    assert torch.equal(copy.dequantize(), want)
    assert weight.nbytes == 7 * 4 + 2 * 3 * 3 * 4 + 7 * 4


def test_one_row_of_scales_serves_all_rows():
    weight, want = indexed(rows=1, index=torch.zeros(7, dtype=torch.int32))
    assert torch.equal(weight.dequantize(), want)
    assert torch.equal(weight.rows(2, 5).dequantize(), want[2:5])


def test_index_of_another_length_is_refused():
    with pytest.raises(LayoutError, match="row_index"):
        indexed(index=torch.zeros(7, dtype=torch.int32))[0].map_tensors(lambda t: t[:6] if t.dtype == torch.int32 else t)
