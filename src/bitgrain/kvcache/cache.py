"""The cache of one sequence: a pair of stores per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitgrain.errors import RequestError
from bitgrain.kvcache.choice import make_stores
from bitgrain.kvcache.spec import KVCacheSpec


class SequenceCache:
    """Keys and values of one sequence, layer by layer.

    Memory grows with the sequence, by doubling; nothing is allocated before the first token.

    Args:
        specs:      one per layer.
        max_tokens: longest sequence that will be stored.
    """

    def __init__(self, specs: Sequence[KVCacheSpec], max_tokens: int) -> None:
        if max_tokens < 1:
            raise RequestError("KV cache", f"max_tokens = {max_tokens}", "at least 1", "ask for room for the whole sequence")
        self.max_tokens = max_tokens
        self._layers = [make_stores(spec, max_tokens) for spec in specs]

    @property
    def length(self) -> int:
        """Tokens that every layer has stored."""
        return min((keys.length for keys, _ in self._layers), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._layers)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store [t, heads, D] each after the layer's earlier tokens.

        Raises:
            RequestError: more than max_tokens.
            LayoutError: the specification's scales do not fit the number of heads.
        """
        k_store, v_store = self._layers[layer]
        k_store.append(keys)
        v_store.append(values)

    def read(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(keys, values) of the layer's tokens, each [length, heads, D] of `dtype`; views, valid until the next append."""
        k_store, v_store = self._layers[layer]
        return k_store.read(dtype), v_store.read(dtype)

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on, in every layer; also mends a cache whose last step failed half way."""
        if length < 0:
            raise RequestError("KV cache", f"truncate({length})", "a length of at least 0", "correct the length")
        for k_store, v_store in self._layers:
            k_store.truncate(length)
            v_store.truncate(length)
