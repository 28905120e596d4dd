"""bitgrain and the peers that are installed, on the same weights, taking turns: tokens per second, and what they are of the limits.

    python benchmarks/compare_models.py FOLDER --shape 1b --llama-bin BIN [--openvino PYTHON]
    python benchmarks/compare.py FOLDER --llama-bin BIN --vllm PYTHON --openvino PYTHON [--rounds 3 --json]

Each system runs in a process of its own and holds its model; only the one that is measured computes.  Decode is of --new tokens
behind prompts of 32, the time of the prompts subtracted (llama.cpp: as its own programs measure it); prefill of one prompt of 512.
Figures are medians of all rounds.  "of read" is the share of the read rate, measured right before and after, at which the bytes
of a step were streamed: of all matrices but the embedding.  "of best" is against the best peer in the same weights' width, and
"by bytes" the same for bytes per second, since heads are kept in different types.  vLLM runs without and, if its environment
has it, with zentorch; with --compile also compiled.  What is not installed or fails is listed with its reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bitgrain import open_checkpoint
from bitgrain.bench.limits import Machine

HERE = Path(__file__).resolve().parent
PROMPT = 32


class Failed(Exception):
    """A system that does not run, with the reason."""


class Process:
    """compare_peer.py with one system; see there."""

    def __init__(self, python: Path, words: list[str], threads: int, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, HERE / "compare_peer.py", *words, "--threads", str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
            )  # fmt: skip
        self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = [text for text in self.log.read_text(errors="replace").splitlines() if text.strip()]
            raise Failed(f"stopped with status {self.process.returncode}: {said[-1][:200] if said else 'nothing said'} (see {self.log})")
        found: dict[str, float] = json.loads(line)
        return found

    def seconds(self, sequences: int, prompt: int, new: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"sequences": sequences, "prompt": prompt, "new": new}) + "\n")
        self.process.stdin.flush()
        return self.answer()["seconds"]

    def rate(self, what: str, count: int, new: int) -> float:
        """Tokens per second of a workload."""
        if what == "prefill":
            return count / self.seconds(1, count, 1)
        return count * (new - 1) / (self.seconds(count, PROMPT, new) - self.seconds(count, PROMPT, 1))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class LlamaCpp:
    """llama.cpp's own programs, started anew for each figure."""

    def __init__(self, folder: Path, model: Path, threads: int) -> None:
        for needed in (folder / "llama-bench", folder / "llama-batched-bench", model):
            if not needed.exists():
                raise Failed(f"{needed} is not there")
        self.folder, self.model, self.threads = folder, model, threads

    def _run(self, program: str, *words: str) -> str:
        environment = {**os.environ, "LD_LIBRARY_PATH": f"{self.folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
        done = subprocess.run([self.folder / program, "-m", self.model, "-t", str(self.threads), *words], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise Failed(f"{program}: {done.stderr.strip().splitlines()[-1:]}")
        return done.stdout

    def rate(self, what: str, count: int, new: int) -> float:
        if what == "decode" and count > 1:
            table = self._run("llama-batched-bench", "-c", str(max(4096, 2 * count * (PROMPT + new))), "-b", "2048", "-ub", "512", "-npp", str(PROMPT), "-ntg", str(new), "-npl", str(count))
            rows = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in table.splitlines() if re.match(r"\|\s*\d", line)]
            if not rows:
                raise Failed(f"llama-batched-bench printed no row: {table.strip()[-200:]}")
            return float(rows[-1][7])  # S_TG t/s
        asked = ["-p", str(count), "-n", "0"] if what == "prefill" else ["-p", "0", "-n", str(new)]
        return float(json.loads(self._run("llama-bench", *asked, "-r", "1", "-o", "json"))[0]["avg_ts"])

    def close(self) -> None:
        pass


def step_bytes(path: Path) -> int:
    """Stored bytes that one decode step reads."""
    rows = open_checkpoint(path).plan.modules.values()
    return sum(row.nbytes for row in rows if row.kind.value != "embedding")


def systems(args: argparse.Namespace) -> tuple[dict[str, tuple[int, int, Callable[[], Process | LlamaCpp]]], dict[str, str]]:
    """(name to (bits of its weights, bytes of a step, how to start it), name to why it is absent)."""
    absent: dict[str, str] = {}
    found: dict[str, tuple[int, int, Callable[[], Process | LlamaCpp]]] = {}
    sizes = {form: step_bytes(args.folder / form) for form in ("bf16", "w4", "w8a8")}
    args.logs.mkdir(parents=True, exist_ok=True)

    def own(name: str, python: Path, bits: int, form: str, *words: str, **environment: str) -> None:
        model = args.folder / form
        log = args.logs / f"{name.replace(' ', '-')}.log"
        nbytes = sizes.get(form) or sum(path.stat().st_size for path in model.glob("openvino_model.bin"))
        found[name] = bits, nbytes, lambda: Process(python, [words[0], str(model), *words[1:]], args.threads, log, environment)

    here = Path(sys.executable)
    own("bitgrain w4 exact", here, 4, "w4", "bitgrain")
    own("bitgrain w4 fast", here, 4, "w4", "bitgrain", "--fidelity", "fast")
    own("bitgrain w8a8", here, 8, "w8a8", "bitgrain")
    if importlib.util.find_spec("transformers"):
        own("torch bf16", here, 16, "bf16", "transformers")
    else:
        absent["torch bf16"] = "the package transformers is not installed"
    for bits, kind in ((4, "Q4_0"), (8, "Q8_0")):
        name, model = f"llama.cpp {kind}", args.folder / f"{kind}.gguf"
        if args.llama_bin and model.exists():
            found[name] = bits, step_bytes(model), lambda model=model: LlamaCpp(args.llama_bin, model, args.threads)
        else:
            absent[name] = f"{model} is not there" if args.llama_bin else "no --llama-bin"
    if args.vllm:
        has = subprocess.run([args.vllm, "-c", "import importlib.util as u; print(u.find_spec('zentorch') is not None)"], capture_output=True, text=True).stdout.strip() == "True"
        for form, bits in (("w4", 4), ("w8a8", 8)):
            for compiled in (False, True) if args.compile else (False,):
                words, mark = ["vllm", *(["--compile"] if compiled else [])], " compiled" if compiled else ""
                own(f"vllm {form}{mark}", args.vllm, bits, form, *words, VLLM_PLUGINS="none")
                if has:
                    own(f"vllm+zentorch {form}{mark}", args.vllm, bits, form, *words)
        if not has:
            absent["vllm+zentorch"] = "zentorch is not in vLLM's environment"
    else:
        absent["vllm"] = "no --vllm"
    for bits in (4, 8):
        if args.openvino and (args.folder / f"ov-int{bits}" / "openvino_model.bin").exists():
            own(f"openvino int{bits}", args.openvino, bits, f"ov-int{bits}", "openvino")
        else:
            absent[f"openvino int{bits}"] = f"{args.folder / f'ov-int{bits}'} is not there" if args.openvino else "no --openvino"
    return {name: entry for name, entry in found.items() if not args.only or any(part in name for part in args.only)}, absent


def measure(args: argparse.Namespace) -> dict[str, object]:
    chosen, absent = systems(args)
    workloads = [("decode", count) for count in args.sequences] + [("prefill", tokens) for tokens in args.tokens]
    machine, running = Machine(), {}
    taken: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    try:
        for name, (_, _, start) in chosen.items():
            try:
                running[name] = start()
                running[name].rate("decode", 1, 3)
            except Failed as error:
                absent[name] = str(error)
        for turn in range(args.rounds):
            for what, count in workloads:
                for name in [*running][:: 1 if turn % 2 == 0 else -1]:
                    if name in absent:
                        continue
                    before = machine.read()
                    try:
                        rate = running[name].rate(what, count, args.new)
                    except Failed as error:
                        absent[name] = str(error)
                        continue
                    taken.setdefault((name, what, count), []).append((rate, (before + machine.read()) / 2))
    finally:
        for system in running.values():
            system.close()
    return {"results": list(rows(chosen, taken)), "absent": absent}


def rows(chosen: dict, taken: dict[tuple[str, str, int], list[tuple[float, float]]]):
    """One dictionary per system and workload."""
    rate = {key: statistics.median(r for r, _ in turns) for key, turns in taken.items()}
    for (name, what, count), turns in taken.items():
        bits, nbytes, _ = chosen[name]
        peers = [key for key in rate if key[1:] == (what, count) and not key[0].startswith("bitgrain") and key[0] != name and chosen[key[0]][0] == bits]
        best = max(peers, key=lambda key: rate[key], default=None)
        own, read = rate[name, what, count], statistics.median(limit for _, limit in turns)
        row = {"system": name, "bits": bits, "what": what, "count": count, "tokens_per_s": round(own, 2), "MB_per_step": round(nbytes / 1e6, 1), "read_GB_per_s": round(read / 1e9, 1)}
        if what == "decode":
            row["of_read"] = round(own / count * nbytes / read, 3)
        if best is not None:
            row |= {"best_peer": best[0], "of_best": round(own / rate[best], 3)}
            if what == "decode":
                row["by_bytes"] = round(own * nbytes / (rate[best] * chosen[best[0]][1]), 3)
        yield {**row, "rounds": [round(r, 2) for r, _ in turns]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what compare_models.py wrote")
    parser.add_argument("--llama-bin", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="of an environment that has vLLM for CPUs")
    parser.add_argument("--openvino", type=Path, metavar="PYTHON", help="of an environment that has openvino-genai")
    parser.add_argument("--compile", action="store_true", help="vLLM compiled, too; loading takes minutes")
    parser.add_argument("--only", nargs="+", metavar="PART", help="systems whose names contain one of these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512], help="of the prompt")
    parser.add_argument("--new", type=int, default=33, help="tokens that each sequence gets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logs", type=Path, default=Path("compare-logs"), help="folder for what the systems say")
    parser.add_argument("--busy", action="store_true", help="measure even if others use the machine")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    if load > 0.5 and not args.busy:
        raise SystemExit(f"the machine is busy (load {load:.1f}): figures would mean nothing; wait, or say --busy")
    found = {"threads": args.threads, "load_before": round(load, 2), **measure(args)}
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{args.threads} threads, load before {load:.1f}")
    print(f"{'workload':12} {'system':26} {'tokens/s':>9} {'of read':>8} {'MB/step':>8} {'of best':>8} {'by bytes':>9}  best peer")
    for row in sorted(found["results"], key=lambda row: (row["what"], row["count"], row["bits"], -row["tokens_per_s"])):
        share = [f"{row[key]:.2f}" if key in row else "" for key in ("of_read", "of_best", "by_bytes")]
        print(f"{row['what']} {row['count']:<4} {row['system']:26} {row['tokens_per_s']:9.1f} {share[0]:>8} {row['MB_per_step']:8.1f} {share[1]:>8} {share[2]:>9}  {row.get('best_peer', '')}")
    for name, why in found["absent"].items():
        print(f"not measured: {name}: {why}")


if __name__ == "__main__":
    main()
