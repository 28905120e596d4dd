"""compressed-tensors, block-scaled floats: NVFP4, MXFP4, MXFP6 and MXFP8 against the library and naive decoders; inputs; refusals."""

import warnings

import pytest
import torch

from bitgrain.errors import BadValueError, ConfigError, LabelMismatchError
from bitgrain.formats.base import ModuleKind
from bitgrain.formats.compressed_tensors import CompressedTensorsConfig
from bitgrain.weights import ActivationSpec
from tests.unit.formats.golden_cases import problems_of
from tests.unit.formats.synthetic import evidence, ramp, view

NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
MXFP4, MXFP6, MXFP8 = ({"num_bits": bits, **MX} for bits in (4, 6, 8))
FORMATS = {"nvfp4-pack-quantized": NVFP4, "mxfp4-pack-quantized": MXFP4, "mxfp6-pack-quantized": MXFP6, "mxfp8-quantized": MXFP8}
SHAPES = [(24, 128), (5, 96), (1, 32)]


def section(weights, storage, inputs=None, **more):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None, "format": storage}
    return {"quant_method": "compressed-tensors", "format": storage, "quantization_status": "compressed", "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "version": "0.20.0", **more}  # fmt: skip


def parse(config):
    return CompressedTensorsConfig.parse(evidence(config))


def scheme_of(config, tensors, **place):
    module = view(tensors, **place)
    scheme = parse(config).decide(module).scheme
    assert problems_of(scheme, module) == []
    return scheme


@pytest.fixture
def library(monkeypatch):
    """Skip unless the producer's library can be imported; its rounding runs as it is written, not compiled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations while the library is imported
            from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA
    except ImportError as error:
        pytest.skip(f"compressed-tensors cannot be imported: {error}")
    compiled = FP4_E2M1_DATA.cast_to_fp4
    monkeypatch.setattr(FP4_E2M1_DATA, "cast_to_fp4", staticmethod(getattr(compiled, "_torchdynamo_orig_callable", compiled)))


# --- weights ------------------------------------------------------------------------------------------------------------
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def naive_element(code: int, bits: int) -> float:
    """Sign, exponent of two bits and mantissa; E4M3 with four."""
    exponent_bits, mantissa_bits, bias = {4: (2, 1, 1), 6: (2, 3, 1), 8: (4, 3, 7)}[bits]
    mantissa, exponent = code % (1 << mantissa_bits), (code >> mantissa_bits) % (1 << exponent_bits)
    value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias) if exponent else mantissa / (1 << mantissa_bits) * 2.0 ** (1 - bias)
    return -value if code >> (bits - 1) else value


def stored_module(storage, n, k):
    """(tensors, weights by a naive decoder) of random codes of every kind."""
    args = FORMATS[storage]
    bits, block = args["num_bits"], args["group_size"]
    generator = torch.Generator().manual_seed(n * k + bits)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator)
    if bits == 8:
        codes[(codes & 0x7F) == 0x7F] = 0x7E  # no NaN
    codes[0, : min(k, 1 << bits)] = torch.arange(min(k, 1 << bits)) if bits < 8 else codes[0, : min(k, 1 << bits)]
    powers = torch.randint(110, 124, (n, -(-k // block)), generator=generator)
    powers[0, 0] = 0  # 2^-127, a subnormal number
    if storage == "nvfp4-pack-quantized":
        scale = (torch.rand(n, k // block, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
        divisor = torch.tensor([5321.75])
        per_block, more = scale.float() / divisor, {"weight_global_scale": divisor}
    else:
        scale, more = powers.to(torch.uint8), {}
        per_block = torch.tensor([[2.0 ** (p - 127) for p in row] for row in powers.tolist()])
    want = torch.tensor([[naive_element(c, bits) for c in row] for row in codes.tolist()]) * torch.repeat_interleave(per_block, block, dim=1)
    if bits == 8:
        return {"weight": codes.to(torch.uint8).view(torch.float8_e4m3fn), "weight_scale": scale, **more}, want
    rows = []
    for row in codes.tolist():
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        rows.append(list(stream.to_bytes(k * bits // 8, "little")))
    return {"weight_packed": torch.tensor(rows, dtype=torch.uint8), "weight_scale": scale, **more}, want


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("storage", FORMATS)
def test_random_codes_decode_like_the_naive_decoder(storage, shape):
    tensors, want = stored_module(storage, *shape)
    scheme = scheme_of(section(FORMATS[storage], storage), tensors)
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec and weight.shape == shape
    torch.testing.assert_close(weight.dequantize(), want, rtol=2e-7 if storage.startswith("nv") else 0, atol=0)
    assert scheme_of(section(FORMATS[storage], storage), tensors, shape=shape) == scheme


@pytest.mark.parametrize("shape", [(24, 128), (6, 96)], ids=str)
@pytest.mark.parametrize("storage", ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"])
def test_library_weight_decodes_like_the_library(library, storage, shape):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**FORMATS[storage])
    weight = ramp(*shape)
    weight[1, :40] = 0  # an empty block, and a part of one
    groups = weight.reshape(shape[0], -1, args.group_size)
    divisor = generate_gparam(weight.min(), weight.max()) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=divisor)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero} | ({} if divisor is None else {"weight_global_scale": divisor})
    tensors = BaseCompressor.get_value_from_registry(storage).compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    codes = quantize(x=weight, scale=scale, zero_point=zero, args=args, global_scale=divisor)
    want = dequantize(x_q=codes, scale=scale, zero_point=zero, args=args, global_scale=divisor)
    scheme = scheme_of(section(FORMATS[storage], storage), tensors)
    torch.testing.assert_close(scheme.to_weight(tensors).dequantize(), want, rtol=0 if divisor is None else 2e-7, atol=0)


def test_scales_of_five_exponent_bits_stand_alone():
    # what AutoRound calls NVFP4 with E5M3 scales: value 2^(e - 15) (1 + m / 8), no second scale for weights or inputs
    args = {key: value for key, value in NVFP4.items() if key != "scale_dtype"}
    tensors = {"weight_packed": torch.full((3, 16), 0x7A, dtype=torch.uint8), "weight_scale": torch.tensor([[120, 113]] * 3, dtype=torch.uint8)}
    scheme = scheme_of(section(args, "nvfp4-e5m3-pack-quantized", args | {"dynamic": "local"}), tensors)
    want = torch.tensor([[-1.0, 6.0] * 8 + [-0.5625, 3.375] * 8] * 3)
    assert torch.equal(scheme.to_weight(tensors).dequantize(), want)
    assert scheme.activation == ActivationSpec("fp4_e2m1", "group", 16, scale_type="e5m3")


def test_power_scales_may_have_their_own_element_type():
    tensors, want = stored_module("mxfp4-pack-quantized", 5, 96)
    tensors["weight_scale"] = tensors["weight_scale"].view(torch.float8_e8m0fnu)
    scheme = scheme_of(section(MXFP4 | {"scale_dtype": "torch.float8_e8m0fnu"}, "mxfp4-pack-quantized"), tensors)
    assert torch.equal(scheme.to_weight(tensors).dequantize(), want)


@pytest.mark.parametrize("storage", ["nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"])
def test_scale_type_left_out_follows_from_the_format(storage):
    full = FORMATS[storage]
    short = {key: value for key, value in full.items() if key != "scale_dtype"}
    assert parse(section(short, storage)).groups == parse(section(full, storage)).groups


@pytest.mark.parametrize(("args", "kind"), [(NVFP4, "e4m3"), (MXFP4, "e8m0"), (NVFP4 | {"strategy": "group"}, "e4m3")], ids=["nvfp4", "mxfp4", "group-of-16"])
def test_scale_type_left_out_without_a_format_follows_from_the_group(args, kind):
    short = {key: value for key, value in args.items() if key != "scale_dtype"}
    assert parse(section(short, None)).groups[0].weights.scale_type == kind


@pytest.mark.parametrize(("storage", "names"), [
    ("nvfp4-pack-quantized", ["weight_packed", "weight_scale", "weight_global_scale"]),
    ("mxfp4-pack-quantized", ["weight_packed", "weight_scale"]),
    ("mxfp6-pack-quantized", ["weight_packed", "weight_scale"]),
    ("mxfp8-quantized", ["weight", "weight_scale"]),
])  # fmt: skip
@pytest.mark.parametrize("shape", [None, (24, 128)], ids=["unknown-architecture", "known-architecture"])
def test_damaged_headers_are_found(storage, names, shape):
    whole, _ = stored_module(storage, 24, 128)
    config = parse(section(FORMATS[storage], storage))
    for name in names:
        less = {key: value for key, value in whole.items() if key != name}
        module = view(less, shape=shape)
        assert f"missing {name}" in problems_of(config.decide(module).scheme, module)
        if whole[name].dim() == 2:
            module = view(whole | {name: whole[name][:-1]}, shape=shape)
            assert [p for p in problems_of(config.decide(module).scheme, module) if p.startswith("shape")]
        other = whole[name].to(torch.int64) if whole[name].dtype != torch.float32 else whole[name].to(torch.int32)
        module = view(whole | {name: other}, shape=shape)
        assert f"dtype {name}" in problems_of(config.decide(module).scheme, module)
    module = view(whole | {"weight_zero": torch.zeros(1)}, shape=shape)
    assert problems_of(config.decide(module).scheme, module) == ["undeclared weight_zero"]


def damaged(storage, name, change):
    tensors, _ = stored_module(storage, 24, 128)
    value = tensors[name].clone()
    change(value)
    return section(FORMATS[storage], storage), tensors | {name: value}


@pytest.mark.parametrize(("storage", "name", "change"), [
    ("nvfp4-pack-quantized", "weight_scale", lambda t: t.view(torch.uint8)[3, 1].fill_(0x7F)),
    ("nvfp4-pack-quantized", "weight_scale", lambda t: t.view(torch.uint8).zero_()),
    ("nvfp4-pack-quantized", "weight_scale", lambda t: t.view(torch.uint8)[3, 1].fill_(0xB8)),
    ("nvfp4-pack-quantized", "weight_global_scale", lambda t: t.fill_(0.0)),
    ("nvfp4-pack-quantized", "weight_global_scale", lambda t: t.fill_(float("nan"))),
    ("nvfp4-pack-quantized", "weight_global_scale", lambda t: t.neg_()),
    ("mxfp4-pack-quantized", "weight_scale", lambda t: t[3, 1].fill_(255)),
    ("mxfp8-quantized", "weight_scale", lambda t: t[0, 0].fill_(255)),
    ("mxfp8-quantized", "weight", lambda t: t.view(torch.uint8)[2, 2].fill_(0x7F)),
], ids=["nan-scale", "zero-scales", "negative-scale", "zero-second", "nan-second", "negative-second", "nan-power", "nan-power-8", "nan-code"])  # fmt: skip
def test_impossible_values_are_refused_by_name(storage, name, change):
    config, tensors = damaged(storage, name, change)
    with pytest.raises(BadValueError) as error:
        scheme_of(config, tensors).to_weight(tensors)
    assert error.value.where == name


def test_second_scale_that_is_a_multiplier_is_refused():
    config, tensors = damaged("nvfp4-pack-quantized", "weight_global_scale", torch.Tensor.reciprocal_)
    with pytest.raises(LabelMismatchError, match="weight_global_scale.*looks like a multiplier"):
        scheme_of(config, tensors).to_weight(tensors)


# --- inputs -------------------------------------------------------------------------------------------------------------
INPUTS = {
    "nvfp4": ("nvfp4-pack-quantized", NVFP4 | {"dynamic": "local"}, {"input_global_scale": torch.tensor([811.5])}),
    "nvfp4-wholly-dynamic": ("nvfp4-pack-quantized", NVFP4 | {"dynamic": True}, {}),
    "mxfp4": ("mxfp4-pack-quantized", MXFP4 | {"dynamic": True}, {}),
    "mxfp8": ("mxfp8-quantized", MXFP8 | {"dynamic": True}, {}),
    "mxfp4-weight-mxfp8-input": ("mxfp4-pack-quantized", MXFP8 | {"dynamic": True}, {}),
    "mxfp4-weight-fp8-group-input": ("mxfp4-pack-quantized", {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 64, "dynamic": True}, {}),
    "mxfp4-weight-fp8-static-input": ("mxfp4-pack-quantized", {"num_bits": 8, "type": "float"}, {"input_scale": torch.tensor([0.25])}),
    "nvfp4-weight-int8-token-input": ("nvfp4-pack-quantized", {"num_bits": 8, "strategy": "token", "dynamic": True}, {}),
}


@pytest.mark.parametrize("name", INPUTS)
def test_input_equals_library_fake_quantization(library, name):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    storage, args, stored = INPUTS[name]
    tensors = stored_module(storage, 8, 128)[0] | stored
    scheme = scheme_of(section(FORMATS[storage], storage, args), tensors)
    mine = scheme.to_activation(tensors)
    x = spread_input()
    full, divisor = QuantizationArgs(**args), stored.get("input_global_scale")
    scale, zero = stored.get("input_scale"), None
    if full.dynamic:
        scale, zero = compute_dynamic_scales_and_zp(x[None], full, torch.nn.Identity(), global_scale=divisor)
    want = fake_quantize(x[None], scale, zero, full, global_scale=divisor)[0]
    assert torch.equal(mine.fake_quantize(x), want)


def spread_input():
    """[300, 128]: magnitudes of 24 powers of two, blocks that are empty or nearly so, and peaks near every rounding border."""
    x = ramp(300, 128) * 10 * torch.exp2(torch.arange(300) % 24 - 12.0)[:, None]
    x[0] = 0
    x[1, 16:] = 0
    x[2] *= 1e-6
    borders = torch.arange(1.0, 2.0, 1 / 64)
    for i, border in enumerate(borders.tolist()):
        x[10 + i] = x[10 + i] / x[10 + i].abs().max() * border * 0.99
        x[10 + i, ::16] = border * 2.0 ** (i % 5)
    return x


def test_six_bit_inputs_round_their_peak_with_three_mantissa_bits():
    # the library's rule since 0.20: the exponent goes up from 1.9375 on, so that 7.5 stays below the border
    tensors, _ = stored_module("mxfp6-pack-quantized", 8, 32)
    spec = scheme_of(section(MXFP6, "mxfp6-pack-quantized", MXFP6 | {"dynamic": True}), tensors).activation
    assert spec == ActivationSpec("fp6_e2m3", "group", 32, scale_type="e8m0", exponent_rule="round")
    x = torch.zeros(2, 32)
    x[0, 0], x[1, 0] = 1.93, 1.94
    assert spec.quantize(x)[1].flatten().tolist() == [0.25, 0.5]


def test_missing_second_input_scale_is_declared_missing():
    tensors, _ = stored_module("nvfp4-pack-quantized", 24, 128)
    module = view(tensors)
    scheme = parse(section(NVFP4, "nvfp4-pack-quantized", NVFP4 | {"dynamic": "local"})).decide(module).scheme
    assert problems_of(scheme, module) == ["missing input_global_scale"]


@pytest.mark.parametrize("value", [0.0, -3.0, float("inf"), float("nan")])
def test_impossible_second_input_scale_is_refused(value):
    tensors = stored_module("nvfp4-pack-quantized", 24, 128)[0] | {"input_global_scale": torch.tensor([value])}
    scheme = scheme_of(section(NVFP4, "nvfp4-pack-quantized", NVFP4 | {"dynamic": "local"}), tensors)
    with pytest.raises(BadValueError, match="input_global_scale"):
        scheme.to_activation(tensors)


def test_second_input_scale_of_a_weight_only_scheme_is_undeclared():
    tensors = stored_module("nvfp4-pack-quantized", 24, 128)[0] | {"input_global_scale": torch.tensor([3.0])}
    module = view(tensors)
    assert problems_of(parse(section(NVFP4, "nvfp4-pack-quantized")).decide(module).scheme, module) == ["undeclared input_global_scale"]


def test_embedding_keeps_its_input():
    tensors, _ = stored_module("mxfp8-quantized", 24, 128)
    config = section(MXFP8, "mxfp8-quantized", MXFP8 | {"dynamic": True})
    config["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    assert scheme_of(config, tensors, name="model.embed_tokens", kind=ModuleKind.EMBEDDING).activation.is_none
    assert not scheme_of(config, tensors).activation.is_none


# --- configuration ------------------------------------------------------------------------------------------------------
PRESETS = {
    "NVFP4": "W4A4 fp4_e2m1 g16 e4m3 x tensor, activation fp4_e2m1 g16 dynamic e4m3 x static tensor",
    "nvfp4a16": "W4A16 fp4_e2m1 g16 e4m3 x tensor",
    "MXFP4": "W4A4 fp4_e2m1 g32 e8m0, activation fp4_e2m1 g32 dynamic e8m0",
    "MXFP4A16": "W4A16 fp4_e2m1 g32 e8m0",
    "MXFP4xFP8": "W4A8 fp4_e2m1 g32 e8m0, activation fp8_e4m3fn g128 dynamic",
    "MXFP6A16": "W6A16 fp6_e2m3 g32 e8m0",
    "MXFP6A8": "W6A8 fp6_e2m3 g32 e8m0, activation fp8_e4m3fn g32 dynamic e8m0",
    "MXFP8": "W8A8 fp8_e4m3fn g32 e8m0, activation fp8_e4m3fn g32 dynamic e8m0",
    "MXFP8A16": "W8A16 fp8_e4m3fn g32 e8m0",
    "W2A4": "W2A4 int2 g128, activation int4 token dynamic",
    "W3A8": "W3A8 int3 g128, activation int8 token dynamic",
    "W7A16": "W7A16 int7 g128",
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_name_gives_its_scheme(name):
    config = parse(section(None, None) | {"config_groups": {name: ["Linear"]}})
    weight = torch.zeros(256, 256, dtype=torch.int8)
    assert config.quantized_scheme(view({"weight": weight}, shape=(256, 256))).label == PRESETS[name]


def test_groups_of_a_mixed_checkpoint_have_their_own_formats():
    config = section(MXFP8, "mxfp8-quantized", MXFP8 | {"dynamic": True}, format="mixed-precision")
    config["config_groups"]["group_0"]["targets"] = ["re:.*down_proj$"]
    config["config_groups"]["group_1"] = {"targets": ["Linear"], "weights": NVFP4, "format": "nvfp4-pack-quantized"}
    eight, want_eight = stored_module("mxfp8-quantized", 5, 96)
    four, want_four = stored_module("nvfp4-pack-quantized", 5, 96)
    down, up = scheme_of(config, eight), scheme_of(config, four, name="model.layers.0.mlp.up_proj")
    assert (down.label, up.label) == (PRESETS["MXFP8"], PRESETS["nvfp4a16"])
    assert torch.equal(down.to_weight(eight).dequantize(), want_eight)
    torch.testing.assert_close(up.to_weight(four).dequantize(), want_four, rtol=2e-7, atol=0)


REFUSALS = {
    "format-of-powers": (NVFP4, "mxfp4-pack-quantized", None, r"weights.*\n.*floats of 4 bits.*e8m0"),
    "format-of-fractions": (MXFP4, "nvfp4-pack-quantized", None, r"weights.*\n.*e4m3"),
    "bits-of-another-format": (MXFP6, "mxfp8-quantized", None, r"weights.*6-bit floats.*\n.*floats of 8 bits"),
    "plain-format": (MXFP8, "float-quantized", None, r"weights.*\n.*float-quantized"),
    "packed-integers": (NVFP4, "pack-quantized", None, r"weights.*\n.*pack-quantized"),
    "four-bits-per-channel": ({"num_bits": 4, "type": "float", "strategy": "channel"}, None, None, r"weights\.num_bits"),
    "float-scales": (MXFP4 | {"scale_dtype": "torch.bfloat16"}, None, None, r"weights\.num_bits"),
    "powers-per-channel": ({"num_bits": 8, "type": "float", "strategy": "channel", "scale_dtype": "torch.uint8"}, None, None, r"weights\.scale_dtype"),
    "powers-below-a-second-scale": (NVFP4 | {"scale_dtype": "torch.uint8"}, None, None, r"weights\.scale_dtype"),
    "fractions-of-eight-bits": (MXFP8 | {"scale_dtype": "torch.float8_e4m3fn"}, None, None, r"weights\.scale_dtype"),
    "unknown-scale-type": (MXFP8 | {"scale_dtype": "torch.int3"}, None, None, r"weights\.scale_dtype"),
    "integers-below-a-second-scale": (NVFP4 | {"type": "int"}, None, None, r"weights\.strategy"),
    "local-without-second-scale": (MXFP4, "mxfp4-pack-quantized", MXFP4 | {"dynamic": "local"}, r"input_activations\.dynamic"),
    "static-blocks": (NVFP4, "nvfp4-pack-quantized", NVFP4, r"input_activations.*static values"),
    "input-of-unstated-scales": (MXFP4, "mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 32, "dynamic": True}, r"input_activations\.scale_dtype"),
    "input-powers-of-other-groups": (MXFP4, "mxfp4-pack-quantized", MXFP4 | {"dynamic": True, "group_size": 16}, r"input_activations\.scale_dtype"),
    "input-scales-rounded-to-sixteen-bits": (MXFP4, "mxfp4-pack-quantized", MXFP4 | {"dynamic": True, "scale_dtype": "bfloat16"}, r"input_activations\.scale_dtype"),
    "second-input-scale-beside-float-weights": ({"num_bits": 8, "type": "float"}, "float-quantized", NVFP4 | {"dynamic": "local"}, "input_global_scale"),
    "word": (NVFP4, "nvfp4-pack-quantized", NVFP4 | {"dynamic": "partly"}, r"input_activations\.dynamic"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_configuration_is_refused_by_name(name):
    weights, storage, inputs, pattern = REFUSALS[name]
    with pytest.raises(ConfigError, match=pattern):
        parse(section(weights, storage, inputs))
