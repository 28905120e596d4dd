"""Writes safetensors files byte by byte, so that tests can write broken ones."""

import json
import struct
from pathlib import Path


def write_file(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], change=None, metadata=None) -> Path:
    """Write {name: (dtype, shape, bytes)}; `change(header)` may edit the header first."""
    header, body = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    if change:
        change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path
