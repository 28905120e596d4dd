"""The layer that most models share: a norm before attention, a norm before a gated MLP, both added to the residual.

Architectures that put their norms elsewhere, or store some of its modules as one, say so in class attributes.
"""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from bitgrain.formats.slots import ModelSlots
from bitgrain.layers.attention import Attention, AttentionShape
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.mlp import GatedMLP
from bitgrain.models.causal_lm import CausalLM
from bitgrain.models.config import ModelConfig
from bitgrain.models.decoder import PRE_NORMS, DecoderLayer, LayerNorms, SlotList, layers, norm


class PreNormLM(CausalLM):
    """A model of such layers; architectures say what they do otherwise.

    Attributes:
        norms:       the norms of a layer.
        qk_norm:     each head of q and k goes through a norm of its own.
        qk_norm_all: all heads of q, and all of k, go through one norm.
        sinks:       each head of attention has a sink.
        joint_qkv:   q, k and v are stored as one module.
        joint_mlp:   so are gate and up of the MLP.
    """

    norms: ClassVar[LayerNorms] = PRE_NORMS
    qk_norm: ClassVar[bool] = False
    qk_norm_all: ClassVar[bool] = False
    sinks: ClassVar[bool] = False
    joint_qkv: ClassVar[bool] = False
    joint_mlp: ClassVar[bool] = False

    @classmethod
    def attention_shape(cls, config: ModelConfig, index: int) -> AttentionShape:
        """Of layer `index`."""
        window = config.windows[index]
        return AttentionShape(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, window,
            norm=config.norm_style if cls.qk_norm or cls.qk_norm_all else None, norm_all=cls.qk_norm_all, sinks=cls.sinks,
            joint=cls.joint_qkv, interleaved=cls.interleaved, local=window is not None, scale=config.attention_scale, cap=config.attention_cap,
        )  # fmt: skip

    @classmethod
    def slots(cls, config: ModelConfig) -> ModelSlots:
        slots = SlotList(config)
        for index, name in layers(config):
            slots.layer_norms(name, cls.norms)
            slots.attention(f"{name}.self_attn", cls.attention_shape(config, index))
            cls.mlp_slots(slots, config, index, f"{name}.mlp")
        return slots.finish()

    @classmethod
    def mlp_slots(cls, slots: SlotList, config: ModelConfig, index: int, name: str) -> None:
        """Add the modules of layer `index`'s MLP."""
        (slots.joint_mlp if cls.joint_mlp else slots.mlp)(name, config.intermediate_size)

    def make_layer(self, builder: ModelBuilder, index: int, name: str) -> DecoderLayer:
        def named(norm_name: str) -> nn.Module:
            return norm(builder, f"{name}.{norm_name}") if norm_name else nn.Identity()

        return DecoderLayer(
            named(self.norms.attention),
            Attention(builder, f"{name}.self_attn", index, self.attention_shape(self.config, index)),
            named(self.norms.mlp),
            self.make_mlp(builder, index, f"{name}.mlp"),
            named(self.norms.attention_out),
            named(self.norms.mlp_out),
        )

    def make_mlp(self, builder: ModelBuilder, index: int, name: str) -> nn.Module:
        """The MLP of layer `index`."""
        return GatedMLP(builder, name, self.config.join, self.config.intermediate_size if self.joint_mlp else 0)
