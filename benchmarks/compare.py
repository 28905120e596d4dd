"""bitgrain and the peers that are installed, on the same weights, taking turns: tokens per second, and what they are of the limits.

    python benchmarks/compare_models.py FOLDER --shape 1b --llama-bin BIN --openvino PYTHON
    python benchmarks/compare.py FOLDER --llama-bin BIN --vllm PYTHON --openvino PYTHON [--rounds 3 --json]

docs/compare.md says how peers are installed and what each computes with.  Each system runs in a process of its own and holds its
model, those of one width of weights at a time; only the one that is measured computes.  Decode is of --new tokens behind prompts
of 32, the time of the prompts subtracted (llama.cpp: as its own programs measure it); prefill of one prompt of 512.  Figures are
medians of all rounds.  "of read" is the share of the read rate, measured right before and after, at which the bytes of a step were
streamed: of all matrices but the embedding.  "of best" is against the best peer in the same weights' width, and "by bytes" the
same for bytes per second, since heads are kept in different types.  Lines below the table name whose weights or activations
differ, and how many first tokens are bitgrain's.  What is not installed, fails or takes too long is listed with its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_running import PROMPT, SPARE, Disturbed, Failed, LlamaCpp, Process, System

from bitgrain import open_checkpoint
from bitgrain.bench.limits import Machine


@dataclass(frozen=True)
class Candidate:
    """A system that could run.

    Args:
        bits:    of its weights; systems of the same width run at the same time and are compared.
        form:    of the weights: systems of the same form compute with the same ones, bit for bit.
        nbytes:  of what one decode step reads.
        differs: how what it computes with differs from the form, or from others' use of it; empty if it does not.
    """

    bits: int
    form: str
    nbytes: int
    differs: str
    start: Callable[[], System]


@dataclass
class Found:
    """What one run of compare.py gathers."""

    absent: dict[str, str] = field(default_factory=dict)  # name to why
    versions: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, list[int] | None] = field(default_factory=dict)
    # (name, workload, count) to (tokens per second, bytes per second of the read rate) of each turn
    taken: dict[tuple[str, str, int], list[tuple[float, float]]] = field(default_factory=dict)


ROUNDED = "activations are rounded to bytes"
MAY_ROUND = "activations may be rounded to bytes"
FLOATS = "activations stay floats"
GROUPS = {"Q4_0": "groups of 32, rounded anew; the head is Q6_K", "Q8_0": "groups of 32, rounded anew; the head too"}


def step_bytes(path: Path) -> int:
    """Stored bytes that one decode step reads."""
    rows = open_checkpoint(path).plan.modules.values()
    return sum(row.nbytes for row in rows if row.kind.value != "embedding")


class Candidates:
    """What could run, by name, and what cannot, with the reason."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.found: dict[str, Candidate] = {}
        self.absent: dict[str, str] = {}
        config = json.loads((args.folder / "bf16" / "config.json").read_text())
        self.vocabulary, self.head = config["vocab_size"], config["vocab_size"] * config["hidden_size"]
        self.sizes: dict[str, int] = {}

    def wants(self, name: str) -> bool:
        return not self.args.only or any(part in name for part in self.args.only)

    def own(self, name: str, python: Path | None, option: str, bits: int, form: str, *words: str, model: str = "", differs: str = "", saved: int = 0) -> None:
        """A system in a process of its own.

        Args:
            option: that names its python.
            model:  in the folder, if it is not the form.
            saved:  bytes of the form's that a step does not read.
        """
        args, path = self.args, self.args.folder / (model or form)
        if not self.wants(name):
            return
        if python is None:
            self.absent[name] = f"no {option}"
        elif not path.exists():
            self.absent[name] = f"{path} is not there; compare_models.py writes it"
        else:
            files = [path] if path.is_file() else list(path.iterdir())
            needed = 2 * sum(file.stat().st_size for file in files) + SPARE
            log = args.logs / f"{name.replace(' ', '-')}.log"
            command = [words[0], str(path), *words[1:], "--vocabulary", str(self.vocabulary)]
            limits = args.load_limit, args.limit
            self.found[name] = Candidate(bits, form, self.nbytes(form) - saved, differs, lambda: Process(python, command, args.threads, needed, log, limits))

    def nbytes(self, form: str) -> int:
        if form not in self.sizes:
            self.sizes[form] = step_bytes(self.args.folder / form)
        return self.sizes[form]

    def all(self) -> None:
        here = Path(sys.executable)
        for form, bits in (("w4", 4), ("w8a8", 8)):
            for fidelity in ("exact", "fast") if bits == 4 else ("exact",):
                # a scheme's own activation quantization is no loss of fidelity
                self.own(f"bitgrain {form}{f' {fidelity}' if bits == 4 else ''}", here, "", bits, form, "bitgrain", "--fidelity", fidelity, differs=MAY_ROUND if fidelity == "fast" else "")
            self.own(f"torch {form}", self.args.torch, "--torch", bits, form, "torch", differs="" if bits == 4 else FLOATS)
            for mark in ("", " compiled") if self.args.compile else ("",):
                compiled = ["--compile"] if mark else []
                self.own(f"vllm {form}{mark}", self.args.vllm, "--vllm", bits, form, "vllm", *compiled)
                self.own(f"vllm+zentorch {form}{mark}", self.args.vllm, "--vllm", bits, form, "vllm+zentorch", *compiled, differs=ROUNDED if bits == 4 else "")
            kept = "" if bits == 4 else f"{FLOATS} by the graph"
            self.own(f"openvino {form}", self.args.openvino, "--openvino", bits, form, "openvino", model=f"ov-{form}", differs=kept)
            self.own(f"openvino {form} h8", self.args.openvino, "--openvino", bits, form, "openvino", model=f"ov-{form}-h8", differs="; ".join(filter(None, (kept, "the head is bytes"))), saved=self.head)
        self.own("torch bf16", self.args.torch, "--torch", 16, "bf16", "torch")
        for kind, bits in (("Q4_0", 4), ("Q8_0", 8)):
            form = f"{kind}.gguf"
            for fidelity in ("exact", "fast"):
                self.own(f"bitgrain {kind} {fidelity}", here, "", bits, form, "bitgrain", "--fidelity", fidelity, differs="; ".join([GROUPS[kind], *([MAY_ROUND] if fidelity == "fast" else [])]))
            self.llama(f"llama.cpp {kind}", bits, form, f"{GROUPS[kind]}; {ROUNDED}", True)
            if bits == 4:
                self.llama(f"llama.cpp {kind} plain", bits, form, f"{GROUPS[kind]}; {ROUNDED}", False)

    def llama(self, name: str, bits: int, form: str, differs: str, repack: bool) -> None:
        args, model = self.args, self.args.folder / form
        if not self.wants(name):
            return
        if args.llama_bin is None or not model.exists():
            self.absent[name] = f"{model} is not there; compare_models.py writes it" if args.llama_bin else "no --llama-bin"
        else:
            self.found[name] = Candidate(bits, form, self.nbytes(form), differs, lambda: LlamaCpp(args.llama_bin, model, args.threads, repack, args.limit))


def measure(args: argparse.Namespace) -> dict[str, object]:
    args.logs.mkdir(parents=True, exist_ok=True)
    candidates = Candidates(args)
    candidates.all()
    chosen, found, machine = candidates.found, Found(absent=candidates.absent), Machine()
    for bits in sorted({candidate.bits for candidate in chosen.values()}):
        # those of a width at a time: all at once would not fit
        take_turns({name: candidate for name, candidate in chosen.items() if candidate.bits == bits}, args, machine, found)
    return {"versions": found.versions, "results": list(rows(chosen, found.taken)), "first_tokens": agreement(chosen, found.tokens), "absent": found.absent}


def take_turns(chosen: Mapping[str, Candidate], args: argparse.Namespace, machine: Machine, found: Found) -> None:
    """Start the systems, let each do every workload in every round, and end them.  One that fails is out, with its reason."""
    workloads = [("decode", count) for count in args.sequences] + [("prefill", tokens) for tokens in args.tokens]
    running: dict[str, System] = {}
    try:
        for name, candidate in chosen.items():
            with out_if_failing(name, running, found):
                running[name] = candidate.start()
                running[name].rate("prefill", PROMPT, 1)  # the first call is slower
                found.tokens[name] = running[name].first_tokens()
        for turn in range(args.rounds):
            for what, count in workloads:
                for name in [*running][:: 1 if turn % 2 == 0 else -1]:
                    with out_if_failing(name, running, found):
                        before = machine.read()
                        rate = running[name].rate(what, count, args.new)
                        found.taken.setdefault((name, what, count), []).append((rate, (before + machine.read()) / 2))
        found.versions |= {name: system.version for name, system in running.items()}
    finally:
        for system in running.values():
            system.close()


@contextlib.contextmanager
def out_if_failing(name: str, running: dict[str, System], found: Found) -> Iterator[None]:
    """End a system that fails; nothing but its reason comes of the failure."""
    try:
        yield
    except Disturbed:
        pass
    except Failed as error:
        found.absent[name] = str(error)
        if name in running:
            found.versions[name] = running[name].version
            running.pop(name).close()


def agreement(chosen: Mapping[str, Candidate], tokens: Mapping[str, list[int] | None]) -> dict[str, str]:
    """Name to how many first tokens are those of bitgrain with the same form.

    With the same weights most are: products that round differently change a choice only where two tokens are about as likely.
    """
    ours = {chosen[name].form: own for name, own in reversed(tokens.items()) if name.startswith("bitgrain")}
    said = {}
    for name, own in tokens.items():
        other = ours.get(chosen[name].form)
        if own is not None and other is not None and own is not other:
            said[name] = f"{sum(a == b for a, b in zip(own, other, strict=True))} of {len(own)}"
    return said


def rows(chosen: Mapping[str, Candidate], taken: Mapping[tuple[str, str, int], list[tuple[float, float]]]) -> Iterator[dict[str, Any]]:
    """One dictionary per system and workload."""
    rate = {key: statistics.median(r for r, _ in turns) for key, turns in taken.items()}
    for (name, what, count), turns in taken.items():
        bits, nbytes = chosen[name].bits, chosen[name].nbytes
        peers = [key for key in rate if key[1:] == (what, count) and not key[0].startswith("bitgrain") and key[0] != name and chosen[key[0]].bits == bits]
        best = max(peers, key=lambda key: rate[key], default=None)
        own, read = rate[name, what, count], statistics.median(limit for _, limit in turns)
        row: dict[str, Any] = {"system": name, "form": chosen[name].form, "differs": chosen[name].differs, "bits": bits, "what": what, "count": count, "tokens_per_s": round(own, 2), "MB_per_step": round(nbytes / 1e6, 1), "read_GB_per_s": round(read / 1e9, 1)}
        if what == "decode":
            row["of_read"] = round(own / count * nbytes / read, 3)
        if best is not None:
            row |= {"best_peer": best[0], "of_best": round(own / rate[best], 3)}
            if what == "decode":
                row["by_bytes"] = round(own * nbytes / (rate[best] * chosen[best[0]].nbytes), 3)
        yield {**row, "rounds": [round(r, 2) for r, _ in turns]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what compare_models.py wrote")
    parser.add_argument("--llama-bin", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="of an environment that has vLLM for CPUs")
    parser.add_argument("--openvino", type=Path, metavar="PYTHON", help="of an environment that has openvino-genai")
    parser.add_argument("--torch", type=Path, metavar="PYTHON", default=Path(sys.executable), help="of an environment that has transformers; this one")
    parser.add_argument("--compile", action="store_true", help="vLLM compiled, too; loading takes minutes")
    parser.add_argument("--only", nargs="+", metavar="PART", help="systems whose names contain one of these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, nargs="*", default=[512], help="of the prompt")
    parser.add_argument("--new", type=int, default=33, help="tokens that each sequence gets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load-limit", type=float, default=900, metavar="SECONDS", help="that a system may take to load")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="that one answer may take")
    parser.add_argument("--logs", type=Path, default=Path("compare-logs"), help="folder for what the systems say")
    parser.add_argument("--busy", action="store_true", help="measure even if others use the machine")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # systems are ended on the way out
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
    for name, row in {row["system"]: row for row in found["results"]}.items():
        but = f", but {row['differs']}" if row["differs"] else ""
        same = f"; first tokens as bitgrain's: {found['first_tokens'][name]}" if name in found["first_tokens"] else ""
        print(f"{name}: weights of {row['form']}{but}{same}; {found['versions'][name]}")
    for name, why in found["absent"].items():
        print(f"not measured: {name}: {why}")


if __name__ == "__main__":
    main()
