"""Writes GGUF files by hand, good ones and bad ones."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

# name: (id, elements per block, bytes per block), from the format's description and independent of the package
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
    "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74), "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50), "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110), "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136), "I32": (26, 1, 4), "F64": (28, 1, 8), "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2), "TQ1_0": (34, 256, 54), "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36), "Q1_0": (41, 128, 18),
    "Q2_0": (42, 64, 18),
}  # fmt: skip
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int32: "I32"}


class Packed:
    """Bytes of a tensor of a packed type; `shape` as torch has it."""

    def __init__(self, kind: str, shape: tuple[int, ...], data: bytes) -> None:
        self.kind, self.shape, self.data = kind, shape, data


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def typed(value) -> bytes:
    """u32 type and value, the type chosen by the Python value; bytes are taken as they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<IQ", 10, value) if value >= 1 << 31 else struct.pack("<Ii" if value < 0 else "<II", 5 if value < 0 else 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    items = [typed(v) for v in value] or [struct.pack("<II", 4, 0)][:0]
    kind = items[0][:4] if items else struct.pack("<I", 4)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(i[4:] for i in items)


def entry(key: str | bytes, value) -> bytes:
    return text(key) + typed(value)


def packed(value: Tensor | Packed) -> Packed:
    if isinstance(value, Packed):
        return value
    return Packed(DTYPES[value.dtype], tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())


def gguf_bytes(metadata, tensors, version=3, alignment=32, offsets=None, kinds=None, counts=(None, None)) -> bytes:
    """A file.

    Args:
        metadata: key to value, or pairs (for keys that occur twice).
        tensors:  name to a tensor or Packed, or pairs.
        offsets:  name to an offset that is written instead of the true one.
        kinds:    name to a type id that is written instead of the true one.
        counts:   tensor and entry counts that are written instead of the true ones.
    """
    metadata = list(metadata.items()) if isinstance(metadata, dict) else list(metadata)
    tensors = [(n, packed(t)) for n, t in (tensors.items() if isinstance(tensors, dict) else tensors)]
    head = b"GGUF" + struct.pack("<IQQ", version, counts[0] if counts[0] is not None else len(tensors), counts[1] if counts[1] is not None else len(metadata))
    head += b"".join(entry(k, v) for k, v in metadata)
    at, data = 0, b""
    for name, tensor in tensors:
        kind = (kinds or {}).get(name, TYPES[tensor.kind][0])
        head += text(name) + struct.pack("<I", len(tensor.shape)) + struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        head += struct.pack("<IQ", kind, (offsets or {}).get(name, at))
        data += tensor.data + bytes(-len(tensor.data) % alignment)
        at = len(data)
    return head + bytes(-len(head) % alignment) + data


def write_gguf(path: Path, metadata, tensors, **how) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors, **how))
    return path


def random_blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> Packed:
    """Random bytes whose 16-bit scales are ordinary numbers."""
    from bitgrain.weights.super_block import super_block_spec
    from bitgrain.weights.synthetic import sample_weight

    _, elements, nbytes = TYPES[kind]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    k = shape[-1]
    generator = torch.Generator().manual_seed(seed)
    if kind in ("MXFP4", "NVFP4", "Q4_0", "Q5_0", "Q8_0", "Q2_0", "TQ2_0"):
        blocks = torch.randint(0, 256, (rows * k // elements, nbytes), generator=generator, dtype=torch.uint8)
        at = {"TQ2_0": 64}.get(kind, 0)
        if kind == "MXFP4":
            blocks[:, 0] = torch.randint(110, 130, (len(blocks),), generator=generator, dtype=torch.uint8)
        elif kind == "NVFP4":
            blocks[:, :4] = torch.randint(0, 127, (len(blocks), 4), generator=generator, dtype=torch.uint8)
        else:
            blocks[:, at : at + 2] = (torch.randn(len(blocks), generator=generator) * 0.01).half().view(torch.uint8).view(-1, 2)
    else:
        blocks = sample_weight(super_block_spec(kind), rows, k, seed).packed
    return Packed(kind, shape, blocks.numpy().tobytes())
