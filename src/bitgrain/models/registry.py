"""Which class runs which architecture; classes are imported when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from bitgrain.errors import ConfigError, UnsupportedArchitectureError
from bitgrain.models.text_part import text_type, wrapper_of
from bitgrain.registry import Registry

if TYPE_CHECKING:
    from bitgrain.models.causal_lm import CausalLM

ENTRY_POINT_GROUP = "bitgrain.models"

# Architecture name to a class, or to "module:class".
models: Registry[type[CausalLM] | str] = Registry("architecture", ENTRY_POINT_GROUP)
models.add("DeepseekV2ForCausalLM", "bitgrain.models.deepseek_v2:DeepseekV2ForCausalLM")
models.add("DeepseekV3ForCausalLM", "bitgrain.models.deepseek_v3:DeepseekV3ForCausalLM")
models.add("Gemma2ForCausalLM", "bitgrain.models.gemma2:Gemma2ForCausalLM")
models.add("Gemma3ForCausalLM", "bitgrain.models.gemma3:Gemma3ForCausalLM")
models.add("GemmaForCausalLM", "bitgrain.models.gemma:GemmaForCausalLM")
models.add("Glm4ForCausalLM", "bitgrain.models.glm4:Glm4ForCausalLM")
models.add("Glm4MoeForCausalLM", "bitgrain.models.glm4_moe:Glm4MoeForCausalLM")
models.add("GlmForCausalLM", "bitgrain.models.glm:GlmForCausalLM")
models.add("GptOssForCausalLM", "bitgrain.models.gpt_oss:GptOssForCausalLM")
models.add("LlamaForCausalLM", "bitgrain.models.llama:LlamaForCausalLM")
models.add("Ministral3ForCausalLM", "bitgrain.models.ministral3:Ministral3ForCausalLM")
models.add("MinistralForCausalLM", "bitgrain.models.ministral:MinistralForCausalLM")
models.add("MistralForCausalLM", "bitgrain.models.mistral:MistralForCausalLM")
models.add("MixtralForCausalLM", "bitgrain.models.mixtral:MixtralForCausalLM")
models.add("Olmo2ForCausalLM", "bitgrain.models.olmo2:Olmo2ForCausalLM")
models.add("OlmoeForCausalLM", "bitgrain.models.olmoe:OlmoeForCausalLM")
models.add("Phi3ForCausalLM", "bitgrain.models.phi3:Phi3ForCausalLM")
models.add("Qwen2ForCausalLM", "bitgrain.models.qwen2:Qwen2ForCausalLM")
models.add("Qwen2MoeForCausalLM", "bitgrain.models.qwen2_moe:Qwen2MoeForCausalLM")
models.add("Qwen3ForCausalLM", "bitgrain.models.qwen3:Qwen3ForCausalLM")
models.add("Qwen3MoeForCausalLM", "bitgrain.models.qwen3_moe:Qwen3MoeForCausalLM")

# `model_type` to the architecture of its causal language model, for configurations that name no architecture.
MODEL_TYPES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def architecture_of(config: Mapping[str, Any]) -> str:
    """The first of `architectures`; where config.json has none, what its `model_type` stands for; "" if nothing says.

    Of a multimodal model whose text part can run (text_part.WRAPPERS): the architecture of that part.

    Raises:
        ConfigError: `architectures` is not a list of names, or a multimodal configuration says nothing of its text model.
    """
    wrapper = wrapper_of(config)
    if wrapper:
        return MODEL_TYPES.get(text_type(config, wrapper), wrapper)
    names = config.get("architectures")
    if names is None:
        kind = config.get("model_type")
        return MODEL_TYPES.get(kind, "") if isinstance(kind, str) else ""
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ConfigError("config.json: architectures", repr(names), "a list of names", "correct config.json")
    return names[0]


def find_model(architecture: str) -> type[CausalLM] | None:
    """The class of an architecture; None if there is none."""
    if architecture not in models.names():
        return None
    value = models[architecture]
    if isinstance(value, str):
        module, _, name = value.partition(":")
        value = cast("type[CausalLM]", getattr(import_module(module), name))
    return value


def model_class(architecture: str) -> type[CausalLM]:
    """The class of an architecture.

    Raises:
        UnsupportedArchitectureError: there is none; names those that there are.
    """
    model = find_model(architecture)
    if model is None:
        raise UnsupportedArchitectureError(
            "config.json: architectures",
            repr(architecture) if architecture else "no architecture",
            f"one of {', '.join(sorted(models.names()))}",
            "use another program for this model, or install a package that adds the architecture (entry point bitgrain.models)",
        )
    return model
