"""From a module's stored descriptors to its scheme, checked against one another and against the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TensorHeader
from bitgrain.errors import BitgrainError, LabelMismatchError, raise_all
from bitgrain.formats.base import ModuleView
from bitgrain.formats.hqq.descriptors import ALWAYS, FLAGS, Value, read_descriptors
from bitgrain.formats.hqq.layout import PACKINGS, WIDTHS, Layout
from bitgrain.formats.hqq.schemes import HqqScheme, Part

FLOAT_TEXTS = ("torch.float16", "torch.bfloat16", "torch.float32")
_WRITE_AGAIN = "the file is damaged, or of a newer writer; fetch or write it again"


@dataclass(frozen=True, slots=True)
class Settings:
    """What quant_config says of a module.

    Args:
        width:      nbits.
        group_size: 0 for none: one group is a row (axis 1) or a column (axis 0).
        axis:       None if not stated.
        channel_wise: False: one scale for the whole matrix.
    """

    width: float
    group_size: int
    axis: int | None = None
    channel_wise: bool = True


class ModuleReader:
    """Reads one module; every contradiction is noted, and raised together at the end.

    Args:
        settings: of quant_config, None if there is none.
        trusted:  the user believes the tensors where the configuration contradicts them.
    """

    def __init__(self, module: ModuleView, read_small: Callable[[str], Tensor], settings: Settings | None, trusted: bool) -> None:
        self.module, self.read_small = module, read_small
        self.settings, self.trusted = settings, trusted
        self.problems: list[BitgrainError] = []

    def scheme(self, required: frozenset[str]) -> HqqScheme:
        """The scheme.

        Args:
            required: descriptors that modules of this checkpoint have beyond those that every version writes.
        Raises:
            LabelMismatchError, ManyProblemsError: all contradictions.
        """
        headers = self.module.tensors
        values = read_descriptors(headers, self.read_small)
        layout = self._layout("", values, headers.get("scale") or headers.get("zero_scale"), self.module.shape)
        if self.module.shape not in (None, layout.shape):
            self._note("shape", str(layout.shape), f"{self.module.shape}, which config.json gives the module", "correct config.json, or fetch the right checkpoint")
        self._check_settings(values, layout)
        stacked = "zero_scale" in headers
        scheme = HqqScheme(
            layout, self._words(values, layout), self._part("scale", values, layout), self._part("zero", values, layout), stacked, ALWAYS | required
        )
        raise_all(self.module.name, self.problems)
        return scheme

    def _layout(self, prefix: str, values: Mapping[str, Value], scale: TensorHeader | None, shape: tuple[int, ...] | None) -> Layout:
        """The layout that descriptors give; what is absent comes from the configuration, and the plan names it."""
        settings = self.settings if not prefix else None
        stored = values.get("shape", shape)
        rows, columns = stored if isinstance(stored, tuple) and len(stored) == 2 and min(stored) > 0 else (1, 1)
        if (rows, columns) != stored:
            self._note(f"{prefix}shape", "absent" if stored is None else str(stored), "two sizes above 0")
        width = self._number(values, "nbits", settings.width if settings is not None else 4.0)
        if width not in WIDTHS:
            self._note(f"{prefix}nbits", f"{width:g}", f"one of {', '.join(f'{w:g}' for w in WIDTHS)}")
            width = 4.0
        default_axis = 0 if prefix else 1
        axis = int(self._number(values, "axis", default_axis if settings is None or settings.axis is None else settings.axis))
        if axis not in (0, 1):
            self._note(f"{prefix}axis", str(axis), "0 or 1")
            axis = default_axis
        size = int(self._number(values, "group_size", 0 if prefix else self._configured_size(axis, rows, columns)))
        # older versions do not store channel_wise; what they wrote shows it
        single = "channel_wise" not in values and scale is not None and prod(scale.shape) == 1
        if values.get("channel_wise") == 0 or (single and size != rows * columns):
            size = 0
        elif not size:
            size = columns if axis == 1 else rows
        if size < 0 or (size and rows * columns % size):
            self._note(f"{prefix}group_size", str(size), f"a divisor of the {rows * columns} elements")
            size = 0
        layout = Layout((rows, columns), width, size, axis)
        packing = values.get("packing", layout.packing)
        if "nbits" in values and packing != layout.packing:
            self._note(f"{prefix}packing", repr(packing), f"{layout.packing!r} for {width:g} bits (known: {', '.join(PACKINGS)})")
        self._check_words(prefix, values, layout)
        self._check_neutral(prefix, values)
        return layout

    def _configured_size(self, axis: int, rows: int, columns: int) -> int:
        if self.settings is None:
            return 64
        return self.settings.group_size or (columns if axis == 1 else rows)

    def _check_words(self, prefix: str, values: Mapping[str, Value], layout: Layout) -> None:
        word = {"U8": "torch.uint8", "I32": "torch.int32"}[layout.word_code]
        found = values.get("unpack_view_dtype", word)
        if found != word:
            self._note(f"{prefix}unpack_view_dtype", repr(found), f"{word!r}, the words of {layout.packing}")

    def _check_neutral(self, prefix: str, values: Mapping[str, Value]) -> None:
        """Note flags that are neither on nor off, and a compute type that is none."""
        for name in FLAGS:
            if values.get(name, 0) not in (0, 1):
                self._note(prefix + name, str(values[name]), "0 or 1")
        if prefix and values.get("view_as_float") == 1:
            self._note(f"{prefix}view_as_float", "1", "0: only W_q is stored as the values of a float type")
        if values.get("compute_dtype", FLOAT_TEXTS[0]) not in FLOAT_TEXTS:
            self._note(f"{prefix}compute_dtype", repr(values["compute_dtype"]), f"one of {', '.join(FLOAT_TEXTS)}")

    def _words(self, values: Mapping[str, Value], layout: Layout) -> str:
        """Element type that W_q must have."""
        header = self.module.tensors.get("W_q")
        if values.get("view_as_float") != 1:
            return layout.word_code
        found = header.dtype if header is not None else "F16"
        if found not in FLOAT_CODES:
            self._note("view_as_float", f"1, but W_q is {found}", "a float type, as whose values the words are stored")
            return layout.word_code
        return found

    def _part(self, name: str, values: Mapping[str, Value], layout: Layout) -> Part:
        headers, inner = self.module.tensors, f"meta_{name}."
        quantized = values.get(f"quant_{name}") == 1
        nested = f"{name}_q" in headers or any(local.startswith(inner) for local in headers)
        if quantized != nested and f"quant_{name}" in values:
            told = f"{name}_q and {inner}*" if quantized else f"no {name}_q and no {inner}*"
            self._note(f"quant_{name}", str(int(quantized)), f"{1 - int(quantized)} beside these tensors, or {told}")
        if not nested:
            plain = headers.get("zero_scale") or headers.get(name)
            return Part(plain.dtype if plain is not None and plain.dtype in FLOAT_CODES else "F32")
        values = read_descriptors(headers, self.read_small, inner)
        described = self._layout(inner, values, headers.get(f"{inner}scale"), layout.scale_shape or (1, 1))
        if layout.group_size and described.shape != layout.scale_shape:
            self._note(f"{inner}shape", str(described.shape), f"{layout.scale_shape}, one per group")
        return Part("", described)

    def _check_settings(self, values: Mapping[str, Value], layout: Layout) -> None:
        """Note where the stored descriptors differ from the configuration."""
        settings = self.settings
        if settings is None or self.trusted:
            return
        asked: dict[str, float] = {"nbits": settings.width}
        if settings.axis is not None:
            asked["axis"] = settings.axis
        if settings.group_size and settings.channel_wise:
            asked["group_size"] = settings.group_size
        for name, wanted in asked.items():
            found = self._number(values, name, wanted)
            if found != wanted:
                self._note(
                    name, f"{found:g}", f"{wanted:g}, which quant_config says",
                    "correct quant_config, or believe the tensors with trust_tensors=True (--trust-tensors)",
                )  # fmt: skip
        if bool(layout.group_size) != settings.channel_wise:
            held, told = ("scales per group", "one scale") if layout.group_size else ("one scale", "scales per group")
            self._note("channel_wise", held, f"{told}, because quant_config says channel_wise: {str(settings.channel_wise).lower()}", "correct quant_config")

    @staticmethod
    def _number(values: Mapping[str, Value], name: str, default: float) -> float:
        """A stored number; 1.58 bits are stored as the nearest float32."""
        found = values.get(name, default)
        return round(found, 4) if isinstance(found, float) else default

    def _note(self, local: str, found: str, needed: str, action: str = _WRITE_AGAIN) -> None:
        header = self.module.tensors.get(local)
        where = f"{header.file}: {header.name}" if header is not None else self.module.full_name(local)
        self.problems.append(LabelMismatchError(where, found, needed, action))
