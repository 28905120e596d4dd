"""Quark's configuration: detection, every spelling, precedence of rules, cache, rotation, plain weights, refusals by name."""

import pytest
import torch

from bitgrain.errors import BadValueError, BitgrainError, ConfigError, ConflictingConfigError, RuleMismatchError
from bitgrain.formats.awq import AwqConfig
from bitgrain.formats.base import DenseScheme, ModuleKind, ModuleView
from bitgrain.formats.fp8 import FP8Config
from bitgrain.formats.fp8.schemes import Float8Scheme
from bitgrain.formats.quark import QuarkConfig
from bitgrain.formats.quark.schemes.rotated import RotatedScheme
from bitgrain.weights import ActivationSpec
from tests.unit.formats.golden_cases import problems_of
from tests.unit.formats.synthetic import NAME, evidence, header, view

ATTENTION = "model.layers.0.self_attn"
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "symmetric": True, "ch_axis": None, "group_size": None}
PTPC = FP8 | {"qscheme": "per_channel", "ch_axis": 0}
INT8 = FP8 | {"dtype": "int8"}
MXFP4 = FP8 | {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0", "symmetric": None}


def layer(weight=None, inputs=None, outputs=None, bias=None):
    return {"weight": weight, "input_tensors": inputs, "output_tensors": outputs, "bias": bias, "target_device": None}


def section(weight=FP8, **more):
    return {"quant_method": "quark", "global_quant_config": layer(weight), "exclude": ["lm_head"], "version": "0.13"} | more


def parse(weight=FP8, **more):
    return QuarkConfig.parse(evidence(section(weight, **more)))


def fp8_module(n=32, k=64, scale=(), **more):
    return {"weight": torch.ones(n, k).to(torch.float8_e4m3fn), "weight_scale": torch.full(scale, 0.5), **more}


def attention(*names):
    """The view of an attention module that holds these full names."""
    return ModuleView(ATTENTION, ModuleKind.ATTENTION, {f"{ATTENTION}.{n}": header(f"{ATTENTION}.{n}", torch.ones(())) for n in names})


# --- detection and spelling --------------------------------------------------------------------------------------


def test_a_named_method_and_the_oldest_files_without_one_are_detected():
    assert QuarkConfig.detect(evidence(section())).score == 100
    unnamed = section(export={"kv_cache_group": []})
    del unnamed["quant_method"]
    assert QuarkConfig.detect(evidence(unnamed)).score == 90
    assert QuarkConfig.parse(evidence(unnamed)).everywhere.quantizes_weight
    assert QuarkConfig.detect(evidence({"global_quant_config": {}})) is None
    assert QuarkConfig.detect(evidence({**unnamed, "quant_method": "fp8"})) is None
    assert QuarkConfig.detect(evidence(None)) is None


def test_older_spellings_mean_the_same():
    older = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "dynamic": False, "axis": 0, "group_size": None, "symmetric": True}
    written = {"exclude": None, "layer_quant_config": None, "layer_type_quant_config": None, "algo_config": None}
    assert parse(older, **written).everywhere == parse(PTPC).everywhere


def test_what_says_nothing_about_tensors_passes():
    noted = {"round_method": "half_even", "observer_cls": "PerTensorMinMaxObserver", "enable_buffer_reuse": False, "max_input_numel": 4194304}
    export = {"pack_method": "order", "weight_format": "real_quantized", "kv_cache_group": [], "min_kv_scale": 0.0, "weight_merge_groups": [["*q_proj"]]}
    config = parse(FP8 | noted, export=export, quant_mode="eager_mode", kv_cache_post_rope=False, algo_config=[{"name": "awq", "scaling_layers": []}])
    assert (config.reorder, config.fake, config.legacy) == (False, False, False)
    assert parse().reorder


REFUSED = {
    "unknown-key": (section(globl_quant_config={"weight": None}), "globl_quant_config .nearest known: global_quant_config"),
    "unknown-spec-key": (section(FP8 | {"group_sise": 3}), r"global_quant_config\.weight: unknown keys: group_sise"),
    "unknown-layer-key": (section(layer_quant_config={"a": {"weigth": FP8}}), r"layer_quant_config\['a'\]: unknown keys: weigth"),
    "unknown-export-key": (section(export={"pack_methd": "order"}), "export: unknown keys: pack_methd"),
    "pack-method": (section(export={"pack_method": "shuffle"}), r"export\.pack_method: 'shuffle'"),
    "weight-format": (section(export={"weight_format": "dequantized"}), r"export\.weight_format: 'dequantized'"),
    "dtype": (section(FP8 | {"dtype": "fp7"}), r"weight\.dtype: 'fp7'"),
    "no-dtype": (section({"qscheme": "per_tensor"}), r"weight\.dtype: None"),
    "qscheme": (section(FP8 | {"qscheme": "per_row"}), r"weight\.qscheme: 'per_row'"),
    "axis": (section(PTPC | {"ch_axis": 1}), "global_quant_config.weight: fp8_e4m3 per_channel"),
    "pair": (section(FP8 | {"dtype": "fp4"}), "global_quant_config.weight: fp4 per_tensor"),
    "integer-blocks": (section(INT8 | {"qscheme": "per_block", "block_size": [8, 8]}), "int8 per_block"),
    "dynamic-weight": (section(FP8 | {"is_dynamic": True}), "fp8_e4m3 per_tensor dynamic"),
    "wide-integer": (section(FP8 | {"dtype": "int16"}), "int16 per_tensor"),
    "unstored": (section({"dtype": "mx6", "ch_axis": -1, "group_size": 16}), "(?s)mx6.*cannot store this type"),
    "mx-int8": (section({"dtype": "mx", "mx_element_dtype": "int8", "ch_axis": -1, "group_size": 32}), "global_quant_config.weight: mx"),
    "three-stages": (section([FP8, INT8, INT8]), r"global_quant_config\.weight: .*\n.*a specification, or a list of two"),
    "two-floats": (section([FP8, FP8]), "fp8_e4m3 per_tensor then fp8_e4m3 per_tensor"),
    "lossy-two-level": (section([MXFP4 | {"scale_format": "float32"}, FP8 | {"dtype": "fp8_e5m3", "is_scale_quant": True}]), "fp8_e5m3 per_tensor of scales"),
    "outputs": (section(global_quant_config=layer(FP8, None, FP8)), r"global_quant_config\.output_tensors"),
    "layer-outputs": (section(layer_quant_config={"*o_proj": layer(FP8, None, FP8)}), r"layer_quant_config\['\*o_proj'\]\.output_tensors"),
    "bias": (section(global_quant_config=layer(FP8, bias=FP8)), r"global_quant_config\.bias"),
    "inputs-alone": (section(global_quant_config=layer(None, FP8)), r"global_quant_config\.weight: null"),
    "cache-per-token": (section(kv_cache_quant_config={"*k_proj": layer(None, None, PTPC)}), r"kv_cache_quant_config\['\*k_proj'\]\.output_tensors"),
    "regex": (section(exclude=["re:("]), "exclude: 're:|exclude: '[(]"),
    "not-an-object": (section(global_quant_config=[1]), "global_quant_config: a list"),
}  # fmt: skip


@pytest.mark.parametrize(("configuration", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_impossible_configuration_is_refused_by_name(configuration, match):
    with pytest.raises(BitgrainError, match=match):
        QuarkConfig.parse(evidence(configuration))


def test_every_problem_is_reported_at_once():
    with pytest.raises(BitgrainError, match=r"(?s)pack_method.*weight\.dtype|weight\.dtype.*pack_method"):
        parse(FP8 | {"dtype": "fp7"}, export={"pack_method": "shuffle"})


EXPORT = {"kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder", "weight_format": "real_quantized", "weight_merge_groups": None}


def test_exports_for_readers_of_other_formats_are_read_as_those():
    float8 = {"quant_method": "fp8", "ignored_layers": ["lm_head"], "kv_cache_scheme": None, "export": EXPORT}
    assert FP8Config.parse(evidence(float8 | {"activation_scheme": "static"})).activation == "static"
    assert FP8Config.parse(evidence(float8 | {"activation_scheme": None})).activation == "none"
    four = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"], "export": EXPORT}
    assert AwqConfig.parse(evidence(four | {"pack_method": "reorder"})).group_size == 32
    with pytest.raises(ConfigError, match="pack_method: 'order'"):
        AwqConfig.parse(evidence(four | {"pack_method": "order"}))


# --- which specification a module gets ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [NAME, "*down_proj", "model.layers.?.mlp.*", r"re:model\.layers\.\d+\.mlp"])
def test_excluded_modules_are_dense_in_every_spelling_of_the_rule(rule):
    config = parse(exclude=[rule, "never"])
    choice = config.decide(view({"weight": torch.ones(4, 4)}))
    assert isinstance(choice.scheme, DenseScheme) and repr(rule) in choice.why
    assert config.matched_rules == {rule} and "never" in config.rules()
    with pytest.raises(RuleMismatchError, match=NAME):
        config.decide(view(fp8_module()))
    config.trust_tensors = True
    assert isinstance(config.decide(view(fp8_module())).scheme, Float8Scheme)


def test_a_rule_without_a_wildcard_does_not_cover_children():
    assert parse(exclude=["model.layers.0.mlp"]).rule_for(view(fp8_module()))[0]


def test_layer_rules_precede_classes_which_precede_the_global_one():
    layers = {"*.0.mlp.*": layer(PTPC), "*down_proj": layer(MXFP4)}
    config = parse(INT8, layer_quant_config=layers, layer_type_quant_config={"Linear": layer(FP8), "Conv2d": layer(INT8)})
    assert config.spec_for(NAME)[0].weight[0].granularity == "channel"
    assert config.spec_for("model.layers.1.mlp.down_proj")[0].weight[0].dtype == "fp4"
    assert config.spec_for("lm_head")[0].weight[0].dtype == "fp8_e4m3"
    assert parse(INT8).spec_for("lm_head")[0].weight[0].dtype == "int8"


def test_layers_without_a_weight_specification_are_dense_and_targeted_ones_may_be():
    config = parse(None, layer_quant_config={"*q_proj": layer(FP8), "*o_proj": layer({"dtype": "bfloat16"})})
    dense = view({"weight": torch.ones(4, 4)})
    assert isinstance(config.decide(dense).scheme, DenseScheme)
    with pytest.raises(RuleMismatchError):
        config.decide(view(fp8_module(), name="model.layers.0.self_attn.o_proj"))
    choice = config.decide(view({"weight": torch.ones(4, 4)}, name="model.layers.0.self_attn.q_proj"))
    assert isinstance(choice.scheme, DenseScheme) and "its tensors are dense" in choice.why


def test_embeddings_are_never_quantized():
    assert not parse().rule_for(view({"weight": torch.ones(4, 4)}, name="model.embed_tokens", kind=ModuleKind.EMBEDDING))[0]


def test_unknown_neighbours_of_a_weight_are_named():
    for name in ("input_rotation", "input_prescale", "smooth_factor"):
        module = view(fp8_module(**{name: torch.ones(4, 4)}))
        assert any(name in str(p) for p in problems_of(parse().decide(module).scheme, module))


# --- plain weights -----------------------------------------------------------------------------------------------


def test_fake_quantized_weights_are_plain_and_their_scales_left_out_under_a_rule():
    config = parse({"dtype": "mx9", "ch_axis": -1, "group_size": 16}, export={"weight_format": "fake_quantized"})
    names = ["weight", "weight_scale", "weight_zero_point", "weight_scale_2", "input_scale", "output_scale", "input_rotation"]
    tensors = {f"{NAME}.{n}": header(f"{NAME}.{n}", torch.ones(())) for n in names}
    left = config.left_out(tensors)
    assert {n.rpartition(".")[2] for n in left} == set(names) - {"weight", "input_rotation"}
    assert all("fake_quantized" in rule for rule in left.values())
    choice = config.decide(view({"weight": torch.ones(4, 4)}))
    assert isinstance(choice.scheme, DenseScheme) and "fake_quantized" in choice.why
    with pytest.raises(RuleMismatchError):
        config.decide(view(fp8_module()))
    assert parse().left_out(tensors) == {}


# --- cache -------------------------------------------------------------------------------------------------------


def test_cache_follows_its_own_section_and_the_outputs_do_not_disturb_the_weights():
    layers = {"*k_proj": layer(FP8, FP8, FP8), "*v_proj": layer(FP8, FP8, FP8)}
    config = parse(kv_cache_quant_config=layers, layer_quant_config=layers)
    cache = config.get_kv_cache_scheme(attention("k_proj.output_scale", "v_proj.output_scale"))
    assert (cache.element, cache.dynamic) == ("fp8_e4m3fn", False)
    assert sorted(cache.scales) == [(f"{ATTENTION}.k_proj.output_scale", "k"), (f"{ATTENTION}.v_proj.output_scale", "v")]
    scheme = config.decide(view(fp8_module(input_scale=torch.ones(())), name=f"{ATTENTION}.k_proj")).scheme
    assert scheme.activation == ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False)


@pytest.mark.parametrize("rules", [("*k_proj", "*v_proj"), ("*self_attn.[k]*", "*self_attn.[v]*")], ids=["by-name", "by-export"])
def test_older_files_name_the_cache_in_export_or_by_its_projections(rules):
    layers = {rule: layer(FP8, None, FP8) for rule in rules}
    config = parse(layer_quant_config=layers, export={"kv_cache_group": list(rules) if "[k]" in rules[0] else []})
    assert config.get_kv_cache_scheme(attention("k_proj.output_scale")).element == "fp8_e4m3fn"


def test_excluded_projections_may_still_feed_a_quantized_cache():
    config = parse(kv_cache_quant_config={"*k_proj": layer(None, None, FP8), "*v_proj": layer(None, None, FP8)}, exclude=["*k_proj", "*v_proj"])
    assert config.get_kv_cache_scheme(attention()).element == "fp8_e4m3fn"


def test_scales_that_no_rule_explains_stay_unexplained():
    assert parse().get_kv_cache_scheme(attention("k_proj.output_scale")).scales == ()


def test_keys_and_values_must_agree():
    config = parse(kv_cache_quant_config={"*k_proj": layer(None, None, FP8)})
    with pytest.raises(ConflictingConfigError, match="keys fp8_e4m3 per_tensor, values none"):
        config.get_kv_cache_scheme(attention())


def test_quantized_attention_explains_query_scales_and_leaves_probabilities_out():
    config = parse(softmax_quant_spec=FP8, layer_quant_config={"*q_proj": layer(FP8, FP8, FP8)})
    assert config.get_kv_cache_scheme(attention("q_proj.output_scale")).scales == ((f"{ATTENTION}.q_proj.output_scale", "q"),)
    name = f"{ATTENTION}.prob_output_scale"
    assert "softmax_quant_spec" in config.left_out({name: header(name, torch.ones(()))})[name]
    assert parse().left_out({name: header(name, torch.ones(()))}) == {}


# --- rotation ----------------------------------------------------------------------------------------------------


def rotated(**more):
    return {"name": "rotation", "r1": False, "r4": True, "scaling_layers": {}, **more}


def test_listed_modules_rotate_their_input_by_hadamard_signs():
    torch.manual_seed(0)
    signs = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    signs = torch.kron(torch.kron(signs, signs), signs)
    config = parse(PTPC, algo_config=[rotated(rotation_size=8, online_config={"shared_parallel": None, "online_rotation_layers": [NAME]})])
    tensors = {"weight": torch.randn(6, 32).to(torch.float8_e4m3fn), "weight_scale": torch.rand(6) + 0.1, "input_rotation": signs}
    module = view(tensors)
    choice = config.decide(module)
    assert problems_of(choice.scheme, module) == [] and choice.scheme.transforms_input and "rotates" in choice.why
    weight = choice.scheme.to_weight(tensors)
    stored = tensors["weight"].float() * tensors["weight_scale"][:, None]
    assert torch.equal(weight.dequantize(), stored)
    x = torch.randn(3, 32)
    want = torch.stack([torch.cat([row[8 * b : 8 * b + 8] @ signs.float() / 8**0.5 for b in range(4)]) for row in x]) @ stored.t()
    torch.testing.assert_close(x @ weight.effective().t(), want, rtol=1e-4, atol=1e-5)
    assert not isinstance(config.decide(view(fp8_module(scale=(32,)), name="other")).scheme, RotatedScheme)
    damaged = signs.clone()
    damaged[3, 3] = 0
    with pytest.raises(BadValueError, match="input_rotation: 1 of 64 entries"):
        choice.scheme.to_weight(tensors | {"input_rotation": damaged})
    missing = view({k: v for k, v in tensors.items() if k != "input_rotation"})
    assert any("input_rotation" in str(p) for p in problems_of(config.decide(missing).scheme, missing))


def test_trained_rotations_follow_a_scale_of_each_column():
    torch.manual_seed(1)
    online = {"online_rotation_layers": [NAME], "use_input_prescale": True}
    config = parse(algo_config=[rotated(r1=True, r4=False, online_r1_rotation=True, trainable=True, online_config=online)])
    matrix, factor = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0], torch.rand(16) + 0.5
    tensors = fp8_module(8, 16) | {"weight": torch.randn(8, 16).to(torch.float8_e4m3fn), "input_rotation": matrix, "input_prescale": factor}
    scheme = config.decide(view(tensors)).scheme
    assert problems_of(scheme, view(tensors)) == []
    x = torch.randn(3, 16)
    want = (x * factor) @ matrix.float() @ (tensors["weight"].float() * 0.5).t()
    torch.testing.assert_close(x @ scheme.to_weight(tensors).effective().t(), want, rtol=1e-4, atol=1e-5)


def test_targets_of_older_files_are_derived():
    groups = {"first_layer": [{"target_modules": ["model.layers.layer_id.self_attn.q_proj"]}], "middle_layers": [{"next_modules": ["model.layers.layer_id.mlp.up_proj"]}]}
    online = parse(algo_config=[rotated(r1=True, r4=False, online_r1_rotation=True, scaling_layers=groups)]).rotation
    assert online.covers("model.layers.3.self_attn.q_proj") and online.covers("model.layers.0.mlp.up_proj")
    assert not online.covers("model.layers.0.mlp.down_proj") and not online.covers("x.model.layers.0.mlp.up_proj")
    assert parse(algo_config=[rotated()]).rotation.covers(NAME)
    assert not parse(algo_config=[rotated(r1=True, r4=False)]).rotation.covers(NAME)
    assert not parse(algo_config={"name": "gptq", "r4": True}).rotation.covers(NAME)


def test_rotated_keys_cannot_feed_a_quantized_cache():
    cache = {"*k_proj": layer(None, None, FP8), "*v_proj": layer(None, None, FP8)}
    with pytest.raises(ConfigError, match=r"algo_config\.r3"):
        parse(algo_config=[rotated(r3=True)], kv_cache_quant_config=cache)
    assert parse(algo_config=[rotated(r3=True)]).rotation.covers(NAME)
