"""Apple GPUs, through torch.backends.mps."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from bitgrain.platforms.base import PlatformProbe, ProbeReport
from bitgrain.platforms.devices import Asking, Device, ask, profiles

OPERATORS = ("aten::_convert_weight_to_int4pack", "aten::_weight_int4pack_mm", "aten::_weight_int8pack_mm")
GENERATIONS = profiles(dict.fromkeys(("m1", "m2", "m3", "m4", "m5"), "bf16 fp16"), OPERATORS)


def _holds(dtype: Any) -> bool:
    """Whether a tensor of `dtype` can be made on the device; older systems have no bfloat16."""
    import torch

    try:
        torch.zeros(1, dtype=dtype, device="mps")
    except (TypeError, RuntimeError):
        return False
    return True


def _look(module: Any, index: int) -> Device | str:
    import torch

    name = module.get_name()
    found = re.search(r"\bM\d+\b", name)
    generation = found[0].lower() if found else ""
    held = {text for text, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)) if _holds(dtype)}
    if not held:
        return f"{name} holds neither float16 nor bfloat16"
    return Device(name, generation, frozenset(held | ({generation} if generation else set())), module.get_core_count(), torch.mps.recommended_max_memory())


_FUNCTIONS = ("is_available", "device_count", "get_name", "get_core_count")
_ASKING = Asking("mps", "mps", "torch.backends.mps", _FUNCTIONS, _look, "MPS", OPERATORS)


def _probe() -> ProbeReport:
    import torch

    module = getattr(torch.backends, "mps", None)
    if module is None or not module.is_built():
        return ProbeReport("mps", "absent: torch is built without MPS")
    # there is one device, or none: the module has no count of them
    asked = SimpleNamespace(device_count=lambda: 1, **{name: getattr(module, name) for name in _FUNCTIONS if hasattr(module, name)})
    return ask(asked, _ASKING)


PLATFORM = PlatformProbe("mps", "mps", 10, _probe, GENERATIONS)
