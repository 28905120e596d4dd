"""The library's cache of one sequence behind the interface that an engine knows."""

from __future__ import annotations

from typing import Any

from bitgrain.errors import BitgrainError, RequestError
from bitgrain.hosts.transformers.library import library_module, refused


class HostedCache:
    """Keys and values of one sequence, kept by the library; every layer keeps all tokens, so that any of them can be forgotten again.

    Args:
        config:     the library's configuration of the model.
        max_tokens: longest sequence that will be stored.
    """

    def __init__(self, config: Any, max_tokens: int) -> None:
        if max_tokens < 1:
            raise RequestError("KV cache", f"max_tokens = {max_tokens}", "at least 1", "ask for room for the whole sequence")
        self.max_tokens = max_tokens
        self.stored = empty_cache(config)

    @property
    def length(self) -> int:
        """Tokens that every layer has stored."""
        return min((layer.get_seq_length() for layer in self.stored.layers), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        held = [t for layer in self.stored.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in held)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on, in every layer; also mends a cache whose last step failed half way."""
        if length < 0:
            raise RequestError("KV cache", f"truncate({length})", "a length of at least 0", "correct the length")
        for layer in self.stored.layers:
            over = layer.get_seq_length() - length
            if over > 0 and length:
                layer.crop(-over)
            elif over > 0:
                layer.reset()


def empty_cache(config: Any) -> Any:
    """A cache of full layers, sliding windows included: the masks keep to the windows."""
    caches = library_module("cache_utils")
    cache = caches.DynamicCache(config=config)
    cache.layers = [caches.DynamicLayer() if type(layer) is caches.DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def cache_problem(model: Any, architecture: str) -> BitgrainError | None:
    """Why this host cannot keep the state of a model's sequences; None where every layer caches keys and values of each token and nothing else."""
    caches = library_module("cache_utils")
    if getattr(model, "_is_stateful", False):
        return refused(architecture, "its layers keep a running state, which can neither be set back after a failed step nor continued by several tokens at once", "layers that cache keys and values")
    kinds = {type(layer).__name__ for layer in empty_cache(model.config).layers if type(layer) not in (caches.DynamicLayer, caches.DynamicIndexedLayer)}
    if kinds:
        return refused(architecture, f"its cache has layers of other kinds: {', '.join(sorted(kinds))}", "layers that cache keys and values")
    return None
