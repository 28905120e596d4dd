"""The environment in one block that can be pasted into an issue."""

from __future__ import annotations

import platform as host
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from bitgrain import __version__, settings
from bitgrain.formats.registry import formats
from bitgrain.kernels.registry import broken_packages, kernel_entries
from bitgrain.models.registry import models
from bitgrain.platforms.probe import probe_all

HOST = ("transformers", "transformers")
# extra to the packages that it brings, by import name and distribution name
EXTRAS = {
    "cli": (("rich", "rich"),),
    "server": (("fastapi", "fastapi"), ("uvicorn", "uvicorn"), ("jinja2", "jinja2")),
    "hub": (("huggingface_hub", "huggingface-hub"),),
    "triton": (("triton", "triton"),),
    "hosts": (HOST,),
}
CORE = (("torch", "torch"), ("numpy", "numpy"), ("safetensors", "safetensors"), ("tokenizers", "tokenizers"))


def examine() -> dict[str, Any]:
    """Versions, platforms with their features, kernels, formats, extras and settings of this process.

    Extras are "absent", or "broken" with the error of their import, or a version: three different answers.
    """
    return {
        "bitgrain": __version__,
        "python": sys.version.split()[0],
        "system": f"{host.system()} {host.release()} {host.machine()}",
        "threads": torch.get_num_threads(),
        "core": {name: _state(module, name) for module, name in CORE},
        "extras": {extra: {name: _state(module, name) for module, name in packages} for extra, packages in EXTRAS.items()},
        "platforms": [report.as_dict() for report in probe_all()],
        "kernels": [{"operation": o, "platform": p, "kernel": k.name, "state": _kernel_state(k)} for o, p, k in kernel_entries()],
        "broken_kernels": broken_packages(),
        "modelling": _modelling(),
        "formats": formats().names(),
        "settings": {name: settings.variable(name) for name in ("BITGRAIN_CACHE", "BITGRAIN_SELFTEST", "BITGRAIN_PLATFORM")},
    }


def _modelling() -> list[dict[str, str]]:
    """Whose modelling code can run models here: bitgrain's own files, and those of the hosts."""
    package, distribution = HOST
    state = _state(package, distribution)
    usable = state != "absent" and not state.startswith("broken")
    return [
        {"code": "bitgrain", "state": f"{len(models.names())} architectures"},
        {"code": package, "state": f"{state}, for architectures that bitgrain has no file for" if usable else f"{state}: such architectures are refused"},
    ]


def _state(module: str, distribution: str) -> str:
    if find_spec(module) is None:
        return "absent"
    try:
        import_module(module)
    except Exception as error:  # a broken package may raise anything; the answer names it
        return f"broken: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "present, version unknown"


def _kernel_state(kernel: Any) -> str:
    """ "available", or why the kernel can run nothing here."""
    state = getattr(kernel, "state", None)
    try:
        return str(state()) if callable(state) else "available"
    except Exception as error:  # whatever a vendor's package raises when it is looked at
        return f"broken: {type(error).__name__}: {error}"
