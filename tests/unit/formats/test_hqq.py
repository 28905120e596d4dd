"""HQQ: packings, both axes, groups across rows, float views, quantized and stacked scales, descriptors, rules, refusals by name."""

from dataclasses import replace
from math import ceil

import pytest
import torch

import bitgrain
from bitgrain.errors import BadValueError, BitgrainError, LabelMismatchError, RuleMismatchError, UnsafeFileError
from bitgrain.formats.base import DenseScheme, ModuleKind
from bitgrain.formats.hqq import HqqConfig
from bitgrain.formats.hqq.config import layer_tag
from tests.checkpoints import write_checkpoint
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.synthetic import NAME, evidence, view

WIDTHS = {1: ("1bit_u8", 2), 1.58: ("2bit_u8", 3), 2: ("2bit_u8", 4), 3: ("3bit_32", 8), 4: ("4bit_u8", 16), 5: ("8bit_u8", 32), 6: ("8bit_u8", 64), 8: ("8bit_u8", 256)}
PARTS = {"1bit_u8": (1, 8), "2bit_u8": (2, 4), "3bit_32": (3, 10), "4bit_u8": (4, 2), "8bit_u8": (8, 1)}
# which each version of the writer stores, and what changes no value
ALL = ("nbits", "group_size", "axis", "shape", "packing", "view_as_float", "unpack_view_dtype", "quant_scale", "quant_zero", "channel_wise",
       "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "optimize", "round_zero")  # fmt: skip


def text(word):
    return torch.tensor([ord(c) for c in word], dtype=torch.uint8)


def flag(on):
    return torch.tensor(int(on), dtype=torch.uint8)


def section(nbits=4, group_size=8, axis=1, channel_wise=True, **more):
    params = {"nbits": nbits, "channel_wise": channel_wise, "group_size": group_size, "optimize": True, "round_zero": nbits == 4, "axis": axis, "view_as_float": False}
    quant = {"weight_quant_params": params, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    return {"quant_method": "hqq", "quant_config": quant, "skip_modules": ["lm_head"]} | more


def pack(grid, packing):
    """Packed words of a list of rows of codes, part by part, the first in the highest bits."""
    width, parts = PARTS[packing]
    each = ceil(len(grid) / parts)
    rows = grid + [[0] * len(grid[0])] * (each * parts - len(grid))
    words = [[sum(rows[part * each + row][column] << (width * (parts - 1 - part)) for part in range(parts)) for column in range(len(grid[0]))] for row in range(each)]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32 if packing == "3bit_32" else torch.uint8)


def describe(nbits, size, axis, shape, prefix=""):
    packing = WIDTHS[nbits][0]
    found = {
        "nbits": torch.tensor(nbits, dtype=torch.int32 if isinstance(nbits, int) else torch.float32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "shape": torch.tensor(shape),
        "packing": text(packing),
        "view_as_float": flag(False),
        "unpack_view_dtype": text("torch.int32" if packing == "3bit_32" else "torch.uint8"),
        "compute_dtype": text("torch.float16"),
    }
    if size is not None:
        found["group_size"] = torch.tensor(size, dtype=torch.int32)
    return {prefix + name: tensor for name, tensor in found.items()}


def grid_of(n, k, size, axis):
    """(rows, columns) of the grid, and the grid place of flat element i is (i // columns, i % columns)."""
    if not size:
        return n, k
    return (n * k // size, size) if axis == 1 else (size, n * k // size)


def module(nbits=4, n=16, k=24, size=8, axis=1, channel_wise=True, dtype=torch.float32, seed=0):
    """(tensors by local name, values worked out one by one)."""
    tensors, grid = stored_module(nbits, n, k, size, axis, channel_wise, dtype, seed)
    return tensors, values(grid, tensors["scale"], tensors["zero"], axis, n, k)


def stored_module(nbits=4, n=16, k=24, size=8, axis=1, channel_wise=True, dtype=torch.float32, seed=0):
    """(tensors by local name, the grid of codes as a list of rows)."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = grid_of(n, k, size if channel_wise else 0, axis)
    grid = torch.randint(0, WIDTHS[nbits][1], (rows, columns), generator=generator).tolist()
    shape = ((rows, 1) if axis == 1 else (1, columns)) if channel_wise else ()
    scale = (torch.rand(shape, generator=generator) + 0.1).to(dtype)
    zero = (torch.rand(shape, generator=generator) * 7).to(dtype)
    tensors = {"W_q": pack(grid, WIDTHS[nbits][0]), "scale": scale, "zero": zero, **describe(nbits, size, axis, (n, k))}
    on = {"quant_scale": False, "quant_zero": False, "channel_wise": channel_wise, "offload_meta": False}
    tensors |= {name: flag(value) for name, value in on.items()}
    tensors |= {name: flag(True) for name in ("encoded_state_dict", "stores_quant_config", "optimize", "round_zero")}
    return tensors, grid


def values(grid, scale, zero, axis, n, k):
    """float32 [N, K], element by element."""
    want = torch.empty(n * k)
    columns = len(grid[0])
    for i in range(n * k):
        row, column = divmod(i, columns)
        at = 0 if scale.numel() == 1 else row if axis == 1 else column
        want[i] = (torch.tensor(float(grid[row][column])) - zero.float().reshape(-1)[at]) * scale.float().reshape(-1)[at]
    return want.view(n, k)


def nested(values_, axis, size, seed=0):
    """(tensors without their prefix names, decoded values) of scales quantized to 8 bits; size None: one step for all."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = values_.shape
    grid = grid_of(rows, columns, size, axis)
    codes = torch.randint(1, 256, grid, generator=generator, dtype=torch.uint8)
    shape = () if size is None else (grid[0], 1) if axis == 1 else (1, grid[1])
    step, zero = torch.rand(shape, generator=generator) * 0.01 + 0.001, torch.rand(shape, generator=generator)
    decoded = ((codes.float() - zero) * step).view(rows, columns)
    return {"codes": codes, "scale": step, "zero": zero, **describe(8, size, axis, (rows, columns))}, decoded


def with_nested(tensors, name, axis=0, size=None, seed=0):
    """The module with `scale` or `zero` quantized; returns its decoded values too."""
    inner, decoded = nested(tensors[name], axis, size, seed)
    changed = {k: v for k, v in tensors.items() if k != name} | {f"quant_{name}": flag(True), f"{name}_q": inner.pop("codes")}
    return changed | {f"meta_{name}.{k}": v for k, v in inner.items()}, decoded


def parse(settings, tensors=None):
    full = {f"{NAME}.{local}": t for local, t in (tensors or {}).items()}
    return HqqConfig.parse(replace(evidence(settings, full), read_small=full.__getitem__))


def scheme_of(tensors, settings=None, kind=ModuleKind.LINEAR):
    return parse(settings, tensors).decide(view(tensors, kind=kind)).scheme


def decode(tensors, settings=None):
    scheme = scheme_of(tensors, settings)
    weight = scheme.to_weight(tensors)
    assert weight.spec == scheme.weight_spec
    assert weight.shape == scheme.shape
    return weight.dequantize()


def checkpoint(folder, tensors, settings=None, name="layer"):
    """An opened checkpoint of one module; raises what is wrong with it."""
    config = {} if settings is None else {"quantization_config": settings}
    write_checkpoint(folder, {f"{name}.{local}": t for local, t in tensors.items()}, config)
    return bitgrain.open_checkpoint(folder)


# --- values ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("folder", golden_folders("hqq"), ids=lambda p: p.name)
def test_golden_module_equals_golden(folder):
    assert check_golden(folder) > 0


def test_golden_cases_cover_the_kinds_of_storage():
    assert {p.name for p in golden_folders("hqq")} >= {
        "hqq-4bit-g64-axis0", "hqq-4bit-g64-axis1", "hqq-3bit-g8-axis0-float-view", "hqq-1.58bit-g40-axis1", "hqq-5bit-tensor", "hqq-8bit-g64-axis1-across-rows"
    }  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", list(WIDTHS))
def test_every_width_and_axis_is_decoded(nbits, axis):
    tensors, want = module(nbits, axis=axis)
    assert torch.equal(decode(tensors, section(nbits, axis=axis)), want)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("n", "k", "size"),
    [(8, 12, 16), (8, 12, 24), (16, 10, 16), (8, 9, 24), (4, 6, 24), (8, 1, 2), (8, 1, 8), (1, 16, 8), (6, 4, 2), (12, 8, 6), (5, 8, 8), (10, 6, 20)],
)
def test_groups_of_the_flattened_matrix_may_cross_rows(n, k, size, axis):
    tensors, want = module(8, n, k, size, axis, seed=n + k)
    assert torch.equal(decode(tensors, section(8, size, axis)), want)


@pytest.mark.parametrize(
    ("n", "k", "size", "axis", "shown"),
    [
        (16, 24, 8, 1, ("group", 8, False)),
        (16, 24, 24, 1, ("channel", 0, False)),
        (16, 24, 48, 1, ("channel", 0, False)),
        (16, 12, 8, 1, ("group", 4, False)),
        (16, 24, 8, 0, ("group", 1, True)),
        (16, 24, 16, 0, ("group", 1, True)),
        (3, 8, 2, 0, ("group", 1, False)),
        (16, 24, 384, 0, ("tensor", 0, False)),
    ],
)
def test_spec_is_known_from_headers(n, k, size, axis, shown):
    tensors, _ = module(8, n, k, size, axis)
    spec = scheme_of(tensors).weight_spec
    assert (spec.granularity, spec.group_size, spec.row_index) == shown
    assert scheme_of(tensors).to_weight(tensors).spec == spec


def test_strided_groups_share_a_row_of_scales_every_n_over_g_rows():
    tensors, _ = module(8, 16, 24, 8, 0)
    weight = scheme_of(tensors).to_weight(tensors)
    assert weight.scale.shape == (2, 24)
    assert weight.row_index.tolist() == [0, 1] * 8


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2])
def test_one_scale_for_the_whole_matrix(nbits, axis):
    tensors, want = module(nbits, 20, 24, 8, axis, channel_wise=False)
    assert torch.equal(decode(tensors, section(nbits, axis=axis, channel_wise=False)), want)
    assert scheme_of(tensors).weight_spec.granularity == "tensor"
    # versions that do not store channel_wise show it by the single scale
    del tensors["channel_wise"]
    assert torch.equal(decode(tensors), want)


@pytest.mark.parametrize("axis", [0, 1])
def test_no_group_size_is_a_group_per_row_or_column(axis):
    tensors, want = module(8, 16, 24, 24 if axis == 1 else 16, axis)
    assert torch.equal(decode(tensors, section(8, None, axis)), want)
    del tensors["group_size"]
    assert torch.equal(decode(tensors, section(8, None, axis)), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_16_bits_keep_their_type(dtype):
    tensors, want = module(dtype=dtype)
    assert torch.equal(decode(tensors), want)
    assert scheme_of(tensors).weight_spec.scale_dtype == str(dtype)[6:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nbits", [8, 4, 3, 2])
def test_words_stored_as_floats_are_the_same_bytes(nbits, dtype):
    tensors, want = module(nbits)
    tensors |= {"W_q": tensors["W_q"].view(dtype), "view_as_float": flag(True)}
    assert torch.equal(decode(tensors), want)


@pytest.mark.parametrize(("scale", "zero"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("axis", [0, 1])
def test_scales_and_zero_points_may_be_quantized_themselves(axis, scale, zero):
    tensors, _ = module(8, axis=axis)
    steps, shifts = tensors["scale"], tensors["zero"]
    grid = tensors["W_q"].tolist()
    if scale:
        tensors, steps = with_nested(tensors, "scale", axis=0, size=16, seed=3)
    if zero:
        tensors, shifts = with_nested(tensors, "zero", axis=0, size=None, seed=4)
    assert torch.equal(decode(tensors, section(8, axis=axis)), values(grid, steps, shifts, axis, 16, 24))
    assert scheme_of(tensors).weight_spec.scale_dtype == "float32"


def test_scales_quantized_to_four_bits_are_unpacked():
    tensors, _ = module(8)
    packed = torch.randint(0, 256, (24, 1), dtype=torch.uint8)
    inner = describe(4, None, 0, (48, 1), "meta_scale.") | {"meta_scale.scale": torch.tensor(0.01), "meta_scale.zero": torch.tensor(-1.0)}
    tensors = {k: v for k, v in tensors.items() if k != "scale"} | inner | {"scale_q": packed, "quant_scale": flag(True)}
    steps = (torch.cat([packed >> 4, packed & 15]).float() + 1) * torch.tensor(0.01)
    assert torch.equal(decode(tensors), values(tensors["W_q"].tolist(), steps, tensors["zero"], 1, 16, 24))


def test_scale_and_zero_may_be_stacked():
    tensors, want = module()
    tensors["zero_scale"] = torch.stack([tensors.pop("zero"), tensors.pop("scale")])
    assert torch.equal(decode(tensors, section()), want)


def test_negative_scales_are_read():
    # a search over scales in the writer may end below zero
    tensors, want = module()
    tensors["scale"] = -tensors["scale"]
    assert torch.equal(decode(tensors), -want)


# --- detection and configuration --------------------------------------------------------------------------------------------
def test_detection_scores():
    assert HqqConfig.detect(evidence(section())).score == 100
    assert HqqConfig.detect(evidence({k: v for k, v in section().items() if k != "quant_method"})).score == 80
    assert HqqConfig.detect(evidence(None, {f"{NAME}.W_q": torch.zeros(1)})).score == 50
    assert HqqConfig.detect(evidence({"quant_method": "gptq"}, {f"{NAME}.W_q": torch.zeros(1)})) is None
    assert HqqConfig.detect(evidence(None, {f"{NAME}.weight": torch.zeros(1)})) is None


def test_tensors_alone_are_enough(tmp_path):
    tensors, want = module(3, axis=0)
    opened = checkpoint(tmp_path, tensors)
    assert opened.plan.format == "hqq"
    assert torch.equal(opened.dequantize("layer.weight"), want)


def test_descriptors_of_older_versions_are_enough():
    tensors, want = module()
    for name in ALL[5:]:
        tensors.pop(name, None)
    assert torch.equal(decode(tensors, section()), want)


def test_native_pickle_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "qmodel.pt").write_bytes(b"never read")
    with pytest.raises(UnsafeFileError, match=r"qmodel\.pt"):
        bitgrain.open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"nbits": 7}, "nbits"),
        ({"nbits": None}, "nbits"),
        ({"axis": 2}, "axis"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": "64"}, "group_size"),
        ({"channel_wise": 1}, "channel_wise"),
        ({"grup_size": 64}, "group_size"),
    ],
)
def test_impossible_settings_are_refused_by_key(change, named):
    settings = section()
    settings["quant_config"]["weight_quant_params"] |= change
    with pytest.raises(BitgrainError, match=named) as caught:
        parse(settings)
    assert "weight_quant_params" in str(caught.value)


@pytest.mark.parametrize("quant", [3, {"mlp.down_proj": 4}, {"mlp.down_proj": {"nbits": 4}}])
def test_settings_of_another_form_are_refused(quant):
    with pytest.raises(BitgrainError, match="quant_config"):
        parse(section(quant_config=quant))


def test_unknown_keys_are_refused_with_the_nearest_known():
    with pytest.raises(BitgrainError, match="skip_modules"):
        parse(section(skip_module=["lm_head"]))


# --- settings by layer tag and rules ------------------------------------------------------------------------------------------
def test_layer_tag_leaves_numbers_and_containers_out():
    assert layer_tag("model.layers.31.self_attn.k_proj") == "self_attn.k_proj"
    assert layer_tag("model.layers.0.mlp.experts.3.up_proj") == "mlp.experts.up_proj"
    assert layer_tag("lm_head") == "lm_head"


@pytest.mark.parametrize("tag", ["mlp.down_proj", NAME, "down_proj"])
def test_settings_by_tag_reach_the_module(tag):
    tensors, want = module(2, size=16, axis=0)
    tags = {tag: section(2, 16, 0)["quant_config"], "self_attn.q_proj": section(4)["quant_config"]}
    settings = section(quant_config=tags)
    assert torch.equal(decode(tensors, settings), want)
    config = parse(settings)
    assert tag in config.decide(view({"weight": torch.zeros(4, 8)})).why
    assert config.matched_rules == {tag}
    assert set(config.rules()) == {"lm_head", *tags}


def test_tag_without_settings_leaves_the_layer_alone():
    settings = section(quant_config={"mlp.down_proj": None, "mlp.up_proj": section()["quant_config"]})
    config = parse(settings)
    assert isinstance(config.decide(view({"weight": torch.zeros(4, 8)})).scheme, DenseScheme)
    other = config.decide(view({"weight": torch.zeros(4, 8)}, "model.layers.0.self_attn.q_proj"))
    assert "no entry" in other.why
    with pytest.raises(RuleMismatchError, match=NAME):
        decode(module()[0], settings)


def test_tag_with_other_settings_than_the_tensors_is_refused():
    settings = section(quant_config={"mlp.down_proj": section(8)["quant_config"]})
    with pytest.raises(LabelMismatchError, match="nbits"):
        decode(module(4)[0], settings)


@pytest.mark.parametrize("rule", [NAME, "mlp.down_proj"])
def test_rule_that_surely_covers_quantized_tensors_is_refused(rule):
    tensors, want = module()
    settings = section(skip_modules=["lm_head", rule])
    with pytest.raises(RuleMismatchError, match=NAME):
        decode(tensors, settings)
    config = parse(settings, tensors)
    config.trust_tensors = True
    assert torch.equal(config.decide(view(tensors)).scheme.to_weight(tensors).dequantize(), want)


@pytest.mark.parametrize("rule", ["mlp", "down_proj", "model.layers.0"])
def test_rule_that_versions_read_differently_leaves_the_word_to_the_tensors(rule):
    settings = section(skip_modules=[rule])
    tensors, want = module()
    assert torch.equal(decode(tensors, settings), want)
    choice = parse(settings).decide(view({"weight": torch.zeros(4, 8)}))
    assert isinstance(choice.scheme, DenseScheme)
    assert rule in choice.why


def test_dense_module_says_why():
    config = parse(section())
    assert config.decide(view({"weight": torch.zeros(4, 8)})).why == "quant_config, but its tensors are dense"
    assert "linear" in config.decide(view({"weight": torch.zeros(4, 8)}, "model.embed_tokens", ModuleKind.EMBEDDING)).why


def test_quantized_head_is_read_where_the_list_does_not_name_it():
    tensors, want = module()
    full = {f"lm_head.{local}": t for local, t in tensors.items()}
    config = HqqConfig.parse(replace(evidence(section(skip_modules=[]), full), read_small=full.__getitem__))
    assert torch.equal(config.decide(view(tensors, "lm_head", ModuleKind.LM_HEAD)).scheme.to_weight(tensors).dequantize(), want)


# --- refusals ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "settings"), [("nbits", {"nbits": 8}), ("axis", {"axis": 0}), ("group_size", {"group_size": 16})])
def test_settings_that_contradict_the_tensors_are_refused(name, settings):
    tensors, want = module()
    with pytest.raises(LabelMismatchError, match=f"{NAME}.{name}"):
        decode(tensors, section(**settings))
    config = parse(section(**settings), tensors)
    config.trust_tensors = True
    assert torch.equal(config.decide(view(tensors)).scheme.to_weight(tensors).dequantize(), want)


@pytest.mark.parametrize("stored", [True, False])
def test_channel_wise_that_contradicts_the_tensors_is_refused(stored):
    tensors, _ = module(8, channel_wise=stored)
    with pytest.raises(LabelMismatchError, match="channel_wise"):
        decode(tensors, section(8, channel_wise=not stored))


@pytest.mark.parametrize(
    ("local", "value"),
    [
        ("nbits", torch.tensor(7, dtype=torch.int32)),
        ("nbits", torch.tensor(1.6)),
        ("axis", torch.tensor(2, dtype=torch.int32)),
        ("group_size", torch.tensor(7, dtype=torch.int32)),
        ("group_size", torch.tensor(-8, dtype=torch.int32)),
        ("shape", torch.tensor([0, 24])),
        ("packing", text("8bit_u8")),
        ("packing", text("5bit_u8")),
        ("unpack_view_dtype", text("torch.int32")),
        ("compute_dtype", text("torch.int8")),
        ("view_as_float", flag(True)),
        ("quant_scale", flag(True)),
        ("quant_zero", flag(True)),
        ("round_zero", torch.tensor(2, dtype=torch.uint8)),
    ],
)
def test_impossible_descriptor_is_refused_by_name(local, value):
    with pytest.raises(BitgrainError, match=f"{NAME}.{local}"):
        decode(module()[0] | {local: value})


def test_quantized_scale_that_the_flag_denies_is_refused():
    tensors, _ = with_nested(module(8)[0], "scale", size=16)
    with pytest.raises(LabelMismatchError, match="quant_scale"):
        decode(tensors | {"quant_scale": flag(False)})


def test_quantized_scale_of_another_shape_is_refused():
    tensors, _ = with_nested(module(8)[0], "scale", size=16)
    with pytest.raises(LabelMismatchError, match=r"meta_scale\.shape"):
        decode(tensors | {"meta_scale.shape": torch.tensor([24, 2])})


def test_shape_that_the_architecture_denies_is_refused():
    tensors, _ = module()
    config = parse(section(), tensors)
    with pytest.raises(LabelMismatchError, match=f"{NAME}.shape"):
        config.decide(view(tensors, shape=(24, 16)))


@pytest.mark.parametrize("local", ["W_q", "scale", "zero", "nbits", "axis", "shape", "packing"])
@pytest.mark.parametrize("damage", ["delete", "rename", "cut", "retype"])
def test_damaged_tensor_is_refused_by_name(local, damage, tmp_path):
    assert_refused(module()[0], local, damage, tmp_path)


@pytest.mark.parametrize("local", ["scale_q", "meta_scale.scale", "meta_scale.zero", "meta_scale.nbits", "meta_scale.shape", "meta_scale.packing"])
@pytest.mark.parametrize("damage", ["delete", "rename", "retype"])
def test_damaged_tensor_of_a_quantized_scale_is_refused_by_name(local, damage, tmp_path):
    assert_refused(with_nested(module(8)[0], "scale", size=16)[0], local, damage, tmp_path, nbits=8)


def assert_refused(tensors, local, damage, folder, nbits=4):
    old = tensors.pop(local)
    if damage == "rename":
        tensors[f"{local}_old"] = old
    elif damage == "cut":
        tensors[local] = old[:-1].clone() if old.dim() else torch.stack([old, old])
    elif damage == "retype":
        tensors[local] = old.to(torch.int16) if not old.is_floating_point() else old.double()
    with pytest.raises(BitgrainError) as caught:
        checkpoint(folder, tensors, section(nbits)).dequantize("layer.weight")
    assert f"layer.{local}" in str(caught.value)


@pytest.mark.parametrize("local", [name for name in ALL if name not in ("nbits", "axis", "shape", "packing")])
def test_descriptor_that_only_some_modules_have_is_missed(local, tmp_path):
    whole = {f"a.{k}": v for k, v in module()[0].items()}
    rest = {f"b.{k}": v for k, v in module(seed=1)[0].items() if k != local}
    write_checkpoint(tmp_path, whole | rest, {"quantization_config": section()})
    with pytest.raises(BitgrainError, match=f"b.{local}"):
        bitgrain.open_checkpoint(tmp_path)


def test_extra_tensor_is_refused_by_name(tmp_path):
    with pytest.raises(BitgrainError, match=r"layer\.rotation"):
        checkpoint(tmp_path, module()[0] | {"rotation": torch.eye(4)}, section())


@pytest.mark.parametrize("local", ["scale", "zero"])
def test_value_that_is_not_finite_is_refused_by_name(local):
    tensors, _ = module()
    tensors[local][3] = float("nan")
    with pytest.raises(BadValueError) as caught:
        decode(tensors)
    assert caught.value.where == local


def test_scales_that_are_all_zero_are_refused():
    tensors, _ = module()
    with pytest.raises(BadValueError, match="scale"):
        decode(tensors | {"scale": torch.zeros_like(tensors["scale"])})


@pytest.mark.parametrize(("nbits", "bad"), [(5, 32), (6, 64), (1.58, 0b11000000)])
def test_code_beyond_the_width_is_refused(nbits, bad):
    tensors, _ = module(nbits)
    tensors["W_q"][0, 0] = bad
    with pytest.raises(BadValueError, match="W_q"):
        decode(tensors)


def test_bits_above_the_ten_codes_of_a_word_are_refused():
    tensors, _ = module(3)
    tensors["W_q"][0, 0] |= 1 << 30
    with pytest.raises(BadValueError, match="W_q"):
        decode(tensors)


def test_bias_is_kept_and_checked(tmp_path):
    tensors, want = module()
    assert torch.equal(checkpoint(tmp_path / "a", tensors | {"bias": torch.ones(16)}, section()).dequantize("layer.weight"), want)
    with pytest.raises(BitgrainError, match=r"layer\.bias"):
        checkpoint(tmp_path / "b", tensors | {"bias": torch.ones(15)}, section())


def test_examples_are_along_both_dimensions():
    assert {spec.row_index for _, spec, _ in HqqConfig.examples()} == {True, False}
    assert {spec.bits for _, spec, _ in HqqConfig.examples()} == {2, 3, 4, 8}
