"""Experts whose matrices were one parameter [E, N, K] when torchao took it apart, divided into per-expert components.

    experts.gate_up_proj -> experts._gate_up_proj_qdata [E, 2I, H], _scale [E, 2I, G], ...
A component with one entry for all experts, or for all rows, belongs to each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.checkpoint.parts import Cut, Pick, Step, StoredPart, part_of
from bitgrain.formats.expert_stacks import ExpertStack
from bitgrain.formats.torchao.records import Record

_COMPONENT = re.compile(r"(?P<parent>(?:.*\.)?experts)\._(?P<projection>gate_up_proj|gate_proj|up_proj|down_proj)_(?P<component>\w+)")
_EXPERT = re.compile(r"(?P<parent>(?:.*\.)?experts)\.\d+\.(?P<projection>gate_proj|up_proj|down_proj)")
# Rows that one tile of swizzled block scales covers, and rows of the stored tensor per tile.
TILE_ROWS, STORED_ROWS = 128, 32


def parameters_of(module: str) -> tuple[str, ...]:
    """Names of the parameters that can hold a module's matrix: its own, and those of the stack that an expert lies in."""
    own = f"{module}.weight" if module else "weight"
    found = _EXPERT.fullmatch(module)
    if found is None:
        return (own,)
    parent, projection = found["parent"], found["projection"]
    fused = () if projection == "down_proj" else (f"{parent}.gate_up_proj",)
    return (own, f"{parent}.{projection}", *fused)


def divide_stacked(tensors: Mapping[str, TensorHeader], stack: ExpertStack, records: Mapping[str, Record]) -> dict[str, list[StoredPart]]:
    """The per-expert parts of every component of a stacked parameter that `records` describes, by the stored name.

    A component that does not have the architecture's number of experts or rows is left out, and so stays whole.
    """
    divided = {}
    for name, header in tensors.items():
        found = _COMPONENT.fullmatch(name)
        record = records.get(f"{found['parent']}.{found['projection']}") if found else None
        if found is None or record is None or stack.transposed:
            continue
        parts = _parts(header, found["parent"], found["projection"], found["component"], stack, record)
        if parts is not None:
            divided[name] = parts
    return divided


def _parts(header: TensorHeader, parent: str, projection: str, component: str, stack: ExpertStack, record: Record) -> list[StoredPart] | None:
    parts = []
    fused = projection == "gate_up_proj"
    for expert in range(stack.count):
        for own, up in ((("gate_proj", False), ("up_proj", True)) if fused else ((projection, None),)):
            steps = _steps(header.shape, expert, up, component, stack, record)
            if steps is None:
                return None
            parts.append(part_of(header, f"{parent}.{expert}.{own}._weight_{component}", *steps))
    return parts


def _steps(shape: tuple[int, ...], expert: int, up: bool | None, component: str, stack: ExpertStack, record: Record) -> tuple[Step, ...] | None:
    """How one expert's component comes out of the stored one; None if it does not fit the architecture.

    Args:
        up: which half of a fused projection; None: all of it.
    """
    if len(shape) in (1, 2) and component == "act_pre_scale":
        return (Cut(0, 0, shape[0]),)  # of the input, which all experts share
    if len(shape) != 3 or shape[0] not in (1, stack.count):
        return None
    pick = Pick(0, expert if shape[0] > 1 else 0)
    # Int4Tensor stores scales and zero points [E, G, N], everything else has rows first
    dim = 1 if record.kind == "Int4Tensor" and component in ("scale", "zero_point") else 0
    rows, total = shape[1 + dim], 2 * stack.size
    if up is None or (rows == 1 and total > 1):
        return (pick,)
    if record.swizzled and component == "scale":
        tiles = -(-total // TILE_ROWS)
        # a tile of rows must belong to one projection
        if stack.interleaved or stack.size % TILE_ROWS or rows != tiles * STORED_ROWS:
            return None
        return (pick, stack.gate_or_up(0, up, rows))
    return (pick, stack.gate_or_up(dim, up, rows)) if rows == total else None
