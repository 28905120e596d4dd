"""The configuration of GPTQ checkpoints: keys, detection, packing and rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bitgrain.errors import ConfigError, ConflictingConfigError, LabelMismatchError
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.dynamic_rules import DynamicRule, find_dynamic_rule
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.gptq.schemes import GptqScheme, GptqSettings, gptq_scheme
from bitgrain.formats.kv_scales import read_static_cache, static_cache_of
from bitgrain.formats.marlin_tiles import marlin_scheme
from bitgrain.formats.matching import SegmentRules
from bitgrain.formats.word_packed import METADATA_KEYS, named_rule, read_code_rules, read_neutral_keys
from bitgrain.weights import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

LOCAL_NAMES = frozenset({"qweight", "qzeros", "scales", "g_idx", "B", "s"})
FORMATS = ("gptq", "gptq_v2", "gptq_p", "marlin")
ALL_BITS = frozenset({2, 3, 4, 5, 6, 7, 8})
# Widths that leave no bit over in a word: dense and planar streams are the same.
_EVEN_BITS = frozenset({2, 4, 8})
_WORDS = {"int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64"}
_METHODS = ("gptq", "gptq-marlin", "marlin", "auto-gptq", "autogptq", "gptqmodel", "gptq-marlin-24", "gptq-bitblas")
_OVERRIDES = frozenset({"bits", "group_size", "sym", "desc_act", "pack_dtype"})
_OTHER_LAYOUTS = {
    "bitblas": "a layout that only its own kernels define",
    "qqq": "4-bit weights with 8-bit activations in its own tiles",
    "marlin_24": "2:4 sparse tiles",
}


@dataclass(slots=True)
class GptqConfig(QuantConfig):
    """2- to 8-bit codes with a scale and a zero point per group of K.

    Args:
        bits, group_size, sym, desc_act, pack_dtype: of modules that no rule of `dynamic` overrides; sym is None if not stated.
        static_groups: groups were fixed before the columns were reordered, so that they are plain.
        checkpoint_format: "gptq" (zero points minus one), "gptq_v2", "gptq_p" (planar) or "marlin" (tiles).
        producer:      "gptqmodel", "auto-round", or "" for others; decides the packing of 5 to 7 bits.
        lm_head:       whether the head is quantized, None if the configuration does not say.
        blocks:        modules_in_block_to_quantize: suffixes of the modules that are quantized, empty for all.
        ignore:        modules_to_not_convert, by whole segments.
    """

    name: ClassVar[str] = "gptq"
    aliases: ClassVar[tuple[str, ...]] = ("gptq_marlin", "auto_gptq", "autogptq", "gptqmodel", "marlin", "gptq_v2", "gptq_p")
    informational: ClassVar[frozenset[str]] = METADATA_KEYS | {"backend"}

    bits: int
    group_size: int
    sym: bool | None
    desc_act: bool
    checkpoint_format: str = "gptq"
    static_groups: bool = False
    pack_dtype: str = "int32"
    producer: str = ""
    lm_head: bool | None = None
    dynamic: tuple[DynamicRule, ...] = ()
    blocks: tuple[str, ...] = ()
    ignore: SegmentRules = field(default_factory=lambda: SegmentRules(()))
    cache: KVCacheScheme = field(default_factory=KVCacheScheme)

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        settings = [GptqSettings(bits, 128, symmetric=True, reordered=False) for bits in (4, 8, 3)]
        settings += [GptqSettings(4, 128, symmetric=False, reordered=reordered) for reordered in (False, True)]
        return examples_of(*(GptqScheme(SHAPE, s, "F16") for s in settings))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        method = evidence.method
        if method is not None:
            return Detection(100, (f"quant_method = {method!r}",)) if method in _METHODS else None
        sections = {**evidence.sidecars, "quantization_config": evidence.quantization or {}}
        for file, section in sections.items():
            if {"bits", "group_size"} <= section.keys() and ("desc_act" in section or "is_marlin_format" in section):
                return Detection(80, (f"{file} has bits, group_size and desc_act",))
        return _detect_tensors(evidence)

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        settings = ConfigReader(evidence.settings())
        label = _read_format(settings, evidence.method)
        meta = evidence.settings().get("meta")
        pack_dtype = settings.text("pack_dtype", default="int32").removeprefix("torch.")
        config = cls(
            bits=settings.integer("bits", "wbits", allowed=ALL_BITS),
            group_size=settings.group_size("group_size", "groupsize", default=128),
            sym=settings.flag("sym"),
            desc_act=bool(settings.flag("desc_act")),
            checkpoint_format=label,
            static_groups=_read_static_groups(settings, meta),
            pack_dtype=pack_dtype,
            producer=_producer(evidence.settings()),
            lm_head=settings.flag("lm_head"),
            dynamic=read_code_rules(settings, _OVERRIDES, ALL_BITS),
            blocks=settings.names("modules_in_block_to_quantize", "inside_layer_modules"),
            ignore=SegmentRules(settings.names("modules_to_not_convert", "ignore")),
            cache=read_static_cache(settings),
        )
        config._check_packing(settings)
        settings.skip({"backend"})
        packing = "a packing of this format's own tensors"
        settings.need("packing_format", lambda v: isinstance(v, str) and "gptq" in v.lower(), packing, "correct the configuration")
        read_neutral_keys(settings, _METHODS)
        settings.finish()
        return config

    def _check_packing(self, settings: ConfigReader) -> None:
        """Note widths, words and labels that cannot be together, in the common settings and in each override."""
        variants: dict[str, Mapping[str, Any]] = {"": {}}
        variants.update({f"dynamic[{rule.key!r}].": rule.overrides for rule in self.dynamic if not rule.exclude})
        for where, chosen in variants.items():
            bits, word = chosen.get("bits", self.bits), chosen.get("pack_dtype", self.pack_dtype)
            if word not in _WORDS:
                settings.problem(f"{where}pack_dtype", repr(word), f"one of {', '.join(_WORDS)}", "quantize the model again")
            elif word != "int32" and bits not in _EVEN_BITS:
                settings.problem(f"{where}pack_dtype", f"{word} with {bits} bits", "int32", "quantize the model again with int32 words")
            if self.checkpoint_format == "marlin" and (bits != 4 or chosen.get("sym", self.sym) is False):
                settings.problem(f"{where}bits", f"bits {bits}, sym {chosen.get('sym', self.sym)} in Marlin tiles", "4 bits and sym: true")
            if bits in (5, 6, 7) and self.checkpoint_format != "gptq_p" and not self.producer:
                settings.problems.append(_ambiguous(settings.place(f"{where}bits"), bits))

    def is_quantized(self, module: ModuleView) -> bool:
        return not LOCAL_NAMES.isdisjoint(module.tensors)

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        named = named_rule(module, self.ignore, self.dynamic, self.matched_rules)
        if named is not None:
            return named
        if module.kind is ModuleKind.LM_HEAD:
            return self.lm_head is not False, "lm_head is false" if self.lm_head is False else f"{self.name} {self.checkpoint_format}"
        return self._in_blocks(module.name)

    def _in_blocks(self, name: str) -> tuple[bool, str]:
        if not self.blocks:
            return True, f"{self.name} {self.checkpoint_format}"
        suffix = next((s for s in self.blocks if name == s or name.endswith("." + s)), None)
        if suffix is None:
            return False, "modules_in_block_to_quantize does not list it"
        self.matched_rules.add(suffix)
        return True, f"modules_in_block_to_quantize has {suffix!r}"

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        return static_cache_of(self.cache, module)

    def rules(self) -> Sequence[str]:
        return (*self.ignore.patterns, *(rule.key for rule in self.dynamic), *self.blocks)

    def module_settings(self, name: str) -> GptqSettings:
        """The settings of one module, overrides applied."""
        override = find_dynamic_rule(self.dynamic, name)
        chosen = override.overrides if override is not None else {}
        bits = chosen.get("bits", self.bits)
        stored = bool(chosen.get("desc_act", self.desc_act)) and not self.static_groups
        planar, minus_one = packing_of(bits, self.checkpoint_format, self.producer)
        return GptqSettings(
            bits,
            chosen.get("group_size", self.group_size),
            chosen.get("sym", self.sym) is True,
            stored,
            planar,
            minus_one,
            _WORDS[chosen.get("pack_dtype", self.pack_dtype)],
            f"checkpoint_format {self.checkpoint_format!r}",
        )

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        """The scheme of a module.

        Raises:
            LabelMismatchError: tiles where the configuration says words, or the reverse.
            ShapeMismatchError: the layout cannot hold the module's sizes.
        """
        tiled = self.checkpoint_format == "marlin"
        if ("B" in module.tensors and not tiled) or ("qzeros" in module.tensors and tiled):
            raise LabelMismatchError(
                module.name,
                f"{', '.join(sorted(module.tensors))}, but checkpoint_format is {self.checkpoint_format!r}",
                "B and s, or qweight and scales without qzeros" if tiled else "qweight, qzeros and scales",
                "correct checkpoint_format (is_marlin_format) in the configuration",
            )
        settings = self.module_settings(module.name)
        return marlin_scheme(module, settings.group_size, "checkpoint_format") if tiled else gptq_scheme(module, settings)


def packing_of(bits: int, checkpoint_format: str, producer: str) -> tuple[bool, bool]:
    """(planar, minus_one): how codes are packed, and whether zero points are stored minus one.

    GPTQModel writes 5, 6 and 7 bits planar with zero points as they are, whatever the label; AutoRound writes a dense
    stream and follows the label.

    Raises:
        ConfigError: 5, 6 or 7 bits of an unknown producer.
    """
    if checkpoint_format == "gptq_p":
        return True, False
    if bits in (5, 6, 7):
        if producer == "gptqmodel":
            return True, False
        if producer != "auto-round":
            raise _ambiguous("quantization_config.bits", bits)
    return False, checkpoint_format == "gptq"


def _ambiguous(where: str, bits: int) -> ConfigError:
    return ConfigError(
        where,
        f"ambiguous packing: {bits} bits without a known producer; a dense and a planar stream have the same names and shapes",
        "meta.quantizer naming gptqmodel, provider or autoround_version naming AutoRound, or checkpoint_format 'gptq_p'",
        "fetch the checkpoint's complete configuration, or add the key that tells who wrote it",
    )


def _producer(section: Mapping[str, Any]) -> str:
    """Who wrote the checkpoint, as far as it matters here; "" if two are named or none is."""
    meta = section.get("meta")
    quantizers = meta.get("quantizer") if isinstance(meta, dict) else section.get("quantizer")
    named = " ".join(str(q) for q in quantizers) if isinstance(quantizers, list) else str(quantizers or "")
    provider = str(section.get("provider") or "").lower()
    rounds = "autoround_version" in section or "round" in provider or "round" in named.lower()
    model = "gptqmodel" in named.lower()
    if rounds == model:
        return ""
    return "auto-round" if rounds else "gptqmodel"


def _read_format(settings: ConfigReader, method: str | None) -> str:
    """checkpoint_format, from its spellings, the old flag, and quant_method = "marlin"."""
    tiled = settings.flag("is_marlin_format")
    stated = settings.text("checkpoint_format", "format", default="")
    if method in ("gptq-marlin-24", "gptq-bitblas"):
        stated = {"gptq-marlin-24": "marlin_24", "gptq-bitblas": "bitblas"}[method]
    if method == "marlin" and not stated:
        tiled = True
    if stated and tiled is not None and tiled != (stated == "marlin"):
        found = f"{str(tiled).lower()}, but checkpoint_format is {stated!r}"
        where = settings.place("is_marlin_format")
        settings.problems.append(ConflictingConfigError(where, found, "one layout", "correct the wrong key"))
    label = stated or ("marlin" if tiled else "gptq")
    if label not in FORMATS:
        found = repr(label) + (f", {_OTHER_LAYOUTS[label]}" if label in _OTHER_LAYOUTS else "")
        settings.problem("checkpoint_format", found, f"one of {', '.join(FORMATS)}", "fetch or write it as gptq or gptq_v2")
    return label


def _read_static_groups(settings: ConfigReader, meta: object) -> bool:
    """`static_groups`, at the top or among the metadata."""
    top = settings.flag("static_groups")
    return bool(top) or (isinstance(meta, dict) and meta.get("static_groups") is True)


def _detect_tensors(evidence: Evidence) -> Detection | None:
    for name, header in evidence.tensors.items():
        module, _, local = name.rpartition(".")
        partner = evidence.tensors.get(f"{module}.{'s' if local == 'B' else 'scales'}")
        if local not in ("qweight", "B") or partner is None or len(header.shape) != 2 or len(partner.shape) != 2:
            continue
        width = 2 if local == "B" else 1
        if header.dtype == "I32" and header.shape[1] == width * partner.shape[1]:
            return Detection(50, (f"{name} is {header.describe()} beside {partner.name} {partner.describe()}",))
        return None
    return None
