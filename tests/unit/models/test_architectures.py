"""The registry, and what each architecture asks of a checkpoint."""

import time

import pytest

from bitgrain.errors import UnsupportedArchitectureError
from bitgrain.formats.base import ModuleKind
from bitgrain.models.config import ModelConfig
from bitgrain.models.registry import find_model, model_class
from tests.unit.models.fake_builder import FakeBuilder
from tests.unit.models.tiny_models import FAMILIES, LLAMA, QWEN2, QWEN3, QWEN3_MOE, random_tensors


def slots_of(config):
    parsed = ModelConfig.from_dict(config, "config.json")
    return model_class(parsed.architecture).slots(parsed)


def slot(config, name):
    return next(s for s in slots_of(config).modules if s.name == name)


def test_unknown_architecture_is_refused_with_the_known_ones():
    assert find_model("GPT2LMHeadModel") is None
    with pytest.raises(UnsupportedArchitectureError, match=r"GPT2LMHeadModel(.|\n)*LlamaForCausalLM.*Qwen3MoeForCausalLM"):
        model_class("GPT2LMHeadModel")


def test_registered_names_are_the_names_of_their_classes():
    for config in FAMILIES.values():
        assert model_class(config["architectures"][0]).__name__ == config["architectures"][0]


def test_llama_slots_are_its_modules_with_their_shapes():
    slots = slots_of({**LLAMA, "num_hidden_layers": 1})
    layer = "model.layers.0"
    assert [(s.name, s.kind.value, s.shape) for s in slots.modules] == [
        ("model.embed_tokens", "embedding", (96, 64)),
        (f"{layer}.input_layernorm", "vector", (64,)),
        (f"{layer}.post_attention_layernorm", "vector", (64,)),
        (f"{layer}.self_attn.q_proj", "linear", (64, 64)),
        (f"{layer}.self_attn.k_proj", "linear", (32, 64)),
        (f"{layer}.self_attn.v_proj", "linear", (32, 64)),
        (f"{layer}.self_attn.o_proj", "linear", (64, 64)),
        (f"{layer}.mlp.gate_proj", "linear", (112, 64)),
        (f"{layer}.mlp.up_proj", "linear", (112, 64)),
        (f"{layer}.mlp.down_proj", "linear", (64, 112)),
        ("model.norm", "vector", (64,)),
        ("lm_head", "lm_head", (96, 64)),
    ]
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    assert slots.fusion_groups == (
        (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
    )
    assert slots.attention_modules == (attention,)


def test_required_biases_are_those_that_the_architecture_computes_with():
    required = lambda config: {s.name.rpartition(".")[2] for s in slots_of(config).modules if s.bias == "required"}  # noqa: E731
    assert required(LLAMA) == set()
    assert required({**LLAMA, "attention_bias": True}) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert required({**LLAMA, "mlp_bias": True}) == {"gate_proj", "up_proj", "down_proj"}
    assert required(QWEN2) == {"q_proj", "k_proj", "v_proj"}


def test_tied_head_names_the_embedding():
    assert slots_of(QWEN3).tied == {"lm_head": "model.embed_tokens"}
    assert slots_of(LLAMA).tied == {}


def test_head_norms_have_the_size_of_a_head():
    assert slot(QWEN3, "model.layers.1.self_attn.k_norm").shape == (24,)
    assert slot(QWEN3, "model.layers.1.self_attn.o_proj").shape == (64, 96)


def test_experts_are_slots_of_their_own():
    config = {**QWEN3_MOE, "mlp_only_layers": [1]}
    assert slot(config, "model.layers.0.mlp.gate").shape == (6, 64)
    expert = slot(config, "model.layers.2.mlp.experts.5.down_proj")
    assert (expert.kind, expert.shape) == (ModuleKind.EXPERT, (64, 40))
    assert slot(config, "model.layers.1.mlp.down_proj").shape == (64, 112)
    groups = slots_of(config).fusion_groups
    assert ("model.layers.0.mlp.experts.3.gate_proj", "model.layers.0.mlp.experts.3.up_proj") in groups


@pytest.mark.parametrize("name", FAMILIES)
def test_building_takes_every_slot_once_and_nothing_else(name):
    config = {**FAMILIES[name], "mlp_only_layers": [1]} if name == "qwen3_moe" else FAMILIES[name]
    parsed = ModelConfig.from_dict(config, "config.json")
    model = model_class(parsed.architecture)
    builder = FakeBuilder(parsed, random_tensors(config))
    model(builder)
    assert sorted(builder.taken) == sorted(s.name for s in model.slots(parsed).modules)


def test_slots_of_a_hundred_thousand_modules_do_not_take_quadratic_time():
    config = {**QWEN3_MOE, "num_hidden_layers": 64, "num_experts": 512}
    start = time.perf_counter()
    assert len(slots_of(config).modules) > 98_000
    assert time.perf_counter() - start < 30  # about 1.5 s; time that grows with the square would be an hour
