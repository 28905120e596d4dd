"""The cache of one sequence: a pair of stores per layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitgrain.errors import RequestError
from bitgrain.kvcache.choice import make_stores
from bitgrain.kvcache.spec import KVCacheSpec
from bitgrain.kvcache.stores import PlainStore


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
        self._addresses: Tensor | None = None  # of the buffers as they are, with room for so many tokens
        self._room = 0
        self._addressed: tuple[object, ...] = ()  # what they were asked for

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
        self._addresses = None  # buffers may grow
        k_store, v_store = self._layers[layer]
        k_store.append(keys)
        v_store.append(values)

    def addresses(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Tensor | None:
        """int64 [2 * layers]: where keys and values of each layer begin, [capacity, heads, D] each, on the host, with room for one token more.

        For kernels that write them themselves and then call advance(); valid until the next append.

        Args:
            shapes: (heads, D) of each layer.
        Returns:
            None where a layer stores anything but numbers of this dtype and shape as they are.
        Raises:
            RequestError: no room for another token.
        """
        needed = self.length + 1
        if self._addresses is not None and needed <= self._room and self._addressed == (shapes, dtype):
            return self._addresses
        if needed > self.max_tokens:
            raise RequestError("KV cache", f"{needed} tokens", f"at most {self.max_tokens}, which it was made for", "make the cache for the whole sequence")
        stores = [store for pair in self._layers for store in pair]
        wanted = [torch.empty(0, *shape, dtype=dtype) for shape in shapes for _ in range(2)]
        if len(stores) != len(wanted):
            return None
        buffers = [store.reserve(like, needed) if type(store) is PlainStore else None for store, like in zip(stores, wanted, strict=True)]
        if any(b is None or b.shape[1:] != like.shape[1:] or b.dtype != dtype or b.device != like.device for b, like in zip(buffers, wanted, strict=True)):
            return None
        found = [b for b in buffers if b is not None]
        self._addressed = (shapes, dtype)
        self._addresses, self._room = torch.tensor([b.data_ptr() for b in found], dtype=torch.int64), min(b.shape[0] for b in found)
        return self._addresses

    def advance(self) -> None:
        """Count one token more in every layer, which a kernel has written where addresses() said."""
        for pair in self._layers:
            for store in pair:
                assert isinstance(store, PlainStore)  # addresses() gave none otherwise
                store.advance()

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
