"""From a GGUF file's metadata to what config.json says of the same model, key by key.

Keys are `<architecture>.<name>`.  Every key of the architecture is read, or stands in NEUTRAL or in SILENT below; any other
may change the numbers and is an error.  Source: formats specification, part 2, section 1.3; gguf package 0.19, constants.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from math import isclose
from typing import Any

from bitgrain.errors import ConfigError, UnsupportedArchitectureError
from bitgrain.formats.config_reader import CORRECT, ConfigReader, words
from bitgrain.formats.evidence import Evidence
from bitgrain.formats.gguf.names import ARCHITECTURES, DEEPSEEK3, MINISTRAL, MISTRAL, MIXTRAL, Architecture
from bitgrain.formats.gguf.parts import Heads
from bitgrain.formats.gguf.rope import rope_parameters

# Keys that say nothing about the arithmetic of a text model.
SILENT = words("tensor_data_layout pooling_type attention.layer_norm_epsilon feature_length")
# Keys that must have a value which changes nothing, and what the value must be.
NEUTRAL: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "attention.causal": (lambda v: v is True, "true"),
    "attention.clamp_kqv": (lambda v: v == 0, "0"),
    "attention.max_alibi_bias": (lambda v: v == 0, "0"),
    "use_parallel_residual": (lambda v: v is False, "false"),
    "interleave_moe_layer_step": (lambda v: v in (0, 1), "0 or 1"),
    "nextn_predict_layers": (lambda v: v == 0, "0: layers that predict further tokens are not implemented"),
    "rope.scale_linear": (lambda v: v == 1, "1"),
}
EXPERT_KEYS = words("expert_count expert_used_count expert_feed_forward_length expert_shared_count expert_shared_feed_forward_length expert_weights_scale expert_weights_norm expert_gating_func expert_group_count expert_group_used_count")  # fmt: skip
SOFTMAX, SIGMOID = 1, 2
# Layers of the largest models of these two families, whose attention divides by another size than a head's.
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}


class Description(ConfigReader):
    """The metadata of one architecture, its prefix left out."""

    def __init__(self, evidence: Evidence) -> None:
        file = next(iter(evidence.metadata), "metadata")
        kind = evidence.properties.get("general.architecture")
        if not isinstance(kind, str) or not kind:
            raise ConfigError(f"{file}: general.architecture", repr(kind), "the name of an architecture", "fetch or write the file again")
        prefix = f"{kind}."
        super().__init__({k.removeprefix(prefix): v for k, v in evidence.properties.items() if k.startswith(prefix)}, f"{file}: {kind}")
        self.file, self.kind, self.evidence = file, kind, evidence

    def number(self, *keys: str, default: float | None = None, minimum: float = 0.0, strict: bool = True) -> float:
        """As in the base; a float32 becomes the shortest decimal that stands for it, as people write it in config.json."""
        return _shortest(super().number(*keys, default=default, minimum=minimum, strict=strict))

    def problem(self, key: str, found: str, needed: str, action: str = CORRECT) -> None:
        """As in the base; a key that is read twice is one problem."""
        if self.place(key) not in {problem.where for problem in self.problems}:
            super().problem(key, found, needed, action)

    @property
    def architecture(self) -> Architecture:
        """The architecture that the metadata describes.

        Raises:
            UnsupportedArchitectureError: none here is called so.
        """
        found = ARCHITECTURES.get(self.kind)
        if found is None:
            raise UnsupportedArchitectureError(
                f"{self.file}: general.architecture", repr(self.kind), f"one of {', '.join(ARCHITECTURES)}",
                "use another program for this model, or convert its original checkpoint",
            )  # fmt: skip
        if self.kind == "llama":
            return MIXTRAL if self.values.get("expert_count") else MISTRAL if self.values.get("attention.sliding_window") else found
        if self.kind == "mistral3" and self.values.get("attention.temperature_scale"):
            return MINISTRAL
        if self.kind == "deepseek2" and self.values.get("expert_gating_func") == SIGMOID:
            return DEEPSEEK3
        return found

    def sizes(self, key: str, layers: int, default: int | None = None) -> tuple[int, ...]:
        """One size per layer, from a number or a list of them."""
        _, value = self.read(key)
        if not isinstance(value, list):
            return (max(self.integer(key, minimum=1, default=default), 1),) * layers
        if len(value) != layers or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value):
            self.problem(key, f"{str(value)[:80]}", f"one number above 0 for each of {layers} layers")
            return (1,) * layers
        return tuple(value)

    def one_size(self, key: str, layers: int, default: int | None = None) -> int:
        """A size that all layers share."""
        found = self.sizes(key, layers, default)
        if len(set(found)) > 1:
            self.problem(key, f"sizes that differ between layers: {sorted(set(found))}", "one size for all layers", "no model here has layers of different sizes; use another program")
        return found[0]

    def layers(self) -> int:
        return max(self.integer("block_count", allowed=range(1, 100_000)), 1)

    def heads(self) -> Heads:
        """Heads of every layer; problems are noted."""
        layers = self.layers()
        query = self.sizes("attention.head_count", layers)
        return Heads(query, self.sizes("attention.head_count_kv", layers, query[0]))


def _shortest(value: float) -> float:
    if struct.unpack("f", struct.pack("f", value))[0] != value:
        return value  # stored with more precision
    texts = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next(short for short in texts if struct.unpack("f", struct.pack("f", short))[0] == value)


def model_config(evidence: Evidence) -> dict[str, Any]:
    """config.json's contents, as far as the metadata say them.

    Raises:
        ConfigError, UnsupportedArchitectureError, ManyProblemsError: keys that are missing, unknown or impossible.
    """
    keys = Description(evidence)
    architecture = keys.architecture
    layers, heads = keys.layers(), keys.heads()
    hidden = keys.integer("embedding_length", minimum=1)
    query = keys.one_size("attention.head_count", layers)
    head_dim = keys.integer("attention.key_length", minimum=1, default=max(hidden // max(query, 1), 1))
    config: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": _vocabulary(keys),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": query,
        "num_key_value_heads": keys.one_size("attention.head_count_kv", layers, heads.query[0]),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length", minimum=1),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", strict=False),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in evidence.tensors,
        "attention_bias": _has(evidence, ".attn_q.bias") and _has(evidence, ".attn_output.bias"),
        "mlp_bias": _has(evidence, ".ffn_down.bias"),
        **_tokens(evidence),
    }
    config["intermediate_size"] = keys.one_size("feed_forward_length", layers, _expert_rows(keys) if architecture.experts else None)
    if keys.kind != "deepseek2":
        keys.need("attention.value_length", lambda v: v == head_dim, f"key_length ({head_dim})", "values of another size than keys are not implemented")
    keys.need("attention.scale", lambda v: v == 0 or isclose(v, head_dim**-0.5, rel_tol=1e-5), "1 / sqrt(key_length)", "the scale is not implemented")
    for key, (accepts, needed) in NEUTRAL.items():
        keys.need(key, accepts, needed, "it would change the numbers: use another program")
    config |= rope_parameters(keys, head_dim)
    _FAMILIES.get(keys.kind, _plain)(keys, config)
    keys.skip(SILENT)
    keys.finish()
    return config


def _has(evidence: Evidence, ending: str) -> bool:
    return any(name.endswith(ending) for name in evidence.tensors)


def _vocabulary(keys: Description) -> int:
    """The stated size, or else that of the token list, or of the embedding."""
    tokens = keys.evidence.properties.get("tokenizer.ggml.tokens")
    embedding = keys.evidence.tensors.get("token_embd.weight")
    stored = embedding.shape[0] if embedding is not None and embedding.shape else 0
    return keys.integer("vocab_size", minimum=1, default=len(tokens) if isinstance(tokens, list) and tokens else stored)


def _tokens(evidence: Evidence) -> dict[str, Any]:
    """Ids of tokens that begin and end texts, where they are stated."""
    found = evidence.properties
    ends = [found.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(i for i in ends if isinstance(i, int)))
    bos = found.get("tokenizer.ggml.bos_token_id")
    return {**({"eos_token_id": eos} if eos else {}), **({"bos_token_id": bos} if isinstance(bos, int) else {})}


def _plain(keys: Description, config: dict[str, Any]) -> None:
    """Families without settings of their own; the window that some writers note is switched off in them."""
    keys.skip(("attention.sliding_window",))
    config["use_sliding_window"] = False


def _no_experts(keys: Description) -> None:
    for key in EXPERT_KEYS:
        keys.need(key, lambda v: v == 0, "absent or 0", "experts that this architecture does not have")


def _llama(keys: Description, config: dict[str, Any]) -> None:
    if config["architectures"] == [MIXTRAL.name]:
        config["num_local_experts"] = keys.integer("expert_count", minimum=1)
        config["num_experts_per_tok"] = keys.integer("expert_used_count", minimum=1)
        keys.need("expert_gating_func", lambda v: v == SOFTMAX, "1 (softmax)", "the routing is not implemented")
    else:
        _no_experts(keys)
    _window(keys, config)


def _window(keys: Description, config: dict[str, Any]) -> None:
    if keys.values.get("attention.sliding_window"):
        config["sliding_window"] = keys.integer("attention.sliding_window", minimum=1)
    else:
        keys.skip(("attention.sliding_window",))


def _mistral3(keys: Description, config: dict[str, Any]) -> None:
    """The text model of Mistral Small 3, or of Ministral 3, whose queries grow beyond the trained length."""
    _no_experts(keys)
    _window(keys, config)
    growth = keys.number("attention.temperature_scale", default=0.0, strict=False)
    if not growth:
        return
    scaling = config.get("rope_scaling", {})
    if scaling.get("rope_type") != "yarn":
        keys.problem("attention.temperature_scale", repr(growth), "0 or absent without YaRN (rope.scaling.type)", "no model here computes it so; use another program")
        return
    scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    scaling["llama_4_scaling_beta"] = growth


def _qwen_moe(keys: Description, config: dict[str, Any]) -> None:
    _plain(keys, config)
    config["num_experts"] = keys.integer("expert_count", minimum=1)
    config["num_experts_per_tok"] = keys.integer("expert_used_count", minimum=1)
    config["moe_intermediate_size"] = keys.integer("expert_feed_forward_length", minimum=1, default=_expert_rows(keys))
    # the runtime normalizes the chosen experts' weights in the third generation and not in the second
    normalized = keys.flag("expert_weights_norm")
    config["norm_topk_prob"] = keys.kind == "qwen3moe" if normalized is None else normalized
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    keys.need("expert_gating_func", lambda v: v == SOFTMAX, "1 (softmax)", "the routing is not implemented")
    keys.need("expert_weights_scale", lambda v: v in (0, 1), "1", "the routing is not implemented")
    if keys.kind == "qwen2moe":
        config["qkv_bias"] = _has(keys.evidence, ".attn_q.bias")
        config["shared_expert_intermediate_size"] = keys.integer("expert_shared_feed_forward_length", minimum=0, default=_rows(keys, "blk.0.ffn_up_shexp.weight") or 0)


def _expert_rows(keys: Description) -> int | None:
    """Out features of an expert, from the stored stack."""
    return _rows(keys, "blk.0.ffn_up_exps.weight")


def _rows(keys: Description, name: str) -> int | None:
    """Out features of a stored matrix or of each in a stack; None if there is no such tensor."""
    header = keys.evidence.tensors.get(name)
    return header.shape[-2] if header is not None and len(header.shape) > 1 else None


def _gemma(keys: Description, config: dict[str, Any]) -> None:
    head_dim = config["head_dim"]
    config["hidden_act"] = config["hidden_activation"] = "gelu_pytorch_tanh"
    if keys.kind == "gemma":
        return
    largest = config["num_hidden_layers"] == LARGEST_GEMMA[keys.kind]
    config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if largest else head_dim
    window = keys.integer("attention.sliding_window", minimum=0, default=0)
    if window:
        config["sliding_window"] = window
    elif keys.kind == "gemma3":
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]  # the runtime has no default window for it
    for key, name in (("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping", "final_logit_softcapping")):
        if keys.read(key)[1] is not None:
            config[name] = keys.number(key, strict=False) or None  # 0 switches it off; absent, it has the architecture's default
    if keys.kind == "gemma3":
        config["sliding_window_pattern"] = keys.integer("attention.sliding_window_pattern", minimum=1, default=6)
        config["rope_local_base_freq"] = keys.number("rope.freq_base_swa", default=10000.0)


def _phi3(keys: Description, config: dict[str, Any]) -> None:
    _no_experts(keys)
    window = keys.integer("attention.sliding_window", minimum=0, default=0)
    if window:
        config["sliding_window"] = window


def _glm4(keys: Description, config: dict[str, Any]) -> None:
    _no_experts(keys)
    config["attention_bias"] = _has(keys.evidence, ".attn_q.bias")  # the output projection never has one
    config.setdefault("partial_rotary_factor", 1.0)  # whole heads where no other size is stated


def _olmo2(keys: Description, config: dict[str, Any]) -> None:
    _no_experts(keys)
    keys.need("attention.sliding_window", lambda v: v == 0, "absent or 0", "windows belong to a later model, which is not implemented")


def _deepseek(keys: Description, config: dict[str, Any]) -> None:
    rotated = keys.integer("rope.dimension_count", minimum=1)
    rank = keys.integer("attention.kv_lora_rank", minimum=1)
    # files without the *_mla keys hold kv_b in one piece, and their key and value lengths are those of the heads
    key = keys.integer("attention.key_length_mla", minimum=1, default=config["head_dim"])
    value = keys.integer("attention.value_length", minimum=1, default=key)
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": rotated,
        "kv_lora_rank": rank,
        "q_lora_rank": keys.integer("attention.q_lora_rank", minimum=0, default=0) or None,
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated,
        "v_head_dim": keys.integer("attention.value_length_mla", minimum=1, default=value),
        "n_routed_experts": keys.integer("expert_count", minimum=0, default=0),
        "num_experts_per_tok": keys.integer("expert_used_count", minimum=0, default=0),
        "n_shared_experts": keys.integer("expert_shared_count", minimum=0, default=0),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length", minimum=1, default=_expert_rows(keys) or 1),
        "first_k_dense_replace": keys.integer("leading_dense_block_count", minimum=0, default=0),
        "routed_scaling_factor": keys.number("expert_weights_scale", default=1.0),
        "norm_topk_prob": bool(keys.flag("expert_weights_norm")),
        "scoring_func": "sigmoid" if keys.integer("expert_gating_func", allowed=(SOFTMAX, SIGMOID), default=SOFTMAX) == SIGMOID else "softmax",
        "n_group": keys.integer("expert_group_count", minimum=0, default=0) or 1,
        "topk_group": keys.integer("expert_group_used_count", minimum=0, default=0) or 1,
        "num_nextn_predict_layers": 0,
    }
    grouped = "group_limited_greedy" if config["n_group"] > 1 else "greedy"
    config["topk_method"] = "noaux_tc" if config["scoring_func"] == "sigmoid" else grouped
    keys.skip(("expert_shared_feed_forward_length",))


_FAMILIES: Mapping[str, Callable[[Description, dict[str, Any]], None]] = {
    "llama": _llama,
    "mistral3": _mistral3,
    "qwen2moe": _qwen_moe,
    "qwen3moe": _qwen_moe,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "phi3": _phi3,
    "glm4": _glm4,
    "olmo2": _olmo2,
    "deepseek2": _deepseek,
}
