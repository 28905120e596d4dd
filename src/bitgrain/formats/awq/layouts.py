"""Which scheme a module has in each layout, sized by the architecture or else by its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bitgrain.errors import ShapeMismatchError
from bitgrain.formats.awq.schemes import BITS, PER_WORD, GemmScheme, GemvFastScheme, GemvScheme
from bitgrain.formats.base import ModuleView, Scheme
from bitgrain.formats.marlin_tiles import marlin_scheme
from bitgrain.formats.word_packed import matrix_sizes, scale_dtype_of

LOCAL_NAMES = frozenset({"qweight", "qzeros", "scales"})


@dataclass(frozen=True, slots=True)
class AwqSettings:
    """What a configuration says of one module.

    Args:
        group_size: -1 for one group per row.
        symmetric:  it promises that every zero point is 2**(bits-1).
        bits:       4, in the gemm layout up to 7.
    """

    group_size: int
    symmetric: bool
    bits: int = BITS


def _sizes(module: ModuleView, derived: tuple[int, int], group_size: int) -> tuple[tuple[int, int], int]:
    """((N, K), group size of 1 to K): the architecture's shape, or what the tensors say."""
    shape = module.shape or derived
    size = shape[1] if group_size == -1 else min(group_size, shape[1])
    return shape, max(1, size)


def gemm_scheme(module: ModuleView, settings: AwqSettings) -> GemmScheme:
    """The scheme of the gemm layout.

    Raises:
        ShapeMismatchError: the layout cannot hold the module's sizes.
    """
    weight, scales = matrix_sizes(module, "qweight"), matrix_sizes(module, "scales")
    n = scales[1] if scales else 32 * weight[1] // settings.bits if weight else 0
    shape, size = _sizes(module, (n, weight[0] if weight else 0), settings.group_size)
    # the producer writes whole groups only; a short one is believed where the architecture confirms K
    whole = module.shape is not None or shape[1] % size == 0
    run = PER_WORD if settings.bits == BITS else 32  # other widths fill whole words only every 32 columns
    needed = f"N % {run} == 0 and K % group_size == 0"
    _need_multiple(module, "gemm", shape[0] % run == 0 and whole, needed, shape, settings.group_size)
    return GemmScheme(shape, size, scale_dtype_of(module, "scales"), settings.symmetric, width=settings.bits)


def _gemv(module: ModuleView, settings: AwqSettings) -> Scheme:
    weight, scales = matrix_sizes(module, "qweight"), matrix_sizes(module, "scales")
    n = scales[0] if scales else weight[0] if weight else 0
    shape, size = _sizes(module, (n, PER_WORD * weight[1] if weight else 0), settings.group_size)
    _need_multiple(module, "gemv", shape[1] % PER_WORD == 0, "K % 8 == 0", shape, settings.group_size)
    _need_vector_groups(module, "gemv", shape, size, settings.group_size)
    return GemvScheme(shape, size, scale_dtype_of(module, "scales"), settings.symmetric)


def _gemv_fast(module: ModuleView, settings: AwqSettings) -> Scheme:
    weight, scales = matrix_sizes(module, "qweight"), matrix_sizes(module, "scales")
    n = scales[1] if scales else 4 * weight[0] if weight else 0
    shape, size = _sizes(module, (n, weight[1] if weight else 0), settings.group_size)
    _need_multiple(module, "gemv_fast", shape[0] % 4 == 0 and shape[1] % 64 == 0, "N % 4 == 0 and K % 64 == 0", shape, settings.group_size)
    _need_vector_groups(module, "gemv_fast", shape, size, settings.group_size)
    return GemvFastScheme(shape, size, scale_dtype_of(module, "scales"))


def _marlin(module: ModuleView, settings: AwqSettings) -> Scheme:
    return marlin_scheme(module, settings.group_size, "version")


BUILDERS: Mapping[str, Callable[[ModuleView, AwqSettings], Scheme]] = {
    "gemm": gemm_scheme,
    "gemv": _gemv,
    "gemv_fast": _gemv_fast,
    "marlin": _marlin,
}


def _need_multiple(module: ModuleView, layout: str, holds: bool, needed: str, shape: tuple[int, int], group_size: int) -> None:
    if not holds:
        found = f"N = {shape[0]}, K = {shape[1]}, group_size = {group_size}"
        raise ShapeMismatchError(module.full_name("qweight"), found, f"{needed} in the {layout} layout", "correct the configuration")


def _need_vector_groups(module: ModuleView, layout: str, shape: tuple[int, int], size: int, group_size: int) -> None:
    known = size >= 128 or size in (32, 64)
    _need_multiple(module, layout, known and shape[1] % size == 0, "group_size 32, 64, 128 or more that divides K", shape, group_size)


def fits(layout: str, module: ModuleView, settings: AwqSettings) -> bool:
    """Whether the module's headers are exactly those of a layout."""
    try:
        scheme = BUILDERS[layout](module, settings)
    except ShapeMismatchError:
        return False
    rules = {rule.name: rule for rule in scheme.tensors()}
    headers: dict[str, Any] = {name: module.tensors[name] for name in LOCAL_NAMES & module.tensors.keys()}
    return rules.keys() == headers.keys() and all(h.dtype in rules[n].dtypes and rules[n].allows_shape(h.shape) for n, h in headers.items())
