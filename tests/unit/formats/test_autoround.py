"""AutoRound checkpoints: golden weights of the producer, every packing by an independent packer, rules, inputs, refusals."""

from dataclasses import replace

import pytest
import torch
from golden_cases import problems_of
from synthetic import NAME, evidence, view
from word_packers import gemm_tensors, gptq_tensors, numbers

from bitgrain.errors import BadValueError, BitgrainError, ConfigError, LabelMismatchError, RuleMismatchError, ShapeMismatchError
from bitgrain.formats.autoround import AutoRoundConfig
from bitgrain.formats.autoround.settings import ModuleSettings
from bitgrain.formats.base import DenseScheme, ModuleKind
from bitgrain.formats.registry import canonical_name
from bitgrain.weights import NO_ACTIVATION
from tests.golden_checks import check_golden, golden_folders

INT = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int", "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers"}
MX = INT | {"data_type": "mx_fp", "packing_format": "auto_round:llm_compressor", "sym": True, "act_bits": 4, "act_data_type": "mx_fp", "act_dynamic": True, "act_group_size": 32, "act_sym": True}
NV = MX | {"data_type": "nv_fp", "group_size": 16, "act_data_type": "nv_fp4_with_static_gs", "act_group_size": 16}
E5M3 = NV | {"data_type": "nvfp4_v2", "act_data_type": "nvfp4_v2", "packing_format": "auto_round:llm_compressor_nvfp4_e5m3"}
FP8 = {"quant_method": "auto-round", "bits": 8, "group_size": -1, "sym": True, "data_type": "fp", "fmt": "e4m3", "packing_format": "auto_round:fp8_static", "activation_scheme": "static", "act_bits": 8, "act_data_type": "fp", "act_dynamic": False, "act_group_size": 0, "act_sym": True}  # fmt: skip
BLOCK = FP8 | {"group_size": [128, 128], "weight_block_size": [128, 128], "packing_format": "auto_round:fp8", "activation_scheme": "dynamic", "act_dynamic": True, "act_group_size": 128}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def parse(section, **changes):
    return AutoRoundConfig.parse(evidence(section | changes))


def decode(config, tensors, shape=None, name=NAME):
    """(float32 weight, scheme) of a module after the header comparison."""
    module = view(tensors, name, shape=shape)
    scheme = config.decide(module).scheme
    assert problems_of(scheme, module) == []
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec
    return weight.dequantize(), scheme


def activation(section, tensors, **changes):
    return parse(section, **changes).decide(view(tensors)).scheme.to_activation(tensors)


# --- packers of their own ---------------------------------------------------------------------------------------------------
def nibbles(n, k, seed=0):
    """(codes [N, K] of 4 bits, packed uint8 [N, K / 2]), the even element in the low nibble."""
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(seed))
    packed = [[row[i] + 16 * row[i + 1] for i in range(0, k, 2)] for row in codes.tolist()]
    return codes, torch.tensor(packed, dtype=torch.uint8)


def table(codes, values):
    signed = torch.tensor([*values, *(-v for v in values)], dtype=torch.float32)
    return signed[codes]


def exponents(n, groups, low=110, high=130):
    return torch.randint(low, high, (n, groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def nv_module(n=8, k=64, weight_scale=None, divisor=900.0):
    codes, packed = nibbles(n, k)
    scale = torch.linspace(0.5, 448, n * (k // 16)).view(n, -1).to(torch.float8_e4m3fn) if weight_scale is None else weight_scale
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": torch.tensor([divisor]), "input_global_scale": torch.tensor([400.0])}
    return tensors, table(codes, E2M1) * (scale.float() / divisor).repeat_interleave(16, 1)


def fp8_module(n=8, k=96, count=None):
    weight = (torch.randn(n, k, generator=torch.Generator().manual_seed(2)) * 60).to(torch.float8_e4m3fn)
    scale = torch.linspace(0.001, 0.02, n if count is None else count).bfloat16()
    return {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor([0.25]).bfloat16()}


# --- the producer's own values ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", golden_folders("autoround"), ids=lambda p: p.name)
def test_golden_module_dequantizes_to_the_producers_values(folder):
    assert check_golden(folder) >= 1


def test_golden_cases_cover_every_kind_of_number():
    labels = {folder.name for folder in golden_folders("autoround")}
    assert {"autoround-nvfp4", "autoround-nvfp4-e5m3", "autoround-mxint4", "autoround-mxfp8", "autoround-fp8-static", "autoround-w6-asym-g32-awq"} <= labels


# --- integers ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("label", "v1"), [("auto_round:auto_gptq", True), ("auto_round", False), ("auto_round:gptqmodel", False)])
def test_words_decode_in_every_width_and_convention(bits, label, v1):
    v = numbers(32, 64, 32, bits)
    tensors = gptq_tensors(v, v1=v1, index="gptqmodel" in label)
    got, scheme = decode(parse(INT, bits=bits, packing_format=label), tensors)
    assert torch.equal(got, v.weight())
    assert (scheme.label, scheme.activation) == (f"W{bits}A16 int{bits} g32 asym", NO_ACTIVATION)


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_interleaved_words_decode_in_every_width(bits, symmetric):
    v = numbers(32, 96, 32, bits, zero=1 << (bits - 1) if symmetric else None)
    got, scheme = decode(parse(INT, bits=bits, sym=symmetric, packing_format="auto_round:auto_awq"), gemm_tensors(v))
    assert torch.equal(got, v.weight())
    assert scheme.weight_spec.zero == ("constant" if symmetric else "integer")


@pytest.mark.parametrize(
    ("label", "v1"),
    [("auto_round:exllamav2", False), ("autoround:exllamav2", False), ("auto_round:tritonv2", False), ("auto_round:gptq", True),
     ("auto_round:gptq:exllamav2", True), ("auto_round:gptq:marlin", True), ("auto_round:marlin", True), ("auto", True)],
)  # fmt: skip
def test_older_packing_formats_store_zero_points_as_their_names_say(label, v1):
    v = numbers(16, 64, 32)
    got, _ = decode(parse(INT, packing_format=label), gptq_tensors(v, v1=v1, index=False))
    assert torch.equal(got, v.weight())


def test_old_files_name_the_packing_as_backend():
    v = numbers(16, 64, 32)
    section = {k: x for k, x in INT.items() if k != "packing_format"}
    assert torch.equal(decode(parse(section, backend="autoround:exllamav2"), gptq_tensors(v, v1=False))[0], v.weight())
    assert torch.equal(decode(parse(section, backend="auto"), gptq_tensors(v, v1=True))[0], v.weight())


@pytest.mark.parametrize(("group_size", "k"), [(-1, 96), (64, 96), (128, 96)])
def test_rows_and_short_last_groups(group_size, k):
    v = numbers(32, k, min(group_size, k) if group_size > 0 else k, 4)
    assert torch.equal(decode(parse(INT, group_size=group_size), gptq_tensors(v, index=False), shape=(32, k))[0], v.weight())


def test_symmetric_label_of_the_other_convention_is_refused():
    v = numbers(32, 64, 32, zero=8)
    with pytest.raises(LabelMismatchError, match=r"qzeros.*packing_format 'auto_round'"):
        decode(parse(INT, sym=True, packing_format="auto_round"), gptq_tensors(v, v1=True))
    assert torch.equal(decode(parse(INT, sym=True), gptq_tensors(v, v1=True))[0], v.weight())


def test_clamped_zero_point_is_read_as_one():
    """The producer's packer cannot store 0 minus one; it writes 0, which means 1."""
    v = numbers(16, 32, 32, zero=1)
    assert int(gptq_tensors(v)["qzeros"].abs().max()) == 0
    assert torch.equal(decode(parse(INT), gptq_tensors(v))[0], v.weight())


def test_interleaved_width_that_needs_whole_runs_is_refused_otherwise():
    v = numbers(24, 64, 32, 5)
    with pytest.raises(ShapeMismatchError, match="N % 32 == 0"):
        parse(INT, bits=5, packing_format="auto_round:auto_awq").decide(view(gptq_tensors(v), shape=(24, 64)))


def test_integer_input_is_dynamic():
    v = numbers(16, 64, 32)
    spec = activation(INT, gptq_tensors(v), act_bits=8, act_data_type="int", act_dynamic=True, act_group_size=-1, act_sym=True)
    assert spec.describe() == "int8 token dynamic"
    assert activation(INT, gptq_tensors(v), act_bits=4, act_group_size=32, act_sym=False).describe() == "int4 g32 dynamic asym"


# --- small floats -------------------------------------------------------------------------------------------------------------
def test_mxfp4_decodes_with_floor_exponents_for_inputs():
    codes, packed = nibbles(8, 64)
    scale = exponents(8, 2)
    tensors = {"weight_packed": packed, "weight_scale": scale}
    got, scheme = decode(parse(MX), tensors)
    assert torch.equal(got, table(codes, E2M1) * torch.exp2(scale.float() - 127).repeat_interleave(32, 1))
    spec = scheme.to_activation(tensors)
    assert (spec.describe(), spec.exponent_rule) == ("fp4_e2m1 g32 dynamic e8m0", "floor")
    x = torch.zeros(1, 32)
    x[0, 0] = 7.9  # floor(log2 7.9) - 2 = 0, so the largest element becomes 6
    assert spec.fake_quantize(x)[0, 0] == 6.0
    assert activation(MX, tensors, act_data_type="mx_fp_rceil").fake_quantize(x)[0, 0] == 8.0


def test_mxfp8_is_stored_one_element_per_byte():
    weight = torch.randn(8, 64).to(torch.float8_e4m3fn)
    scale = exponents(8, 2)
    got, scheme = decode(parse(MX, bits=8, act_bits=8), {"weight": weight, "weight_scale": scale})
    assert torch.equal(got, weight.float() * torch.exp2(scale.float() - 127).repeat_interleave(32, 1))
    assert scheme.activation.element == "fp8_e4m3fn"


def test_mxint4_is_a_sign_and_quarters():
    codes, packed = nibbles(8, 64)
    scale = exponents(8, 2)
    section = MX | {"data_type": "mx_int", "act_data_type": "mx_int", "packing_format": "auto_round"}
    got, scheme = decode(parse(section), {"weight_packed": packed, "weight_scale": scale})
    assert torch.equal(got, table(codes, [i / 4 for i in range(8)]) * torch.exp2(scale.float() - 127).repeat_interleave(32, 1))
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([7.0, 3.1, -7.9, 0.4])  # s = 4: quarters are 1
    assert scheme.activation.fake_quantize(x)[0, :4].tolist() == [7.0, 3.0, -7.0, 0.0]


def test_nvfp4_global_scales_are_divisors():
    tensors, want = nv_module()
    got, scheme = decode(parse(NV), tensors)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    spec = scheme.to_activation(tensors)
    assert (spec.second_scale, spec.second_divides) == ("static", True)
    x = torch.full((1, 16), 3.0)  # s = e4m3(400 * 3 / 6) / 400, and 3 / s is beyond 6
    expected = 6.0 * torch.tensor(400 * 0.5).to(torch.float8_e4m3fn).float() / 400
    assert torch.allclose(spec.fake_quantize(x)[0, 0], expected)


def test_weights_alone_have_no_input_scale():
    tensors, want = nv_module()
    del tensors["input_global_scale"]
    section = {k: v for k, v in NV.items() if not k.startswith("act_")}
    got, scheme = decode(parse(section), tensors)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert scheme.activation == NO_ACTIVATION


def test_e5m3_scales_have_no_second_scale():
    codes, packed = nibbles(4, 32)
    scale = torch.tensor([[0x78, 0x7C], [0x80, 0x01], [0x70, 0x07], [0x08, 0x7F]], dtype=torch.uint8)
    value = torch.tensor([[1.0, 1.5], [2.0, 2.0**-17], [0.5, 7 * 2.0**-17], [2.0**-14, 1.875]])
    got, scheme = decode(parse(E5M3), {"weight_packed": packed, "weight_scale": scale})
    assert torch.equal(got, table(codes, E2M1) * value.repeat_interleave(16, 1))
    assert scheme.activation.scale_type == "e5m3"


def test_fp8_rows_multiply_and_inputs_are_static():
    tensors = fp8_module()
    got, scheme = decode(parse(FP8), tensors)
    assert torch.equal(got, tensors["weight"].float() * tensors["weight_scale"].float()[:, None])
    spec = scheme.to_activation(tensors)
    assert (spec.describe(), spec.scale) == ("fp8_e4m3fn tensor static", 0.25)


@pytest.mark.parametrize("group_size", [0, -1])
def test_fp8_one_scale_is_of_the_whole_tensor(group_size):
    tensors = fp8_module(count=1)
    got, scheme = decode(parse(FP8, group_size=group_size), tensors)
    assert torch.equal(got, tensors["weight"].float() * tensors["weight_scale"].float())
    assert scheme.weight_spec.granularity == "tensor"


def test_fp8_groups_are_stored_in_one_row():
    tensors = fp8_module(8, 80, count=24)
    got, _ = decode(parse(FP8, group_size=32), tensors)
    scale = tensors["weight_scale"].float().view(8, 3).repeat_interleave(32, 1)[:, :80]
    assert torch.equal(got, tensors["weight"].float() * scale)


def test_fp8_without_a_packing_format_is_weight_only():
    tensors = fp8_module()
    del tensors["input_scale"]
    section = {k: v for k, v in FP8.items() if not k.startswith("act_") and k != "packing_format"} | {"activation_scheme": "dynamic"}
    got, scheme = decode(parse(section), tensors)
    assert torch.equal(got, tensors["weight"].float() * tensors["weight_scale"].float()[:, None])
    assert scheme.activation == NO_ACTIVATION


def test_fp8_blocks_have_short_edges_and_multiply_despite_their_name():
    weight = (torch.randn(200, 300) * 60).to(torch.float8_e4m3fn)
    scale = torch.linspace(0.001, 0.02, 6).view(2, 3).bfloat16()
    got, scheme = decode(parse(BLOCK), {"weight": weight, "weight_scale_inv": scale})
    assert torch.equal(got, weight.float() * scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300])
    spec = scheme.activation
    assert spec.describe() == "fp8_e4m3fn g128 dynamic"
    # the producer keeps scales above 1 / (448 * 512)
    assert float(spec.quantize(torch.full((1, 128), 1e-6))[1]) == pytest.approx(1 / (448 * 512))


def test_e5m2_weights_are_declared():
    module = view(fp8_module())
    config = parse(FP8, data_type="fp8_e5m2", fmt="e5m2")
    assert problems_of(config.decide(module).scheme, module) == ["dtype weight"]


# --- rules --------------------------------------------------------------------------------------------------------------------
DENSE = {"weight": torch.ones(8, 8)}


def settings_for(config, name):
    return config.quantized_scheme(view(gptq_tensors(numbers(32, 64, 32)), name, shape=(32, 64))).settings


def test_extra_config_prefers_exact_names_then_endings_then_patterns():
    extra = {
        r".*layers\.1\..*": {"bits": 3},
        "v_proj": {"bits": 6},
        r"layers\.1\.self_attn": {"bits": 7},
        "model.layers.1.self_attn.q_proj": {"bits": 8, "group_size": 64},
    }
    config = parse(INT, extra_config=extra)
    first = "model.layers.1.self_attn."
    assert (settings_for(config, first + "q_proj").bits, settings_for(config, first + "q_proj").group_size) == (8, 64)
    assert settings_for(config, first + "v_proj").bits == 6
    assert settings_for(config, first + "k_proj").bits == 3  # the first pattern in the order of the file
    assert settings_for(config, "model.layers.0.self_attn.k_proj").bits == 4
    assert settings_for(config, "model.layers.0.self_attn.qv_proj").bits == 4  # endings are whole segments


def test_patterns_are_searched_anywhere_in_the_name():
    config = parse(INT, extra_config={r"mlp\.gate": {"bits": 16, "data_type": "float"}})
    assert config.rule_for(view(DENSE, "model.layers.0.mlp.gate")) == (False, "extra_config has 'mlp\\\\.gate'")
    assert not config.rule_for(view(DENSE, "model.layers.0.mlp.gate_proj"))[0]
    assert config.rule_for(view(DENSE, "model.layers.0.mlp.experts.0.gate_proj"))[0]
    assert config.matched_rules == set(config.rules())


def test_overridden_pattern_counts_as_matched():
    config = parse(INT, extra_config={".*q_proj.*": {"bits": 8}, "model.layers.0.self_attn.q_proj": {"bits": 8}})
    config.rule_for(view(DENSE, "model.layers.0.self_attn.q_proj"))
    assert config.matched_rules == set(config.rules())


def test_excluded_module_with_quantized_tensors_is_refused_unless_trusted():
    config = parse(INT, extra_config={NAME: {"bits": 16}})
    v = numbers(32, 64, 32)
    with pytest.raises(RuleMismatchError, match="extra_config has"):
        config.decide(view(gptq_tensors(v)))
    config.trust_tensors = True
    assert torch.equal(decode(config, gptq_tensors(v))[0], v.weight())


@pytest.mark.parametrize(
    "blocks",
    ["model.layers", "model.visual, model.layers", ["model.layers"], [["model.layers.0", "model.layers.1", "model.layers.10"]]],
)
def test_only_modules_in_the_named_blocks_are_quantized(blocks):
    config = parse(INT, block_name_to_quantize=blocks)
    assert config.rule_for(view(DENSE, NAME))[0]
    assert not config.rule_for(view(DENSE, "lm_head", ModuleKind.LM_HEAD))[0]
    assert not config.rule_for(view(DENSE, "other.layers.0.q_proj"))[0]


def test_single_blocks_share_their_beginning_as_the_producer_reads_it():
    config = parse(INT, block_name_to_quantize=[["model.layers.10", "model.layers.11"]])
    assert config.blocks == ("model.layers.1",)


def test_head_is_quantized_only_where_extra_config_lists_it():
    v = numbers(32, 64, 64, 8)
    module = view(gptq_tensors(v), "lm_head", ModuleKind.LM_HEAD)
    with pytest.raises(RuleMismatchError, match="outside the blocks"):
        parse(INT).decide(module)
    with pytest.raises(RuleMismatchError, match="does not list the head"):
        parse({k: x for k, x in INT.items() if k != "block_name_to_quantize"}).decide(module)
    entry = {"bits": 8, "group_size": -1, "data_type": "int", "sym": False, "act_bits": 16, "act_data_type": "float", "act_dynamic": True,
             "act_group_size": 32, "act_sym": True, "super_bits": None, "super_group_size": None, "rotation_config": None}  # fmt: skip
    scheme = parse(INT, extra_config={"lm_head": entry}).decide(module).scheme
    assert torch.equal(scheme.to_weight(gptq_tensors(v)).dequantize(), v.weight())


def test_embedding_is_left_alone():
    choice = parse(INT).decide(view({"weight": torch.ones(8, 8)}, "model.embed_tokens", ModuleKind.EMBEDDING))
    assert isinstance(choice.scheme, DenseScheme)


def test_mixed_element_widths_change_the_tensors():
    config = parse(MX, extra_config={NAME: {"bits": 8, "act_bits": 8}})
    scheme = config.decide(view({"weight": torch.ones(8, 64).to(torch.float8_e4m3fn), "weight_scale": exponents(8, 2)})).scheme
    assert scheme.label == "W8A8 fp8_e4m3fn g32 e8m0, activation fp8_e4m3fn g32 dynamic e8m0"


@pytest.mark.parametrize("key", ["ignored_layers", "modules_to_not_convert"])
def test_lists_of_dense_modules_match_whole_segments(key):
    config = parse(BLOCK, **{key: ["mlp.gate"]})
    assert not config.rule_for(view(DENSE, "model.layers.0.mlp.gate"))[0]
    assert config.rule_for(view(DENSE, "model.layers.0.mlp.gate_proj"))[0]


@pytest.mark.parametrize("word", ["fp8", "float8_e4m3fn"])
def test_static_cache_is_read_with_its_granularity(word):
    attention = view({"k_scale": torch.ones(2), "v_scale": torch.ones(2)}, "model.layers.0.self_attn", ModuleKind.ATTENTION)
    scheme = parse(INT, static_kv_dtype=word, static_kv_granularity="head").get_kv_cache_scheme(attention)
    assert scheme.describe() == "fp8_e4m3fn head"
    assert [which for _, which in scheme.scales] == ["k", "v"]
    assert parse(INT).get_kv_cache_scheme(attention).scales == ()


# --- damages --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("section", "tensors"),
    [
        (INT, gptq_tensors(numbers(32, 64, 32), index=False)),
        (INT | {"packing_format": "auto_round:auto_awq"}, gemm_tensors(numbers(32, 64, 32))),
        (MX, {"weight_packed": nibbles(8, 64)[1], "weight_scale": exponents(8, 2)}),
        (NV, nv_module()[0]),
        (FP8, fp8_module()),
    ],
    ids=["gptq", "awq", "mx", "nv", "fp8"],
)
def test_missing_short_or_stray_tensor_is_found_in_the_headers(section, tensors):
    name = next(iter(tensors))
    shape = (tensors[name].shape[0] if section is not INT else tensors[name].shape[1], 96 if section is FP8 else 64)
    shape = (32, 64) if "qweight" in tensors else shape
    config = parse(section)

    def problems(changed):
        module = view(changed, shape=shape)
        return problems_of(config.decide(module).scheme, module)

    assert problems(tensors) == []
    assert problems(tensors | {"weight_shape": torch.ones(2)}) == ["undeclared weight_shape"]
    for local in tensors:
        assert f"missing {local}" in problems({k: v for k, v in tensors.items() if k != local})
        wider = torch.cat([tensors[local].view(torch.uint8), tensors[local].view(torch.uint8)]).view(tensors[local].dtype)
        assert problems(tensors | {local: wider}) == [f"shape {local}"]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_impossible_global_scale_is_refused(value):
    tensors, _ = nv_module(divisor=value)
    with pytest.raises(BadValueError, match="weight_global_scale"):
        decode(parse(NV), tensors)


def test_global_scale_of_the_other_direction_is_refused():
    tensors, _ = nv_module(divisor=1 / 900)
    with pytest.raises(LabelMismatchError, match="weight_global_scale"):
        decode(parse(NV), tensors)


def test_nan_block_scale_is_refused():
    for scale, section in [(torch.full((8, 4), 255, dtype=torch.uint8), E5M3), (torch.full((8, 2), 255, dtype=torch.uint8), MX)]:
        with pytest.raises(BadValueError, match="weight_scale"):
            decode(parse(section), {"weight_packed": nibbles(8, 64)[1], "weight_scale": scale})


# --- configuration ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["auto-round", "auto_round", "AutoRound", "intel/auto-round"])
def test_every_spelling_is_detected(method):
    assert AutoRoundConfig.detect(evidence(INT | {"quant_method": method})).score == 100
    assert AutoRoundConfig.detect(evidence(None, sidecars={"quantization_config.json": INT})).score == 80
    assert canonical_name(method.lower()) == "auto-round"


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_exports_in_other_formats_are_left_to_them(method):
    assert AutoRoundConfig.detect(evidence(INT | {"quant_method": method, "provider": "auto-round"})) is None


def test_metadata_changes_nothing():
    told = parse(
        INT, amp=False, autoround_version="0.16.1", enable_quanted_input=False, iters=200, lr=None, minmax_lr=0.005, nsamples=512, seqlen=2048,
        batch_size=8, scale_dtype="torch.float16", low_gpu_mem_usage=True, gradient_accumulate_steps=1, dataset="x", quant_block_list=None,
        static_kv_dtype=None, super_bits=None, regex_config={}, rotation_config={}, enable_minmax_tuning=True, supported_types=["Linear"],
    )  # fmt: skip
    assert settings_for(told, NAME) == settings_for(parse(INT), NAME)


@pytest.mark.parametrize(
    ("section", "changes", "text"),
    [
        (INT, {"bits": 9}, "bits: 9"),
        (INT, {"bits": None}, "bits: absent"),
        (INT, {"group_size": 0}, "group_size: 0"),
        (INT, {"group_size": -2}, "group_size: -2"),
        (INT, {"group_size": [128, 128]}, "no packing of integers"),
        (INT, {"bits": 8, "packing_format": "auto_round:auto_awq"}, "4 to 7 bits"),
        (INT, {"packing_format": "auto_round:mlx"}, "packing_format: 'auto_round:mlx'"),
        (INT, {"packing_format": "auto_round:fake"}, "auto_round:fake"),
        (INT, {"packing_format": "auto_round:llm_compressor"}, "kind 'int' in packing_format"),
        (INT, {"data_type": "fp8_to_int_sym"}, "fp8_to_int_sym"),
        (INT, {"data_type": "float"}, "'float' with 4 bits"),
        (INT, {"act_bits": 8, "act_dynamic": False}, "act_dynamic"),
        (INT, {"act_bits": 3}, "act_bits: 3"),
        (INT, {"super_bits": 6}, "super_bits"),
        (INT, {"rotation_config": {"hadamard_type": "hadamard"}}, "rotated inputs"),
        (INT, {"static_attention_dtype": "fp8"}, "quantized attention"),
        (INT, {"static_kv_dtype": "nvfp4"}, "static_kv_dtype: 'nvfp4'"),
        (INT, {"packing_fromat": "x"}, r"packing_fromat \(nearest known: packing_format\)"),
        (INT, {"extra_config": {"lm_head": {"bitz": 8}}}, r"extra_config\['lm_head'\].*bitz \(nearest known: bits\)"),
        (INT, {"extra_config": {"lm_head": 8}}, "a int"),
        (INT, {"extra_config": {"(q_proj": {"bits": 8}}}, "not a valid regular expression"),
        (INT, {"extra_config": {"lm_head": {"bits": 8, "data_type": "fp"}}}, "kind 'fp8' in packing_format"),
        (INT, {"block_name_to_quantize": [1]}, "block_name_to_quantize"),
        (MX, {"group_size": 16}, "group_size: 16"),
        (MX, {"bits": 6}, "bits: 6"),
        (MX, {"sym": False}, "no zero point"),
        (NV, {"group_size": 32}, "group_size: 32"),
        (NV, {"act_group_size": 32}, "act_group_size: 32"),
        (FP8, {"act_group_size": -1}, "one stored scale per module"),
        (FP8, {"activation_scheme": "dynamic"}, "as act_dynamic says"),
        (FP8, {"fmt": "e5m2"}, "'e4m3', as data_type says"),
        (BLOCK, {"weight_block_size": [64, 64]}, "weight_block_size"),
    ],
)
def test_impossible_configuration_is_refused_by_name(section, changes, text):
    with pytest.raises(BitgrainError, match=text):
        parse(section, **changes)


def test_all_problems_are_listed_at_once():
    with pytest.raises(BitgrainError, match="(?s)act_bits: 3.*bits: 9.*super_bits"):
        parse(INT, bits=9, act_bits=3, super_bits=4)


def test_wrong_type_is_one_problem():
    with pytest.raises(ConfigError, match="bits: '4'"):
        parse(INT, bits="4")


def test_entries_inherit_what_they_do_not_state():
    config = parse(NV, extra_config={"q_proj": {"bits": 16}, "k_proj": {"act_bits": 16}})
    by_key = {entry.key: entry.settings for entry in config.extra.entries}
    assert by_key["q_proj"] == replace(config.common, bits=16)
    assert by_key["k_proj"] == replace(config.common, input_bits=16)
    assert isinstance(config.common, ModuleSettings)
