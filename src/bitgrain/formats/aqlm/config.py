"""Configuration of AQLM checkpoints: `quant_method` aqlm.

    in_group_size, out_group_size   columns and rows of a codebook entry (8 and 1 where absent)
    num_codebooks                   entries that are added up (1)
    nbits_per_codebook              bits of a code (16)
    linear_weights_not_to_quantize  full names of the weights that stay dense; some writers list every dense tensor, norms too
Every other linear module of the model is quantized.  The codebooks' shape repeats all four numbers.
Source: formats specification, section 4.1; transformers 5.19 AqlmConfig; AQLM's convert_to_hf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bitgrain.checkpoint.headers import TORCH_DTYPES
from bitgrain.errors import ShapeMismatchError
from bitgrain.formats.aqlm.schemes import AqlmScheme, Books
from bitgrain.formats.base import ModuleKind, ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.matching import SegmentRules
from bitgrain.weights import ActivationSpec, WeightSpec
from bitgrain.weights.additive import MAX_CODE_BITS

if TYPE_CHECKING:
    from typing_extensions import Self

TENSORS = ("codes", "codebooks", "scales")
RULES = "linear_weights_not_to_quantize"
# The first published checkpoints keep their settings under this key of config.json.
FIRST_SECTION = "aqlm"


@dataclass(slots=True)
class AqlmConfig(QuantConfig):
    """Parsed configuration of an AQLM checkpoint.

    Args:
        books:   sizes of the codebooks, equal in all modules.
        dense:   rules that leave modules dense, by module name.
        written: the rules as the configuration spells them, by module name; those that name no module of matrices left out.
    """

    name: ClassVar[str] = "aqlm"

    books: Books
    dense: SegmentRules
    written: Mapping[str, str]

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        books = (Books(1, 16, (1, 8)), Books(2, 8, (1, 8)), Books(4, 8, (2, 8)))
        return examples_of(*(AqlmScheme(SHAPE, book) for book in books))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method == "aqlm":
            named = (evidence.quantization or {}).get("quant_method")
            return Detection(100 if named else 80, ("quant_method is 'aqlm'" + ("" if named else " in a file beside config.json"),))
        if evidence.method is not None or evidence.quantization is not None:
            return None
        if isinstance(evidence.config.get(FIRST_SECTION), Mapping):
            return Detection(100, (f"config.json has a section {FIRST_SECTION!r}",))
        found = _codebooks_in(evidence)
        return None if found is None else Detection(50, (f"{found[0]} has four dimensions and codes and scales beside it",))

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        first = evidence.config.get(FIRST_SECTION)
        settings = evidence.settings() or (dict(first) if isinstance(first, Mapping) else _settings_of(evidence))
        reader = ConfigReader(settings)
        reader.skip(("quant_method",))
        rules = reader.names(RULES)
        books = Books(
            reader.integer("num_codebooks", default=1, minimum=1),
            reader.integer("nbits_per_codebook", default=16, allowed=range(1, MAX_CODE_BITS + 1)),
            (reader.integer("out_group_size", default=1, minimum=1), reader.integer("in_group_size", default=8, minimum=1)),
        )
        reader.finish()
        modules = {rule.removesuffix(".weight"): rule for rule in rules}
        vectors = {rule for rule in rules if rule in evidence.tensors and len(evidence.tensors[rule].shape) < 2}
        return cls(books, SegmentRules(modules), {module: rule for module, rule in modules.items() if rule not in vectors})

    def is_quantized(self, module: ModuleView) -> bool:
        return any(name in module.tensors for name in TENSORS)

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        if module.kind is ModuleKind.EMBEDDING:
            found = self.dense.find(module.name)
            self.matched_rules.update({self.written.get(found, "")} if found else ())
            return False, "embeddings are not quantized"
        rule = self.dense.find(module.name)
        if rule is None:
            return True, "quant_method is aqlm, and every linear module is quantized"
        written = self.written.get(rule, rule)
        self.matched_rules.add(written)
        return False, f"excluded by {RULES} {written!r}"

    def rules(self) -> Sequence[str]:
        return tuple(self.written.values())

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        h, g = self.books.block
        n, k = shape = module.shape or self._stored_shape(module)
        if n % h or k % g:
            found = f"a matrix [{n}, {k}]"
            needed = f"N a multiple of out_group_size {h} and K of in_group_size {g}"
            raise ShapeMismatchError(module.full_name("codes"), found, needed, "correct the configuration, or fetch the right checkpoint")
        scales = module.tensors.get("scales")
        dtype = TORCH_DTYPES.get(scales.dtype if scales is not None else "F16")
        return AqlmScheme(shape, self.books, str(dtype).removeprefix("torch."))

    def _stored_shape(self, module: ModuleView) -> tuple[int, int]:
        """(N, K) by the scales' rows and the codes' columns; sizes of 0 where they are missing."""
        codes, scales = module.tensors.get("codes"), module.tensors.get("scales")
        rows = scales.shape[0] if scales is not None and scales.shape else 0
        if codes is None or len(codes.shape) != 3:
            return rows * self.books.block[0], 0
        rows = rows or codes.shape[0]
        exchanged = codes.shape[0] != rows and codes.shape[1] == rows
        return rows * self.books.block[0], codes.shape[0 if exchanged else 1] * self.books.block[1]


def _codebooks_in(evidence: Evidence) -> tuple[str, tuple[int, ...]] | None:
    """(name, shape) of codebooks with codes and scales beside them."""
    name = evidence.suffixes.get("codebooks", "")
    module, shape = name.removesuffix("codebooks"), evidence.tensors[name].shape if name else ()
    return (name, shape) if len(shape) == 4 and all(module + local in evidence.tensors for local in TENSORS) else None


def _settings_of(evidence: Evidence) -> dict[str, Any]:
    """The settings as the shape of some module's codebooks gives them; empty if there are none."""
    found = _codebooks_in(evidence)
    if found is None:
        return {}
    count, entries, h, g = found[1]
    return {"num_codebooks": count, "nbits_per_codebook": max(entries - 1, 0).bit_length(), "out_group_size": h, "in_group_size": g}
