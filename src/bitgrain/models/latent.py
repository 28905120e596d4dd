"""Models with latent attention."""

from __future__ import annotations

from bitgrain.formats.slots import ModelSlots
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.latent_attention import LatentAttention
from bitgrain.models.config import ModelConfig
from bitgrain.models.decoder import DecoderLayer, SlotList, layers, norm
from bitgrain.models.sparse import SparseLM


class LatentLM(SparseLM):
    """As its base, with latent attention in every layer."""

    @classmethod
    def slots(cls, config: ModelConfig) -> ModelSlots:
        assert config.latent is not None  # the traits say so
        slots = SlotList(config)
        for index, name in layers(config):
            slots.layer_norms(name, cls.norms)
            slots.latent_attention(f"{name}.self_attn", config.latent)
            cls.mlp_slots(slots, config, index, f"{name}.mlp")
        return slots.finish()

    def make_layer(self, builder: ModelBuilder, index: int, name: str) -> DecoderLayer:
        assert self.config.latent is not None
        return DecoderLayer(
            norm(builder, f"{name}.{self.norms.attention}"),
            LatentAttention(builder, f"{name}.self_attn", index, self.config.latent),
            norm(builder, f"{name}.{self.norms.mlp}"),
            self.make_mlp(builder, index, f"{name}.mlp"),
        )
