"""Checkpoint modules written from plain numbers, with packers of their own: Python integers, no bit tricks of the library."""

from dataclasses import dataclass, field

import torch

from bitgrain.checkpoint.headers import TORCH_DTYPES, TensorHeader
from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.evidence import Evidence
from bitgrain.numerics.interleave import pack_marlin_tiles, permute_marlin_scales
from tests.unit.formats.golden_cases import problems_of

WORD_TYPES = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
DTYPE_CODES = {v: k for k, v in TORCH_DTYPES.items()}
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


@dataclass
class Numbers:
    """Codes [N, K], zero points and scales [N, G] and the group of each column."""

    bits: int
    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def weight(self) -> torch.Tensor:
        index = self.groups.long()
        return (self.codes.float() - self.zeros.float()[:, index]) * self.scales.float()[:, index]


def numbers(n, k, group_size, bits=4, *, zero=None, seed=0, dtype=torch.float16) -> Numbers:
    """Random codes, scales of both signs, and random zero points (or one for all)."""
    random = torch.Generator().manual_seed(seed)
    size = k if group_size == -1 else group_size
    count = -(-k // size)
    codes = torch.randint(0, 1 << bits, (n, k), generator=random)
    zeros = torch.randint(0, 1 << bits, (n, count), generator=random) if zero is None else torch.full((n, count), zero)
    scales = (torch.rand(n, count, generator=random) + 0.1) * torch.where(torch.rand(n, count, generator=random) < 0.1, -1.0, 1.0)
    return Numbers(bits, codes, zeros, scales.to(dtype), torch.arange(k) // size)


def signed(word: int, width: int) -> int:
    return word - (1 << width) if word >> (width - 1) else word


def stream_words(values: list[int], bits: int, width: int) -> list[int]:
    """A dense stream: one big integer, cut into words."""
    whole = sum(v << (bits * i) for i, v in enumerate(values))
    return [(whole >> (width * i)) & ((1 << width) - 1) for i in range(-(-len(values) * bits // width))]


def planar_words(values: list[int], bits: int) -> list[int]:
    """Per 32 values: all low planes first."""
    words = []
    for start in range(0, len(values), 32):
        run = (values[start : start + 32] + [0] * 32)[:32]
        shift = 0
        for width in PLANES.get(bits, (bits,)):
            words += stream_words([(v >> shift) & ((1 << width) - 1) for v in run], width, 32)
            shift += width
    return words


def pack_rows(matrix: torch.Tensor, bits: int, width: int = 32, planar: bool = False) -> torch.Tensor:
    """Each row of unsigned integers as words."""
    rows = [planar_words(r, bits) if planar else stream_words(r, bits, width) for r in matrix.tolist()]
    return torch.tensor([[signed(w, width) for w in row] for row in rows], dtype=WORD_TYPES[width])


def minus_one(zeros: torch.Tensor, bits: int, width: int = 32) -> torch.Tensor:
    """v1 zero points [N, G] as words [G, W]: one subtracted from whole words (3 bits: from each field)."""
    if 32 % bits:
        return pack_rows((zeros.t() - 1) % (1 << bits), bits, width)
    ones = sum(1 << (bits * i) for i in range(width // bits))
    rows = [[(w - ones) % (1 << width) for w in stream_words(r, bits, width)] for r in zeros.t().tolist()]
    return torch.tensor([[signed(w, width) for w in row] for row in rows], dtype=WORD_TYPES[width])


def gptq_tensors(v: Numbers, *, v1=True, planar=False, width=32, index=True) -> dict[str, torch.Tensor]:
    zeros = minus_one(v.zeros, v.bits, width) if v1 else pack_rows(v.zeros.t(), v.bits, width, planar)
    tensors = {
        "qweight": pack_rows(v.codes, v.bits, width, planar).t().contiguous(),
        "qzeros": zeros,
        "scales": v.scales.t().contiguous(),
    }
    return {**tensors, "g_idx": v.groups.int()} if index else tensors


def interleaved(matrix: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """int32 [R, C * bits / 32]: place i of each run of 8 columns holds column (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    order = [run + i for run in range(0, matrix.shape[1], 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return pack_rows(matrix[:, order], bits)


def gemm_tensors(v: Numbers) -> dict[str, torch.Tensor]:
    return {
        "qweight": interleaved(v.codes.t(), v.bits),
        "qzeros": interleaved(v.zeros.t(), v.bits),
        "scales": v.scales.t().contiguous(),
    }


def padded(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """Columns added up to what the GEMV kernels read."""
    step = 8 * {64: 2, 32: 4}.get(group_size, 1)
    return torch.nn.functional.pad(values, (0, -values.shape[1] % step))


def gemv_tensors(v: Numbers, group_size: int) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack_rows(v.codes, 4),
        "qzeros": pack_rows(padded(v.zeros, group_size), 4),
        "scales": padded(v.scales, group_size).contiguous(),
    }


def gemv_fast_tensors(v: Numbers, group_size: int) -> dict[str, torch.Tensor]:
    offset = -(v.zeros.float() * v.scales.float()).half()
    return {
        "qweight": fast_codes(v.codes),
        "qzeros": padded(offset, group_size).t().contiguous(),
        "scales": padded(v.scales, group_size).t().contiguous(),
    }


def fast_codes(codes: torch.Tensor) -> torch.Tensor:
    """int16 [N / 4, K], following the producer's three steps one value at a time."""
    n, k = codes.shape
    rows = []
    for row in codes.tolist():
        swapped = []
        for run in (row[i : i + 32] for i in range(0, k, 32)):
            swapped += [run[8 * b + 2 * a + c] for a in range(4) for b in range(4) for c in range(2)]
        rows.append([swapped[i + c] for i in range(0, k, 8) for c in (0, 2, 4, 6, 1, 3, 5, 7)])
    packed = []
    for r in range(0, n, 4):
        line = []
        for j in range(0, k, 64):
            listed = [rows[r + i][j + c] for i in range(4) for c in range(64)]
            line += [signed(sum(listed[p + i] << (4 * i) for i in range(4)), 16) for p in range(0, 256, 4)]
        packed.append(line)
    return torch.tensor(packed, dtype=torch.int16)


def marlin_tensors(v: Numbers, names=("qweight", "scales")) -> dict[str, torch.Tensor]:
    grouped = v.scales.shape[1] > 1
    packed = pack_marlin_tiles(v.codes.t().contiguous().to(torch.uint8))
    return {names[0]: packed, names[1]: permute_marlin_scales(v.scales.t().contiguous(), grouped)}


def header(name: str, tensor: torch.Tensor) -> TensorHeader:
    return TensorHeader(name, DTYPE_CODES[tensor.dtype], tuple(tensor.shape), "model.safetensors", 0, 0)


def view(tensors: dict[str, torch.Tensor], name="model.layers.0.mlp.up_proj", shape=None, kind=ModuleKind.LINEAR) -> ModuleView:
    return ModuleView(name, kind, {local: header(f"{name}.{local}", t) for local, t in tensors.items()}, shape)


def evidence(section: dict | None, tensors: dict[str, torch.Tensor] | None = None, sidecars: dict | None = None) -> Evidence:
    headers = {name: header(name, t) for name, t in (tensors or {}).items()}
    return Evidence({"quantization_config": section}, section, sidecars or {}, headers, {})


def decode_module(config, tensors, shape=None):
    """(weight, scheme) of a module after the header comparison."""
    module = view(tensors, shape=shape)
    scheme = config.decide(module).scheme
    assert problems_of(scheme, module) == []
    weight = scheme.to_weight(tensors)
    assert weight.shape == scheme.shape
    return weight, scheme
