"""BlockFloatScheme: the tensors it declares, second scales as multipliers and divisors, inputs, and values that are refused."""

from dataclasses import replace

import pytest
import torch

from bitgrain.errors import BadValueError, LabelMismatchError
from bitgrain.formats.block_float import BlockFloatScheme
from bitgrain.weights import ActivationSpec
from tests.unit.formats.golden_cases import problems_of
from tests.unit.formats.synthetic import view

N, K = 3, 40
BYTES = {"fp4_e2m1": 20, "fp6_e2m3": 30, "fp6_e3m2": 30, "fp8_e4m3fn": 40, "fp8_e5m2": 40, "int8": 40}
OWN_TYPES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8}
SCALE_ONE = {"e8m0": 127, "e4m3": 0x38, "e5m3": 120}


def tensors_of(element, scale_type="e8m0", block=16, **more):
    """Codes that count up, and scales that are all 1."""
    codes = (torch.arange(N * BYTES[element]) % 0x70).to(torch.uint8).view(N, -1)
    scale = torch.full((N, -(-K // block)), SCALE_ONE[scale_type], dtype=torch.uint8)
    return {"weight": codes, "weight_scale": scale.view(torch.float8_e4m3fn) if scale_type == "e4m3" else scale, **more}


def scheme_of(element, scale_type="e8m0", block=16, activation=None, **more):
    return BlockFloatScheme((N, K), element, block, scale_type, activation or ActivationSpec(), **more)


@pytest.mark.parametrize("element", BYTES)
def test_codes_are_bytes_or_elements_of_their_own_type(element):
    tensors, scheme = tensors_of(element), scheme_of(element)
    assert problems_of(scheme, view(tensors)) == []
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec and weight.shape == (N, K) and weight.second is None
    for own in OWN_TYPES.values():
        typed = tensors | {"weight": tensors["weight"].view(own)}
        wanted = [] if OWN_TYPES.get(element) is own else ["dtype weight"]
        assert problems_of(scheme, view(typed)) == wanted
        if not wanted:
            assert torch.equal(scheme.to_weight(typed).dequantize(), weight.dequantize())


@pytest.mark.parametrize(("scale_type", "dtypes"), [("e8m0", (torch.uint8, torch.float8_e8m0fnu)), ("e4m3", (torch.float8_e4m3fn,)), ("e5m3", (torch.uint8,))])
def test_scales_have_the_types_that_their_kind_allows(scale_type, dtypes):
    tensors, scheme = tensors_of("fp4_e2m1", scale_type), scheme_of("fp4_e2m1", scale_type)
    raw = tensors["weight_scale"].view(torch.uint8)
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.bfloat16):
        stored = raw.to(dtype) if dtype is torch.bfloat16 else raw.view(dtype)
        found = problems_of(scheme, view(tensors | {"weight_scale": stored}))
        assert found == ([] if dtype in dtypes else ["dtype weight_scale"])
        if not found:
            values = scheme.to_weight(tensors | {"weight_scale": stored}).dequantize()
            assert torch.equal(values, scheme.to_weight(tensors).dequantize())


def test_names_are_the_producers_own():
    scheme = scheme_of("fp4_e2m1", "e4m3", weight_name="blocks", scale_name="blocks_scale", second_name="blocks_scale_2")
    assert [rule.name for rule in scheme.tensors()] == ["blocks", "blocks_scale", "blocks_scale_2"]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize(("divides", "stored"), [(False, 0.125), (True, 8.0)])
def test_second_scale_is_a_multiplier_or_a_divisor(divides, stored, shape):
    scheme = scheme_of("fp4_e2m1", "e4m3", second_name="second", second_divides=divides)
    tensors = tensors_of("fp4_e2m1", "e4m3", second=torch.full(shape, stored))
    assert problems_of(scheme, view(tensors)) == []
    weight = scheme.to_weight(tensors)
    plain = scheme_of("fp4_e2m1", "e4m3").to_weight(tensors).dequantize()
    assert torch.equal(weight.dequantize(), plain * 0.125)
    assert weight.spec == scheme.weight_spec and weight.spec.second_scale == "tensor"


@pytest.mark.parametrize(("divides", "stored", "other"), [(True, 1e-4, "multiplier"), (False, 1e4, "divisor")])
def test_second_scale_of_the_wrong_direction_is_refused(divides, stored, other):
    scheme = scheme_of("fp4_e2m1", "e4m3", second_name="second", second_divides=divides)
    with pytest.raises(LabelMismatchError, match=f"second.*looks like a {other}"):
        scheme.to_weight(tensors_of("fp4_e2m1", "e4m3", second=torch.tensor(stored)))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("divides", [False, True])
def test_impossible_second_scale_is_refused_by_name(divides, value):
    scheme = scheme_of("fp4_e2m1", "e4m3", second_name="second", second_divides=divides)
    with pytest.raises(BadValueError) as error:
        scheme.to_weight(tensors_of("fp4_e2m1", "e4m3", second=torch.tensor(value)))
    assert error.value.where == "second"


@pytest.mark.parametrize(("element", "bad"), [("fp8_e4m3fn", 0x7F), ("fp8_e4m3fn", 0xFF), ("fp8_e5m2", 0x7C), ("fp8_e5m2", 0xFD)])
def test_codes_that_are_no_numbers_are_refused(element, bad):
    tensors = tensors_of(element)
    tensors["weight"][1, 2] = bad
    with pytest.raises(BadValueError, match="^weight: 1 of 120 codes"):
        scheme_of(element).to_weight(tensors)


@pytest.mark.parametrize(("scale_type", "bad"), [("e8m0", 255), ("e4m3", 0x7F), ("e4m3", 0xB8), ("e5m3", 255)])
def test_scales_that_are_no_scales_are_refused(scale_type, bad):
    tensors = tensors_of("fp4_e2m1", scale_type)
    tensors["weight_scale"].view(torch.uint8)[1, 1] = bad
    with pytest.raises(BadValueError) as error:
        scheme_of("fp4_e2m1", scale_type).to_weight(tensors)
    assert error.value.where == "weight_scale"


def test_zero_scales_need_zero_codes():
    tensors = tensors_of("fp4_e2m1", "e4m3")
    tensors["weight_scale"].view(torch.uint8).zero_()
    with pytest.raises(BadValueError, match="every scale is zero"):
        scheme_of("fp4_e2m1", "e4m3").to_weight(tensors)
    tensors["weight"].zero_()
    assert not scheme_of("fp4_e2m1", "e4m3").to_weight(tensors).dequantize().any()


BLOCK_INPUT = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="static")


@pytest.mark.parametrize(("divides", "stored"), [(False, 0.25), (True, 4.0)])
def test_second_input_scale_is_declared_and_read(divides, stored):
    scheme = scheme_of("fp4_e2m1", activation=replace(BLOCK_INPUT, second_divides=divides), input_name="input_second")
    tensors = tensors_of("fp4_e2m1")
    assert problems_of(scheme, view(tensors)) == ["missing input_second"]
    tensors["input_second"] = torch.tensor([stored])
    assert problems_of(scheme, view(tensors)) == []
    activation, x = scheme.to_activation(tensors), torch.randn(3, 32)
    assert activation.second == stored
    assert torch.equal(activation.fake_quantize(x), replace(BLOCK_INPUT, second=0.25).fake_quantize(x))
    with pytest.raises(BadValueError, match="input_second"):
        scheme.to_activation(tensors | {"input_second": torch.tensor([0.0])})


def test_static_and_dynamic_inputs_declare_what_they_store():
    static = scheme_of("fp4_e2m1", activation=ActivationSpec("fp8_e4m3fn", dynamic=False))
    tensors = tensors_of("fp4_e2m1", input_scale=torch.tensor(0.5))
    assert problems_of(static, view(tensors)) == [] and static.to_activation(tensors).scale == 0.5
    dynamic = scheme_of("fp4_e2m1", activation=ActivationSpec("fp8_e4m3fn", "token"))
    assert problems_of(dynamic, view(tensors)) == ["undeclared input_scale"]
    assert dynamic.to_activation(tensors) == dynamic.activation
