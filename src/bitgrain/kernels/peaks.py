"""What the host's arithmetic and memory do at best, by loops of the native library that do nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.kernels.cpu.library import missing, native

# float32: fused multiplications and additions; bfloat16 and int8: products of these, added up in float32 and int32; int4: of four-bit
# codes and bytes, whose sums stay in 16 bits for a while
KINDS = ("float32", "bfloat16", "int8", "int4")


def can_measure() -> bool:
    """The library is here."""
    return not missing()


def peak(kind: str) -> float:
    """Multiplications and additions per second of torch's number of threads; 0 where the instruction set in use has no such arithmetic."""
    return float(native().bg_peak(KINDS.index(kind), torch.get_num_threads()))


def read_all(data: Tensor) -> None:
    """Read a contiguous tensor once, with torch's number of threads."""
    native().bg_read(data.data_ptr(), data.nbytes // 8, torch.get_num_threads())
