"""Quantization arguments of a compressed-tensors configuration: parsing, defaults, presets, activation specifications.

Source: compressed-tensors 0.17 quantization/quant_args.py and quant_scheme.py (keys, defaults and presets, written anew).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitgrain.errors import BitgrainError, ConfigError, UnknownFormatError
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.weights import NO_ACTIVATION, ActivationSpec

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
# What `actorder` says about stored tensors: only the first three come with a group index.
ACTIVATION_ORDERS = {"group": True, "dynamic": True, "true": True, "weight": False, "static": False, "false": False, "none": False}
_DYNAMIC = "true or false; partly dynamic quantization belongs to fp4, which is not supported by this version"
LATER = "this format is not supported by this version; use a checkpoint with int or fp8 weights, or a later release"


@dataclass(frozen=True, slots=True)
class QuantizationArgs:
    """How one tensor is quantized.

    Args:
        type:      "int" or "float".
        strategy:  one of STRATEGIES, inferred from group_size where the configuration leaves it out.
        block:     (rows, columns) for "block".
        dynamic:   parameters are computed from each input.
        act_order: columns look their group up in a stored index.
    """

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int = 0
    block: tuple[int, int] | None = None
    dynamic: bool = False
    act_order: bool = False


def parse_arguments(where: str, data: Any) -> QuantizationArgs:
    """The arguments that a configuration object gives.

    Args:
        where: the object's place, e.g. "quantization_config.config_groups.group_0.weights".
    Raises:
        ConfigError: unknown keys, impossible values; all of them at once.
        UnknownFormatError: element types that this version does not read (fp4, mx).
    """
    if not isinstance(data, Mapping):
        raise ConfigError(where, repr(data), "an object of quantization arguments, or null", "correct the configuration")
    reader = ConfigReader(data, where)
    reader.skip(("scale_dtype", "zp_dtype", "observer", "observer_kwargs"))
    bits = reader.integer("num_bits", allowed=range(1, 9), default=8)
    kind = reader.choice("type", {"int": "int", "float": "float"}, "int")
    _refuse_small_floats(where, data, kind, bits)
    group = reader.integer("group_size", allowed=range(-1, (1 << 30) + 1), default=0)
    inferred = "group" if group > 0 else "channel" if group == -1 else "tensor"
    args = QuantizationArgs(
        bits,
        kind,
        reader.flag("symmetric") is not False,
        reader.choice("strategy", {s: s for s in STRATEGIES}, inferred),
        max(group, 0),
        reader.block("block_structure"),
        reader.flag("dynamic", needed=_DYNAMIC) is True,
        reader.choice("actorder", ACTIVATION_ORDERS, "none"),
    )
    reader.problems += _impossible(where, args)
    reader.finish()
    return args


def _refuse_small_floats(where: str, data: Mapping[str, Any], kind: str, bits: int) -> None:
    """Raise for element types that other releases bring: fp4 and fp6, and power-of-two block scales."""
    scale = str(data.get("scale_dtype") or "").removeprefix("torch.")
    if kind == "float" and (bits != 8 or scale in ("uint8", "float8_e8m0fnu") or str(data.get("strategy")).lower() == "tensor_group"):
        family = "nvfp4" if str(data.get("strategy")).lower() == "tensor_group" else f"mxfp{bits}"
        raise UnknownFormatError(
            f"{where}.num_bits" if bits != 8 else where,
            f"{bits}-bit floats, strategy {data.get('strategy')!r}, scale_dtype {data.get('scale_dtype')!r}: {family}",
            "8-bit floats with float scales, or integers",
            LATER,
        )


def _impossible(where: str, args: QuantizationArgs) -> list[BitgrainError]:
    """Combinations that no producer writes or that have no meaning."""
    rules = (
        (args.strategy == "group" and args.group_size <= 0, "group_size", "a group_size above zero for strategy 'group'"),
        (args.strategy != "group" and args.group_size > 0, "group_size", f"null or -1 for strategy {args.strategy!r}"),
        (args.strategy == "block" and args.block is None, "block_structure", "[rows, columns] for strategy 'block'"),
        (args.strategy != "block" and args.block is not None, "block_structure", f"null for strategy {args.strategy!r}"),
        (args.strategy == "token" and not args.dynamic, "strategy", "dynamic: true for strategy 'token'"),
        (args.act_order and args.strategy != "group", "actorder", "strategy 'group' for an activation order of groups"),
        (args.type == "float" and not args.symmetric, "symmetric", "true for type 'float'"),
    )
    found = (
        f"strategy {args.strategy!r}, group_size {args.group_size}, block {args.block}, dynamic {args.dynamic}, symmetric {args.symmetric}"
    )
    return [ConfigError(f"{where}.{key}", found, needed, "correct the configuration") for wrong, key, needed in rules if wrong]


def check_weight_arguments(where: str, args: QuantizationArgs) -> None:
    """Raise ConfigError unless a stored weight can be quantized so."""
    if args.dynamic or args.strategy not in ("tensor", "channel", "group", "block"):
        raise ConfigError(
            where,
            f"strategy {args.strategy!r}, dynamic {args.dynamic}",
            "static tensor, channel, group or block quantization of a weight",
            "correct the configuration",
        )


def activation_spec(where: str, args: QuantizationArgs | None) -> ActivationSpec:
    """The input quantization that the arguments mean; static values are read later.

    Raises:
        ConfigError: a combination for which no activation quantization is defined.
    """
    if args is None:
        return NO_ACTIVATION
    granularity = {"tensor": "tensor", "token": "token", "group": "group"}.get(args.strategy)
    if granularity is None or args.act_order or (args.type == "int" and args.num_bits not in (4, 8)):
        raise ConfigError(
            where,
            f"{args.type}{args.num_bits} with strategy {args.strategy!r}",
            "int8, int4 or fp8 per tensor, token or group",
            "this activation quantization is not supported by this version",
        )
    if not args.dynamic and granularity != "tensor":
        raise ConfigError(
            where, f"static values with strategy {args.strategy!r}", "strategy 'tensor' for static values", "correct the configuration"
        )
    element = "fp8_e4m3fn" if args.type == "float" else f"int{args.num_bits}"
    return ActivationSpec(element, granularity, args.group_size, args.symmetric, args.dynamic)


def _args(bits: int, kind: str, strategy: str, group: int = 0, symmetric: bool = True, dynamic: bool = False) -> QuantizationArgs:
    return QuantizationArgs(bits, kind, symmetric, strategy, group, (128, 128) if strategy == "block" else None, dynamic)


_INT8_TOKEN = _args(8, "int", "token", dynamic=True)
_FP8_TOKEN = _args(8, "float", "token", dynamic=True)

# Preset name to (weights, input_activations).
PRESETS: dict[str, tuple[QuantizationArgs | None, QuantizationArgs | None]] = {
    "UNQUANTIZED": (None, None),
    "W8A16": (_args(8, "int", "group", 128), None),
    "W4A16": (_args(4, "int", "group", 128), None),
    "W4A16_ASYM": (_args(4, "int", "group", 128, symmetric=False), None),
    "W8A8": (_args(8, "int", "channel"), _INT8_TOKEN),
    "INT8": (_args(8, "int", "channel"), _INT8_TOKEN),
    "W4A8": (_args(4, "int", "group", 128), _INT8_TOKEN),
    "W4AFP8": (_args(4, "int", "group", 128), _FP8_TOKEN),
    "FP8": (_args(8, "float", "tensor"), _args(8, "float", "tensor")),
    "FP8_DYNAMIC": (_args(8, "float", "channel"), _FP8_TOKEN),
    "FP8_BLOCK": (_args(8, "float", "block"), _args(8, "float", "group", 128, dynamic=True)),
}
LATER_PRESETS = ("NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP6", "MXFP6A16", "MXFP8", "MXFP8A16")
