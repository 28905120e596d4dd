"""Experts that a checkpoint stores together, one tensor for a whole layer, divided into one matrix per expert and projection.

    experts.gate_up_proj [E, 2I, H] or transposed [E, H, 2I]    experts.{e}.gate_proj, experts.{e}.up_proj
    experts.{gate,up,down}_proj [E, N, K] or [E, K, N]          experts.{e}.{gate,up,down}_proj
Tensors beside them (scales, biases) have the same name with a suffix: `gate_up_proj_scale_inv`, `down_proj.weight_scale`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.checkpoint.parts import Cut, Pick, StoredPart, Transpose, divide, part_of

# what stands before "experts", the projection, and what follows it
_STACKED = re.compile(r"(?P<parent>(?:.*\.)?experts)\.(?P<projection>gate_up_proj|gate_proj|up_proj|down_proj)(?P<rest>[._].*)?")


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """How an architecture lays experts out where they are stored together.

    Args:
        count:       experts of a layer.
        hidden:      H, in features of gate and up, out features of down.
        size:        I, out features of gate and up.
        transposed:  matrices are stored [E, in, out].
        interleaved: gate and up alternate (even gate, odd up) instead of following each other.
    """

    count: int
    hidden: int
    size: int
    transposed: bool = False
    interleaved: bool = False

    def gate_or_up(self, dim: int, up: bool, total: int) -> Cut:
        """The half of a fused dimension of `total` entries that is gate's, or up's."""
        if self.interleaved:
            return Cut(dim, int(up), total, 2)
        half = total // 2
        return Cut(dim, half if up else 0, total if up else half)


def stacked_name(name: str) -> tuple[str, str, str] | None:
    """(module path up to "experts", projection, what follows) of a tensor of stacked experts; None for any other."""
    found = _STACKED.fullmatch(name)
    return (found["parent"], found["projection"], found["rest"] or "") if found else None


def divide_experts(tensors: Mapping[str, TensorHeader], stack: ExpertStack | None) -> dict[str, StoredPart]:
    """Every part by name: unquantized expert stacks divided, all other tensors whole.

    A stack that does not have the architecture's shape stays whole; the plan then says that no module is called so.
    """
    divided = {}
    for name, header in tensors.items():
        place = stacked_name(name)
        if place is not None and stack is not None:
            parts = list(_dense_parts(header, place, stack))
            if parts:
                divided[name] = parts
    return divide(tensors, divided)


def _dense_parts(header: TensorHeader, place: tuple[str, str, str], stack: ExpertStack) -> Iterator[StoredPart]:
    parent, projection, rest = place
    local = {"": "weight", ".weight": "weight", "_bias": "bias", ".bias": "bias"}.get(rest)
    if local is None or not header.shape or header.shape[0] != stack.count:
        return
    fused = projection == "gate_up_proj"
    rows = stack.hidden if projection == "down_proj" else stack.size * (2 if fused else 1)
    columns = stack.size if projection == "down_proj" else stack.hidden
    stored = (rows,) if local == "bias" else ((columns, rows) if stack.transposed else (rows, columns))
    if header.shape[1:] != stored:
        return
    turn = (Transpose(),) if local == "weight" and stack.transposed else ()
    for expert in range(stack.count):
        if not fused:
            yield part_of(header, f"{parent}.{expert}.{projection}.{local}", Pick(0, expert), *turn)
            continue
        for up, own in ((False, "gate_proj"), (True, "up_proj")):
            half = stack.gate_or_up(0, up, rows)
            yield part_of(header, f"{parent}.{expert}.{own}.{local}", Pick(0, expert), *turn, half)
