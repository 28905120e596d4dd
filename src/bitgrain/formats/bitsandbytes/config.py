"""The configuration of bitsandbytes checkpoints: keys, detection and rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.errors import LabelMismatchError
from bitgrain.formats.base import ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.bitsandbytes.quant_state import STATE_PREFIX, QuantState, read_state
from bitgrain.formats.bitsandbytes.schemes import STORAGE_CODES, Int8RowScheme, LookupScheme
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.matching import SegmentRules
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

LOOKUP_LOCALS = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
INT8_LOCALS = ("SCB", "weight_format")
# The tile layouts that `weight_format` may name in files of old versions; 0 is row-major.
TILES = {1: "col32", 2: "col_turing", 3: "col_ampere"}
DEFAULT_THRESHOLD = 6.0


def int8_activation(threshold: float) -> ActivationSpec:
    """The input of LLM.int8(): 127 stands for the largest magnitude of each token, columns beyond the threshold stay floats."""
    return ActivationSpec("int8", "token", top=127.0, outlier_threshold=threshold or None)


@dataclass(slots=True)
class BitsAndBytesConfig(QuantConfig):
    """Four-bit lookup codes or int8 rows, with a list of modules that were left alone.

    Args:
        bits:       4, 8, or 0 for neither; None if the configuration does not say.
        quant_type: the four-bit type that the configuration names, "" if it names none.
        threshold:  llm_int8_threshold; 0 for no outliers.
        skipped:    llm_int8_skip_modules; None if absent, which leaves the output head alone.
        int8_names: the local names of int8 modules that occur in the checkpoint.
        dense:      nothing in the checkpoint is quantized: it is to be quantized while it loads.
        read_small: reads a tensor that describes others.
    """

    name: ClassVar[str] = "bitsandbytes"
    aliases: ClassVar[tuple[str, ...]] = ("bnb",)

    bits: int | None
    quant_type: str
    threshold: float
    skipped: SegmentRules | None
    int8_names: frozenset[str]
    dense: bool
    read_small: Callable[[str], Tensor] = field(repr=False)

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        lookups = [LookupScheme(QuantState("nf4", SHAPE, block)) for block in (64, 128)]
        return examples_of(*lookups, *(Int8RowScheme(SHAPE, int8_activation(t)) for t in (DEFAULT_THRESHOLD, 0.0)))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method is not None:
            return Detection(100, (f"quant_method = {evidence.method!r}",)) if evidence.method in ("bitsandbytes", "bnb") else None
        flags = sorted({"load_in_4bit", "load_in_8bit"} & (evidence.quantization or {}).keys())
        if flags:
            return Detection(80, (f"quantization_config has {' and '.join(flags)}",))
        if evidence.quantization or evidence.sidecars:
            return None
        example = next((full for local, full in evidence.suffixes.items() if _is_own(local)), None)
        return Detection(50, (f"{example} is {evidence.tensors[example].describe()}",)) if example else None

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        reader = ConfigReader(evidence.settings())
        has_list = reader.values.get("llm_int8_skip_modules") is not None
        names = reader.names("llm_int8_skip_modules")
        config = cls(
            _read_bits(reader),
            reader.text("bnb_4bit_quant_type", default=""),
            reader.number("llm_int8_threshold", default=DEFAULT_THRESHOLD, strict=False),
            SegmentRules(dict.fromkeys(names)) if has_list else None,
            frozenset(INT8_LOCALS) & evidence.suffixes.keys(),
            not any(_is_own(local) for local in evidence.suffixes),
            evidence.read_small,
        )
        # how the producer runs and what it computes in; storage and nesting are read from the tensors themselves
        reader.skip(("quant_method", "llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant"))
        reader.skip(key for key in reader.values if key.startswith("llm_int8_enable_fp32_"))
        reader.finish()
        return config

    def split_name(self, name: str) -> tuple[str, str]:
        module, inside, rest = name.partition(".weight.")
        if inside:
            return module, f"weight.{rest}"
        module, _, local = name.rpartition(".")
        return module, local

    def is_quantized(self, module: ModuleView) -> bool:
        weight = module.tensors.get("weight")
        packed = weight is not None and (weight.dtype in ("U8", "I8") or (len(weight.shape) == 2 and weight.shape[1] == 1 < self._columns(module)))
        return packed or any(local in module.tensors for local in (*LOOKUP_LOCALS, *INT8_LOCALS)) or _state_header(module) is not None

    @staticmethod
    def _columns(module: ModuleView) -> int:
        return module.shape[1] if module.shape is not None else 1

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        present = self.is_quantized(module)
        rule = self.skipped.find(module.name) if self.skipped is not None else None
        if rule is not None:
            self.matched_rules.add(rule)
            # versions of the writer differ in what a name covers; only where all agree can tensors contradict it
            if not present or self._surely_skipped(module.name):
                return False, f"llm_int8_skip_modules has {rule!r}"
            return True, f"llm_int8_skip_modules has {rule!r}, but not for sure for this module, and its tensors are quantized"
        if self.bits == 0:
            return False, "load_in_4bit and load_in_8bit are off"
        asked = {4: "load_in_4bit", 8: "load_in_8bit", None: "its tensors"}[self.bits]
        if present:
            return True, asked
        if module.kind is ModuleKind.EMBEDDING:
            return False, "only linear modules are quantized"
        if module.kind is ModuleKind.LM_HEAD and self.skipped is None:
            return False, "without llm_int8_skip_modules the output head is left alone"
        if self.dense:
            return False, f"{asked}, but the checkpoint is dense: it was meant to be quantized while it loads, and runs as stored"
        return False, f"{asked}, but its tensors are dense"

    def _surely_skipped(self, name: str) -> bool:
        """The whole name, its beginning or its last segment is on the list: what every version leaves alone."""
        patterns = set(self.skipped.patterns) if self.skipped is not None else set()
        segments = name.split(".")
        return segments[-1] in patterns or any(".".join(segments[:i]) in patterns for i in range(1, len(segments) + 1))

    def rules(self) -> Sequence[str]:
        return self.skipped.patterns if self.skipped is not None else ()

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        """The scheme of a module.

        Raises:
            ConfigError, LabelMismatchError: the stored state is damaged, or contradicts the configuration; a tile layout.
        """
        state, weight = _state_header(module), module.tensors.get("weight")
        is_lookup = state is not None or any(local in module.tensors for local in LOOKUP_LOCALS)
        is_int8 = not is_lookup and (any(local in module.tensors for local in INT8_LOCALS) or (weight is not None and weight.dtype == "I8"))
        if is_int8 or (not is_lookup and self.bits == 8):
            return self._int8_scheme(module)
        self._check_bits(module, 4, state)
        found = self._state(module, state)
        storage = weight.dtype if weight is not None and weight.dtype in STORAGE_CODES else "U8"
        return LookupScheme(found, storage)

    def _state(self, module: ModuleView, header: TensorHeader | None) -> QuantState:
        if header is None:
            # the plan names the tensor that is missing; what it would say is taken from elsewhere
            nested = 256 if "weight.nested_absmax" in module.tensors else 0
            return QuantState(self.quant_type or "nf4", module.shape or (1, 1), nested_block=nested)
        quant_type = header.name.rpartition("bitsandbytes__")[2]
        where = f"{header.file}: {header.name}"
        if self.quant_type not in ("", quant_type) and self.bits != 8 and not self.trust_tensors:
            raise LabelMismatchError(
                where, f"the state of a {quant_type!r} matrix", f"{self.quant_type!r}, which bnb_4bit_quant_type says",
                "correct the configuration, or believe the tensors with trust_tensors=True (--trust-tensors)",
            )  # fmt: skip
        return read_state(where, self.read_small(header.name), quant_type)

    def _int8_scheme(self, module: ModuleView) -> Int8RowScheme:
        self._check_bits(module, 8, module.tensors.get("SCB"))
        weight, layout = module.tensors.get("weight"), module.tensors.get("weight_format")
        if layout is not None and layout.numel == 1 and layout.dtype == "U8":
            found = int(self.read_small(layout.name).reshape(-1)[0])
            if found != 0:
                raise LabelMismatchError(
                    f"{layout.file}: {layout.name}", f"{found}, {TILES.get(found, 'an unknown layout')}", "0, row-major",
                    "tiles of old versions are not supported: load it with its writer and save it again",
                )  # fmt: skip
        shape = module.shape or ((weight.shape[0], weight.shape[1]) if weight is not None and len(weight.shape) == 2 else (1, 1))
        activation = NO_ACTIVATION if module.kind is ModuleKind.EMBEDDING else int8_activation(self.threshold)
        return Int8RowScheme(shape, activation, "weight_format" in self.int8_names)

    def _check_bits(self, module: ModuleView, bits: int, example: TensorHeader | None) -> None:
        """Raise LabelMismatchError if the configuration asks for the other kind."""
        if self.bits in (None, 0, bits) or self.trust_tensors:
            return
        shown = example or next(iter(module.tensors.values()))
        raise LabelMismatchError(
            f"{shown.file}: {shown.name}", f"a tensor of {bits}-bit modules", f"{self.bits}-bit modules, as load_in_{self.bits}bit says",
            "correct the configuration, or believe the tensors with trust_tensors=True (--trust-tensors)",
        )  # fmt: skip


def _is_own(last_name: str) -> bool:
    """Whether only this format has tensors whose names end so."""
    return last_name == "SCB" or last_name.startswith("bitsandbytes__")


def _state_header(module: ModuleView) -> TensorHeader | None:
    return next((header for local, header in module.tensors.items() if local.startswith(STATE_PREFIX)), None)


def _read_bits(reader: ConfigReader) -> int | None:
    """4, 8, 0 where both flags are off, None where there is neither."""
    four, eight = reader.flag("load_in_4bit", "_load_in_4bit"), reader.flag("load_in_8bit", "_load_in_8bit")
    if four and eight:
        reader.problem("load_in_4bit", "true, and so is load_in_8bit", "one of them")
    if four is None and eight is None:
        return None
    return 4 if four else 8 if eight else 0
