"""A device that is not there: tensors that say they live on torch's "meta" type and compute on the host, and a mode that sees every operation.

Like a real device it refuses to mix its tensors with the host's; unlike "meta" its values can be read, and each reading is counted.
"""

from __future__ import annotations

import contextlib
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from bitgrain.platforms import probe
from bitgrain.platforms.base import Platform, PlatformProbe, ProbeReport

KEY, DEVICE = "elsewhere", torch.device("meta")
aten = torch.ops.aten
# What brings tensors from the host, or takes them there; and what waits for a value.
COPIES = (aten.copy_, aten._to_copy, aten.to)
READS = (aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.unique_consecutive, aten.bincount)


class Elsewhere(torch.Tensor):
    """A tensor of the device.

    Args:
        inner: its values, on the host.
    """

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=DEVICE, requires_grad=False
        )

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        Seen.current.reads["tolist"] += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Seen.current.run(func, args, kwargs or {})


class Seen(TorchDispatchMode):
    """Runs operations of the device.

    `reads` counts values and tensors that the host asked it for, by operation; `sends` counts tensors that the host sent there.
    """

    current: Seen

    def __init__(self):
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.sends = 0
        Seen.current = self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        leaves, tree = tree_flatten((args, kwargs))
        ours = [x for x in leaves if isinstance(x, Elsewhere)]
        plain_tensors = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Elsewhere)]
        theirs = [x for x in plain_tensors if x.dim()]
        name, copies = func.name(), func.overloadpacket in COPIES
        if ours and theirs and not copies:
            raise RuntimeError(f"{name}: expected all tensors to be on one device, found {[tuple(x.shape) for x in theirs]} on the host")
        asked = next((x for x in leaves if isinstance(x, torch.device)), None)
        if ours and (func.overloadpacket in READS or (copies and asked is not None and asked.type == "cpu")):
            self.reads[name] += 1
        if copies and plain_tensors and (ours or (asked is not None and asked.type == "meta")):
            self.sends += 1
        inner = {id(x.inner): x for x in ours}
        plain = [x.inner if isinstance(x, Elsewhere) else torch.device("cpu") if isinstance(x, torch.device) else x for x in leaves]
        args, kwargs = tree_unflatten(plain, tree)
        result = func(*args, **kwargs)
        target = asked.type if asked is not None else "meta" if ours else "cpu"
        if func is aten.copy_.default and not isinstance(leaves[0], Elsewhere):
            self.reads[name] += bool(ours)
            return leaves[0]
        if target == "cpu":
            return result
        return tree_map(lambda x: (inner[id(x)] if id(x) in inner else Elsewhere(x)) if isinstance(x, torch.Tensor) else x, result)


class Built(TorchFunctionMode):
    """Tensors made of Python values: torch makes them without an operation that a dispatch mode could see."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            Seen.current.sends += 1
            return Elsewhere(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def _probe() -> ProbeReport:
    return ProbeReport(KEY, "present", Platform(KEY, DEVICE.type, frozenset(), 1, 1 << 30))


@contextlib.contextmanager
def device():
    """The device as a platform; gives the mode that sees its operations."""
    table = probe._probes()._values
    table[KEY] = PlatformProbe(KEY, DEVICE.type, -100, _probe)
    try:
        with Seen() as seen, Built():
            yield seen
    finally:
        del table[KEY]
        probe.probe.cache_clear()
