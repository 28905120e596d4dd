"""Quantization arguments of a compressed-tensors configuration: parsing, defaults, and what can be true of a tensor.

Source: compressed-tensors 0.17 to 0.20 quantization/quant_args.py and quant_scheme.py (keys and defaults, written anew).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitgrain.errors import BitgrainError, ConfigError, raise_all
from bitgrain.formats.config_reader import ConfigReader

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
# What `actorder` says about stored tensors: only the first three come with a group index.
ACTIVATION_ORDERS = {"group": True, "dynamic": True, "true": True, "weight": False, "static": False, "false": False, "none": False}
# (all parameters, block scales only) are computed from each input.
DYNAMIC = {"true": (True, False), "false": (False, False), "local": (True, True)}
# The type of stored or computed scales: powers of two, small floats, or ordinary floats.
_SCALE_TYPES = {"uint8": "e8m0", "float8_e8m0fnu": "e8m0", "float8_e4m3fn": "e4m3", "float32": "float", "bfloat16": "bfloat16", "float16": "float16"}
SCALE_TYPES = {"": "", **_SCALE_TYPES, **{f"torch.{name}": kind for name, kind in _SCALE_TYPES.items()}}
CORRECT = "correct the configuration"


@dataclass(frozen=True, slots=True)
class QuantizationArgs:
    """How one tensor is quantized.

    Args:
        type:       "int" or "float".
        strategy:   one of STRATEGIES, inferred from group_size where the configuration leaves it out.
        block:      (rows, columns) for "block".
        dynamic:    parameters are computed from each input.
        act_order:  columns look their group up in a stored index.
        local:      of dynamic parameters only the block scales are; the second scale is stored.
        scale_type: "e8m0", "e4m3", "e5m3", "float", "bfloat16", "float16", or "" where the configuration leaves it to the format.
    """

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int = 0
    block: tuple[int, int] | None = None
    dynamic: bool = False
    act_order: bool = False
    local: bool = False
    scale_type: str = ""

    @property
    def grouped(self) -> bool:
        return self.strategy in ("group", "tensor_group")

    @property
    def second_scaled(self) -> bool:
        """A second scale for the whole matrix stands above the block scales."""
        return self.strategy == "tensor_group" and self.scale_type == "e4m3"

    @property
    def block_scaled(self) -> bool:
        """Scales take one byte each, as the MX formats and NVFP4 have them."""
        return self.type == "float" and self.scale_type in ("e8m0", "e4m3", "e5m3")

    def describe(self) -> str:
        group = f" of {self.group_size}" if self.group_size else ""
        return f"{self.num_bits}-bit {self.type}s, strategy {self.strategy!r}{group}, scales {self.scale_type or 'of no stated type'}"


def parse_arguments(where: str, data: Any) -> QuantizationArgs:
    """The arguments that a configuration object gives.

    Args:
        where: the object's place, e.g. "quantization_config.config_groups.group_0.weights".
    Raises:
        ConfigError: unknown keys, impossible values; all of them at once.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(where, repr(data), "an object of quantization arguments, or null", CORRECT)
    reader = ConfigReader(data, where)
    reader.skip(("zp_dtype", "observer", "observer_kwargs"))
    group = reader.integer("group_size", allowed=range(-1, (1 << 30) + 1), default=0)
    inferred = "group" if group > 0 else "channel" if group == -1 else "tensor"
    dynamic, local = reader.choice("dynamic", DYNAMIC, "false")
    args = QuantizationArgs(
        reader.integer("num_bits", allowed=range(1, 9), default=8),
        reader.choice("type", {"int": "int", "float": "float"}, "int"),
        reader.flag("symmetric") is not False,
        reader.choice("strategy", {s: s for s in STRATEGIES}, inferred),
        max(group, 0),
        reader.block("block_structure"),
        dynamic,
        reader.choice("actorder", ACTIVATION_ORDERS, "none"),
        local,
        reader.choice("scale_dtype", SCALE_TYPES, ""),
    )
    reader.problems += _impossible(where, args)
    reader.finish()
    return args


def _impossible(where: str, args: QuantizationArgs) -> list[BitgrainError]:
    """Combinations that no producer writes or that have no meaning."""
    small = args.type == "float" and args.num_bits == 4
    rules = (
        (args.grouped and args.group_size <= 0, "group_size", f"a group_size above zero for strategy {args.strategy!r}"),
        (not args.grouped and args.group_size > 0, "group_size", f"null or -1 for strategy {args.strategy!r}"),
        (args.strategy == "block" and args.block is None, "block_structure", "[rows, columns] for strategy 'block'"),
        (args.strategy != "block" and args.block is not None, "block_structure", f"null for strategy {args.strategy!r}"),
        (args.strategy == "token" and not args.dynamic, "strategy", "dynamic: true for strategy 'token'"),
        (args.act_order and args.strategy != "group", "actorder", "strategy 'group' for an activation order of groups"),
        (args.type == "float" and not args.symmetric, "symmetric", "true for type 'float'"),
        (args.type == "float" and args.num_bits not in (4, 6, 8), "num_bits", "4, 6 or 8 for type 'float'"),
        (args.strategy == "tensor_group" and not small, "strategy", "floats of 4 bits for strategy 'tensor_group'"),
        (args.local and args.strategy != "tensor_group", "dynamic", "true or false; 'local' belongs to strategy 'tensor_group'"),
    )
    found = (
        f"{args.describe()}, block {args.block}, dynamic {'local' if args.local else args.dynamic}, symmetric {args.symmetric}"
    )
    return [ConfigError(f"{where}.{key}", found, needed, CORRECT) for wrong, key, needed in rules if wrong]


def check_weight_arguments(where: str, args: QuantizationArgs) -> None:
    """Raise ConfigError unless a stored weight can be quantized so.

    Args:
        args: with the type of the scales, as storage.completed gives it.
    """
    if args.dynamic or args.strategy not in ("tensor", "channel", "group", "block", "tensor_group"):
        raise ConfigError(
            where, f"strategy {args.strategy!r}, dynamic {args.dynamic}", "static tensor, channel, group or block quantization of a weight", CORRECT
        )
    if args.type != "float":
        return
    rules = (
        (args.num_bits < 8 and not (args.grouped and args.block_scaled), "num_bits", "groups and scales of one byte for floats of 4 and 6 bits"),
        (args.num_bits > 4 and args.scale_type == "e4m3", "scale_dtype", "uint8 for block scales of floats of 6 and 8 bits"),
        (args.strategy == "tensor_group" and args.scale_type not in ("e4m3", "e5m3"), "scale_dtype", "float8_e4m3fn for strategy 'tensor_group'"),
        (args.block_scaled and not args.grouped, "scale_dtype", "strategy 'group' for scales of one byte"),
    )
    raise_all(where, [ConfigError(f"{where}.{key}", args.describe(), needed, CORRECT) for wrong, key, needed in rules if wrong])
