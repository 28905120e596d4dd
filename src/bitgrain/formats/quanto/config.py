"""Configuration of optimum-quanto checkpoints.

    quantization_map.json, quanto_qmap.json   {module: {weights: qint4, activations: none}}
    quantization_config of config.json        {quant_method: quanto, weights: int4, activations: null, modules_to_not_convert: [...]}
The map speaks per module; transformers' section names one type for all linear modules.  The tensors say which group size was
used, and of which type the weights are, which must be what the map says.
Source: formats specification, section 9; optimum-quanto 0.2.7 quantize and models; transformers 5.19 QuantoConfig.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import ConfigError, DtypeMismatchError, ShapeMismatchError
from bitgrain.formats.base import Choice, ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.matching import compile_rule, matches_regex
from bitgrain.formats.quanto.schemes import DATA, INPUT, INTEGER_SHIFTS, OUTPUT, PACKED, SCALE, SHIFT, BitsScheme, BytesScheme, PlainScheme
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

MAPS = ("quantization_map.json", "quanto_qmap.json")
# What follows a module's name, longest first.
LOCAL_NAMES = (PACKED, DATA, SCALE, SHIFT, "weight._zeropoint")
# quanto's types, and transformers' words for them.
WEIGHT_TYPES = {
    "qint2": "U8:2", "qint4": "U8:4", "qint8": "I8", "qfloat8": "F8_E4M3", "qfloat8_e4m3fn": "F8_E4M3",
    "qfloat8_e4m3fnuz": "F8_E4M3FNUZ", "qfloat8_e5m2": "F8_E5M2", "none": "",
    "int2": "U8:2", "int4": "U8:4", "int8": "I8", "float8": "F8_E4M3",
}  # fmt: skip
ACTIVATION_TYPES = {
    "qint8": "int8", "qfloat8": "fp8_e4m3fn", "qfloat8_e4m3fn": "fp8_e4m3fn", "qfloat8_e4m3fnuz": "fp8_e4m3fnuz",
    "qfloat8_e5m2": "fp8_e5m2", "none": "", "int8": "int8", "float8": "fp8_e4m3fn",
}  # fmt: skip
WIDTHS = (2, 4)


@dataclass(frozen=True, slots=True)
class Entry:
    """What the configuration says of a module.

    Args:
        weights:    "I8", a float8 element type as safetensors spells it, "U8:2", "U8:4", or "" for an unquantized weight.
        activation: input quantization (its scale unknown).
    """

    weights: str
    activation: ActivationSpec


@dataclass(slots=True)
class QuantoConfig(QuantConfig):
    """Parsed configuration of a quanto checkpoint.

    Args:
        entries: per module; None where there is no map.
        default: of every linear module that no pattern of `skipped` matches; None where a map speaks, or nothing does.
        skipped: patterns of modules that were left alone, matched at the start or the end of a name.
        source:  what the entries come from.
    """

    name: ClassVar[str] = "quanto"
    aliases: ClassVar[tuple[str, ...]] = ("optimum-quanto",)
    quantizes_embeddings: ClassVar[bool] = True

    entries: Mapping[str, Entry] | None
    default: Entry | None
    skipped: tuple[str, ...]
    source: str

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        row, static = (1, SHAPE[1]), {word: ActivationSpec(word, "tensor", dynamic=False) for word in ("int8", "fp8_e4m3fn")}
        return examples_of(
            *(BitsScheme(SHAPE, NO_ACTIVATION, bits, 128, "BF16") for bits in WIDTHS),
            BitsScheme(SHAPE, NO_ACTIVATION, 4, 128, "BF16", integer=True),
            BytesScheme(SHAPE, NO_ACTIVATION, "I8", row, "BF16"),
            BytesScheme(SHAPE, static["int8"], "I8", row, "BF16"),
            BytesScheme(SHAPE, NO_ACTIVATION, "F8_E4M3", row, "BF16"),
            BytesScheme(SHAPE, static["fp8_e4m3fn"], "F8_E4M3", row, "BF16"),
        )

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method == "quanto":
            return Detection(100, ("quant_method is 'quanto'",))
        if evidence.method is not None or evidence.quantization is not None:
            return None
        present = [name for name in MAPS if name in evidence.sidecars]
        if present:
            return Detection(80, (f"{present[0]} is there",))
        named = next((name for name in evidence.tensors if name.endswith((DATA, PACKED))), None)
        return Detection(50, (f"{named} is named as quanto names the data of a weight",)) if named else None

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        # both maps are the same one: detection has compared them
        source = next((name for name in MAPS if name in evidence.sidecars), "")
        reader = ConfigReader(evidence.quantization or {})
        reader.skip(("quant_method",))
        skipped = reader.names("modules_to_not_convert")
        for pattern in skipped:
            reader.collect(lambda pattern=pattern: compile_rule(pattern, "quantization_config.modules_to_not_convert"))  # type: ignore[misc]
        default = None
        if evidence.quantization is not None:
            default = _entry(reader, "int8")
        entries = _read_map(evidence.sidecars[source], source, reader) if source else None
        reader.finish()
        return cls(entries, None if source else default, skipped, source or "quant_method is quanto")

    def split_name(self, name: str) -> tuple[str, str]:
        for local in LOCAL_NAMES:
            if name == local or name.endswith(f".{local}"):
                return name[: -len(local) - 1], local
        return QuantConfig.split_name(self, name)

    def is_own_scale(self, name: str) -> bool:
        return name.endswith(f".{OUTPUT}")

    def is_quantized(self, module: ModuleView) -> bool:
        return any(name.startswith("weight._") for name in module.tensors)

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        if self.entries is not None:
            entry = self.entries.get(module.name)
            if entry is None:
                return False, f"{self.source} does not have it"
            self.matched_rules.add(module.name)
            return entry.weights != "", f"{self.source} has it"
        for pattern in self.skipped:
            if matches_regex(pattern, module.name) or module.name.endswith(pattern):
                self.matched_rules.add(pattern)
                return False, f"modules_to_not_convert has {pattern!r}"
        return True, self.source if self.default is not None else "its tensors are named so"

    def rules(self) -> Sequence[str]:
        return (*self.skipped, *(self.entries or ()))

    def decide(self, module: ModuleView) -> Choice:
        choice = QuantConfig.decide(self, module)
        if self.is_quantized(module) or not module.tensors.keys() & {INPUT, OUTPUT}:
            return choice
        # a wrapped module whose weight was not quantized, or not yet
        header = module.tensors.get("weight")
        dtype = header.dtype if header is not None and header.dtype in FLOAT_CODES else "F32"
        return Choice(PlainScheme(choice.scheme.shape, dtype, self._activation(module)), choice.why)

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        entry = self._entry(module)
        data = module.tensors.get(DATA)
        wanted = entry.weights if entry is not None else ""
        if PACKED in module.tensors or (data is None and wanted.startswith("U8")):
            return self._bits_scheme(module, int(wanted[3:]) if wanted.startswith("U8:") else 0, wanted)
        found = data.dtype if data is not None else "I8"
        if wanted and wanted != found and data is not None:
            raise DtypeMismatchError(f"{data.file}: {data.name}", found, f"{wanted}, by {self.source}", "correct the map, or fetch the right checkpoint")
        shape = module.shape or ((data.shape[0], data.shape[1]) if data is not None and len(data.shape) == 2 else (0, 0))
        scale = module.tensors.get(SCALE)
        n, k = (max(size, 1) for size in shape)
        # per row; along the other axis, [1, K]; and one number where that axis has one entry
        across = scale is not None and n > 1 and scale.shape == (1, k)
        cell = (n, k) if scale is not None and scale.numel == 1 else (n, 1) if across else (1, k)
        known = wanted or found
        return BytesScheme(shape, self._activation(module), known if known in WEIGHT_TYPES.values() else "I8", cell, _scale_dtype(module))

    def _bits_scheme(self, module: ModuleView, bits: int, wanted: str) -> Scheme:
        packed, scale, shift = (module.tensors.get(name) for name in (PACKED, SCALE, SHIFT))
        if wanted and not bits and packed is not None:
            raise DtypeMismatchError(f"{packed.file}: {packed.name}", "packed codes", f"{wanted}, by {self.source}", "correct the map, or fetch the right checkpoint")
        count = scale.numel if scale is not None else 0
        columns = packed.shape[1] if packed is not None and len(packed.shape) == 2 else 0
        along_rows = scale is not None and count > 1 and len(scale.shape) == 2 and scale.shape[0] == 1
        shape = module.shape
        if shape is None:
            raise ConfigError(
                f"{module.name}.weight", "packed groups, which do not show how many rows the matrix has",
                "an architecture that gives its shape", "fetch the checkpoint's config.json",
            )  # fmt: skip
        rows = shape[0] * shape[1] // columns if columns else count
        group = (rows if along_rows else columns) or (shape[0] * shape[1] // count if count else shape[1])
        if not bits and packed is not None:
            bits = next((b for b in WIDTHS if packed.shape[0] == -(-rows * b // 8)), WIDTHS[-1])
        if shape[0 if along_rows else 1] % group:
            where = f"{packed.file}: {packed.name}" if packed is not None else module.name
            raise ShapeMismatchError(where, f"groups of {group}", f"a divisor of {shape[0 if along_rows else 1]}", "correct config.json, or fetch the right checkpoint")
        integer = shift is not None and shift.dtype in INTEGER_SHIFTS
        return BitsScheme(shape, self._activation(module), bits, group, _scale_dtype(module), integer, along_rows)

    def _entry(self, module: ModuleView) -> Entry | None:
        return self.entries.get(module.name) if self.entries is not None else self.default

    def _activation(self, module: ModuleView) -> ActivationSpec:
        entry = self._entry(module)
        return NO_ACTIVATION if entry is None or module.kind is ModuleKind.EMBEDDING else entry.activation


def _scale_dtype(module: ModuleView) -> str:
    scale = module.tensors.get(SCALE)
    return scale.dtype if scale is not None and scale.dtype in FLOAT_CODES else "F32"


def _read_map(values: Mapping[str, Any], source: str, reader: ConfigReader) -> dict[str, Entry]:
    entries = {}
    for module, value in values.items():
        inner = ConfigReader(value if isinstance(value, Mapping) else {}, f"{source}: {module}")
        if not isinstance(value, Mapping):
            inner.problem("weights", repr(value)[:100], "an object {weights, activations}")
        entries[module] = _entry(inner, "none")
        reader.collect(inner.finish)
    return entries


def _entry(reader: ConfigReader, default: str) -> Entry:
    weights = reader.choice("weights", WEIGHT_TYPES, default)
    element = reader.choice("activations", ACTIVATION_TYPES, "none")
    return Entry(weights, ActivationSpec(element, "tensor", dynamic=False) if element else NO_ACTIVATION)
