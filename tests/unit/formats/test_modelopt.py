"""ModelOpt: every algorithm against a naive decoder, both configuration files, mixtures, fused experts, the KV cache, refusals by name."""

import pytest
import torch

from bitgrain.errors import BadValueError, BitgrainError, ConfigError, ConflictingConfigError, MissingTensorError, RuleMismatchError
from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.modelopt import ModelOptConfig
from bitgrain.formats.modelopt.algorithms import ALGORITHMS
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, Transformed
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.golden_cases import problems_of
from tests.unit.formats.synthetic import NAME, evidence, header, ramp, view

E4M3 = torch.float8_e4m3fn
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
FP4_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
ATTENTION = "model.layers.0.self_attn"


def flat(algorithm, **more):
    """quantization_config of config.json."""
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], "producer": PRODUCER, **more}


def sidecar(algorithm, **more):
    """hf_quant_config.json."""
    inner = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"], **more}
    return {"hf_quant_config.json": {"producer": PRODUCER, "quantization": inner}}


def parse(section, tensors=None, sidecars=None):
    """The configuration of a checkpoint that holds one module NAME, or tensors by full name."""
    full = {name if "." in name else f"{NAME}.{name}": t for name, t in (tensors or {}).items()}
    return ModelOptConfig.parse(evidence(section, full, sidecars))


def decode(config, tensors, kind=ModuleKind.LINEAR):
    """(weight, activation) of a module; its headers fit its scheme, with and without a known architecture."""
    module = view(tensors, kind=kind)
    scheme = config.decide(module).scheme
    assert problems_of(scheme, module) == []
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec
    assert scheme.transforms_input == isinstance(weight, Transformed)
    assert config.decide(view(tensors, kind=kind, shape=weight.shape)).scheme == scheme
    return weight, scheme.to_activation(tensors)


def naive_fp4(packed):
    """float32 [N, K] of E2M1 codes, the even column in the low nibble, one by one."""
    rows = []
    for row in packed.tolist():
        nibbles = [n for byte in row for n in (byte & 15, byte >> 4)]
        rows.append([(-1 if n > 7 else 1) * FP4_VALUES[n % 8] for n in nibbles])
    return torch.tensor(rows, dtype=torch.float32)


def naive_int4(packed):
    """float32 [N, K] of two's complement nibbles, row 2r low and row 2r + 1 high in byte row r."""
    rows = []
    for row in packed.tolist():
        rows += [[(v & 15) - 16 * ((v & 15) > 7) for v in row], [(v >> 4) - 16 * ((v >> 4) > 7) for v in row]]
    return torch.tensor(rows, dtype=torch.float32)


def repeated(scale, group, k):
    return scale.float().repeat_interleave(group, 1)[:, :k]


def some_bytes(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.uint8)


def positive(*shape):
    return ramp(*shape).abs() + 0.01


def module_of(algorithm, n=12, k=128, group=None):
    """Tensors of a module as the producer stores them, and its float32 values by the naive decoders."""
    known = ALGORITHMS[algorithm.upper()]
    group = group or known.group
    scalar = torch.tensor
    held, want = {}, None
    if known.storage == "float8":
        weight = (ramp(n, k) * 300).to(E4M3)
        if known.strategy == "tensor":
            scale = scalar(0.003)
            want = weight.float() * scale
        elif known.strategy == "channel":
            scale = positive(n)
            want = weight.float() * scale[:, None]
        else:
            scale = positive(-(-n // group), 1, -(-k // group), 1)
            want = weight.float() * repeated(scale[:, 0, :, 0].repeat_interleave(group, 0)[:n], group, k)
        held = {"weight": weight, "weight_scale": scale}
    elif known.storage == "int8":
        held = {"weight": some_bytes(n, k).view(torch.int8), "weight_scale": positive(n)}
        want = held["weight"].float() * held["weight_scale"][:, None]
    elif known.storage == "int4":
        held = {"weight": some_bytes(n // 2, k), "weight_scale": positive(n, -(-k // group))}
        want = naive_int4(held["weight"]) * repeated(held["weight_scale"], group, k)
    elif known.storage == "fp4_e4m3":
        held = {"weight": some_bytes(n, k // 2), "weight_scale": (positive(n, k // group) * 100).to(E4M3)}
        want = naive_fp4(held["weight"]) * repeated(held["weight_scale"].float() * 2e-4, group, k)
    else:
        exponents = 110 + some_bytes(n, k // 32) % 16
        eight = known.storage == "fp8_e8m0"
        held = {"weight": (ramp(n, k) * 300).to(E4M3) if eight else some_bytes(n, k // 2), "weight_scale": exponents}
        want = (held["weight"].float() if eight else naive_fp4(held["weight"])) * repeated(2.0 ** (exponents.double() - 127), 32, k)
    if known.second:
        held["weight_scale_2"] = scalar(2e-4)
    if known.activation.second_scale == "static" or not known.activation.dynamic:
        held["input_scale"] = scalar(0.02)
    if known.low_rank:
        held |= {"weight_quantizer._svdquant_lora_a": ramp(4, k), "weight_quantizer._svdquant_lora_b": ramp(n, 4)}
    return held, want


@pytest.mark.parametrize("folder", golden_folders("modelopt"), ids=lambda p: p.name)
def test_golden_module_equals_golden(folder):
    assert check_golden(folder) > 0


# --- what tensors mean --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ["mxfp4", "fp8_pb_wo", *ALGORITHMS])
def test_every_algorithm_equals_the_naive_decoder(algorithm):
    tensors, want = module_of(algorithm)
    weight, _ = decode(parse(flat(algorithm), tensors), tensors)
    torch.testing.assert_close(weight.dequantize(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("algorithm", "n", "k", "group"),
    [("FP8", 7, 13, None), ("FP8_PER_CHANNEL_PER_TOKEN", 1, 5, None), ("fp8_pb_wo", 200, 130, None), ("fp8_pb_wo", 96, 64, 32),
     ("W8A16", 3, 9, None), ("W4A16_AWQ", 6, 96, 96), ("W4A16_AWQ", 6, 192, 64), ("NVFP4", 5, 48, None), ("W4A16_NVFP4", 5, 96, 32),
     ("W4A8_NVFP4_FP8", 5, 96, None)],
)  # fmt: skip
def test_other_sizes_and_groups_are_read_with_and_without_a_stated_group(algorithm, n, k, group):
    tensors, want = module_of(algorithm, n, k, group)
    stated = {"group_size": group} if group else {}
    for config in (
        parse(flat(algorithm, **stated), tensors),
        parse(None, tensors, sidecar(algorithm, **stated)),
        parse(flat(algorithm), tensors),
    ):
        torch.testing.assert_close(decode(config, tensors)[0].dequantize(), want, rtol=1e-6, atol=0)


def test_group_is_not_guessed_from_one_damaged_module():
    good, _ = module_of("fp8_pb_wo", 192, 128)
    other, _ = module_of("fp8_pb_wo", 256, 128)
    bad = {**good, "weight_scale": good["weight_scale"][:1]}  # alone it would fit blocks of 256
    tensors = {**{f"{NAME}.{k}": v for k, v in bad.items()}, **{f"model.layers.1.mlp.down_proj.{k}": v for k, v in other.items()}}
    module = view(bad)
    problems = problems_of(parse(flat("fp8_pb_wo"), tensors).decide(module).scheme, module)
    assert "weight_scale" in str(problems)


def test_int4_rows_alternate_between_nibbles_in_twos_complement():
    tensors = {"weight": torch.tensor([[0xF1, 0x87]], dtype=torch.uint8), "weight_scale": torch.tensor([[2.0], [1.0]])}
    weight, _ = decode(parse(flat("W4A16_AWQ", group_size=2), tensors), tensors)
    assert weight.dequantize().tolist() == [[2.0, 14.0], [-1.0, -8.0]]


def test_second_scale_of_int4_is_not_part_of_the_weight():
    tensors, want = module_of("W4A8_AWQ")
    for second in (1e-4, 3.0):
        tensors["weight_scale_2"] = torch.tensor(second)
        assert torch.equal(decode(parse(flat("W4A8_AWQ"), tensors), tensors)[0].dequantize(), want)


@pytest.mark.parametrize("algorithm", ["W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL", "NVFP4_AWQ"])
@pytest.mark.parametrize("shape", [(128,), (1, 128)])
def test_pre_quant_scale_multiplies_the_input(algorithm, shape):
    tensors, want = module_of(algorithm)
    factor = positive(*shape).bfloat16()
    tensors["pre_quant_scale"] = factor
    weight, activation = decode(parse(flat(algorithm), tensors), tensors)
    assert isinstance(weight, Transformed)
    torch.testing.assert_close(weight.dequantize(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.effective(), want * factor.float().reshape(1, -1), rtol=1e-5, atol=1e-7)
    assert activation.is_none == (algorithm == "W4A16_AWQ")


@pytest.mark.parametrize("prefix", ["", "weight_quantizer._"])
def test_low_rank_factors_are_added_after_the_input_was_scaled(prefix):
    tensors, want = module_of("NVFP4_SVD")
    down, up = tensors.pop("weight_quantizer._svdquant_lora_a"), tensors.pop("weight_quantizer._svdquant_lora_b")
    tensors |= {f"{prefix}svdquant_lora_a": down, f"{prefix}svdquant_lora_b": up, "pre_quant_scale": positive(128)}
    config = parse(flat("NVFP4_SVD", lora_rank=4), tensors)
    weight, _ = decode(config, tensors)
    torch.testing.assert_close(weight.effective(), (want + up @ down) * tensors["pre_quant_scale"], rtol=1e-4, atol=1e-5)
    assert config.split_name(f"{NAME}.{prefix}svdquant_lora_a") == (NAME, f"{prefix}svdquant_lora_a")
    for missing in (f"{prefix}svdquant_lora_a", f"{prefix}svdquant_lora_b"):
        module = view({k: v for k, v in tensors.items() if k != missing})
        assert missing in str(problems_of(config.decide(module).scheme, module))


# --- activations --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("algorithm", "shown"),
    [("FP8", "fp8_e4m3fn tensor static"), ("FP8_PER_CHANNEL_PER_TOKEN", "fp8_e4m3fn token dynamic"), ("fp8_pb_wo", "16-bit"),
     ("NVFP4", "fp4_e2m1 g16 dynamic e4m3 x static tensor"), ("W4A16_NVFP4", "16-bit"), ("W4A8_NVFP4_FP8", "fp8_e4m3fn tensor static"),
     ("mxfp4", "fp4_e2m1 g32 dynamic e8m0"), ("MXFP8", "fp8_e4m3fn g32 dynamic e8m0"), ("W4A16_AWQ", "16-bit"),
     ("W4A8_AWQ", "fp8_e4m3fn tensor static"), ("W8A8_SQ_PER_CHANNEL", "int8 tensor static"), ("W8A16", "16-bit")],
)  # fmt: skip
def test_activation_belongs_to_the_algorithm(algorithm, shown):
    tensors, _ = module_of(algorithm)
    _, activation = decode(parse(flat(algorithm), tensors), tensors)
    assert activation.describe() == shown
    if "input_scale" in tensors:
        assert pytest.approx(0.02) == (activation.second if "x static" in shown else activation.scale)


def test_block_scale_of_an_nvfp4_input_is_rounded_below_the_input_scale():
    tensors, _ = module_of("NVFP4")
    _, activation = decode(parse(flat("NVFP4"), tensors), tensors)
    x = ramp(3, 128)
    _, scale, _ = activation.quantize(x)
    want = (x.view(3, 8, 16).abs().amax(-1) / 6 / 0.02).to(E4M3).float() * 0.02
    torch.testing.assert_close(scale, want)


def test_power_of_two_of_an_mx_input_is_rounded_up():
    tensors, _ = module_of("mxfp4")
    _, activation = decode(parse(flat("mxfp4"), tensors), tensors)
    x = torch.zeros(1, 32)
    x[0, 3] = 6.5
    assert activation.quantize(x)[1].item() == 2.0


def test_mxfp4_with_fp8_inputs_is_dynamic_unless_a_scale_is_stored():
    tensors, _ = module_of("W4A8_MXFP4_FP8")
    assert decode(parse(flat("W4A8_MXFP4_FP8"), tensors), tensors)[1].scale == pytest.approx(0.02)
    del tensors["input_scale"]
    assert decode(parse(flat("W4A8_MXFP4_FP8"), tensors), tensors)[1] == ActivationSpec("fp8_e4m3fn", "tensor")


def test_embedding_has_no_input_to_quantize():
    tensors, want = module_of("FP8")
    del tensors["input_scale"]
    weight, activation = decode(parse(flat("FP8"), tensors), tensors, ModuleKind.EMBEDDING)
    assert activation == NO_ACTIVATION and torch.equal(weight.dequantize(), want)


# --- configuration ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("section", "sidecars", "score"),
    [(flat("FP8"), None, 100), ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}, None, 100),
     ({"quant_algo": "FP8", "producer": PRODUCER}, None, 90), (None, sidecar("FP8"), 80), ({"quantization": {"quant_algo": "FP8"}}, None, 90),
     ({"quant_method": "fp8"}, sidecar("FP8"), None), (None, None, None), (None, {"quantize_config.json": {"bits": 4}}, None)],
)  # fmt: skip
def test_detection(section, sidecars, score):
    found = ModelOptConfig.detect(evidence(section, {}, sidecars))
    assert (found.score if found else None) == score


@pytest.mark.parametrize("word", ["nvfp4", "NVFP4", "nvfp4_static"])
def test_algorithm_is_read_in_any_case_and_spelling(word):
    tensors, want = module_of("NVFP4")
    nested = {"producer": PRODUCER, "quantization": {"quant_algo": word, "exclude_modules": ["lm_head"]}}
    for config in (parse(flat(word), tensors), parse(None, tensors, sidecar(word, group_size=16)), parse(nested, tensors)):
        torch.testing.assert_close(decode(config, tensors)[0].dequantize(), want, rtol=1e-6, atol=0)


def test_both_files_may_say_the_same_in_their_own_words():
    mine = flat(
        "FP8", kv_cache_scheme={"dynamic": False, "num_bits": 8, "type": "float"}, config_groups={"group_0": {"targets": ["Linear"]}}
    )
    config = parse(mine, None, sidecar("FP8", kv_cache_quant_algo="FP8"))
    assert (config.cache, config.recipe.algorithm) == ("fp8_e4m3fn", "FP8")
    assert parse(flat("FP8"), None, sidecar("FP8", kv_cache_quant_algo="FP8")).cache == "fp8_e4m3fn"


@pytest.mark.parametrize(
    ("mine", "theirs", "key"),
    [(flat("FP8"), sidecar("NVFP4"), "quant_algo"), (flat("FP8", ignore=["a"]), sidecar("FP8"), "ignore"),
     (flat("FP8", kv_cache_scheme="NVFP4"), sidecar("FP8", kv_cache_quant_algo="FP8"), "kv_cache_scheme"),
     (flat("NVFP4", group_size=32), sidecar("NVFP4", group_size=16), "group_size"),
     (flat("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "FP8"}}),
      sidecar("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "NVFP4"}}), "quantized_layers")],
)  # fmt: skip
def test_files_that_disagree_are_refused(mine, theirs, key):
    with pytest.raises(ConflictingConfigError, match=key):
        parse(mine, None, theirs)


@pytest.mark.parametrize(
    ("section", "words"),
    [(flat("FP9"), "FP9.*FP8"), (flat("FP8", kv_cache_scheme="FP5"), "FP5"), (flat("FP8", ignored=["x"]), "ignored.*ignore"),
     (flat("NVFP4", group_size=-3), "group_size"), (flat("W4A16_AWQ", has_zero_point=True), "has_zero_point"), (flat(4), "quant_algo"),
     (flat("FP8", kv_cache_scheme={"num_bits": 4, "type": "int"}), "kv_cache_scheme"), (flat("MIXED_PRECISION"), "quantized_layers"),
     (flat("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "FP8", "grup_size": 1}}), "grup_size")],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(section, words):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        parse(section)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [("lm_head", "lm_head", True), ("*router*", "model.layers.0.mlp.router.dense", True), ("model.layers.0*", "model.layers.0.mlp.up_proj", True),
     ("model.layers.1.mlp.gate", "model.layers.1.mlp.gate", True), ("model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj", False),
     ("model.layers.1", "model.layers.10.mlp.up_proj", False), ("model.layers.0.self_attn", "model.layers.0.self_attn.q_proj", True),
     ("router", "model.layers.3.mlp.router", True), ("proj", "model.layers.0.mlp.up_proj", False)],
)  # fmt: skip
def test_exclusions_are_wildcards_or_whole_segments(pattern, name, matches):
    config = parse(flat("FP8", ignore=[pattern]))
    module = ModuleView(name, ModuleKind.LINEAR, {"weight": header(f"{name}.weight", torch.zeros(2, 2))})
    assert config.rule_for(module)[0] != matches
    assert (pattern in config.matched_rules) == matches


def test_excluded_module_with_quantized_tensors_is_refused_unless_trusted():
    tensors, want = module_of("FP8")
    config = parse(flat("FP8", ignore=[NAME]), tensors)
    with pytest.raises(RuleMismatchError, match=NAME):
        config.decide(view(tensors))
    config.trust_tensors = True
    assert torch.equal(config.decide(view(tensors)).scheme.to_weight(tensors).dequantize(), want)


def test_mixed_checkpoint_decides_per_module_parent_or_wildcard():
    layers = {NAME: {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False, "pre_quant_scale": True},
              "model.layers.0.mlp.experts": {"quant_algo": "nvfp4_static", "group_size": 16}, "*.self_attn.*": {"quant_algo": "FP8"}}  # fmt: skip
    config = parse(flat("MIXED_PRECISION", ignore=[], quantized_layers=layers))
    for name, algorithm, group in (
        (NAME, "W4A16_AWQ", 64),
        ("model.layers.0.mlp.experts.3.up_proj", "NVFP4", None),
        (f"{ATTENTION}.q_proj", "FP8", None),
    ):
        tensors, want = module_of(algorithm, group=group)
        scheme = config.decide(view(tensors, name)).scheme
        torch.testing.assert_close(scheme.to_weight(tensors).dequantize(), want, rtol=1e-6, atol=0)
    dense = view({"weight": torch.zeros(4, 4, dtype=torch.bfloat16)}, "model.layers.1.mlp.up_proj")
    assert "does not name it" in config.decide(dense).why
    with pytest.raises(RuleMismatchError, match="up_proj"):
        config.decide(view(module_of("FP8")[0], "model.layers.1.mlp.up_proj"))


@pytest.mark.parametrize("algorithm", ["W4A8_NVFP4_FP8", "NVFP4", "mxfp4", "W4A16_AWQ", "fp8_pb_wo"])
def test_mixed_checkpoint_without_group_sizes_has_the_usual_ones(algorithm):
    tensors, want = module_of(algorithm, k=256)
    config = parse(flat("MIXED_PRECISION", quantized_layers={NAME: {"quant_algo": algorithm}}), tensors)
    torch.testing.assert_close(decode(config, tensors)[0].dequantize(), want, rtol=1e-6, atol=0)


def test_checkpoint_may_quantize_its_cache_alone():
    config = parse(
        {"quant_method": "modelopt", "ignore": [], "kv_cache_scheme": "FP8"},
        None,
        sidecar(None, exclude_modules=[], kv_cache_quant_algo="FP8"),
    )
    assert config.cache == "fp8_e4m3fn"
    assert not config.rule_for(view({"weight": torch.zeros(2, 2)}))[0]


# --- fused experts ------------------------------------------------------------------------------------------------------
def stacked(count, size, hidden, turned):
    """NVFP4 experts of a layer stored together, and each projection's values; gate rows before up rows."""
    base, held, want = "model.layers.0.mlp.experts", {}, {}
    for projection, n, k in (("gate_up_proj", 2 * size, hidden), ("down_proj", hidden, size)):
        parts = [module_of("NVFP4", n, k) for _ in range(count)]
        codes = torch.stack([p["weight"].roll(e, 0) for e, (p, _) in enumerate(parts)])
        scales = torch.stack([p["weight_scale"].view(torch.uint8).roll(e, 0) for e, (p, _) in enumerate(parts)])
        for e in range(count):
            value = naive_fp4(codes[e]) * repeated(scales[e].view(E4M3).float() * 2e-4, 16, k)
            names = ("gate_proj", "up_proj") if n != hidden or projection == "gate_up_proj" else ("down_proj",)
            want |= {f"{base}.{e}.{name}": part for name, part in zip(names, value.chunk(len(names)), strict=True)}
        turn = (lambda t: t.transpose(1, 2).contiguous()) if turned else (lambda t: t)
        held |= {f"{base}.{projection}": turn(codes), f"{base}.{projection}_weight_scale": turn(scales).view(E4M3),
                 f"{base}.{projection}_weight_scale_2": torch.tensor(2e-4), f"{base}.{projection}_input_scale": torch.full((count,), 0.02)}  # fmt: skip
    return held, want


@pytest.mark.parametrize("turned", [True, False])
def test_experts_stored_together_are_divided_into_modules(turned):
    held, want = stacked(3, 48, 32, turned)
    config = parse(flat("NVFP4"), held)
    headers = {name: header(name, t) for name, t in held.items()}
    for stack in (ExpertStack(3, 32, 48, transposed=turned), *([None] if turned else [])):
        parts = config.parts(headers, stack)
        assert {part.source for part in parts.values()} == set(held)
        for module, value in want.items():
            tensors = {local: parts[f"{module}.{local}"].of(held[parts[f"{module}.{local}"].source]).contiguous() for local in
                       ("weight", "weight_scale", "weight_scale_2", "input_scale")}  # fmt: skip
            assert [parts[f"{module}.{local}"].header.shape for local in tensors] == [tuple(t.shape) for t in tensors.values()]
            weight, _ = decode(config, tensors, ModuleKind.EXPERT)
            torch.testing.assert_close(weight.dequantize(), value, rtol=1e-6, atol=0)


def test_one_number_stands_for_all_experts_and_fp8_follows_the_architecture():
    base = "model.layers.0.mlp.experts.gate_up_proj"
    held = {base: (ramp(2, 32, 8) * 300).to(E4M3), f"{base}_weight_scale": torch.tensor(0.01), f"{base}_input_scale": torch.tensor(0.5)}
    parts = parse(flat("FP8"), held).parts({name: header(name, t) for name, t in held.items()}, ExpertStack(2, 32, 4))
    up = parts["model.layers.0.mlp.experts.1.up_proj.weight"]
    assert torch.equal(up.of(held[base]).float(), held[base][1].float().t()[4:])
    assert parts["model.layers.0.mlp.experts.1.up_proj.weight_scale"].of(held[f"{base}_weight_scale"]).tolist() == pytest.approx([0.01])


# --- the KV cache -------------------------------------------------------------------------------------------------------
def cache_module(**tensors):
    names = {"k": "k_proj.k_scale", "v": "v_proj.v_scale", "k_bias": "k_proj.k_bias", "v_bias": "v_proj.v_bias"}
    full = {f"{ATTENTION}.{names[which]}": t for which, t in tensors.items()}
    return full, ModuleView(ATTENTION, ModuleKind.ATTENTION, {name: header(name, t) for name, t in full.items()})


@pytest.mark.parametrize(
    ("word", "element"),
    [("FP8", "fp8_e4m3fn"), ("NVFP4", "nvfp4"), ({"num_bits": 8, "type": "float", "dynamic": False}, "fp8_e4m3fn"),
     ({"num_bits": 4, "type": "float", "group_size": 16}, "nvfp4"), ("int8", "int8")],
)  # fmt: skip
def test_cache_type_and_scales_are_read(word, element):
    full, module = cache_module(k=torch.tensor(0.1), v=torch.tensor([0.2]))
    found = parse(flat("FP8", kv_cache_scheme=word), full).get_kv_cache_scheme(module)
    assert (found.element, [which for _, which in found.scales]) == (element, ["k", "v"])


def test_affine_cache_needs_both_biases_of_the_projections_size():
    numbers = {"k": torch.tensor(0.1), "v": torch.tensor(0.2), "k_bias": torch.zeros(1, 2, 1, 4), "v_bias": torch.zeros(1, 2, 1, 4)}
    full, module = cache_module(**numbers)
    weights = {f"{ATTENTION}.{p}_proj.weight": torch.zeros(8, 8, dtype=torch.uint8) for p in "kv"}
    config = parse(flat("NVFP4", kv_cache_scheme="NVFP4_AFFINE"), full | weights)
    assert {which for _, which in config.get_kv_cache_scheme(module).scales} == {"k", "v", "k_bias", "v_bias"}
    full, module = cache_module(**(numbers | {"v_bias": torch.zeros(1, 4, 1, 4)}))
    with pytest.raises(BitgrainError, match=r"v_proj\.v_bias.*"):
        parse(flat("NVFP4", kv_cache_scheme="NVFP4_AFFINE"), full | weights).get_kv_cache_scheme(module)
    full, module = cache_module(**{k: v for k, v in numbers.items() if k != "v_bias"})
    with pytest.raises(MissingTensorError, match=r"v_proj\.v_bias"):
        parse(flat("FP8", kv_cache_scheme="FP8"), full).get_kv_cache_scheme(module)


def test_one_of_two_scales_is_an_error_and_a_layer_without_both_stays_16_bit():
    full, module = cache_module(k=torch.tensor(0.1))
    config = parse(flat("FP8", kv_cache_scheme="FP8"), full)
    with pytest.raises(MissingTensorError, match=r"v_proj\.v_scale"):
        config.get_kv_cache_scheme(module)
    assert config.get_kv_cache_scheme(ModuleView("model.layers.1.self_attn", ModuleKind.ATTENTION, {})).element == "none"


def test_checkpoint_without_any_cache_scale_has_the_fixed_one():
    found = parse(flat("FP8", kv_cache_scheme="FP8")).get_kv_cache_scheme(ModuleView(ATTENTION, ModuleKind.ATTENTION, {}))
    assert (found.element, found.fixed_scale, found.scales) == ("fp8_e4m3fn", 1.0, ())


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(1, dtype=torch.int32)])
def test_cache_scale_of_a_wrong_shape_or_type_is_refused(wrong):
    full, module = cache_module(k=torch.tensor(0.1), v=wrong)
    with pytest.raises(BitgrainError, match=r"v_proj\.v_scale"):
        parse(flat("FP8", kv_cache_scheme="FP8"), full).get_kv_cache_scheme(module)


# --- refusals -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_missing_extra_and_misshapen_tensors_are_found_in_headers(algorithm):
    tensors, _ = module_of(algorithm)
    config, shape = parse(flat(algorithm), tensors), (12, 128)
    optional = {"input_scale"} if algorithm == "W4A8_MXFP4_FP8" else set()
    for name, tensor in tensors.items():
        doubled = torch.stack([tensor.reshape(-1).view(torch.uint8)] * 2) if tensor.dtype.itemsize == 1 else torch.stack([tensor, tensor])
        for changed in (None, doubled.view(tensor.dtype), torch.zeros(tensor.shape, dtype=torch.int16)):
            held = {**tensors, name: changed} if changed is not None else {k: v for k, v in tensors.items() if k != name}
            if changed is None and name in optional:
                continue
            module = view(held, shape=shape)
            assert name in str(problems_of(config.decide(module).scheme, module)), (name, changed is None)
    module = view({**tensors, "input_rotation": torch.zeros(4, 4)}, shape=shape)
    assert "input_rotation" in str(problems_of(config.decide(module).scheme, module))


def test_pre_quant_scale_that_other_layers_have_must_be_there():
    tensors, _ = module_of("W4A16_AWQ")
    other = {f"model.layers.7.mlp.down_proj.{k}": v for k, v in (tensors | {"pre_quant_scale": positive(128)}).items()}
    module = view(tensors)
    assert "pre_quant_scale" in str(problems_of(parse(flat("W4A16_AWQ"), other).decide(module).scheme, module))
    assert problems_of(parse(flat("W4A16_AWQ"), tensors).decide(module).scheme, module) == []


@pytest.mark.parametrize(
    ("algorithm", "name", "value"),
    [("FP8", "weight_scale", float("nan")), ("FP8", "weight_scale", -1.0), ("FP8", "weight_scale", 0.0), ("FP8", "input_scale", 0.0),
     ("NVFP4", "weight_scale_2", 0.0), ("NVFP4", "weight_scale_2", float("inf")), ("NVFP4", "input_scale", float("nan")),
     ("W4A8_AWQ", "weight_scale_2", -1.0), ("W4A16_AWQ", "weight_scale", float("nan")), ("W8A16", "weight_scale", -0.5),
     ("W4A16_AWQ", "pre_quant_scale", 0.0), ("NVFP4_SVD", "weight_quantizer._svdquant_lora_a", float("nan")), ("MXFP8", "weight_scale", 255),
     ("NVFP4", "weight_scale", float("nan"))],
)  # fmt: skip
def test_impossible_values_are_refused_by_name(algorithm, name, value):
    tensors, _ = module_of(algorithm)
    tensors.setdefault(name, positive(128))
    bad = tensors[name].float()
    bad.view(-1)[0] = value
    tensors[name] = bad.to(tensors[name].dtype)
    scheme = parse(flat(algorithm), tensors).decide(view(tensors)).scheme
    with pytest.raises(BadValueError) as problem:
        scheme.to_weight(tensors)
        scheme.to_activation(tensors)
    assert problem.value.where == name


def test_examples_cover_every_algorithm():
    labels = [label for label, _, _ in ModelOptConfig.examples()]
    assert len(labels) == len(ALGORITHMS) - 1
    assert any("W4A4" in label for label in labels) and any("W8A8 int8" in label for label in labels)
