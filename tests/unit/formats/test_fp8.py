"""FP8: block, channel and tensor scales, multipliers and divisors, activations, refusals by name."""

import pytest
import torch

from bitgrain.errors import BadValueError, BitgrainError, ConfigError, LabelMismatchError, RuleMismatchError, UnknownFormatError
from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.fp8 import FP8Config
from bitgrain.formats.fp8.schemes import Float8Scheme
from bitgrain.weights import NO_ACTIVATION
from tests.unit.formats.golden_cases import Case, decode_all, fixture_cases, golden_cases, problems_of
from tests.unit.formats.synthetic import NAME, evidence, header, ramp, view

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
TENSOR = {"quant_method": "fp8", "activation_scheme": "static"}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
DIVISOR = {"quant_method": "fp8", "method": "fp8", "format": "float8_e4m3fn", "checkpoint_format": "float8_e4m3fn", "bits": 8,
           "weight_scale_semantics": "inverse", "meta": {"quantizer": ["gptqmodel:7.7.0"]}, "lm_head": False, "pack_dtype": "int32"}  # fmt: skip


def parse(section, tensors=None, sidecars=None):
    """A configuration whose checkpoint holds `tensors` (by full name) or one fp8 tensor."""
    return FP8Config.parse(evidence(section, tensors or {f"{NAME}.weight": torch.zeros(1, 1).to(E4M3)}, sidecars))


def block_module(n=200, k=300, size=128, dtype=E4M3):
    """Tensors of a block module with short edge blocks, and its float32 values."""
    scale = ramp(-(-n // size), -(-k // size)).abs() + 0.001
    codes = (ramp(n, k) * 400).to(dtype)
    want = codes.float() * scale.repeat_interleave(size, 0)[:n].repeat_interleave(size, 1)[:, :k]
    return {"weight": codes, "weight_scale_inv": scale}, want


def decode(config, tensors, kind=ModuleKind.LINEAR):
    module = view(tensors, kind=kind)
    scheme = config.decide(module).scheme
    assert problems_of(scheme, module) == []
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec
    assert config.decide(view(tensors, kind=kind, shape=weight.shape)).scheme == scheme
    return weight.dequantize()


@pytest.mark.parametrize("folder", fixture_cases("fp8"))
def test_fixture_weights_equal_golden(folder):
    case = Case(folder)
    assert FP8Config.detect(case.evidence()).score == 100
    assert decode_all(case, FP8Config.parse(case.evidence())) >= len(case.weights())


@pytest.mark.parametrize("folder", golden_cases("fp8"))
def test_golden_module_equals_golden(folder):
    case = Case(folder)
    assert decode_all(case, FP8Config.parse(case.evidence())) == len(case.facts["checks"]) > 0


# --- what scales mean ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_block_scale_multiplies_short_edge_blocks_too(dtype):
    tensors, _ = block_module()
    tensors["weight_scale_inv"] = tensors["weight_scale_inv"].to(dtype)
    _, want = block_module()
    want = tensors["weight"].float() * tensors["weight_scale_inv"].float().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(decode(parse(BLOCK), tensors), want)


def test_block_of_another_size_is_read():
    tensors, want = block_module(96, 96, 32)
    assert torch.equal(decode(parse(BLOCK | {"weight_block_size": [32, 32]}), tensors), want)


def test_e5m2_weight_is_read():
    tensors, want = block_module(dtype=E5M2)
    assert torch.equal(decode(parse(BLOCK | {"fmt": "e5m2"}), tensors), want)


@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu])
def test_power_of_two_scale_is_decoded(stored):
    tensors, _ = block_module()
    powers = torch.tensor([[120, 121, 119], [118, 0, 127]], dtype=torch.uint8)
    tensors["weight_scale_inv"] = powers.view(stored)
    scale = torch.exp2(powers.double() - 127).float()
    want = tensors["weight"].float() * scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(decode(parse(BLOCK | {"scale_fmt": "ue8m0"}), tensors), want)


def test_nan_power_of_two_is_refused():
    tensors, _ = block_module()
    tensors["weight_scale_inv"] = torch.full((2, 3), 255, dtype=torch.uint8)
    with pytest.raises(BadValueError, match="weight_scale_inv"):
        decode(parse(BLOCK | {"scale_fmt": "ue8m0"}), tensors)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.full((8,), 0.5), torch.full((8, 1), 0.5)], ids=["scalar", "one", "row", "column"])
def test_scale_without_blocks_is_per_tensor_or_channel_by_count(name, scale):
    tensors = {"weight": torch.full((8, 64), 3.0).to(E4M3), name: scale, "input_scale": torch.tensor(0.1)}
    assert torch.equal(decode(parse(TENSOR), tensors), torch.full((8, 64), 1.5))


@pytest.mark.parametrize(("method", "scale"), [("row", torch.full((256,), 8.0)), ("block", torch.full((2, 2), 8.0)), ("tensor", torch.tensor(8.0))])
def test_inverse_scale_divides(method, scale):
    tensors = {"weight": torch.full((256, 256), 448.0).to(E4M3), "weight_scale_inv": scale}
    section = DIVISOR | {"weight_scale_method": method, "weight_block_size": [128, 128] if method == "block" else None}
    config = parse(section)
    assert torch.equal(decode(config, tensors), torch.full((256, 256), 56.0))
    assert config.decide(view(tensors)).scheme.activation == NO_ACTIVATION


def test_inverse_scale_differs_from_the_quotient_by_rounding_only():
    scale = ramp(64).abs() * 1e5 + 3
    tensors = {"weight": (ramp(64, 256) * 900).to(E4M3), "weight_scale_inv": scale}
    got = decode(parse(DIVISOR | {"weight_scale_method": "row"}), tensors)
    torch.testing.assert_close(got, tensors["weight"].float() / scale[:, None], rtol=1.3e-7, atol=0)


def test_unmarked_divisors_are_refused():
    tensors = {"weight": torch.full((256, 256), 448.0).to(E4M3), "weight_scale_inv": torch.full((2, 2), 900.0)}
    with pytest.raises(LabelMismatchError, match=r"weight_scale_inv.*\n.*multipliers"):
        decode(parse(BLOCK), tensors)


def test_marked_multipliers_are_refused():
    tensors = {"weight": torch.full((256, 256), 448.0).to(E4M3), "weight_scale_inv": torch.full((256,), 0.001)}
    with pytest.raises(LabelMismatchError, match=r"weight_scale_inv.*\n.*divisors"):
        decode(parse(DIVISOR | {"weight_scale_method": "row"}), tensors)


# --- activations --------------------------------------------------------------------------------------------------------
def activation(section, tensors, kind=ModuleKind.LINEAR):
    config = parse(section)
    module = view(tensors, kind=kind)
    scheme = config.decide(module).scheme
    assert problems_of(scheme, module) == []
    return scheme.to_activation(tensors)


def test_block_weights_have_dynamic_group_activations():
    spec = activation(BLOCK, block_module()[0])
    assert (spec.describe(), spec.group_size, spec.scale_type) == ("fp8_e4m3fn g128 dynamic", 128, "float")
    assert activation(BLOCK | {"scale_fmt": "ue8m0"}, block_module()[0]).scale_type == "e8m0"


@pytest.mark.parametrize("name", ["input_scale", "activation_scale"])
@pytest.mark.parametrize("value", [torch.tensor(0.25), torch.tensor([0.25])], ids=["scalar", "one"])
def test_static_activation_reads_either_name(name, value):
    tensors = {"weight": torch.ones(8, 64).to(E4M3), "weight_scale": torch.tensor(0.5), name: value}
    spec = activation(TENSOR, tensors)
    assert (spec.describe(), spec.scale) == ("fp8_e4m3fn tensor static", 0.25)


def test_missing_static_scale_is_declared_missing():
    module = view({"weight": torch.ones(8, 64).to(E4M3), "weight_scale": torch.tensor(0.5)})
    assert problems_of(parse(TENSOR).decide(module).scheme, module) == ["missing input_scale"]


def test_dynamic_activation_without_blocks_is_per_token():
    tensors = {"weight": torch.ones(8, 64).to(E4M3), "weight_scale": torch.tensor(0.5)}
    assert activation(TENSOR | {"activation_scheme": "dynamic"}, tensors).describe() == "fp8_e4m3fn token dynamic"


def test_bounded_activation_cuts_the_maximum():
    tensors = {"weight": torch.ones(8, 4).to(E4M3), "weight_scale": torch.full((8, 1), 0.5)}
    spec = activation(FBGEMM, tensors)
    assert (spec.granularity, spec.upper_bound) == ("token", 1200.0)
    x = torch.tensor([[4000.0, 1.0, 2.0, 3.0], [4.48, 1.0, 2.0, 3.0]])
    _, scale, _ = spec.quantize(x)
    assert torch.allclose(scale.flatten(), torch.tensor([1200 / 448, 0.01]))
    assert torch.equal(decode(parse(FBGEMM), tensors), torch.full((8, 4), 0.5))


def test_embedding_has_no_activation():
    tensors = {"weight": torch.ones(8, 64).to(E4M3), "weight_scale": torch.tensor(0.5)}
    assert activation(BLOCK, tensors, ModuleKind.EMBEDDING) == NO_ACTIVATION


def test_weight_only_writer_has_no_activation():
    assert activation(BLOCK | {"act_bits": 16}, block_module()[0]) == NO_ACTIVATION


# --- damages ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("local", ["weight", "weight_scale_inv"])
def test_deleted_or_shortened_tensor_is_found_in_the_headers(local):
    tensors, _ = block_module(256, 256)
    shape = tuple(tensors["weight"].shape)
    short = tensors | {local: tensors[local][:-1]}
    gone = {k: v for k, v in tensors.items() if k != local}
    for damaged, needed in [(short, "shape"), (gone, "missing")]:
        module = view(damaged, shape=shape)
        found = problems_of(parse(BLOCK).decide(module).scheme, module)
        assert any(p == f"{needed} {local}" for p in found), found


def test_scale_of_a_channel_with_a_missing_row_is_found():
    module = view({"weight": torch.ones(8, 64).to(E4M3), "weight_scale": torch.ones(7, 1), "input_scale": torch.ones(1)})
    assert problems_of(parse(TENSOR).decide(module).scheme, module) == ["shape weight_scale"]


@pytest.mark.parametrize("damage", ["nan", "zero", "negative"])
def test_impossible_scale_is_refused(damage):
    tensors, _ = block_module()
    scale = tensors["weight_scale_inv"]
    {"nan": lambda: scale.view(-1)[:1].fill_(float("nan")), "zero": scale.zero_, "negative": scale.neg_}[damage]()
    with pytest.raises(BadValueError, match="weight_scale_inv"):
        decode(parse(BLOCK), tensors)


@pytest.mark.parametrize(("dtype", "byte"), [(E4M3, 0x7F), (E4M3, 0xFF), (E5M2, 0x7C), (E5M2, 0xFE)])
def test_codes_that_are_not_finite_are_refused(dtype, byte):
    tensors, _ = block_module(dtype=dtype)
    tensors["weight"].view(torch.uint8)[3, 5] = byte
    with pytest.raises(BadValueError, match="weight: 1 of 60000"):
        decode(parse(BLOCK | {"fmt": "e4m3" if dtype is E4M3 else "e5m2"}), tensors)


def test_element_type_that_contradicts_fmt_is_found():
    module = view(block_module()[0])
    assert problems_of(parse(BLOCK | {"fmt": "e5m2"}).decide(module).scheme, module) == ["dtype weight"]


# --- rules --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_ignored_names_match_whole_segments(key):
    config = parse(BLOCK | {key: ["gate", "layers.1.mlp.down_proj"]})
    dense = {"weight": torch.ones(2, 2)}
    assert not config.rule_for(view(dense, "model.layers.0.mlp.gate"))[0]
    assert config.rule_for(view(dense, "model.layers.0.mlp.gate_proj"))[0]
    assert not config.rule_for(view(dense, "model.layers.1.mlp.down_proj"))[0]
    assert config.rule_for(view(dense, "model.layers.11.mlp.down_proj"))[0]
    assert config.matched_rules == set(config.rules())


def test_ignored_module_with_quantized_tensors_is_refused():
    with pytest.raises(RuleMismatchError, match=NAME):
        parse(BLOCK | {"modules_to_not_convert": [NAME]}).decide(view(block_module()[0]))


def test_dynamic_rules_change_scales_and_the_first_match_decides():
    rules = {
        r"-:.*layers\.0\.": {},
        r".*down_proj": {"weight_scale_method": "block", "weight_block_size": [64, 32]},
        r"+:.*layers": {"weight_scale_method": "tensor"},
        r".*up_proj": {"weight_scale_method": "block", "weight_block_size": [8, 8]},
    }
    config = parse(DIVISOR | {"weight_scale_method": "row", "dynamic": rules})
    tensors = {"weight": torch.zeros(128, 64).to(E4M3), "weight_scale_inv": torch.ones(2, 2)}
    assert not config.rule_for(view(tensors, "model.layers.0.mlp.down_proj"))[0]
    specs = [config.quantized_scheme(view(tensors, name)).weight_spec for name in ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj", "lm_head")]
    assert [(s.granularity, s.block) for s in specs] == [("block", (64, 32)), ("tensor", (0, 0)), ("channel", (0, 0))]


@pytest.mark.parametrize("change", [{"weight_scale_method": "column"}, {"weight_scale_method": "block"}, {"weight_scale_method": "row", "weight_block_size": [8, 8]}, {"bits": 4}, {}])
def test_dynamic_rule_that_cannot_be_honoured_is_refused(change):
    with pytest.raises(ConfigError, match="down_proj"):
        parse(DIVISOR | {"weight_scale_method": "row", "dynamic": {".*down_proj": change}})


def test_negative_dynamic_rule_excludes_by_regex():
    config = parse(DIVISOR | {"weight_scale_method": "row", "dynamic": {r"-:.*\.mlp\.down_proj": {}}})
    assert not config.rule_for(view({"weight": torch.ones(2, 2)}))[0]


def test_unlisted_dense_module_is_dense():
    choice = parse(BLOCK).decide(view({"weight": torch.ones(4, 8, dtype=torch.bfloat16)}, "lm_head", ModuleKind.LM_HEAD))
    assert (choice.scheme.label, choice.why) == ("dense bfloat16", "quant_method is fp8, but its tensors are dense")


# --- configuration ------------------------------------------------------------------------------------------------------
REFUSALS = {
    "unknown-key": ({"activation_schema": "static"}, r"activation_schema.*\n.*activation_scheme"),
    "scheme": ({"activation_scheme": "sometimes"}, "activation_scheme"),
    "fmt": ({"fmt": "e3m4"}, "fmt"),
    "block": ({"weight_block_size": [128]}, "weight_block_size"),
    "block-zero": ({"weight_block_size": [0, 128]}, "weight_block_size"),
    "scale-fmt": ({"scale_fmt": "ue5m3"}, "scale_fmt"),
    "semantics": ({"weight_scale_semantics": "sideways"}, "weight_scale_semantics"),
    "method-and-block": ({"weight_scale_method": "row"}, "weight_block_size"),
    "dynamic": ({"dynamic": {"lm_head": {"bits": 4}}}, "dynamic"),
    "extra": ({"extra_config": {"lm_head": {"bits": 4}}}, "extra_config"),
    "dynamic-list": ({"dynamic": ["lm_head"]}, "dynamic"),
    "extra-list": ({"extra_config": {"lm_head": 4}}, "extra_config"),
    "rotation": ({"rotation_config": {"type": "hadamard"}}, "rotation_config"),
    "cache": ({"kv_cache_scheme": "int2"}, "kv_cache_scheme"),
    "ignored": ({"ignored_layers": {"a": 1}}, "ignored_layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_configuration_is_refused_by_name(name):
    change, pattern = REFUSALS[name]
    with pytest.raises(ConfigError, match=pattern):
        parse(BLOCK | change)


def test_all_problems_are_reported_together():
    with pytest.raises(BitgrainError, match=r"2 problems[\s\S]*fmt[\s\S]*scale_fmt"):
        parse(BLOCK | {"fmt": "x", "scale_fmt": "y"})


def test_wrong_upper_bound_is_refused():
    with pytest.raises(ConfigError, match="activation_scale_ub"):
        parse(FBGEMM | {"activation_scale_ub": -1})



@pytest.mark.parametrize("name", ["gate_up_proj_scale_inv", "down_proj_scale_inv", "gate_up_proj_scale", "down_proj_activation_scale"])
def test_fused_experts_of_an_unknown_architecture_are_refused_by_name(name):
    full = f"model.layers.0.mlp.experts.{name}"
    tensors = {full: torch.ones(2, 2, 2), "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 2, 2).to(E4M3)}
    with pytest.raises(UnknownFormatError, match=full):
        parse(BLOCK, tensors).parts({name: header(name, t) for name, t in tensors.items()}, None)


def test_detection_by_method_sidecar_and_names():
    tensors = {f"{NAME}.{k}": v for k, v in block_module()[0].items()}
    assert FP8Config.detect(evidence(BLOCK)).score == 100
    assert FP8Config.detect(evidence(FBGEMM)).score == 100
    assert FP8Config.detect(evidence(None, tensors, {"quantization_config.json": BLOCK})).score == 80
    assert FP8Config.detect(evidence(None, tensors)).score == 50
    assert FP8Config.detect(evidence(None, {f"{NAME}.weight": torch.ones(2, 2)})) is None
    assert FP8Config.detect(evidence({"quant_method": "modelopt"}, tensors)) is None


def test_names_without_configuration_are_read_as_blocks_of_128():
    tensors, want = block_module()
    config = FP8Config.parse(evidence(None, {f"{NAME}.{k}": v for k, v in tensors.items()}))
    assert torch.equal(decode(config, tensors), want)


def test_cache_scales_are_listed():
    name = "model.layers.0.self_attn"
    module = ModuleView(name, ModuleKind.ATTENTION, {f"{name}.{n}": header(n, torch.ones(1)) for n in ("k_scale", "v_scale")})
    assert parse(BLOCK).get_kv_cache_scheme(module).element == "none"
    cache = parse(TENSOR | {"kv_cache_scheme": "static"}).get_kv_cache_scheme(module)
    assert (cache.element, [which for _, which in cache.scales]) == ("fp8_e4m3fn", ["k", "v"])


# --- one spec, computed twice -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cell", [(1, 1), (1, 16), (1, 64), (8, 64), (4, 16), (128, 128), (128, 16), (8, 16), (1, 128)], ids=str)
@pytest.mark.parametrize("shape", [(8, 64), (1, 64), (8, 1), (1, 1)], ids=str)
def test_weight_spec_equals_the_weight(shape, cell):
    scheme = Float8Scheme(shape, NO_ACTIVATION, "F8_E4M3", cell)
    grid = (-(-shape[0] // cell[0]), -(-shape[1] // cell[1]))
    assert scheme.to_weight({"weight": torch.ones(shape).to(E4M3), "weight_scale": torch.ones(grid)}).spec == scheme.weight_spec
