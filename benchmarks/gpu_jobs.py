"""What benchmarks/gpu.py checks and times: each kernel that takes a case, at each size, one job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bitgrain.conformance.tolerances import allowed, allowed_of_experts
from bitgrain.kernels.base import ExpertsProblem, HadamardProblem, Kernel, LinearProblem, Prepared, Problem, StepProblem
from bitgrain.kernels.reference.attention import ReferenceAttention
from bitgrain.kernels.reference.experts import ReferenceExperts
from bitgrain.kernels.registry import candidates
from bitgrain.kernels.samples import join_of, sample_expert, sample_routing
from bitgrain.kernels.triton import availability
from bitgrain.platforms.base import Platform
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, Hadamard, Weight, WeightSpec
from bitgrain.weights.block_float import block_float_spec
from bitgrain.weights.codebook import codebook_spec
from bitgrain.weights.super_block import super_block_spec
from bitgrain.weights.synthetic import sample_activation, sample_weight

FP8, INT8 = ActivationSpec("fp8_e4m3fn", "token"), ActivationSpec("int8", "token")
NVFP4 = ActivationSpec("fp4_e2m1", "group", 16, scale_type="e4m3", second_scale="static")
MXFP4 = ActivationSpec("fp4_e2m1", "group", 32, scale_type="e8m0", exponent_rule="floor")


def float8(granularity: str, block: tuple[int, int] = (0, 0)) -> WeightSpec:
    return WeightSpec("float", "fp8_e4m3fn", 8, granularity, block=block, scale_dtype="float32")


def integers(bits: int, granularity: str, group: int = 0, zero: str = "constant") -> WeightSpec:
    return WeightSpec("int_affine", f"uint{bits}", bits, granularity, group, zero=zero, scale_dtype="bfloat16")


# the first ones are those that targets are stated for: they are measured before time is up
CASES = {
    "W4A16 g128": (integers(4, "group", 128), NO_ACTIVATION),
    "FP8 channel": (float8("channel"), FP8),
    "FP8 tensor": (float8("tensor"), ActivationSpec("fp8_e4m3fn", "tensor", dynamic=False)),
    "W8A8 token": (integers(8, "channel"), INT8),
    "FP8 block": (float8("block", (128, 128)), ActivationSpec("fp8_e4m3fn", "group", group_size=128)),
    "W4A16 g128 asym": (integers(4, "group", 128, "integer"), NO_ACTIVATION),
    "W8A16 channel": (integers(8, "channel"), NO_ACTIVATION),
    "W8A16 fp8 block": (float8("block", (128, 128)), NO_ACTIVATION),
    "MXFP4 A16": (block_float_spec("fp4_e2m1", 32, "e8m0"), NO_ACTIVATION),
    "MXFP4 A4": (block_float_spec("fp4_e2m1", 32, "e8m0"), MXFP4),
    "NVFP4 A16": (block_float_spec("fp4_e2m1", 16, "e4m3", "tensor"), NO_ACTIVATION),
    "NVFP4 A4": (block_float_spec("fp4_e2m1", 16, "e4m3", "tensor"), NVFP4),
    "Q4_K": (super_block_spec("Q4_K"), NO_ACTIVATION),
    "NF4 g64": (codebook_spec(4, 64), NO_ACTIVATION),
    "dense bf16": (WeightSpec("dense", "bfloat16", 16), NO_ACTIVATION),
}
EXPERTS = {"experts int4": CASES["W4A16 g128"], "experts fp8": (float8("block", (128, 128)), NO_ACTIVATION), "experts mxfp4": CASES["MXFP4 A16"], "experts w8a8": CASES["W8A8 token"]}
OTHERS = ("hadamard", "quantize", "attention")
WORKING_SET = 600_000_000  # bytes; several times the last-level cache of the largest GPU
@dataclass(frozen=True)
class Sizes:
    """(N, K) of linear modules, rows, and the sizes of everything else."""

    shapes: tuple[tuple[int, int], ...] = ((14336, 4096), (4096, 4096))
    rows: tuple[int, ...] = (1, 8, 64, 512, 2048)
    experts: tuple[int, int, int, int] = (128, 2048, 768, 8)  # of Qwen3-MoE: count, hidden, size, per token
    hadamard: tuple[tuple[int, int], ...] = ((4096, 1), (14336, 28))
    attention: tuple[int, int, int, int] = (8192, 32, 8, 128)  # tokens, heads, groups, entries of a head
    square: int = 8192


TINY = Sizes(((96, 256),), (1, 5), (4, 256, 128, 2), ((64, 1), (48, 12)), (40, 4, 2, 64), 64)


@dataclass
class Job:
    """One kernel at one size.

    Args:
        call:       runs it; the argument says which copy of the weight.
        check:      the difference from the definition over what is allowed; at most 1 where it is right.
        nbytes:     that a call cannot avoid to read or write.
        arithmetic: whose ceiling the operations are held against.
    """

    case: str
    kernel: str
    fidelity: str
    size: str
    n: int
    rows: int
    call: Callable[[int], object]
    copies: int
    check: Callable[[], float] | None
    nbytes: float
    operations: float = 0.0
    arithmetic: str = "bf16"


class Jobs:
    """All jobs of one platform.

    Args:
        kernels: beginnings of the names of the kernels that are wanted; none: all.
        timed:   weights are copied, so that calls find none of them in a cache.
    """

    def __init__(self, platform: Platform, sizes: Sizes, kernels: list[str], timed: bool) -> None:
        self.platform, self.sizes, self.kernels, self.timed = platform, sizes, kernels, timed
        self.device = torch.device(platform.device_type)

    def of(self, case: str) -> Iterator[Job]:
        """The jobs of one case, kernel by kernel."""
        if case in CASES:
            yield from self.linears(case)
            yield from self.alone(case)
        elif case in EXPERTS:
            yield from self.experts(case)
        else:
            yield from {"hadamard": self._hadamards, "quantize": self._quantizations, "attention": self._attentions}[case]()

    def taking(self, problem: Problem) -> list[Kernel]:
        """Kernels that run the problem and that were asked for, without the floor."""
        return [kernel for kernel in self._wanted(problem) if kernel.refusal(problem) is None]

    def _wanted(self, problem: Problem) -> list[Kernel]:
        found = [kernel for kernel in candidates(problem.operation, self.platform.key) if not kernel.name.startswith("reference.")]
        return [kernel for kernel in found if self.wanted(kernel.name)]

    def _each(self, case: str, problem: Problem, make: Callable[[Kernel], Iterator[Job]]) -> Iterator[Job]:
        """The jobs of every kernel that takes the problem; what one raises while it is prepared is a job that raises it."""
        for kernel in self._wanted(problem):
            try:
                if kernel.refusal(problem) is None:
                    yield from make(kernel)
            except Exception as error:  # the others are to be measured still
                yield Job(case, kernel.name, "", "", 0, 0, turned_none, 1, partial(raised, error), 0)

    def linears(self, case: str) -> Iterator[Job]:
        spec, stored = CASES[case]
        activation = sample_activation(stored)
        for n, k in self.sizes.shapes:
            problem = LinearProblem(spec, activation.without_values(), n, k, "bfloat16")
            weight = sample_weight(spec, n, k).map_tensors(lambda t: t.to(self.device))
            yield from self._each(case, problem, partial(self._rows, case, problem, weight, activation))

    def _rows(self, case: str, problem: LinearProblem, weight: Weight, activation: ActivationSpec, kernel: Kernel) -> Iterator[Job]:
        n, k = problem.n, problem.k
        held = [kernel.prepare(weight, activation)]
        arithmetic = "int8" if activation.is_integer else "bf16" if activation.is_none else "fp8"
        for rows in self.sizes.rows:
            x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16().to(self.device)
            wanted = 1 if not self.timed or rows > 64 else max(1, min(64, WORKING_SET // held[0].nbytes))
            while len(held) < wanted:
                held.append(kernel.prepare(weight.map_tensors(torch.clone), activation))

            def call(turn: int, x: Tensor = x) -> Tensor:
                y: Tensor = kernel.apply(x, held[turn], None)
                return y

            def check(x: Tensor = x) -> float:
                return self._linear_error(kernel, problem, x, weight, activation, held[0])

            yield Job(case, kernel.name, kernel.fidelity(problem).value, f"{n}x{k}", n, rows, call, wanted, check, held[0].nbytes + 2.0 * rows * (n + k), 2.0 * rows * n * k, arithmetic)

    def _linear_error(self, kernel: Kernel, problem: LinearProblem, x: Tensor, weight: Weight, activation: ActivationSpec, prepared: Prepared) -> float:
        want = activation.fake_quantize(x).double() @ weight.dequantize().double().T
        got = kernel.apply(x, prepared, None).double()
        return float(((got - want).abs().amax(1) / want.abs().amax(1)).max()) / allowed(problem.dtype, kernel.fidelity(problem).value)

    def experts(self, case: str) -> Iterator[Job]:
        spec, stored = EXPERTS[case]
        count, hidden, size, _ = self.sizes.experts
        problem = ExpertsProblem(spec, spec, stored.without_values(), stored.without_values(), count, hidden, size, "silu", False, "bfloat16")
        yield from self._each(case, problem, partial(self._layer, case, problem))

    def _layer(self, case: str, problem: ExpertsProblem, kernel: Kernel) -> Iterator[Job]:
        """One layer of experts for one kernel, and for the floor, which it is held against."""
        floor, per_token = ReferenceExperts(), self.sizes.experts[3]
        ours, defined = [], []
        for index in range(problem.count):
            gate_up, down, *rest = sample_expert(problem, index)
            moved = [w.map_tensors(lambda t: t.to(self.device)) for w in (gate_up, down)]
            ours.append(kernel.prepare(*moved, *rest))
            defined.append(floor.prepare(*moved, *rest))
        prepared, reference = kernel.assemble(ours, join_of(problem)), floor.assemble(defined, join_of(problem))
        fidelity = kernel.fidelity(problem).value
        for tokens in self.sizes.rows:
            x = torch.randn(tokens, problem.hidden, generator=torch.Generator().manual_seed(tokens)).bfloat16().to(self.device)
            weight, chosen = (t.to(self.device) for t in sample_routing(tokens, problem.count, per_token))
            run, define = partial(kernel.apply, x, weight.bfloat16(), chosen, prepared), partial(floor.apply, x, weight.bfloat16(), chosen, reference)
            touched = int(chosen.unique().numel()) * ours[0].nbytes
            operations = 6.0 * problem.hidden * problem.size * per_token * tokens
            shape = f"{problem.count}x{problem.size}x{problem.hidden}"
            check = partial(apart, run, define, allowed_of_experts(problem, fidelity)[1])
            yield Job(case, kernel.name, fidelity, shape, 0, tokens, partial(turned, run), 1, check, touched, operations)

    def alone(self, case: str) -> Iterator[Job]:
        """torch's own products of the case's codes, without quantizing, scales of rows or bias: what no kernel over them can beat."""
        dtypes = {"W8A8 token": torch.int8, "FP8 tensor": torch.float8_e4m3fn}
        if not self.timed or case not in dtypes or not self.wanted("torch."):
            return
        one = torch.ones((), device=self.device)
        for n, k in self.sizes.shapes:
            for rows in [max(r, 17) for r in self.sizes.rows]:
                copies = max(1, min(32, WORKING_SET // (n * k))) if rows <= 64 else 1
                x = torch.randn(rows, k, device=self.device).to(dtypes[case])
                weights = [torch.randn(n, k, device=self.device).to(dtypes[case]) for _ in range(copies)]
                if dtypes[case] is torch.int8:
                    name, call = "(torch._int_mm)", lambda turn, x=x, w=weights: torch._int_mm(x, w[turn].t())
                else:
                    name, call = "(torch._scaled_mm)", lambda turn, x=x, w=weights: torch._scaled_mm(x, w[turn].t(), one, one, out_dtype=torch.bfloat16)
                moved = n * k + rows * k + (4.0 if dtypes[case] is torch.int8 else 2.0) * rows * n
                yield Job(case, name, "", f"{n}x{k}", n, rows, call, copies, None, moved, 2.0 * rows * n * k, "int8" if dtypes[case] is torch.int8 else "fp8")

    def wanted(self, name: str) -> bool:
        return not self.kernels or any(name.startswith(start) for start in self.kernels)

    def _hadamards(self) -> Iterator[Job]:
        for size, order in self.sizes.hadamard:
            problem = HadamardProblem(size, order, "bfloat16")
            yield from self._each("hadamard", problem, partial(self._hadamard, problem))

    def _hadamard(self, problem: HadamardProblem, kernel: Kernel) -> Iterator[Job]:
        size, order = problem.size, problem.order
        base = None if order == 1 else torch.randint(0, 2, (order, order), generator=torch.Generator().manual_seed(0)).float().to(self.device) * 2 - 1
        transform = Hadamard(size, base, size**-0.5)
        prepared = kernel.prepare(transform)
        for rows in self.sizes.rows:
            x = torch.randn(rows, size, generator=torch.Generator().manual_seed(rows)).bfloat16().to(self.device)
            run, define = partial(kernel.apply, x, prepared), partial(transform.apply, x.double())
            check = partial(apart, run, define, 2 * allowed("bfloat16", "exact"))
            yield Job("hadamard", kernel.name, kernel.fidelity(problem).value, f"{size} base {order}", 0, rows, partial(turned, run), 1, check, 4.0 * x.numel())

    def _quantizations(self) -> Iterator[Job]:
        if availability.missing(self.platform.key):
            return
        from bitgrain.kernels.triton.activation_quantization import quantize

        k = self.sizes.shapes[0][1]
        for name, stored in (("int8 token", INT8), ("fp8 token", FP8), ("fp8 g128", CASES["FP8 block"][1]), ("mxfp4", MXFP4), ("nvfp4", NVFP4)):
            spec = sample_activation(stored)
            for rows in self.sizes.rows:
                x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).bfloat16().to(self.device)

                def check(x: Tensor = x, spec: ActivationSpec = spec) -> float:
                    same = all(torch.equal(a.float(), b.float().expand_as(a)) for a, b in zip(quantize(spec, x), spec.quantize(x), strict=True))
                    return 0.0 if same else float("inf")

                yield Job(f"quantize {name}", "triton.activation_quantization", "exact", str(k), 0, rows, lambda turn, x=x, spec=spec: quantize(spec, x), 1, check, 3.0 * x.numel())

    def _attentions(self) -> Iterator[Job]:
        problem = StepProblem("attention", self.sizes.attention[3], "bfloat16")
        yield from self._each("attention", problem, partial(self._attention, problem))

    def _attention(self, problem: StepProblem, kernel: Kernel) -> Iterator[Job]:
        (tokens, heads, groups, size), floor = self.sizes.attention, ReferenceAttention()
        for rows in [r for r in self.sizes.rows if r <= tokens]:
            shapes = ((rows, heads), (tokens, groups), (tokens, groups))
            inputs = [torch.randn(t, h, size, generator=torch.Generator().manual_seed(t + place)).bfloat16().to(self.device) for place, (t, h) in enumerate(shapes)]
            run, define = (partial(k.apply, *given, None, None, None, None) for k, given in ((kernel, inputs), (floor, [t.float() for t in inputs])))
            moved, operations = 4.0 * (inputs[0].numel() + inputs[1].numel()), 4.0 * rows * heads * size * tokens
            check = partial(apart, run, define, 2 * allowed("bfloat16", "exact"))
            yield Job("attention", kernel.name, kernel.fidelity(problem).value, f"{tokens}x{groups}x{size}", 0, rows, partial(turned, run), 1, check, moved, operations)


def raised(error: Exception) -> float:
    raise error


def turned_none(turn: int) -> None:
    """Nothing to call."""


def turned(run: Callable[[], object], turn: int) -> object:
    """A call that has no copies to choose from."""
    return run()


def apart(run: Callable[[], Tensor], define: Callable[[], Tensor], least: float) -> float:
    """The largest difference of a result from its definition, relative to the largest entry, over what is allowed."""
    got, want = run().double(), define().double()
    return float((got - want).abs().max() / want.abs().max()) / least
