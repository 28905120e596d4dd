"""The residual block that all architectures here share, and the modules that it needs of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from bitgrain.formats.base import ModuleKind
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.slots import ModelSlots, ModuleSlot
from bitgrain.kernels.decode_step import AddOperation, Place, StepDescription
from bitgrain.layers.attention import Attention, AttentionShape, Step
from bitgrain.layers.builder import ModelBuilder
from bitgrain.layers.latent_attention import LatentAttention, LatentShape
from bitgrain.layers.norm import RMSNorm
from bitgrain.layers.routing import Routing, correction_of
from bitgrain.models.config import ModelConfig
from bitgrain.models.routing_config import PARTS


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Names of a layer's norms; "" where there is none.

    Args:
        attention, mlp:             of what goes in.
        attention_out, mlp_out:     of what comes out, before it is added.
    """

    attention: str = "input_layernorm"
    attention_out: str = ""
    mlp: str = "post_attention_layernorm"
    mlp_out: str = ""

    @property
    def present(self) -> tuple[str, ...]:
        return tuple(name for name in (self.attention, self.attention_out, self.mlp, self.mlp_out) if name)


PRE_NORMS = LayerNorms()
# What the plan of a model with latent attention says beside its modules.
LATENT_NOTE = "every kv_b_proj is kept as a dense copy in the dtype of activations: latent attention multiplies by it from both sides"


class DecoderLayer(nn.Module):
    """x + norm'(attention(norm(x))), then x + norm'(mlp(norm(x))); norms that an architecture lacks are the identity."""

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: Attention | LatentAttention,
        mlp_norm: nn.Module,
        mlp: nn.Module,
        attention_out_norm: nn.Module | None = None,
        mlp_out_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = attention_norm, attention, mlp_norm, mlp
        self.attention_out_norm, self.mlp_out_norm = attention_out_norm or nn.Identity(), mlp_out_norm or nn.Identity()

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """[T, hidden] for x [T, hidden]."""
        x = x + self.attention_out_norm(self.attention(self.attention_norm(x), step))
        out: Tensor = x + self.mlp_out_norm(self.mlp(self.mlp_norm(x)))
        return out

    def describe_step(self, step: StepDescription, x: Place, name: str) -> Place:
        """Its operations in a decode step, on `x` in place; see kernels.decode_step."""
        blocks = (("attention", self.attention_norm, self.attention, self.attention_out_norm), ("mlp", self.mlp_norm, self.mlp, self.mlp_out_norm))
        for part, before, block, behind in blocks:
            inner = x if isinstance(before, nn.Identity) else step.through(before, x, f"{name}.normed")
            out = step.through(block, inner, f"{name}.{part}")
            out = out if isinstance(behind, nn.Identity) else step.through(behind, out, f"{name}.out")
            step.add(AddOperation(out, x))
        return x


def norm(builder: ModelBuilder, name: str) -> RMSNorm:
    """The norm over the hidden size called `name`."""
    config: ModelConfig = builder.config
    return config.norm_style.build(builder, name, config.hidden_size)


class SlotList:
    """Collects the slots of a model in the order in which it is built."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._modules: list[ModuleSlot] = [self._matrix(config.names.embedding, ModuleKind.EMBEDDING, config.vocab_size, config.hidden_size)]
        self._groups: list[tuple[str, ...]] = []
        self._attention: list[str] = []
        self._experts: ExpertStack | None = None

    @staticmethod
    def _matrix(name: str, kind: ModuleKind, n: int, k: int, biased: bool = False, tied_to: str | None = None) -> ModuleSlot:
        return ModuleSlot(name, kind, (n, k), "required" if biased else "optional", tied_to)

    def vectors(self, size: int, *names: str) -> None:
        self._modules += [ModuleSlot(name, ModuleKind.VECTOR, (size,)) for name in names]

    def layer_norms(self, name: str, norms: LayerNorms = PRE_NORMS) -> None:
        self.vectors(self.config.hidden_size, *(f"{name}.{norm}" for norm in norms.present))

    def attention(self, name: str, shape: AttentionShape) -> None:
        """q, k, v and o of an attention module, its norms and its heads' sinks."""
        c, rows = self.config, shape.heights
        parts = (f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj")
        stored = {f"{name}.qkv_proj": sum(rows)} if shape.joint else dict(zip(parts, rows, strict=True))
        self._modules += [self._matrix(part, ModuleKind.LINEAR, n, c.hidden_size, c.qkv_bias) for part, n in stored.items()]
        self._modules.append(self._matrix(f"{name}.o_proj", ModuleKind.LINEAR, c.hidden_size, rows[0], c.o_bias))
        if shape.norm is not None:
            sizes = rows if shape.norm_all else (shape.head_dim, shape.head_dim)
            self.vectors(sizes[0], f"{name}.q_norm")
            self.vectors(sizes[1], f"{name}.k_norm")
        if shape.sinks:
            self._modules.append(ModuleSlot(f"{name}.sinks", ModuleKind.VECTOR, (shape.heads,), bare=True))
        if not shape.joint:
            self._groups.append(parts)
        self._attention.append(name)

    def latent_attention(self, name: str, shape: LatentShape) -> None:
        """The modules of latent attention and its norms."""
        c, out = self.config, shape.heads * shape.query
        first = f"{name}.q_proj" if shape.q_rank is None else f"{name}.q_a_proj"
        latent = f"{name}.kv_a_proj_with_mqa"
        self.linear(first, shape.q_rank or out, c.hidden_size, c.qkv_bias and shape.q_rank is not None)
        self.linear(latent, shape.rank + shape.rope, c.hidden_size, c.qkv_bias)
        if shape.q_rank is not None:
            self.vectors(shape.q_rank, f"{name}.q_a_layernorm")
            self.linear(f"{name}.q_b_proj", out, shape.q_rank)
        self.vectors(shape.rank, f"{name}.kv_a_layernorm")
        self.linear(f"{name}.kv_b_proj", shape.heads * (shape.nope + shape.value), shape.rank, use="dense copy")
        self.linear(f"{name}.o_proj", c.hidden_size, shape.heads * shape.value, c.o_bias)
        self._groups.append((first, latent))
        self._attention.append(name)

    def linear(self, name: str, n: int, k: int, biased: bool = False, use: str = "") -> None:
        self._modules.append(replace(self._matrix(name, ModuleKind.LINEAR, n, k, biased), use=use))

    def mlp(self, name: str, size: int) -> None:
        """gate, up and down of a gated MLP."""
        self._gated(name, PARTS, size, ModuleKind.LINEAR, self.config.mlp_bias)

    def _gated(self, name: str, parts: tuple[str, str, str], size: int, kind: ModuleKind, biased: bool) -> None:
        gate, up, down = (f"{name}.{part}" for part in parts)
        hidden = self.config.hidden_size
        self._modules += [self._matrix(gate, kind, size, hidden, biased), self._matrix(up, kind, size, hidden, biased)]
        self._modules.append(self._matrix(down, kind, hidden, size, biased))
        self._groups.append((gate, up))

    def joint_mlp(self, name: str, size: int) -> None:
        """A gated MLP whose gate and up are stored as one module."""
        hidden, biased = self.config.hidden_size, self.config.mlp_bias
        self._modules.append(self._matrix(f"{name}.gate_up_proj", ModuleKind.LINEAR, 2 * size, hidden, biased))
        self._modules.append(self._matrix(f"{name}.down_proj", ModuleKind.LINEAR, hidden, size, biased))

    def router(self, name: str, routing: Routing, biased: bool = False) -> None:
        """The module that scores experts, and what corrects its scores."""
        self.linear(name, routing.count, self.config.hidden_size, biased, "float32" if routing.wide else "")
        if routing.corrected:
            self._modules.append(ModuleSlot(correction_of(name), ModuleKind.VECTOR, (routing.count,), bare=True))

    def experts(self, name: str, stack: ExpertStack) -> None:
        """gate, up and down of each expert under `name`, however they are stored."""
        self._experts = stack
        for expert in range(stack.count):
            self._gated(f"{name}.{expert}", self.config.mixtures.parts, stack.size, ModuleKind.EXPERT, stack.biased)

    def finish(self) -> ModelSlots:
        """All slots, the final norm and the head added."""
        c, names = self.config, self.config.names
        self.vectors(c.hidden_size, names.final_norm)
        tied_to = names.embedding if c.tie_word_embeddings else None
        self._modules.append(self._matrix(names.head, ModuleKind.LM_HEAD, c.vocab_size, c.hidden_size, tied_to=tied_to))
        return ModelSlots(tuple(self._modules), tuple(self._groups), tuple(self._attention), self._experts, names.aside, c.join.describe(), self._further(), notes=self._notes())

    def _notes(self) -> tuple[str, ...]:
        return () if self.config.latent is None else (LATENT_NOTE,)

    def _further(self) -> tuple[str, ...]:
        count = self.config.num_hidden_layers
        return tuple(self.config.names.layer(index) for index in range(count, count + self.config.further_layers))


def layers(config: ModelConfig) -> Iterator[tuple[int, str]]:
    """(index, module name) of each layer."""
    return ((i, config.names.layer(i)) for i in range(config.num_hidden_layers))
