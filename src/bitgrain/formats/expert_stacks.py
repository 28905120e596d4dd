"""Experts that a checkpoint stores together, one tensor for a whole layer, divided into one matrix per expert and projection.

    experts.gate_up_proj [E, 2I, H] or transposed [E, H, 2I]    experts.{e}.gate_proj, experts.{e}.up_proj
    experts.{gate,up,down}_proj [E, N, K] or [E, K, N]          experts.{e}.{gate,up,down}_proj
Tensors beside them (scales, biases) have the same name with a suffix: `gate_up_proj_scale_inv`, `down_proj.weight_scale`.

What the architecture says (how many experts, which sizes, whether gate and up alternate) and what a format says (Piece: what
one entry of each tensor covers) decide together.  A shape that allows two readings is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.checkpoint.parts import Cut, Flatten, Pick, Step, StoredPart, Transpose, divide, part_of
from bitgrain.errors import BitgrainError, MissingTensorError, ShapeMismatchError, raise_all

# what stands before "experts", the projection, and what follows it
_STACKED = re.compile(r"(?P<parent>(?:.*\.)?experts)\.(?P<projection>gate_up_proj|gate_proj|up_proj|down_proj)(?P<rest>[._].*)?")
FUSED, DOWN = "gate_up_proj", "down_proj"
# Why entries along N do not fall into gate's and up's.
_NOT_IN_HALVES = {
    "alternating": "gate and up alternate, so that a block of rows holds both",
    "joint": "a block of rows holds the end of gate and the start of up",
    "either": "a block of rows may hold the end of gate and the start of up, or up may start a new one",
}
FETCH = "correct config.json (sizes, number of experts), or fetch the right checkpoint"


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """How an architecture lays experts out where they are stored together.

    Args:
        count:       experts of a layer.
        hidden:      H, in features of gate and up, out features of down.
        size:        I, out features of gate and up.
        transposed:  matrices are stored [E, in, out] where their shapes allow both readings.
        interleaved: gate and up alternate (even gate, odd up) instead of following each other.
        biased:      every expert has biases.
    """

    count: int
    hidden: int
    size: int
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False

    def matrix(self, projection: str) -> tuple[int, int]:
        """(rows N, columns K) of one expert's stored projection; gate_up_proj is gate and up together."""
        if projection == DOWN:
            return self.hidden, self.size
        return (2 * self.size if projection == FUSED else self.size), self.hidden

    def gate_or_up(self, dim: int, up: bool, total: int) -> Cut:
        """The half of a fused dimension of `total` entries that is gate's, or up's."""
        if self.interleaved:
            return Cut(dim, int(up), total, 2)
        half = total // 2
        return Cut(dim, half if up else 0, total if up else half)


@dataclass(frozen=True, slots=True)
class Piece:
    """One kind of tensor of a stack, and what its entries cover.

    Args:
        local:      name of an expert's own tensor of this kind.
        rows:       rows (N) per entry: every possibility; 0: all rows of a projection.
        columns:    columns (K) per entry, the same; empty: a vector over N, or no matter.
        tail:       size of a fourth dimension, which continues the third one; 0: there is none.
        transposed: stored [E, K, N] or [E, N, K]; None: the shapes of the layer decide.
        needs:      local names of pieces, one of which must be stored wherever this one is.
        needing:    element types with which it needs them; empty: with any.
    """

    local: str
    rows: tuple[int, ...] = (1,)
    columns: tuple[int, ...] = (1,)
    tail: int = 0
    transposed: bool | None = None
    needs: tuple[str, ...] = ()
    needing: tuple[str, ...] = ()


WEIGHT = Piece("weight")
BIAS = Piece("bias", columns=(0,))


def number(local: str) -> Piece:
    """One number per expert: [E], [E, 1], [E, 1, 1]; of a fused projection perhaps one for each half: [E, 2], [E, 2, 1]."""
    return Piece(local, rows=(0,), columns=(0,))


def spellings(*pieces: Piece) -> dict[str, Piece]:
    """What follows a projection's name, for each piece: "_x" and ".x" for a local name "x", for a weight nothing too.

    A local name "weight_x" is also written "_x".
    """
    named: dict[str, Piece] = {}
    for piece in pieces:
        local = piece.local
        named |= {f".{local}": piece, **({"": piece} if local == "weight" else {f"_{local}": piece})}
        if local.startswith("weight_"):
            named[f"_{local.removeprefix('weight_')}"] = piece
    return named


PLAIN = spellings(WEIGHT, BIAS)


def stacked_name(name: str) -> tuple[str, str, str] | None:
    """(module path up to "experts", projection, what follows) of a tensor of stacked experts; None for any other."""
    found = _STACKED.fullmatch(name) if "experts." in name else None
    return (found["parent"], found["projection"], found["rest"] or "") if found else None


@dataclass(frozen=True, slots=True)
class _Stored:
    """One stored tensor of a stack."""

    header: TensorHeader
    parent: str
    projection: str
    piece: Piece

    @property
    def where(self) -> str:
        return f"{self.header.file}: {self.header.name}"


def divide_experts(tensors: Mapping[str, TensorHeader], stack: ExpertStack | None, pieces: Mapping[str, Piece] = PLAIN) -> dict[str, StoredPart]:
    """Every part by name: expert stacks divided, all other tensors whole.

    A tensor of a stack whose suffix `pieces` does not have stays whole; the plan then says that no module is called so.

    Args:
        stack:  None: the architecture is not known or has no experts; nothing is divided.
        pieces: what follows a projection's name, to what the tensor is.
    Raises:
        ShapeMismatchError, MissingTensorError: a stack that does not fit the architecture, or fits it in two ways.
        UnexpectedTensorError: an expert is stored in the stack and by itself.
    """
    if stack is None:
        return divide(tensors, {})
    layers: dict[str, list[_Stored]] = {}
    for name, header in tensors.items():
        place = stacked_name(name)
        if place is not None and place[2] in pieces:
            layers.setdefault(place[0], []).append(_Stored(header, place[0], place[1], pieces[place[2]]))
    problems: list[BitgrainError] = []
    divided: dict[str, list[StoredPart]] = {}
    for stored in layers.values():
        found = _incomplete(stored, stack)
        problems += found or _divide_layer(stored, stack, divided)
    raise_all("experts that are stored together", problems)
    return divide(tensors, divided)


def _incomplete(stored: Sequence[_Stored], stack: ExpertStack) -> list[BitgrainError]:
    """A problem for each tensor that the others of its projection need."""
    present: dict[str, dict[str, _Stored]] = {}
    for one in stored:
        present.setdefault(one.projection, {})[one.piece.local] = one
    problems: list[BitgrainError] = []
    for own in present.values():
        needed = [(one, one.piece.needs) for one in own.values() if not one.piece.needing or one.header.dtype in one.piece.needing]
        if stack.biased:
            needed.append((next(iter(own.values())), (BIAS.local,)))
        problems += [_absent(one, locals_, own, stack) for one, locals_ in needed if locals_ and not own.keys() & set(locals_)]
    return problems


def _absent(one: _Stored, locals_: Sequence[str], own: Mapping[str, _Stored], stack: ExpertStack) -> MissingTensorError:
    ends = ["" if local == WEIGHT.local else f"_{local.removeprefix('weight_')}" for local in locals_]
    there = ", ".join(sorted(o.header.name.rpartition("experts.")[2] for o in own.values()))
    return MissingTensorError(
        " or ".join(f"{one.parent}.{one.projection}{end}" for end in ends), f"absent; the layer has {there} in {', '.join(sorted({o.header.file for o in own.values()}))}",
        f"the {' or '.join(locals_)} of all {stack.count} experts", "fetch or write the checkpoint again",
    )  # fmt: skip


def _divide_layer(stored: Sequence[_Stored], stack: ExpertStack, divided: dict[str, list[StoredPart]]) -> list[BitgrainError]:
    """Add the parts of each tensor of a layer to `divided`; what does not fit is the result."""
    try:
        turned = _orientation(stored, stack)
    except BitgrainError as problem:
        return [problem]
    problems = []
    for one in stored:
        try:
            divided[one.header.name] = list(_parts(one, stack, turned))
        except BitgrainError as problem:
            problems.append(problem)
    return problems


def _orientation(stored: Sequence[_Stored], stack: ExpertStack) -> bool:
    """Whether the layer's matrices are stored [E, K, N]: what every shape allows, or the architecture's way where both fit.

    Raises:
        ShapeMismatchError: no way fits all of them.
    """
    allowed, first = {False, True}, None
    for one in stored:
        shape = one.header.shape
        if one.piece.transposed is None and (one.piece.local == WEIGHT.local or (len(shape) == 3 and 1 not in shape[1:])):
            fits = _fits(one, stack)
            if not fits & allowed:
                if fits and first is not None:
                    raise _misfit(one, stack, f"stored [E, {'K, N' if True in fits else 'N, K'}], but {first.header.name} {list(first.header.shape)} is not")
                raise _misfit(one, stack)
            allowed, first = allowed & fits, one
    return stack.transposed if len(allowed) == 2 else allowed == {True}


def _fits(one: _Stored, stack: ExpertStack) -> set[bool]:
    """The orientations that a tensor's shape allows."""
    rows, columns = stack.matrix(one.projection)
    shape = one.header.shape
    if one.piece.tail and len(shape) == 4 and shape[3] == one.piece.tail:
        shape = (*shape[:2], shape[2] * shape[3])
    elif one.piece.tail:
        return set()
    if len(shape) != 3 or shape[0] != stack.count:
        return set()
    halves = one.projection == FUSED
    ways = ((False, shape[1], shape[2]), (True, shape[2], shape[1]))
    return {way for way, n, k in ways if _covers(n, rows, one.piece.rows, halves) and _covers(k, columns, one.piece.columns, False)}


def _covers(entries: int, size: int, steps: Sequence[int], halves: bool) -> bool:
    """Whether so many entries can cover `size` rows or columns; `halves`: or two halves of them, each for itself."""
    counts = {-(-size // step) if step else 1 for step in steps}
    if halves:
        counts |= {2 * (-(-size // 2 // step) if step else 1) for step in steps}
    return entries in counts or not counts


def _parts(one: _Stored, stack: ExpertStack, turned: bool) -> Iterator[StoredPart]:
    """The parts of one stored tensor, expert by expert."""
    head, entries = _row_entries(one, stack, turned)
    fused = one.projection == FUSED
    halves = [("gate_proj", False), ("up_proj", True)] if fused else [(one.projection, False)]
    cuts: dict[bool, tuple[Step, ...]] = {False: (), True: ()}
    if fused and entries > 1:
        _check_halves(one, stack, entries)
        cuts = {up: (stack.gate_or_up(0, up, entries),) for up in (False, True)}
    for expert in range(stack.count):
        for own, up in halves:
            yield part_of(one.header, f"{one.parent}.{expert}.{own}.{one.piece.local}", Pick(0, expert), *head, *cuts[up])


def _row_entries(one: _Stored, stack: ExpertStack, turned: bool) -> tuple[tuple[Step, ...], int]:
    """(steps that bring one expert's share to [N, ...], number of entries along N).

    Raises:
        ShapeMismatchError: the shape fits in no way.
    """
    shape, piece = one.header.shape, one.piece
    if not shape or shape[0] != stack.count:
        raise _misfit(one, stack)
    if len(shape) <= 2:
        entries = shape[1] if len(shape) == 2 else 1
        if piece.tail or 0 not in piece.columns or not _covers(entries, stack.matrix(one.projection)[0], piece.rows, one.projection == FUSED):
            raise _misfit(one, stack)
        return (), entries
    wanted = turned if piece.transposed is None else piece.transposed
    fits = _fits(one, stack)
    if len(fits) == 1 and 1 in shape[1:]:
        wanted = next(iter(fits))  # a vector over N says by itself which way it lies
    if wanted not in fits:
        raise _misfit(one, stack)
    head: tuple[Step, ...] = (Flatten(1),) if piece.tail else ()
    return ((*head, Transpose()), shape[2]) if wanted else (head, shape[1])


def _check_halves(one: _Stored, stack: ExpertStack, entries: int) -> None:
    """Raise unless so many entries along N fall into gate's and up's in one way."""
    readings = {_reading(stack, entries, step) for step in one.piece.rows} - {""}
    if readings == {"halves"}:
        return
    reading = next(iter(readings)) if len(readings) == 1 else "either"
    raise _misfit(one, stack, _NOT_IN_HALVES[reading])


def _reading(stack: ExpertStack, entries: int, step: int) -> str:
    """How entries that cover `step` rows each (0: all of them) fall into gate's and up's: "halves", a way that is none, or ""."""
    own, joint = (-(-stack.size // step), -(-2 * stack.size // step)) if step else (1, 1)
    in_halves = entries == 2 * own
    if step > 1 and stack.size % step and entries == joint:
        return "either" if in_halves else "joint"
    if in_halves and step > 1 and stack.interleaved:
        return "alternating"
    return "halves" if in_halves else ""


def _misfit(one: _Stored, stack: ExpertStack, why: str = "") -> ShapeMismatchError:
    n, k = stack.matrix(one.projection)
    needed = f"{stack.count} experts of [{n}, {k}]" + (", gate and up together" if one.projection == FUSED else "")
    found = one.header.describe() + (f": {why}" if why else "")
    return ShapeMismatchError(one.where, found, f"the {one.piece.local} of {needed}" + (", in one reading" if why else ""), FETCH)
