"""bitsandbytes: lookup codes over flattened blocks, quantized scales, float storage, int8 rows, rules, refusals by name."""

import json
from dataclasses import replace
from math import ceil

import pytest
import torch

import bitgrain
from bitgrain.errors import BadValueError, BitgrainError, ConfigError, LabelMismatchError, RuleMismatchError
from bitgrain.formats.base import DenseScheme, ModuleKind
from bitgrain.formats.bitsandbytes import BitsAndBytesConfig
from bitgrain.weights import ActivationSpec
from tests.checkpoints import write_checkpoint
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.synthetic import NAME, evidence, view

FOUR = {
    "quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False, "load_in_4bit": True, "load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0,
}  # fmt: skip
EIGHT = FOUR | {"_load_in_4bit": False, "load_in_4bit": False, "_load_in_8bit": True, "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}
STATE = "weight.quant_state.bitsandbytes__nf4"


def packed_state(**keys):
    """uint8 tensor of the JSON text."""
    return torch.tensor(list(json.dumps(keys).encode()), dtype=torch.uint8)


def lookup_module(n=6, k=32, block=16, nested=0, storage=torch.uint8, quant_type="nf4", seed=0, **state):
    """(tensors by local name, values worked out one by one)."""
    generator = torch.Generator().manual_seed(seed)
    count = n * k
    codes = torch.randint(0, 16, (count,), generator=generator).tolist()
    table = torch.randn(16, generator=generator)
    padded = [*codes, 0]
    raw = torch.tensor([16 * padded[i] + padded[i + 1] for i in range(0, count, 2)], dtype=torch.uint8)
    blocks = ceil(count / block)
    tensors = {"weight": raw.view(storage).view(-1, 1), "weight.quant_map": table}
    says = {"quant_type": quant_type, "blocksize": block, "dtype": "bfloat16", "shape": [n, k]}
    if nested:
        tensors["weight.absmax"] = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
        tensors["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
        tensors["weight.nested_absmax"] = torch.rand(ceil(blocks / nested), generator=generator)
        says |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.75}
        absmax = [
            tensors["weight.nested_quant_map"][int(code)] * tensors["weight.nested_absmax"][i // nested] + 0.75
            for i, code in enumerate(tensors["weight.absmax"])
        ]
    else:
        absmax = list(torch.rand(blocks, generator=generator) + 0.1)
        tensors["weight.absmax"] = torch.stack(absmax)
    tensors[f"weight.quant_state.bitsandbytes__{quant_type}"] = packed_state(**(says | state))
    want = torch.stack([table[code] * absmax[i // block] for i, code in enumerate(codes)]).view(n, k)
    return tensors, want


def int8_module(n=5, k=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    largest = torch.rand(n, generator=generator) + 0.1
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * (largest / 127).view(-1, 1)


def parse(section=FOUR, tensors=None):
    full = {f"{NAME}.{local}": t for local, t in (tensors or {}).items()}
    return BitsAndBytesConfig.parse(replace(evidence(section, full), read_small=full.__getitem__))


def decode(tensors, section=FOUR, kind=ModuleKind.LINEAR):
    config = parse(section, tensors)
    scheme = config.decide(view(tensors, kind=kind)).scheme
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec
    assert weight.shape == scheme.shape
    return weight.dequantize()


def checkpoint(folder, tensors, section=FOUR, name="layer"):
    """An opened checkpoint of one module; raises what is wrong with it."""
    write_checkpoint(folder, {f"{name}.{local}": t for local, t in tensors.items()}, {"quantization_config": section})
    return bitgrain.open_checkpoint(folder)


# --- values ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", golden_folders("bnb"), ids=lambda p: p.name)
def test_golden_module_equals_golden(folder):
    assert check_golden(folder) > 0


def test_golden_cases_cover_every_storage():
    assert {p.name for p in golden_folders("bnb")} >= {
        "bnb-nf4", "bnb-nf4-double-quant", "bnb-fp4-odd-size", "bnb-int8", "bnb-nf4-double-quant-float-storage"
    }  # fmt: skip


@pytest.mark.parametrize("nested", [0, 4])
@pytest.mark.parametrize(("n", "k", "block"), [(6, 32, 16), (3, 24, 16), (5, 7, 4), (3, 5, 64), (4, 8, 16), (1, 9, 2), (9, 1, 4), (2, 96, 32)])
def test_blocks_run_over_the_flattened_matrix(n, k, block, nested):
    tensors, want = lookup_module(n, k, block, nested, seed=n + k)
    assert torch.equal(decode(tensors), want)


def test_blocks_of_whole_rows_have_one_scale_per_row():
    tensors, _ = lookup_module(4, 8, 16)
    spec = parse(FOUR, tensors).decide(view(tensors)).scheme.weight_spec
    assert (spec.granularity, spec.group_size) == ("channel", 0)


def test_block_that_does_not_divide_a_row_has_groups_that_divide_both():
    tensors, _ = lookup_module(3, 24, 16)
    assert parse(FOUR, tensors).decide(view(tensors)).scheme.weight_spec.group_size == 8


def test_first_element_is_in_the_high_nibble():
    tensors, _ = lookup_module(1, 2, 2)
    tensors |= {"weight": torch.tensor([[0x3A]], dtype=torch.uint8), "weight.quant_map": torch.arange(16.0), "weight.absmax": torch.tensor([1.0])}
    assert decode(tensors).tolist() == [[3.0, 10.0]]


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8])
def test_bytes_viewed_as_another_type_are_the_same_bytes(storage):
    tensors, want = lookup_module(8, 16, storage=storage)
    assert tensors["weight"].dtype == storage
    assert torch.equal(decode(tensors, FOUR | {"bnb_4bit_quant_storage": str(storage)[6:]}), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_and_tables_of_16_bits_are_widened(dtype):
    tensors, _ = lookup_module()
    tensors["weight.absmax"] = tensors["weight.absmax"].to(dtype)
    tensors["weight.quant_map"] = tensors["weight.quant_map"].to(dtype)
    again, _ = lookup_module()
    again["weight.absmax"], again["weight.quant_map"] = tensors["weight.absmax"].float(), tensors["weight.quant_map"].float()
    assert torch.equal(decode(tensors), decode(again))


def test_small_nested_scale_may_come_out_below_zero():
    tensors, want = lookup_module(nested=4, nested_offset=-0.5)
    assert torch.isfinite(decode(tensors)).all()
    assert not torch.equal(decode(tensors), want)


@pytest.mark.parametrize(("n", "k"), [(5, 12), (1, 7), (33, 1)])
def test_int8_rows_are_codes_times_their_largest_over_127(n, k):
    tensors, want = int8_module(n, k)
    assert torch.equal(decode(tensors, EIGHT), want)


def test_int8_without_weight_format_is_row_major():
    tensors, want = int8_module()
    del tensors["weight_format"]
    assert torch.equal(decode(tensors, EIGHT), want)


# --- activations ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("threshold", "outliers"), [(6.0, 6.0), (0.0, None), (4.5, 4.5)])
def test_int8_input_is_quantized_by_token_beside_outliers(threshold, outliers):
    tensors, _ = int8_module()
    scheme = parse(EIGHT | {"llm_int8_threshold": threshold}, tensors).decide(view(tensors)).scheme
    assert scheme.activation == ActivationSpec("int8", "token", top=127.0, outlier_threshold=outliers)


def test_threshold_defaults_to_six():
    tensors, _ = int8_module()
    section = {k: v for k, v in EIGHT.items() if k != "llm_int8_threshold"}
    assert parse(section, tensors).decide(view(tensors)).scheme.activation.outlier_threshold == 6.0


def test_four_bit_modules_and_embeddings_keep_their_input():
    tensors, _ = lookup_module()
    assert parse(FOUR, tensors).decide(view(tensors)).scheme.activation.is_none
    tensors, _ = int8_module()
    assert parse(EIGHT, tensors).decide(view(tensors, kind=ModuleKind.EMBEDDING)).scheme.activation.is_none


def test_outlier_columns_stay_and_their_other_values_count_in_the_range():
    # bitsandbytes 0.50.2, int8_vectorwise_quant: values at or beyond the threshold are left out of the row's largest,
    # and the whole column of such a value is left out of the int8 product
    x = torch.tensor([[6.0, 1.0, -0.5, 0.25], [3.0, -2.0, 1.0, 0.5], [0.1, 0.2, -7.0, 0.3]])
    spec = ActivationSpec("int8", "token", top=127.0, outlier_threshold=6.0)
    codes, scale, _ = spec.quantize(x)
    assert torch.equal(scale.view(-1), torch.tensor([1.0, 3.0, 0.3]) / 127)
    assert codes[:, [0, 2]].abs().sum() == 0
    assert torch.equal(codes[:, 1], torch.round(x[:, 1] / scale[:, 0]).to(torch.int8))
    result = spec.fake_quantize(x)
    assert torch.equal(result[:, [0, 2]], x[:, [0, 2]])
    assert torch.equal(result[:, [1, 3]], codes[:, [1, 3]].float() * scale)


# --- detection and configuration --------------------------------------------------------------------------------------------
def test_detection_scores():
    assert BitsAndBytesConfig.detect(evidence(FOUR)).score == 100
    assert BitsAndBytesConfig.detect(evidence({"load_in_8bit": True, "llm_int8_threshold": 6.0})).score == 80
    for tensors in (lookup_module()[0], int8_module()[0]):
        assert BitsAndBytesConfig.detect(evidence(None, {f"{NAME}.{k}": v for k, v in tensors.items()})).score == 50
    assert BitsAndBytesConfig.detect(evidence({"quant_method": "gptq"})) is None
    assert BitsAndBytesConfig.detect(evidence(None, {f"{NAME}.weight": torch.zeros(2, 2)})) is None


@pytest.mark.parametrize("make", [lookup_module, int8_module])
def test_tensors_alone_are_enough(make, tmp_path):
    tensors, want = make()
    write_checkpoint(tmp_path, {f"layer.{k}": v for k, v in tensors.items()}, {})
    opened = bitgrain.open_checkpoint(tmp_path)
    assert opened.plan.format == "bitsandbytes"
    assert torch.equal(opened.dequantize("layer.weight"), want)


def test_old_configuration_without_quant_method_is_read():
    tensors, want = int8_module()
    assert torch.equal(decode(tensors, {"load_in_8bit": True, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None}), want)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"load_in_8bit": True, "_load_in_8bit": True}, "load_in_8bit"),
        ({"_load_in_4bit": False}, "load_in_4bit"),
        ({"load_in_4bit": "yes"}, "load_in_4bit"),
        ({"llm_int8_threshold": -1.0}, "llm_int8_threshold"),
        ({"llm_int8_skip_modules": 3}, "llm_int8_skip_modules"),
        ({"bnb_4bit_quant_typ": "nf4"}, "bnb_4bit_quant_type"),
        ({"bnb_5bit": True}, "bnb_5bit"),
    ],
)
def test_impossible_configuration_is_refused_by_key(change, named):
    with pytest.raises(BitgrainError, match=named):
        parse(FOUR | change)


def test_all_problems_are_told_at_once():
    with pytest.raises(BitgrainError) as caught:
        parse(FOUR | {"llm_int8_threshold": "six", "bnb_5bit": True})
    assert "llm_int8_threshold" in str(caught.value)
    assert "bnb_5bit" in str(caught.value)


# --- rules ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", [NAME, "model.layers.0", "model.layers.0.mlp", "down_proj"])
def test_rule_that_surely_covers_quantized_tensors_is_refused(rule):
    tensors, want = lookup_module()
    section = FOUR | {"llm_int8_skip_modules": ["lm_head", rule]}
    with pytest.raises(RuleMismatchError, match=NAME):
        decode(tensors, section)
    config = parse(section, tensors)
    config.trust_tensors = True
    assert torch.equal(config.decide(view(tensors)).scheme.to_weight(tensors).dequantize(), want)


@pytest.mark.parametrize("rule", ["mlp", "mlp.down_proj", "layers.0"])
def test_rule_that_versions_read_differently_leaves_the_word_to_the_tensors(rule):
    section = FOUR | {"llm_int8_skip_modules": ["lm_head", rule]}
    tensors, want = lookup_module()
    assert torch.equal(decode(tensors, section), want)
    config = parse(section)
    choice = config.decide(view({"weight": torch.zeros(4, 8)}))
    assert isinstance(choice.scheme, DenseScheme)
    assert rule in choice.why
    assert config.matched_rules == {rule}
    assert list(config.rules()) == ["lm_head", rule]


def test_rule_does_not_match_inside_a_segment():
    tensors, want = lookup_module()
    assert torch.equal(decode(tensors, FOUR | {"llm_int8_skip_modules": ["proj", "model.layers.00"]}), want)


def test_dense_checkpoint_says_that_it_was_meant_to_be_quantized():
    choice = parse(FOUR, {"weight": torch.zeros(4, 8)}).decide(view({"weight": torch.zeros(4, 8)}))
    assert isinstance(choice.scheme, DenseScheme)
    assert "quantized while it loads" in choice.why


def test_dense_module_beside_quantized_ones_is_dense():
    tensors, _ = lookup_module()
    choice = parse(FOUR, tensors).decide(view({"weight": torch.zeros(4, 8)}, "model.layers.0.mlp.gate"))
    assert choice.why == "load_in_4bit, but its tensors are dense"
    head = parse(FOUR, tensors).decide(view({"weight": torch.zeros(4, 8)}, "lm_head", ModuleKind.LM_HEAD))
    assert "output head" in head.why


def test_quantized_head_is_read_where_the_list_does_not_name_it():
    tensors, want = lookup_module()
    assert torch.equal(decode(tensors, FOUR | {"llm_int8_skip_modules": []}, ModuleKind.LM_HEAD), want)


def test_quantized_tensors_with_both_flags_off_are_refused():
    off = FOUR | {"load_in_4bit": False, "_load_in_4bit": False}
    with pytest.raises(RuleMismatchError, match="off"):
        decode(lookup_module()[0], off)


@pytest.mark.parametrize(("make", "section"), [(lookup_module, EIGHT), (int8_module, FOUR)])
def test_modules_of_the_other_kind_are_refused(make, section):
    tensors, want = make()
    with pytest.raises(LabelMismatchError, match="load_in_"):
        decode(tensors, section)
    config = parse(section, tensors)
    config.trust_tensors = True
    assert torch.equal(config.decide(view(tensors)).scheme.to_weight(tensors).dequantize(), want)


def test_type_that_the_configuration_does_not_name_is_refused():
    with pytest.raises(LabelMismatchError, match="bnb_4bit_quant_type"):
        decode(lookup_module()[0], FOUR | {"bnb_4bit_quant_type": "fp4"})


# --- refusals ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"blocksize": 0}, "blocksize"),
        ({"blocksize": None}, "blocksize"),
        ({"dtype": "int8"}, "dtype"),
        ({"shape": [6, 32, 1]}, "shape"),
        ({"shape": None}, "shape"),
        ({"nested_offset": 0.5}, "nested_blocksize"),
        ({"rotation": 7}, "rotation"),
    ],
)
def test_impossible_state_is_refused_by_key(state, named):
    with pytest.raises(BitgrainError, match=named) as caught:
        decode(lookup_module(**state)[0])
    assert STATE in str(caught.value)


def test_state_that_says_another_type_than_its_name_is_refused():
    tensors, _ = lookup_module()
    tensors[STATE] = packed_state(quant_type="fp4", blocksize=16, dtype="bfloat16", shape=[6, 32])
    with pytest.raises(ConfigError, match="quant_type"):
        decode(tensors)


def test_state_with_an_offset_that_is_not_finite_is_refused():
    with pytest.raises(ConfigError, match="nested_offset"):
        decode(lookup_module(nested=4, nested_offset=float("nan"))[0])


def test_state_that_is_no_json_is_refused():
    tensors, _ = lookup_module()
    tensors[STATE] = torch.arange(200, 240).to(torch.uint8)
    with pytest.raises(LabelMismatchError, match="JSON"):
        decode(tensors)


@pytest.mark.parametrize("local", ["weight", "weight.absmax", "weight.quant_map", STATE, "weight.nested_absmax", "weight.nested_quant_map"])
@pytest.mark.parametrize("damage", ["delete", "rename", "cut", "retype"])
def test_damaged_tensor_of_a_lookup_module_is_refused_by_name(local, damage, tmp_path):
    tensors, _ = lookup_module(nested=4)
    assert_refused(tensors, local, damage, tmp_path, FOUR)


@pytest.mark.parametrize("local", ["weight", "SCB"])
@pytest.mark.parametrize("damage", ["delete", "rename", "cut", "retype"])
def test_damaged_tensor_of_an_int8_module_is_refused_by_name(local, damage, tmp_path):
    assert_refused(int8_module()[0], local, damage, tmp_path, EIGHT)


def assert_refused(tensors, local, damage, folder, section):
    old = tensors.pop(local)
    if damage == "rename":
        tensors[f"{local}_old"] = old
    elif damage == "cut":
        tensors[local] = old[:-1].clone()
    elif damage == "retype":
        tensors[local] = old.to(torch.int16) if not old.is_floating_point() else old.double()
    with pytest.raises(BitgrainError) as caught:
        checkpoint(folder, tensors, section).dequantize("layer.weight")
    named = "layer.SCB" if local == "weight" and damage == "cut" and "SCB" in tensors else f"layer.{local}"
    assert named in str(caught.value)


def test_extra_tensor_beside_a_module_is_refused_by_name(tmp_path):
    tensors, _ = lookup_module()
    with pytest.raises(BitgrainError, match="layer.weight.rotation"):
        checkpoint(tmp_path, tensors | {"weight.rotation": torch.eye(4)})


def test_weight_format_that_only_some_modules_have_is_missed(tmp_path):
    whole = {f"a.{k}": v for k, v in int8_module()[0].items()}
    rest = {f"b.{k}": v for k, v in int8_module(seed=1)[0].items() if k != "weight_format"}
    write_checkpoint(tmp_path, whole | rest, {"quantization_config": EIGHT})
    with pytest.raises(BitgrainError, match="b.weight_format"):
        bitgrain.open_checkpoint(tmp_path)


@pytest.mark.parametrize(("stored", "named"), [(1, "col32"), (2, "col_turing"), (3, "col_ampere"), (9, "unknown")])
def test_tile_layout_is_refused_by_name(stored, named):
    tensors, _ = int8_module()
    with pytest.raises(LabelMismatchError, match=named):
        decode(tensors | {"weight_format": torch.tensor(stored, dtype=torch.uint8)}, EIGHT)


@pytest.mark.parametrize(
    ("local", "value", "named"),
    [
        ("weight.absmax", float("nan"), "NaN"),
        ("weight.absmax", -1.0, "negative"),
        ("weight.quant_map", float("inf"), "infinite"),
        ("weight.nested_absmax", float("nan"), "NaN"),
        ("weight.nested_absmax", -1.0, "negative"),
        ("weight.nested_quant_map", float("nan"), "NaN"),
    ],
)
def test_impossible_value_is_refused_by_name(local, value, named):
    tensors, _ = lookup_module(nested=4 if "nested" in local else 0)
    tensors[local][0] = value
    with pytest.raises(BadValueError, match=named) as caught:
        decode(tensors)
    assert caught.value.where == local


@pytest.mark.parametrize("local", ["weight.absmax", "weight.quant_map", "weight.nested_quant_map"])
def test_all_zero_is_refused_by_name(local):
    tensors, _ = lookup_module(nested=4 if "nested" in local else 0)
    with pytest.raises(BadValueError, match="zero"):
        decode(tensors | {local: torch.zeros_like(tensors[local])})


def test_zero_matrix_may_have_zero_scales():
    tensors, _ = lookup_module()
    tensors["weight.quant_map"][7] = 0
    tensors |= {"weight": torch.full_like(tensors["weight"], 0x77), "weight.absmax": torch.zeros_like(tensors["weight.absmax"])}
    assert not decode(tensors).any()
    tensors, _ = int8_module()
    tensors |= {"weight": torch.zeros_like(tensors["weight"]), "SCB": torch.zeros_like(tensors["SCB"])}
    assert not decode(tensors, EIGHT).any()


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_impossible_row_maximum_is_refused(value):
    tensors, _ = int8_module()
    tensors["SCB"][2] = value
    with pytest.raises(BadValueError, match="SCB"):
        decode(tensors, EIGHT)


def test_zero_row_maxima_of_other_codes_are_refused():
    tensors, _ = int8_module()
    with pytest.raises(BadValueError, match="SCB"):
        decode(tensors | {"SCB": torch.zeros(5)}, EIGHT)


def test_bias_is_kept_and_checked(tmp_path):
    tensors, want = lookup_module()
    opened = checkpoint(tmp_path / "a", tensors | {"bias": torch.ones(6)})
    assert torch.equal(opened.dequantize("layer.weight"), want)
    with pytest.raises(BitgrainError, match="layer.bias"):
        checkpoint(tmp_path / "b", tensors | {"bias": torch.ones(5)})


def test_examples_are_of_both_kinds():
    kinds = {(spec.kind, activation.is_none) for _, spec, activation in BitsAndBytesConfig.examples()}
    assert kinds == {("codebook", True), ("int_affine", False)}
