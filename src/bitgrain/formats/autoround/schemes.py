"""From a module's settings to the scheme of its tensors, in the layouts that the packing formats have.

    int      GPTQ's words (qweight, qzeros, scales), zero points minus one or as they are, or AWQ's gemm layout
    fp8      weight, and weight_scale ([N], one number, or [N * G] for groups of K) or weight_scale_inv (blocks); all multiply
    mx_fp    weight_packed (4 bits) or weight (8), weight_scale E8M0
    mx_int   weight_packed: a sign and three bits of quarters, the even element in the low nibble; weight_scale E8M0
    nv_fp    weight_packed, weight_scale E4M3, weight_global_scale and input_global_scale, which divide
    nv_e5m3  weight_packed, weight_scale E5M3
Source: auto-round 0.16.1 export_to_autoround and auto_round_extension; formats specification, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bitgrain.formats.autoround.inputs import FP4, FP8, INPUT_GLOBAL_SCALE, INT4, activation_of
from bitgrain.formats.autoround.settings import ModuleSettings
from bitgrain.formats.awq.layouts import AwqSettings, gemm_scheme
from bitgrain.formats.awq.schemes import GemmScheme
from bitgrain.formats.base import ModuleKind, ModuleView, Scheme, TensorRule
from bitgrain.formats.block_float import BlockFloatScheme
from bitgrain.formats.fp8.schemes import Float8Scheme
from bitgrain.formats.gptq.schemes import GptqScheme, GptqSettings, gptq_scheme
from bitgrain.formats.stored_scales import cell_of, grid_of
from bitgrain.weights import NO_ACTIVATION

# How integer codes are packed.
MINUS_ONE, AS_STORED, INTERLEAVED = "gptq", "gptq_v2", "awq"
LOCAL_NAMES = frozenset(
    {
        "qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_scale_inv", "weight_global_scale",
        "input_scale", INPUT_GLOBAL_SCALE,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FlatGroupScheme(Float8Scheme):
    """Float8Scheme whose scales of groups of K are stored in one row, [N * G], group by group."""

    def tensors(self) -> tuple[TensorRule, ...]:
        rows, columns = grid_of(self.shape, self.cell)
        flat = ((rows * columns,),)
        return tuple(replace(rule, shapes=flat) if rule.name == self.scale_name else rule for rule in Float8Scheme.tensors(self))


def scheme_of(module: ModuleView, settings: ModuleSettings, packing: str, label: str) -> Scheme:
    """The scheme of a quantized module.

    Args:
        packing: of integer codes, MINUS_ONE, AS_STORED or INTERLEAVED.
        label:   the packing format as written, for messages.
    Raises:
        ShapeMismatchError: the layout cannot hold the module's sizes.
    """
    activation = NO_ACTIVATION
    if module.kind is not ModuleKind.EMBEDDING:
        activation = activation_of(settings, INPUT_GLOBAL_SCALE in module.tensors)
    if settings.kind == "int":
        return replace(_integer(module, settings, packing, label), activation=activation)
    if settings.kind in ("fp8", "fp8_e5m2"):
        return replace(_float8(module, settings), activation=activation)
    return replace(_block_float(module, settings), activation=activation, input_name=INPUT_GLOBAL_SCALE)


def _integer(module: ModuleView, settings: ModuleSettings, packing: str, label: str) -> GptqScheme | GemmScheme:
    if packing == INTERLEAVED:
        return gemm_scheme(module, AwqSettings(settings.group_size, settings.symmetric, settings.bits))
    words = GptqSettings(
        settings.bits, settings.group_size, settings.symmetric, reordered=False, minus_one=packing == MINUS_ONE, label=f"packing_format {label!r}"
    )
    return gptq_scheme(module, words)


def _float8(module: ModuleView, settings: ModuleSettings) -> Float8Scheme:
    weight = module.tensors.get("weight")
    shape = module.shape or ((weight.shape[0], weight.shape[1]) if weight is not None and len(weight.shape) == 2 else (0, 0))
    scale_name = "weight_scale" if settings.block is None else "weight_scale_inv"
    stored = module.tensors.get(scale_name)
    dtype = "F8_E5M2" if settings.kind == "fp8_e5m2" else "F8_E4M3"
    if settings.block is None and settings.group_size > 0:
        cell = (1, max(1, min(settings.group_size, shape[1])))
        return FlatGroupScheme(shape, NO_ACTIVATION, dtype, cell, scale_name, weigh_direction=True)
    strategy = "block" if settings.block is not None else "channel" if settings.group_size == -1 else "tensor"
    if strategy == "channel" and stored is not None and stored.numel == 1:
        strategy = "tensor"
    return Float8Scheme(shape, NO_ACTIVATION, dtype, cell_of(strategy, shape, block=settings.block), scale_name, weigh_direction=True)


def _block_float(module: ModuleView, settings: ModuleSettings) -> BlockFloatScheme:
    name, element, per_byte = ("weight", FP8, 1) if settings.bits == 8 else ("weight_packed", FP4, 2)
    weight = module.tensors.get(name)
    stored = (weight.shape[0], per_byte * weight.shape[1]) if weight is not None and len(weight.shape) == 2 else (0, 0)
    scheme = BlockFloatScheme(module.shape or stored, element, settings.group_size, "e8m0", weight_name=name)
    if settings.kind == "mx_int":
        return replace(scheme, element=INT4)
    if settings.kind == "nv_e5m3":
        return replace(scheme, scale_type="e5m3")
    if settings.kind == "nv_fp":
        return replace(scheme, scale_type="e4m3", second_name="weight_global_scale", second_divides=True)
    return scheme
