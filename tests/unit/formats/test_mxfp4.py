"""MXFP4 experts of gpt-oss models: stacks divided per expert, against an independent decoder and transformers' own model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitgrain
from bitgrain.errors import BadValueError, BitgrainError, ConfigError, ConflictingConfigError, ManyProblemsError, RuleMismatchError
from bitgrain.formats.mxfp4 import CONFIG
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.synthetic import evidence

LAYERS, EXPERTS, HIDDEN, SIZE, VOCAB = 2, 3, 64, 96, 40
IGNORED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": IGNORED}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
FIRST = "model.layers.0.mlp.experts"


def config(**changes):
    return {
        "model_type": "gpt_oss", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": SIZE, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "attention_bias": True, "tie_word_embeddings": False,
        "quantization_config": SECTION, **changes,
    }  # fmt: skip


def random_blocks(generator, rows, columns, experts=EXPERTS):
    """(blocks, scales, float32 [E, rows, columns]), decoded code by code with Python's own arithmetic."""
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    values = []
    for row, exponents in zip(blocks.flatten(0, 1).tolist(), scales.flatten(0, 1).tolist(), strict=True):
        for block, exponent in zip(row, exponents, strict=True):
            for byte in block:
                values += [E2M1[byte & 15] * 2.0 ** (exponent - 127), E2M1[byte >> 4] * 2.0 ** (exponent - 127)]
    return blocks, scales, torch.tensor(values).view(experts, rows, columns)


def random_checkpoint(seed=0, hidden=HIDDEN, size=SIZE, dense_layers=()):
    """(tensors as stored, weights per expert by name, state dict of transformers' model in float32)."""
    g = torch.Generator().manual_seed(seed)
    noise = lambda *shape: (torch.randn(shape, generator=g) * 0.3).bfloat16()  # noqa: E731
    stored = {"model.embed_tokens.weight": noise(VOCAB, hidden), "lm_head.weight": noise(VOCAB, hidden), "model.norm.weight": 1 + noise(hidden)}
    wanted, state = {}, {}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        stored |= {f"{name}.{part}_layernorm.weight": 1 + noise(hidden) for part in ("input", "post_attention")}
        for part, n, k in (("q", 64, hidden), ("k", 32, hidden), ("v", 32, hidden), ("o", hidden, 64)):
            stored |= {f"{name}.self_attn.{part}_proj.weight": noise(n, k), f"{name}.self_attn.{part}_proj.bias": noise(n)}
        stored |= {f"{name}.self_attn.sinks": noise(4), f"{name}.mlp.router.weight": noise(EXPERTS, hidden) * 4, f"{name}.mlp.router.bias": noise(EXPERTS)}
        experts = f"{name}.mlp.experts"
        for part, n, k in (("gate_up_proj", 2 * size, hidden), ("down_proj", hidden, size)):
            stored[f"{experts}.{part}_bias"] = noise(EXPERTS, n)
            if layer in dense_layers:
                stored[f"{experts}.{part}"] = noise(EXPERTS, k, n)
                values = stored[f"{experts}.{part}"].float().transpose(1, 2)
            else:
                stored[f"{experts}.{part}_blocks"], stored[f"{experts}.{part}_scales"], values = random_blocks(g, n, k)
            state[f"{experts}.{part}"] = values.transpose(1, 2)
            for e in range(EXPERTS):
                halves = {"gate_proj": values[e, 0::2], "up_proj": values[e, 1::2]} if part == "gate_up_proj" else {part: values[e]}
                wanted |= {f"{experts}.{e}.{own}.weight": half for own, half in halves.items()}
    state |= {name: tensor.float() for name, tensor in stored.items() if tensor.dtype is torch.bfloat16 and name not in state}
    return stored, wanted, state


def write(folder, stored, settings):
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    stored, wanted, state = random_checkpoint()
    return write(tmp_path_factory.mktemp("mxfp4"), stored, config()), wanted, state


def damaged(made, folder, change=None, settings=None):
    stored = load_file(made[0] / "model.safetensors")
    if change is not None:
        change(stored)
    return write(folder, stored, config() if settings is None else settings)


@pytest.mark.parametrize("folder", golden_folders("mxfp4-moe"), ids=lambda p: p.name)
def test_golden_weights(folder):
    assert check_golden(folder) == 2


# --- what the tensors mean ------------------------------------------------------------------------------------------------
def test_every_expert_is_the_independently_decoded_matrix(made):
    folder, wanted, _ = made
    checkpoint = bitgrain.open_checkpoint(folder)
    assert checkpoint.plan.format == "mxfp4-moe" and checkpoint.architecture == "GptOssForCausalLM"
    assert len(wanted) == LAYERS * EXPERTS * 3
    for name, values in wanted.items():
        assert torch.equal(checkpoint.dequantize(name), values), name


def test_gate_is_the_even_rows_and_up_the_odd_ones(made):
    checkpoint = bitgrain.open_checkpoint(made[0])
    stored = load_file(made[0] / "model.safetensors")
    row = stored[f"{FIRST}.gate_up_proj_blocks"][2, 7].flatten()  # row 7 is up's row 3
    scale = torch.exp2(stored[f"{FIRST}.gate_up_proj_scales"][2, 7].double() - 127)
    low, high = (torch.tensor(E2M1, dtype=torch.float64)[(row >> shift & 15).long()] for shift in (0, 4))
    want = torch.stack([low, high], 1).flatten() * scale.repeat_interleave(32)
    assert torch.equal(checkpoint.dequantize(f"{FIRST}.2.up_proj.weight")[3].double(), want)


@pytest.mark.parametrize(("hidden", "size"), [(64, 64), (64, 32), (32, 160)], ids=["square", "square-fused", "wide"])
def test_sizes_whose_shapes_could_be_read_both_ways(tmp_path, hidden, size):
    stored, wanted, _ = random_checkpoint(1, hidden, size)
    checkpoint = bitgrain.open_checkpoint(write(tmp_path / "c", stored, config(hidden_size=hidden, intermediate_size=size)))
    for name, values in wanted.items():
        assert torch.equal(checkpoint.dequantize(name), values), name


@pytest.mark.parametrize("rule", ["model.layers.1.mlp.experts", "model.layers.1.*.experts"])
def test_layer_that_a_rule_leaves_out_is_dense_and_transposed(tmp_path, rule):
    stored, wanted, _ = random_checkpoint(2, dense_layers=(1,))
    section = {**SECTION, "modules_to_not_convert": [*IGNORED, rule]}
    checkpoint = bitgrain.open_checkpoint(write(tmp_path / "c", stored, config(quantization_config=section)))
    for name, values in wanted.items():
        assert torch.equal(checkpoint.dequantize(name), values), name
    modules = checkpoint.plan.modules
    assert modules["model.layers.1.mlp.experts.0.up_proj"].label == "dense bfloat16"
    assert rule in modules["model.layers.1.mlp.experts.0.up_proj"].why
    assert modules["model.layers.0.mlp.experts.0.up_proj"].label == "W4A16 fp4_e2m1 g32 e8m0"


@pytest.mark.parametrize("how", ["mxfp4", "dense"])
def test_logits_are_those_of_the_library(tmp_path, how):
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed: nothing to compare with")
    stored, _, state = random_checkpoint(3, dense_layers=range(LAYERS) if how == "dense" else ())
    settings = config()
    if how == "dense":
        del settings["quantization_config"]
    plain = {k: v for k, v in settings.items() if k != "quantization_config"}
    theirs = transformers.GptOssForCausalLM(transformers.GptOssConfig(**plain, attn_implementation="eager")).float().eval()
    theirs.load_state_dict(state, strict=True)
    ids = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0]
    model = bitgrain.load_model(write(tmp_path / "c", stored, settings), dtype="float32")
    assert model.plan.format == ("mxfp4-moe" if how == "mxfp4" else "unquantized")
    # sums in another order, 1e-7 apart in every product; weights this large let some tokens amplify that a thousand times
    difference = (model.logits(ids) - expected).abs().amax(1)
    assert difference.max() < 3e-4 * expected.std() and difference.median() < 1e-5 * expected.std()


def test_checkpoint_of_an_unknown_architecture_shows_its_layout(made, tmp_path):
    settings = {**config(), "model_type": "something_else"}
    checkpoint = bitgrain.open_checkpoint(damaged(made, tmp_path / "c", settings=settings))
    for name, values in made[1].items():
        assert torch.equal(checkpoint.dequantize(name), values), name


# --- which format, which rules ----------------------------------------------------------------------------------------------
def test_detection_by_method_sidecar_and_names():
    blocks = {f"{FIRST}.down_proj_blocks": torch.zeros(2, 4, 3, 16, dtype=torch.uint8)}
    assert CONFIG.detect(evidence(SECTION)).score == 100
    assert CONFIG.detect(evidence(None, blocks, {"quantization_config.json": SECTION})).score == 80
    assert CONFIG.detect(evidence(None, blocks)).score == 50
    assert CONFIG.detect(evidence({"quant_method": "quark"}, blocks)) is None
    assert CONFIG.detect(evidence(None, {f"{FIRST}.down_proj": torch.zeros(2, 4, 3)})) is None


@pytest.mark.parametrize("section", [None, {"quant_method": "mxfp4"}, {"quant_method": "MXFP4", "modules_to_not_convert": None, "dequantize": False}])
def test_spellings_of_the_configuration(made, tmp_path, section):
    settings = config()
    settings["quantization_config"] = section
    checkpoint = bitgrain.open_checkpoint(damaged(made, tmp_path / "c", settings=settings))
    assert checkpoint.plan.format == "mxfp4-moe"
    assert checkpoint.plan.modules[f"{FIRST}.0.gate_proj"].label == "W4A16 fp4_e2m1 g32 e8m0"
    assert checkpoint.plan.modules["lm_head"].label == "dense bfloat16"


@pytest.mark.parametrize("word", ["mxfp4", "mxfp4-moe", "gpt_oss_mxfp4", "MXFP4"])
def test_words_that_agree_with_the_checkpoint(made, word):
    assert bitgrain.open_checkpoint(made[0], quantization=word).plan.format == "mxfp4-moe"


@pytest.mark.parametrize("word", ["mxfp8", "gptq", "fp8"])
def test_words_that_do_not_agree_are_refused(made, word):
    with pytest.raises(ConflictingConfigError, match="mxfp4-moe"):
        bitgrain.open_checkpoint(made[0], quantization=word)


def test_the_word_of_a_dense_checkpoint_is_still_the_run_s_own_quantization(tmp_path):
    stored, _, _ = random_checkpoint(2, dense_layers=range(LAYERS))
    settings = {k: v for k, v in config().items() if k != "quantization_config"}
    plan = bitgrain.open_checkpoint(write(tmp_path / "c", stored, settings), quantization="mxfp4").plan
    assert plan.modules[f"{FIRST}.0.gate_proj"].label.startswith("online mxfp4")
    assert plan.modules["model.layers.0.mlp.router"].label == "dense bfloat16"


@pytest.mark.parametrize(
    ("change", "names"),
    [({"modules_to_not_convert": 3}, "modules_to_not_convert"), ({"modules_to_convert": ["x"]}, "modules_to_convert"), ({"bits": 4}, "bits")],
)
def test_configuration_is_refused_by_name(change, names):
    with pytest.raises(ConfigError, match=names):
        CONFIG.parse(evidence({**SECTION, **change}))


def test_excluded_experts_with_blocks_are_refused(made, tmp_path):
    section = {**SECTION, "modules_to_not_convert": [*IGNORED, "model.layers.1.mlp.experts"]}
    folder = damaged(made, tmp_path / "c", settings=config(quantization_config=section))
    with pytest.raises(ManyProblemsError) as caught:
        bitgrain.open_checkpoint(folder)
    assert {type(p) for p in caught.value.problems} == {RuleMismatchError} and len(caught.value.problems) == 3 * EXPERTS
    assert bitgrain.open_checkpoint(folder, trust_tensors=True).plan.modules["model.layers.1.mlp.experts.0.down_proj"].label.startswith("W4A16 fp4")


# --- what is refused --------------------------------------------------------------------------------------------------------
def cut(name, where):
    def change(tensors):
        tensors[name] = tensors[name][where].contiguous()

    return change


def fill(name, value):
    def change(tensors):
        tensors[name].flatten()[5] = value

    return change


GATE_UP, DOWN = f"{FIRST}.gate_up_proj", f"{FIRST}.down_proj"
DAMAGES = {
    "blocks missing": (lambda t: t.pop(f"{GATE_UP}_blocks"), f"{GATE_UP}_blocks"),
    "scales missing": (lambda t: t.pop(f"{DOWN}_scales"), f"{DOWN}_scales"),
    "bias missing": (lambda t: t.pop(f"{GATE_UP}_bias"), f"{GATE_UP}_bias"),
    "all of down missing": (lambda t: [t.pop(f"{DOWN}_{k}") for k in ("blocks", "scales", "bias")], f"{FIRST}.0.down_proj"),
    "sinks missing": (lambda t: t.pop("model.layers.1.self_attn.sinks"), "model.layers.1.self_attn.sinks"),
    "router bias missing": (lambda t: t.pop("model.layers.1.mlp.router.bias"), "model.layers.1.mlp.router.bias"),
    "expert missing": (cut(f"{DOWN}_blocks", slice(0, EXPERTS - 1)), f"{DOWN}_blocks"),
    "row of blocks missing": (cut(f"{GATE_UP}_blocks", (slice(None), slice(0, -1))), f"{GATE_UP}_blocks"),
    "row of scales missing": (cut(f"{GATE_UP}_scales", (slice(None), slice(0, -2))), f"{GATE_UP}_scales"),
    "block missing": (cut(f"{DOWN}_blocks", (slice(None), slice(None), slice(0, -1))), f"{DOWN}_blocks"),
    "short blocks": (lambda t: t.update({f"{DOWN}_blocks": t[f"{DOWN}_blocks"].reshape(EXPERTS, HIDDEN, -1, 8)}), f"{DOWN}_blocks"),
    "flat blocks": (lambda t: t.update({f"{DOWN}_blocks": t[f"{DOWN}_blocks"].flatten(2)}), f"{DOWN}_blocks"),
    "short bias": (cut(f"{GATE_UP}_bias", (slice(None), slice(0, -2))), f"{GATE_UP}_bias"),
    "short sinks": (cut("model.layers.1.self_attn.sinks", slice(0, 3)), "model.layers.1.self_attn.sinks"),
    "scales of another type": (lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"].half()}), f"{FIRST}.0.down_proj.scales, part of {DOWN}_scales"),
    "blocks of another type": (lambda t: t.update({f"{DOWN}_blocks": t[f"{DOWN}_blocks"].short()}), f"{FIRST}.0.down_proj.blocks"),
    "dense beside blocks": (lambda t: t.update({DOWN: torch.zeros(EXPERTS, SIZE, HIDDEN).half()}), f"{FIRST}.0.down_proj.weight"),
    "an expert twice": (lambda t: t.update({f"{FIRST}.1.up_proj.bias": torch.zeros(SIZE).half()}), f"{FIRST}.1.up_proj.bias"),
    "unknown tensor": (lambda t: t.update({f"{DOWN}_zeros": torch.zeros(3)}), f"{DOWN}_zeros"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_from_headers_and_named(made, tmp_path, name):
    change, named = DAMAGES[name]
    with pytest.raises(BitgrainError) as caught:
        bitgrain.open_checkpoint(damaged(made, tmp_path / "c", change))
    assert named in str(caught.value)


@pytest.mark.parametrize("name", ["blocks missing", "scales missing", "bias missing", "expert missing", "row of scales missing", "scales of another type"])
def test_damage_of_a_stack_is_one_problem(made, tmp_path, name):
    with pytest.raises(BitgrainError) as caught:
        bitgrain.open_checkpoint(damaged(made, tmp_path / "c", DAMAGES[name][0]))
    assert not isinstance(caught.value, ManyProblemsError)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (fill(f"{DOWN}_scales", 255), f"{FIRST}.0.down_proj.scales, part of {DOWN}_scales"),
        (fill(f"{GATE_UP}_bias", float("nan")), f"{FIRST}.0.up_proj.bias, part of {GATE_UP}_bias"),
        (lambda t: t["model.layers.1.self_attn.sinks"].fill_(torch.inf), "model.layers.1.self_attn.sinks"),
    ],
    ids=["nan-scale", "nan-bias", "infinite-sink"],
)
def test_bad_values_are_refused_by_name(made, tmp_path, change, named):
    with pytest.raises(BadValueError) as caught:
        bitgrain.load_model(damaged(made, tmp_path / "c", change), dtype="float32")
    assert named in str(caught.value)


def test_sizes_of_another_model_are_refused_by_tensor(made, tmp_path):
    with pytest.raises(BitgrainError, match="gate_up_proj_blocks"):
        bitgrain.open_checkpoint(damaged(made, tmp_path / "c", settings=config(num_local_experts=EXPERTS + 1)))
    with pytest.raises(BitgrainError, match="down_proj_blocks"):
        bitgrain.open_checkpoint(damaged(made, tmp_path / "c", settings=config(intermediate_size=SIZE + 32)))
