"""Stored tensors as modules see them: Hugging Face's names and row order, one matrix per expert.

    q, k of interleaved architectures   row (h, 2 i + j) of the file is row (h, j hd / 2 + i) of Hugging Face: bytes move in whole rows
    experts [E, N, K]                   experts.{e}, views
    norms written as 1 + w              w, in the stored float32
Source: formats specification, part 2, sections 1.4 and 1.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.checkpoint.parts import Cut, Pick, Regroup, Reshape, Shift, Step, StoredPart, part_of
from bitgrain.errors import ShapeMismatchError
from bitgrain.formats.gguf.names import Architecture, Place

HEAD_STEMS = {"attn_q": 0, "attn_k": 1}


@dataclass(frozen=True, slots=True)
class Heads:
    """Query and key heads of every layer."""

    query: tuple[int, ...]
    key: tuple[int, ...]

    def of(self, stem: str, layer: int) -> int:
        return (self.query if stem == "attn_q" else self.key)[layer]


def parts_of(header: TensorHeader, place: Place, architecture: Architecture, heads: Heads) -> Iterator[StoredPart]:
    """The parts of one stored tensor.

    Raises:
        ShapeMismatchError: its sizes cannot be what its name says.
    """
    if place.stacked:
        yield from _expert_parts(header, place)
        return
    steps = tuple(_steps(header, place, architecture, heads))
    yield part_of(header, f"{place.module}.{place.local}", *steps)


def _steps(header: TensorHeader, place: Place, architecture: Architecture, heads: Heads) -> Iterator[Step]:
    if architecture.interleaved and place.stem in HEAD_STEMS and place.layer is not None and place.local in ("weight", "bias"):
        count = heads.of(place.stem, place.layer)
        rows = header.shape[0] if header.shape else 0
        if rows % (2 * count):
            raise _misshapen(header, f"a multiple of {2 * count} rows, for {count} heads")
        yield Regroup((count, rows // (2 * count), 2))
    if architecture.norm_shift and place.stem.endswith("norm"):
        yield Shift(-architecture.norm_shift)
    if place.stem == "ffn_gate_inp_shexp" and len(header.shape) == 1:
        yield Reshape((1, header.shape[0]))  # older writers drop the row


def _expert_parts(header: TensorHeader, place: Place) -> Iterator[StoredPart]:
    per_expert = place.local in ("scale", "input_scale")
    if len(header.shape) != (1 if per_expert else 2 if place.local == "bias" else 3):
        raise _misshapen(header, "one entry per expert" if per_expert else "[experts, rows, columns], or [experts, rows] of a bias")
    parts = len(place.stacked)
    if not per_expert and header.shape[1] % parts:
        raise _misshapen(header, f"a multiple of {parts} rows per expert")
    for expert in range(header.shape[0]):
        for index, projection in enumerate(place.stacked):
            steps: tuple[Step, ...] = (Pick(0, expert),)
            if parts > 1 and not per_expert:
                size = header.shape[1] // parts
                steps = (*steps, Cut(0, index * size, (index + 1) * size))
            yield part_of(header, f"{place.module}.{expert}.{projection}.{place.local}", *steps)


def _misshapen(header: TensorHeader, needed: str) -> ShapeMismatchError:
    return ShapeMismatchError(f"{header.file}: {header.name}", f"shape {list(header.shape)}", needed, "fetch or write the file again")
