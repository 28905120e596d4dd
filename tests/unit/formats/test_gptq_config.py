"""The configuration of GPTQ checkpoints: keys, labels, rules per module, detection."""

import pytest
import torch
from golden_cases import problems_of
from word_packers import evidence, gptq_tensors, numbers, view

from bitgrain.errors import BitgrainError, ConfigError, ConflictingConfigError, RuleMismatchError
from bitgrain.formats.base import DenseScheme, ModuleKind
from bitgrain.formats.gptq import GptqConfig
from bitgrain.formats.registry import canonical_name

BASE = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}


def parse(**changes):
    return GptqConfig.parse(evidence({**BASE, **changes}))


def test_metadata_of_all_producers_is_known():
    parse(
        true_sequential=True, damp_percent=0.01, meta={"quantizer": ["gptqmodel:7.7.0"], "anything": 1},
        tokenizer=None, dataset="c4", model_seqlen=2048, use_cuda_fp16=True, use_exllama=False,
        exllama_config={"version": 2}, max_input_length=None, cache_block_outputs=True, pad_token_id=0, batch_size=1,
        block_name_to_quantize="model.layers", module_name_preceding_first_block=["model.embed_tokens"],
        backend="auto", modules_in_block_to_quantize=None, model_name_or_path="x", model_file_base_name="model",
        static_groups=False, is_marlin_format=False, awq_gemm_checkpoint=False, format="gptq", method="gptq",
        pack_dtype="int32", lm_head=False, hyb_act=False, act_group_aware=True, mse=0.0, data_type="int", act_bits=16,
        iters=200, low_cpu_mem_usage=True, low_gpu_mem_usage=True, new_option=None, empty_option={},
    )  # fmt: skip


def test_unknown_keys_are_all_named_with_their_nearest():
    with pytest.raises(ConfigError, match=r"desc_atc \(nearest known: desc_act\), grid") as caught:
        parse(desc_atc=True, grid={"a": 1})
    assert caught.value.where == "quantization_config"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bits": 9}, "bits: 9"),
        ({"bits": None}, "bits: absent"),
        ({"bits": True}, "bits: True"),
        ({"bits": "4"}, "bits: '4'"),
        ({"group_size": 0}, "group_size: 0"),
        ({"group_size": -2}, "group_size: -2"),
        ({"sym": "yes"}, "sym: 'yes'"),
        ({"checkpoint_format": "bitblas"}, "bitblas"),
        ({"checkpoint_format": "qqq"}, "8-bit activations"),
        ({"format": "gptq_v9"}, "gptq_v9"),
        ({"quant_method": "gptq_marlin_24"}, "2:4 sparse"),
        ({"pack_dtype": "int4"}, "pack_dtype: 'int4'"),
        ({"pack_dtype": "int16", "bits": 3}, "int16 with 3 bits"),
        ({"adapter": {"path": "lora"}}, "adapter"),
        ({"rotation": "hadamard"}, "rotation"),
        ({"method": "paroquant"}, "method: 'paroquant'"),
        ({"act_bits": 8}, "act_bits: 8"),
        ({"data_type": "mx_fp"}, "mx_fp"),
        ({"extra_config": {"lm_head": {"bits": 8}}}, "extra_config"),
        ({"awq_gemm_checkpoint": True}, "awq_gemm_checkpoint"),
        ({"is_marlin_format": True, "sym": False}, "Marlin"),
        ({"dynamic": []}, "dynamic: a list"),
        ({"dynamic": {"(": {"bits": 8}}}, "regular expression"),
        ({"dynamic": {"a": {"bits": 9}}}, r"dynamic\['a'\]\.bits: 9"),
        ({"dynamic": {"a": {"bitz": 8}}}, "bitz"),
        ({"dynamic": {"a": 8}}, r"dynamic\['a'\]"),
        ({"modules_in_block_to_quantize": [3]}, "modules_in_block_to_quantize"),
    ],
    ids=str,
)
def test_impossible_configuration_is_refused_by_name(changes, text):
    with pytest.raises(BitgrainError, match=text):
        parse(**changes)


def test_all_problems_come_at_once():
    with pytest.raises(BitgrainError) as caught:
        parse(bits=9, group_size=0, sym="no", nonsense=1)
    assert all(text in str(caught.value) for text in ("bits", "group_size", "sym", "nonsense"))


@pytest.mark.parametrize(
    "changes",
    [{"format": "gptq_v2", "checkpoint_format": "gptq"}, {"is_marlin_format": True, "checkpoint_format": "gptq"}],
    ids=str,
)
def test_keys_that_disagree_are_a_conflict(changes):
    with pytest.raises(ConflictingConfigError):
        parse(**changes)


def test_dynamic_rules_match_at_the_start_and_the_first_wins():
    config = parse(
        dynamic={
            r"-:model\.layers\.1\.": {},
            r"+:model\.layers\.\d\.mlp": {"bits": 8, "group_size": 64},
            r"model\.layers\.0": {"bits": 2, "sym": True, "desc_act": True},
            "mlp": {"bits": 3},
        }
    )
    settings = config.module_settings("model.layers.0.mlp.up_proj")
    assert (settings.bits, settings.group_size, settings.symmetric) == (8, 64, False)
    settings = config.module_settings("model.layers.0.self_attn.q_proj")
    assert (settings.bits, settings.group_size, settings.symmetric, settings.reordered) == (2, 32, True, True)
    assert config.module_settings("model.layers.2.self_attn.q_proj").bits == 4
    assert config.rule_for(view({}, "model.layers.1.mlp.up_proj")) == (False, r"dynamic has '-:model\\.layers\\.1\\.'")
    assert config.rule_for(view({}, "model.layers.10.mlp.up_proj"))[0]
    assert config.rule_for(view({}, "model.layers.0.mlp.up_proj"))[0]
    assert set(config.rules()) - config.matched_rules == {"mlp", r"model\.layers\.0"}


def test_override_decodes_with_its_own_bits():
    v = numbers(32, 64, 64, 8, zero=128)
    module = view(gptq_tensors(v), "lm_head", kind=ModuleKind.LM_HEAD)
    config = parse(lm_head=True, dynamic={"lm_head": {"bits": 8, "group_size": 64, "sym": True}})
    choice = config.get_lm_head_scheme(module)
    assert torch.equal(choice.scheme.to_weight(gptq_tensors(v)).dequantize(), v.weight())
    assert choice.why == "dynamic has 'lm_head'"


@pytest.mark.parametrize(
    ("changes", "name", "kind"),
    [
        ({"dynamic": {r"-:.*up_proj": {}}}, "model.layers.0.mlp.up_proj", ModuleKind.LINEAR),
        ({"modules_to_not_convert": ["mlp"]}, "model.layers.0.mlp.up_proj", ModuleKind.LINEAR),
        ({"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]}, "model.layers.0.mlp.up_proj", ModuleKind.LINEAR),
        ({"lm_head": False}, "lm_head", ModuleKind.LM_HEAD),
    ],
    ids=["dynamic", "ignore", "blocks", "lm_head"],
)
def test_excluded_module_with_quantized_tensors_is_refused_unless_trusted(changes, name, kind):
    tensors = gptq_tensors(numbers(32, 64, 32))
    with pytest.raises(RuleMismatchError, match=name):
        parse(**changes).decide(view(tensors, name, kind=kind))
    trusting = GptqConfig.parse(evidence({**BASE, **changes}))
    trusting.trust_tensors = True
    assert trusting.decide(view(tensors, name, kind=kind)).scheme.weight_spec.bits == 4
    dense = parse(**changes).decide(view({"weight": torch.zeros(4, 4)}, name, kind=kind))
    assert isinstance(dense.scheme, DenseScheme)


def test_listed_blocks_are_quantized_and_the_head_needs_no_list():
    config = parse(modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.down_proj"]], lm_head=True)
    assert config.rule_for(view({}, "model.layers.7.mlp.down_proj"))[0]
    assert config.rule_for(view({}, "lm_head", kind=ModuleKind.LM_HEAD))[0]
    assert not config.rule_for(view({}, "model.layers.7.mlp.big_down_proj"))[0]
    assert config.rules() == ("self_attn.q_proj", "mlp.down_proj")
    assert config.matched_rules == {"mlp.down_proj"}


@pytest.mark.parametrize("left", ["qweight", "qzeros", "scales", "g_idx"])
def test_one_tensor_left_over_makes_a_module_quantized(left):
    tensors = gptq_tensors(numbers(32, 64, 32))
    module = view({left: tensors[left]})
    assert parse().is_quantized(module)
    assert {p for p in problems_of(parse().decide(module).scheme, module) if p.startswith("missing")}


def test_detection_by_method_sidecar_and_tensors():
    assert GptqConfig.detect(evidence(BASE)).score == 100
    assert GptqConfig.detect(evidence({"quant_method": "awq", "bits": 4, "group_size": 128, "desc_act": False})) is None
    sidecar = {"quantize_config.json": {"bits": 4, "group_size": 128, "desc_act": False}}
    assert GptqConfig.detect(evidence(None, sidecars=sidecar)).score == 80
    stored = {f"a.{k}": t for k, t in gptq_tensors(numbers(32, 64, 32)).items()}
    assert GptqConfig.detect(evidence(None, stored)).score == 50
    assert GptqConfig.detect(evidence(None, {"a.weight": torch.zeros(2, 2)})) is None


def test_tensors_without_configuration_are_refused_for_what_they_cannot_tell():
    stored = {f"a.{k}": t for k, t in gptq_tensors(numbers(32, 64, 32)).items()}
    with pytest.raises(ConfigError, match="bits: absent"):
        GptqConfig.parse(evidence(None, stored))


@pytest.mark.parametrize("name", ["gptq", "gptq_marlin", "auto_gptq", "gptqmodel", "marlin", "GPTQ"])
def test_names_of_other_engines_are_accepted(name):
    assert canonical_name(name) == "gptq"


def test_static_cache_of_a_foreign_quantizer_is_read():
    attention = view({"k_scale": torch.ones(2), "v_scale": torch.ones(2)}, "model.layers.0.self_attn", kind=ModuleKind.ATTENTION)
    scheme = parse(static_kv_dtype="fp8", static_kv_granularity="head").get_kv_cache_scheme(attention)
    assert (scheme.describe(), [which for _, which in scheme.scales]) == ("fp8_e4m3fn head", ["k", "v"])
    assert parse().get_kv_cache_scheme(attention).scales == ()
    with pytest.raises(ConfigError, match="static_kv_dtype"):
        parse(static_kv_dtype="int4")
