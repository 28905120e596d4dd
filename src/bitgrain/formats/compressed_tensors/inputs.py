"""The input quantization that a group's arguments mean."""

from __future__ import annotations

from dataclasses import replace

from bitgrain.errors import ConfigError
from bitgrain.formats.compressed_tensors.arguments import CORRECT, QuantizationArgs
from bitgrain.weights import NO_ACTIVATION, ActivationSpec

_GRANULARITIES = {"tensor": "tensor", "token": "token", "group": "group", "tensor_group": "group"}
_FLOATS = {4: "fp4_e2m1", 6: "fp6_e2m3", 8: "fp8_e4m3fn"}
# Powers of two are only derived for this size; with another the library rounds ordinary scales to whole numbers.
_POWER_GROUP = 32
_UNSUPPORTED = "this activation quantization is not supported by this version"


def activation_spec(where: str, args: QuantizationArgs | None) -> ActivationSpec:
    """The input quantization that the arguments mean; static values are read later.

    Raises:
        ConfigError: a combination for which no activation quantization is defined.
    """
    if args is None:
        return NO_ACTIVATION
    granularity = _GRANULARITIES.get(args.strategy)
    if granularity is None or args.act_order or (args.type == "int" and args.num_bits not in (4, 8)):
        needed = "int8, int4, fp8, fp6 or fp4 per tensor, token or group"
        raise ConfigError(where, f"{args.type}{args.num_bits} with strategy {args.strategy!r}", needed, _UNSUPPORTED)
    if not args.dynamic and granularity != "tensor":
        raise ConfigError(where, f"static values with strategy {args.strategy!r}", "strategy 'tensor' for static values", CORRECT)
    if args.type == "int":
        return ActivationSpec(f"int{args.num_bits}", granularity, args.group_size, args.symmetric, args.dynamic, _scale_type(where, args))
    spec = ActivationSpec(_FLOATS[args.num_bits], granularity, args.group_size, dynamic=args.dynamic, scale_type=_scale_type(where, args))
    if args.local:
        return replace(spec, second_scale="static", second_divides=True)
    return replace(spec, exponent_rule="round") if spec.scale_type == "e8m0" else spec


def _scale_type(where: str, args: QuantizationArgs) -> str:
    """ "float", "e8m0", "e4m3" or "e5m3".

    Raises:
        ConfigError: scales that are rounded in a way that is not defined here, or not said.
    """
    if not args.dynamic or args.scale_type == "float":
        return "float"
    if args.scale_type == "e5m3":
        return "e5m3"
    if not args.scale_type:
        if args.strategy == "tensor_group":
            return "e4m3"
        if args.type == "int" or args.num_bits == 8:
            return "float"
        raise ConfigError(
            f"{where}.scale_dtype", f"absent for {args.describe()}", "uint8, float8_e4m3fn or float32", "add what the producer used: it changes the numbers"
        )
    fits = args.type == "float" and args.grouped and (args.scale_type == "e4m3" or (args.scale_type == "e8m0" and args.group_size == _POWER_GROUP))
    if not fits or (args.strategy == "tensor_group" and args.scale_type != "e4m3"):
        needed = f"null, float8_e4m3fn for groups of floats, or uint8 for groups of {_POWER_GROUP}"
        raise ConfigError(f"{where}.scale_dtype", args.describe(), needed, _UNSUPPORTED)
    return args.scale_type
