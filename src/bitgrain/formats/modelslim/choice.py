"""From a module's type string and headers to its scheme.  How codes are packed is decided by shape, never by version alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TensorHeader
from bitgrain.errors import MissingTensorError, RuleMismatchError, ShapeMismatchError
from bitgrain.formats.base import DenseScheme, ModuleKind, ModuleView, Scheme
from bitgrain.formats.evidence import SMALL_BYTES
from bitgrain.formats.modelslim.description import Description
from bitgrain.formats.modelslim.schemes.floats import ChannelFloat8Scheme, MicroscalingScheme
from bitgrain.formats.modelslim.schemes.integers import LAYOUTS, IntScheme, kind_of_offsets, stored_shape
from bitgrain.formats.modelslim.schemes.static import StaticScheme
from bitgrain.formats.modelslim.schemes.transforms import CLIP, DOWN, LINEAR, MUL_SCALE, ROTATIONS, UP, Rotation, TransformedScheme
from bitgrain.formats.modelslim.types import TYPES, WeightType, split_type
from bitgrain.weights import NO_ACTIVATION, ActivationSpec

MX_BLOCK = 32
# Columns per second scale that the producer uses unless it is told otherwise.
DUAL_BLOCK = 512
# The version whose four-bit weights are packed.
PACKED_VERSION = "1.0.0"


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses the scheme of one module.

    Args:
        kind:        type string of its weight.
        description: the checkpoint's.
        read_small:  see Evidence.
    """

    module: ModuleView
    kind: str
    description: Description
    read_small: Callable[[str], Tensor]

    def scheme(self) -> Scheme:
        """The scheme of a module that is quantized, or transforms its input.

        Raises:
            MissingTensorError, ShapeMismatchError, RuleMismatchError: the tensors cannot be what the type says.
        """
        base, marks = split_type(self.kind)
        inner = self._inner(TYPES[base], base)
        k = inner.shape[1]
        rotations = tuple(r for names in ROTATIONS if (r := self._rotation(*names, k)) is not None)
        if "FLATQUANT" in marks and not any(r.left == ROTATIONS[0][0] or r.right == ROTATIONS[0][1] for r in rotations):
            raise self._missing(ROTATIONS[0], f"the type {self.kind} says that the input is transformed")
        rank = 0
        if "SVD" in marks or self._expects(self.prefix + DOWN) or self._expects(self.prefix + UP):
            down = self.module.tensors.get(self.prefix + DOWN)
            rank = down.shape[0] if down is not None and down.shape else 1
        smoothed = self._expects(MUL_SCALE)
        if not (smoothed or rotations or rank or inner.activation.clipped or self.prefix):
            return inner
        return TransformedScheme(inner, self.prefix, smoothed, rotations, rank)

    @property
    def prefix(self) -> str:
        return LINEAR if any(local.startswith(LINEAR) for local in self.module.tensors) else ""

    @property
    def own(self) -> Mapping[str, TensorHeader]:
        """The tensors of the weight itself, by the inner scheme's local names."""
        return {local.removeprefix(self.prefix): header for local, header in self.module.tensors.items() if local.startswith(self.prefix)}

    def _expects(self, local: str) -> bool:
        """A tensor is stored, or described and so must be."""
        return local in self.module.tensors or self.description.describes(self.module.full_name(local))

    def _missing(self, names: tuple[str, ...], why: str) -> MissingTensorError:
        wanted = " or ".join(name for name in names if name)
        there = ", ".join(sorted(self.module.tensors))
        return MissingTensorError(self.module.name, f"no {wanted}, but {why}; the module has {there}", wanted, "fetch or write the checkpoint again")

    def _inner(self, kind: WeightType, base: str) -> Scheme:
        activation = NO_ACTIVATION if self.module.kind is ModuleKind.EMBEDDING else kind.activation
        if not activation.is_none and activation.dynamic and self._expects(CLIP):
            activation = replace(activation, clipped=True)
        if kind.storage == "int":
            return self._integers(kind, base, activation)
        if kind.storage == "dense":
            return self._dense()
        weight = self.own.get("weight")
        shape = self._plain_shape(2 if kind.bits == 4 and not _is_unpacked(weight) else 1)
        if kind.storage == "static":
            return StaticScheme(shape, activation, kind.both)
        if kind.storage == "float8":
            return ChannelFloat8Scheme(shape, activation)
        return self._microscaling(kind, shape, activation)

    def _plain_shape(self, per_byte: int) -> tuple[int, int]:
        """(N, K): the architecture's, or what the codes show."""
        if self.module.shape is not None:
            return self.module.shape
        weight = self.own.get("weight")
        if weight is None or len(weight.shape) != 2:
            raise self._missing(("weight",), f"its type is {self.kind}")
        return weight.shape[0], weight.shape[1] * per_byte

    def _dense(self) -> DenseScheme:
        weight = self.own.get("weight")
        if weight is None or weight.dtype not in FLOAT_CODES:
            raise RuleMismatchError(
                self.module.name, f"described as {self.kind}, but the module has {', '.join(sorted(self.module.tensors))}", "a type that says what its integers mean",
                "correct the description: there is nothing else to read them by",
            )  # fmt: skip
        return DenseScheme(self._plain_shape(1), weight.dtype)

    # --- integers ---------------------------------------------------------------------------------------------------
    def _integers(self, kind: WeightType, base: str, activation: ActivationSpec) -> IntScheme:
        second = "weight_scale_second"
        two_stages = base == "W4A8_DYNAMIC" and (second in self.own or self._expects(self.prefix + second))
        scale = self.own.get(second if two_stages else "weight_scale")
        shape, layout = self._layout(kind, base, scale)
        first = self.own.get("weight_scale")
        dtype = first.dtype if first is not None and first.dtype in FLOAT_CODES else "F32"
        zero = self._zero() if kind.may_shift else "constant"
        return IntScheme(shape, activation, kind.bits, layout, self._group_size(scale, shape[1]), zero, dtype, two_stages, base == "W4A8_DYNAMIC")

    def _layout(self, kind: WeightType, base: str, scale: TensorHeader | None) -> tuple[tuple[int, int], str]:
        """((N, K), how the codes are packed)."""
        layouts = LAYOUTS if kind.bits == 4 else ("plain",)
        weight = self.own.get("weight")
        grouped = scale is not None and len(scale.shape) == 2 and scale.shape[1] > 1
        packed_columns = base == "W4A16" and not grouped and self.description.version == PACKED_VERSION
        usual = "plain" if kind.bits == 8 or self.description.version != PACKED_VERSION or base == "W4A4_DYNAMIC" else "columns" if packed_columns else "rows"
        if self.module.shape is not None:
            stored = weight.shape if weight is not None else ()
            return self.module.shape, next((way for way in layouts if stored_shape(self.module.shape, way) == stored), usual)
        n, k = self._plain_shape(1)
        rows = scale.shape[0] if scale is not None and scale.shape else n
        if kind.bits == 4 and rows == 2 * n:
            return (rows, k), "rows"
        return ((rows, 2 * k), "columns") if packed_columns else ((rows, k), "plain")

    def _group_size(self, scale: TensorHeader | None, k: int) -> int:
        """Columns per scale, from the number of scales in a row."""
        groups = scale.shape[1] if scale is not None and len(scale.shape) == 2 else 1
        if groups <= 1 or scale is None:
            return k
        stated = self.description.group_size
        if stated > 0 and -(-k // stated) == groups:
            return stated
        if k % groups == 0:
            return k // groups
        raise ShapeMismatchError(
            f"{scale.file}: {scale.name}", f"{groups} scales in each row of {k} columns", f"groups of one size (group_size is {stated})",
            "correct group_size, or fetch the right checkpoint",
        )  # fmt: skip

    def _zero(self) -> str:
        """What kind of zero points `weight_offset` holds; "float", which every offset fits, where it is too large to read now."""
        offset = self.own.get("weight_offset")
        if offset is None:
            return "integer"
        return kind_of_offsets(self.read_small(offset.name)) if offset.nbytes <= SMALL_BYTES else "float"

    # --- microscaling -----------------------------------------------------------------------------------------------
    def _microscaling(self, kind: WeightType, shape: tuple[int, int], activation: ActivationSpec) -> MicroscalingScheme:
        second = 0
        if kind.storage == "dual":
            second = self._second_group(shape[1])
            # inputs have second scales over as many columns as the weight has
            columns = -(-max(second, DUAL_BLOCK if second == shape[1] else 0) // MX_BLOCK) * MX_BLOCK
            if not activation.is_none:
                activation = replace(activation, second_scale="group", second_group=columns)
        unpacked = kind.bits == 4 and _is_unpacked(self.own.get("weight"))
        element = "fp8_e4m3fn" if kind.bits == 8 else "fp4_e2m1"
        return MicroscalingScheme(shape, element, MX_BLOCK, "e8m0", activation, unpacked=unpacked, second_group=second)

    def _second_group(self, k: int) -> int:
        scale = self.own.get("weight_dual_scale")
        columns = scale.shape[1] if scale is not None and len(scale.shape) > 1 else 1
        if columns <= 1 or scale is None:
            return k
        if -(-k // DUAL_BLOCK) == columns:
            return DUAL_BLOCK
        if k % columns == 0 and (k // columns) % MX_BLOCK == 0:
            return k // columns
        powers = [size for e in range(5, 31) if -(-k // (size := 1 << e)) == columns]
        if len(powers) == 1:
            return powers[0]
        raise ShapeMismatchError(
            f"{scale.file}: {scale.name}", f"{columns} scales in each row of {k} columns", f"one per {DUAL_BLOCK} columns, or per another multiple of {MX_BLOCK}",
            "fetch or write the checkpoint again",
        )  # fmt: skip

    # --- rotations --------------------------------------------------------------------------------------------------
    def _rotation(self, left: str, right: str, k: int) -> Rotation | None:
        announced = self.description.rotated.get(self.module.name, ())
        expected = [name if name and (self._expects(name) or name in announced) else "" for name in (left, right)]
        # the two factors of this rotation come together
        if any(expected) and left == "kronecker_rotation_m":
            expected = [left, right]
        if not any(expected):
            return None
        headers = [self.module.tensors.get(name) if name else None for name in expected]
        size = next((header.shape[0] for header in headers if header is not None and header.shape), 0)
        first = headers[0] is not None
        if size == 0:
            raise self._missing((left, right), "the description says that the input is rotated")
        if k % size:
            shown = next(h for h in headers if h is not None)
            raise ShapeMismatchError(f"{shown.file}: {shown.name}", f"shape {list(shown.shape)}", f"a factor of {k} in features", "fetch or write the checkpoint again")
        return Rotation(expected[0], expected[1], (size, k // size) if first else (k // size, size))


def _is_unpacked(weight: TensorHeader | None) -> bool:
    """Four-bit floats are stored one per byte."""
    return weight is not None and weight.dtype == "F8_E4M3"
