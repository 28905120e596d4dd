"""GPTQ checkpoints: golden weights of the producers, every packing by an independent packer, and refusals."""

import pytest
import torch
from golden_cases import Case, decode_all, fixture_cases, golden_cases, problems_of
from word_packers import decode_module, evidence, gptq_tensors, marlin_tensors, minus_one, numbers, view

from bitgrain.errors import (
    BadValueError,
    ConfigError,
    LabelMismatchError,
    ShapeMismatchError,
)
from bitgrain.formats.gptq import GptqConfig
from bitgrain.formats.gptq.zero_points import read_zero_points

BASE = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
AUTOROUND = {"autoround_version": "0.16.1", "provider": "auto-round"}


def parse(**changes):
    return GptqConfig.parse(evidence({**BASE, **changes}))


def decode(tensors, *, shape=None, **changes):
    """(weight, scheme) after the header comparison."""
    return decode_module(parse(**changes), tensors, shape)


@pytest.mark.parametrize("folder", golden_cases("gptq"))
def test_golden_module_dequantizes_to_the_producers_values(folder):
    case = Case(folder)
    assert GptqConfig.detect(case.evidence()).score == 100
    assert decode_all(case, GptqConfig.parse(case.evidence())) == 2


@pytest.mark.parametrize("folder", fixture_cases("gptq"))
def test_fixture_dequantizes_to_the_producers_values(folder):
    case = Case(folder)
    assert decode_all(case, GptqConfig.parse(case.evidence())) >= len(case.weights())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("index", [True, False], ids=["g_idx", "no-g_idx"])
def test_dense_words_of_either_zero_point_label_decode_exactly(bits, label, index):
    v = numbers(48, 96, 32, bits, seed=bits)
    weight, scheme = decode(gptq_tensors(v, v1=label == "gptq", index=index), bits=bits, checkpoint_format=label)
    assert torch.equal(weight.dequantize(), v.weight())
    assert weight.spec == scheme.weight_spec
    assert weight.group_index is None


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_planar_words_decode_exactly_with_zero_points_as_they_are(bits):
    v = numbers(40, 96, 32, bits, seed=bits)
    weight, scheme = decode(gptq_tensors(v, v1=False, planar=True), bits=bits, checkpoint_format="gptq_p")
    assert torch.equal(weight.dequantize(), v.weight())
    assert weight.spec == scheme.weight_spec


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_odd_widths_are_planar_from_one_producer_and_dense_from_the_other(bits):
    v = numbers(32, 64, 32, bits, seed=bits)
    v.zeros.clamp_(min=1)  # the second producer cannot store 0
    planar, _ = decode(gptq_tensors(v, v1=False, planar=True), bits=bits, **GPTQMODEL)
    dense, _ = decode(gptq_tensors(v, v1=True), bits=bits, **AUTOROUND)
    assert torch.equal(planar.dequantize(), v.weight())
    assert torch.equal(dense.dequantize(), v.weight())


@pytest.mark.parametrize(
    "who", [{}, {**GPTQMODEL, **AUTOROUND}, {"meta": {"quantizer": ["optimum:1.2"]}}], ids=["nobody", "both", "another"]
)
def test_odd_width_without_one_producer_is_refused_as_ambiguous(who):
    with pytest.raises(ConfigError, match=r"bits: ambiguous packing: 5 bits"):
        parse(bits=5, **who)
    with pytest.raises(ConfigError, match=r"lm_head.*ambiguous packing: 6 bits"):
        parse(dynamic={"lm_head": {"bits": 6}}, **who)


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("v1", [True, False], ids=["v1", "v2"])
def test_words_of_every_width_hold_the_same_codes(width, bits, v1):
    v = numbers(64, 64, 32, bits, seed=width)
    tensors = gptq_tensors(v, v1=v1, width=width)
    weight, _ = decode(tensors, bits=bits, pack_dtype=f"int{width}", checkpoint_format="gptq" if v1 else "gptq_v2")
    assert torch.equal(weight.dequantize(), v.weight())


def test_v1_zero_of_zero_borrows_from_its_neighbour_and_is_restored():
    zeros = torch.tensor([[0], [0], [5], [8], [0], [1], [15], [0]])
    words = minus_one(zeros, 4)
    assert torch.equal(read_zero_points(words, 4, 8, minus_one=True, planar=False), zeros.short())
    by_field = ((words >> (4 * torch.arange(8))) + 1) & 15
    assert not torch.equal(by_field.t().short(), zeros.short())  # what field by field would give


def test_v1_words_of_zero_and_of_all_ones_wrap():
    words = torch.tensor([[-1, 0x77777777, -0x11111112]], dtype=torch.int32)
    zeros = read_zero_points(words, 4, 24, minus_one=True, planar=False)[:, 0].tolist()
    # all ones is a zero point of 0 that lost its borrow: 0xFFFFFFFF + 0x11111111 = 0x11111110 modulo 2**32
    assert zeros == [0] + [1] * 7 + [8] * 8 + [15, 15, 15, 15, 15, 15, 15, 15]


def test_v1_three_bits_are_restored_field_by_field():
    zeros = torch.arange(8).repeat(4)[:, None]
    assert torch.equal(read_zero_points(minus_one(zeros, 3), 3, 32, minus_one=True, planar=False), zeros.short())


@pytest.mark.parametrize("bits", [3, 4])
def test_activation_order_follows_the_stored_index(bits):
    v = numbers(32, 128, 32, bits, seed=3)
    v.groups = v.groups[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    weight, scheme = decode(gptq_tensors(v), bits=bits, desc_act=True)
    assert torch.equal(weight.dequantize(), v.weight())
    assert weight.spec == scheme.weight_spec
    assert weight.spec.group_index


def test_index_need_not_use_every_group():
    v = numbers(32, 64, 16, seed=3)
    v.groups = torch.tensor([3, 1] * 32)
    weight, _ = decode(gptq_tensors(v), group_size=16, desc_act=True)
    assert torch.equal(weight.dequantize(), v.weight())


def test_activation_order_that_is_plain_becomes_a_plain_weight():
    v = numbers(32, 128, 32)
    weight, scheme = decode(gptq_tensors(v), desc_act=True)
    assert torch.equal(weight.dequantize(), v.weight())
    assert scheme.weight_spec.group_index
    assert not weight.spec.group_index


@pytest.mark.parametrize("more", [{"static_groups": True}, {"meta": {"static_groups": True}}, {"group_size": -1}], ids=str)
def test_fixed_groups_or_one_group_promise_a_plain_weight_though_desc_act_is_true(more):
    v = numbers(32, 64, more.get("group_size", 32))
    weight, scheme = decode(gptq_tensors(v, index=False), desc_act=True, **more)
    assert torch.equal(weight.dequantize(), v.weight())
    assert weight.spec == scheme.weight_spec
    assert not weight.spec.group_index


def test_activation_order_without_index_is_reported_missing():
    tensors = gptq_tensors(numbers(32, 64, 32), index=False)
    module = view(tensors)
    assert problems_of(parse(desc_act=True).decide(module).scheme, module) == ["missing g_idx"]


@pytest.mark.parametrize(
    ("index", "kind", "text"),
    [
        ([0, 1] * 32, LabelMismatchError, "desc_act"),
        ([0] * 64, BadValueError, "all 0"),
        ([0] * 63 + [2], BadValueError, "groups 0 to 2"),
        ([-1] + [0] * 63, BadValueError, "groups -1 to 0"),
    ],
    ids=["reordered-but-plain", "all-zero", "too-large", "negative"],
)
def test_index_that_cannot_be_meant_is_refused(index, kind, text):
    v = numbers(32, 64, 32)
    tensors = {**gptq_tensors(v), "g_idx": torch.tensor(index, dtype=torch.int32)}
    with pytest.raises(kind, match=text) as caught:
        decode(tensors)
    assert caught.value.where == "g_idx"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_under_the_wrong_label_are_refused(bits, stored):
    v = numbers(32, 64, 32, bits, zero=1 << (bits - 1))
    tensors = gptq_tensors(v, v1=stored == "gptq")
    weight, scheme = decode(tensors, bits=bits, sym=True, checkpoint_format=stored)
    assert torch.equal(weight.dequantize(), v.weight())
    assert weight.spec == scheme.weight_spec
    assert weight.spec.zero == "constant"
    with pytest.raises(LabelMismatchError, match=r"(?s)^qzeros:.*checkpoint_format.*zero point.*set checkpoint_format") as caught:
        decode(tensors, bits=bits, sym=True, checkpoint_format="gptq_v2" if stored == "gptq" else "gptq")
    assert caught.value.where == "qzeros"


def test_one_asymmetric_zero_point_in_a_symmetric_checkpoint_is_refused():
    v = numbers(32, 64, 32, zero=8)
    v.zeros[31, 1] = 9
    with pytest.raises(LabelMismatchError, match=r"1 of 64 fields.*\(the first: 9\)"):
        decode(gptq_tensors(v), sym=True)


def test_spare_fields_of_a_symmetric_checkpoint_may_hold_anything():
    v = numbers(36, 64, 32, zero=8)
    tensors = gptq_tensors(v, v1=False)
    tensors["qzeros"][:, -1] |= 0x00FF0000
    weight, _ = decode(tensors, sym=True, checkpoint_format="gptq_v2")
    assert torch.equal(weight.dequantize(), v.weight())


def test_symmetry_that_is_not_stated_is_not_assumed():
    v = numbers(32, 64, 32)
    weight, _ = decode(gptq_tensors(v), sym=None)
    assert torch.equal(weight.dequantize(), v.weight())


@pytest.mark.parametrize("bits", [3, 4])
def test_ragged_sizes_decode_from_the_index_or_the_architecture(bits):
    v = numbers(20, 40, 32, bits)
    tensors = gptq_tensors(v)
    assert tensors["qzeros"].shape == (2, -(-20 * bits // 32))
    weight, _ = decode(tensors, bits=bits, shape=(20, 40))
    assert torch.equal(weight.dequantize(), v.weight())
    if bits == 3:  # 4 words of 3-bit codes leave K open, and the index closes it
        weight, _ = decode(tensors, bits=bits)
        assert weight.shape == (20, 40)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_keep_their_type(dtype):
    v = numbers(32, 64, 32, dtype=dtype)
    weight, scheme = decode(gptq_tensors(v))
    assert weight.scale.dtype is dtype
    assert weight.spec == scheme.weight_spec
    assert torch.equal(weight.dequantize(), v.weight())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.fill_(0), "every scale is zero"),
        (lambda s: s[0, :1].fill_(float("nan")), "NaN"),
        (lambda s: s[0, :1].fill_(float("inf")), "infinite"),
    ],
    ids=["zero", "nan", "inf"],
)
def test_scales_that_no_producer_writes_are_refused(change, text):
    tensors = gptq_tensors(numbers(32, 64, 32))
    change(tensors["scales"])
    with pytest.raises(BadValueError, match=text) as caught:
        decode(tensors)
    assert caught.value.where == "scales"


def test_zero_scales_of_a_matrix_of_zeros_are_accepted():
    v = numbers(32, 64, 32, zero=8)
    v.codes.fill_(8)
    v.scales.fill_(0)
    weight, _ = decode(gptq_tensors(v), sym=True)
    assert not weight.dequantize().any()


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_missing_row_shows_in_the_headers(name):
    tensors = gptq_tensors(numbers(32, 96, 32))
    tensors[name] = tensors[name][:-1]
    module = view(tensors, shape=(32, 96))
    assert f"shape {name}" in problems_of(parse().decide(module).scheme, module)
    alone = view(tensors)
    assert problems_of(parse().decide(alone).scheme, alone)


@pytest.mark.parametrize(
    "changes",
    [{"bits": 8}, {"bits": 2}, {"group_size": 64}, {"group_size": 16}, {"group_size": -1}, {"pack_dtype": "int16"}],
    ids=str,
)
@pytest.mark.parametrize("shape", [None, (32, 96)], ids=["tensors-alone", "architecture"])
def test_wrong_settings_show_in_the_headers(changes, shape):
    module = view(gptq_tensors(numbers(32, 96, 32)), shape=shape)
    assert problems_of(parse(**changes).decide(module).scheme, module)


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("names", [("B", "s"), ("qweight", "scales")], ids=lambda n: n[0])
@pytest.mark.parametrize("said", [{"checkpoint_format": "marlin"}, {"is_marlin_format": True}, {"quant_method": "marlin"}], ids=str)
def test_marlin_tiles_decode_under_either_pair_of_names(group_size, names, said):
    v = numbers(128, 256, group_size, zero=8)
    weight, scheme = decode(marlin_tensors(v, names), sym=True, group_size=group_size, **said)
    assert torch.equal(weight.dequantize(), v.weight())
    assert weight.spec == scheme.weight_spec


def test_marlin_tiles_under_another_label_are_refused_and_the_reverse():
    tiles = marlin_tensors(numbers(64, 64, 32, zero=8), ("B", "s"))
    with pytest.raises(LabelMismatchError, match="checkpoint_format is 'gptq'"):
        parse(sym=True).decide(view(tiles))
    with pytest.raises(LabelMismatchError, match="checkpoint_format is 'marlin'"):
        parse(sym=True, checkpoint_format="marlin").decide(view(gptq_tensors(numbers(64, 64, 32))))


def test_marlin_tiles_that_cannot_hold_the_sizes_are_refused():
    tiles = marlin_tensors(numbers(64, 64, 32, zero=8))
    with pytest.raises(ShapeMismatchError, match=r"N % 64 == 0"):
        parse(sym=True, checkpoint_format="marlin").decide(view(tiles, shape=(96, 64)))
