"""The scheme of one module by its algorithm, its tensors' shapes and the architecture's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bitgrain.checkpoint.headers import FLOAT_CODES, TensorHeader
from bitgrain.formats.base import ModuleKind, ModuleView, Scheme
from bitgrain.formats.block_float import BlockFloatScheme
from bitgrain.formats.fp8.schemes import Float8Scheme
from bitgrain.formats.modelopt.algorithms import ALGORITHMS, E2M1, FP8, Algorithm
from bitgrain.formats.modelopt.schemes import DOWN, UP, BlockFloat8Scheme, IntegerScheme, ScaledInputScheme
from bitgrain.formats.modelopt.settings import Recipe
from bitgrain.formats.stored_scales import cell_of, grid_of
from bitgrain.weights import NO_ACTIVATION, ActivationSpec

# A quantizer below the module, under which language models' exports keep the low-rank factors.
SUBMODULE = "weight_quantizer"
QUANTIZED_WEIGHTS = ("F8_E4M3", "F8_E5M2", "I8", "U8")
QUANTIZED_NAMES = frozenset(
    {"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", DOWN, UP, f"{SUBMODULE}._{DOWN}", f"{SUBMODULE}._{UP}"}
)
# Storage to (element, type of block scales).
BLOCK_FLOATS = {"fp4_e4m3": (E2M1, "e4m3"), "fp4_e8m0": (E2M1, "e8m0"), "fp8_e8m0": (FP8, "e8m0")}
_GROUPS = (128, 64, 32, 16, 256, 512)


def make_scheme(module: ModuleView, name: str, recipe: Recipe, must_scale: bool) -> Scheme:
    """The scheme of a module under the algorithm called `name`.

    Args:
        recipe:     its group size.
        must_scale: other modules of its kind store a pre_quant_scale, so that this one has to.
    """
    algorithm = ALGORITHMS[name]
    shape = module.shape or _shape_of(module, algorithm)
    group = _group_of(algorithm, recipe.group, shape)
    activation = _activation_of(module, algorithm, group)
    inner = _stored_scheme(module, algorithm, shape, group, activation)
    prefix = f"{SUBMODULE}._" if f"{SUBMODULE}._{DOWN}" in module.tensors or f"{SUBMODULE}._{UP}" in module.tensors else ""
    rank = _rank_of(module, prefix) if algorithm.low_rank else 0
    scaled = algorithm.scaled and module.kind is not ModuleKind.EMBEDDING and (must_scale or "pre_quant_scale" in module.tensors)
    return ScaledInputScheme(shape, activation, inner, scaled, rank, prefix) if scaled or rank else inner


def _stored_scheme(module: ModuleView, algorithm: Algorithm, shape: tuple[int, int], group: int, activation: ActivationSpec) -> Scheme:
    if algorithm.storage == "float8":
        kind = BlockFloat8Scheme if algorithm.strategy == "block" else Float8Scheme
        scale = module.tensors.get("weight_scale")
        # experts that are stored together have one scale each even where other modules have one per channel
        of_expert = module.kind is ModuleKind.EXPERT and scale is not None and scale.shape == ()
        strategy = "tensor" if of_expert else algorithm.strategy
        return kind(shape, activation, "F8_E4M3", cell_of(strategy, shape, block=(group, group)))
    if algorithm.storage in ("int8", "int4"):
        scale = module.tensors.get("weight_scale")
        stored = scale.dtype if scale is not None and scale.dtype in FLOAT_CODES else "F32"
        return IntegerScheme(shape, activation, 8 if algorithm.storage == "int8" else 4, group, algorithm.second, stored)
    element, scale_type = BLOCK_FLOATS[algorithm.storage]
    return BlockFloatScheme(shape, element, group, scale_type, activation, second_name="weight_scale_2" if algorithm.second else "")


def _shape_of(module: ModuleView, algorithm: Algorithm) -> tuple[int, int]:
    """(N, K) that the stored codes make; (0, 0) where they make none."""
    weight = module.tensors.get("weight")
    return matrix_of(weight, algorithm) if weight is not None and len(weight.shape) == 2 else (0, 0)


def common_group(name: str, tensors: Mapping[str, TensorHeader]) -> int:
    """The group or block size that all scales of a checkpoint fit, where its configuration states none; else the usual one.

    Args:
        name:    the algorithm of all modules.
        tensors: every tensor by full name.
    """
    algorithm = ALGORITHMS[name]
    if algorithm.strategy not in ("group", "block"):
        return 0
    pairs = [(weight, tensors.get(f"{full}_scale")) for full, weight in tensors.items() if full.endswith(".weight")]
    stored = [
        (matrix_of(weight, algorithm), tuple(size for size in scale.shape if size != 1))
        for weight, scale in pairs
        if scale is not None and len(weight.shape) == 2
    ]
    whole_rows = (-1,) if algorithm.storage == "int4" else ()
    candidates: tuple[int, ...] = (algorithm.group, *_GROUPS, *whole_rows)
    for size in candidates:
        rows = size if algorithm.strategy == "block" else 1
        cells = [(shape, (rows, size if size > 0 else max(shape[1], 1))) for shape, _ in stored]
        if all(tuple(n for n in grid_of(*cell) if n != 1) == scale for cell, (_, scale) in zip(cells, stored, strict=True)):
            return size
    return algorithm.group


def matrix_of(weight: TensorHeader, algorithm: Algorithm) -> tuple[int, int]:
    """(N, K) that stored two-dimensional codes make."""
    rows, columns = weight.shape
    if algorithm.storage == "int4":
        return (2 * rows, columns)
    return (rows, 2 * columns if algorithm.storage in ("fp4_e4m3", "fp4_e8m0") else columns)


def _group_of(algorithm: Algorithm, stated: int, shape: tuple[int, int]) -> int:
    """Columns per scale (of a block, rows too): as stated, else as the algorithm usually has them."""
    if algorithm.strategy not in ("group", "block") or stated < 0:
        return max(shape[1], 1)
    return stated or algorithm.group


def _activation_of(module: ModuleView, algorithm: Algorithm, group: int) -> ActivationSpec:
    """The input quantization of the module; an embedding's input is no matrix."""
    if module.kind is ModuleKind.EMBEDDING:
        return NO_ACTIVATION
    if algorithm.dynamic_activation is not None and "input_scale" not in module.tensors:
        return algorithm.dynamic_activation
    activation = algorithm.activation
    return replace(activation, group_size=group) if activation.granularity == "group" else activation


def _rank_of(module: ModuleView, prefix: str) -> int:
    """The rank of the correction, of either factor that is there; 1 if neither is, so that both are found missing."""
    down, up = module.tensors.get(prefix + DOWN), module.tensors.get(prefix + UP)
    if down is not None and len(down.shape) == 2:
        return max(down.shape[0], 1)
    return max(up.shape[1], 1) if up is not None and len(up.shape) == 2 else 1
