"""BlockFloatWeight: every element and kind of scale against a naive decoder; cuts, stacks and lookups against dequantize."""

from dataclasses import replace

import pytest
import torch

from bitgrain.errors import LayoutError, ShardError
from bitgrain.weights import BlockFloatWeight
from bitgrain.weights.block_float import ELEMENT_BITS, block_float_spec

# element to (exponent bits, mantissa bits, bias)
FIELDS = {"fp4_e0m3": (0, 3, 0), "fp4_e2m1": (2, 1, 1), "fp6_e2m3": (2, 3, 1), "fp6_e3m2": (3, 2, 3), "fp8_e4m3fn": (4, 3, 7), "fp8_e5m2": (5, 2, 15)}


def naive_element(code: int, element: str) -> float:
    """The number of a code: two's complement with six fractional bits, or sign, exponent and mantissa."""
    if element == "int8":
        return (code - 256 if code > 127 else code) / 64
    exponent_bits, mantissa_bits, bias = FIELDS[element]
    mantissa, exponent = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits), (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    value = (1 + mantissa) * 2.0 ** (exponent - bias) if exponent else mantissa * 2.0 ** (1 - bias)
    return -value if code >> (exponent_bits + mantissa_bits) else value


def naive_scale(code: int, kind: str) -> float:
    if kind == "e8m0":
        return 2.0 ** (code - 127)
    bias = {"e4m3": 7, "e5m3": 15}[kind]
    exponent, mantissa = code >> 3, (code & 7) / 8
    return (1 + mantissa) * 2.0 ** (exponent - bias) if exponent else mantissa * 2.0 ** (1 - bias)


def usable(codes, element):
    """Codes without NaN and infinity."""
    if element == "fp8_e4m3fn":
        return torch.where((codes & 0x7F) == 0x7F, codes ^ 1, codes)
    return torch.where((codes & 0x7C) == 0x7C, codes & 0x83, codes) if element == "fp8_e5m2" else codes


def made(element, shape, scale_type="e8m0", block=32, second=None):
    """(weight, float32 values by the naive decoder).

    Args:
        second: None, "tensor", "channel" or a number of columns per second scale.
    """
    n, k = shape
    generator = torch.Generator().manual_seed(n * 1000 + k + block)
    bits = ELEMENT_BITS[element]
    codes = usable(torch.randint(0, 1 << bits, shape, generator=generator), element)
    low, high = {"e8m0": (110, 140), "e4m3": (1, 126), "e5m3": (1, 200)}[scale_type]
    scale = torch.randint(low, high, (n, -(-k // block)), generator=generator)
    per_second, columns = None, 0
    if second is not None:
        columns = k if isinstance(second, str) else second
        per_second = torch.rand(1 if second == "tensor" else n, -(-k // columns), generator=generator) + 0.5
    want = torch.empty(shape)
    for row in range(n):
        for column in range(k):
            factor = torch.tensor(naive_scale(int(scale[row, column // block]), scale_type))
            if per_second is not None:
                factor = factor * per_second[row if per_second.shape[0] > 1 else 0, column // columns]
            want[row, column] = torch.tensor(naive_element(int(codes[row, column]), element)) * factor
    weight = BlockFloatWeight.from_codes(codes.to(torch.uint8), element, scale.to(torch.uint8), scale_type, block, per_second, columns)
    return weight, want


SECONDS = [None, "tensor", "channel", 24]


@pytest.mark.parametrize("shape", [(4, 64), (3, 67), (1, 5), (5, 33)], ids=str)
@pytest.mark.parametrize("element", ELEMENT_BITS)
def test_every_element_decodes_like_the_naive_decoder(element, shape):
    weight, want = made(element, shape)
    assert torch.equal(weight.dequantize(), want)
    assert weight.shape == shape and weight.spec == block_float_spec(element, 32, "e8m0")


@pytest.mark.parametrize("element", ["fp4_e0m3", "fp4_e2m1", "fp6_e2m3", "fp6_e3m2"])
def test_all_codes_of_a_small_element_decode(element):
    count = 1 << ELEMENT_BITS[element]
    codes = torch.arange(count, dtype=torch.uint8)[None]
    weight = BlockFloatWeight.from_codes(codes, element, torch.tensor([[127]], dtype=torch.uint8), "e8m0", count)
    assert weight.dequantize().tolist() == [[naive_element(c, element) for c in range(count)]]
    assert torch.equal(weight.codes(), codes)


@pytest.mark.parametrize("second", SECONDS, ids=str)
@pytest.mark.parametrize(("scale_type", "block"), [("e8m0", 32), ("e4m3", 16), ("e5m3", 16), ("e4m3", 7)])
def test_scales_of_every_type_multiply_before_the_element(scale_type, block, second):
    weight, want = made("fp4_e2m1", (5, 50), scale_type, block, second)
    assert torch.equal(weight.dequantize(), want)
    assert weight.spec.second_scale == ("none" if second is None else "group" if second == 24 else second)
    assert weight.spec.scale_dtype == scale_type and weight.spec.group_size == block


def test_second_scale_of_the_only_row_is_the_tensors():
    assert made("fp4_e2m1", (1, 32), "e4m3", 16, "tensor")[0].spec.second_scale == "tensor"


def test_nan_scale_stays_nan():
    weight, _ = made("fp4_e2m1", (2, 32))
    weight.scale[1, 0] = 255
    assert weight.dequantize()[1].isnan().all() and not weight.dequantize()[0].isnan().any()


CASES = [("fp4_e2m1", "e4m3", 16, "tensor"), ("fp4_e2m1", "e4m3", 16, "channel"), ("fp6_e2m3", "e8m0", 32, None), ("fp8_e4m3fn", "e8m0", 32, 64), ("int8", "e8m0", 32, None)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_those_of_the_whole(case):
    element, scale_type, block, second = case
    weight, want = made(element, (7, 101), scale_type, block, second)
    for start, stop in ((0, 7), (0, 1), (2, 5), (6, 7)):
        part = weight.rows(start, stop)
        assert torch.equal(part.dequantize(), want[start:stop])
    with pytest.raises(ShardError):
        weight.rows(3, 3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns_are_those_of_the_whole_wherever_they_are_cut(case):
    element, scale_type, block, second = case
    weight, want = made(element, (3, 160), scale_type, block, second)
    # on blocks, inside a block, at odd places, the short end
    for start, stop in ((0, 160), (0, 32), (64, 128), (96, 160), (16, 48), (8, 30), (5, 6), (33, 101), (150, 160)):
        part = weight.columns(start, stop)
        assert torch.equal(part.dequantize(), want[:, start:stop]), (start, stop)
        assert part.spec.second_scale in (weight.spec.second_scale, "channel")
    with pytest.raises(ShardError):
        weight.columns(100, 161)


def test_columns_of_rows_and_shards_agree():
    weight, want = made("fp6_e3m2", (8, 96), "e8m0", 32, "channel")
    assert torch.equal(weight.rows(2, 6).columns(32, 96).dequantize(), want[2:6, 32:96])
    shards = [weight.shard(1, rank, 3).dequantize() for rank in range(3)]
    assert torch.equal(torch.cat(shards, dim=1), want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stacked_parts_keep_their_values(case):
    element, scale_type, block, second = case
    parts = [made(element, (n, 96), scale_type, block, second) for n in (3, 1, 4)]
    stacked = BlockFloatWeight.concat([weight for weight, _ in parts])
    assert torch.equal(stacked.dequantize(), torch.cat([want for _, want in parts]))
    spec = parts[0][0].spec
    assert stacked.spec == spec.stacked((3, 1, 4)) and stacked.shape == (8, 96)


def test_parts_with_and_without_a_second_scale_stack():
    plain, want_plain = made("fp4_e2m1", (2, 32), "e4m3", 16)
    scaled, want_scaled = made("fp4_e2m1", (3, 32), "e4m3", 16, "tensor")
    for parts, want in (((plain, scaled), (want_plain, want_scaled)), ((scaled, plain), (want_scaled, want_plain))):
        assert torch.equal(BlockFloatWeight.concat(parts).dequantize(), torch.cat(want))


@pytest.mark.parametrize("other", [("fp6_e2m3", (2, 64), "e8m0", 32), ("fp4_e2m1", (2, 96), "e8m0", 32), ("fp4_e2m1", (2, 64), "e4m3", 32), ("fp4_e2m1", (2, 64), "e8m0", 16)], ids=str)
def test_unlike_parts_do_not_stack(other):
    with pytest.raises(ShardError):
        BlockFloatWeight.concat([made("fp4_e2m1", (2, 64))[0], made(*other)[0]])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gathered_rows_are_those_of_dequantize(case):
    element, scale_type, block, second = case
    weight, want = made(element, (9, 70), scale_type, block, second)
    index = torch.tensor([8, 0, 3, 3, 5])
    assert torch.equal(weight.gather_rows(index), want[index])


def test_size_counts_codes_and_scales():
    weight, _ = made("fp4_e2m1", (4, 64), "e4m3", 16, "tensor")
    assert weight.nbytes == 4 * 32 + 4 * 4 + 4
    assert made("fp6_e2m3", (4, 64))[0].bits_per_weight == 6.25


@pytest.mark.parametrize("change", [
    {"element": "fp5"}, {"scale_type": "e3m4"}, {"in_features": 66}, {"block": 16}, {"scale": torch.zeros(3, 2, dtype=torch.uint8)},
    {"scale": torch.zeros(4, 2)}, {"packed": torch.zeros(4, 32, dtype=torch.int8)}, {"second": torch.ones(2, 1), "second_group": 64},
    {"second": torch.ones(4, 1, dtype=torch.float64), "second_group": 64}, {"second": torch.ones(4, 2), "second_group": 64}, {"second": torch.ones(1, 1)},
], ids=lambda c: "-".join(c))  # fmt: skip
def test_impossible_layouts_are_refused(change):
    weight, _ = made("fp4_e2m1", (4, 64))
    with pytest.raises(LayoutError):
        replace(weight, **change)
