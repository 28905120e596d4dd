"""ModelConfig: what config.json says about the architecture, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitgrain.errors import raise_all
from bitgrain.layers.activation import ACTIVATIONS, ClampedGate, Gate, Gated
from bitgrain.layers.rotary import Rope
from bitgrain.layers.routing import Routing
from bitgrain.models.config_keys import ConfigKeys
from bitgrain.models.rope_config import DEFAULT_THETA, read_rope
from bitgrain.models.windows import read_windows


@dataclass(frozen=True, slots=True)
class Traits:
    """What config.json leaves to the architecture.

    Args:
        window:     which layers attend to a sliding window, see bitgrain.models.windows: "none", "every", "chosen", "switched" or
                    "alternate".
        qkv_bias:   q, k and v always have a bias.
        experts:    some layers are mixtures of experts.
        head_dim:   default of head_dim; 0: hidden_size / num_attention_heads.
        defaults:   values of keys that config.json leaves out, where the architecture's differ from those of the others.
        rope:       the rotary section where config.json has none.
        rope_theta: where the rotary section has none.
        expert_size: the key that holds the intermediate size of one expert.
        router:     name of the module that scores experts, and whether its softmax is over the chosen ones only.
        clamped_gate: MLPs join gate and up by layers.activation.ClampedGate.
        wide_norm:  norms multiply in float32, see layers.norm.RMSNorm.
        implements: keys of config_keys.NEUTRAL that the architecture computes with.
    """

    window: str = "none"
    qkv_bias: bool = False
    experts: bool = False
    head_dim: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)
    rope_theta: float = DEFAULT_THETA
    expert_size: str = "moe_intermediate_size"
    router: tuple[str, bool] = ("gate", False)
    clamped_gate: bool = False
    wide_norm: bool = False
    implements: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes and switches of a causal language model, under the names that config.json uses.

    Args:
        dtype:         of activations as the file names it ("bfloat16"), None if it does not.
        windows:       per layer: tokens that a token attends to, itself included, or None for all.
        qkv_bias:      the checkpoint must store biases of q, k and v.
        o_bias:        the same for the attention's output projection.
        mlp_bias:      the same for gate, up and down.
        moe_intermediate_size: of one expert; 0 without experts.
        routings:      per layer: how a mixture of experts routes, or None for a dense MLP.
        eos_token_ids: tokens that end a text; empty if the file names none.
        join:          how an MLP joins gate and up.
        wide_norm:     norms multiply in float32.
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
    moe_intermediate_size: int
    routings: tuple[Routing | None, ...]
    eos_token_ids: tuple[int, ...]
    join: Gate
    wide_norm: bool

    @property
    def max_context(self) -> int:
        """Longest sequence that the model was made for, in tokens."""
        return self.rope.reach(self.max_position_embeddings)

    def routing(self, layer: int) -> Routing | None:
        """How a layer's mixture of experts routes; None for a layer with a dense MLP."""
        return self.routings[layer]

    @staticmethod
    def from_dict(config: Mapping[str, Any], where: str) -> ModelConfig:
        """The configuration of the model that `config` (the contents of config.json) describes.

        A key that is absent or null has the meaning that the transformers library gives its absence; sizes have none.

        Args:
            where: what messages call the file.
        Raises:
            ConfigError, ConflictingConfigError, ManyProblemsError: every key that is missing, impossible or not implemented.
        """
        architecture, traits = _architecture(config)
        keys = ConfigKeys(_with_defaults(config, traits), where)
        keys.require_neutral(except_for=traits.implements)
        layers = keys.size("num_hidden_layers")
        heads, kv_heads, head_dim = _heads(keys, traits)
        max_position = keys.size("max_position_embeddings")
        biased = bool(keys.flag("attention_bias"))
        hidden_act = _activation(keys)
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
            rope=read_rope(keys, head_dim, max_position, traits.rope_theta),
            windows=read_windows(keys, traits.window, layers),
            tie_word_embeddings=bool(keys.flag("tie_word_embeddings")),
            qkv_bias=biased or traits.qkv_bias,
            o_bias=biased,
            mlp_bias=bool(keys.flag("mlp_bias")),
            moe_intermediate_size=keys.size(traits.expert_size) if traits.experts else 0,
            routings=_routings(keys, layers, traits) if traits.experts else (None,) * layers,
            eos_token_ids=_token_ids(keys, "eos_token_id"),
            join=_clamped_gate(keys) if traits.clamped_gate else Gated(hidden_act),
            wide_norm=traits.wide_norm,
        )
        raise_all(where, keys.problems)
        return result


def _architecture(config: Mapping[str, Any]) -> tuple[str, Traits]:
    from bitgrain.models.registry import architecture_of, find_model  # the registry's model files read this module

    name = architecture_of(config)
    model = find_model(name)
    return name, Traits() if model is None else model.traits


def _with_defaults(config: Mapping[str, Any], traits: Traits) -> Mapping[str, Any]:
    """The configuration with the architecture's values for keys that are absent or null; a null window is none."""
    stated = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    if traits.rope and not {"rope_scaling", "rope_parameters"} & stated.keys():
        stated["rope_parameters"] = traits.rope
    return {**traits.defaults, **stated}


def _clamped_gate(keys: ConfigKeys) -> ClampedGate:
    return ClampedGate(keys.number("swiglu_alpha", default=1.702), keys.number("swiglu_limit", default=7.0))


def _heads(keys: ConfigKeys, traits: Traits) -> tuple[int, int, int]:
    """(query heads, key/value heads, size of a head)."""
    heads = keys.size("num_attention_heads")
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


def _activation(keys: ConfigKeys) -> str:
    name = keys.text("hidden_act", default="silu")
    if name not in ACTIVATIONS:
        keys.problem(
            "hidden_act",
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


def _routings(keys: ConfigKeys, layers: int, traits: Traits) -> tuple[Routing | None, ...]:
    count = keys.size("num_experts", "num_local_experts")
    per_token = keys.size("num_experts_per_tok", "experts_per_token")
    if per_token > count:
        keys.problem("num_experts_per_tok", str(per_token), f"at most num_experts ({count})")
    step = keys.size("decoder_sparse_step", default=1)
    _, dense = keys.read("mlp_only_layers")
    if dense is not None and not (isinstance(dense, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in dense)):
        keys.problem("mlp_only_layers", repr(dense), "a list of layer indices")
        dense = None
    router, over_chosen = traits.router
    routing = Routing(count, per_token, bool(keys.flag("norm_topk_prob")), over_chosen, router)
    return tuple(None if i in (dense or ()) or (i + 1) % step else routing for i in range(layers))
