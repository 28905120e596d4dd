"""CodebookWeight: the formula, cutting, stacking with equal and different tables, gathering, odd sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgrain.errors import LayoutError, ShardError
from bitgrain.weights import CodebookWeight


def lookup(n=5, k=13, size=4, bits=4, tables=1, seed=0, dtype=torch.float32):
    """(weight, its values worked out element by element)."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator, dtype=torch.uint8)
    table = torch.randn(tables, 1 << bits, generator=generator)
    scale = (torch.rand(n, -(-k // size), generator=generator) + 0.1).to(dtype)
    want = torch.empty(n, k)
    for row in range(n):
        for column in range(k):
            value = table[row if tables > 1 else 0, int(codes[row, column])]
            want[row, column] = value * scale[row, column // size].float()
    return CodebookWeight.from_codes(codes, bits, table, scale, size), want


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("tables", [1, 5])
def test_codes_look_their_value_up(bits, tables):
    weight, want = lookup(bits=bits, tables=tables)
    assert torch.equal(weight.dequantize(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits_are_widened_first(dtype):
    weight, want = lookup(dtype=dtype)
    assert torch.equal(weight.dequantize(), want)
    assert weight.spec.scale_dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(("size", "granularity", "shown"), [(4, "group", 4), (1, "group", 1), (13, "channel", 0), (20, "channel", 0)])
def test_spec_tells_groups_from_whole_rows(size, granularity, shown):
    spec = lookup(size=size)[0].spec
    assert (spec.kind, spec.element, spec.bits, spec.granularity, spec.group_size) == ("codebook", "lookup4", 4, granularity, shown)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 19), st.integers(1, 20), st.integers(1, 8), st.booleans(), st.data())
def test_cutting_commutes_with_dequantizing(n, k, size, bits, own, data):
    weight, want = lookup(n, k, min(size, k), bits, n if own else 1, seed=k)
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


def test_cut_inside_a_group_repeats_its_scale():
    weight, want = lookup(n=2, k=16, size=8)
    part = weight.columns(4, 14)
    assert part.group_size == 4
    assert torch.equal(part.dequantize(), want[:, 4:14])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_stacking_commutes_with_dequantizing(heights, own, differ):
    parts = [lookup(n, tables=n if own else 1, seed=i if differ else 0) for i, n in enumerate(heights)]
    stacked = CodebookWeight.concat([weight for weight, _ in parts])
    assert torch.equal(stacked.dequantize(), torch.cat([want for _, want in parts]))
    assert stacked.spec == parts[0][0].spec


def test_equal_tables_stay_one():
    (a, _), (b, _) = lookup(3), lookup(4)
    shared = CodebookWeight.from_codes(b.codes(), 4, a.table.clone(), b.scale, 4)
    assert CodebookWeight.concat([a, shared]).table.shape == (1, 16)


def test_equal_tables_of_rows_are_stacked_all_the_same():
    (a, want), (b, _) = lookup(3, tables=3), lookup(3, tables=3)
    both = CodebookWeight.concat([a, b])
    assert both.table.shape == (6, 16)
    assert torch.equal(both.dequantize(), torch.cat([want, want]))


def test_different_tables_become_one_per_row():
    (a, want_a), (b, want_b) = lookup(3, seed=1), lookup(4, seed=2)
    both = CodebookWeight.concat([a, b])
    assert both.table.shape == (7, 16)
    assert torch.equal(both.rows(2, 5).dequantize(), torch.cat([want_a, want_b])[2:5])
    assert torch.equal(both.gather_rows(torch.tensor([6, 0])), torch.cat([want_a, want_b])[[6, 0]])


def test_one_row_with_a_table_stacks_with_many():
    (a, want_a), (b, want_b) = lookup(1, seed=1), lookup(3, tables=3, seed=2)
    assert torch.equal(CodebookWeight.concat([a, b]).dequantize(), torch.cat([want_a, want_b]))
    assert torch.equal(CodebookWeight.concat([b, a]).dequantize(), torch.cat([want_b, want_a]))


@pytest.mark.parametrize("other", [{"size": 8}, {"bits": 3}, {"k": 12}, {"dtype": torch.float16}])
def test_stacking_other_geometries_is_refused(other):
    with pytest.raises(ShardError, match="different widths, group sizes"):
        CodebookWeight.concat([lookup()[0], lookup(**other)[0]])


@pytest.mark.parametrize("tables", [1, 5])
def test_gathered_rows_equal_rows_of_the_whole(tables):
    weight, want = lookup(tables=tables)
    picked = torch.tensor([4, 0, 0, 2])
    assert torch.equal(weight.gather_rows(picked), want[picked])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_put_together_are_the_whole(dim, count):
    weight, want = lookup(n=6, k=18, size=6, tables=6)
    parts = [weight.shard(dim, rank, count).dequantize() for rank in range(count)]
    assert torch.equal(torch.cat(parts, dim), want)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("packed", lambda t: t[:, :-1], "codes"),
        ("packed", lambda t: t.to(torch.int16), "codes"),
        ("table", lambda t: t[:, :8], "table"),
        ("table", lambda t: t.expand(3, -1), "table"),
        ("table", lambda t: t.half(), "table"),
        ("scale", lambda t: t[:, :-1], "scale"),
        ("scale", lambda t: t[:-1], "scale"),
    ],
)
def test_another_layout_is_refused(field, change, message):
    weight, _ = lookup()
    tensors = weight.data_tensors()
    with pytest.raises(LayoutError, match=message):
        CodebookWeight(**(tensors | {field: change(tensors[field])}), bits=4, in_features=13, group_size=4)
