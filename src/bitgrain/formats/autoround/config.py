"""The configuration of AutoRound checkpoints: `quant_method` auto-round, and what its packing formats mean.

AutoRound's exports in other formats call themselves by those formats' names and are read there; they only carry
`provider` or `autoround_version`.  Source: auto-round 0.16.1; formats specification, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.autoround.rules import ExtraConfig, read_blocks, read_extra_config
from bitgrain.formats.autoround.schemes import AS_STORED, INTERLEAVED, LOCAL_NAMES, MINUS_ONE, scheme_of
from bitgrain.formats.autoround.settings import ModuleSettings, read_settings
from bitgrain.formats.base import ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import AUTO_ROUND_KEYS, ConfigReader, words
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.fp8.schemes import FLOAT8_CODES
from bitgrain.formats.kv_scales import read_static_cache, static_cache_of
from bitgrain.formats.matching import SegmentRules
from bitgrain.formats.word_packed import METADATA_KEYS
from bitgrain.weights import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

METHODS = ("auto-round", "autoround", "intel/auto-round", "intel/autoround")
# Packing formats, the words before "auto_round:" left out, that hold one kind of number each; integers see _packing_of.
PACKINGS = {
    "llm_compressor": ("mx_fp", "nv_fp"), "llm_compressor_nvfp4_e5m3": ("nv_e5m3",),
    "fp8_static": ("fp8", "fp8_e5m2"), "fp8": ("fp8", "fp8_e5m2"),
    "mx_fp": ("mx_fp",), "nv_fp": ("nv_fp",), "mx_int": ("mx_int",), "nvfp4_v2": ("nv_e5m3",),
    "": ("int", "mx_int", "mx_fp", "nv_fp", "nv_e5m3", "fp8", "fp8_e5m2"),
}  # fmt: skip
# Kernels after which older versions named the packing that they read: zero points as they are.
_KERNELS = frozenset({"exllamav2", "exllama", "triton", "tritonv2", "torch", "hpu", "ark", "ipex", "qbits", "itrex"})
KEYS = words(
    "quant_method packing_format backend extra_config ignored_layers modules_to_not_convert fmt activation_scheme weight_block_size"
    " rotation_configs"
)


@dataclass(slots=True)
class AutoRoundConfig(QuantConfig):
    """Parsed configuration of a checkpoint in AutoRound's own format.

    Args:
        common: the settings of modules that no entry of extra_config changes.
        extra:  the entries of extra_config, their settings complete.
        packing: of integer codes: MINUS_ONE, AS_STORED or INTERLEAVED.
        label:  the packing format as written, "" if it is not.
        blocks: beginnings of the names of quantized modules; empty: all but the head.
        ignore: modules that stay dense, by whole segments.
        cache:  of every attention module, its scales left out.
    """

    name: ClassVar[str] = "auto-round"
    aliases: ClassVar[tuple[str, ...]] = ("auto_round", "autoround", "intel/auto-round")
    informational: ClassVar[frozenset[str]] = (METADATA_KEYS | AUTO_ROUND_KEYS) - {
        "bits", "group_size", "sym", "data_type", "packing_format", "act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym",
    }  # fmt: skip

    common: ModuleSettings
    extra: ExtraConfig = field(default_factory=ExtraConfig)
    packing: str = MINUS_ONE
    label: str = ""
    blocks: tuple[str, ...] = ()
    ignore: SegmentRules = field(default_factory=lambda: SegmentRules(()))
    cache: KVCacheScheme = field(default_factory=KVCacheScheme)

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        base, module = ModuleSettings(), ModuleView("", ModuleKind.LINEAR, {}, SHAPE)
        eight = replace(base, bits=8, group_size=-1, kind="fp8")
        mx = replace(base, kind="mx_fp", group_size=32, input_kind="mx_fp", input_type="mx_fp", input_bits=4, input_group=32)
        nv = replace(base, kind="nv_fp", group_size=16, input_kind="nv_fp", input_type="nv_fp4_with_static_gs", input_bits=4, input_group=16)
        settings = [
            *(replace(base, bits=bits) for bits in (2, 3, 4, 5, 6, 7, 8)),
            replace(base, symmetric=False),
            replace(eight, input_bits=8, input_kind="fp8", input_dynamic=False, input_group=0),
            replace(eight, block=(128, 128), input_bits=8, input_kind="fp8", input_group=128),
            mx,
            replace(mx, bits=8, input_bits=8),
            replace(mx, kind="mx_int", input_kind="mx_int", input_type="mx_int"),
            nv,
            replace(nv, kind="nv_e5m3", input_kind="nv_e5m3", input_type="nvfp4_v2"),
        ]
        return examples_of(*(scheme_of(module, one, MINUS_ONE, "") for one in settings))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method not in METHODS:
            return None
        named = (evidence.quantization or {}).get("quant_method")
        where = "" if named else " in a file beside config.json"
        return Detection(100 if named else 80, (f"quant_method is {evidence.method!r}{where}",))

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        reader = ConfigReader(evidence.settings())
        reader.skip(KEYS | AUTO_ROUND_KEYS | METADATA_KEYS)
        common = read_settings(reader)
        label = _packing_label(reader)
        config = cls(
            common=common,
            extra=read_extra_config(reader, common),
            label=label,
            packing=_packing_of(label),
            blocks=read_blocks(reader),
            ignore=SegmentRules(dict.fromkeys(reader.names("ignored_layers") + reader.names("modules_to_not_convert"))),
            cache=read_static_cache(reader),
        )
        config._check(reader)
        reader.finish()
        return config

    def _check(self, reader: ConfigReader) -> None:
        """Note keys that contradict the settings, or ask for what the tensors cannot say."""
        variants = {"data_type": self.common, **{f"extra_config[{entry.key!r}]": entry.settings for entry in self.extra.entries}}
        held = PACKINGS.get(_place(self.label), ("int",))
        for where, settings in variants.items():
            if not settings.is_dense and settings.kind not in held:
                reader.problem(where, f"numbers of kind {settings.kind!r} in packing_format {self.label!r}", f"kind {' or '.join(held)}", "correct the configuration")
            if not settings.is_dense and self.packing == INTERLEAVED and settings.kind == "int" and settings.bits not in (4, 5, 6, 7):
                reader.problem(where, f"{settings.bits} bits in packing_format {self.label!r}", "4 to 7 bits")
        block = reader.block("weight_block_size")
        if block is not None and block != self.common.block:
            found = list(self.common.block) if self.common.block is not None else self.common.group_size
            reader.problem("weight_block_size", repr(list(block)), f"the group_size {found}", "correct one of the two")
        _check_float8(reader, self.common)
        undo = "quantize the model without it"
        for key in ("super_bits", "super_group_size", "adapter", "rotation"):
            reader.need(key, lambda v: not v, "null: no packing format stores what it needs", undo)
        for key in ("rotation_config", "rotation_configs"):
            reader.need(key, lambda v: not v, "null: rotated inputs are not supported by this version", undo)
        reader.need("static_attention_dtype", lambda v: v in (None, "float16", "bfloat16"), "null: quantized attention is not supported by this version", undo)

    def is_quantized(self, module: ModuleView) -> bool:
        weight = module.tensors.get("weight")
        return (weight is not None and weight.dtype in FLOAT8_CODES) or not LOCAL_NAMES.isdisjoint(module.tensors)

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        rule = self.ignore.find(module.name)
        if rule is not None:
            self.matched_rules.add(rule)
            return False, f"excluded by the rule {rule!r}"
        entry = self.extra.find(module.name)
        if entry is not None:
            self.matched_rules.update(self.extra.keys_for(module.name))
            return not entry.settings.is_dense, f"extra_config has {entry.key!r}"
        if module.kind is ModuleKind.EMBEDDING:
            return False, "this format leaves embeddings alone"
        inside = next((block for block in self.blocks if module.name.startswith(block)), None)
        if inside is None and self.blocks:
            return False, f"it is outside the blocks {', '.join(self.blocks)}, and extra_config does not list it"
        if inside is None and module.kind is ModuleKind.LM_HEAD:
            return False, "extra_config does not list the head"
        if self.common.is_dense:
            return False, f"bits is {self.common.bits}"
        return True, f"{self.name} {self.label or self.common.kind}" + (f", block {inside!r}" if inside else "")

    def rules(self) -> Sequence[str]:
        return (*self.ignore.patterns, *(entry.key for entry in self.extra.entries))

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        entry = self.extra.find(module.name)
        # a module that a rule excludes, and whose tensors are trusted all the same, is as the others
        settings = entry.settings if entry is not None and not entry.settings.is_dense else self.common
        return scheme_of(module, settings, self.packing, self.label)

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        return static_cache_of(self.cache, module)


def _place(label: str) -> str:
    """A packing format without the words that all have in front: "auto_round:fp8" is "fp8", "auto_round" is ""."""
    place = label.replace("auto-round", "auto_round").replace("autoround", "auto_round")
    return place.removeprefix("auto_round").removeprefix(":")


def _packing_label(reader: ConfigReader) -> str:
    """packing_format, in older files `backend`, where that names one; "" where neither does.

    A word that names no packing known here becomes a problem.
    """
    label = reader.text("packing_format", default="")
    if label in ("", "auto"):
        backend = reader.values.get("backend")
        old = backend.lower() if isinstance(backend, str) else ""
        label = old if "round" in old else ""
    place = _place(label)
    known = place in PACKINGS or place in _KERNELS or "gptq" in place or "awq" in place or place == "marlin"
    if not known or "svdquant" in place:
        names = ", ".join(f"auto_round:{name}" for name in ("auto_gptq", "gptqmodel", "auto_awq", *PACKINGS) if name)
        reader.problem("packing_format", repr(label), f"auto_round, {names}", "export the model in one of these packing formats")
    return label


def _packing_of(label: str) -> str:
    """How integer codes are packed; what is not stated is what the producer assumes, zero points minus one.

    "gptq" in a name means zero points minus one, except in "gptqmodel"; "marlin" was written by AutoGPTQ's packer.
    """
    place = _place(label)
    if "awq" in place:
        return INTERLEAVED
    if not label or place == "marlin":
        return MINUS_ONE
    return MINUS_ONE if "gptq" in place and "gptqmodel" not in place else AS_STORED


def _check_float8(reader: ConfigReader, common: ModuleSettings) -> None:
    """Compare the two keys that FP8 configurations say twice with the settings."""
    if not common.kind.startswith("fp8") or common.is_dense:
        return
    fmt = reader.text("fmt", default="")
    element = "e5m2" if common.kind == "fp8_e5m2" else "e4m3"
    if fmt and element not in fmt:
        reader.problem("fmt", repr(fmt), f"{element!r}, as data_type says", "correct one of the two")
    scheme = reader.choice("activation_scheme", {"static": "static", "dynamic": "dynamic", "": ""}, "")
    stated = "dynamic" if common.input_dynamic else "static"
    if scheme and common.quantizes_input and scheme != stated:
        reader.problem("activation_scheme", repr(scheme), f"{stated!r}, as act_dynamic says", "correct one of the two")
