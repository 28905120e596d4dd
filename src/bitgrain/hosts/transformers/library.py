"""The installed library: which architectures it knows, and an empty model of one."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from bitgrain.checkpoint.files import CheckpointFiles
from bitgrain.errors import BitgrainError, ConfigError, MissingDependencyError, RequestError, UnsupportedArchitectureError

_CONSTRUCTION = threading.Lock()
# Keys of config.json that are about quantization, which the plan has read already.
_QUANTIZATION = ("quantization_config", "compression_config")


def library() -> Any:
    """The package.

    Raises:
        MissingDependencyError: it is not installed, or cannot be imported.
    """
    try:
        return import_module("transformers")
    except Exception as error:  # a broken installation may raise anything
        raise MissingDependencyError(
            "modelling code of the transformers library", f"the package cannot be imported ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
            "the extra `hosts`", 'pip install "bitgrain[hosts]"',
        ) from None  # fmt: skip


def library_module(name: str) -> Any:
    """A module of the package, such as "cache_utils"."""
    library()
    return import_module(f"transformers.{name}")


def library_name() -> str:
    """Name and version, as the plan shows them."""
    return f"transformers {library().__version__}"


def refused(architecture: str, found: str, needed: str) -> UnsupportedArchitectureError:
    """The error of an architecture that this host does not run."""
    return UnsupportedArchitectureError(f"config.json: architectures: {architecture or 'none'}", found, needed, "run this checkpoint with another program")


def model_class(files: CheckpointFiles, architecture: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """(class of the causal language model, its configuration object).

    Args:
        trust_remote_code: modelling code that the checkpoint brings may be run, where the library knows none.
    Raises:
        UnsupportedArchitectureError: neither knows the architecture, or it is no causal language model.
        ConfigError: the library refuses the configuration.
    """
    package = library()
    auto = library_module("models.auto.modeling_auto")
    names = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if architecture in names:
        return getattr(package, architecture), _configuration(files, getattr(package, architecture).config_class)
    if trust_remote_code and _own_code(files.config):
        return _remote(files, architecture)
    if _own_code(files.config):
        found = f"{package.__name__} {package.__version__} does not know it; the checkpoint brings code of its own, which was not trusted"
        raise UnsupportedArchitectureError(
            f"config.json: architectures: {architecture or 'none'}", found, "an architecture that bitgrain or transformers knows",
            "read that code, and allow it with trust_remote_code=True (--trust-remote-code)",
        )  # fmt: skip
    known = hasattr(package, architecture) if architecture else False
    found = "transformers has it, but not as a causal language model" if known else f"transformers {package.__version__} does not know it"
    raise refused(architecture, found, "a causal language model that bitgrain or the installed transformers has modelling code for")


def _own_code(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint brings modelling code."""
    found = config.get("auto_map")
    return isinstance(found, Mapping) and "AutoModelForCausalLM" in found


def require_own_code(config: Mapping[str, Any]) -> None:
    """Raise unless the checkpoint brings modelling code, so that a permission to run it means something."""
    if not _own_code(config):
        raise RequestError(
            "trust_remote_code (--trust-remote-code)", "a request to run a checkpoint's code, but config.json names none (auto_map: AutoModelForCausalLM)",
            "a checkpoint that brings modelling code", "leave the option out",
        )  # fmt: skip


def _configuration(files: CheckpointFiles, config_class: Any) -> Any:
    stated = {key: value for key, value in files.config.items() if key not in _QUANTIZATION}
    try:
        return config_class.from_dict(_with_floats(stated))
    except Exception as error:  # the library validates as it likes
        raise _config_error(files, error) from None


def _with_floats(value: Any) -> Any:
    """Configuration values in which the library's notation for infinities and NaN, {"__float__": "Infinity"}, became numbers."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if set(value) == {"__float__"} else {key: _with_floats(v) for key, v in value.items()}
    return [_with_floats(v) for v in value] if isinstance(value, list) else value


def _config_error(files: CheckpointFiles, error: Exception) -> BitgrainError:
    return ConfigError(files.config_name, f"transformers refuses it: {type(error).__name__}: {_first_lines(error)}", "a configuration that the architecture's class takes", "correct config.json")


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _remote(files: CheckpointFiles, architecture: str) -> tuple[Any, Any]:
    """The classes that the checkpoint's own code defines; runs that code."""
    dynamic = library_module("dynamic_module_utils")
    try:
        config_class = dynamic.get_class_from_dynamic_module(files.config["auto_map"]["AutoConfig"], str(files.root))
        model = dynamic.get_class_from_dynamic_module(files.config["auto_map"]["AutoModelForCausalLM"], str(files.root))
    except Exception as error:  # the checkpoint's code may raise anything
        raise refused(architecture, f"the checkpoint's own code cannot be loaded ({type(error).__name__}: {_first_lines(error)})", "code that can be imported") from None
    return model, _configuration(files, config_class)


def empty_model(cls: Any, config: Any, dtype: torch.dtype, architecture: str) -> Any:
    """A model whose parameters have no memory (device "meta") and whose buffers the architecture's constructor has filled.

    Raises:
        UnsupportedArchitectureError: it cannot be constructed so.
    """
    try:
        with _CONSTRUCTION, _parameters_without_memory():
            model = cls._from_config(config, dtype=dtype)
    except Exception as error:  # a constructor may raise anything
        raise refused(architecture, f"its class cannot be constructed: {type(error).__name__}: {_first_lines(error)}", "a class that can be made from its configuration") from None
    unmade = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if unmade:
        raise refused(architecture, f"buffers that its constructor computes from parameters: {', '.join(unmade[:5])}", "buffers that follow from the configuration")
    return model.eval()


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters that this thread makes lose their memory as soon as a module has them, before anything is written to it.

    Buffers stay real, so that what a constructor computes (rotary frequencies, slopes, masks) is there.
    """
    thread, original = threading.get_ident(), nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and not param.is_meta and threading.get_ident() == thread:
            module._parameters[name] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
