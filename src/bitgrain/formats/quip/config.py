"""Configuration of QuIP# checkpoints: the section `quip_params` of config.json.

    codebook        E8P12 (2 bits), E8P12RVQ3B (3) or E8P12RVQ4B (4)
    codesz, packsz, pack_out, idx_dtype, codebook_version   fixed by the codebook
    rescale_WH      inputs are divided by scaleWH
    resid_scale_override   replaces the residual's divisor if above zero
    lora_rank, rank must be 0: the writer dropped low-rank corrections
The writer stores q, k and v of a layer as one module qkv_proj, and up and gate as upgate_proj, in that order: their outputs
went through one Hadamard transform, so they stay one module.
Source: formats specification, section 4.2; QuIP# (commit 1d8f873) quantize_llama and model/llama.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import TYPE_CHECKING, ClassVar

from bitgrain.errors import ConfigError, ShapeMismatchError
from bitgrain.formats.base import ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import FETCH, ConfigReader, words
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.incoherence import require_transform
from bitgrain.formats.quip.schemes import CODEBOOKS, COLUMNS, ROWS, Codebook, QuipScheme
from bitgrain.formats.quip_params import SECTION, decision, quip_params, read_skip_list, speaks_of_trellises
from bitgrain.weights import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

# How the checkpoint was made, or is run by its writer.
SKIPPED_KEYS = words("model_version train_mode fused")
UNSUPPORTED = "this storage is not supported; only what QuIP# writes today is"


@dataclass(slots=True)
class QuipConfig(QuantConfig):
    """Parsed configuration of a QuIP# checkpoint.

    Args:
        divisor:  of the residual's points.
        rescaled: inputs are divided by scaleWH first.
        skipped:  rules that leave modules dense.
    """

    name: ClassVar[str] = "quip"
    aliases: ClassVar[tuple[str, ...]] = ("quip#", "quipsharp", "quip-sharp")

    codebook: Codebook
    divisor: float
    rescaled: bool
    skipped: tuple[str, ...]

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        return examples_of(*(QuipScheme(SHAPE, book, book.divisor) for book in CODEBOOKS.values()))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        params = quip_params(evidence)
        if params is not None:
            return None if speaks_of_trellises(params) else Detection(100, (f"config.json has {SECTION} with a codebook",))
        example = evidence.suffixes.get("Qidxs")
        if evidence.method is not None or evidence.quantization is not None or example is None:
            return None
        return Detection(50, (f"{example} is named as QuIP# names its codes",))

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        params = quip_params(evidence)
        if params is None:
            raise ConfigError(f"config.json: {SECTION}", "absent", "the codebook and its settings beside tensors called Qidxs", FETCH)
        reader = ConfigReader(params, SECTION)
        reader.skip(SKIPPED_KEYS)
        if params.get("codebook") is None:
            reader.problem("codebook", "absent", f"one of {', '.join(CODEBOOKS)}", FETCH)
        book = reader.choice("codebook", CODEBOOKS, "e8p12")
        override = reader.number("resid_scale_override", default=-1.0, minimum=float("-inf"))
        _check_storage(reader, book)
        parsed = cls(book, override if override > 0 else book.divisor, bool(reader.flag("rescale_WH")), read_skip_list(reader))
        reader.finish()
        return parsed

    def is_quantized(self, module: ModuleView) -> bool:
        return any(name in module.tensors for name in ("Qidxs", "SU", "SV", "codebook_id"))

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        return decision(self.skipped, module, self.matched_rules)

    def rules(self) -> Sequence[str]:
        return self.skipped

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        n, k = shape = module.shape or _stored_shape(module, self.codebook.bits)
        if n % ROWS or k % COLUMNS:
            raise ShapeMismatchError(module.full_name("Qidxs"), f"a matrix [{n}, {k}]", f"N a multiple of {ROWS} and K of {COLUMNS}", "correct config.json, or fetch the right checkpoint")
        if n and k:
            require_transform(module.full_name("Qidxs"), n, k)
        joint = bool(module.heights) or (module.shape is None and "fuse_scales" in module.tensors)
        return QuipScheme(shape, self.codebook, self.divisor, self.rescaled, joint, module.heights)

    def joint_module(self, modules: Sequence[str]) -> tuple[str, tuple[int, ...]] | None:
        prefix = modules[0].rpartition(".")[0]
        joined = {("q_proj", "k_proj", "v_proj"): ("qkv_proj", (0, 1, 2)), ("gate_proj", "up_proj"): ("upgate_proj", (1, 0))}
        found = joined.get(tuple(name.rpartition(".")[2] for name in modules))
        return None if found is None else (f"{prefix}.{found[0]}" if prefix else found[0], found[1])


def _stored_shape(module: ModuleView, bits: int) -> tuple[int, int]:
    """(N, K) by the codes, or else by the lengths of SV and SU."""
    codes = module.tensors.get("Qidxs")
    if codes is not None and len(codes.shape) == 2:
        return codes.shape[0], codes.shape[1] * 64 // bits
    sizes: Mapping[str, int] = {name: header.shape[0] for name, header in module.tensors.items() if len(header.shape) == 1}
    return sizes.get("SV", 0), sizes.get("SU", 0)


def _check_storage(reader: ConfigReader, book: Codebook) -> None:
    """Problems for settings that the writer derives from the codebook, where they say otherwise; and for low-rank corrections."""
    packed = 8 / book.bits
    reader.need("codesz", lambda v: v == 8, "8 columns per code", UNSUPPORTED)
    reader.need("packsz", lambda v: isinstance(v, (int, float)) and isclose(v, packed), f"{packed:g} codes per word", UNSUPPORTED)
    reader.need("pack_out", lambda v: v is False, "false: codes are packed along K", UNSUPPORTED)
    reader.need("idx_dtype", lambda v: str(v).removeprefix("torch.") == "int64", "torch.int64", UNSUPPORTED)
    version = reader.integer("codebook_version", default=0)
    if version != book.version:
        reader.problem("codebook_version", str(version), f"{book.version}: other versions store codes in another order", "fetch the checkpoint that its writer published for the present version")
    for key in ("lora_rank", "rank"):
        reader.need(key, lambda v: v == 0 and not isinstance(v, bool), "0: low-rank corrections were dropped by the writer", UNSUPPORTED)
