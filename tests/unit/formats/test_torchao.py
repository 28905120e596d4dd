"""torchao: metadata records, every plain tensor subclass against a naive decoder, activations, rules, refusals by name."""

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitgrain.errors import (
    BadValueError,
    BitgrainError,
    ConfigError,
    ConflictingConfigError,
    LabelMismatchError,
    ManyProblemsError,
    RuleMismatchError,
    ShapeMismatchError,
    UnknownFormatError,
)
from bitgrain.formats.base import ModuleKind
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.torchao import TorchAOConfig
from bitgrain.formats.torchao.schemes import unswizzled
from bitgrain.numerics.block_scales import decode_block_scale
from bitgrain.numerics.small_floats import SMALL_FLOATS, decode
from bitgrain.weights import NO_ACTIVATION, ActivationSpec
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.golden_cases import problems_of
from tests.unit.formats.synthetic import NAME, evidence, header, ramp, view

SHAPE = (48, 96)
Q, S, Z = "_weight_qdata", "_weight_scale", "_weight_zero_point"
BF16 = {"_type": "torch.dtype", "_data": "bfloat16"}
PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}}
PER_TENSOR = {"_type": "PerTensor", "_data": {}}


def dtype(name: str) -> dict:
    return {"_type": "torch.dtype", "_data": name}


def entry(kind: str, tensors, parameter: str = "weight", **data) -> str:
    """Metadata of a parameter whose components are `tensors` (by local name)."""
    names = [name.removeprefix(f"_{parameter}_") for name in tensors if name.startswith(f"_{parameter}_")]
    return json.dumps({"_type": kind, "_data": data, "_tensor_data_names": names})


def metadata(entries: Mapping[str, str]) -> dict[str, str]:
    return {**entries, "tensor_names": json.dumps(list(entries))}


def section(setting=None, **more) -> dict:
    """A quantization_config; without a setting every linear module is wanted."""
    return {"quant_method": "torchao", "quant_type": {"default": setting or {"_type": "SomeConfig", "_version": 2, "_data": {}}}, **more}


def parse(entries: Mapping[str, str], config: dict | None = None, tensors=None) -> TorchAOConfig:
    found = replace(evidence(section() if config is None else config, tensors), metadata={"model.safetensors": metadata(entries)})
    return TorchAOConfig.parse(found)


def scheme_of(tensors: dict[str, Tensor], text: str, config=None, kind=ModuleKind.LINEAR, shape=None):
    module = view(tensors, kind=kind, shape=shape)
    scheme = parse({f"{NAME}.weight": text}, config).decide(module).scheme
    assert problems_of(scheme, module) == []
    return scheme


def decode_module(tensors: dict[str, Tensor], text: str, config=None, shape=None) -> Tensor:
    scheme = scheme_of(tensors, text, config, shape=shape)
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec
    assert weight.shape == scheme.shape
    return weight.dequantize()


def spread(values: Tensor, rows: int, columns: int) -> Tensor:
    """float32 [N, K] of one value per cell."""
    return values.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def int8_module(block=(1, 96), shape=SHAPE, **extra):
    n, k = shape
    grid = (n // block[0], k // block[1])
    tensors = {Q: torch.randint(-128, 128, shape, dtype=torch.int8), S: ramp(*grid).abs() + 0.01, Z: torch.zeros(grid, dtype=torch.int8)}
    return tensors, entry("Int8Tensor", tensors, block_size=list(block), dtype=BF16, **{"act_quant_kwargs": None, "reduce_range": False, **extra})


def intx_module(bits, block=(1, 32), shape=SHAPE, zero=torch.int8, scale=torch.bfloat16, activation=None):
    n, k = shape
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    grid = (n // block[0], k // block[1])
    zeros = torch.randint(low, high, grid).to(zero) + (0.25 if zero.is_floating_point else 0)
    tensors = {Q: torch.randint(low, high, shape, dtype=torch.int8), S: (ramp(*grid).abs() + 0.01).to(scale), Z: zeros}
    return tensors, entry("IntxUnpackedToInt8Tensor", tensors, target_dtype=dtype(f"int{bits}"), block_size=list(block), dtype=BF16, activation_quantization=activation)


def float8_module(block=(1, 96), shape=SHAPE, kind=torch.float8_e4m3fn, **extra):
    n, k = shape
    rows, columns = block or shape
    tensors = {Q: (ramp(n, k) * 200).to(kind), S: ramp(n // rows, k // columns).abs() + 0.01}
    return tensors, entry("Float8Tensor", tensors, block_size=list(block), dtype=BF16, mm_config=None, **{"act_quant_kwargs": None, **extra})


@pytest.mark.parametrize("folder", golden_folders("torchao"), ids=lambda f: f.name)
def test_golden_module_equals_the_producer(folder):
    assert check_golden(folder) >= 1


def test_golden_cases_are_there():
    assert len(golden_folders("torchao")) >= 5


# --- classes against naive decoders ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [(1, 96), (48, 96), (1, 32), (1, 1), (8, 96)], ids=["row", "tensor", "group", "element", "rows"])
def test_int8_is_code_times_scale(block):
    tensors, text = int8_module(block)
    assert torch.equal(decode_module(tensors, text), tensors[Q].float() * spread(tensors[S], *block))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", [torch.int8, torch.float32, torch.bfloat16])
def test_intx_subtracts_its_zero_point(bits, zero):
    tensors, text = intx_module(bits, zero=zero)
    want = (tensors[Q].float() - spread(tensors[Z], 1, 32)) * spread(tensors[S], 1, 32)
    assert torch.equal(decode_module(tensors, text), want)


def test_intx_of_odd_sizes_per_channel():
    tensors, text = intx_module(3, (1, 37), (5, 37), scale=torch.float16)
    assert torch.equal(decode_module(tensors, text), (tensors[Q].float() - tensors[Z].float()) * tensors[S].float())


def test_one_row_is_one_channel():
    tensors, text = int8_module((1, 96), (1, 96))
    assert torch.equal(decode_module(tensors, text), tensors[Q].float() * tensors[S])


@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("stored", [torch.int8, torch.uint8])
def test_int4_adds_its_zero_point_after_the_scale(group, stored):
    n, k = SHAPE
    codes = torch.randint(-8, 8, SHAPE)
    packed = ((codes[:, ::2] & 15) | (codes[:, 1::2] & 15) << 4).to(torch.uint8).view(stored)
    tensors = {Q: packed, S: (ramp(k // group, n).abs() + 0.01).bfloat16(), Z: ramp(k // group, n).bfloat16()}
    text = entry("Int4Tensor", tensors, block_size=[1, group], shape=list(SHAPE), activation_dtype=BF16)
    want = codes.float() * spread(tensors[S].t(), 1, group) + spread(tensors[Z].t(), 1, group)
    torch.testing.assert_close(decode_module(tensors, text), want, rtol=2e-6, atol=2e-7)


def test_int4_group_of_scale_zero_is_its_zero_point():
    tensors = {Q: torch.full((2, 16), 0x21, dtype=torch.uint8), S: torch.tensor([[0.0, 0.5]]), Z: torch.tensor([[-0.3, 0.1]])}
    got = decode_module(tensors, entry("Int4Tensor", tensors, block_size=[1, 32], shape=[2, 32]))
    torch.testing.assert_close(got[0], torch.full((32,), -0.3))
    torch.testing.assert_close(got[1], torch.tensor([0.6, 1.1]).repeat(16))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("block", [(1, 96), (48, 96), (1, 24), (16, 32), ()], ids=["row", "tensor", "group", "block", "empty"])
def test_float8_is_code_times_scale(kind, block):
    tensors, text = float8_module(block, kind=kind)
    assert torch.equal(decode_module(tensors, text), tensors[Q].float() * spread(tensors[S], *(block or SHAPE)))


def swizzle(scale: Tensor) -> Tensor:
    """The tiled order of block scales, byte by byte as cuBLAS documents it."""
    rows, columns = scale.shape
    high, wide = -(-rows // 128), -(-columns // 4)
    out = torch.zeros(high * wide * 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * wide + c // 4
            out[512 * tile + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = scale[r, c]
    return out.view(32 * high, 16 * wide)


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 5), (40, 9), (256, 8)])
def test_swizzled_scales_come_back(shape):
    scale = torch.randint(0, 256, shape, dtype=torch.uint8)
    assert torch.equal(unswizzled(swizzle(scale), *shape), scale)


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize(("element", "named"), [("fp4_e2m1", dtype("float4_e2m1fn_x2")), ("fp6_e2m3", "fp6_e2m3"), ("fp6_e3m2", "fp6_e3m2"), ("fp8_e4m3fn", dtype("float8_e4m3fn")), ("fp8_e5m2", dtype("float8_e5m2"))])
def test_mx_is_element_times_power_of_two(element, named, swizzled):
    n, k = SHAPE
    bits = SMALL_FLOATS[element].bits
    codes = torch.randint(0, 1 << bits, SHAPE, dtype=torch.uint8)
    if bits == 8:
        codes &= 0xBF  # no NaN, no infinity
    powers = torch.randint(100, 130, (n, k // 32), dtype=torch.uint8)
    stored = {4: codes[:, ::2] | codes[:, 1::2] << 4, 6: codes}.get(bits, codes.view(torch.float8_e4m3fn if "e4m3" in element else torch.float8_e5m2))
    tensors = {Q: stored, S: (swizzle(powers) if swizzled else powers).view(torch.float8_e8m0fnu)}
    text = entry("MXTensor", tensors, elem_dtype=named, block_size=32, orig_dtype=BF16, kernel_preference=None, act_quant_kwargs=None, is_swizzled_scales=swizzled)
    want = decode(codes, SMALL_FLOATS[element]) * spread(torch.exp2(powers.double() - 127), 1, 32)
    assert torch.equal(decode_module(tensors, text), want)


@pytest.mark.parametrize("second", [None, torch.tensor(0.003), torch.tensor([[0.003]])], ids=["none", "scalar", "matrix"])
@pytest.mark.parametrize("swizzled", [False, True])
def test_nvfp4_is_element_times_two_scales(second, swizzled):
    n, k = 140, 80
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scales = torch.randint(1, 0x60, (n, k // 16), dtype=torch.uint8)
    tensors = {Q: codes[:, ::2] | codes[:, 1::2] << 4, S: (swizzle(scales) if swizzled else scales).view(torch.float8_e4m3fn)}
    if second is not None:
        tensors["_weight_per_tensor_scale"] = second
    text = entry("NVFP4Tensor", tensors, block_size=16, orig_dtype=BF16, is_swizzled_scales=swizzled, use_triton_kernel=False, act_quant_kwargs=None)
    want = decode(codes, SMALL_FLOATS["fp4_e2m1"]) * spread(decode_block_scale(scales, "e4m3") * (1.0 if second is None else 0.003), 1, 16)
    torch.testing.assert_close(decode_module(tensors, text), want, rtol=1e-6, atol=0)


def test_scale_of_the_input_belongs_to_the_effective_weight():
    tensors, _ = int8_module()
    tensors["_weight_act_pre_scale"] = torch.rand(96) + 0.5
    text = entry("Int8Tensor", tensors, block_size=[1, 96], dtype=BF16, act_quant_kwargs=None)
    scheme = scheme_of(tensors, text)
    weight = scheme.to_weight(tensors)
    want = tensors[Q].float() * tensors[S]
    assert scheme.transforms_input
    assert torch.equal(weight.dequantize(), want)
    torch.testing.assert_close(weight.effective(), want * tensors["_weight_act_pre_scale"], rtol=1e-5, atol=1e-6)


# --- experts --------------------------------------------------------------------------------------------------------------
PARENT = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("block", [[1, 1, 64], [1, 1, 32], [4, 256, 64]], ids=["row", "group", "tensor"])
def test_stacked_experts_are_divided(block):
    count, size, hidden = 4, 128, 64
    codes = torch.randint(-128, 128, (count, 2 * size, hidden), dtype=torch.int8)
    grid = (count // block[0], 2 * size // block[1], hidden // block[2])
    stored = {"qdata": codes, "scale": ramp(*grid).abs() + 0.01, "zero_point": torch.zeros(grid, dtype=torch.int8)}
    text = entry("Int8Tensor", {f"_gate_up_proj_{k}": v for k, v in stored.items()}, "gate_up_proj", block_size=block, dtype=BF16)
    got = decoded_experts(stored, "gate_up_proj", text, ExpertStack(count, hidden, size), (size, hidden))
    full = codes.float() * stored["scale"].repeat_interleave(block[2], 2)
    for expert in range(count):
        assert torch.equal(got[f"{PARENT}.{expert}.gate_proj"], full[expert, :size])
        assert torch.equal(got[f"{PARENT}.{expert}.up_proj"], full[expert, size:])


def decoded_experts(stored, projection, text, stack, shape) -> dict[str, Tensor]:
    headers = {f"{PARENT}._{projection}_{name}": header(f"{PARENT}._{projection}_{name}", t) for name, t in stored.items()}
    config = parse({f"{PARENT}.{projection}": text})
    modules: dict[str, dict] = {}
    for name, part in config.parts(headers, stack).items():
        module, local = config.split_name(name)
        modules.setdefault(module, {})[local] = part.of(stored[part.source.rpartition(f"_{projection}_")[2]]).contiguous()
    result = {}
    for module, tensors in modules.items():
        seen = view(tensors, module, ModuleKind.EXPERT, shape)
        scheme = config.decide(seen).scheme
        assert problems_of(scheme, seen) == []
        result[module] = scheme.to_weight(tensors).dequantize()
    return result


def test_stacked_int4_experts_have_scales_with_groups_first():
    count, n, k = 3, 32, 64
    codes = torch.randint(-8, 8, (count, n, k))
    stored = {"qdata": ((codes[..., ::2] & 15) | (codes[..., 1::2] & 15) << 4).to(torch.uint8), "scale": ramp(count, 2, n).abs() + 0.01, "zero_point": ramp(count, 2, n)}
    text = entry("Int4Tensor", {f"_gate_up_proj_{k}": v for k, v in stored.items()}, "gate_up_proj", block_size=[1, 1, 32], shape=[count, n, k])
    got = decoded_experts(stored, "gate_up_proj", text, ExpertStack(count, k, n // 2), (n // 2, k))
    want = codes[2].float() * spread(stored["scale"][2].t(), 1, 32) + spread(stored["zero_point"][2].t(), 1, 32)
    torch.testing.assert_close(got[f"{PARENT}.2.up_proj"], want[n // 2 :], rtol=2e-6, atol=2e-7)


def test_swizzled_scales_of_fused_experts_are_divided_only_between_tiles():
    for size, parts in ((128, 4), (96, 0)):
        stored = {"qdata": torch.zeros(2, 2 * size, 32, dtype=torch.uint8), "scale": torch.ones(2, 32 * -(-2 * size // 128), 16).to(torch.float8_e4m3fn)}
        text = entry("NVFP4Tensor", {f"_gate_up_proj_{k}": v for k, v in stored.items()}, "gate_up_proj", block_size=16, orig_dtype=BF16, is_swizzled_scales=True)
        headers = {f"{PARENT}._gate_up_proj_scale": header(f"{PARENT}._gate_up_proj_scale", stored["scale"])}
        divided = parse({f"{PARENT}.gate_up_proj": text}).parts(headers, ExpertStack(2, 64, size))
        assert sum(bool(part.steps) for part in divided.values()) == parts


def test_down_projection_of_a_stack_is_picked_whole():
    stored = {"qdata": (ramp(2, 64, 32) * 100).to(torch.float8_e4m3fn), "scale": ramp(2, 64, 1).abs() + 0.1}
    text = entry("Float8Tensor", {f"_down_proj_{k}": v for k, v in stored.items()}, "down_proj", block_size=[1, 1, 32], dtype=BF16)
    got = decoded_experts(stored, "down_proj", text, ExpertStack(2, 64, 32), (64, 32))
    assert torch.equal(got[f"{PARENT}.1.down_proj"], stored["qdata"][1].float() * stored["scale"][1])


# --- activations ----------------------------------------------------------------------------------------------------------
def kwargs(kind: str, **data) -> dict:
    return {"_type": kind, "_data": data}


def mapping(word: str) -> dict:
    return {"_type": "MappingType", "_data": word}


@pytest.mark.parametrize(("given", "want"), [
    ({"granularity": PER_ROW, "mapping_type": mapping("SYMMETRIC"), "reduce_range": False}, ActivationSpec("int8", "token", reciprocal=True)),
    ({"granularity": PER_TENSOR, "mapping_type": mapping("ASYMMETRIC")}, ActivationSpec("int8", "tensor", symmetric=False, reciprocal=True)),
    ({"granularity": PER_ROW, "reduce_range": True}, ActivationSpec("int7", "token", reciprocal=True)),
])  # fmt: skip
def test_int8_activation(given, want):
    tensors, text = int8_module(act_quant_kwargs=kwargs("QuantizeTensorToInt8Kwargs", **given))
    assert scheme_of(tensors, text).activation == want


@pytest.mark.parametrize(("given", "want"), [
    ({"float8_dtype": dtype("float8_e4m3fn"), "granularity": PER_ROW, "mm_config": None, "kernel_preference": None}, ActivationSpec("fp8_e4m3fn", "token")),
    ({"granularity": PER_TENSOR, "hp_value_ub": 1200.0, "hp_value_lb": 1e-3}, ActivationSpec("fp8_e4m3fn", "tensor", upper_bound=1200.0, lower_bound=1e-3)),
    ({"granularity": {"_type": "PerBlock", "_data": {"block_size": [1, 128]}}}, ActivationSpec("fp8_e4m3fn", "group", 128)),
    ({"float8_dtype": dtype("float8_e5m2"), "granularity": {"_type": "PerGroup", "_data": {"group_size": 64}}}, ActivationSpec("fp8_e5m2", "group", 64)),
])  # fmt: skip
def test_float8_activation(given, want):
    tensors, text = float8_module(act_quant_kwargs=kwargs("QuantizeTensorToFloat8Kwargs", **given))
    assert scheme_of(tensors, text).activation == want


@pytest.mark.parametrize("word", ["int8_asym_per_token", {"_type": "IntxUnpackedToInt8TensorActivationQuantization", "_data": "INT8_ASYM_PER_TOKEN"}])
def test_intx_activation(word):
    tensors, text = intx_module(4, activation=word)
    scheme = scheme_of(tensors, text)
    assert scheme.activation == ActivationSpec("int8", "token", symmetric=False, reciprocal=True)
    assert scheme.label == "W4A8 int4 g32 asym, activation int8 token dynamic asym"


@pytest.mark.parametrize(("mode", "rule"), [("FLOOR", "floor"), ("RCEIL", "ceil"), ("CEIL", "top"), ("EVEN", "even")])
def test_mx_activation(mode, rule):
    inner = kwargs("QuantizeTensorToMXKwargs", elem_dtype=dtype("float8_e4m3fn"), block_size=32, scaling_mode={"_type": "ScaleCalculationMode", "_data": mode},
                   kernel_preference=None, is_swizzled_scales=True)  # fmt: skip
    tensors = {Q: torch.ones(8, 64).to(torch.float8_e4m3fn), S: torch.full((8, 2), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)}
    text = entry("MXTensor", tensors, elem_dtype=dtype("float8_e4m3fn"), block_size=32, act_quant_kwargs=inner, is_swizzled_scales=False)
    assert scheme_of(tensors, text).activation == ActivationSpec("fp8_e4m3fn", "group", 32, scale_type="e8m0", exponent_rule=rule)


@pytest.mark.parametrize(("dynamic", "static", "second"), [(True, False, "dynamic"), (False, True, "static"), (False, False, "none")])
def test_nvfp4_activation(dynamic, static, second):
    inner = kwargs("QuantizeTensorToNVFP4Kwargs", block_size=16, is_swizzled_scales=True, use_triton_kernel=True, use_dynamic_per_tensor_scale=dynamic)
    tensors = {Q: torch.ones(8, 32, dtype=torch.uint8), S: torch.ones(8, 4).to(torch.float8_e4m3fn)}
    if static:
        tensors["_weight_act_per_tensor_scale"] = torch.tensor(0.02)
    text = entry("NVFP4Tensor", tensors, block_size=16, orig_dtype=BF16, is_swizzled_scales=False, act_quant_kwargs=inner)
    spec = scheme_of(tensors, text).to_activation(tensors)
    assert (spec.second_scale, spec.lowest_scale, spec.second) == (second, 2.0**-6, pytest.approx(0.02) if static else None)


@pytest.mark.parametrize(("symmetric", "zero"), [(True, None), (False, -7)])
def test_static_int8_activation(symmetric, zero):
    inner = kwargs("QuantizeTensorToInt8Kwargs", granularity=PER_ROW, mapping_type=mapping("SYMMETRIC" if symmetric else "ASYMMETRIC"))
    tensors, _ = int8_module()
    tensors["_weight_act_quant_scale"] = torch.tensor([[[0.25]]])
    if zero is not None:
        tensors["_weight_act_quant_zero_point"] = torch.tensor([[[zero]]], dtype=torch.int8)
    scheme = scheme_of(tensors, entry("Int8Tensor", tensors, block_size=[1, 96], dtype=BF16, act_quant_kwargs=inner))
    spec = scheme.to_activation(tensors)
    assert (spec.dynamic, spec.granularity, spec.scale, spec.zero) == (False, "tensor", 0.25, zero or 0)
    with pytest.raises(BadValueError, match="_weight_act_quant_scale"):
        scheme.to_activation(tensors | {"_weight_act_quant_scale": torch.tensor([[[-0.25]]])})


def test_embedding_has_no_activation():
    tensors, text = intx_module(4, activation="int8_asym_per_token")
    assert scheme_of(tensors, text, kind=ModuleKind.EMBEDDING).activation == NO_ACTIVATION


def test_reciprocal_moves_the_tie_at_the_negative_peak():
    x = ramp(256, 64) * 3
    divided, multiplied = (ActivationSpec("int8", "token", reciprocal=r).quantize(x)[0] for r in (False, True))
    scale = x.abs().amax(1, keepdim=True) / 127.5
    assert torch.equal(multiplied.float(), torch.round(x * (1.0 / scale)).clamp(-128, 127))
    assert not torch.equal(divided, multiplied)


# --- rules ----------------------------------------------------------------------------------------------------------------
def per_name(entries: dict, kind="FqnToConfig") -> dict:
    return section({"_type": kind, "_version": 1, "_data": {"fqn_to_config": entries, "module_fqn_to_config": entries}})


SETTING = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}


@pytest.mark.parametrize(("entries", "wanted"), [
    ({NAME: SETTING}, True), ({f"{NAME}.weight": None, "_default": SETTING}, False), ({"re:.*down_proj": None, "_default": SETTING}, False),
    ({"re:.*layers\\.0.*weight": SETTING}, True), ({NAME: SETTING, "re:.*": None}, True), ({"re:down_proj": None, "_default": SETTING}, True),
    ({"_default": None}, False),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["FqnToConfig", "ModuleFqnToConfig"])
def test_settings_per_name(entries, wanted, kind):
    tensors, text = int8_module()
    config = parse({f"{NAME}.weight": text}, per_name(entries, kind))
    assert config.rule_for(view(tensors))[0] is wanted
    if not wanted:
        with pytest.raises(RuleMismatchError, match=NAME):
            config.decide(view(tensors))


@pytest.mark.parametrize(("pattern", "wanted"), [("lm_head", True), ("model.layers.0", False), (f"{NAME}", False), ("down_proj.weight", False), ("down_proj", True), ("model.layers.[1-9]", True)])
def test_skipped_names_match_as_in_transformers(pattern, wanted):
    tensors, text = int8_module()
    config = parse({f"{NAME}.weight": text}, section(modules_to_not_convert=[pattern]))
    assert config.rule_for(view(tensors))[0] is wanted


def test_skipped_embedding_counts_not_where_embeddings_are_included():
    tensors, text = int8_module()
    module = view(tensors, "model.embed_tokens", ModuleKind.EMBEDDING)
    for included in (True, False):
        config = parse({"model.embed_tokens.weight": text}, section(modules_to_not_convert=["model.embed_tokens"], include_input_output_embeddings=included))
        assert config.rule_for(module)[0] is included


def test_a_name_that_no_setting_has_is_believed_to_its_metadata():
    tensors, text = int8_module()
    config = parse({f"{NAME}.weight": text}, per_name({"elsewhere": SETTING}))
    assert torch.equal(config.decide(view(tensors)).scheme.to_weight(tensors).dequantize(), tensors[Q].float() * tensors[S])
    assert config.rules() == ("elsewhere",)


@pytest.mark.parametrize(("word", "zero"), [("SYMMETRIC", "constant"), ("SYMMETRIC_NO_CLIPPING_ERR", "constant"), ("ASYMMETRIC", "integer")])
@pytest.mark.parametrize("key", ["mapping_type", "weight_mapping_type"])
def test_mapping_type_says_whether_integers_have_zero_points(word, zero, key):
    tensors, text = intx_module(4)
    tensors[Z].zero_()
    config = section({"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {key: mapping(word)}})
    assert scheme_of(tensors, text, config).weight_spec.zero == zero
    assert torch.equal(decode_module(tensors, text, config), tensors[Q].float() * spread(tensors[S], 1, 32))


def test_dense_module_is_dense_though_it_is_wanted():
    tensors = {"weight": ramp(8, 16)}
    assert parse({}).decide(view(tensors)).scheme.label == "dense float32"


# --- detection, names, spellings ------------------------------------------------------------------------------------------
def test_detection_by_method_metadata_and_names():
    tensors, text = int8_module()
    full = {f"{NAME}.{local}": t for local, t in tensors.items()}
    plain = evidence(None, full)
    described = replace(plain, metadata={"model.safetensors": metadata({f"{NAME}.weight": text})})
    assert TorchAOConfig.detect(evidence(section(), full)).score == 100
    assert TorchAOConfig.detect(described).score == 80
    assert TorchAOConfig.detect(plain).score == 50
    assert TorchAOConfig.detect(evidence({"quant_method": "gptq"}, full)) is None
    assert TorchAOConfig.detect(evidence(None, {"a.weight": torch.zeros(1)})) is None


def test_names_of_older_files_are_read():
    tensors, text = int8_module()
    config = parse({f"{NAME}.weight": text})
    assert config.split_name(f"{NAME}.weight:qdata") == (NAME, Q)
    assert config.split_name("model.norm.weight:_data") == ("model.norm", "weight")
    assert config.split_name(f"{NAME}.{Q}") == (NAME, Q)
    assert config.is_quantized(view(tensors))


def test_metadata_of_shards_are_joined():
    _, text = int8_module()
    found = replace(evidence(section()), metadata={"a": metadata({f"{NAME}.weight": text}), "b": metadata({"x.weight": text, "y.weight": json.dumps({"_type": "Tensor"})})})
    assert set(TorchAOConfig.parse(found).records) == {f"{NAME}.weight", "x.weight"}
    other = metadata({f"{NAME}.weight": text.replace("96", "48")})
    with pytest.raises(ConflictingConfigError, match=NAME):
        TorchAOConfig.parse(replace(found, metadata={"a": metadata({f"{NAME}.weight": text}), "b": other}))


def test_a_word_for_the_type_is_accepted():
    tensors, text = int8_module()
    config = {"quant_method": "torchao", "quant_type": "int8_weight_only", "quant_type_kwargs": {"group_size": 32}}
    assert decode_module(tensors, text, config).shape == SHAPE


# --- refusals -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor", "Int4PreshuffledTensor", "IntxOpaqueTensor", "SurpriseTensor"])
def test_classes_without_a_plain_layout_are_refused_by_name(kind):
    with pytest.raises(UnknownFormatError, match=kind) as caught:
        parse({f"{NAME}.weight": json.dumps({"_type": kind, "_data": {}, "_tensor_data_names": ["qdata"]})})
    assert NAME in str(caught.value)


@pytest.mark.parametrize(("change", "match"), [
    ({"surprise": 1}, "surprise"), ({"block_size": "big"}, "block_size"), ({"block_size": [1, 0]}, "block_size"),
    ({"act_quant_kwargs": kwargs("SurpriseKwargs")}, "SurpriseKwargs"),
    ({"act_quant_kwargs": kwargs("QuantizeTensorToInt8Kwargs", granularity={"_type": "PerRow", "_data": {"dim": 0}})}, "granularity"),
    ({"act_quant_kwargs": kwargs("QuantizeTensorToInt8Kwargs", mapping_type=mapping("SIDEWAYS"))}, "mapping_type"),
    ({"act_quant_kwargs": kwargs("QuantizeTensorToInt8Kwargs", rotated=True)}, "rotated"),
])  # fmt: skip
def test_attributes_that_are_not_understood_are_refused(change, match):
    tensors, _ = int8_module()
    with pytest.raises(BitgrainError, match=match):
        parse({f"{NAME}.weight": entry("Int8Tensor", tensors, **{"block_size": [1, 96], "dtype": BF16, **change})})


@pytest.mark.parametrize("text", ["{", "[]", '{"_data": {}}', '{"_type": "Int8Tensor"}', '{"_type": "Int8Tensor", "_data": {}, "_tensor_data_names": ["scale"]}'])
def test_damaged_metadata_are_refused(text):
    with pytest.raises(BitgrainError, match=NAME):
        parse({f"{NAME}.weight": text})


def test_a_name_without_an_entry_and_an_unknown_component_are_refused():
    tensors, _ = int8_module()
    with pytest.raises(ConfigError, match="nowhere"):
        TorchAOConfig.parse(replace(evidence(section()), metadata={"a": {"tensor_names": '["nowhere.weight"]'}}))
    with pytest.raises(ConfigError, match="twist"):
        parse({f"{NAME}.weight": entry("Int8Tensor", {**tensors, "_weight_twist": 1}, block_size=[1, 96], dtype=BF16)})


def test_unknown_keys_and_bad_patterns_are_refused_together():
    with pytest.raises(ManyProblemsError) as caught:
        parse({}, section(modules_to_not_convert=["("], modules_to_not_covert=["lm_head"]))
    assert "modules_to_not_covert (nearest known: modules_to_not_convert)" in str(caught.value)
    assert "regular expression" in str(caught.value)


def test_components_without_metadata_are_refused():
    tensors, _ = int8_module()
    with pytest.raises(ConfigError, match="down_proj"):
        parse({}, section()).decide(view(tensors))


def test_a_record_without_its_tensors_is_a_missing_tensor():
    _, text = int8_module()
    module = view({"weight": ramp(*SHAPE)}, shape=SHAPE)
    scheme = parse({f"{NAME}.weight": text}).decide(module).scheme
    assert any(Q in str(problem) for problem in problems_of(scheme, module))


@pytest.mark.parametrize("wrong", [
    {Q: torch.zeros(47, 96, dtype=torch.int8)}, {S: torch.ones(48, 2)}, {S: torch.ones(48, 1).to(torch.int8)}, {Z: torch.zeros(1, dtype=torch.int8)},
    {"extra": torch.zeros(1)}, {Q: torch.zeros(48, 96, dtype=torch.uint8)},
])  # fmt: skip
def test_wrong_headers_are_named(wrong):
    tensors, text = int8_module()
    module = view(tensors | wrong, shape=SHAPE)
    problems = problems_of(parse({f"{NAME}.weight": text}).decide(module).scheme, module)
    assert any(next(iter(wrong)) in str(problem) for problem in problems)


def test_a_block_larger_than_the_matrix_is_refused():
    tensors, text = int8_module()
    with pytest.raises(ShapeMismatchError, match="block_size"):
        parse({f"{NAME}.weight": text.replace("[1, 96]", "[1, 192]")}).decide(view(tensors))


@pytest.mark.parametrize(("local", "value", "error"), [
    (S, float("nan"), BadValueError), (S, -1.0, BadValueError), (S, 0.0, BadValueError), (Z, 3, LabelMismatchError),
])  # fmt: skip
def test_values_that_torchao_never_writes_are_refused(local, value, error):
    tensors, text = int8_module()
    scheme = scheme_of(tensors, text)
    with pytest.raises(error, match=local):
        scheme.to_weight(tensors | {local: torch.full_like(tensors[local], value)})


def test_codes_and_zero_points_beyond_their_width_are_refused():
    tensors, text = intx_module(4)
    scheme = scheme_of(tensors, text)
    for local in (Q, Z):
        with pytest.raises(BadValueError, match=local):
            scheme.to_weight(tensors | {local: torch.full_like(tensors[local], 8)})


def test_bad_float8_and_six_bit_codes_are_refused():
    tensors, text = float8_module()
    scheme = scheme_of(tensors, text)
    with pytest.raises(BadValueError, match=Q):
        scheme.to_weight(tensors | {Q: torch.full(SHAPE, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)})
    six = {Q: torch.full(SHAPE, 64, dtype=torch.uint8), S: torch.full((48, 3), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)}
    scheme = scheme_of(six, entry("MXTensor", six, elem_dtype="fp6_e2m3", block_size=32, is_swizzled_scales=False))
    with pytest.raises(BadValueError, match=Q):
        scheme.to_weight(six)


def test_a_scale_of_the_input_that_loses_a_channel_is_refused():
    tensors, _ = int8_module()
    tensors["_weight_act_pre_scale"] = torch.zeros(96)
    scheme = scheme_of(tensors, entry("Int8Tensor", tensors, block_size=[1, 96], dtype=BF16))
    with pytest.raises(BadValueError, match="_weight_act_pre_scale"):
        scheme.to_weight(tensors)


def test_examples_cover_every_kind():
    assert len(set(TorchAOConfig.examples())) == 9
