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

from bitgrain.inspect.matrix import matrix_page, problems_of, schemes, support_matrix
from bitgrain.inspect.run_records import record_key, run_records
from bitgrain.kernels.base import EmbeddingProblem
from bitgrain.kernels.cpu import library
from bitgrain.kernels.selection import Policy, select
from bitgrain.platforms.probe import default_platform
from bitgrain.weights.synthetic import sample_activation, sample_weight

ROOT = Path(__file__).resolve().parents[1]
ROWS = 5
# of the largest output of a row: one rounding to bfloat16, and float32 summation
TOLERANCE = 6e-3


def hardware() -> str:
    """The processor's name and the instruction set in use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{name} ({'no native library' if library.missing() else library.instruction_set()})"


def difference(problem, kernel) -> float:
    """The largest difference from the float64 definition, relative to the largest output of its row."""
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


def run_all(platform: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(records of what agreed, what did not)."""
    stamp = {"date": datetime.date.today().isoformat(), "hardware": hardware(), "torch": torch.__version__}
    records, wrong = {}, []
    for _, _, embeddings, _, weight, activation in schemes():
        for problem in problems_of(weight, activation, "bfloat16", embeddings).values():
            selection = select(problem, platform, Policy(self_test=False))
            key = record_key(problem, platform, selection.kernel.name)
            if key in records:
                continue
            worst = difference(problem, selection.kernel)
            if worst <= TOLERANCE:
                records[key] = stamp
            else:
                wrong.append(f"{key}: {worst:.2g} of the largest output (allowed {TOLERANCE:g})")
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
