"""Run every cell of the support matrix on this machine, record what agreed with the definition, and write the page.

Usage: support_matrix.py [--page-only]

Records go to src/bitgrain/bundled/last_run.json, those of other platforms are kept; the page is docs/support-matrix.md.
A cell that does not agree fails the run and is not recorded.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import torch

from bitgrain.inspect.matrix import choices, matrix_page, schemes, support_matrix
from bitgrain.inspect.run_records import record_key, run_records
from bitgrain.kernels.base import EmbeddingProblem, ExpertsProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.samples import join_of, sample_expert, sample_experts, sample_routing
from bitgrain.platforms.probe import default_platform
from bitgrain.weights.synthetic import sample_activation, sample_weight

ROOT = Path(__file__).resolve().parents[1]
ROWS = 5
# of the largest output of a row: one rounding to bfloat16, and float32 summation
TOLERANCE = 6e-3
# experts: two products, a join and a sum; half a code's step where a value between the products is quantized
EXPERTS_FACTOR, STEPS = 4, {8: 1 / 16, 6: 1 / 8, 4: 1 / 3}


def allowed(problem) -> float:
    """How far a kernel may be from the definition."""
    if not isinstance(problem, ExpertsProblem):
        return TOLERANCE
    return EXPERTS_FACTOR * TOLERANCE + STEPS.get(problem.down_activation.bits, 0.0) / 2


def hardware() -> str:
    """The processor's name and the instruction set in use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name} ({'no native library' if library.missing() else library.instruction_set()})"


def difference(problem, kernel) -> float:
    """The largest difference from the float64 definition, relative to the largest output of its row."""
    if isinstance(problem, ExpertsProblem):
        return experts_difference(problem, kernel)
    weight = sample_weight(problem.weight, problem.n, problem.k)
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, problem.dtype)
    if isinstance(problem, EmbeddingProblem):
        index = torch.randint(0, problem.n, (ROWS,), generator=generator)
        got, want = kernel.apply(index, kernel.prepare(weight, problem.activation), dtype), weight.dequantize()[index].double()
    else:
        activation = sample_activation(problem.activation)
        x = torch.randn(ROWS, problem.k, generator=generator).to(dtype)
        got = kernel.apply(x, kernel.prepare(weight, activation), None)
        want = activation.fake_quantize(x).double() @ weight.dequantize().double().t()
    return float(((got.double() - want).abs() / want.abs().amax(1, keepdim=True)).max())


def experts_difference(problem, kernel) -> float:
    """As difference(), relative to the largest term of the row."""
    dtype = getattr(torch, problem.dtype)
    x = torch.randn(ROWS, problem.hidden, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight, chosen = sample_routing(ROWS, problem.count, 2)
    got = kernel.apply(x, weight.to(dtype), chosen, sample_experts(kernel, problem)).double()
    want, size = torch.zeros_like(got), torch.zeros(ROWS, 1, dtype=torch.float64)
    for index in range(problem.count):
        rows, places = (chosen == index).nonzero(as_tuple=True)
        gate_up, down, first, second, _, _ = sample_expert(problem, index)
        gate, up = (first.fake_quantize(x[rows]).double() @ gate_up.dequantize().double().t()).to(dtype).chunk(2, dim=-1)
        part = second.fake_quantize(join_of(problem)(gate, up)).double() @ down.dequantize().double().t() * weight[rows, places, None].to(dtype).double()
        want[rows] += part
        size[rows] = torch.maximum(size[rows], part.abs().amax(1, keepdim=True))
    return float(((got - want).abs() / size).max())


def run_all(platform: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(records of what agreed, what did not)."""
    stamp = {"date": datetime.date.today().isoformat(), "hardware": hardware(), "torch": torch.__version__}
    records, wrong = {}, []
    for _, _, embeddings, _, weight, activation in schemes():
        for problem, selection in choices(weight, activation, "bfloat16", embeddings, platform).values():
            if selection is None or (key := record_key(problem, platform, selection.kernel.name)) in records:
                continue
            worst = difference(problem, selection.kernel)
            if worst <= allowed(problem):
                records[key] = stamp
            else:
                wrong.append(f"{key}: {worst:.2g} of the largest output (allowed {allowed(problem):g})")
    return records, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-only", action="store_true", help="write the page from the records as they are")
    wrong: list[str] = []
    if not parser.parse_args().page_only:
        platform = default_platform().key
        records, wrong = run_all(platform)
        kept = {key: record for key, record in run_records().items() if not key.startswith(f"{platform} ")}
        text = json.dumps(dict(sorted({**kept, **records}.items())), indent=1)
        (ROOT / "src" / "bitgrain" / "bundled" / "last_run.json").write_text(text + "\n")
        run_records.cache_clear()
        print(f"{len(records)} cells agree on {platform}")
    (ROOT / "docs" / "support-matrix.md").write_text(matrix_page(support_matrix()))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
