"""The experts of one layer: each token goes through the few that its router chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitgrain.grouping import ranges
from bitgrain.kernels.base import ExpertsKernel, ExpertsProblem, Join, PreparedExpert, PreparedExperts
from bitgrain.layers.activation import Gated
from bitgrain.layers.builder import joint_label
from bitgrain.layers.linear import FusedLinear
from bitgrain.layers.mlp import GatedLinears
from bitgrain.weights import ActivationSpec, Transformed, Weight, WeightSpec

if TYPE_CHECKING:
    from bitgrain.layers.builder import ModelBuilder
    from bitgrain.plan import ExpertGroup

# (weight, activation with stored values, bias) of a module
_Matrix = tuple[Weight, ActivationSpec, Tensor | None]
# (weight, activation, shape, whether there is a bias): what a problem says of a module
_Side = tuple[WeightSpec, ActivationSpec, tuple[int, int], bool]


class Experts(nn.Module):
    """y[m] = sum over places p of weight[m, p] * expert_{chosen[m, p]}(x[m]).

    Experts that are alike run together in one kernel; those of which the plan or the choice of a kernel says otherwise run as
    linear modules, one after another.  A row's result does not depend on the other rows.

    Args:
        name:  of the layer's experts; each is called by its index below it.
        count: how many there are.
        join:  the name of an activation function, for act(gate) * up; or what joins the two otherwise.
    """

    def __init__(self, builder: ModelBuilder, name: str, count: int, join: str | Join) -> None:
        super().__init__()
        self.count = count
        gate = Gated(join) if isinstance(join, str) else join
        collected = _Collected(builder, name, gate)
        groups = {expert: group for group in builder.reader.plan.expert_groups[name] for expert in group.members}
        for expert in range(count):
            collected.add(expert, groups[expert])
        self.parts = nn.ModuleList(collected.finish(count))

    def forward(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """[M, K] for x [M, K], and weight of x's dtype or float32 and int64 expert indices, each [M, per_token]."""
        out: Tensor = self.parts[0](x, weight, chosen)
        for part in self.parts[1:]:
            out = out + part(x, weight, chosen)
        return out


class KernelExperts(nn.Module):
    """Experts that one kernel runs together.

    Args:
        places: int64 [experts of the layer], where each stands in `prepared`; -1: in another part.  None: where its index says.
    """

    def __init__(self, kernel: ExpertsKernel, prepared: PreparedExperts, places: Tensor | None) -> None:
        super().__init__()
        self.kernel, self.prepared, self.places = kernel, prepared, places

    def forward(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        own = chosen if self.places is None else self.places[chosen]
        return self.kernel.apply(x.contiguous(), weight, own, self.prepared)

    @property
    def nbytes(self) -> int:
        """Bytes of all prepared experts."""
        return self.prepared.nbytes

    def extra_repr(self) -> str:
        return f"{len(self.prepared.experts)} experts, {self.kernel.name}"


class LinearExperts(nn.Module):
    """Experts that run one after another, in the order of their indices.

    Args:
        experts: by index: y = expert(x) for the rows x [m, K] that chose it.
    """

    def __init__(self, experts: dict[int, nn.Module]) -> None:
        super().__init__()
        self.indices = sorted(experts)
        self.experts = nn.ModuleList(experts[index] for index in self.indices)

    def forward(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        named = set(chosen.flatten().tolist())
        for index, expert in zip(self.indices, self.experts, strict=True):
            if index in named:
                row, place = (chosen == index).nonzero(as_tuple=True)
                part = expert(x[row]) * weight[row, place, None]
                out.index_add_(0, row, part.to(out.dtype))  # an expert's rows are distinct: no two sums meet in one call
        return out


class _Run:
    """A kernel and the experts that were prepared for it so far."""

    def __init__(self, kernel: ExpertsKernel) -> None:
        self.kernel = kernel
        self.prepared: dict[int, PreparedExpert] = {}


class _Collected:
    """Reads experts one by one, and prepares each before the next: no more than one is held as it is stored."""

    def __init__(self, builder: ModelBuilder, name: str, join: Join) -> None:
        self.builder, self.name, self.join = builder, name, join
        self.runs: dict[ExpertsProblem, _Run | str] = {}
        self.linear: dict[int, nn.Module] = {}

    def add(self, expert: int, group: ExpertGroup) -> None:
        """Read and prepare one expert."""
        gate_up, down = [group.module(expert, part) for part in group.gate_up], group.module(expert, group.parts[2])
        if not group.together:
            with self.builder.linears_of_experts(f"{self.name}.{expert}", group.why):
                pair = self.builder.linears([group.module(expert, part) for part in group.parts[:2]])
                self.linear[expert] = GatedLinears(self.builder, pair, self.builder.linear(down), self.join)
            return
        if self._take_ready(expert, group, gate_up, (down,)):
            return
        first, second = self.builder.matrix(gate_up), self.builder.matrix((down,))
        run = _obstacle(first) or _obstacle(second) or self._run(group, self._problem(group, *map(_side_of, (first, second))))
        if isinstance(run, str):
            with self.builder.linears_of_experts(f"{self.name}.{expert}", run):
                size = first[0].shape[0] // 2
                pair = FusedLinear(self.builder.prepared(joint_label(gate_up), *first), (size, size))
                self.linear[expert] = GatedLinears(self.builder, pair, self.builder.prepared(down, *second), self.join)
            return
        biases = self.builder.moved_bias(first[2]), self.builder.moved_bias(second[2])
        run.prepared[expert] = made = run.kernel.prepare(first[0], second[0], first[1], second[1], *biases)
        self.builder.keep_ready(gate_up, run.kernel, first[0].spec, made.gate_up, made.gate_up_bias)
        self.builder.keep_ready((down,), run.kernel, second[0].spec, made.down, made.down_bias)

    def _take_ready(self, expert: int, group: ExpertGroup, gate_up: Sequence[str], down: Sequence[str]) -> bool:
        """Take an expert that an earlier start has prepared; False where there is none, or another kernel is chosen now."""
        first, second = self.builder.ready(gate_up), self.builder.ready(down)
        if first is None or second is None:
            return False
        problem = self._problem(group, *((r.weight, r.prepared.activation, r.prepared.shape, r.bias is not None) for r in (first, second)))
        run = self._run(group, problem)
        if isinstance(run, str) or not (first.is_of(run.kernel) and second.is_of(run.kernel)):
            return False
        run.prepared[expert] = PreparedExpert(first.prepared, second.prepared, first.bias, second.bias)
        self.builder.skip((*gate_up, *down))
        return True

    def _problem(self, group: ExpertGroup, gate_up: _Side, down: _Side) -> ExpertsProblem:
        n, hidden = gate_up[2]
        return ExpertsProblem(
            gate_up[0], down[0], gate_up[1].without_values(), down[1].without_values(), len(group.members), hidden, n // 2, self.join.describe(),
            gate_up[3] or down[3], self.builder.dtype_name,
        )  # fmt: skip

    def _run(self, group: ExpertGroup, problem: ExpertsProblem) -> _Run | str:
        """The kernel that runs experts like this one, or why none does."""
        if problem not in self.runs:
            kernel, why = self.builder.experts_kernel(label_of(group, len(self.builder.reader.plan.expert_groups[self.name])), problem)
            self.runs[problem] = why if kernel is None else _Run(kernel)
        return self.runs[problem]

    def finish(self, count: int) -> list[nn.Module]:
        """One part per kernel, and one for those that run as linear modules."""
        parts: list[nn.Module] = []
        for run in self.runs.values():
            if isinstance(run, _Run):
                places = None
                if len(run.prepared) < count:
                    places = torch.full((count,), -1)
                    places[list(run.prepared)] = torch.arange(len(run.prepared))
                    places = places.to(self.builder.options.device)
                parts.append(KernelExperts(run.kernel, run.kernel.assemble(list(run.prepared.values()), self.join), places))
        return parts + ([LinearExperts(self.linear)] if self.linear else [])


def _side_of(matrix: _Matrix) -> _Side:
    return matrix[0].spec, matrix[1], matrix[0].shape, matrix[2] is not None


def _obstacle(matrix: _Matrix) -> str:
    """Why no kernel of experts runs a module, of what only its data say; "" if one may."""
    if isinstance(matrix[0], Transformed):
        return "an input or a product is transformed"
    return "" if matrix[1].of_output().is_none else "the product is quantized"


def label_of(group: ExpertGroup, groups: int) -> str:
    """What selections call a group: the layer, with the members where there are other groups."""
    return group.layer if groups == 1 else f"{group.layer}[{ranges(group.members)}]"
