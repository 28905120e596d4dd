"""The scheme of a module, from its group and its headers."""

from __future__ import annotations

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import LabelMismatchError
from bitgrain.formats.base import ModuleKind, ModuleView, Scheme
from bitgrain.formats.compressed_tensors.arguments import QuantizationArgs
from bitgrain.formats.compressed_tensors.geometry import block_shape, matrix_shape, packing_of
from bitgrain.formats.compressed_tensors.groups import Group
from bitgrain.formats.compressed_tensors.inputs import activation_spec
from bitgrain.formats.compressed_tensors.presets import PRESETS
from bitgrain.formats.compressed_tensors.schemes import IntScheme, block_float_scheme, tiled24_scheme
from bitgrain.formats.compressed_tensors.storage import PACKED_FORMAT, PLAIN_FORMATS, TILED_FORMAT
from bitgrain.formats.examples import SHAPE
from bitgrain.formats.fp8.schemes import Float8Scheme
from bitgrain.formats.stored_scales import cell_of
from bitgrain.weights import NO_ACTIVATION


def scheme_of(module: ModuleView, group: Group, args: QuantizationArgs, version: tuple[int, int] | None) -> Scheme:
    """The scheme of a module that has quantized tensors.

    Args:
        args:    those of the group's weights.
        version: (major, minor) of the library that wrote the file; None if it does not say.
    Raises:
        LabelMismatchError, ConfigError, ShapeMismatchError: the group's format cannot be what the module's tensors are in.
    """
    if group.format == "dense":
        raise LabelMismatchError(
            module.name,
            f"quantized tensors: {', '.join(sorted(module.tensors))}",
            f"a float weight, because the format of {group.name} is 'dense'",
            "correct `format`",
        )
    activation = NO_ACTIVATION if module.kind is ModuleKind.EMBEDDING else group.activation
    if group.format == TILED_FORMAT:
        return tiled24_scheme(module, args, activation)
    if args.block_scaled:
        return block_float_scheme(args, block_shape(module, args), activation)
    packed = args.type == "int" and group.format not in PLAIN_FORMATS and (group.format == PACKED_FORMAT or "weight_packed" in module.tensors)
    shape = matrix_shape(module, args, packed, version)
    cell = cell_of(args.strategy, shape, args.group_size, args.block)
    if args.type == "float":
        return Float8Scheme(shape, activation, "F8_E4M3", cell, zero_points=True)
    scale = module.tensors.get("weight_scale")
    zero = module.tensors.get("weight_zero_point")
    return IntScheme(
        shape,
        activation,
        args.num_bits,
        cell,
        args.symmetric,
        packing_of(module, args.num_bits, shape, version) if packed else "plain",
        packed and args.strategy in ("group", "channel") and (zero is None or zero.dtype == "I32"),
        scale.dtype if scale is not None and scale.dtype in FLOAT_CODES else "BF16",
        args.act_order,
        "weight_g_idx" in module.tensors,
        # the library derives scales from absolute maxima and, early releases apart, states its version; AutoRound, stating
        # none, gives the value of largest magnitude the lowest code, so that symmetric scales carry a sign
        args.symmetric and args.strategy in ("channel", "group") and not args.act_order and version is None,
    )


# Presets that differ from a shown one in nothing but the width of codes, or not at all.
_ALIKE = frozenset({"INT8", *(f"W{bits}A{inputs}" for bits in (2, 3, 5, 6, 7) for inputs in (4, 8))})


def example_schemes() -> tuple[Scheme, ...]:
    """A scheme of each kind that the format can hold, of the shape of examples; sparse storage gives the same weights."""
    per_row, static = QuantizationArgs(strategy="channel"), QuantizationArgs(symmetric=False)
    pairs = [(per_row, None), (per_row, static), *(pair for name, pair in PRESETS.items() if name not in _ALIKE)]
    return tuple(_example(weights, inputs) for weights, inputs in pairs if weights is not None)


def _example(weights: QuantizationArgs, inputs: QuantizationArgs | None) -> Scheme:
    activation = activation_spec("example", inputs)
    if weights.block_scaled:
        return block_float_scheme(weights, SHAPE, activation)
    cell = cell_of(weights.strategy, SHAPE, weights.group_size, weights.block)
    if weights.type == "float":
        return Float8Scheme(SHAPE, activation, "F8_E4M3", cell)
    return IntScheme(SHAPE, activation, weights.num_bits, cell, weights.symmetric)
