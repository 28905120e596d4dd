"""Unquantized checkpoints: claimed only where nothing looks quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import ConfigError, RuleMismatchError
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import DenseScheme, ModuleView, QuantConfig, Scheme
from bitgrain.formats.config_reader import words
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.examples import SHAPE, examples_of
from bitgrain.formats.kv_scales import kv_scales_in
from bitgrain.weights import ActivationSpec, WeightSpec

if TYPE_CHECKING:
    from typing_extensions import Self

# Last parts of tensor names that only quantizers write.
QUANTIZED_NAMES = words(
    "qweight qzeros g_idx weight_packed weight_scale weight_scale_inv weight_scale_2 weight_global_scale weight_zero_point"
    " weight_g_idx weight_shape input_scale input_global_scale W_q SCB weight_format absmax quant_map nested_absmax"
    " nested_quant_map bitsandbytes__nf4 bitsandbytes__fp4 _data _scale _weight_qdata _weight_scale bitmask compressed"
    " scale_packed codes codebooks Qidxs Qidxs_list trellis deq_scale quant_bias weight_offset pre_quant_scale"
)
QUANTIZED_ENDINGS = ("_blocks", "_scales", "_scale_inv")
QUANTIZED_CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "I8", "U8", "I16", "I32")


def looks_quantized(local: str, dtype: str) -> bool:
    """Whether a tensor of this last name and element type is one that only a quantizer writes."""
    if local in QUANTIZED_NAMES or local.endswith(QUANTIZED_ENDINGS):
        return True
    return local == "weight" and dtype in QUANTIZED_CODES


def _quantized_tensors(evidence: Evidence) -> list[str]:
    found = (name for name, header in evidence.tensors.items() if looks_quantized(name.rpartition(".")[2], header.dtype))
    return sorted(found)


@dataclass(slots=True)
class UnquantizedConfig(QuantConfig):
    """The absence of a quantization configuration."""

    name: ClassVar[str] = "unquantized"
    holds_plain_weights: ClassVar[bool] = True
    aliases: ClassVar[tuple[str, ...]] = ("none", "dense", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32")

    @classmethod
    def examples(cls) -> tuple[tuple[str, WeightSpec, ActivationSpec], ...]:
        return examples_of(DenseScheme(SHAPE, "BF16"))

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method is not None or evidence.quantization or _quantized_tensors(evidence):
            return None
        return Detection(1, ("no quantization section, and no tensor looks quantized",))

    @classmethod
    def parse(cls, evidence: Evidence) -> Self:
        if evidence.quantization:
            raise ConfigError(
                "quantization_config",
                f"a section with the keys {sorted(evidence.quantization)}",
                "none for an unquantized checkpoint",
                "choose the format that wrote it",
            )
        found = _quantized_tensors(evidence)
        if found:
            raise ConfigError(
                found[0],
                f"{len(found)} tensors look quantized, and no configuration says how",
                "a quantization_config",
                "fetch the checkpoint's configuration files",
            )
        return cls()

    def is_quantized(self, module: ModuleView) -> bool:
        return any(looks_quantized(local, header.dtype) for local, header in module.tensors.items())

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        return False, "the checkpoint has no quantization configuration"

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        shown = ", ".join(f"{name} {header.describe()}" for name, header in sorted(module.tensors.items()))
        raise RuleMismatchError(
            module.name,
            f"quantized tensors without a configuration: {shown}",
            f"a weight in {', '.join(FLOAT_CODES)}",
            "fetch the checkpoint's configuration files",
        )

    def get_kv_cache_scheme(self, module: ModuleView) -> KVCacheScheme:
        return KVCacheScheme(scales=kv_scales_in(module))
