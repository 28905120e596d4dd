"""Zero points and scale directions where producers disagree: the edge cases, against the producers' own conversions.

GPTQModel 7.7.0 turns true zero points into its "v1" ones by subtracting 1 from every field: for 2, 4 and 8 bits from whole
32-bit words, so that a field of 0 borrows from its neighbour; for 3 bits field by field, modulo 8.
"""

import pytest
import torch
from synthetic import evidence, view
from word_packers import Numbers, gptq_tensors, numbers, pack_rows, signed, stream_words

from bitgrain.errors import BadValueError, LabelMismatchError
from bitgrain.formats.block_float import BlockFloatScheme
from bitgrain.formats.fp8 import FP8Config
from bitgrain.formats.gptq import GptqConfig
from bitgrain.formats.gptq.zero_points import check_symmetric, read_zero_points
from bitgrain.weights import ActivationSpec

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
BASE = {"quant_method": "gptq", "group_size": 32, "sym": False, "desc_act": False}


def producers_v1(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [G, W] of true zero points [N, G], as the producer converts and stores them."""
    rows = []
    for row in zeros.t().tolist():
        if bits == 3:
            words = stream_words([(z - 1) % 8 for z in row], 3, 32)
        else:
            words = [(word - ONES[bits]) % (1 << 32) for word in stream_words(row, bits, 32)]
        rows.append([signed(word, 32) for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def zero_patterns(bits: int, columns: int) -> dict[str, torch.Tensor]:
    """Zero points [N, 1]: none, all, one, runs, and a random quarter of them at 0."""
    random = torch.Generator().manual_seed(bits)
    top = (1 << bits) - 1
    values = torch.randint(1, top + 1, (columns, 1), generator=random)
    quarter = torch.rand(columns, 1, generator=random) < 0.25
    single, last, run = values.clone(), values.clone(), values.clone()
    single[0], last[-1], run[3:17] = 0, 0, 0
    return {
        "no zero": values, "all zero": torch.zeros_like(values), "all at the top": torch.full_like(values, top), "first": single,
        "last": last, "a run": run, "a quarter": values.masked_fill(quarter, 0), "0 before the top": torch.tensor([0, top] * (columns // 2))[:, None],
    }  # fmt: skip


# --- GPTQ: zero points minus one ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", list(zero_patterns(4, 32)))
def test_v1_zero_points_survive_the_producers_conversion(bits, name):
    zeros = zero_patterns(bits, 64)[name]
    got = read_zero_points(producers_v1(zeros, bits), bits, 64, minus_one=True, planar=False)
    assert torch.equal(got, zeros.to(torch.int16))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fields_read_one_by_one_would_differ_beside_a_zero(bits):
    """Why the word is added to as a whole: the borrow changed the neighbours of every 0."""
    zeros = zero_patterns(bits, 64)["a quarter"]
    fields = read_zero_points(producers_v1(zeros, bits), bits, 64, minus_one=False, planar=False)
    one_by_one = (fields + 1) & ((1 << bits) - 1)
    assert not torch.equal(one_by_one, zeros.to(torch.int16))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_fields_read_one_by_one_agree_where_no_zero_point_is_zero(bits):
    zeros = torch.randint(1, 1 << bits, (64, 3), generator=torch.Generator().manual_seed(bits))
    stored = pack_rows(zeros.t() - 1, bits)
    assert torch.equal(read_zero_points(stored, bits, 64, minus_one=True, planar=False), zeros.to(torch.int16))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_both_conventions_give_the_same_weight(bits):
    v = numbers(64, 64, 32, bits)
    v = Numbers(bits, v.codes, v.zeros.masked_fill(torch.rand(64, 2) < 0.25, 0), v.scales, v.groups)
    v2 = gptq_tensors(v, v1=False)
    v1 = v2 | {"qzeros": producers_v1(v.zeros, bits)}
    for tensors, label in ((v1, "gptq"), (v2, "gptq_v2")):
        config = GptqConfig.parse(evidence(BASE | {"bits": bits, "checkpoint_format": label}))
        scheme = config.quantized_scheme(view(tensors, shape=(64, 64)))
        assert torch.equal(scheme.to_weight(tensors).dequantize(), v.weight()), label


# --- GPTQ: symmetric fields tell a wrong label ----------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored_v1", [True, False])
@pytest.mark.parametrize("label_v1", [True, False])
def test_symmetric_fields_detect_a_wrong_label(bits, stored_v1, label_v1):
    v = numbers(32, 32, 32, bits, zero=1 << (bits - 1))
    tensors = gptq_tensors(v, v1=stored_v1)
    section = BASE | {"bits": bits, "sym": True, "checkpoint_format": "gptq" if label_v1 else "gptq_v2"}
    scheme = GptqConfig.parse(evidence(section)).quantized_scheme(view(tensors, shape=(32, 32)))
    if stored_v1 == label_v1:
        assert torch.equal(scheme.to_weight(tensors).dequantize(), v.weight())
    else:
        with pytest.raises(LabelMismatchError, match="(?s)qzeros.*'gptq' stores the zero point minus one, 'gptq_v2' stores it as it is"):
            scheme.to_weight(tensors)


def test_symmetric_words_are_the_known_constants():
    middle = torch.full((8, 1), 8)
    assert producers_v1(middle, 4).item() & 0xFFFFFFFF == 0x77777777
    assert pack_rows(middle.t(), 4).item() & 0xFFFFFFFF == 0x88888888


def test_one_wrong_symmetric_field_is_not_called_a_wrong_label():
    zeros = torch.full((8, 2), 8, dtype=torch.int16)
    zeros[3, 1] = 5
    with pytest.raises(LabelMismatchError, match="1 of 16 fields.*the first: 5") as caught:
        check_symmetric(zeros, 4, "gptq")
    assert "set sym to false" in caught.value.action


# --- NVFP4: the second scale as a multiplier and as a divisor ---------------------------------------------------------------------
def nvfp4(divides: bool, factor: float):
    """(scheme, tensors, float32 weight) of one module in one of the two conventions; `factor` multiplies."""
    random = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (4, 16), dtype=torch.uint8, generator=random)
    scale = (torch.rand(4, 2, generator=random) * 400 + 1).to(torch.float8_e4m3fn)
    name = "weight_global_scale" if divides else "weight_scale_2"
    activation = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="static", second_divides=divides)
    scheme = BlockFloatScheme((4, 32), "fp4_e2m1", 16, "e4m3", activation, "weight", "weight_scale", name, divides, "input_second")
    stored = torch.tensor([1 / factor if divides else factor])
    tensors = {"weight": packed, "weight_scale": scale, name: stored, "input_second": stored.clone()}
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack([packed & 15, packed >> 4], -1).view(4, 32).long()
    element = torch.where(codes > 7, -values[codes % 8], values[codes % 8])
    return scheme, tensors, element * (scale.float().repeat_interleave(16, 1) * factor)


@pytest.mark.parametrize("divides", [True, False])
def test_second_scale_is_applied_in_its_convention(divides):
    scheme, tensors, want = nvfp4(divides, 1 / 2048)
    torch.testing.assert_close(scheme.to_weight(tensors).dequantize(), want, rtol=1e-6, atol=0)


def test_both_conventions_give_the_same_weight_and_input():
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(4))
    results = []
    for divides in (True, False):
        scheme, tensors, _ = nvfp4(divides, 1 / 2048)  # a power of two: its reciprocal is exact
        results.append((scheme.to_weight(tensors).dequantize(), scheme.to_activation(tensors).fake_quantize(x)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert bool((results[0][1] != 0).any())


@pytest.mark.parametrize("divides", [True, False])
def test_second_scale_stored_the_other_way_round_is_refused(divides):
    scheme, tensors, _ = nvfp4(divides, 1 / 2048)
    tensors[scheme.second_name] = tensors[scheme.second_name].reciprocal()
    with pytest.raises(LabelMismatchError, match=scheme.second_name):
        scheme.to_weight(tensors)


@pytest.mark.parametrize("divides", [True, False])
@pytest.mark.parametrize("value", [0.0, -2.0, float("inf"), float("nan")])
def test_impossible_second_scale_is_refused(divides, value):
    scheme, tensors, _ = nvfp4(divides, 1 / 2048)
    tensors[scheme.second_name] = torch.tensor([value])
    with pytest.raises(BadValueError, match=scheme.second_name):
        scheme.to_weight(tensors)


# --- FP8: GPTQModel's divided scales ----------------------------------------------------------------------------------------------
DIVIDED = {"quant_method": "fp8", "method": "fp8", "format": "float8_e4m3fn", "weight_scale_semantics": "inverse", "bits": 8, "group_size": -1}


def fp8_module(shape: tuple[int, ...], cell: tuple[int, int]):
    """(weight, tensors as GPTQModel writes them): weight_scale_inv = 448 / amax of each cell, stored as a divisor."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)) * 0.02
    blocks = weight.view(64 // cell[0], cell[0], 96 // cell[1], cell[1])
    divisor = 448 / blocks.abs().amax((1, 3))
    codes = (weight * divisor.repeat_interleave(cell[0], 0).repeat_interleave(cell[1], 1)).to(torch.float8_e4m3fn)
    return weight, {"weight": codes, "weight_scale_inv": divisor.reshape(shape)}


@pytest.mark.parametrize(
    ("method", "cell", "shape", "block"),
    [("row", (1, 96), (64,), None), ("block", (32, 32), (2, 3), [32, 32]), ("tensor", (64, 96), (), None)],
)
def test_divided_fp8_scales_are_divided_by(method, cell, shape, block):
    weight, tensors = fp8_module(shape, cell)
    config = FP8Config.parse(evidence(DIVIDED | {"weight_scale_method": method, "weight_block_size": block}))
    scheme = config.decide(view(tensors)).scheme
    got = scheme.to_weight(tensors).dequantize()
    divisor = tensors["weight_scale_inv"].reshape(64 // cell[0], 96 // cell[1]).repeat_interleave(cell[0], 0).repeat_interleave(cell[1], 1)
    torch.testing.assert_close(got, tensors["weight"].float() / divisor, rtol=2e-7, atol=0)
    assert float((got - weight).abs().max()) < 0.07 * float(weight.abs().max())


def test_divided_fp8_scales_without_their_marker_are_refused():
    _, tensors = fp8_module((64,), (1, 96))
    config = FP8Config.parse(evidence({"quant_method": "fp8", "activation_scheme": "dynamic"}))
    with pytest.raises(LabelMismatchError, match="(?s)weight_scale_inv.*weight_scale_semantics"):
        config.decide(view(tensors)).scheme.to_weight(tensors)


def test_multiplied_fp8_scales_with_that_marker_are_refused():
    _, tensors = fp8_module((64,), (1, 96))
    tensors["weight_scale_inv"] = tensors["weight_scale_inv"].reciprocal()
    config = FP8Config.parse(evidence(DIVIDED | {"weight_scale_method": "row"}))
    with pytest.raises(LabelMismatchError, match="weight_scale_inv"):
        config.decide(view(tensors)).scheme.to_weight(tensors)
