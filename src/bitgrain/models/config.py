"""ModelConfig: what config.json says about the architecture, validated."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitgrain.errors import raise_all
from bitgrain.layers.activation import ACTIVATIONS, ClampedGate, Gate, Gated
from bitgrain.layers.latent_attention import LatentShape
from bitgrain.layers.norm import NormStyle
from bitgrain.layers.rotary import QueryGrowth, Rope
from bitgrain.models.config_keys import ConfigKeys
from bitgrain.models.latent_config import LATENT_KEYS, read_latent, rotated_size
from bitgrain.models.rope_config import DEFAULT_THETA, RopeTraits, merged_section, read_local_rope, read_rope
from bitgrain.models.routing_config import ExpertTraits, Mixtures, read_mixtures
from bitgrain.models.text_part import ModuleNames, text_part
from bitgrain.models.windows import read_windows

# Keys whose null means "none", whatever their absence means.
NULL_IS_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
# The key of the rotary section that makes queries grow with their position.
GROWTH = "llama_4_scaling_beta"

# Far above any model: a damaged file must not make a plan of millions of modules.
MOST_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class Traits:
    """What config.json leaves to the architecture.

    Args:
        window:     which layers attend to a sliding window: a rule of bitgrain.models.windows.
        qkv_bias:   q, k and v always have a bias.
        experts:    what mixtures of experts are like; None: there are none.
        latent:     attention is latent attention, see layers.latent_attention.
        further_layers: a checkpoint may hold layers that predict further tokens.
        head_dim:   default of head_dim; 0: hidden_size / num_attention_heads.
        defaults:   values of keys that config.json leaves out, where the architecture's differ from those of the others.
        rope:       the rotary section where config.json has none.
        rope_theta, rotated_share, local_theta, rope_keys: see rope_config.RopeTraits.
        output_bias: attention_bias is also one of the output projection.
        activation: the key that names the activation function.
        activations: names that mean another function here than elsewhere.
        clamped_gate: MLPs join gate and up by layers.activation.ClampedGate.
        wide_norm, norm_offset: see layers.norm.RMSNorm.
        scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
        implements: keys of config_keys.NEUTRAL that the architecture computes with.
    """

    window: str = "none"
    qkv_bias: bool = False
    experts: ExpertTraits | None = None
    latent: bool = False
    further_layers: bool = False
    head_dim: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)
    rope_theta: float = DEFAULT_THETA
    rotated_share: float | None = None
    local_theta: float = 0.0
    rope_keys: frozenset[str] = frozenset()
    output_bias: bool = True
    activation: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=dict)
    clamped_gate: bool = False
    wide_norm: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    implements: frozenset[str] = frozenset()

    @property
    def implemented(self) -> frozenset[str]:
        """Keys of config_keys.NEUTRAL that are read for this architecture."""
        return self.implements | (self.experts.keys if self.experts else frozenset()) | (LATENT_KEYS if self.latent else frozenset())


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes and switches of a causal language model, under the names that config.json uses.

    Args:
        dtype:         of activations as the file names it ("bfloat16"), None if it does not.
        windows:       per layer: tokens that a token attends to, itself included, or None for all.
        qkv_bias:      the checkpoint must store biases of q, k and v.
        o_bias:        the same for the attention's output projection.
        mlp_bias:      the same for gate, up and down.
        mixtures:      which layers are mixtures of experts, and of which.
        latent:        the shape of latent attention; None where attention is of another kind.
        qk_norm:       the configuration switches on norms of queries and keys.
        further_layers: layers that predict further tokens may be stored behind the others; they are not run.
        eos_token_ids: tokens that end a text; empty if the file names none.
        join:          how an MLP joins gate and up.
        wide_norm, norm_offset: see layers.norm.RMSNorm.
        local_rope:    of layers with a window, where they have their own; else None.
        embedding_scale: multiplies embeddings; None: nothing does.
        attention_scale, attention_cap: see layers.attention.AttentionShape.
        logit_cap:     logits x become cap * tanh(x / cap); None: they stay.
        query_growth:  multiplies queries by their position; None: nothing does.
        names:         under which names the modules are stored.
    """

    architecture: str
    dtype: str | None
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    mixtures: Mixtures
    eos_token_ids: tuple[int, ...]
    join: Gate
    wide_norm: bool
    norm_offset: float = 0.0
    local_rope: Rope | None = None
    embedding_scale: float | None = None
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    query_growth: QueryGrowth | None = None
    names: ModuleNames = field(default_factory=ModuleNames)
    latent: LatentShape | None = None
    qk_norm: bool = False
    further_layers: int = 0

    @property
    def max_context(self) -> int:
        """Longest sequence that the model was made for, in tokens."""
        # where only some layers have a scaled rotary embedding, the stated length is that of the scaled model
        return self.max_position_embeddings if self.local_rope is not None else self.rope.reach(self.max_position_embeddings)

    @property
    def norm_style(self) -> NormStyle:
        """What all norms have in common."""
        return NormStyle(self.rms_norm_eps, self.wide_norm, self.norm_offset)

    @staticmethod
    def from_dict(config: Mapping[str, Any], where: str, stored: Collection[str] = ()) -> ModelConfig:
        """The configuration of the model that `config` (the contents of config.json) describes.

        A key that is absent or null has the meaning that the transformers library gives its absence; sizes have none.

        Args:
            where:  what messages call the file.
            stored: names of the checkpoint's tensors; they tell where a multimodal one keeps its text model.
        Raises:
            ConfigError, ConflictingConfigError, ManyProblemsError: every key that is missing, impossible or not implemented.
        """
        architecture, traits = _architecture(config)
        part = text_part(config, where, stored)
        keys = ConfigKeys(_with_defaults(part.keys, traits), part.where)
        keys.require_neutral(except_for=traits.implemented)
        layers = keys.size("num_hidden_layers", most=MOST_LAYERS)
        heads, kv_heads, head_dim = _heads(keys, traits)
        max_position = keys.size("max_position_embeddings")
        biased = bool(keys.flag("attention_bias"))
        hidden_act = _activation(keys, traits)
        rope, local_rope = _ropes(keys, head_dim, max_position, traits)
        result = ModelConfig(
            architecture=architecture,
            dtype=_dtype(keys),
            vocab_size=keys.size("vocab_size"),
            hidden_size=keys.size("hidden_size"),
            intermediate_size=keys.size("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_act=hidden_act,
            rms_norm_eps=keys.number("rms_norm_eps", default=1e-6, strict=False),
            max_position_embeddings=max_position,
            rope=rope,
            windows=read_windows(keys, traits.window, layers),
            tie_word_embeddings=bool(keys.flag("tie_word_embeddings")),
            qkv_bias=biased or _qkv_bias(keys, traits),
            o_bias=biased and traits.output_bias,
            mlp_bias=bool(keys.flag("mlp_bias")),
            mixtures=read_mixtures(keys, layers, traits.experts, stored),
            eos_token_ids=_token_ids(keys, "eos_token_id"),
            join=_clamped_gate(keys) if traits.clamped_gate else Gated(hidden_act),
            wide_norm=traits.wide_norm,
            norm_offset=traits.norm_offset,
            local_rope=local_rope,
            embedding_scale=keys.size("hidden_size") ** 0.5 if traits.scaled_embedding else None,
            attention_scale=keys.number("query_pre_attn_scalar") ** -0.5 if "query_pre_attn_scalar" in traits.implements else None,
            attention_cap=keys.optional_number("attn_logit_softcapping"),
            logit_cap=keys.optional_number("final_logit_softcapping"),
            query_growth=_query_growth(keys) if GROWTH in traits.rope_keys else None,
            names=part.names,
            latent=read_latent(keys, heads, rope) if traits.latent else None,
            qk_norm=bool(keys.flag("use_qk_norm")),
            further_layers=keys.count("num_nextn_predict_layers", "num_mtp_layers", default=1) if traits.further_layers else 0,
        )
        raise_all(where, keys.problems)
        return result


def _architecture(config: Mapping[str, Any]) -> tuple[str, Traits]:
    from bitgrain.models.registry import architecture_of, find_model  # the registry's model files read this module

    name = architecture_of(config)
    model = find_model(name)
    return name, Traits() if model is None else model.traits


def _with_defaults(config: Mapping[str, Any], traits: Traits) -> Mapping[str, Any]:
    """The configuration with the architecture's values for keys that are absent, or null where that says nothing."""
    stated = {key: value for key, value in config.items() if value is not None or key in NULL_IS_NONE}
    if traits.rope and not {"rope_scaling", "rope_parameters"} & stated.keys():
        stated["rope_parameters"] = traits.rope
    return {**traits.defaults, **stated}


def _ropes(keys: ConfigKeys, head_dim: int, max_position: int, traits: Traits) -> tuple[Rope, Rope | None]:
    """The rotary embedding, and that of layers with a window where they have their own."""
    rules = RopeTraits(traits.rope_theta, traits.rotated_share, traits.local_theta, traits.rope_keys)
    if rules.local_theta:
        return read_local_rope(keys, head_dim, max_position, rules)
    return read_rope(keys, head_dim, max_position, rules), None


def _query_growth(keys: ConfigKeys) -> QueryGrowth:
    section = ConfigKeys(merged_section(keys), f"{keys.where}: rope_parameters")
    growth = QueryGrowth(section.number(GROWTH, strict=False), section.size("original_max_position_embeddings"))
    keys.problems += section.problems
    return growth


def _clamped_gate(keys: ConfigKeys) -> ClampedGate:
    return ClampedGate(keys.number("swiglu_alpha", default=1.702), keys.number("swiglu_limit", default=7.0))


def _heads(keys: ConfigKeys, traits: Traits) -> tuple[int, int, int]:
    """(query heads, key/value heads, size of a head)."""
    heads = keys.size("num_attention_heads")
    if traits.latent:
        return heads, heads, rotated_size(keys)
    kv_heads = keys.size("num_key_value_heads", default=heads)
    if heads % kv_heads:
        keys.problem("num_key_value_heads", str(kv_heads), f"a divisor of num_attention_heads ({heads})")
    hidden = keys.size("hidden_size")
    stated = keys.read("head_dim")[1] is not None
    if not stated and not traits.head_dim and hidden % heads:
        keys.problem("hidden_size", str(hidden), f"a multiple of num_attention_heads ({heads}), or head_dim")
    head_dim = keys.size("head_dim", default=traits.head_dim or max(hidden // heads, 1))
    if head_dim < 4 or head_dim % 2:
        keys.problem("head_dim", str(head_dim), "an even number of at least 4")
        head_dim = 4
    return heads, kv_heads, head_dim


def _qkv_bias(keys: ConfigKeys, traits: Traits) -> bool:
    stated = keys.flag("qkv_bias") if "qkv_bias" in traits.implements else None
    return traits.qkv_bias if stated is None else stated


def _activation(keys: ConfigKeys, traits: Traits) -> str:
    name = keys.text(traits.activation, default="silu")
    name = traits.activations.get(name, name)
    if "hidden_activation" in traits.implements:
        keys.need("hidden_activation", lambda v: traits.activations.get(v, v) == name, f"{name!r}, or absent", "it contradicts hidden_act: correct one of the two")
    if name not in ACTIVATIONS:
        keys.problem(
            traits.activation,
            repr(name),
            f"one of {', '.join(sorted(ACTIVATIONS))}",
            "the activation is not implemented; run this checkpoint with another program",
        )
    return name


def _dtype(keys: ConfigKeys) -> str | None:
    """`dtype`, or else its older spelling `torch_dtype`."""
    value = keys.values.get("dtype") or keys.values.get("torch_dtype")
    if value is not None and not isinstance(value, str):
        keys.problem("dtype", repr(value), "the name of a type, such as bfloat16")
        return None
    return None if value is None or value == "auto" else value.removeprefix("torch.")


def _token_ids(keys: ConfigKeys, key: str) -> tuple[int, ...]:
    _, value = keys.read(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        keys.problem(key, repr(value), "a token id or a list of token ids")
        return ()
    return tuple(ids)
