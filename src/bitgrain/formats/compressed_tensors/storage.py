"""The storage formats: which quantization each holds, and what they leave unsaid about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bitgrain.errors import ConfigError, UnknownFormatError
from bitgrain.formats.compressed_tensors.arguments import QuantizationArgs

# Formats that store one value per element in `weight`; the names differ by history, the tensors do not.
PLAIN_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
# Formats of small floats: (bits, type of the block scales).
BLOCK_FORMATS = {
    "nvfp4-pack-quantized": (4, "e4m3"),
    "nvfp4-e5m3-pack-quantized": (4, "e5m3"),  # AutoRound's: scales of more range, and no second scale anywhere
    "mxfp4-pack-quantized": (4, "e8m0"),
    "mxfp6-pack-quantized": (6, "e8m0"),
    "mxfp8-quantized": (8, "e8m0"),
}
PACKED_FORMAT, TILED_FORMAT = "pack-quantized", "marlin-24"
FORMATS = ("dense", *PLAIN_FORMATS, PACKED_FORMAT, *BLOCK_FORMATS, TILED_FORMAT, "mixed-precision")
# What `sparsity_config` may name; "dense" stores zeros like other numbers.
SPARSE_FORMATS = ("sparse-24-bitmask", "sparse-bitmask")


def parse_format(where: str, value: Any) -> str:
    """A storage format's name; "" where every group speaks for itself.

    Raises:
        UnknownFormatError: one that this version does not read.
    """
    name = "" if value is None else str(value).lower()
    if name and name not in FORMATS:
        needed = f"one of {', '.join(FORMATS)}"
        if name in SPARSE_FORMATS:
            needed += f"; {name} belongs under sparsity_config.format"
        raise UnknownFormatError(where, repr(value), needed, "correct the configuration, or update bitgrain if the writer is newer")
    return "" if name == "mixed-precision" else name


def completed(args: QuantizationArgs, storage: str) -> QuantizationArgs:
    """The arguments of a weight with the type of its scales, which early releases leave to the format.

    Args:
        storage: the format's name; "" where nothing names one, so that the group size decides: 32 is MX, 16 NVFP4.
    """
    if args.type != "float" or args.scale_type:
        return args
    if storage in BLOCK_FORMATS:
        return replace(args, scale_type=BLOCK_FORMATS[storage][1])
    if args.num_bits == 8 or not args.grouped:
        return args
    return replace(args, scale_type="e8m0" if args.strategy == "group" and args.group_size == 32 else "e4m3")


def completed_inputs(args: QuantizationArgs, storage: str) -> QuantizationArgs:
    """The same of an input: block scales that need no second scale do without it, whatever `dynamic` says."""
    if args.strategy == "tensor_group" and BLOCK_FORMATS.get(storage, (0, ""))[1] == "e5m3":
        return replace(args, scale_type="e5m3", local=False)
    return args


def check_storage(where: str, args: QuantizationArgs, storage: str) -> None:
    """Raise ConfigError if the format cannot hold a weight that is quantized so.

    Args:
        args: as `completed` gives them.
    """
    needed = ""
    if storage in BLOCK_FORMATS:
        bits, scale = BLOCK_FORMATS[storage]
        if not args.block_scaled or (args.num_bits, args.scale_type) != (bits, scale):
            needed = f"floats of {bits} bits in groups with {scale} scales"
    elif storage in (*PLAIN_FORMATS, PACKED_FORMAT) and args.block_scaled:
        needed = "integers, or floats of 8 bits with float scales"
    elif storage == TILED_FORMAT and not _fits_tiles(args):
        needed = "symmetric integers of 4 or 8 bits per channel or group, in their natural order"
    if needed:
        raise ConfigError(where, args.describe(), f"{needed}, which is what the format {storage!r} holds", "correct the arguments, or the format")


def _fits_tiles(args: QuantizationArgs) -> bool:
    return args.type == "int" and args.num_bits in (4, 8) and args.symmetric and args.strategy in ("channel", "group") and not args.act_order
