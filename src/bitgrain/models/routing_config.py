"""Which layers are mixtures of experts, how they route and what lies beside the experts, by config.json."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from bitgrain.formats.config_reader import words
from bitgrain.layers.routing import Routing
from bitgrain.layers.sparse_mlp import SharedExpert
from bitgrain.models.config_keys import ConfigKeys

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
PER_TOKEN = ("num_experts_per_tok", "experts_per_token")
_GROUP_KEYS = words("n_group topk_group routed_scaling_factor topk_method scoring_func")
PARTS = ("gate_proj", "up_proj", "down_proj")
# In all layers together, far above any model: see config.MOST_LAYERS.
MOST_EXPERTS = 300_000
DISAGREE = "programs disagree on what this would mean: run this checkpoint with the program that it was made for"


@dataclass(frozen=True, slots=True)
class ExpertTraits:
    """What config.json leaves to an architecture with experts.

    Args:
        scoring: a key of SCORING.
        size:    the key that holds the intermediate size of one expert.
        router:  name of the module that scores experts.
        dense:   which layers have an ordinary MLP instead:
                 "listed":  those of `mlp_only_layers`, and all but every `decoder_sparse_step`-th;
                 "leading": the first `first_k_dense_replace`, and those whose index `moe_layer_freq` does not divide;
                 "none".
        shared:  name of the expert that all tokens go through; "" if there is none.
        older:   how most checkpoints call a layer's module that holds the experts, and gate, up and down of each, where that is
                 not "mlp" and PARTS; None: all call them so.
    """

    scoring: str = "softmax"
    size: str = "moe_intermediate_size"
    router: str = "gate"
    dense: str = "none"
    shared: str = ""
    older: tuple[str, tuple[str, str, str]] | None = None

    @property
    def keys(self) -> frozenset[str]:
        """Keys of config_keys.NEUTRAL that are read here."""
        dense = {"listed": words("mlp_only_layers decoder_sparse_step"), "leading": words("first_k_dense_replace moe_layer_freq")}
        shared = {"shared_expert": words("shared_expert_intermediate_size"), "shared_experts": words("n_shared_experts")}
        found = frozenset(COUNTS) | dense.get(self.dense, frozenset()) | shared.get(self.shared, frozenset())
        return found | (_GROUP_KEYS if self.scoring in ("limited", "corrected") else frozenset())


@dataclass(frozen=True, slots=True)
class Mixtures:
    """The mixtures of experts of a model.

    Args:
        size:     out features of an expert's gate and up; 0 without experts.
        routings: per layer; None for a dense MLP.
        shared:   what every mixture has beside its experts.
        module:   the layer's module that holds them.
        parts:    last segments of an expert's gate, up and down.
    """

    size: int
    routings: tuple[Routing | None, ...]
    shared: SharedExpert | None = None
    module: str = "mlp"
    parts: tuple[str, str, str] = PARTS


def read_mixtures(keys: ConfigKeys, layers: int, traits: ExpertTraits | None, stored: Collection[str]) -> Mixtures:
    """The mixtures of a configuration; what is wrong with it is added to `keys.problems`.

    Args:
        stored: names of the checkpoint's tensors; where an architecture has two ways to call its modules, they tell which.
    """
    if traits is None:
        return Mixtures(0, (None,) * layers)
    stated = [keys.values[key] for key in COUNTS if keys.values.get(key) is not None]
    if stated and not any(stated):  # the dense one of a family
        return Mixtures(0, (None,) * layers)
    count = keys.size(*COUNTS, most=max(MOST_EXPERTS // layers, 1))
    per_token, size = keys.size(*PER_TOKEN), keys.size(traits.size)
    if per_token > count:
        keys.problem("num_experts_per_tok", str(per_token), f"at most num_experts ({count})")
    routing = SCORING[traits.scoring](keys, Routing(count, per_token, False, router=traits.router))
    is_dense = _dense_layers(keys, traits.dense)
    routings = tuple(None if is_dense(i) else routing for i in range(layers))
    return Mixtures(size, routings, _shared(keys, traits.shared, size), *_names(traits, stored))


def _names(traits: ExpertTraits, stored: Collection[str]) -> tuple[str, tuple[str, str, str]]:
    """(module that holds the experts, parts of each)."""
    module, parts = traits.older or ("mlp", PARTS)
    newer_module = any(".mlp." in name for name in stored)
    newer_parts = any(f".{part}" in name for name in stored for part in ("gate_proj", "gate_up_proj"))
    return "mlp" if newer_module else module, PARTS if newer_parts else parts


def _dense_layers(keys: ConfigKeys, rule: str) -> Callable[[int], bool]:
    """Whether the layer of an index has no experts."""
    if rule == "leading":
        first = keys.count("first_k_dense_replace", default=0)
        step = keys.size("moe_layer_freq", default=1)
        return lambda i: i < first or bool(i % step)
    if rule == "listed":
        step = keys.size("decoder_sparse_step", default=1)
        _, listed = keys.read("mlp_only_layers")
        if listed is not None and not (isinstance(listed, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in listed)):
            keys.problem("mlp_only_layers", repr(listed), "a list of layer indices")
            listed = None
        named = frozenset(listed or ())
        return lambda i: i in named or bool((i + 1) % step)
    return lambda i: False


def _shared(keys: ConfigKeys, name: str, size: int) -> SharedExpert | None:
    if name == "shared_expert":
        own = keys.count("shared_expert_intermediate_size", default=0)
        return SharedExpert(name, own, f"{name}_gate") if own else None
    if name == "shared_experts":
        fused = keys.count("n_shared_experts", default=0)
        return SharedExpert(name, fused * size) if fused else None
    return None


def _softmax(keys: ConfigKeys, routing: Routing) -> Routing:
    return replace(routing, normalize=bool(keys.flag("norm_topk_prob")))


def _normalized(keys: ConfigKeys, routing: Routing) -> Routing:
    keys.need("norm_topk_prob", lambda v: v is True, "true, or absent", "this architecture always normalizes: correct the key, or `architectures`")
    return replace(routing, normalize=True, wide_weights=True)


def _over_chosen(keys: ConfigKeys, routing: Routing) -> Routing:
    return replace(routing, over_chosen=True)


def _limited(keys: ConfigKeys, routing: Routing) -> Routing:
    """Softmax in float32; of groups, if the method says so, only the best count."""
    method = keys.text("topk_method", default="greedy")
    if method not in ("greedy", "group_limited_greedy"):
        keys.problem("topk_method", repr(method), "greedy or group_limited_greedy", "the routing is not implemented for this architecture")
    keys.need("scoring_func", lambda v: v == "softmax", "softmax, or absent", "the routing is not implemented for this architecture")
    keys.need("norm_topk_prob", lambda v: v is False, "false, or absent", DISAGREE)
    routing = replace(routing, scale=keys.number("routed_scaling_factor", default=1.0), wide=True, wide_weights=True)
    return _grouped(keys, routing, "best") if method == "group_limited_greedy" else routing


def _corrected(keys: ConfigKeys, routing: Routing) -> Routing:
    """Sigmoid in float32, chosen by corrected scores out of the best groups."""
    keys.need("topk_method", lambda v: v == "noaux_tc", "noaux_tc, or absent", "the routing is not implemented for this architecture")
    keys.need("scoring_func", lambda v: v == "sigmoid", "sigmoid, or absent", "the routing is not implemented for this architecture")
    routing = replace(
        routing, sigmoid=True, corrected=True, normalize=bool(keys.flag("norm_topk_prob")), wide=True, wide_weights=True,
        scale=keys.number("routed_scaling_factor", default=1.0),
    )  # fmt: skip
    return _grouped(keys, routing, "two best")


def _grouped(keys: ConfigKeys, routing: Routing, score: str) -> Routing:
    groups, kept = keys.size("n_group", default=1), keys.size("topk_group", default=1)
    if routing.count % groups:
        keys.problem("n_group", str(groups), f"a divisor of the number of experts ({routing.count})")
    elif score == "two best" and groups > 1 and routing.count == groups:
        keys.problem("n_group", str(groups), f"groups of at least two of the {routing.count} experts")
    if kept > groups:
        keys.problem("topk_group", str(kept), f"at most n_group ({groups})")
    return replace(routing, groups=groups, kept_groups=kept, group_score=score)


SCORING: Mapping[str, Callable[[ConfigKeys, Routing], Routing]] = {
    "softmax": _softmax,
    "normalized": _normalized,
    "over chosen": _over_chosen,
    "limited": _limited,
    "corrected": _corrected,
}
