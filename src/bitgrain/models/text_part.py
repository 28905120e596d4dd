"""The text model of a checkpoint: all of it, or the part of a multimodal model that text goes through.

A multimodal config.json describes the text model in a section, and its tensors lie under names of their own:

    language_model.model.layers.0..., language_model.lm_head    (as most such checkpoints are published)
    model.language_model.layers.0..., lm_head                   (as transformers names them since 4.52)

Modules keep the names under which they are stored, so that a quantizer's rules match them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bitgrain.errors import ConfigError

# Multimodal architectures whose text part can run, and `model_type` of that part where its section names none...
WRAPPERS = {
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Mistral3ForConditionalGeneration": "mistral",
    "LlavaForConditionalGeneration": "llama",
}
# ... and what such a configuration's own `model_type` stands for, where it names no architecture.
WRAPPER_TYPES = {"gemma3": "Gemma3ForConditionalGeneration", "mistral3": "Mistral3ForConditionalGeneration", "llava": "LlavaForConditionalGeneration"}
# Sizes that such a section leaves out where they are those of the library's configuration classes (transformers 5.19).
_LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048}
_MISTRAL = {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SIZES: Mapping[str, Mapping[str, int]] = {
    "gemma3_text": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "max_position_embeddings": 131072,
    },
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "ministral3": {**_MISTRAL, "vocab_size": 131072, "num_hidden_layers": 34, "max_position_embeddings": 262144},
}  # fmt: skip
SECTION = "text_config"
BASES = ("language_model.model", "model.language_model", "model")
HEADS = ("language_model.lm_head", "lm_head")
# Modules of such a checkpoint that text does not go through.
OTHER_PARTS = ("vision_tower", "multi_modal_projector", "image_newline")
# Keys outside of the section that count for the text model.
OUTER_KEYS = ("dtype", "torch_dtype", "eos_token_id")


@dataclass(frozen=True, slots=True)
class ModuleNames:
    """Under which names the text model is stored.

    Args:
        base:  of everything but the head.
        aside: modules that belong to other parts of the checkpoint.
    """

    base: str = "model"
    head: str = "lm_head"
    aside: tuple[str, ...] = ()

    @property
    def embedding(self) -> str:
        return f"{self.base}.embed_tokens"

    @property
    def final_norm(self) -> str:
        return f"{self.base}.norm"

    def layer(self, index: int) -> str:
        return f"{self.base}.layers.{index}"


@dataclass(frozen=True, slots=True)
class TextPart:
    """The keys that describe the text model, what messages call their place, and where its modules are."""

    keys: Mapping[str, Any]
    where: str
    names: ModuleNames


def wrapper_of(config: Mapping[str, Any]) -> str:
    """The multimodal architecture of config.json; "" if it is none of WRAPPERS.

    Raises:
        ConfigError: it has no section about its text model.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else WRAPPER_TYPES.get(str(config.get("model_type"))) if named is None else ""
    if name not in WRAPPERS:
        return ""
    if not isinstance(config.get(SECTION), Mapping):
        raise ConfigError(f"config.json: {SECTION}", repr(config.get(SECTION))[:200], "an object that describes the text model", "fetch config.json again")
    return str(name)


def text_type(config: Mapping[str, Any], wrapper: str) -> str:
    """`model_type` of the text model of a multimodal one."""
    return str(config[SECTION].get("model_type") or WRAPPERS[wrapper])


def text_part(config: Mapping[str, Any], where: str, stored: Collection[str]) -> TextPart:
    """The text model that `config` (the contents of config.json) describes.

    Args:
        where:  what messages call the file.
        stored: names of the checkpoint's tensors.
    """
    wrapper = wrapper_of(config)
    if not wrapper:
        return TextPart(config, where, ModuleNames())
    sizes = SIZES.get(text_type(config, wrapper), {})
    base = next((b for b in BASES if any(name.startswith(f"{b}.layers.") for name in stored)), BASES[0])
    head = next((h for h in HEADS if any(name.startswith(f"{h}.") for name in stored)), HEADS[0 if base == BASES[0] else 1])
    stated = {key: value for key, value in config[SECTION].items() if value is not None or key not in sizes}
    keys = {**sizes, **stated, **{key: config[key] for key in OUTER_KEYS if config.get(key) is not None}}
    keys["tie_word_embeddings"] = _is_tied(config, any(name.startswith(f"{head}.") for name in stored))
    aside = tuple(f"{prefix}{part}" for part in OTHER_PARTS for prefix in ("", "model."))
    return TextPart(keys, f"{where}: {SECTION}", ModuleNames(base, head, aside))


def _is_tied(config: Mapping[str, Any], has_head: bool) -> Any:
    """Whether the head shares the embedding; where the two places of the key do not agree, a stored head says that it does not.

    Programs disagree on which of the two places counts, and some write only a default there.
    """
    stated = [section["tie_word_embeddings"] for section in (config, config[SECTION]) if section.get("tie_word_embeddings") is not None]
    return stated[0] if len(stated) == 2 and stated[0] == stated[1] else not has_head
