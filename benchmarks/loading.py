"""Peak host memory and seconds of loading a checkpoint, against the bound that the design states.

    python tools/make_checkpoint.py OUT --shape 1b
    python benchmarks/loading.py OUT
    python tools/make_checkpoint.py OUT --shape 1b --dense
    python benchmarks/loading.py OUT --quantization int4      quantized while it loads
    python benchmarks/loading.py --shape 30b-a3b              makes the checkpoint first (codes are holes), and removes it
    python benchmarks/loading.py --shape 30b-a3b --layers 12  a part of it, where memory is short
    python benchmarks/loading.py --shape 30b-a3b --layers 4 --vocab 4096    with nothing larger than an attention matrix

Bound: prepared bytes + 3 x the largest module's stored bytes; of experts a module is one matrix of one expert.  The peak is the process's highest resident set while
loading, less what it held just before (libraries); both are read from the kernel.  Pages mapped from the file count as
long as they are mapped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path


def resident_bytes() -> int:
    """Resident set of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not report VmRSS in /proc/self/status")


class PeakWatch:
    """Samples the resident set every millisecond while it is open."""

    def __enter__(self) -> PeakWatch:
        self.before = self.peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())


def tensors_of(prepared) -> list:
    """The tensors of a prepared matrix, or of the experts of a layer."""
    if prepared is None:
        return []
    if not hasattr(prepared, "experts"):
        return list(prepared.tensors.values())
    biases = [b for expert in prepared.experts for b in (expert.gate_up_bias, expert.down_bias) if b is not None]
    return [*biases, *(t for expert in prepared.experts for part in (expert.gate_up, expert.down) for t in part.tensors.values())]


def prepared_bytes(model) -> int:
    """Bytes of every distinct tensor that the model holds after loading."""
    import torch

    seen: dict[int, int] = {}
    for module in model.modules():
        prepared = getattr(module, "prepared", None)
        held = [*tensors_of(prepared), *(v for v in vars(module).values() if isinstance(v, torch.Tensor))]
        for tensor in held:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


@contextmanager
def made(shape: str, layers: int | None, vocab: int | None) -> Iterator[Path]:
    """A checkpoint of a shape of tools/make_checkpoint.py, for as long as it is needed."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
    import make_checkpoint

    whole = make_checkpoint.SHAPES[shape]
    with tempfile.TemporaryDirectory(prefix="bitgrain-") as folder:
        make_checkpoint.write_checkpoint(Path(folder), replace(whole, layers=layers or whole.layers, vocab=vocab or whole.vocab), sparse=False, hollow=True)
        yield Path(folder)


def measure(path: Path, quantization: str | None) -> dict[str, object]:
    """The figures of one load."""
    import torch

    import bitgrain

    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))  # first-call buffers are not the model's
    start = time.perf_counter()
    checkpoint = bitgrain.open_checkpoint(path, quantization=quantization)
    planned = time.perf_counter() - start
    modules = checkpoint.plan.modules.values()
    largest = max(m.nbytes for m in modules)
    with PeakWatch() as watch:
        start = time.perf_counter()
        model = bitgrain.load_model(path, quantization=quantization)
        seconds = time.perf_counter() - start
    prepared = prepared_bytes(model)
    peak, bound = watch.peak - watch.before, prepared + 3 * largest
    return {
        "stored_bytes": checkpoint.plan.totals["bytes"], "prepared_bytes": prepared, "largest_module_bytes": largest,
        "largest_expert_bytes": max((m.nbytes for m in modules if m.kind.value == "expert"), default=0), "bound_bytes": bound, "peak_bytes": peak,
        "peak_over_prepared_bytes": peak - prepared, "peak_over_bound": round(peak / bound, 3), "plan_seconds": round(planned, 3),
        "load_seconds": round(seconds, 2), "kernels": sorted({s.kernel.name for s in model.selections.values()}),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="a checkpoint; or give --shape")
    parser.add_argument("--shape", metavar="NAME", help="make a checkpoint of this shape of tools/make_checkpoint.py")
    parser.add_argument("--layers", type=int, metavar="N", help="with --shape: fewer layers than it has")
    parser.add_argument("--vocab", type=int, metavar="N", help="with --shape: fewer tokens, so that the embedding is not the largest module")
    parser.add_argument("--quantization", metavar="NAME", help="what a 16-bit checkpoint becomes while it loads")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        parser.error("give a checkpoint or --shape, one of the two")
    with nullcontext(args.model) if args.shape is None else made(args.shape, args.layers, args.vocab) as path:
        figures = measure(path, args.quantization)
    if args.json:
        print(json.dumps(figures))
    else:
        for key, value in figures.items():
            print(f"{key:26s} {value / 1e6:12.1f} MB" if key.endswith("_bytes") else f"{key:26s} {value}")
    if figures["peak_bytes"] > figures["bound_bytes"]:
        raise SystemExit("the peak is above the bound")


if __name__ == "__main__":
    main()
