"""The settings of one module: what the configuration says at its top, and what an entry of `extra_config` changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bitgrain.formats.config_reader import ConfigReader

# data_type, as written, to the kind of number; the width stands in `bits`.
KINDS = {
    "int": "int", "int_sym": "int", "int_asym": "int",
    "fp": "fp8", "fp8": "fp8", "fp8_sym": "fp8", "fp8_e4m3": "fp8", "block_fp8": "fp8", "block_fp8_sym": "fp8",
    "fp8_e5m2": "fp8_e5m2",
    "mx_fp": "mx_fp", "mx_fp_rceil": "mx_fp", "mx_fp4": "mx_fp", "mx_fp4e2m1": "mx_fp", "mx_fp8": "mx_fp", "mx_fp8e4m3": "mx_fp",
    "mx_int": "mx_int", "mx_int4": "mx_int",
    "nv_fp": "nv_fp", "nv_fp4": "nv_fp", "nv_fp4_with_static_gs": "nv_fp",
    "nvfp4_v2": "nv_e5m3",
}  # fmt: skip
# Inputs may also be quantized to the six-bit MX types, which no packing stores.
ACTIVATION_KINDS = {**KINDS, "mx_fp4_rceil": "mx_fp", "mx_fp8_rceil": "mx_fp", "mx_fp6": "mx_fp", "mx_fp6e2m3": "mx_fp", "mx_fp6e3m2": "mx_fp"}
DENSE_TYPES = ("float", "float16", "float32", "bfloat16", "bf16", "fp16", "fp32")
WIDTHS = {
    "int": (2, 3, 4, 5, 6, 7, 8), "fp8": (8,), "fp8_e5m2": (8,), "mx_fp": (4, 8), "mx_int": (4,), "nv_fp": (4,), "nv_e5m3": (4,),
}  # fmt: skip
ACTIVATION_WIDTHS = {**WIDTHS, "int": (4, 8), "mx_fp": (4, 6, 8)}
# Scales of these kinds cover as many columns, whatever else could be written.
BLOCKS = {"mx_fp": (32,), "mx_int": (32,), "nv_fp": (16,), "nv_e5m3": (16, 32)}
DENSE_BITS = 16


@dataclass(frozen=True, slots=True)
class ModuleSettings:
    """How one module is quantized.

    Args:
        bits:       16 or more: the module is dense.
        kind:       of the weight's numbers, a value of KINDS.
        group_size: columns per scale; -1 for one per row, 0 for one per tensor.
        block:      (rows, columns) per scale; None if scales are not two-dimensional.
        symmetric:  the zero point is 2**(bits-1) everywhere.
        input_bits, input_kind, input_type, input_group, input_symmetric, input_dynamic: the same of the input; `input_type`
                    is the word as written, which also says how an exponent or a second scale comes about.
    """

    bits: int = 4
    kind: str = "int"
    group_size: int = 128
    block: tuple[int, int] | None = None
    symmetric: bool = True
    input_bits: int = DENSE_BITS
    input_kind: str = "int"
    input_type: str = "int"
    input_group: int = -1
    input_symmetric: bool = True
    input_dynamic: bool = True

    @property
    def is_dense(self) -> bool:
        return self.bits >= DENSE_BITS

    @property
    def quantizes_input(self) -> bool:
        return self.input_bits < DENSE_BITS


def read_settings(reader: ConfigReader, inherited: ModuleSettings | None = None) -> ModuleSettings:
    """The settings that a section states, over those that it inherits.

    Args:
        reader:    of the configuration's top, or of one entry of extra_config; problems go to it.
        inherited: None at the top, where `bits` and `group_size` are needed.
    """
    base = inherited or ModuleSettings()
    bits = reader.integer("bits", default=None if inherited is None else base.bits, minimum=1)
    written = reader.text("data_type", default="")
    kind = base.kind
    if written in DENSE_TYPES and bits < DENSE_BITS:
        reader.problem("data_type", f"{written!r} with {bits} bits", f"{DENSE_BITS} bits or more, or a type of quantized numbers")
    elif written and written not in DENSE_TYPES:
        kind = _kind(reader, "data_type", written, KINDS)
    block, group_size = _read_group(reader, base if inherited is not None else None)
    stated = reader.flag("sym")
    settings = replace(
        base, bits=bits, kind=kind, group_size=group_size, block=block, symmetric=base.symmetric if stated is None else stated
    )
    settings = _read_input(reader, settings, unstated=settings.kind if inherited is None else "")
    if bits and not settings.is_dense:
        _check_weight(reader, settings)
    return settings


def _kind(reader: ConfigReader, key: str, written: str, kinds: Mapping[str, str]) -> str:
    if written not in kinds:
        reader.problem(key, repr(written), f"one of {', '.join(kinds)}", "this version does not know these numbers; quantize the model in another type")
    return kinds.get(written, "int")


def _read_group(reader: ConfigReader, inherited: ModuleSettings | None) -> tuple[tuple[int, int] | None, int]:
    """(block, group size): `group_size` is a number, or a list of two for scales of blocks."""
    value = reader.values.get("group_size")
    if isinstance(value, (list, tuple)):
        return reader.block("group_size"), 0
    if value is None and inherited is not None:
        return inherited.block, inherited.group_size
    return None, reader.integer("group_size", default=128, allowed=range(-1, 1 << 31))


def _read_input(reader: ConfigReader, settings: ModuleSettings, unstated: str) -> ModuleSettings:
    """The settings with those of the input; `unstated`: its kind where nothing says it, "" to inherit it."""
    bits = reader.integer("act_bits", default=settings.input_bits, minimum=1)
    written = reader.text("act_data_type", default="")
    # the writer's own fallback: groups as wide as those of the weight
    usual = settings.input_group if not unstated else settings.group_size if settings.block is None else settings.block[1]
    group = reader.integer("act_group_size", default=usual, allowed=range(-1, 1 << 31))
    symmetric, dynamic = reader.flag("act_sym"), reader.flag("act_dynamic")
    settings = replace(
        settings,
        input_bits=bits,
        input_group=group,
        input_symmetric=settings.input_symmetric if symmetric is None else symmetric,
        input_dynamic=settings.input_dynamic if dynamic is None else dynamic,
    )
    if not settings.quantizes_input:
        return settings
    if written:
        settings = replace(settings, input_kind=_kind(reader, "act_data_type", written, ACTIVATION_KINDS), input_type=written)
    elif unstated:
        settings = replace(settings, input_kind=unstated, input_type=unstated)
    if bits not in ACTIVATION_WIDTHS[settings.input_kind]:
        allowed = ", ".join(map(str, ACTIVATION_WIDTHS[settings.input_kind]))
        reader.problem("act_bits", f"{bits} with act_data_type {settings.input_type!r}", f"{allowed}, or {DENSE_BITS} for inputs that are not quantized")
    _check_input(reader, settings)
    return settings


def _check_weight(reader: ConfigReader, settings: ModuleSettings) -> None:
    """Note a width, a group size or a symmetry that the kind of number cannot have."""
    kind = settings.kind
    if settings.bits not in WIDTHS[kind]:
        reader.problem("bits", f"{settings.bits} with data_type of kind {kind!r}", f"one of {', '.join(map(str, WIDTHS[kind]))}, or {DENSE_BITS} for a dense module")
    if kind in BLOCKS and (settings.block is not None or settings.group_size not in BLOCKS[kind]):
        found = list(settings.block) if settings.block is not None else settings.group_size
        reader.problem("group_size", repr(found), f"{' or '.join(map(str, BLOCKS[kind]))} for {kind!r}")
    if kind == "int" and (settings.block is not None or settings.group_size == 0):
        found = list(settings.block) if settings.block is not None else settings.group_size
        reader.problem("group_size", repr(found), "a size above 0, or -1 for one group per row: no packing of integers stores other scales")
    if kind != "int" and not settings.symmetric:
        reader.problem("sym", "false", f"true: numbers of kind {kind!r} have no zero point")


def _check_input(reader: ConfigReader, settings: ModuleSettings) -> None:
    kind = settings.input_kind
    if kind in BLOCKS and settings.input_group not in BLOCKS[kind]:
        reader.problem("act_group_size", repr(settings.input_group), f"{' or '.join(map(str, BLOCKS[kind]))} for {settings.input_type!r}")
    if not settings.input_dynamic and (kind not in ("fp8", "fp8_e5m2") or settings.input_group != 0):
        found = f"false with act_data_type {settings.input_type!r} and act_group_size {settings.input_group}"
        reader.problem("act_dynamic", found, "true, or FP8 inputs with act_group_size 0: one stored scale per module")
    if kind != "int" and not settings.input_symmetric:
        reader.problem("act_sym", "false", f"true: inputs of type {settings.input_type!r} have no zero point")


def read_entry(settings: ConfigReader, place: str, entry: object, base: ModuleSettings) -> ModuleSettings | None:
    """One entry of extra_config over the settings at the top; problems go to `settings`."""
    if not isinstance(entry, dict):
        settings.problem(place, f"a {type(entry).__name__}", "an object of settings")
        return None
    stated: dict[str, Any] = {key: value for key, value in entry.items() if value is not None}
    reader = ConfigReader(stated, settings.place(place))
    read = read_settings(reader, base)
    for key in ("super_bits", "super_group_size", "rotation_config"):
        reader.need(key, lambda v: not v, "null: no packing stores what it needs", "quantize the model without it")
    reader.skip({"scale_dtype", "in_blocks", "fixed_by_user"})
    settings.collect(reader.finish)
    return read
