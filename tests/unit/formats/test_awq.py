"""AWQ checkpoints: golden weights of the producers, every layout by an independent packer, and refusals."""

import pytest
import torch
from golden_cases import Case, decode_all, fixture_cases, golden_cases, problems_of
from word_packers import decode_module, evidence, gemm_tensors, gemv_fast_tensors, gemv_tensors, gptq_tensors, marlin_tensors, numbers, view

import bitgrain
from bitgrain.errors import (
    BadValueError,
    BitgrainError,
    ConfigError,
    ConflictingConfigError,
    LabelMismatchError,
    RuleMismatchError,
    ShapeMismatchError,
    UnexpectedTensorError,
)
from bitgrain.formats.awq import AwqConfig
from bitgrain.formats.awq.schemes import padded_groups
from bitgrain.formats.base import DenseScheme, ModuleKind
from bitgrain.formats.registry import canonical_name
from tests.checkpoints import write_checkpoint

BASE = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
PACKERS = {
    "gemm": lambda v, size: gemm_tensors(v),
    "gemv": gemv_tensors,
    "gemv_fast": gemv_fast_tensors,
    "marlin": lambda v, size: marlin_tensors(v),
}


def parse(**changes):
    return AwqConfig.parse(evidence({**BASE, **changes}))


def decode(tensors, *, shape=None, **changes):
    """(weight, scheme) after the header comparison; the spec must have been known from headers."""
    weight, scheme = decode_module(parse(**changes), tensors, shape)
    assert weight.spec == scheme.weight_spec
    return weight, scheme


def written(version, group_size, k=256, n=64, **options):
    """(numbers, tensors, keys) of a module in a layout."""
    v = numbers(n, k, group_size, zero=8 if version == "marlin" else None, **options)
    size = k if group_size == -1 else group_size
    return v, PACKERS[version](v, size), {"version": version, "group_size": group_size, "zero_point": version != "marlin"}


@pytest.mark.parametrize("folder", golden_cases("awq"))
def test_golden_module_dequantizes_to_the_producers_values(folder):
    case = Case(folder)
    assert AwqConfig.detect(case.evidence()).score == 100
    assert decode_all(case, AwqConfig.parse(case.evidence())) >= 1


@pytest.mark.parametrize("bits", [4, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_wider_codes_keep_the_interleave_in_a_dense_stream(bits, symmetric):
    v = numbers(64, 96, 32, bits, zero=1 << (bits - 1) if symmetric else None)
    weight, scheme = decode(gemm_tensors(v), bits=bits, zero_point=not symmetric)
    assert torch.equal(weight.dequantize(), v.weight())
    assert scheme.label == f"W{bits}A16 int{bits} g32" + ("" if symmetric else " asym")


def test_wider_codes_need_whole_runs_of_columns():
    v = numbers(32, 64, 32, 5)
    with pytest.raises(ShapeMismatchError, match="N % 32 == 0"):
        parse(bits=5).decide(view(gemm_tensors(v), shape=(40, 64)))


def test_width_other_than_configured_is_found_in_the_headers():
    module = view(gemm_tensors(numbers(32, 64, 32, 5)), shape=(32, 64))
    assert problems_of(parse(bits=6).decide(module).scheme, module) == ["shape qweight", "shape qzeros"]


def test_static_cache_of_a_foreign_quantizer_is_read():
    attention = view({"k_scale": torch.ones(1), "v_scale": torch.ones(1)}, "model.layers.0.self_attn", kind=ModuleKind.ATTENTION)
    assert parse(static_kv_dtype="fp8", static_kv_granularity="tensor").get_kv_cache_scheme(attention).describe() == "fp8_e4m3fn tensor"
    assert parse().get_kv_cache_scheme(attention).scales == ()


@pytest.mark.parametrize("folder", fixture_cases("awq"))
def test_fixture_dequantizes_to_the_producers_values(folder):
    case = Case(folder)
    assert decode_all(case, AwqConfig.parse(case.evidence())) >= len(case.weights())


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("version", ["gemm", "gemv", "marlin"])
@pytest.mark.parametrize("shape", [None, (64, 256)], ids=["tensors-alone", "architecture"])
def test_layouts_with_integer_zero_points_decode_exactly(version, group_size, shape):
    v, tensors, keys = written(version, group_size)
    weight, _ = decode(tensors, shape=shape, **keys)
    assert torch.equal(weight.dequantize(), v.weight())


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("shape", [None, (64, 256)], ids=["tensors-alone", "architecture"])
def test_gemv_fast_is_code_times_scale_plus_offset(group_size, shape):
    v, tensors, keys = written("gemv_fast", group_size)
    weight, _ = decode(tensors, shape=shape, **keys)
    offset = tensors["qzeros"].t().double()[:, v.groups]
    expected = v.codes.double() * v.scales.double()[:, v.groups] + offset
    torch.testing.assert_close(weight.dequantize().double(), expected, rtol=0, atol=16 * 2.0**-22)
    assert weight.zero.dtype is torch.float32


@pytest.mark.parametrize(
    ("k", "group_size", "groups"),
    [(256, 128, 8), (4096, 128, 32), (256, 64, 16), (4096, 64, 64), (1536, 64, 32), (256, 32, 32), (1280, 32, 64)],
)
def test_gemv_layouts_pad_groups_to_vector_loads(k, group_size, groups):
    assert padded_groups(k // group_size, group_size) == groups


@pytest.mark.parametrize("version", ["GEMM", "exllama", "ipex", "Gemm"])
def test_names_of_kernels_mean_the_gemm_layout(version):
    v, tensors, _ = written("gemm", 32)
    assert torch.equal(decode(tensors, version=version)[0].dequantize(), v.weight())


@pytest.mark.parametrize(
    "keys",
    [
        {"version": "llm-awq"},
        {"backend": "llm-awq"},
        {"version": "gemv_fast"},
        {"version": "GEMV_FAST"},
        {"quant_method": "llm-awq", "version": None},
    ],
    ids=str,
)
def test_llm_awq_means_the_gemv_fast_layout(keys):
    _, tensors, _ = written("gemv_fast", 128)
    weight, _ = decode(tensors, group_size=128, **keys)
    assert weight.spec.zero == "float"


def test_short_last_group_is_decoded_where_the_architecture_confirms_it():
    v = numbers(32, 80, 32)
    weight, _ = decode(gemm_tensors(v), shape=(32, 80))
    assert torch.equal(weight.dequantize(), v.weight())


def test_older_spellings_of_the_keys_are_read():
    v, tensors, _ = written("gemm", 64)
    sidecar = {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}
    config = AwqConfig.parse(evidence(None, sidecars={"quant_config.json": sidecar}))
    assert torch.equal(config.decide(view(tensors)).scheme.to_weight(tensors).dequantize(), v.weight())


def test_files_may_spell_the_version_in_another_case_but_not_name_another():
    section = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    sidecar = {"w_bit": 4, "q_group_size": 64, "version": "GEMM"}
    assert AwqConfig.parse(evidence(section, sidecars={"quant_config.json": sidecar})).version == "gemm"
    with pytest.raises(ConflictingConfigError, match="version = 'gemv'"):
        AwqConfig.parse(evidence(section, sidecars={"quant_config.json": {**sidecar, "version": "GEMV"}}))
    with pytest.raises(ConflictingConfigError, match="q_group_size"):
        AwqConfig.parse(evidence(section, sidecars={"quant_config.json": {**sidecar, "q_group_size": 32}}))


def test_symmetric_checkpoint_has_a_constant_zero_point_and_is_checked():
    v = numbers(32, 64, 32, zero=8)
    for keys in ({"zero_point": False}, {"sym": True, "zero_point": None}, {"sym": True, "zero_point": False}):
        weight, _ = decode(gemm_tensors(v), **keys)
        assert weight.zero == 8
        assert torch.equal(weight.dequantize(), v.weight())
    v.zeros[3, 1] = 7
    with pytest.raises(LabelMismatchError, match=r"^qzeros: 1 of 64 zero points are not 8"):
        decode(gemm_tensors(v), zero_point=False)


def test_zero_points_are_used_as_stored():
    v = numbers(32, 64, 32)
    weight, _ = decode(gemm_tensors(v))
    assert torch.equal(weight.zero, v.zeros.short())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_keep_their_type(dtype):
    v, tensors, keys = written("gemm", 32, dtype=dtype)
    weight, _ = decode(tensors, **keys)
    assert weight.scale.dtype is dtype
    assert torch.equal(weight.dequantize(), v.weight())


@pytest.mark.parametrize("version", PACKERS)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.zero_(), "every scale is zero"),
        (lambda s: s[:1, :1].fill_(float("nan")), "NaN"),
        (lambda s: s[:1, :1].fill_(float("-inf")), "infinite"),
    ],
    ids=["zero", "nan", "inf"],
)
def test_scales_that_no_producer_writes_are_refused(version, change, text):
    _, tensors, keys = written(version, 128)
    change(tensors["scales"])
    with pytest.raises(BadValueError, match=text) as caught:
        decode(tensors, **keys)
    assert caught.value.where == "scales"


def test_offset_that_is_not_finite_or_has_no_scale_is_refused():
    _, tensors, keys = written("gemv_fast", 128)
    broken = {**tensors, "qzeros": tensors["qzeros"].clone()}
    broken["qzeros"][0, 0] = float("nan")
    with pytest.raises(BadValueError, match=r"^qzeros: 1 of"):
        decode(broken, **keys)
    tensors["qzeros"][0, 0], tensors["scales"][0, 0] = 1, 0
    with pytest.raises(BadValueError, match=r"^qzeros: 1 offsets"):
        decode(tensors, **keys)


@pytest.mark.parametrize("version", ["gemv", "gemv_fast"])
def test_group_size_that_padding_hides_is_found_in_the_data(version):
    _, tensors, keys = written(version, 128, k=512)
    finer = view(tensors)
    assert problems_of(parse(**{**keys, "group_size": 256}).decide(finer).scheme, finer) == []
    with pytest.raises(BadValueError, match="group_size"):
        decode(tensors, **{**keys, "group_size": 256})
    _, tensors, keys = written(version, 256, k=512)
    with pytest.raises(BadValueError, match="group_size = 128"):
        decode(tensors, **{**keys, "group_size": 128})


@pytest.mark.parametrize("version", PACKERS)
@pytest.mark.parametrize("said", PACKERS)
def test_tensors_of_another_layout_are_refused_by_name(version, said):
    _, tensors, _ = written(version, 128)
    config = parse(group_size=128, version=said, zero_point=said != "marlin")
    if version == said:
        assert problems_of(config.decide(view(tensors)).scheme, view(tensors)) == []
        return
    with pytest.raises(LabelMismatchError, match=f"version '{version}', but the configuration says '{said}'"):
        config.decide(view(tensors))


def test_old_llm_awq_words_are_refused_since_their_order_is_not_known():
    _, tensors, _ = written("gemv", 128)
    with pytest.raises(LabelMismatchError, match="nibble order of its older layouts"):
        parse(group_size=128, backend="llm-awq").decide(view(tensors))


@pytest.mark.parametrize("version", PACKERS)
@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_a_missing_row_shows_in_the_headers(version, name):
    _, tensors, keys = written(version, 128)
    if name not in tensors:
        assert version == "marlin"
        return
    tensors[name] = tensors[name][:-1]
    module = view(tensors, shape=(64, 256))
    assert f"shape {name}" in problems_of(parse(**keys).decide(module).scheme, module)
    alone = view(tensors)
    try:
        found = problems_of(parse(**keys).decide(alone).scheme, alone)
    except ShapeMismatchError as refusal:
        found = [refusal.where]
    assert found


@pytest.mark.parametrize("version", PACKERS)
@pytest.mark.parametrize("group_size", [64, -1])
def test_wrong_group_size_shows_in_the_headers(version, group_size):
    _, tensors, keys = written(version, 32 if version == "gemm" else 128, k=2048)
    module = view(tensors)
    assert problems_of(parse(**{**keys, "group_size": group_size}).decide(module).scheme, module)


@pytest.mark.parametrize(
    ("version", "shape", "text"),
    [
        ("gemm", (60, 256), "N % 8 == 0"),
        ("gemv", (64, 252), "K % 8 == 0"),
        ("gemv_fast", (64, 96), "K % 64 == 0"),
        ("gemv", (64, 272), "group_size 32, 64, 128 or more"),
        ("marlin", (96, 256), "N % 64 == 0"),
    ],
)
def test_sizes_that_a_layout_cannot_hold_are_refused(version, shape, text):
    _, tensors, keys = written(version, 32)
    with pytest.raises(ShapeMismatchError, match=text):
        parse(**keys).decide(view(tensors, shape=shape))


# --- configuration ---
def test_metadata_of_all_producers_is_known():
    parse(
        backend="autoawq", do_fuse=False, fuse_max_seq_len=None, modules_to_fuse=None, exllama_config=None,
        modules_to_not_convert=None, sym=False, checkpoint_format="gemm", format="gemm", desc_act=False,
        lm_head=False, method="awq", pack_dtype="int32", meta={"quantizer": ["gptqmodel:7.7.0"]}, iters=200,
        low_cpu_mem_usage=True, low_gpu_mem_usage=True,
        data_type="int", enable_quanted_input=True, block_name_to_quantize="model.layers", provider="auto-round",
        autoround_version="0.16.1", static_groups=False, is_marlin_format=False, packing_format="auto_round:auto_awq",
        act_bits=16,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bits": 8}, "bits: 8"),
        ({"bits": None, "w_bit": 3}, "w_bit: 3"),
        ({"group_size": 0}, "group_size: 0"),
        ({"version": "gemx"}, "gemx"),
        ({"version": "marlin"}, "zero_point"),
        ({"sym": True}, "zero_point"),
        ({"desc_act": True}, "desc_act"),
        ({"pack_dtype": "int64"}, "pack_dtype"),
        ({"packing_format": "auto_round:auto_gptq"}, "packing_format"),
        ({"modules_to_not_convert": 3}, "modules_to_not_convert"),
        ({"dynamic": {"lm_head": {"bits": 8}}}, "bits: 8"),
        ({"zero_pont": True}, r"zero_pont \(nearest known: zero_point\)"),
        ({"method": "paroquant"}, "method: 'paroquant'"),
        ({"act_bits": 8}, "act_bits"),
        ({"static_kv_dtype": "int4"}, "static_kv_dtype"),
        ({"bits": 5, "version": "gemv"}, "bits: 5"),
        ({"bits": 6, "version": "marlin", "zero_point": False}, "bits: 6"),
    ],
    ids=str,
)
def test_impossible_configuration_is_refused_by_name(changes, text):
    with pytest.raises(ConfigError, match=text):
        parse(**changes)


def test_all_problems_come_at_once():
    with pytest.raises(BitgrainError) as caught:
        parse(bits=3, version="x", nonsense=1)
    assert all(text in str(caught.value) for text in ("bits", "version", "nonsense"))


def scaled_mlp(tmp_path, version, scales, hidden=64, inner=128):
    """A checkpoint without an architecture: up, down and the scales of the activation function between them."""
    _, up, keys = written(version, 128 if version == "marlin" else 32, k=hidden, n=inner)
    _, down, _ = written(version, keys["group_size"], k=inner, n=hidden)
    prefix = "transformer.h.0.mlp"
    tensors = {f"{prefix}.c_fc.{name}": t for name, t in up.items()} | {f"{prefix}.c_proj.{name}": t for name, t in down.items()}
    tensors[f"{prefix}.act.scales"] = scales
    return write_checkpoint(tmp_path / "c", tensors, {"quantization_config": {**BASE, **keys}}), prefix


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast", "marlin"])
def test_scales_of_an_activation_function_belong_to_the_module_that_reads_it(tmp_path, version):
    scales = torch.linspace(0.5, 3.0, 256).half()
    path, prefix = scaled_mlp(tmp_path, version, scales, 128, 256)
    checkpoint = bitgrain.open_checkpoint(path)
    assert checkpoint.plan.modules[f"{prefix}.c_proj"].scheme.transforms_input and not checkpoint.plan.modules[f"{prefix}.c_fc"].scheme.transforms_input
    stored, effective = checkpoint.dequantize(f"{prefix}.c_proj.weight"), checkpoint.effective_weight(f"{prefix}.c_proj.weight")
    assert torch.allclose(effective, stored / scales.float(), rtol=1e-6)
    assert torch.equal(checkpoint.dequantize(f"{prefix}.c_fc.weight"), checkpoint.effective_weight(f"{prefix}.c_fc.weight"))


@pytest.mark.parametrize(("hidden", "inner", "size", "words"), [
    (128, 128, 128, "2 linear modules beside it read that many"),
    (128, 256, 96, "no linear module beside it reads that many"),
])  # fmt: skip
def test_scales_of_an_activation_function_without_one_reader_are_refused(tmp_path, hidden, inner, size, words):
    path, _ = scaled_mlp(tmp_path, "gemm", torch.ones(size).half(), hidden, inner)
    with pytest.raises(UnexpectedTensorError, match=rf"mlp\.act\.scales.*scales of an activation function, and {words}"):
        bitgrain.open_checkpoint(path)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_scale_that_no_activation_can_be_divided_by_is_refused(tmp_path, value):
    scales = torch.ones(256).half()
    scales[7] = value
    path, prefix = scaled_mlp(tmp_path, "gemm", scales, 128, 256)
    with pytest.raises(BadValueError, match=r"mlp\.act\.scales|act_scales"):
        bitgrain.open_checkpoint(path).effective_weight(f"{prefix}.c_proj.weight")


@pytest.mark.parametrize(
    ("changes", "name", "kind"),
    [
        ({"modules_to_not_convert": ["visual", "mlp"]}, "model.layers.0.mlp.up_proj", ModuleKind.LINEAR),
        ({"dynamic": {r"-:.*up_proj": {}}}, "model.layers.0.mlp.up_proj", ModuleKind.LINEAR),
        ({"lm_head": False}, "lm_head", ModuleKind.LM_HEAD),
    ],
    ids=["ignore", "dynamic", "lm_head"],
)
def test_excluded_module_with_quantized_tensors_is_refused_unless_trusted(changes, name, kind):
    _, tensors, _ = written("gemm", 32)
    with pytest.raises(RuleMismatchError, match=name):
        parse(**changes).decide(view(tensors, name, kind=kind))
    trusting = AwqConfig.parse(evidence({**BASE, **changes}))
    trusting.trust_tensors = True
    assert trusting.decide(view(tensors, name, kind=kind)).scheme.weight_spec.bits == 4
    dense = parse(**changes).decide(view({"weight": torch.zeros(4, 4)}, name, kind=kind))
    assert isinstance(dense.scheme, DenseScheme)


def test_ignore_list_matches_whole_segments_and_reports_what_it_used():
    config = parse(modules_to_not_convert=["mlp.gate", "visual"])
    assert not config.rule_for(view({}, "model.layers.0.mlp.gate"))[0]
    assert config.rule_for(view({}, "model.layers.0.mlp.gate_proj"))[0]
    assert set(config.rules()) - config.matched_rules == {"visual"}


def test_module_that_no_list_names_is_dense_if_its_tensors_are():
    choice = parse().decide(view({"weight": torch.zeros(4, 8)}, "lm_head", kind=ModuleKind.LM_HEAD))
    assert isinstance(choice.scheme, DenseScheme)
    assert choice.scheme.shape == (4, 8)
    assert "tensors are dense" in choice.why


def test_override_changes_the_group_size():
    v, tensors, _ = written("gemm", 64)
    config = parse(dynamic={"model": {"group_size": 64}})
    assert torch.equal(config.decide(view(tensors)).scheme.to_weight(tensors).dequantize(), v.weight())


def test_detection_by_method_sidecar_and_tensors():
    assert AwqConfig.detect(evidence(BASE)).score == 100
    assert AwqConfig.detect(evidence({"quant_method": "gptq"})) is None
    assert AwqConfig.detect(evidence(None, sidecars={"quant_config.json": {"w_bit": 4, "q_group_size": 128}})).score == 80
    for version in ("gemm", "gemv_fast"):
        stored = {f"a.{k}": t for k, t in written(version, 128)[1].items()}
        assert AwqConfig.detect(evidence(None, stored)).score == 50
    other = {f"a.{k}": t for k, t in gptq_tensors(numbers(32, 64, 32)).items()}
    assert AwqConfig.detect(evidence(None, other)) is None


@pytest.mark.parametrize("name", ["awq", "awq_marlin", "auto_awq", "llm-awq", "AWQ"])
def test_names_of_other_engines_are_accepted(name):
    assert canonical_name(name) == "awq"
