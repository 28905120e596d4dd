"""bitgrain runs any quantized language-model checkpoint, on any hardware, and its numbers are right or it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from bitgrain.errors import BitgrainError

if TYPE_CHECKING:
    from bitgrain.api import Checkpoint, load_model, open_checkpoint
    from bitgrain.engine.llm import LLM
    from bitgrain.engine.sampling import SamplingParams
    from bitgrain.plan import Plan

# Loaded on first use: `import bitgrain` brings no engine, no server and no kernel.
_LAZY = {
    "Checkpoint": "bitgrain.api",
    "LLM": "bitgrain.engine.llm",
    "Plan": "bitgrain.plan",
    "SamplingParams": "bitgrain.engine.sampling",
    "load_model": "bitgrain.api",
    "open_checkpoint": "bitgrain.api",
}

__all__ = ["LLM", "BitgrainError", "Checkpoint", "Plan", "SamplingParams", "__version__", "load_model", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'bitgrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
