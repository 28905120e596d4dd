"""The matrix that a module's headers make, and how its codes are packed."""

from __future__ import annotations

from math import ceil

from bitgrain.errors import ConfigError
from bitgrain.formats.base import ModuleView
from bitgrain.formats.compressed_tensors.arguments import QuantizationArgs
from bitgrain.formats.compressed_tensors.schemes import packed_words

# From this version on, packed codes of 3, 5, 6 and 7 bits cross words.
DENSE_SINCE = (0, 18)


def matrix_shape(module: ModuleView, args: QuantizationArgs, packed: bool, version: tuple[int, int] | None) -> tuple[int, int]:
    """(N, K) that the architecture gives, else that the tensors give; (0, 0) if they cannot.

    Where two tensors give different sizes, either may be taken: the comparison of headers then finds the other.
    """
    if module.shape is not None:
        return module.shape
    weight = module.tensors.get("weight_packed" if packed else "weight")
    scale = module.tensors.get("weight_scale")
    if not packed and weight is not None and len(weight.shape) == 2:
        return (weight.shape[0], weight.shape[1])
    rows = next((h.shape[0] for h in (weight, scale) if h is not None and len(h.shape) == 2), 0)
    index = module.tensors.get("weight_g_idx")
    if index is not None and len(index.shape) == 1:
        return (rows, index.shape[0])
    groups = scale.shape[1] if scale is not None and len(scale.shape) == 2 else 0
    by_scale = groups * args.group_size if args.strategy == "group" else 0
    words = weight.shape[1] if weight is not None and len(weight.shape) == 2 else 0
    if groups > 1 and by_scale:
        return (rows, by_scale)
    per_word = 32 // args.num_bits if version is not None and version < DENSE_SINCE else 32 / args.num_bits
    least, most = int((words - 1) * per_word) + 1, int(words * per_word)
    if groups == 1 and by_scale and (by_scale <= most or not words):
        return (rows, by_scale)
    return (rows, _roundest(least, most) if words else 0)


def block_shape(module: ModuleView, args: QuantizationArgs) -> tuple[int, int]:
    """The same for small floats with block scales, which take exactly bits / 8 bytes each."""
    if module.shape is not None:
        return module.shape
    codes = module.tensors.get("weight_packed" if args.num_bits < 8 else "weight")
    if codes is not None and len(codes.shape) == 2:
        return (codes.shape[0], 8 * codes.shape[1] // args.num_bits)
    scale = module.tensors.get("weight_scale")
    return (scale.shape[0], scale.shape[1] * args.group_size) if scale is not None and len(scale.shape) == 2 else (0, 0)


def _roundest(least: int, most: int) -> int:
    """The number in [least, most] that the largest power of two divides; the stored weight_shape confirms or refutes it."""
    step = 1 << most.bit_length()
    while most - most % step < least:
        step >>= 1
    return most - most % step


def packing_of(module: ModuleView, bits: int, shape: tuple[int, int], version: tuple[int, int] | None) -> str:
    """ "dense" or "padded": what the sizes of the packed tensors say, and where they say nothing, the version.

    Raises:
        ConfigError: neither decides.
    """
    if 32 % bits == 0:
        return "dense"
    fits = {"dense", "padded"}
    for name, dim, count in (("weight_packed", 1, shape[1]), ("weight_zero_point", 0, shape[0])):
        header = module.tensors.get(name)
        if header is not None and header.dtype == "I32" and len(header.shape) == 2:
            allowed = {p for p in fits if packed_words(count, bits, p) == header.shape[dim]}
            fits = allowed or fits
    if len(fits) == 1:
        return fits.pop()
    if version is not None:
        return "dense" if version >= DENSE_SINCE else "padded"
    if max(ceil(size * bits / 32) for size in shape) <= 1:
        return "dense"  # codes of one word never cross
    raise ConfigError(
        f"{module.name}.weight_packed",
        f"a size that both ways of packing {bits}-bit codes give, and no version",
        "`version` in quantization_config",
        "add the version of compressed-tensors that wrote the file",
    )
