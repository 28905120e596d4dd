"""One layer of experts in the shape of Qwen3-MoE: share of this machine's read rate (few tokens) and of its arithmetic (many).

    python benchmarks/experts.py [--format int4 fp8 w8a8 mxfp4 --tokens 1 8 64 512 --json]

"of read" is bytes of the experts that were touched, over time, against the read rate taken right before and after; "of
arithmetic" is multiplications and additions over time against the rate of fused float32 multiplications and additions of the
instruction set in use, taken likewise.  Tokens choose experts at random, anew in each call, and one layer is larger than the
caches.  Calls of the ways that are compared alternate; times are medians, and minima in brackets.

Compared: a linear kernel per matrix and expert; llama.cpp's gathered products, where BITGRAIN_GGML names its shared library
libggml-cpu.so (Q4_0: 4.5 bits per weight, activations rounded to 8 bits); and, where zentorch is installed, the product that vLLM
gives experts on such a machine (bf16, and W8A8 as its weights are).  vLLM 0.32 has four-bit experts for AMX machines only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bitgrain.kernels.base import ExpertsProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.reference.experts import rows_of_experts
from bitgrain.kernels.samples import join_of, sample_expert
from bitgrain.kernels.selection import Policy, select
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, WeightSpec
from bitgrain.weights.block_float import block_float_spec

HIDDEN, SIZE, COUNT, PER_TOKEN = 2048, 768, 128, 8
FORMATS = {
    "int4": (WeightSpec("int_affine", "uint4", 4, "group", 128, zero="constant", scale_dtype="bfloat16"), NO_ACTIVATION),
    "int4-asym": (WeightSpec("int_affine", "uint4", 4, "group", 128, zero="integer", scale_dtype="bfloat16"), NO_ACTIVATION),
    "fp8": (WeightSpec("float", "fp8_e4m3fn", 8, "block", block=(128, 128), scale_dtype="float32"), NO_ACTIVATION),
    "w8a8": (WeightSpec("int_affine", "uint8", 8, "channel", zero="constant", scale_dtype="bfloat16"), ActivationSpec("int8", "token", top=127.0)),
    "mxfp4": (block_float_spec("fp4_e2m1", 32, "e8m0"), NO_ACTIVATION),
}
READ_BYTES = 400_000_000


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Limits:
    """What this machine does at best at this moment: bytes read and float32 operations, per second."""

    def __init__(self) -> None:
        self.data = torch.ones(READ_BYTES // 4)
        side = 1024
        self.square = torch.randn(side, side)
        self.operations = 2.0 * side**3

    def read(self) -> float:
        return READ_BYTES / min(seconds(self.data.sum) for _ in range(3))

    def arithmetic(self) -> float:
        """torch's float32 product of two squares that the caches hold: the fused operations of the machine, within a few percent."""
        return self.operations / min(seconds(lambda: self.square @ self.square) for _ in range(5))


class Layer:
    """The experts of one layer for one kernel of experts, and for linear kernels one by one."""

    def __init__(self, name: str, count: int) -> None:
        spec, activation = FORMATS[name]
        self.problem = ExpertsProblem(spec, spec, activation, activation, count, HIDDEN, SIZE, "silu", False, "bfloat16")
        policy = Policy(self_test=False)
        self.kernel = select(self.problem, "cpu", policy).kernel
        self.linears = [select(linear, "cpu", policy).kernel for linear in self.problem.linears]
        self.join = join_of(self.problem)
        experts, self.parts = [], []
        for index in range(count):
            gate_up, down, first, second, _, _ = sample_expert(self.problem, index)
            experts.append(self.kernel.prepare(gate_up, down, first, second, None, None))
            self.parts.append((self.linears[0].prepare(gate_up, first), self.linears[1].prepare(down, second)))
        self.prepared = self.kernel.assemble(experts, self.join)
        self.expert_bytes = experts[0].nbytes

    def together(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        y: Tensor = self.kernel.apply(x, weight, chosen, self.prepared)
        return y

    def one_by_one(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, rows, places in rows_of_experts(chosen):
            gate, up = self.linears[0].apply(x[rows], self.parts[index][0], None).chunk(2, -1)
            y = self.linears[1].apply(self.join(gate, up), self.parts[index][1], None)
            out.index_add_(0, rows, y * weight[rows, places, None])
        return out


def routing(tokens: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, count, generator=generator).argsort(1)[:, :PER_TOKEN].contiguous()
    return torch.rand(tokens, PER_TOKEN, generator=generator).softmax(-1).bfloat16(), chosen


def measure(name: str, layer: Layer, tokens: int, repeats: int, limits: Limits) -> dict[str, object]:
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    calls = {"experts": layer.together, "linears": layer.one_by_one}
    times: dict[str, list[float]] = {key: [] for key in calls}
    touched = []
    read, arithmetic = [limits.read()], [limits.arithmetic()]
    for turn in range(repeats + 2):
        weight, chosen = routing(tokens, layer.problem.count, turn)
        touched.append(chosen.unique().numel() * layer.expert_bytes)
        for key, call in calls.items():
            # an odd routing for one, an even one for the other: neither finds the other's experts in the caches
            again = routing(tokens, layer.problem.count, 1000 + turn) if key == "linears" else (weight, chosen)
            times[key].append(seconds(lambda call=call, again=again: call(x, *again)))
    read.append(limits.read())
    arithmetic.append(limits.arithmetic())
    ours, best = statistics.median(times["experts"][2:]), min(times["experts"][2:])
    operations = 2.0 * 3 * HIDDEN * SIZE * PER_TOKEN * tokens
    size = statistics.median(touched[2:])
    return {
        "format": name, "kernel": layer.kernel.name, "tokens": tokens, "us": round(ours * 1e6), "best_us": round(best * 1e6),
        "GB_per_s": round(size / ours / 1e9, 1), "of_read": round(size / ours / statistics.mean(read), 3), "best_of_read": round(size / best / max(read), 3),
        "GFLOP_per_s": round(operations / ours / 1e9, 1), "of_arithmetic": round(operations / ours / statistics.mean(arithmetic), 3),
        "best_of_arithmetic": round(operations / best / max(arithmetic), 3),
        "linears_us": round(statistics.median(times["linears"][2:]) * 1e6), "read_GB_per_s": [round(r / 1e9, 1) for r in read],
        "arithmetic_GFLOP_per_s": [round(a / 1e9, 1) for a in arithmetic],
    }  # fmt: skip


def llama_experts(tokens: int, repeats: int, count: int) -> dict[str, object] | None:
    """llama.cpp's gathered products of Q4_0 experts, where its library is named."""
    path = os.environ.get("BITGRAIN_GGML")
    if not path:
        return None
    ggml = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return GgmlExperts(ggml, count).measure(tokens, repeats)


class GgmlExperts:
    """The same layer as a ggml graph: gate, up, silu and product, down; router weights are left out."""

    Q4_0, F32, I32 = 2, 0, 26

    def __init__(self, ggml: ctypes.CDLL, count: int) -> None:
        self.ggml, self.count = ggml, count
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for name, result, arguments in (
            ("ggml_init", pointer, [self.Parameters]), ("ggml_free", None, [pointer]), ("ggml_new_graph", pointer, [pointer]),
            ("ggml_new_tensor_3d", pointer, [pointer, ctypes.c_int, *[ctypes.c_int64] * 3]), ("ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, *[ctypes.c_int64] * 2]),
            ("ggml_mul_mat_id", pointer, [pointer] * 4), ("ggml_silu", pointer, [pointer] * 2), ("ggml_mul", pointer, [pointer] * 3),
            ("ggml_build_forward_expand", None, [pointer] * 2), ("ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
            ("ggml_get_data", pointer, [pointer]), ("ggml_nbytes", size, [pointer]),
        ):  # fmt: skip
            function = getattr(ggml, name)
            function.restype, function.argtypes = result, arguments

    class Parameters(ctypes.Structure):
        _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    def measure(self, tokens: int, repeats: int) -> dict[str, object]:
        g = self.ggml
        context = g.ggml_init(self.Parameters(900_000_000 + tokens * 2_000_000, None, False))
        experts = [g.ggml_new_tensor_3d(context, self.Q4_0, k, n, self.count) for k, n in ((HIDDEN, SIZE), (HIDDEN, SIZE), (SIZE, HIDDEN))]
        for tensor in experts:
            ctypes.memset(g.ggml_get_data(tensor), 0x11, g.ggml_nbytes(tensor))
        x = g.ggml_new_tensor_3d(context, self.F32, HIDDEN, 1, tokens)
        ctypes.memset(g.ggml_get_data(x), 0, g.ggml_nbytes(x))
        chosen = g.ggml_new_tensor_2d(context, self.I32, PER_TOKEN, tokens)
        gate, up = (g.ggml_mul_mat_id(context, matrix, x, chosen) for matrix in experts[:2])
        down = g.ggml_mul_mat_id(context, experts[2], g.ggml_mul(context, g.ggml_silu(context, gate), up), chosen)
        graph = g.ggml_new_graph(context)
        g.ggml_build_forward_expand(graph, down)
        times = []
        for turn in range(repeats + 2):
            index = routing(tokens, self.count, turn)[1].to(torch.int32)
            ctypes.memmove(g.ggml_get_data(chosen), index.data_ptr(), index.numel() * 4)
            times.append(seconds(lambda: g.ggml_graph_compute_with_ctx(context, graph, torch.get_num_threads())))
        g.ggml_free(context)
        return {"way": "llama.cpp Q4_0", "tokens": tokens, "us": round(statistics.median(times[2:]) * 1e6), "best_us": round(min(times[2:]) * 1e6)}


def zentorch_experts(tokens: int, repeats: int, count: int, quantized: bool) -> dict[str, object] | None:
    """The product of experts that vLLM 0.32 calls where zentorch is installed (vllm/model_executor/layers/fused_moe/experts/cpu_moe.py)."""
    try:
        import zentorch  # noqa: F401
    except ImportError:
        return None
    shapes = ((count, 2 * SIZE, HIDDEN), (count, HIDDEN, SIZE))
    scales: tuple[Tensor, ...] = ()
    if quantized:
        matrices = [torch.randint(-127, 128, shape, dtype=torch.int8) for shape in shapes]
        scales = tuple(torch.full(shape[:2], 1e-3) for shape in shapes)
    else:
        matrices = [torch.full(shape, 0.01, dtype=torch.bfloat16) for shape in shapes]
    x, times, way = torch.randn(tokens, HIDDEN).bfloat16(), [], f"vLLM (zentorch) {'w8a8' if quantized else 'bf16'}"
    out = torch.empty_like(x)
    for turn in range(repeats + 2):
        weight, chosen = routing(tokens, count, turn)
        given = (out, x, *matrices, None, None, weight.float(), chosen.to(torch.int32), False, "silu", *scales)
        try:
            times.append(seconds(lambda given=given: torch.ops.zentorch.zentorch_fused_moe(*given)))
        except RuntimeError as error:
            return {"way": way, "tokens": tokens, "refused": str(error).splitlines()[0]}
    return {"way": way, "tokens": tokens, "us": round(statistics.median(times[2:]) * 1e6), "best_us": round(min(times[2:]) * 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["int4"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--experts", type=int, default=COUNT)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    load, limits = os.getloadavg()[0], Limits()
    record = {"instruction_set": library.instruction_set(), "threads": torch.get_num_threads(), "load_before": load, "hidden": HIDDEN, "size": SIZE, "experts": args.experts}
    results = []
    for name in args.format:
        layer = Layer(name, args.experts)
        results += [measure(name, layer, tokens, args.repeats, limits) for tokens in args.tokens]
        del layer
    peers = [llama_experts, lambda *a: zentorch_experts(*a, quantized=True), lambda *a: zentorch_experts(*a, quantized=False)]
    others = [found for peer in peers for tokens in args.tokens if (found := peer(tokens, args.repeats, args.experts)) is not None]
    if args.json:
        print(json.dumps({**record, "results": results, "others": others}))
        return
    print(record)
    for row in results:
        print(
            f"{row['format']:10s} {row['kernel']:12s} tokens {row['tokens']:4d}  {row['us']:9d} us [{row['best_us']}]  linears {row['linears_us']:9d} us  "
            f"{row['GB_per_s']:6.1f} GB/s, {row['of_read']:.0%} [{row['best_of_read']:.0%}] of read  "
            f"{row['GFLOP_per_s']:7.1f} GFLOP/s, {row['of_arithmetic']:.0%} [{row['best_of_arithmetic']:.0%}] of arithmetic"
        )
    for row in others:
        said = f"{row['us']:9d} us [{row['best_us']}]" if "us" in row else f"does not run here: {row['refused']}"
        print(f"{row['way']:23s} tokens {row['tokens']:4d}  {said}")


if __name__ == "__main__":
    main()
