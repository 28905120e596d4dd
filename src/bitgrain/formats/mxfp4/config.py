"""Configuration of MXFP4 experts: `quant_method` mxfp4, which quantizes the stacked experts of a layer and nothing else.

    experts.{gate_up,down}_proj_blocks  uint8 [E, N, K / 32, 16], two e2m1 codes per byte, low nibble first
    experts.{gate_up,down}_proj_scales  uint8 [E, N, K / 32], E8M0
    experts.{gate_up,down}_proj_bias    [E, N]
    W[e, n, k] = e2m1(code[e, n, k]) * 2^(scale[e, n, k // 32] - 127)
Rows of gate_up_proj alternate: even ones are gate's, odd ones are up's.  Experts that a rule leaves out are dense, stored
transposed: [E, K, N].
Source: formats specification, section 7; transformers 5.19 Mxfp4Config and GptOssExperts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.checkpoint.parts import StoredPart
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.block_float import BlockFloatScheme
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.expert_stacks import BIAS, FUSED, WEIGHT, ExpertStack, Piece, divide_experts, spellings, stacked_name
from bitgrain.formats.kv_scales import kv_scales_in
from bitgrain.formats.matching import matches_wildcard_segments, split_segments
from bitgrain.weights import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

METHOD = "mxfp4"
BLOCK, BLOCK_BYTES = 32, 16
BLOCKS, SCALES = "blocks", "scales"
PIECES = spellings(WEIGHT, BIAS) | {
    "_blocks": Piece(BLOCKS, columns=(2,), tail=BLOCK_BYTES, transposed=False, needs=(SCALES,)),
    "_scales": Piece(SCALES, columns=(BLOCK,), transposed=False, needs=(BLOCKS,)),
}


@dataclass(slots=True)
class MXFP4MoEConfig(QuantConfig):
    """Parsed configuration.

    Args:
        ignored: rules that leave modules dense: dotted segments, in which * stands for any one of them.
    """

    name: ClassVar[str] = "mxfp4-moe"
    aliases: ClassVar[tuple[str, ...]] = ("gpt_oss_mxfp4", "gpt-oss-mxfp4")
    hints: ClassVar[tuple[str, ...]] = (METHOD,)

    ignored: tuple[str, ...]

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        return examples_of(_scheme(SHAPE))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method == METHOD:
            named = (evidence.quantization or {}).get("quant_method")
            where = "" if named else " in a file beside config.json"
            return Detection(100 if named else 80, (f"quant_method is {METHOD!r}{where}",))
        if evidence.method is not None or evidence.quantization is not None:
            return None
        found = next(_block_stacks(evidence.tensors), None)
        return Detection(50, (f"{found.name} is {found.describe()}, blocks of {BLOCK} codes",)) if found is not None else None

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        reader = ConfigReader(evidence.settings())
        reader.skip(("quant_method", "dequantize"))  # the second one: what a run did with the weights
        parsed = cls(reader.names("modules_to_not_convert"))
        reader.finish()
        return parsed

    def parts(self, tensors: Mapping[str, TensorHeader], experts: ExpertStack | None) -> dict[str, StoredPart]:
        return divide_experts(tensors, experts or _stack_of(tensors), PIECES)

    def is_quantized(self, module: ModuleView) -> bool:
        return BLOCKS in module.tensors or SCALES in module.tensors

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        for rule in self.ignored:
            if _literal(rule) in module.name and matches_wildcard_segments(rule, module.name):
                self.matched_rules.add(rule)
                return False, f"excluded by the rule {rule!r}"
        if module.kind is not ModuleKind.EXPERT:
            return False, f"{METHOD} quantizes experts only"
        return True, f"quant_method is {METHOD}"

    def rules(self) -> Sequence[str]:
        return self.ignored

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        if module.shape is not None:
            return _scheme(module.shape)
        codes = module.tensors.get(BLOCKS) or module.tensors[SCALES]
        rows, columns = (*codes.shape, 0, 0)[:2]
        return _scheme((rows, columns * (2 if BLOCKS in module.tensors else BLOCK)))

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        return KVCacheScheme(scales=kv_scales_in(module))


@lru_cache(maxsize=1024)
def _literal(rule: str) -> str:
    """The longest segment of a rule that has no wildcard: names without it need no closer look."""
    return max((s for s in split_segments(rule) if not any(c in s for c in "*?[")), key=len, default="")


def _scheme(shape: tuple[int, int]) -> Scheme:
    return BlockFloatScheme(shape, "fp4_e2m1", BLOCK, "e8m0", weight_name=BLOCKS, scale_name=SCALES)


def _block_stacks(tensors: Mapping[str, TensorHeader]) -> Iterator[TensorHeader]:
    """Stored tensors that are blocks of stacked experts."""
    for name, header in tensors.items():
        place = stacked_name(name)
        if place is not None and place[2] == "_blocks" and len(header.shape) == 4 and header.shape[3] == BLOCK_BYTES and header.dtype == "U8":
            yield header


def _stack_of(tensors: Mapping[str, TensorHeader]) -> ExpertStack | None:
    """The stack that the first blocks show, for an architecture that is not known; the format has one layout."""
    for header in _block_stacks(tensors):
        experts, rows, blocks, _ = header.shape
        fused = header.name.endswith(f"{FUSED}_blocks")
        hidden, size = (blocks * BLOCK, rows // 2) if fused else (rows, blocks * BLOCK)
        return ExpertStack(experts, hidden, size, transposed=True, interleaved=True)
    return None
