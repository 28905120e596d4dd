"""The text model of multimodal checkpoints, in every naming, with and without quantization."""

import json

import pytest
import torch
from safetensors.torch import load_file

import bitgrain
from bitgrain.errors import BitgrainError, ConfigError, UnexpectedTensorError, UnsupportedArchitectureError
from bitgrain.formats.slots import TEXT_ONLY
from bitgrain.models.config import ModelConfig
from bitgrain.models.registry import architecture_of
from tests.checkpoints import write_checkpoint
from tests.unit.models.library import distance, ids_of, library_logits, library_model
from tests.unit.models.quantized import PRODUCERS, quantize
from tests.unit.models.tiny_models import GEMMA3, LLAMA, MINISTRAL3, MISTRAL

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
PIXTRAL = {**VISION, "model_type": "pixtral", "head_dim": 16}
EVEN = {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


def multimodal(architecture, text, vision, **more):
    section = {key: value for key, value in {**text, **EVEN}.items() if key != "architectures" and value is not None}
    return {"architectures": [architecture], "text_config": section, "vision_config": vision, "tie_word_embeddings": section["tie_word_embeddings"], **more}


CONFIGS = {
    "gemma3": multimodal("Gemma3ForConditionalGeneration", GEMMA3, VISION, mm_tokens_per_image=4),
    "mistral3": multimodal("Mistral3ForConditionalGeneration", MISTRAL, PIXTRAL),
    "mistral3-of-ministral3": multimodal("Mistral3ForConditionalGeneration", MINISTRAL3, PIXTRAL),
    "llava": multimodal("LlavaForConditionalGeneration", LLAMA, {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}),
}
TEXT = {"gemma3": "Gemma3ForCausalLM", "mistral3": "MistralForCausalLM", "mistral3-of-ministral3": "Ministral3ForCausalLM", "llava": "LlamaForCausalLM"}


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    """(folder as the library writes it, its logits, the text architecture)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = library_model(CONFIGS[request.param])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name and "embed" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape) + (parameter.dim() == 1))
    model.save_pretrained(folder)
    return folder, library_logits(model, ids_of()), TEXT[request.param]


def renamed(name):
    """The same tensor in the naming of newer programs."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return name.replace("language_model.model.", "model.language_model.", 1) if name.startswith("language_model.") else f"model.{name}"


def test_text_model_runs_as_it_is_saved_and_in_the_other_naming(saved, tmp_path):
    folder, expected, architecture = saved
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in tensors)
    other = write_checkpoint(tmp_path / "other", {renamed(n): t for n, t in tensors.items()}, json.loads((folder / "config.json").read_text()))
    plain = write_checkpoint(tmp_path / "plain", {n.removeprefix("language_model."): t for n, t in tensors.items()}, json.loads((folder / "config.json").read_text()))
    for path in (folder, other, plain):
        checkpoint = bitgrain.open_checkpoint(path)
        assert checkpoint.architecture == architecture
        model = bitgrain.load_model(path, device="cpu", dtype="float32")
        assert distance(model.logits(ids_of()), expected) < 1e-5


def test_plan_names_the_rule_for_everything_that_text_does_not_go_through(saved):
    folder, _, _ = saved
    plan = bitgrain.open_checkpoint(folder).plan
    left_out = {name for name in load_file(folder / "model.safetensors") if not name.startswith("language_model.")}
    assert left_out and dict(plan.ignored) == dict.fromkeys(left_out, TEXT_ONLY)
    assert all(name.startswith("language_model.") for name in plan.modules)


@pytest.mark.parametrize("new_names", [False, True], ids=["published-names", "newer-names"])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_rules_of_a_quantizer_match_the_stored_names(saved, tmp_path, producer, new_names):
    folder, _, _ = saved
    name_of = renamed if new_names else lambda name: name
    tensors = {name_of(n): t for n, t in load_file(folder / "model.safetensors").items()}
    base = "model.language_model" if new_names else "language_model.model"
    kept = f"{base}.layers.1.mlp.down_proj"
    writer, section = PRODUCERS[producer]
    stored, meant = quantize(tensors, writer, dense=lambda module: module == kept or base not in module)
    key = {"compressed-tensors": "ignore", "fp8": "modules_to_not_convert", "awq": "modules_to_not_convert"}.get(section["quant_method"])
    if key:
        section = {**section, key: [kept, "lm_head", f"{base.rpartition('.')[0]}.lm_head"]}
    config = json.loads((folder / "config.json").read_text())
    quantized = write_checkpoint(tmp_path / "q", stored, {**config, "quantization_config": section})
    dense = write_checkpoint(tmp_path / "d", meant, config)
    plan = bitgrain.open_checkpoint(quantized).plan
    assert plan.modules[kept].label == "dense float32" and "dense" not in plan.modules[f"{base}.layers.0.mlp.down_proj"].label
    if key:
        assert kept in plan.modules[kept].why
    model, twin = (bitgrain.load_model(path, device="cpu", dtype="float32", activations="none") for path in (quantized, dense))
    assert distance(model.logits(ids_of()), twin.logits(ids_of())) < 1e-4


@pytest.mark.parametrize("new_names", [False, True], ids=["published-names", "newer-names"])
def test_rules_in_the_other_spelling_match_too(saved, tmp_path, new_names):
    folder, _, _ = saved
    tensors = {renamed(n) if new_names else n: t for n, t in load_file(folder / "model.safetensors").items()}
    base, other = ("model.language_model", "language_model.model") if new_names else ("language_model.model", "model.language_model")
    writer, section = PRODUCERS["packed-int4"]
    stored, _ = quantize(tensors, writer, dense=lambda module: base not in module or "layers.0" in module)
    group = {**section["config_groups"]["group_0"], "targets": [f"re:{other}.layers.*_proj$".replace(".", "\\.").replace("layers\\.*", "layers.*")]}
    section = {**section, "config_groups": {"group_0": group}, "ignore": [f"{other}.layers.0.mlp.down_proj"]}
    config = json.loads((folder / "config.json").read_text())
    plan = bitgrain.open_checkpoint(write_checkpoint(tmp_path / "q", stored, {**config, "quantization_config": section})).plan
    assert plan.modules[f"{base}.layers.1.mlp.down_proj"].label == "W4A16 int4 g32"
    assert f"{base}.layers.0.mlp.down_proj" in plan.modules[f"{base}.layers.0.mlp.down_proj"].why
    assert plan.notes == ()


# ---- configurations ----


@pytest.fixture
def small(tmp_path):
    """Writes a multimodal Llama of one layer with changes of its config.json and of its tensors."""

    def write(tensors=None, **config):
        text = {**CONFIGS["llava"], "text_config": {**CONFIGS["llava"]["text_config"], "num_hidden_layers": 1}, **config}
        size = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64), "gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
        layer = "language_model.model.layers.0"
        made = {f"{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}.weight": torch.randn(shape) for name, shape in size.items()}
        made = {name.replace(".self_attn.up", ".mlp.up"): value for name, value in made.items()}
        made |= {f"{layer}.{norm}.weight": torch.ones(64) for norm in ("input_layernorm", "post_attention_layernorm")}
        made |= {"language_model.model.norm.weight": torch.ones(64), "language_model.model.embed_tokens.weight": torch.randn(96, 64)}
        return write_checkpoint(tmp_path / "c", {k: v for k, v in {**made, **(tensors or {})}.items() if v is not None}, text)

    return write


HEAD = {"language_model.lm_head.weight": torch.randn(96, 64)}


@pytest.mark.parametrize(
    ("outer", "inner", "head", "tied"),
    [(None, None, True, False), (None, None, False, True), (True, False, True, False), (False, True, False, True), (False, False, True, False), (None, False, True, False)],
)
def test_stored_head_decides_where_the_two_places_of_the_key_do_not(small, outer, inner, head, tied):
    text = {**CONFIGS["llava"]["text_config"], "num_hidden_layers": 1, "tie_word_embeddings": inner}
    path = small(HEAD if head else None, text_config=text, tie_word_embeddings=outer)
    assert (bitgrain.open_checkpoint(path).plan.modules["language_model.lm_head"].tied_to is not None) is tied


def test_head_that_both_places_call_separate_must_be_stored(small):
    with pytest.raises(BitgrainError, match="lm_head"):
        bitgrain.open_checkpoint(small())


def test_dtype_and_end_of_text_may_stand_in_either_place(small):
    text = {**CONFIGS["llava"]["text_config"], "num_hidden_layers": 1, "torch_dtype": "float16", "eos_token_id": 7}
    assert bitgrain.open_checkpoint(small(HEAD, text_config=text)).dtype() == "float16"
    model = bitgrain.load_model(small(HEAD, text_config=text), device="cpu")
    assert (model.dtype, model.config.eos_token_ids) == (torch.float16, (7,))
    model = bitgrain.load_model(small(HEAD, text_config=text, eos_token_id=[3, 4], dtype="bfloat16"), device="cpu")
    assert (model.dtype, model.config.eos_token_ids) == (torch.bfloat16, (3, 4))


def test_tensor_of_an_unknown_part_is_refused(small):
    with pytest.raises(UnexpectedTensorError, match="audio_tower"):
        bitgrain.open_checkpoint(small({**HEAD, "audio_tower.layers.0.weight": torch.zeros(4, 4)}))
    with pytest.raises(UnexpectedTensorError, match="vision_tower_of_another_name"):
        bitgrain.open_checkpoint(small({**HEAD, "vision_tower_of_another_name.weight": torch.zeros(4, 4)}))


def test_problem_of_the_text_model_is_reported_with_its_section(small):
    with pytest.raises(BitgrainError, match=r"config\.json: text_config: hidden_act"):
        bitgrain.open_checkpoint(small(HEAD, text_config={**CONFIGS["llava"]["text_config"], "hidden_act": "mish"}))


def test_multimodal_configuration_without_its_text_section_is_refused(small):
    with pytest.raises(ConfigError, match="text_config"):
        bitgrain.open_checkpoint(small(HEAD, text_config=None))


def test_text_model_of_an_unknown_type_is_refused(small):
    with pytest.raises(UnsupportedArchitectureError, match="LlavaForConditionalGeneration"):
        bitgrain.load_model(small(HEAD, text_config={"model_type": "opt"}), device="cpu")


def test_text_type_may_be_left_out():
    assert architecture_of({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"hidden_size": 8}}) == "Gemma3ForCausalLM"
    assert architecture_of({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}) == "Ministral3ForCausalLM"


def test_sizes_that_the_section_leaves_out_are_those_of_the_library():
    """As Gemma 3 4B and LLaVA 1.5 are published."""
    from transformers import Gemma3TextConfig, LlamaConfig, Ministral3Config, MistralConfig

    for wrapper, library, stated in (
        ("Gemma3ForConditionalGeneration", Gemma3TextConfig, {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}),
        ("LlavaForConditionalGeneration", LlamaConfig, {"max_position_embeddings": 4096, "vocab_size": 32064, "rms_norm_eps": 1e-5}),
        ("Mistral3ForConditionalGeneration", MistralConfig, {"num_attention_heads": None}),
        ("Mistral3ForConditionalGeneration", Ministral3Config, {"model_type": "ministral3"}),
    ):
        text = library(**{key: value for key, value in stated.items() if value is not None and key != "model_type"})
        config = ModelConfig.from_dict({"architectures": [wrapper], "text_config": stated}, "config.json")
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "rms_norm_eps")
        assert [getattr(config, name) for name in names] == [getattr(text, name) for name in names]
        assert config.num_key_value_heads == text.num_key_value_heads
        assert config.head_dim == (text.head_dim or text.hidden_size // text.num_attention_heads)
        assert {w for w in config.windows if w} == ({text.sliding_window} if getattr(text, "sliding_window", None) else set())
