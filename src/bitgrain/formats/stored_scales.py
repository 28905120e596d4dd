"""How scales, zero points and static input values are stored beside a weight, whatever the producer.

A scale covers a cell of `cell` = (rows, columns) elements: (N, K) per tensor, (1, K) per channel, (1, g) per group,
(r, c) per block.  The cells of a matrix [N, K] form a grid [ceil(N / rows), ceil(K / columns)]; edge cells may be short.
Producers disagree about the rank of small grids, so shapes are compared by count: [N], [N, 1]; [], [1], [1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError, LabelMismatchError
from bitgrain.formats.base import TensorRule, scalar_shapes
from bitgrain.formats.value_checks import fill_static, require_scale, static_value
from bitgrain.numerics.small_floats import decode_e8m0
from bitgrain.weights import ActivationSpec

E8M0_CODES = ("F8_E8M0", "U8")
ZERO_CODES = ("I8", "I16", "I32", "F8_E4M3", *FLOAT_CODES)


def cell_of(strategy: str, shape: tuple[int, int], group_size: int = 0, block: tuple[int, int] | None = None) -> tuple[int, int]:
    """Elements that share a scale under a strategy named "tensor", "channel", "group" or "block"."""
    n, k = shape
    cells = {"tensor": (max(n, 1), max(k, 1)), "channel": (1, max(k, 1)), "group": (1, group_size), "block": block or (1, 1)}
    return cells[strategy]


def grid_of(shape: tuple[int, int], cell: tuple[int, int]) -> tuple[int, int]:
    """Number of cells along N and K."""
    return (-(-shape[0] // cell[0]), -(-shape[1] // cell[1]))


def grid_shapes(grid: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    """The shapes in which producers store one number per cell."""
    rows, columns = grid
    if rows * columns == 1:
        return scalar_shapes()
    return ((rows, 1), (rows,)) if columns == 1 else (grid,)


def decode_scale(scale: Tensor) -> Tensor:
    """float32 of the same shape: 16- and 32-bit floats widened, uint8 and float8_e8m0fnu as powers of two."""
    if scale.dtype == torch.float8_e8m0fnu:
        return decode_e8m0(scale.view(torch.uint8))
    return decode_e8m0(scale) if scale.dtype == torch.uint8 else scale.float()


def checked_scale(name: str, scale: Tensor, codes: Tensor, empty: float | int = 0, *, signed: bool = False) -> Tensor:
    """`scale` itself once a quantizer can have written it; all zero only where all codes are `empty`.

    Args:
        signed: the writer may be one whose scales are negative where the lowest code stands for the largest value.
    """
    lossless = not bool(scale.any()) and bool((codes.float() == empty).all())
    return require_scale(name, scale, signed=signed, codes_are_zero=lossless)


def require_no_zero_point(name: str, tensor: Tensor | None) -> None:
    """Raise LabelMismatchError if a zero point that a symmetric scheme stores anyway is not zero."""
    if tensor is not None and bool((tensor.float() != 0).any()):
        raise LabelMismatchError(
            name,
            f"{int((tensor.float() != 0).sum())} zero points are not zero",
            "zeros, because the configuration calls the scheme symmetric",
            "correct `symmetric` in the configuration",
        )


def static_input_rules(activation: ActivationSpec, scale_name: str = "input_scale") -> tuple[TensorRule, ...]:
    """The tensors of a static input quantization; none if it is dynamic or absent."""
    if activation.is_none or activation.dynamic:
        return ()
    zero_codes = ZERO_CODES if activation.symmetric else ("I8", "I16", "I32")
    return (
        TensorRule(scale_name, FLOAT_CODES, scalar_shapes()),
        TensorRule("input_zero_point", zero_codes, scalar_shapes(), required=not activation.symmetric),
    )


def filled_activation(activation: ActivationSpec, tensors: dict[str, Tensor], scale_name: str = "input_scale") -> ActivationSpec:
    """The activation specification with the static values of the module's tensors.

    Raises:
        BadValueError:      a scale that is not above zero, or a zero point outside the codes' range.
        LabelMismatchError: a zero point that is not zero in a symmetric scheme.
    """
    if activation.is_none or activation.dynamic:
        return activation
    scale = static_value(scale_name, tensors[scale_name])
    if scale <= 0:
        raise BadValueError(
            scale_name, f"the value {scale!r}", "a scale above zero", "the file is damaged or was never calibrated; write it again"
        )
    stored = tensors.get("input_zero_point")
    if activation.symmetric or stored is None:
        require_no_zero_point("input_zero_point", stored)
        return fill_static(activation, scale)
    zero = int(static_value("input_zero_point", stored))
    half = 1 << (activation.bits - 1)
    if not -half <= zero < half:
        raise BadValueError(
            "input_zero_point", f"the value {zero}", f"a zero point in [{-half}, {half - 1}]", "the file is damaged; write it again"
        )
    return fill_static(activation, scale, zero)
