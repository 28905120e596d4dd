"""The sizes of latent attention in config.json."""

from __future__ import annotations

from bitgrain.layers.latent_attention import LatentShape
from bitgrain.layers.rotary import Rope, YarnRope
from bitgrain.models.config_keys import ConfigKeys

# Keys of config_keys.NEUTRAL that are read here.
LATENT_KEYS = frozenset({"kv_lora_rank", "q_lora_rank", "rope_interleave"})


def rotated_size(keys: ConfigKeys) -> int:
    """Entries of a head that are rotated; the size of a head as far as rotary embeddings go."""
    size = keys.size("qk_rope_head_dim")
    if size % 2:
        keys.problem("qk_rope_head_dim", str(size), "an even number")
    return size + size % 2


def read_latent(keys: ConfigKeys, heads: int, rope: Rope) -> LatentShape:
    """The shape of latent attention; what is wrong with it is added to `keys.problems`."""
    kv_heads = keys.size("num_key_value_heads", default=heads)
    if kv_heads != heads:
        keys.problem("num_key_value_heads", str(kv_heads), f"num_attention_heads ({heads}), or absent: all heads share one latent")
    nope, size = keys.size("qk_nope_head_dim"), rope.head_dim
    q_rank = keys.count("q_lora_rank", default=0)
    interleaved = keys.flag("rope_interleave")
    growth = rope.score_factor if isinstance(rope, YarnRope) else 1.0
    return LatentShape(
        heads, keys.size("kv_lora_rank"), nope, size, keys.size("v_head_dim"), (nope + size) ** -0.5 * growth, q_rank or None, interleaved is not False,
    )  # fmt: skip
