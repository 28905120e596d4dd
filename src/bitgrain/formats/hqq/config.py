"""The configuration of HQQ checkpoints: keys, detection and rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from bitgrain.formats.base import ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.hqq.descriptors import KINDS
from bitgrain.formats.hqq.layout import WIDTHS, Layout
from bitgrain.formats.hqq.module_layout import ModuleReader, Settings
from bitgrain.formats.hqq.schemes import HqqScheme
from bitgrain.formats.matching import SegmentRules
from bitgrain.weights import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

# Local names that only this format has.
OWN_LOCALS = frozenset({"W_q", "zero_scale", "scale_q", "zero_q", *KINDS}) - {"shape"}
NESTED_MARKS = (".meta_scale.", ".meta_zero.")
PARAMS = "weight_quant_params"


@dataclass(slots=True)
class HqqConfig(QuantConfig):
    """1- to 8-bit codes in groups along either dimension; the same settings for all modules, or by layer tag.

    Args:
        common:     settings of all modules; None if they go by tag, or are not stated.
        tags:       layer tag ("self_attn.q_proj") to settings; None leaves the layer alone.
        skipped:    skip_modules.
        described:  descriptors that occur in the checkpoint.
        read_small: reads a tensor that describes others.
    """

    name: ClassVar[str] = "hqq"
    aliases: ClassVar[tuple[str, ...]] = ("hqq_marlin", "hqq_gemlite")

    common: Settings | None
    tags: Mapping[str, Settings | None]
    skipped: SegmentRules
    described: frozenset[str]
    read_small: Callable[[str], Tensor] = field(repr=False)

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        layouts = [Layout(SHAPE, width, 64, axis) for width in (4.0, 8.0, 3.0, 2.0) for axis in (1, 0)]
        return examples_of(*(HqqScheme(layout, layout.word_code) for layout in layouts))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method is not None:
            return Detection(100, (f"quant_method = {evidence.method!r}",)) if evidence.method == "hqq" else None
        section = (evidence.quantization or {}).get("quant_config")
        if isinstance(section, Mapping) and PARAMS in section:
            return Detection(80, (f"quantization_config has quant_config with {PARAMS}",))
        example = evidence.suffixes.get("W_q")
        if evidence.quantization or evidence.sidecars or example is None:
            return None
        return Detection(50, (f"{example} is {evidence.tensors[example].describe()}",))

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        reader = ConfigReader(evidence.settings())
        section = reader.section("quant_config", "an object of settings, or of layer tags with settings")
        common = _read_settings(reader, section, "quant_config") if PARAMS in section else None
        tags = {} if common is not None else {tag: _read_tag(reader, tag, value) for tag, value in section.items()}
        reader.skip({"quant_method"})
        skipped = SegmentRules(dict.fromkeys(reader.names("skip_modules", "modules_to_not_convert")))
        config = cls(common, tags, skipped, frozenset(KINDS) & evidence.suffixes.keys(), evidence.read_small)
        reader.finish()
        return config

    def split_name(self, name: str) -> tuple[str, str]:
        for mark in NESTED_MARKS:
            module, inside, rest = name.partition(mark)
            if inside:
                return module, mark[1:] + rest
        module, _, local = name.rpartition(".")
        return module, local

    def is_quantized(self, module: ModuleView) -> bool:
        return not OWN_LOCALS.isdisjoint(module.tensors)

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        present = self.is_quantized(module)
        rule = self.skipped.find(module.name)
        if rule is not None:
            self.matched_rules.add(rule)
            # versions of the writer differ in what a name covers; only where all agree can tensors contradict it
            if not present or not {module.name, layer_tag(module.name)}.isdisjoint(self.skipped.patterns):
                return False, f"skip_modules has {rule!r}"
            return True, f"skip_modules has {rule!r}, but not for sure for this module, and its tensors are quantized"
        if module.kind is ModuleKind.EMBEDDING and not present:
            return False, "only linear modules are quantized"
        if not self.tags:
            return True, "quant_config" if self.common is not None else "its tensors"
        tag = self._tag_of(module.name)
        if tag is None:
            return False, "quant_config has no entry for its layer tag"
        self.matched_rules.add(tag)
        return self.tags[tag] is not None, f"quant_config has {tag!r}"

    def _tag_of(self, name: str) -> str | None:
        """The entry of quant_config for a module: its name, its tag, or the longest end of its tag."""
        tag = layer_tag(name)
        parts = tag.split(".")
        ends = [".".join(parts[i:]) for i in range(1, len(parts))]
        return next((key for key in (name, tag, *ends) if key in self.tags), None)

    def rules(self) -> Sequence[str]:
        return (*self.skipped.patterns, *self.tags)

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        """The scheme of a module.

        Raises:
            LabelMismatchError, ManyProblemsError: descriptors that contradict one another or the configuration.
        """
        tag = self._tag_of(module.name) if self.tags else None
        settings = self.tags[tag] if tag is not None else self.common
        return ModuleReader(module, self.read_small, settings, self.trust_tensors).scheme(self.described)


def layer_tag(name: str) -> str:
    """The name without "model", "layers" and numbers: what quant_config and skip_modules call a kind of layer."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric())


def _read_tag(reader: ConfigReader, tag: str, value: object) -> Settings | None:
    """The settings of one layer tag; None where the layer is left alone."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        reader.problem(f"quant_config.{tag}", repr(value)[:200], "an object of settings, or null for a layer that is left alone")
        return None
    return _read_settings(reader, value, f"quant_config.{tag}")


def _read_settings(outer: ConfigReader, section: Mapping[str, Any], where: str) -> Settings:
    """The settings of one section, whose problems are noted with the outer reader."""
    reader = ConfigReader(section, outer.place(where))
    if PARAMS not in section:
        reader.problem(PARAMS, "absent", "an object with nbits, group_size and axis")
    params = ConfigReader(reader.section(PARAMS, "an object with nbits, group_size and axis"), reader.place(PARAMS))
    width = 4.0
    if params.values:
        width = round(params.number("nbits"), 4)
        if width not in WIDTHS:
            params.problem("nbits", f"{width:g}", f"one of {', '.join(f'{w:g}' for w in WIDTHS)}")
    settings = Settings(
        width,
        params.integer("group_size", minimum=1, default=0),
        params.integer("axis", allowed=(0, 1)) if params.values.get("axis") is not None else None,
        params.flag("channel_wise") is not False,
    )
    params.skip(("axis", "optimize", "round_zero", "view_as_float"))
    # whether scales and zero points are quantized is stored with each module
    reader.skip(("scale_quant_params", "zero_quant_params", "offload_meta"))
    for inner in (params, reader):
        outer.collect(inner.finish)
    return settings
