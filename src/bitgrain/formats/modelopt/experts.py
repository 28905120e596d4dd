"""Experts that stay stored together, as batched matrices, divided into one module per expert and projection.

    experts.gate_up_proj, experts.down_proj      codes, three-dimensional, expert first
    ..._weight_scale, ..._weight_scale_2, ..._input_scale, ..._bias      the same name with a suffix
Matrices that are multiplied as x W lie [E, in, out], with packed codes and block scales along `in`; the scales of blocks show
which way a matrix lies.  One number may stand for all experts.  Source: formats specification, section 6; ModelOpt 0.47
export/unified_export_hf.py (which transposes for the packing and back).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.checkpoint.parts import Flatten, Pick, Step, StoredPart, Transpose, divide, join, part_of
from bitgrain.formats.expert_stacks import ExpertStack, divide_experts, stacked_name

_LOCALS = {"": "weight", **{f"_{local}": local for local in ("weight_scale", "weight_scale_2", "input_scale", "bias")}}
_PACKED = ("U8", "F8_E4M3", "I8")


def divide_stacks(tensors: Mapping[str, TensorHeader], stack: ExpertStack | None, interleaved: bool) -> dict[str, StoredPart]:
    """Every part by name: quantized and unquantized expert stacks divided, all other tensors whole.

    Args:
        stack:       how the architecture stacks experts; None where it is not known: shapes then decide.
        interleaved: gate and up rows alternate, where `stack` is None.
    """
    groups: dict[tuple[str, str], dict[str, TensorHeader]] = {}
    for name, header in tensors.items():
        place = stacked_name(name)
        if place is not None and place[2] in _LOCALS:
            groups.setdefault(place[:2], {})[_LOCALS[place[2]]] = header
    divided: dict[str, list[StoredPart]] = {}
    for (parent, projection), held in groups.items():
        weight = held.get("weight")
        if weight is None or len(weight.shape) != 3 or weight.dtype not in _PACKED:
            continue
        layout = stack or ExpertStack(weight.shape[0], 0, 0, interleaved=interleaved)
        turned = _is_transposed(weight, held.get("weight_scale"), projection, stack)
        # blocks of a transposed matrix that run along `out` have no module's layout, and stay whole: nothing then takes them
        if weight.shape[0] == layout.count and (turned or (stack is not None and not stack.transposed)):
            for local, header in held.items():
                divided[header.name] = list(_parts(parent, projection, local, header, turned, layout))
    plain = divide_experts({name: header for name, header in tensors.items() if name not in divided}, stack)
    return join(tensors, plain, divide({name: tensors[name] for name in divided}, divided))


def _is_transposed(weight: TensorHeader, scale: TensorHeader | None, projection: str, stack: ExpertStack | None) -> bool:
    """Whether a stack lies [E, in, out]."""
    _, rows, columns = weight.shape
    if scale is not None and len(scale.shape) > 1 and max(scale.shape[1:]) > 1:
        # blocks run along `in`, so the other dimension is as long as the weight's; of one scale per row, the only dimension is
        along_rows, along_columns = scale.shape[1] == rows, scale.shape[-1] == columns
        if along_rows != along_columns:
            return along_columns
    if stack is not None and stack.hidden != stack.size:
        out = stack.hidden if projection == "down_proj" else stack.size * (2 if projection == "gate_up_proj" else 1)
        if (rows == out) != (columns == out):
            return columns == out
    return stack.transposed if stack is not None else True


def _parts(parent: str, projection: str, local: str, header: TensorHeader, turned: bool, stack: ExpertStack) -> Iterator[StoredPart]:
    """The parts of one stored tensor; rows of gate and up are taken apart where there is more than one."""
    for expert in range(stack.count):
        steps = _expert_steps(header, expert, local, turned, stack.count)
        if projection != "gate_up_proj":
            yield part_of(header, f"{parent}.{expert}.{projection}.{local}", *steps)
            continue
        inner = part_of(header, header.name, *steps).header.shape
        divisible = local in ("weight", "weight_scale", "bias") and bool(inner) and inner[0] > 1
        for own, up in (("gate_proj", False), ("up_proj", True)):
            cut = (stack.gate_or_up(0, up, inner[0]),) if divisible else ()
            yield part_of(header, f"{parent}.{expert}.{own}.{local}", *steps, *cut)


def _expert_steps(header: TensorHeader, expert: int, local: str, turned: bool, count: int) -> tuple[Step, ...]:
    """One expert's share: a matrix [out, in], a vector, or a number that all experts may share."""
    if len(header.shape) < 1 or header.shape[0] != count:
        return (Flatten(0),)
    turn = (
        (Transpose(),) if turned and len(header.shape) == 3 and local in ("weight", "weight_scale") and header.shape[1:] != (1, 1) else ()
    )
    return (Pick(0, expert), *turn)
