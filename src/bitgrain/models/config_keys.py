"""Reading config.json: numbers, and keys that may only have values that change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, ClassVar

from bitgrain.formats.config_reader import ConfigReader

# Keys that would change an architecture's arithmetic, and the values with which they do not.  An architecture that
# implements one of them says so in its traits.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "decoder_sparse_step": (1,),
    "dim_model_base": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "first_k_dense_replace": (0,),
    "full_attn_mod": (1,),
    "hidden_activation": (),
    "interpolate_factor": (1,),
    "index_topk": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_lora_rank": (),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_only_layers": ([],),
    "moe_layer_freq": (1,),
    "n_group": (0, 1),
    "n_routed_experts": (0,),
    "n_shared_experts": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "q_lora_rank": (),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "rotary_pct": (1,),
    "routed_scaling_factor": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "scoring_func": ("softmax",),
    "shared_expert_intermediate_size": (0,),
    "sliding_window_pattern": (),
    "swiglu_alpha": (),
    "swiglu_limit": (),
    "topk_group": (0, 1),
    "topk_method": ("greedy",),
    "use_alibi": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}


class ConfigKeys(ConfigReader):
    """The keys of config.json or of a section of it; problems are collected, unknown keys are left to the caller."""

    joint: ClassVar[str] = ": "  # after the name of a file

    def optional_number(self, *keys: str, minimum: float = 0.0) -> float | None:
        """A finite number above `minimum`, or None when absent."""
        return None if self.read(*keys)[1] is None else self.number(*keys, default=minimum + 1.0, minimum=minimum)

    def size(self, *keys: str, default: int | None = None, most: int | None = None) -> int:
        """An integer of at least 1; 1 stands in for a missing or impossible one, so that reading can go on.

        Args:
            most: the largest that is possible, where something is made for each.
        """
        found = max(self.integer(*keys, minimum=1, default=default), 1)
        if most is not None and found > most:
            self.problem(self.read(*keys)[0], str(found), f"at most {most}")
            return 1
        return found

    def count(self, *keys: str, default: int) -> int:
        """An integer of at least 0."""
        return self.integer(*keys, minimum=0, default=default)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` positive numbers."""
        _, value = self.read(key)
        if not isinstance(value, list) or len(value) != length or not all(_is_positive(v) for v in value):
            found = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
            self.problem(key, found, f"a list of {length} numbers above 0")
            return (1.0,) * length
        return tuple(float(v) for v in value)

    def require_neutral(self, except_for: frozenset[str]) -> None:
        """Note a problem for each key of NEUTRAL whose value would change numbers in a way that the architecture does not implement."""
        for key, values in NEUTRAL.items():
            value = self.values.get(key)
            if value is None or key in except_for or value in values:
                continue
            needed = f"absent or {' or '.join(map(repr, values))}" if values else "absent"
            action = "the architecture's model file does not implement it; run this checkpoint with another program"
            self.problem(key, repr(value)[:200], needed, action)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value) and value > 0
