"""Quantizing an unquantized checkpoint while it loads: a configuration that the run writes, not a producer.

Every module is read in 16 or 32 bits, rounded (quantize.nearest) and freed before the next one is read.  Output heads,
routers and embeddings stay as they are unless a rule names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TensorHeader
from bitgrain.checkpoint.parts import StoredPart
from bitgrain.errors import RequestError
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import Choice, DenseScheme, ModuleKind, ModuleView, QuantConfig, Scheme, TensorRule, dense_scheme
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.matching import matches_segments, matches_wildcard
from bitgrain.formats.value_checks import require_finite
from bitgrain.quantize import Target, quantize_nearest
from bitgrain.quantize.targets import require_target
from bitgrain.weights import ActivationSpec, Weight, WeightSpec
from bitgrain.weights.float8 import float_spec

if TYPE_CHECKING:
    from typing_extensions import Self

QUANTIZED_KINDS = (ModuleKind.LINEAR, ModuleKind.EXPERT)
# Last segments of modules that choose experts: a rounding there moves tokens to other experts.
ROUTERS = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True, slots=True)
class OnlineRequest:
    """What a run asks for.

    Args:
        target: what modules become; None where only `rules` say.
        ignore: modules that stay as they are: whole dotted segments of a name, or a pattern with * over the whole name.
        rules:  pattern to a target's name, or "none"; the first that matches wins over `target` and `ignore`.
    """

    target: Target | None
    ignore: tuple[str, ...] = ()
    rules: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class OnlineScheme(Scheme):
    """A dense `weight` [N, K] that is rounded to the target while it is loaded."""

    shape: tuple[int, int]
    dtype: str
    target: Target
    activation: ActivationSpec = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", self.target.activation)

    @property
    def weight_spec(self) -> WeightSpec:
        spec, k = self.target.weight, self.shape[1]
        if spec.kind in ("int_affine", "codebook") and spec.granularity == "group" and k <= spec.group_size:
            return replace(spec, granularity="channel", group_size=0)
        if spec.kind == "float":
            n = self.shape[0]
            return float_spec(torch.float8_e4m3fn, self.shape, {"channel": (1, k), "tensor": (n, k)}.get(spec.granularity, spec.block))
        return spec

    def tensors(self) -> tuple[TensorRule, ...]:
        return (TensorRule("weight", (self.dtype,), (self.shape,)),)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        return quantize_nearest(require_finite("weight", tensors["weight"]), self.target.weight)

    @property
    def label(self) -> str:
        head = super(OnlineScheme, self).label  # slots make a new class, which a bare super() does not find
        return f"online {self.target.name}: {head}"


@dataclass(slots=True)
class OnlineConfig(QuantConfig):
    """An unquantized checkpoint's own configuration, and what the run makes of its modules.

    Args:
        stored:  the checkpoint's configuration.
        request: what the run asks for.
    """

    name: ClassVar[str] = "online"

    stored: QuantConfig
    request: OnlineRequest

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        return None

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        raise RequestError("online quantization", "asked of a checkpoint's files", "a run that asks for it", "use --quantization")

    def parts(self, tensors: Mapping[str, TensorHeader], experts: ExpertStack | None) -> dict[str, StoredPart]:
        return self.stored.parts(tensors, experts)

    def is_quantized(self, module: ModuleView) -> bool:
        return self.stored.is_quantized(module)

    def rules(self) -> Sequence[str]:
        return (*self.request.ignore, *(pattern for pattern, _ in self.request.rules))

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        target, why = self._target_of(module)
        return target is not None, why

    def decide(self, module: ModuleView) -> Choice:
        plain = self.stored.decide(module)
        target, why = self._target_of(module)
        if target is None or not isinstance(plain.scheme, DenseScheme):
            return Choice(plain.scheme, why)
        return Choice(self._scheme(module, target), why)

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        target, _ = self._target_of(module)
        return self.stored.quantized_scheme(module) if target is None else self._scheme(module, target)

    @staticmethod
    def _scheme(module: ModuleView, target: Target) -> Scheme:
        dense = dense_scheme(module)
        scheme = OnlineScheme(dense.shape, dense.dtype, target)
        if module.kind is ModuleKind.EMBEDDING:
            return OnlineScheme(dense.shape, dense.dtype, replace(target, activation=ActivationSpec()))
        return scheme

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        return self.stored.get_kv_cache_scheme(module)

    def _target_of(self, module: ModuleView) -> tuple[Target | None, str]:
        """(what the module becomes, why)."""
        for pattern, name in self.request.rules:
            if _matches(pattern, module.name):
                self.matched_rules.add(pattern)
                return require_target(f"rule {pattern!r}", name), f"online: the rule {pattern!r} asks for {name}"
        for pattern in self.request.ignore:
            if _matches(pattern, module.name):
                self.matched_rules.add(pattern)
                return None, f"online: left as it is by the rule {pattern!r}"
        if self.request.target is None:
            return None, "online: no rule names it"
        if module.kind not in QUANTIZED_KINDS:
            return None, f"online: a {module.kind.value} stays as it is unless a rule names it"
        if module.name.rpartition(".")[2] in ROUTERS:
            return None, "online: a router stays as it is unless a rule names it"
        return self.request.target, f"online: --quantization {self.request.target.name}"


def _matches(pattern: str, name: str) -> bool:
    return matches_wildcard(pattern, name) if any(c in pattern for c in "*?[") else matches_segments(pattern, name)


def online_request(quantization: str | None, ignore: Sequence[str], rules: Mapping[str, str]) -> OnlineRequest | None:
    """What a run asks for; None if `quantization` is no target's name and there are no rules.

    Raises:
        RequestError: a rule asks for what does not exist.
    """
    from bitgrain.quantize import find_target

    for pattern, name in rules.items():
        require_target(f"rule {pattern!r}", name)
    target = find_target(quantization) if quantization is not None else None
    if target is None and not rules:
        if ignore:
            found = f"{len(ignore)} patterns to ignore, and nothing to quantize"
            raise RequestError("ignore", found, "a quantization of the run, or rules", "name what modules become, or leave `ignore` out")
        return None
    return OnlineRequest(target, tuple(ignore), tuple(rules.items()))


def online_config(config: QuantConfig, request: OnlineRequest, asked: str | None) -> QuantConfig:
    """The configuration under which an unquantized checkpoint is quantized.

    Raises:
        RequestError: the checkpoint is quantized already.
    """
    if not config.holds_plain_weights:
        shown = asked or ", ".join(f"{p}={t}" for p, t in request.rules)
        raise RequestError(
            f"quantization = {shown!r}", f"the checkpoint is quantized already ({config.name})", f"a checkpoint in {', '.join(FLOAT_CODES)}, or {config.name!r}",
            "leave the option out to run the checkpoint as it is",
        )  # fmt: skip
    return OnlineConfig(config, request)
