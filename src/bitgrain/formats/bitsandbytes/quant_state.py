"""The stored description of a four-bit matrix: a uint8 tensor whose bytes are JSON.

    {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N, K],
     "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.04}

The three nested keys are there where the scales are quantized themselves.
Source: bitsandbytes 0.50.2, functional.py, QuantState.as_dict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitgrain.errors import LabelMismatchError
from bitgrain.formats.config_reader import ConfigReader

# Local name of the state, up to the type of the lookup table.
STATE_PREFIX = "weight.quant_state.bitsandbytes__"
FLOAT_NAMES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class QuantState:
    """What the state says.

    Args:
        quant_type:    "nf4" or "fp4": what the writer calls its table; the values are stored.
        shape:         (N, K).
        block:         elements of the flattened matrix per scale.
        nested_block:  scales per second-level scale; 0 where the scales are plain floats.
        nested_offset: added to every scale that was quantized.
    """

    quant_type: str
    shape: tuple[int, int]
    block: int = 64
    nested_block: int = 0
    nested_offset: float = 0.0

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def blocks(self) -> int:
        """Number of scales."""
        return -(-self.numel // self.block)


def read_state(where: str, stored: Tensor, quant_type: str) -> QuantState:
    """The state in the bytes of a stored tensor.

    Args:
        where:      file and name of the tensor, for messages.
        stored:     uint8 [bytes].
        quant_type: the end of the tensor's name, with which the state must agree.
    Raises:
        LabelMismatchError: the bytes are no JSON object.
        ConfigError: keys that are missing, unknown or impossible; all of them at once.
    """
    reader = ConfigReader(_json_object(where, stored), where)
    word = reader.text("quant_type", default="")
    if word != quant_type:
        reader.problem("quant_type", repr(word), f"{quant_type!r}, which the tensor's name says", "fetch or write the checkpoint again")
    _read_dtype(reader, "dtype", required=True)
    nested = {"nested_blocksize", "nested_dtype", "nested_offset"} & {k for k, v in reader.values.items() if v is not None}
    state = QuantState(
        quant_type,
        _read_shape(reader),
        reader.integer("blocksize", minimum=1),
        reader.integer("nested_blocksize", minimum=1) if nested else 0,
        reader.number("nested_offset", minimum=-3e38) if nested else 0.0,
    )
    _read_dtype(reader, "nested_dtype", required=bool(nested))
    reader.finish()
    return state


def _json_object(where: str, stored: Tensor) -> Mapping[str, Any]:
    try:
        found = json.loads(bytes(stored.reshape(-1).tolist()).decode())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise LabelMismatchError(where, "its bytes are not a JSON object", "the state that the writer packs into the tensor", "the file is damaged; fetch it again")
    return found


def _read_shape(reader: ConfigReader) -> tuple[int, int]:
    _, value = reader.read("shape")
    whole = isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value)
    if not whole or len(value) != 2:
        reader.problem("shape", repr(value), "two positive integers [N, K]: only matrices are supported", "fetch or write the checkpoint again")
        return (1, 1)
    return (value[0], value[1])


def _read_dtype(reader: ConfigReader, key: str, required: bool) -> None:
    """Note a problem unless the key names a float type; it says what the producer computes in, which changes no value."""
    word = reader.text(key, default="" if required else FLOAT_NAMES[0])
    if word not in FLOAT_NAMES:
        reader.problem(key, repr(word), f"one of {', '.join(FLOAT_NAMES)}", "fetch or write the checkpoint again")
