"""Exact-match accuracy of the bundled checkpoints on the 500 held-out problems, through bitgrain's own engine and kernels.

    python benchmarks/accuracy.py [--limit 500 --json]
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import bitgrain
from bitgrain.bundled import models


def final_number(text: str) -> str:
    """The last whole number in a text; empty if there is none."""
    numbers = re.findall(r"-?\d+", text)
    return numbers[-1] if numbers else ""


def accuracy(folder: Path, problems: list[dict[str, str]]) -> dict[str, object]:
    """Percent of problems whose final number is right, greedy; and the kernels that ran."""
    with bitgrain.LLM(folder) as llm:
        done = llm.generate([p["problem"] for p in problems], bitgrain.SamplingParams(max_tokens=160, temperature=0))
        right = sum(final_number(c.text) == p["answer"] for c, p in zip(done, problems, strict=True))
        kernels = sorted({s.kernel.name for s in llm.model.selections.values()})
    return {"percent": round(100 * right / len(problems), 2), "problems": len(problems), "kernels": kernels, "plan": llm.model.plan.hash}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=500, help="problems to ask (default: all 500)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    lines = (Path(bitgrain.__file__).parent / "bundled" / "heldout.jsonl").read_text().splitlines()[: args.limit]
    problems = [json.loads(line) for line in lines]
    results = {name: accuracy(folder, problems) for name, folder in models().items()}
    if args.json:
        print(json.dumps(results))
        return
    for name, row in results.items():
        print(f"{name:18s} {row['percent']:6.2f} % of {row['problems']}  ({', '.join(row['kernels'])})")


if __name__ == "__main__":
    main()
