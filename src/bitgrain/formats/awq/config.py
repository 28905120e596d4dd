"""The configuration of AWQ checkpoints: keys, detection, layout and rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.checkpoint.parts import StoredPart, join, part_of
from bitgrain.errors import ConflictingConfigError, LabelMismatchError
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.awq.layouts import BUILDERS, LOCAL_NAMES, AwqSettings, fits
from bitgrain.formats.awq.scaled_activations import LOCAL, ScaledInputScheme, scaled_inputs
from bitgrain.formats.awq.schemes import BITS, PER_WORD, GemmScheme
from bitgrain.formats.base import ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.dynamic_rules import DynamicRule, find_dynamic_rule
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.expert_stacks import ExpertStack, divide_experts
from bitgrain.formats.kv_scales import read_static_cache, static_cache_of
from bitgrain.formats.matching import SegmentRules
from bitgrain.formats.word_packed import (
    METADATA_KEYS,
    named_rule,
    read_code_rules,
    read_neutral_keys,
)
from bitgrain.weights import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

# AutoAWQ writes 4 bits only, AutoRound up to 7 in the gemm layout.
ALL_BITS = frozenset({4, 5, 6, 7})
# What `version` says, and the layout that it means.  exllama and ipex are kernels that read the gemm layout.
LAYOUTS = {
    "gemm": "gemm",
    "exllama": "gemm",
    "exllamav2": "gemm",
    "ipex": "gemm",
    "gemv": "gemv",
    "gemv_fast": "gemv_fast",
    "llm-awq": "gemv_fast",
    "marlin": "marlin",
}
_VERSION_KEYS = ("version", "format", "checkpoint_format")
_METHODS = ("awq", "awq-marlin", "auto-awq", "autoawq", "llm-awq")


@dataclass(slots=True)
class AwqConfig(QuantConfig):
    """4-bit codes (5 to 7 in the gemm layout) with a scale and a zero point per group of K.

    Args:
        group_size: -1 for one group per row.
        version:    as configured, in lower case.
        symmetric:  the configuration promises zero points of 2**(bits-1).
        ignore:     modules_to_not_convert; matched by whole segments (the producer matches substrings, which would also
                    hit gate_proj for "gate"; where the two differ, the tensors decide).
        lm_head:    whether the head is quantized, None if the configuration does not say.
        bits:       of a code.
        cache:      of every attention module, its scales left out.
        scaled:     stored scales of an activation function's output to the linear module that reads it.
    """

    name: ClassVar[str] = "awq"
    aliases: ClassVar[tuple[str, ...]] = ("awq_marlin", "auto_awq", "autoawq", "llm-awq", "awq_gemm", "awq_gemv", "awq_gemv_fast")
    informational: ClassVar[frozenset[str]] = METADATA_KEYS | {"version", "backend"}

    group_size: int
    version: str
    symmetric: bool
    ignore: SegmentRules
    dynamic: tuple[DynamicRule, ...] = ()
    lm_head: bool | None = None
    bits: int = BITS
    cache: KVCacheScheme = field(default_factory=KVCacheScheme)
    scaled: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        return examples_of(GemmScheme(SHAPE, 128, "F16"), GemmScheme(SHAPE, 128, "F16", width=6))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        method = evidence.method
        if method is not None:
            return Detection(100, (f"quant_method = {method!r}",)) if method in _METHODS else None
        for file, section in evidence.sidecars.items():
            if "w_bit" in section and "q_group_size" in section:
                return Detection(80, (f"{file} has w_bit and q_group_size",))
        section = evidence.quantization or {}
        if {"w_bit", "q_group_size"} <= section.keys() or ("zero_point" in section and str(section.get("version")).lower() in LAYOUTS):
            return Detection(80, ("quantization_config has the keys of this format, though no quant_method",))
        return _detect_tensors(evidence)

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        settings = ConfigReader(evidence.settings())
        problems = settings.problems
        version = _read_version(settings, evidence)
        allowed = ALL_BITS if LAYOUTS.get(version) == "gemm" else frozenset({BITS})
        bits = settings.integer("bits", "w_bit", allowed=allowed, default=BITS)
        group_size = settings.group_size("group_size", "q_group_size", default=128)
        symmetric = _read_symmetry(settings, version)
        settings.need("pack_dtype", lambda v: v in ("int32", "torch.int32", "int16"), "'int32'", "quantize the model again")
        settings.need("desc_act", lambda v: v is False, "false: no tensor of this format stores an order", "correct the configuration")
        settings.need("static_groups", lambda v: isinstance(v, bool), "true or false", "correct the configuration")
        tiled = LAYOUTS.get(version) == "marlin"
        settings.need("is_marlin_format", lambda v: v == tiled, "agreement with version", "correct the configuration")
        packing = "a packing of this format's own tensors"
        settings.need("packing_format", lambda v: isinstance(v, str) and "awq" in v.lower(), packing, "correct the configuration")
        # Quark's exports for readers of this format; "order" would be the natural order of nibbles
        settings.need("pack_method", lambda v: v == "reorder", "'reorder': the order of this format's nibbles", "export the model again in this order")
        settings.skip(("export",))
        ignore = SegmentRules(settings.names("modules_to_not_convert", "ignore"))
        dynamic = read_code_rules(settings, frozenset({"bits", "group_size", "sym"}), allowed)
        lm_head = settings.flag("lm_head")
        cache = read_static_cache(settings)
        read_neutral_keys(settings, _METHODS)
        scaled = scaled_inputs(evidence.tensors, LAYOUTS.get(version, ""), problems)
        settings.finish()
        return cls(group_size, version, symmetric, ignore, dynamic, lm_head, bits, cache, scaled)

    def parts(self, tensors: Mapping[str, TensorHeader], experts: ExpertStack | None) -> dict[str, StoredPart]:
        """As in the base; scales of an activation function become those of the module behind it."""
        renamed = {f"{module}.{LOCAL}": part_of(tensors[name], f"{module}.{LOCAL}") for name, module in self.scaled.items() if name in tensors}
        rest = {name: header for name, header in tensors.items() if name not in self.scaled}
        return join(tensors, divide_experts(rest, experts), renamed)

    def is_quantized(self, module: ModuleView) -> bool:
        return not LOCAL_NAMES.isdisjoint(module.tensors)

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        named = named_rule(module, self.ignore, self.dynamic, self.matched_rules)
        if named is not None:
            return named
        if module.kind is ModuleKind.LM_HEAD and self.lm_head is False:
            return False, "lm_head is false"
        return True, f"{self.name} {self.version}"

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        return static_cache_of(self.cache, module)

    def rules(self) -> Sequence[str]:
        return (*self.ignore.patterns, *(rule.key for rule in self.dynamic))

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        """The scheme of the configured layout.

        Raises:
            LabelMismatchError: the tensors have another layout than `version` says.
            ShapeMismatchError: the layout cannot hold the module's sizes.
        """
        override = find_dynamic_rule(self.dynamic, module.name)
        chosen = override.overrides if override is not None else {}
        settings = AwqSettings(
            chosen.get("group_size", self.group_size), chosen.get("sym", self.symmetric), chosen.get("bits", self.bits)
        )
        layout = LAYOUTS[self.version]
        others = [other for other in BUILDERS if other != layout and fits(other, module, settings)]
        if others and not fits(layout, module, settings):
            action = "correct version in the configuration, or fetch the checkpoint's own configuration"
            if self.version == "llm-awq":
                action = "write the checkpoint again with a current llm-awq: the nibble order of its older layouts is not known"
            stored = ", ".join(f"{name} {module.tensors[name].describe()}" for name in sorted(LOCAL_NAMES & module.tensors.keys()))
            raise LabelMismatchError(
                module.full_name("qweight"),
                f"{stored}: the layout of version {others[0]!r}, but the configuration says {self.version!r}",
                f"the layout of {self.version!r}",
                action,
            )
        scheme = BUILDERS[layout](module, settings)
        return ScaledInputScheme(scheme) if LOCAL in module.tensors else scheme


def _detect_tensors(evidence: Evidence) -> Detection | None:
    for name, header in evidence.tensors.items():
        module, _, local = name.rpartition(".")
        scales = evidence.tensors.get(f"{module}.scales")
        if local != "qweight" or scales is None or len(header.shape) != 2 or len(scales.shape) != 2:
            continue
        n_packed = header.dtype == "I32" and header.shape[1] * PER_WORD == scales.shape[1]
        if n_packed or header.dtype == "I16":
            return Detection(50, (f"{name} is {header.describe()} beside scales {scales.describe()}",))
        return None
    return None


def _read_version(settings: ConfigReader, evidence: Evidence) -> str:
    """The layout's name.  Files may spell it in other cases, so the comparison between them is made here."""
    stated: dict[str, str] = {}
    for source, section in {**evidence.sidecars, settings.where: evidence.quantization or {}}.items():
        for key in _VERSION_KEYS:
            if isinstance(section.get(key), str):
                stated[f"{source}: {key}"] = section[key].lower()
    if len({LAYOUTS.get(v, v) for v in stated.values()}) > 1:
        settings.problems.append(
            ConflictingConfigError(
                "version", ", ".join(f"{where} = {value!r}" for where, value in stated.items()), "one layout", "correct the wrong file"
            )
        )
    unstated = "llm-awq" if evidence.method == "llm-awq" else "gemm"
    version = settings.text(*_VERSION_KEYS, default=unstated).replace("-", "_").replace("llm_awq", "llm-awq")
    backend = settings.text("backend", default="")
    if "llm-awq" in backend.replace("_", "-"):
        version = "llm-awq"
    if version not in LAYOUTS:
        settings.problem("version", repr(version), f"one of {', '.join(LAYOUTS)}", "quantize the model again in a known layout")
    return version


def _read_symmetry(settings: ConfigReader, version: str) -> bool:
    """Whether the configuration promises zero points of 8: `sym`, or the opposite of `zero_point`."""
    zero_point, sym = settings.flag("zero_point"), settings.flag("sym")
    if zero_point is not None and sym is not None and zero_point == sym:
        settings.problem("zero_point", f"{zero_point} with sym = {sym}", "opposite values", "correct the wrong one")
    symmetric = sym if sym is not None else zero_point is False
    tiled = LAYOUTS.get(version) == "marlin"
    if tiled and (zero_point is True or sym is False):
        settings.problem("zero_point", "zero points with version 'marlin'", "zero_point: false, since that layout stores none")
    return symmetric
