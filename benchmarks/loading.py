"""Peak host memory and seconds of loading a checkpoint, against the bound that the design states.

    python tools/make_checkpoint.py OUT --shape 1b
    python benchmarks/loading.py OUT
    python tools/make_checkpoint.py OUT --shape 1b --dense
    python benchmarks/loading.py OUT --quantization int4      quantized while it loads

Bound: prepared bytes + 3 x the largest module's stored bytes.  The peak is the process's highest resident set while
loading, less what it held just before (libraries); both are read from the kernel.  Pages mapped from the file count as
long as they are mapped.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
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


def prepared_bytes(model) -> int:
    """Bytes of every distinct tensor that the model holds after loading."""
    import torch

    seen: dict[int, int] = {}
    for module in model.modules():
        prepared = getattr(module, "prepared", None)
        held = [*(prepared.tensors.values() if prepared is not None else ()), *(v for v in vars(module).values() if isinstance(v, torch.Tensor))]
        for tensor in held:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization", metavar="NAME", help="what a 16-bit checkpoint becomes while it loads")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import torch

    import bitgrain

    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))  # first-call buffers are not the model's
    start = time.perf_counter()
    checkpoint = bitgrain.open_checkpoint(args.model, quantization=args.quantization)
    planned = time.perf_counter() - start
    largest = max(m.nbytes for m in checkpoint.plan.modules.values())
    with PeakWatch() as watch:
        start = time.perf_counter()
        model = bitgrain.load_model(args.model, quantization=args.quantization)
        seconds = time.perf_counter() - start
    prepared = prepared_bytes(model)
    bound = prepared + 3 * largest
    figures = {
        "stored_bytes": checkpoint.plan.totals["bytes"], "prepared_bytes": prepared, "largest_module_bytes": largest, "bound_bytes": bound,
        "peak_bytes": watch.peak - watch.before, "peak_over_bound": round((watch.peak - watch.before) / bound, 3), "plan_seconds": round(planned, 3),
        "load_seconds": round(seconds, 2), "kernels": sorted({s.kernel.name for s in model.selections.values()}),
    }  # fmt: skip
    if args.json:
        print(json.dumps(figures))
        return
    for key, value in figures.items():
        print(f"{key:22s} {value / 1e6:12.1f} MB" if key.endswith("_bytes") else f"{key:22s} {value}")
    if figures["peak_bytes"] > bound:
        raise SystemExit("the peak is above the bound")


if __name__ == "__main__":
    main()
