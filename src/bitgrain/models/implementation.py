"""Whose modelling code runs a checkpoint: bitgrain's own file for the architecture, or that of a host."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from bitgrain.checkpoint.files import CheckpointFiles
from bitgrain.errors import BitgrainError, MissingDependencyError, RequestError, UnsupportedArchitectureError
from bitgrain.formats.slots import ModelSlots
from bitgrain.models.config import ModelConfig
from bitgrain.models.loading import LoadOptions, build_model
from bitgrain.models.registry import find_model, model_class, models
from bitgrain.models.text_part import wrapper_of
from bitgrain.plan import Plan

if TYPE_CHECKING:
    from bitgrain.models.language_model import LanguageModel

MODEL_IMPLS = ("auto", "bitgrain", "transformers")
# The host's package, by name: hosts import this package, never the other way round.
HOST = "bitgrain.hosts.transformers.model"


class Implementation(Protocol):
    """Modelling code for one checkpoint."""

    @property
    def name(self) -> str:
        """Such as "bitgrain" or "transformers 5.19.0": what the plan calls it."""

    def slots(self) -> ModelSlots | None:
        """Every module that the checkpoint must have; None if nobody knows."""

    def build(self, plan: Plan, options: LoadOptions) -> LanguageModel:
        """The running model."""


@dataclass(frozen=True, slots=True)
class OwnFile:
    """A file of bitgrain.models, or of a package that adds one."""

    files: CheckpointFiles
    architecture: str

    @property
    def name(self) -> str:
        return "bitgrain"

    def slots(self) -> ModelSlots | None:
        config = ModelConfig.from_dict(self.files.config, self.files.config_name, self.files.tensors)
        return model_class(self.architecture).slots(config)

    def build(self, plan: Plan, options: LoadOptions) -> LanguageModel:
        return build_model(self.files, plan, self.architecture, options)


@dataclass(frozen=True, slots=True)
class Nobody:
    """No modelling code: a plan can still be made of what the headers show, and nothing can be run.

    Args:
        problem: why nobody runs the checkpoint.
        known:   its modules, where somebody knows at least those.
    """

    problem: BitgrainError
    known: ModelSlots | None = None

    @property
    def name(self) -> str:
        return f"none: {self.problem.found}"

    def slots(self) -> ModelSlots | None:
        return self.known

    def build(self, plan: Plan, options: LoadOptions) -> LanguageModel:
        raise self.problem


def choose_implementation(files: CheckpointFiles, architecture: str, asked: str = "auto", trust_remote_code: bool = False) -> Implementation:
    """The implementation that was asked for; for "auto" bitgrain's own where there is one, else the host's.

    Args:
        architecture:      see registry.architecture_of().
        asked:             one of MODEL_IMPLS.
        trust_remote_code: modelling code that the checkpoint brings may be run, where nobody else has any.
    Raises:
        RequestError: no such name.
        UnsupportedArchitectureError, MissingDependencyError: the one that was asked for by name cannot run the architecture.
    """
    if asked not in MODEL_IMPLS:
        raise RequestError(f"model_impl = {asked!r} (--model-impl)", "no such modelling code", f"one of {', '.join(MODEL_IMPLS)}", "choose one of them")
    if trust_remote_code:
        _host().require_own_code(files.config)
    own = find_model(architecture) is not None
    if asked == "transformers" or (asked == "auto" and not own and architecture):
        try:
            # the host knows multimodal architectures by their own names, not by those of their text models
            hosted = _host().HostedImplementation.find(files, wrapper_of(files.config) or architecture, trust_remote_code)
            return _usable(hosted, asked)
        except (UnsupportedArchitectureError, MissingDependencyError) as problem:
            if asked == "transformers":
                raise
            return Nobody(_neither(files.config_name, architecture, problem))
    if own:
        return OwnFile(files, architecture)
    return Nobody(_no_file(files.config_name, architecture))


def _usable(hosted: Any, asked: str) -> Implementation:
    """The host's implementation, or Nobody with the modules that the host knows, where it cannot run them."""
    problem: BitgrainError | None = hosted.problem
    if problem is not None:
        return Nobody(problem if asked == "transformers" else _neither(hosted.files.config_name, hosted.architecture, problem), hosted.slots())
    found: Implementation = hosted
    return found


def _host() -> Any:
    return import_module(HOST)


def _no_file(source: str, architecture: str) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"{source}: architectures",
        f"{architecture!r}, which bitgrain has no file for" if architecture else "no architecture",
        f"one of {', '.join(sorted(models.names()))}",
        "use another program for this model, or install a package that adds the architecture (entry point bitgrain.models)",
    )


def _neither(source: str, architecture: str, problem: BitgrainError) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"{source}: architectures",
        f"{architecture!r}, which bitgrain has no file for, and {problem.found}",
        f"{problem.needed}; or one of {', '.join(sorted(models.names()))}",
        f"{problem.action}; or install a package that adds the architecture (entry point bitgrain.models)",
    )
