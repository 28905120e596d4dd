"""quanto: the maps, bytes and packed groups against naive decoders, activations, rules, refusals by name."""

import pytest
import torch
from torch import Tensor

from bitgrain.errors import (
    BadValueError,
    BitgrainError,
    ConfigError,
    DtypeMismatchError,
    LabelMismatchError,
    RuleMismatchError,
    ShapeMismatchError,
)
from bitgrain.formats.base import ModuleKind
from bitgrain.formats.quanto import QuantoConfig
from bitgrain.layers.linear import Linear
from bitgrain.weights import NO_ACTIVATION, ActivationSpec
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.golden_cases import problems_of
from tests.unit.formats.synthetic import NAME, evidence, ramp, view

D, P, S, SHIFT = "weight._data", "weight._data._data", "weight._scale", "weight._shift"
MAP = "quantization_map.json"
STATIC = ActivationSpec("int8", "tensor", dynamic=False)


def parse(weights="qint8", activations="none", source=MAP, section=None, **more) -> QuantoConfig:
    values = {NAME: {"weights": weights, "activations": activations}, **more}
    return QuantoConfig.parse(evidence(section, None, {source: values} if source else {}))


def unit_scales() -> dict[str, Tensor]:
    return {"input_scale": torch.ones(()), "output_scale": torch.ones(())}


def scheme_of(tensors, config, shape=None, kind=ModuleKind.LINEAR):
    module = view(tensors, kind=kind, shape=shape)
    scheme = config.decide(module).scheme
    assert problems_of(scheme, module) == []
    return scheme


def decode_module(tensors, config, shape=None) -> Tensor:
    scheme = scheme_of(tensors, config, shape)
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec
    assert weight.shape == scheme.shape
    return weight.dequantize()


def bytes_module(dtype=torch.int8, n=24, k=40, scale=(24, 1)):
    data = torch.randint(-128, 128, (n, k), dtype=torch.int8) if dtype == torch.int8 else (ramp(n, k) * 90).to(dtype)
    return {D: data, S: (ramp(*scale) if scale else ramp(1)[0]).abs() + 0.01, **unit_scales()}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Row r of part i lies at bit i * bits of packed row r: element by element."""
    rows, columns = codes.shape
    per = 8 // bits
    short = -(-rows // per)
    out = torch.zeros(short, columns, dtype=torch.uint8)
    for row in range(rows):
        out[row % short] |= (codes[row] << (row // short * bits)).to(torch.uint8)
    return out


def bits_module(bits, n=24, k=64, group=32, integer=False, dtype=torch.float32):
    """Tensors of a grouped module along rows, and its float32 values."""
    rows = n * k // group
    codes = torch.randint(0, 1 << bits, (rows, group))
    scale = (ramp(rows, 1).abs() + 0.01).to(dtype)
    shift = torch.randint(0, 1 << bits, (rows, 1), dtype=torch.uint8) if integer else ramp(rows, 1).to(dtype)
    values = (codes - shift.int()).float() * scale.float() if integer else codes.float() * scale.float() - shift.float()
    return {P: pack(codes, bits), S: scale, SHIFT: shift, **unit_scales()}, values.reshape(n, k)


@pytest.mark.parametrize("folder", golden_folders("quanto"), ids=lambda f: f.name)
def test_golden_module_equals_the_producer(folder):
    assert check_golden(folder) >= 1


def test_a_golden_case_is_there():
    assert golden_folders("quanto")


# --- bytes ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "dtype"), [
    ("qint8", torch.int8), ("qfloat8", torch.float8_e4m3fn), ("qfloat8_e4m3fn", torch.float8_e4m3fn),
    ("qfloat8_e4m3fnuz", torch.float8_e4m3fnuz), ("qfloat8_e5m2", torch.float8_e5m2),
])  # fmt: skip
@pytest.mark.parametrize("scale", [(24, 1), (1, 40), (1, 1), ()], ids=["row", "column", "one", "scalar"])
def test_bytes_are_multiplied_by_their_scale(name, dtype, scale):
    tensors = bytes_module(dtype, scale=scale)
    assert torch.equal(decode_module(tensors, parse(name)), tensors[D].float() * tensors[S])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_scale_is_widened(dtype):
    tensors = bytes_module()
    tensors[S] = tensors[S].to(dtype)
    assert torch.equal(decode_module(tensors, parse()), tensors[D].float() * tensors[S].float())


def test_one_row_has_one_number():
    tensors = bytes_module(n=1, scale=())
    assert torch.equal(decode_module(tensors, parse()), tensors[D].float() * tensors[S])


# --- bits -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("n", "k", "group"), [(24, 64, 32), (24, 256, 128), (5, 96, 96), (7, 36, 36), (3, 64, 32), (1, 128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_shift_is_subtracted_after_the_scale(bits, n, k, group, dtype):
    tensors, want = bits_module(bits, n, k, group, dtype=dtype)
    torch.testing.assert_close(decode_module(tensors, parse(f"qint{bits}"), (n, k)), want, rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("n", "k", "group"), [(24, 64, 32), (5, 96, 96), (3, 64, 32)])
@pytest.mark.parametrize("stored", [torch.uint8, torch.int8])
def test_integer_shift_is_subtracted_before_the_scale(bits, n, k, group, stored):
    tensors, want = bits_module(bits, n, k, group, integer=True)
    tensors[SHIFT] = tensors[SHIFT].to(stored)
    assert torch.equal(decode_module(tensors, parse(f"qint{bits}"), (n, k)), want)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("group", [8, 24])
def test_groups_along_the_last_axis(bits, integer, group):
    n, k = 24, 20
    codes = torch.randint(0, 1 << bits, (n, k))
    tables = [ramp(n // group, k).abs() + 0.01, torch.randint(0, 1 << bits, (n // group, k), dtype=torch.uint8) if integer else ramp(n // group, k)]
    full = [t.repeat_interleave(group, 0) for t in tables]
    want = (codes - full[1].int()).float() * full[0] if integer else codes.float() * full[0] - full[1]
    # quanto: [groups, size, K] -> [size, K, groups] -> [size, K * groups]
    grouped = codes.view(n // group, group, k).permute(1, 2, 0).reshape(group, -1)
    tensors = {P: pack(grouped, bits), S: tables[0].t().reshape(1, -1), SHIFT: tables[1].t().reshape(1, -1), **unit_scales()}
    torch.testing.assert_close(decode_module(tensors, parse(f"qint{bits}"), (n, k)), want, rtol=2e-6, atol=3e-7)


def test_a_group_of_equal_values_is_its_shift():
    tensors, want = bits_module(4, 2, 64, 32)
    tensors[S][1], want[0, 32:] = 0.0, -tensors[SHIFT][1]
    tensors[S][2], tensors[SHIFT][2], want[1, :32] = 0.0, 0.0, 0.0
    torch.testing.assert_close(decode_module(tensors, parse("qint4"), (2, 64)), want, rtol=2e-6, atol=3e-7)


def test_width_follows_from_the_packed_rows_where_nothing_says_it():
    for bits in (2, 4):
        tensors, want = bits_module(bits)
        torch.testing.assert_close(decode_module(tensors, parse(source=""), (24, 64)), want, rtol=2e-6, atol=3e-7)


def test_groups_need_the_shape_of_the_matrix():
    tensors, _ = bits_module(4)
    with pytest.raises(ConfigError, match="rows"):
        parse("qint4").decide(view(tensors))


# --- activations ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "element"), [("qint8", "int8"), ("qfloat8_e4m3fn", "fp8_e4m3fn"), ("qfloat8_e5m2", "fp8_e5m2"), ("qfloat8_e4m3fnuz", "fp8_e4m3fnuz")])
def test_calibrated_scales_quantize_input_and_output(name, element):
    tensors = bytes_module() | {"input_scale": torch.tensor(0.25), "output_scale": torch.tensor(0.5)}
    spec = scheme_of(tensors, parse(activations=name)).to_activation(tensors)
    assert (spec.element, spec.granularity, spec.dynamic, spec.scale, spec.output) == (element, "tensor", False, 0.25, 0.5)
    assert (spec.of_output().scale, spec.of_output().output) == (0.5, None)


def test_an_output_scale_of_one_is_unused():
    tensors = bytes_module() | {"input_scale": torch.tensor(0.25)}
    spec = scheme_of(tensors, parse(activations="qint8")).to_activation(tensors)
    assert (spec.output, spec.of_output()) == (None, NO_ACTIVATION)


def test_scales_of_one_mean_no_quantization():
    tensors = bytes_module()
    assert scheme_of(tensors, parse()).to_activation(tensors) == NO_ACTIVATION


@pytest.mark.parametrize(("activations", "changed", "error"), [
    ("qint8", {}, BadValueError), ("qint8", {"input_scale": torch.tensor(-1.0)}, BadValueError), ("qint8", {"input_scale": torch.tensor(float("nan"))}, BadValueError),
    ("none", {"input_scale": torch.tensor(0.5)}, LabelMismatchError), ("none", {"output_scale": torch.tensor(0.5)}, LabelMismatchError),
])  # fmt: skip
def test_scales_that_contradict_the_map_are_refused(activations, changed, error):
    tensors = bytes_module() | changed
    with pytest.raises(error, match="input_scale" if not changed else next(iter(changed))):
        scheme_of(tensors, parse(activations=activations)).to_activation(tensors)


def test_a_wrapped_module_with_a_plain_weight_is_dense():
    tensors = {"weight": ramp(8, 16), "input_scale": torch.tensor(0.25), "output_scale": torch.ones(())}
    scheme = scheme_of(tensors, parse("none", "qint8"))
    assert torch.equal(scheme.to_weight(tensors).dequantize(), tensors["weight"])
    assert scheme.to_activation(tensors).scale == 0.25


class Doubled:
    """A kernel that gives 2 x."""

    name = "doubled"

    def apply(self, x, prepared, bias):
        return 2 * x


def test_a_linear_layer_quantizes_its_output():
    x = ramp(5, 7)
    output = ActivationSpec("int8", "tensor", dynamic=False, scale=0.25, output=0.01).of_output()
    got = Linear("l", Doubled(), None, None, quantized_output=output)(x)
    assert torch.equal(got, torch.round(2 * x / 0.01).clamp(-128, 127) * torch.tensor(0.01))
    assert torch.equal(Linear("l", Doubled(), None, None)(x), 2 * x)


def test_embedding_has_no_activation():
    assert scheme_of(bytes_module(), parse(activations="qint8"), kind=ModuleKind.EMBEDDING).activation == NO_ACTIVATION


# --- detection, maps, rules -----------------------------------------------------------------------------------------------
def test_detection_by_method_map_and_names():
    full = {f"{NAME}.{local}": t for local, t in bytes_module().items()}
    assert QuantoConfig.detect(evidence({"quant_method": "quanto"}, full)).score == 100
    assert QuantoConfig.detect(evidence(None, full, {MAP: {}})).score == 80
    assert QuantoConfig.detect(evidence(None, full, {"quanto_qmap.json": {}})).score == 80
    assert QuantoConfig.detect(evidence(None, full)).score == 50
    assert QuantoConfig.detect(evidence({"quant_method": "fp8"}, full)) is None
    assert QuantoConfig.detect(evidence(None, {"a.weight": torch.zeros(1)})) is None


@pytest.mark.parametrize("name", [D, P, S, SHIFT, "weight", "bias", "input_scale"])
def test_names_are_split_behind_the_module(name):
    assert parse().split_name(f"{NAME}.{name}") == (NAME, name)
    assert parse().split_name(name) == ("", name)


def test_output_scales_are_no_scales_of_the_cache():
    assert parse().is_own_scale("model.layers.0.self_attn.k_proj.output_scale")
    assert not parse().is_own_scale("model.layers.0.self_attn.k_scale")


@pytest.mark.parametrize("source", [MAP, "quanto_qmap.json"])
def test_both_maps_are_read(source):
    config = parse("qint8", source=source)
    assert config.rule_for(view(bytes_module())) == (True, f"{source} has it")
    assert config.rules() == (NAME,)


def test_a_quantized_module_that_the_map_lacks_is_refused():
    module = view(bytes_module(), "elsewhere")
    with pytest.raises(RuleMismatchError, match="elsewhere"):
        parse().decide(module)


def test_a_quantized_module_that_the_map_calls_unquantized_is_refused():
    with pytest.raises(RuleMismatchError, match=NAME):
        parse("none").decide(view(bytes_module()))


@pytest.mark.parametrize(("weights", "dtype"), [("int8", torch.int8), ("float8", torch.float8_e4m3fn), (None, torch.int8)])
def test_the_section_of_transformers(weights, dtype):
    section = {"quant_method": "quanto", "weights": weights, "activations": None, "modules_to_not_convert": ["lm_head"]}
    tensors = bytes_module(dtype)
    config = parse(source="", section=section)
    assert torch.equal(decode_module(tensors, config), tensors[D].float() * tensors[S])
    assert config.rule_for(view(tensors, "lm_head")) == (False, "modules_to_not_convert has 'lm_head'")


def test_int4_of_transformers():
    tensors, want = bits_module(4)
    config = parse(source="", section={"quant_method": "quanto", "weights": "int4"})
    torch.testing.assert_close(decode_module(tensors, config, (24, 64)), want, rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize(("bad", "match"), [
    ({NAME: {"weights": "qint3", "activations": "none"}}, "qint3"), ({NAME: {"weights": "qint8", "activations": "qint4"}}, "qint4"),
    ({NAME: {"weights": "qint8", "wieghts": "qint8"}}, "wieghts"), ({NAME: "qint8"}, NAME),
])  # fmt: skip
def test_maps_that_are_not_understood_are_refused(bad, match):
    with pytest.raises(BitgrainError, match=match):
        QuantoConfig.parse(evidence(None, None, {MAP: bad}))


def test_unknown_keys_and_bad_patterns_are_refused():
    with pytest.raises(BitgrainError, match="wieghts"):
        parse(source="", section={"quant_method": "quanto", "wieghts": "int8"})
    with pytest.raises(BitgrainError, match="regular expression"):
        parse(source="", section={"quant_method": "quanto", "modules_to_not_convert": ["("]})


# --- tensors that do not fit ----------------------------------------------------------------------------------------------
def test_data_of_another_type_than_the_map_says_are_refused():
    for named, tensors in (("qfloat8", bytes_module()), ("qint8", bytes_module(torch.float8_e5m2)), ("qint8", bits_module(4)[0])):
        with pytest.raises(DtypeMismatchError, match="weight._data"):
            parse(named).decide(view(tensors, shape=(24, 64)))


@pytest.mark.parametrize("wrong", [
    {D: torch.zeros(23, 40, dtype=torch.int8)}, {S: torch.ones(23, 1)}, {S: torch.ones(24, 2)}, {S: torch.ones(24, 1).to(torch.int8)},
    {"input_scale": torch.ones(2)}, {"weight._zeropoint": torch.zeros(24, 1)}, {"rotation": torch.zeros(1)},
])  # fmt: skip
def test_wrong_headers_are_named(wrong):
    module = view(bytes_module() | wrong, shape=(24, 40))
    problems = problems_of(parse().decide(module).scheme, module)
    assert any(next(iter(wrong)) in str(problem) for problem in problems)


@pytest.mark.parametrize("wrong", [
    {P: torch.zeros(23, 32, dtype=torch.uint8)}, {S: torch.ones(47, 1)}, {SHIFT: torch.ones(1)}, {SHIFT: torch.ones(48, 1).to(torch.int32)},
])  # fmt: skip
def test_wrong_headers_of_packed_groups_are_named(wrong):
    module = view(bits_module(4)[0] | wrong, shape=(24, 64))
    problems = problems_of(parse("qint4").decide(module).scheme, module)
    assert any(next(iter(wrong)) in str(problem) for problem in problems)


@pytest.mark.parametrize("missing", [P, S, SHIFT])
def test_a_missing_tensor_of_packed_groups_is_named(missing):
    tensors, _ = bits_module(4)
    module = view({name: t for name, t in tensors.items() if name != missing}, shape=(24, 64))
    assert any(missing in str(problem) for problem in problems_of(parse("qint4").decide(module).scheme, module))


def test_groups_that_do_not_divide_the_row_are_refused():
    tensors, _ = bits_module(4, 24, 64, 32)
    with pytest.raises(ShapeMismatchError, match="groups of 32"):
        parse("qint4").decide(view(tensors, shape=(32, 48)))


@pytest.mark.parametrize(("local", "value"), [(S, float("nan")), (S, -1.0), (S, 0.0)])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_that_quanto_never_writes_are_refused(local, value, bits):
    tensors = bits_module(4)[0] if bits == 4 else bytes_module()
    scheme = scheme_of(tensors, parse(f"qint{bits}"), (24, 64) if bits == 4 else None)
    with pytest.raises(BadValueError, match=local):
        scheme.to_weight(tensors | {local: torch.full_like(tensors[local], value)})


def test_shifts_and_float8_codes_that_are_not_finite_are_refused():
    tensors, _ = bits_module(4)
    with pytest.raises(BadValueError, match=SHIFT):
        scheme_of(tensors, parse("qint4"), (24, 64)).to_weight(tensors | {SHIFT: torch.full((48, 1), float("inf"))})
    floats = bytes_module(torch.float8_e4m3fn)
    with pytest.raises(BadValueError, match=D):
        scheme_of(floats, parse("qfloat8")).to_weight(floats | {D: torch.full((24, 40), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)})


def test_examples_cover_every_kind():
    assert {weight.describe() for _, weight, _ in QuantoConfig.examples()} == {"int2 g128 asym", "int4 g128 asym", "int8 channel", "fp8_e4m3fn channel"}
