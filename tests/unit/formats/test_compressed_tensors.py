"""compressed-tensors: decoding against the producer's golden weights and the library's own functions; refusals by name."""

import copy
import warnings

import pytest
import torch

from bitgrain.errors import (
    BadValueError,
    ConfigError,
    ConflictingConfigError,
    LabelMismatchError,
    MissingTensorError,
    RuleMismatchError,
    ShapeMismatchError,
    UnknownFormatError,
)
from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.compressed_tensors import CompressedTensorsConfig
from bitgrain.formats.compressed_tensors.schemes import packed_words
from bitgrain.numerics.bitpack import bytes_as_words, pack_dense, pack_padded
from tests.unit.formats.golden_cases import Case, decode_all, fixture_cases, golden_cases, problems_of
from tests.unit.formats.synthetic import NAME, evidence, header, ramp, view

FAMILIES = ("compressed-tensors-int", "compressed-tensors-float", "compressed-tensors-sparse")


def section(weights=None, storage="pack-quantized", inputs=None, **more):
    """A configuration with one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": storage, "quantization_status": "compressed", "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "kv_cache_scheme": None, "version": "0.19.0", **more}  # fmt: skip


def parse(config, tensors=None):
    return CompressedTensorsConfig.parse(evidence(config, tensors))


W4_G32 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
W8_CHANNEL = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}


def packed_module(bits=4, n=16, k=64, groups=2, packing="dense"):
    """Tensors of a pack-quantized module with all codes in use, and its signed codes."""
    torch.manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    words = pack_padded(codes, bits) if packing == "padded" else bytes_as_words(pack_dense(codes, bits))
    tensors = {"weight_packed": words, "weight_shape": torch.tensor([n, k]), "weight_scale": ramp(n, groups, dtype=torch.bfloat16).abs() + 0.01}
    return tensors, codes.int() - (1 << (bits - 1))


# --- the producer's own checkpoints -----------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", fixture_cases(*FAMILIES))
def test_fixture_weights_equal_golden(folder):
    case = Case(folder)
    assert CompressedTensorsConfig.detect(case.evidence()).score == 100
    assert decode_all(case, CompressedTensorsConfig.parse(case.evidence())) >= len(case.weights())


@pytest.mark.parametrize("folder", golden_cases(*FAMILIES))
def test_golden_module_equals_golden(folder):
    case = Case(folder)
    assert decode_all(case, CompressedTensorsConfig.parse(case.evidence())) == len(case.facts["checks"]) > 0


# --- against the library ------------------------------------------------------------------------------------------------
def library():
    """Skip unless the producer's library can be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations while the library is imported
            import compressed_tensors  # noqa: F401
    except ImportError as error:
        pytest.skip(f"compressed-tensors cannot be imported: {error}")


def library_case(args, storage, n=24, k=128, inputs=None):
    """(tensors, float32 weights) that the library itself writes for the arguments."""
    library()
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    full = QuantizationArgs(**args)
    weight = ramp(n, k) + 0.03
    low, high = extremes(weight, full)
    scale, zero = calculate_qparams(low, high, full)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    scheme = QuantizationScheme(targets=["Linear"], weights=full, input_activations=inputs)
    tensors = BaseCompressor.get_value_from_registry(storage).compress(state, scheme)
    codes = quantize(x=weight, scale=scale, zero_point=zero, args=full)
    want = dequantize(x_q=codes, scale=scale, zero_point=zero, args=full)
    return tensors, want


def extremes(weight, args):
    n, k = weight.shape
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
        blocks = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.reshape(n, -1, args.group_size) if args.strategy == "group" else weight.reshape(n, 1, k)
    return groups.amin(-1), groups.amax(-1)


STRATEGIES = [{"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "group", "group_size": 32}, {"strategy": "group", "group_size": 128}]


def strategy_id(value):
    return f"{value['strategy']}{value.get('group_size', '')}"


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=strategy_id)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("storage", ["pack-quantized", "int-quantized"])
def test_library_integer_weight_decodes_exactly(storage, bits, strategy, symmetric):
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    tensors, want = library_case(args, storage)
    check_decoding(section(args, storage, version="0.17.0"), tensors, want)


@pytest.mark.parametrize("shape", [(24, 128), (130, 200)], ids=["even", "edge-blocks"])
@pytest.mark.parametrize("strategy", [{"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "block", "block_structure": [128, 64]}], ids=strategy_id)
@pytest.mark.parametrize("kind", ["int", "float"])
def test_library_eight_bit_weight_decodes_exactly(kind, strategy, shape):
    args = {"num_bits": 8, "type": kind, "symmetric": True, **strategy}
    tensors, want = library_case(args, f"{kind}-quantized", *shape)
    check_decoding(section(args, f"{kind}-quantized"), tensors, want)


def check_decoding(config, tensors, want):
    module = view(tensors)
    scheme = parse(config).decide(module).scheme
    assert problems_of(scheme, module) == []
    weight = scheme.to_weight(tensors)
    assert torch.equal(weight.dequantize(), want)
    assert weight.spec == scheme.weight_spec
    told = parse(config).decide(view(tensors, shape=tuple(want.shape))).scheme
    assert told == scheme


INPUTS = {
    "int8-token": ({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}, {}),
    "int8-token-asym": ({"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": False}, {}),
    "int4-token": ({"num_bits": 4, "type": "int", "strategy": "token", "dynamic": True}, {}),
    "int8-tensor": ({"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": True}, {}),
    "int8-group": ({"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "dynamic": True}, {}),
    "fp8-token": ({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}, {}),
    "fp8-group": ({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True}, {}),
    "fp8-tensor": ({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": True}, {}),
    "fp8-static": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, {"input_scale": torch.tensor([0.0041])}),
    "int8-static": ({"num_bits": 8, "type": "int", "strategy": "tensor"}, {"input_scale": torch.tensor([0.02])}),
    "int8-static-asym": (
        {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False},
        {"input_scale": torch.tensor([0.02]), "input_zero_point": torch.tensor([-17], dtype=torch.int8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_activation_equals_library_fake_quantization(name):
    library()
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args, stored = INPUTS[name]
    weight = {"weight": torch.zeros(8, 96, dtype=torch.int8), "weight_scale": torch.ones(8, 1)}
    module = view(weight | stored)
    scheme = parse(section(W8_CHANNEL, "int-quantized", args)).decide(module).scheme
    assert problems_of(scheme, module) == []
    mine = scheme.to_activation(weight | stored)
    x = ramp(1, 7, 96) * 40
    x[0, 2] = 0
    x[0, 3] = x[0, 3].abs()
    full = QuantizationArgs(**args)
    scale, zero = compute_dynamic_scales_and_zp(x, full, torch.nn.Identity()) if full.dynamic else (stored["input_scale"], stored.get("input_zero_point"))
    want = fake_quantize(x, scale, zero, full)[0]
    if name == "int8-token-asym":
        want[2] = 0  # the library divides 0 by 0 in an all-zero row
    assert torch.equal(mine.fake_quantize(x[0]), want)


# --- packing ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["0.17.0", "0.19.0"])
@pytest.mark.parametrize("packing", ["dense", "padded"])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_packing_is_read_from_the_size_whatever_the_version(bits, packing, version):
    tensors, codes = packed_module(bits, packing=packing)
    module = view(tensors)
    scheme = parse(section({**W4_G32, "num_bits": bits}, version=version)).decide(module).scheme
    assert (scheme.packing, problems_of(scheme, module)) == (packing, [])
    scale = tensors["weight_scale"].float().repeat_interleave(32, 1)
    assert torch.equal(scheme.to_weight(tensors).dequantize(), codes.float() * scale)


@pytest.mark.parametrize(("version", "packing"), [("0.17.0", "padded"), ("0.18.0", "dense"), ("0.20.1", "dense")])
def test_packing_with_a_size_of_both_ways_follows_the_version(version, packing):
    assert packed_words(20, 3, "dense") == packed_words(20, 3, "padded")
    tensors, codes = packed_module(3, k=20, groups=1, packing=packing)
    args = {"num_bits": 3, "type": "int", "strategy": "channel"}
    weight = parse(section(args, version=version)).decide(view(tensors, shape=(16, 20))).scheme.to_weight(tensors)
    assert torch.equal(weight.dequantize(), codes.float() * tensors["weight_scale"].float())


def test_packing_without_size_or_version_is_refused():
    tensors, _ = packed_module(3, k=20, groups=1)
    args = {"num_bits": 3, "type": "int", "strategy": "channel"}
    with pytest.raises(ConfigError, match="version"):
        parse(section(args, version=None)).decide(view(tensors, shape=(16, 20)))


def test_dense_zero_points_of_three_bits_are_read_along_n():
    tensors, codes = packed_module(3, n=32)
    zero = torch.randint(0, 8, (32, 2), dtype=torch.uint8)
    tensors["weight_zero_point"] = bytes_as_words(pack_dense(zero.t().contiguous(), 3)).t().contiguous()
    scheme = parse(section({**W4_G32, "num_bits": 3, "symmetric": False})).decide(view(tensors)).scheme
    assert problems_of(scheme, view(tensors)) == []
    scale = tensors["weight_scale"].float().repeat_interleave(32, 1)
    want = (codes - (zero.int() - 4).repeat_interleave(32, 1)).float() * scale
    assert torch.equal(scheme.to_weight(tensors).dequantize(), want)


@pytest.mark.parametrize("storage", ["pack-quantized", "int-quantized"])
def test_unpacked_zero_points_are_signed(storage):
    tensors, codes = packed_module()
    if storage == "int-quantized":
        tensors = {"weight": codes.to(torch.int8), "weight_scale": tensors["weight_scale"]}
    zero = torch.randint(-8, 8, (16, 2), dtype=torch.int8)
    tensors["weight_zero_point"] = zero
    scheme = parse(section({**W4_G32, "symmetric": False}, storage)).decide(view(tensors)).scheme
    assert problems_of(scheme, view(tensors)) == []
    weight = scheme.to_weight(tensors)
    want = (codes - zero.repeat_interleave(32, 1)).float() * tensors["weight_scale"].float().repeat_interleave(32, 1)
    assert torch.equal(weight.dequantize(), want)
    assert weight.spec == scheme.weight_spec
    zero[3, 1] = 8
    with pytest.raises(BadValueError, match="weight_zero_point"):
        scheme.to_weight(tensors)


# --- group index --------------------------------------------------------------------------------------------------------
def indexed(index, actorder="group"):
    tensors, codes = packed_module()
    tensors["weight_g_idx"] = index.to(torch.int32)
    return parse(section({**W4_G32, "actorder": actorder})), tensors, codes


@pytest.mark.parametrize("actorder", ["group", "dynamic", True])
def test_group_index_chooses_the_scale_of_each_column(actorder):
    index = torch.randperm(64) % 2
    config, tensors, codes = indexed(index, actorder)
    scheme = config.decide(view(tensors)).scheme
    weight = scheme.to_weight(tensors)
    assert torch.equal(weight.dequantize(), codes.float() * tensors["weight_scale"].float()[:, index])
    assert weight.spec == scheme.weight_spec


def test_group_index_of_minus_one_means_natural_order():
    config, tensors, codes = indexed(torch.full((64,), -1))
    scheme = config.decide(view(tensors)).scheme
    weight = scheme.to_weight(tensors)
    assert torch.equal(weight.dequantize(), codes.float() * tensors["weight_scale"].float().repeat_interleave(32, 1))
    assert weight.spec == scheme.weight_spec


@pytest.mark.parametrize("index", [torch.arange(64) // 32 + 1, torch.arange(64) // 32 - 2, torch.zeros(64)], ids=["too-high", "too-low", "one-group"])
def test_impossible_group_index_is_refused(index):
    config, tensors, _ = indexed(index)
    with pytest.raises(BadValueError, match="weight_g_idx"):
        config.decide(view(tensors)).scheme.to_weight(tensors)


def test_group_index_out_of_order_without_actorder_is_refused():
    config, tensors, _ = indexed(torch.arange(64) % 2, None)
    with pytest.raises(LabelMismatchError, match="actorder"):
        config.decide(view(tensors)).scheme.to_weight(tensors)


def test_missing_group_index_is_declared_missing():
    tensors, _ = packed_module()
    scheme = parse(section({**W4_G32, "actorder": "group"})).decide(view(tensors)).scheme
    assert problems_of(scheme, view(tensors)) == ["missing weight_g_idx"]


# --- damages ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [None, (16, 64)], ids=["unknown-architecture", "known-architecture"])
@pytest.mark.parametrize("local", ["weight_packed", "weight_scale", "weight_shape"])
def test_deleted_tensor_is_found_in_the_headers(local, shape):
    tensors, _ = packed_module()
    del tensors[local]
    module = view(tensors, shape=shape)
    assert f"missing {local}" in problems_of(parse(section(W4_G32)).decide(module).scheme, module)


@pytest.mark.parametrize("shape", [None, (16, 64)], ids=["unknown-architecture", "known-architecture"])
@pytest.mark.parametrize("change", [{"num_bits": 8}, {"num_bits": 2}, {"group_size": 16}, {"group_size": 64}, {"num_bits": 3}], ids=str)
def test_wrong_setting_is_found_in_the_headers(change, shape):
    tensors, _ = packed_module()
    module = view(tensors, shape=shape)
    assert problems_of(parse(section({**W4_G32, **change})).decide(module).scheme, module)


@pytest.mark.parametrize("local", ["weight_packed", "weight_scale"])
def test_missing_row_is_found_in_the_headers(local):
    tensors, _ = packed_module()
    tensors[local] = tensors[local][:-1]
    module = view(tensors)
    assert problems_of(parse(section(W4_G32)).decide(module).scheme, module)


def test_wrong_weight_shape_is_refused():
    tensors, _ = packed_module()
    tensors["weight_shape"] = torch.tensor([16, 62])
    with pytest.raises(ShapeMismatchError, match="weight_shape"):
        parse(section(W4_G32)).decide(view(tensors)).scheme.to_weight(tensors)


def damage_nan(scale):
    scale[0, 0] = float("nan")


@pytest.mark.parametrize("damage", [damage_nan, torch.Tensor.zero_, torch.Tensor.neg_], ids=["nan", "zero", "negative"])
def test_impossible_scale_is_refused(damage):
    tensors, _ = packed_module()
    damage(tensors["weight_scale"])
    with pytest.raises(BadValueError, match="weight_scale"):
        parse(section(W4_G32)).decide(view(tensors)).scheme.to_weight(tensors)


def full_range_module(packed):
    """A module as a full-range symmetric quantizer writes it: the value of largest magnitude has the lowest code."""
    torch.manual_seed(7)
    values = torch.randn(16, 2, 32)
    largest = values.gather(2, values.abs().argmax(2, keepdim=True))
    scale = (-largest / 8).half()
    codes = (values / scale.float()).round().clamp(-8, 7).reshape(16, 64).to(torch.int8)
    wanted = codes.float() * scale.float().squeeze(2).repeat_interleave(32, 1)
    words = {"weight_packed": bytes_as_words(pack_dense((codes + 8).to(torch.uint8), 4)), "weight_shape": torch.tensor([16, 64])}
    return (words if packed else {"weight": codes}) | {"weight_scale": scale.squeeze(2)}, wanted


@pytest.mark.parametrize("storage", ["pack-quantized", "int-quantized"])
def test_scales_that_carry_the_sign_of_a_full_range_quantizer_are_decoded(storage):
    tensors, wanted = full_range_module(storage == "pack-quantized")
    assert bool((tensors["weight_scale"] < 0).any())
    weight = parse(section(W4_G32, storage, version=None)).decide(view(tensors)).scheme.to_weight(tensors)
    assert torch.equal(weight.dequantize(), wanted)


@pytest.mark.parametrize("damage", ["library", "all-negative", "not-lowest"])
def test_negative_scales_that_no_full_range_quantizer_writes_are_refused(damage):
    tensors, _ = full_range_module(False)
    if damage == "all-negative":
        tensors["weight_scale"] = -tensors["weight_scale"].abs()
    if damage == "not-lowest":
        tensors["weight"] = tensors["weight"].clamp(min=-7)
    config = section(W4_G32, "int-quantized", version="0.19.0" if damage == "library" else None)
    with pytest.raises(BadValueError, match="negative scales"):
        parse(config).decide(view(tensors)).scheme.to_weight(tensors)


def test_zero_scales_of_an_empty_weight_are_accepted():
    tensors, _ = packed_module()
    tensors["weight_packed"].fill_(-2004318072)  # 0x88888888: every code is zero
    tensors["weight_scale"].zero_()
    assert not parse(section(W4_G32)).decide(view(tensors)).scheme.to_weight(tensors).dequantize().any()


def test_codes_beyond_num_bits_are_refused():
    tensors = {"weight": torch.full((8, 64), 9, dtype=torch.int8), "weight_scale": torch.ones(8, 2)}
    with pytest.raises(BadValueError, match=r"9.*\n.*4-bit"):
        parse(section(W4_G32, "int-quantized")).decide(view(tensors)).scheme.to_weight(tensors)


def test_zero_points_of_a_symmetric_scheme_must_be_zero():
    tensors = {"weight": torch.ones(8, 64, dtype=torch.int8), "weight_scale": torch.ones(8, 1), "weight_zero_point": torch.zeros(8, 1, dtype=torch.int8)}
    scheme = parse(section(W8_CHANNEL, "int-quantized")).decide(view(tensors)).scheme
    assert problems_of(scheme, view(tensors)) == []
    scheme.to_weight(tensors)
    tensors["weight_zero_point"][0] = 1
    with pytest.raises(LabelMismatchError, match="weight_zero_point"):
        scheme.to_weight(tensors)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_impossible_input_scale_is_refused(value):
    tensors = {"weight": torch.ones(8, 64).to(torch.float8_e4m3fn), "weight_scale": torch.tensor([0.5]), "input_scale": torch.tensor([value])}
    scheme = parse(section(FP8_TENSOR, "float-quantized", FP8_TENSOR)).decide(view(tensors)).scheme
    with pytest.raises(BadValueError, match="input_scale"):
        scheme.to_activation(tensors)


def test_missing_input_scale_is_declared_missing():
    tensors = {"weight": torch.ones(8, 64).to(torch.float8_e4m3fn), "weight_scale": torch.tensor([0.5])}
    scheme = parse(section(FP8_TENSOR, "float-quantized", FP8_TENSOR)).decide(view(tensors)).scheme
    assert problems_of(scheme, view(tensors)) == ["missing input_scale"]


@pytest.mark.parametrize(
    ("strategy", "scale"),
    [("tensor", torch.tensor(0.5)), ("tensor", torch.tensor([0.5])), ("channel", torch.full((8,), 0.5)), ("channel", torch.full((8, 1), 0.5))],
    ids=["scalar", "one", "row", "column"],
)
@pytest.mark.parametrize("kind", ["int", "float"])
def test_scale_is_squeezed_by_count(kind, strategy, scale):
    dtype = torch.int8 if kind == "int" else torch.float8_e4m3fn
    tensors = {"weight": torch.full((8, 64), 3.0).to(dtype), "weight_scale": scale}
    module = view(tensors)
    scheme = parse(section({"num_bits": 8, "type": kind, "strategy": strategy}, "naive-quantized")).decide(module).scheme
    assert problems_of(scheme, module) == []
    weight = scheme.to_weight(tensors)
    assert torch.equal(weight.dequantize(), torch.full((8, 64), 1.5))
    assert weight.spec == scheme.weight_spec


# --- rules --------------------------------------------------------------------------------------------------------------
def group(*targets, **weights):
    return {"targets": list(targets), "weights": {**W4_G32, **weights}, "format": "pack-quantized"}


def test_specificity_is_exact_then_regex_then_class():
    groups = {"a": group("Linear", num_bits=2), "b": group("re:.*down_proj", num_bits=3), "c": group(NAME, num_bits=4)}
    config = parse(section() | {"config_groups": groups, "format": "mixed-precision"})
    for name, bits in [(NAME, 4), ("model.layers.1.mlp.down_proj", 3), ("model.layers.1.mlp.up_proj", 2)]:
        scheme = config.quantized_scheme(view(packed_module(bits)[0], name))
        assert scheme.bits == bits


def test_regex_is_anchored_at_the_start_only():
    config = parse(section() | {"config_groups": {"a": group("re:model.layers.0")}})
    tensors, _ = packed_module()
    assert config.rule_for(view(tensors))[0]
    assert not config.rule_for(view(tensors, "other.model.layers.0.mlp.up_proj"))[0]


def test_class_names_match_kinds():
    config = parse(section() | {"config_groups": {"a": group("Linear"), "b": group("Embedding", num_bits=8)}, "ignore": None})
    tensors, _ = packed_module()
    for kind in (ModuleKind.LINEAR, ModuleKind.EXPERT, ModuleKind.LM_HEAD):
        assert config.rule_for(view(tensors, kind=kind)) == (True, "a (target 'Linear')")
    assert config.rule_for(view(tensors, kind=ModuleKind.EMBEDDING)) == (True, "b (target 'Embedding')")
    assert not config.rule_for(view(tensors, kind=ModuleKind.ATTENTION))[0]


def test_ignore_wins_and_contradicting_tensors_are_refused():
    tensors, _ = packed_module()
    config = parse(section(W4_G32, ignore=[NAME]))
    with pytest.raises(RuleMismatchError, match=NAME):
        config.decide(view(tensors))
    config.trust_tensors = True
    assert config.decide(view(tensors)).scheme.bits == 4


def test_partial_name_in_ignore_matches_nothing():
    config = parse(section(W4_G32, ignore=["down_proj", "re:.*gate$"]))
    tensors, _ = packed_module()
    assert config.rule_for(view(tensors))[0]
    assert not config.rule_for(view(tensors, "model.layers.0.mlp.gate"))[0]
    assert config.matched_rules == {"Linear", "re:.*gate$"}
    assert set(config.rules()) == {"down_proj", "re:.*gate$", "Linear"}


def test_dense_tensors_of_a_targeted_module_are_dense():
    choice = parse(section(W4_G32)).decide(view({"weight": torch.ones(4, 8)}))
    assert (choice.scheme.label, "dense" in choice.why) == ("dense float32", True)


def test_two_groups_that_name_a_module_equally_are_refused():
    config = parse(section() | {"config_groups": {"a": group("re:.*down_proj"), "b": group("re:.*mlp.*", num_bits=8), "c": group("re:.*mlp.d.*", num_bits=4)}})
    config.rule_for(view({}))
    config = parse(section() | {"config_groups": {"b": group("re:.*mlp.*", num_bits=8), "a": group("re:.*down_proj")}})
    with pytest.raises(ConflictingConfigError, match=NAME):
        config.rule_for(view({}))


PRESETS = {
    "W4A16": "W4A16 int4 g128", "W4A16_ASYM": "W4A16 int4 g128 asym", "W8A16": "W8A16 int8 g128", "W4A8": "W4A8 int4 g128, activation int8 token dynamic",
    "W4AFP8": "W4A8 int4 g128, activation fp8_e4m3fn token dynamic", "W8A8": "W8A8 int8 channel, activation int8 token dynamic",
    "INT8": "W8A8 int8 channel, activation int8 token dynamic", "FP8": "W8A8 fp8_e4m3fn tensor, activation fp8_e4m3fn tensor static",
    "FP8_DYNAMIC": "W8A8 fp8_e4m3fn channel, activation fp8_e4m3fn token dynamic", "fp8_block": "W8A8 fp8_e4m3fn block 128x128, activation fp8_e4m3fn g128 dynamic",
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_preset_name_gives_its_scheme(name):
    config = parse(section(storage="naive-quantized") | {"config_groups": {name: ["Linear"]}})
    tensors = {"weight": torch.zeros(256, 256, dtype=torch.int8)}
    assert config.quantized_scheme(view(tensors)).label == PRESETS[name]


# What the library 0.17 knows; the later ones are spelled out in test_compressed_tensors_blocks.py.
LIBRARY_PRESETS = (*(n.upper() for n in PRESETS), "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16")


@pytest.mark.parametrize("name", LIBRARY_PRESETS)
def test_presets_equal_the_library(name):
    library()
    from compressed_tensors.quantization import preset_name_to_scheme

    written = preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json")
    by_name = parse(section(storage="mixed-precision") | {"config_groups": {name: ["Linear"]}}).groups[0]
    spelled = parse(section(storage="mixed-precision") | {"config_groups": {name: written}}).groups[0]
    assert by_name == spelled


# --- refusals by name ---------------------------------------------------------------------------------------------------
REFUSALS = {
    "argument": (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bit=4), ConfigError, r"num_bit\b.*\n.*num_bits"),
    "group-key": (lambda c: c["config_groups"]["group_0"].update(weight={"num_bits": 4}), ConfigError, r"group_0: unknown keys: weight\b.*\n.*weights"),
    "top-key": (lambda c: c.update(ignored=["a"]), ConfigError, r"ignored.*\n.*ignore"),
    "bits": (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=16), ConfigError, "num_bits"),
    "group-size": (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=0), ConfigError, "group_size"),
    "strategy": (lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="rows"), ConfigError, "strategy"),
    "weight-token": (lambda c: c["config_groups"]["group_0"].update(weights={"strategy": "token", "dynamic": True}), ConfigError, "weight"),
    "actorder": (lambda c: c["config_groups"]["group_0"]["weights"].update(actorder="random"), ConfigError, "actorder"),
    "outputs": (lambda c: c["config_groups"]["group_0"].update(output_activations=FP8_TENSOR), ConfigError, "output_activations"),
    "format-of-other-types": (lambda c: c.update(format="nvfp4-pack-quantized"), ConfigError, r"weights.*4-bit ints.*\n.*floats of 4 bits.*'nvfp4-pack-quantized'"),
    "tiled-three-bits": (lambda c: c["config_groups"]["group_0"].update(format="marlin-24", weights=W4_G32 | {"num_bits": 3}), ConfigError, "marlin-24"),
    "tiled-asymmetric": (lambda c: c["config_groups"]["group_0"].update(format="marlin-24", weights=W4_G32 | {"symmetric": False}), ConfigError, "marlin-24"),
    "unknown-format": (lambda c: c.update(format="zip"), UnknownFormatError, "zip"),
    "sparse-format": (lambda c: c.update(format="sparse-bitmask"), UnknownFormatError, r"sparsity_config\.format"),
    "float-bits": (lambda c: c["config_groups"]["group_0"].update(weights={"num_bits": 5, "type": "float"}), ConfigError, r"weights\.num_bits"),
    "unknown-preset": (lambda c: c.update(config_groups={"W3A3": ["Linear"]}), ConfigError, "W3A3"),
    "sparsity": (lambda c: c.update(sparsity_config={"format": "sparse-36-bitmask"}), ConfigError, r"sparsity_config\.format"),
    "sparsity-key": (lambda c: c.update(sparsity_config={"format": "dense", "mask": 1}), ConfigError, r"sparsity_config: unknown keys: mask"),
    "sparsity-structure": (
        lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask", "sparsity_structure": "unstructured"}), ConfigError, "sparsity_structure",
    ),
    "sparsity-text": (lambda c: c.update(sparsity_config="2:4"), ConfigError, "sparsity_config"),
    "pruned-experts": (lambda c: c.update(moe_sparsity_config={"method": "prune", "num_experts": [4, 3]}), ConfigError, "moe_sparsity_config"),
    "cache-fp4": (lambda c: c.update(kv_cache_scheme={"num_bits": 4, "type": "float"}), ConfigError, "kv_cache_scheme"),
    "cache": (lambda c: c.update(kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "channel"}), ConfigError, "kv_cache_scheme"),
    "status": (lambda c: c.update(quantization_status="zipped"), ConfigError, "quantization_status"),
    "no-groups": (lambda c: c.pop("config_groups"), ConfigError, "config_groups"),
    "partly-dynamic": (lambda c: c["config_groups"]["group_0"].update(input_activations={"dynamic": "local"}), ConfigError, "dynamic"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_configuration_is_refused_by_name(name):
    change, kind, pattern = REFUSALS[name]
    config = copy.deepcopy(section(dict(W4_G32)))
    parse(config)
    change(config)
    with pytest.raises(kind, match=pattern):
        parse(config)


def test_harmless_settings_are_accepted():
    offline = {"config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_output"}]}}}
    config = section(W4_G32, sparsity_config={"format": "dense"}, transform_config=offline, provider="auto-round", global_compression_ratio=1.5)
    assert parse(config).groups[0].weights.group_size == 32


@pytest.mark.parametrize("status", ["frozen", "calibration", "initialized", "decompressed"])
def test_uncompressed_status_is_refused_unless_tensors_are_dense(status):
    config = section(W4_G32, quantization_status=status)
    dense = {f"{NAME}.weight": torch.ones(4, 8)}
    parse(config, dense)
    with pytest.raises(ConfigError, match=f"{status}.*{NAME}.weight_scale"):
        parse(config, dense | {f"{NAME}.weight_scale": torch.ones(1)})


def test_frozen_status_over_compressed_weights_is_accepted():
    # what early releases wrote; the weights themselves are packed
    tensors, _ = packed_module()
    config = section(W4_G32, quantization_status="frozen", version=None)
    stored = {f"{NAME}.{local}": t for local, t in tensors.items()}
    expected = parse(section(W4_G32)).decide(view(tensors)).scheme.to_weight(tensors).dequantize()
    assert torch.equal(parse(config, stored).decide(view(tensors)).scheme.to_weight(tensors).dequantize(), expected)
    with pytest.raises(ConfigError, match="quantization_status.*input_scale"):
        parse(config, stored | {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 8), "model.layers.0.mlp.up_proj.input_scale": torch.ones(1)})


def test_dense_format_with_quantized_tensors_is_refused():
    tensors, _ = packed_module()
    with pytest.raises(LabelMismatchError, match="dense"):
        parse(section(W4_G32, "dense")).decide(view(tensors))


def test_tensor_names_without_configuration_ask_for_it():
    tensors, _ = packed_module()
    found = evidence(None, {f"{NAME}.{k}": v for k, v in tensors.items()})
    assert CompressedTensorsConfig.detect(found).score == 50
    with pytest.raises(ConfigError, match="config_groups"):
        CompressedTensorsConfig.parse(found)


def test_detection_leaves_other_methods_alone():
    assert CompressedTensorsConfig.detect(evidence({"quant_method": "modelopt", "config_groups": {}})) is None
    assert CompressedTensorsConfig.detect(evidence({"config_groups": {}})).score == 90


def test_section_nested_in_the_oldest_key_is_read():
    nested = section(W4_G32)
    del nested["quant_method"]
    found = evidence({"quantization_config": nested, "sparsity_config": {"format": "dense"}})
    assert CompressedTensorsConfig.detect(found).score == 90
    assert CompressedTensorsConfig.parse(found).groups[0].weights.group_size == 32
    assert CompressedTensorsConfig.detect(evidence({"quant_method": "compressed_tensors"})).score == 100


# --- KV cache -----------------------------------------------------------------------------------------------------------
def attention(*locals_, name="model.layers.0.self_attn"):
    return ModuleView(name, ModuleKind.ATTENTION, {f"{name}.{x}": header(x, torch.ones(1)) for x in locals_})


def test_cache_scheme_names_its_scales():
    cache = parse(section(W4_G32, kv_cache_scheme=FP8_TENSOR)).get_kv_cache_scheme(attention("k_scale", "v_scale"))
    assert (cache.element, cache.granularity, cache.symmetric) == ("fp8_e4m3fn", "tensor", True)
    assert cache.scales == (("model.layers.0.self_attn.k_scale", "k"), ("model.layers.0.self_attn.v_scale", "v"))


@pytest.mark.parametrize("locals_", [("kv_scale",), ("k_proj.output_scale", "v_proj.output_scale")], ids=str)
def test_older_spellings_of_cache_scales_are_read(locals_):
    cache = parse(section(W4_G32, kv_cache_scheme=FP8_TENSOR)).get_kv_cache_scheme(attention(*locals_))
    assert len(cache.scales) == len(locals_)


@pytest.mark.parametrize("locals_", [(), ("k_scale",)], ids=str)
def test_missing_static_cache_scale_is_refused(locals_):
    with pytest.raises(MissingTensorError, match="v_scale"):
        parse(section(W4_G32, kv_cache_scheme=FP8_TENSOR)).get_kv_cache_scheme(attention(*locals_))


def test_ignored_attention_without_scales_keeps_its_cache():
    config = parse(section(W4_G32, kv_cache_scheme=FP8_TENSOR, ignore=["model.layers.0.self_attn"]))
    assert config.get_kv_cache_scheme(attention()).element == "none"
    assert config.get_kv_cache_scheme(attention("k_scale", "v_scale")).element == "fp8_e4m3fn"


def test_output_activations_of_key_and_value_projections_are_the_cache():
    groups = {"group_0": group("Linear"), "kv": {"targets": ["re:.*k_proj", "re:.*v_proj"], "output_activations": FP8_TENSOR}}
    config = parse(section() | {"config_groups": groups})
    assert config.get_kv_cache_scheme(attention("k_proj.output_scale", "v_proj.output_scale")).element == "fp8_e4m3fn"
    tensors, _ = packed_module()
    assert config.decide(view(tensors, "model.layers.0.self_attn.k_proj")).scheme.bits == 4


@pytest.mark.parametrize(("args", "element", "granularity"), [
    ({"num_bits": 8, "type": "int", "strategy": "tensor"}, "int8", "tensor"), ({"num_bits": 8, "type": "float", "strategy": "attn_head"}, "fp8_e4m3fn", "head"),
])  # fmt: skip
def test_cache_element_and_granularity_are_read(args, element, granularity):
    cache = parse(section(W4_G32, kv_cache_scheme=args)).get_kv_cache_scheme(attention("k_scale", "v_scale"))
    assert (cache.element, cache.granularity) == (element, granularity)
