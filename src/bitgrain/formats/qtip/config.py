"""Configuration of QTIP checkpoints: the section `quip_params` of config.json, with the settings of a trellis.

    L, K, V       bits of a window, bits per weight, weights per window
    K_v_proj      K of modules called v_proj, where it differs
    decode_mode   lut, quantlut, quantlut_sym (tables of 2^tlut_bits rows), 1mad, 2mad, 3inst (computed)
    td_x, td_y    tile, 16 x 16
    split_for_tp  transforms work in blocks
Source: formats specification, section 4.3; QTIP (commit e90c668) quantize_llama and model/llama.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bitgrain.errors import ConfigError, ShapeMismatchError
from bitgrain.formats.base import ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import FETCH, ConfigReader, words
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.incoherence import require_transform
from bitgrain.formats.qtip.schemes import QtipScheme, Trellis
from bitgrain.formats.quip_params import SECTION, decision, quip_params, read_skip_list, speaks_of_trellises
from bitgrain.numerics.trellis_codes import COMPUTED, MAX_WINDOW, TABLED
from bitgrain.weights import ActivationSpec, WeightSpec
from bitgrain.weights.trellis import TILE

if TYPE_CHECKING:
    from typing_extensions import Self

# The writer's name for its codebook, and whether it once fused modules; tp_rank is a tensor's name, too.
SKIPPED_KEYS = words("codebook codebook_version fused tp_rank model_version train_mode")
DECODERS = (*TABLED, *COMPUTED)
# The largest table that a decoder can index.
LARGEST_TABLE = {"quantlut": 16, "quantlut_sym": 15}


@dataclass(slots=True)
class QtipConfig(QuantConfig):
    """Parsed configuration of a QTIP checkpoint.

    Args:
        bits:   per weight.
        v_bits: per weight of modules called v_proj.
        split:  split_for_tp; None where it is not said.
        skipped: rules that leave modules dense.
    """

    name: ClassVar[str] = "qtip"
    aliases: ClassVar[tuple[str, ...]] = ()

    trellis: Trellis
    bits: int
    v_bits: int
    split: bool | None
    skipped: tuple[str, ...]

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        kinds = [(Trellis(16, 2, "quantlut_sym", 9), bits) for bits in (2, 3, 4)]
        kinds += [(Trellis(16, 1, decoder, 0), 2) for decoder in COMPUTED] + [(Trellis(16, 1, "quantlut", 9), 2), (Trellis(10, 2, "lut", 10), 2)]
        return examples_of(*(QtipScheme(SHAPE, trellis, bits) for trellis, bits in kinds))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        params = quip_params(evidence)
        if params is not None:
            return Detection(100, (f"config.json has {SECTION} with the settings of a trellis",)) if speaks_of_trellises(params) else None
        example = next((name for name in evidence.tensors if _is_trellis(name, evidence)), None)
        if evidence.method is not None or evidence.quantization is not None or example is None:
            return None
        return Detection(50, (f"{example} is named and stored as QTIP's codes",))

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        params = quip_params(evidence)
        if params is None:
            raise ConfigError(f"config.json: {SECTION}", "absent", "the settings of the trellis beside tensors called trellis and SU", FETCH)
        reader = ConfigReader(params, SECTION)
        reader.skip(SKIPPED_KEYS)
        for key in ("td_x", "td_y"):
            reader.integer(key, allowed=(TILE,), default=TILE)
        bits = reader.integer("K", allowed=range(1, 9))
        parsed = cls(
            _trellis(reader),
            bits,
            reader.integer("K_v_proj", allowed=range(1, 9), default=bits),
            reader.flag("split_for_tp"),
            read_skip_list(reader),
        )
        settings = parsed.trellis
        if not reader.problems and max(parsed.bits, parsed.v_bits) * settings.step > settings.window:
            reader.problem("L", str(settings.window), f"at least K V = {max(parsed.bits, parsed.v_bits) * settings.step}, or windows leave bits out")
        reader.finish()
        return parsed

    def is_quantized(self, module: ModuleView) -> bool:
        return any(name in module.tensors for name in ("trellis", "SU", "SV", "tlut", "rcp"))

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        return decision(self.skipped, module, self.matched_rules)

    def rules(self) -> Sequence[str]:
        return self.skipped

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        n, k = shape = module.shape or _stored_shape(module)
        bits = self.v_bits if module.name.rpartition(".")[2] == "v_proj" else self.bits
        tile = 2 * TILE if self.trellis.written_for_kernel(bits) else TILE
        if n % tile or k % tile:
            raise ShapeMismatchError(module.full_name("trellis"), f"a matrix [{n}, {k}]" + ("" if module.shape else ", by the lengths of SV and SU"), f"N and K multiples of {tile}", "correct config.json, or fetch the right checkpoint")
        if n and k:
            require_transform(module.full_name("trellis"), n, k)
        sliced = self.split is not None or "rcp" in module.tensors or "tp_rank" in module.tensors
        return QtipScheme(shape, self.trellis, bits, self.split, sliced)


def _is_trellis(name: str, evidence: Evidence) -> bool:
    module, _, local = name.rpartition(".")
    beside = {other: evidence.tensors.get(f"{module}.{other}" if module else other) for other in ("SU", "SV")}
    return local == "trellis" and len(evidence.tensors[name].shape) == 2 and all(beside.values())


def _stored_shape(module: ModuleView) -> tuple[int, int]:
    """(N, K) by the lengths of SV and SU."""
    sizes: Mapping[str, int] = {name: header.shape[0] for name, header in module.tensors.items() if len(header.shape) == 1}
    return sizes.get("SV", 0), sizes.get("SU", 0)


def _trellis(reader: ConfigReader) -> Trellis:
    """The settings of the codes."""
    window = reader.integer("L", allowed=range(1, MAX_WINDOW + 1))
    step = reader.integer("V", allowed=(1, 2, 4))
    if reader.values.get("decode_mode") is None:
        reader.problem("decode_mode", "absent", f"one of {', '.join(DECODERS)}", FETCH)
    decoder = reader.choice("decode_mode", {name: name for name in DECODERS}, "3inst")
    size = reader.integer("tlut_bits", minimum=0, default=0)
    if decoder in COMPUTED:
        if step != 1:
            reader.problem("V", str(step), f"1: {decoder} computes one weight per window")
        return Trellis(window, step, decoder, 0)
    largest = LARGEST_TABLE.get(decoder, window)
    if size > largest or (decoder == "lut" and size != window) or size < 1:
        reader.problem("tlut_bits", str(size), f"L, which is {window}" if decoder == "lut" else f"1 to {largest}")
    return Trellis(window, step, decoder, size)
