"""Every error that bitgrain raises.

    BitgrainError
    ├── CheckpointError              reading: what is in the files
    │   ├── DamagedFileError         truncated, overlapping, lying header, not a checkpoint
    │   ├── MissingTensorError       a scheme or the architecture needs a tensor that is not there
    │   ├── UnexpectedTensorError    a tensor that nothing accounts for
    │   ├── ShapeMismatchError
    │   ├── DtypeMismatchError
    │   ├── BadValueError            NaN, infinite, zero or negative scales, indices out of range
    │   └── UnsafeFileError          would execute code when read
    ├── MeaningError                 understanding: what the files say
    │   ├── UnknownFormatError
    │   ├── ConfigError              a key is missing, unknown or has an impossible value
    │   ├── ConflictingConfigError   two files, or a file and the request, disagree
    │   ├── RuleMismatchError        a rule matches nothing, or the tensors contradict it
    │   └── LabelMismatchError       the data contradict what the configuration calls them
    ├── RunError                     running: what this machine and this build can do
    │   ├── NoKernelError
    │   ├── LayoutError
    │   ├── ShardError
    │   ├── UnsupportedArchitectureError
    │   └── MissingDependencyError
    ├── RequestError                 user input: options, prompts, names
    │   └── PromptTooLongError
    └── ManyProblemsError            several of the above, found together

A message always has four parts: where, what is there, what was needed, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class BitgrainError(Exception):
    """Root of all errors; `str()` gives the four parts, one per line.

    Args:
        where:  file, module path, tensor name or option.
        found:  what is there.
        needed: what was needed instead.
        action: what the reader can do about it.
    """

    def __init__(self, where: str, found: str, needed: str, action: str) -> None:
        self.where, self.found, self.needed, self.action = where, found, needed, action
        super().__init__(f"{where}: {found}\n  needed: {needed}\n  to do:  {action}")

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.where, self.found, self.needed, self.action))

    def moved_to(self, where: str) -> BitgrainError:
        """The same problem at a place that the raiser did not know."""
        return type(self)(where, self.found, self.needed, self.action)

    def as_dict(self) -> dict[str, object]:
        """The four parts and the error's class, ready for JSON."""
        return {
            "type": type(self).__name__,
            "where": self.where,
            "found": self.found,
            "needed": self.needed,
            "action": self.action,
        }


class CheckpointError(BitgrainError):
    """Something about the files' contents."""


class DamagedFileError(CheckpointError):
    """A file is truncated, overlapping, malformed or absent."""


class MissingTensorError(CheckpointError):
    """A tensor that must exist does not."""


class UnexpectedTensorError(CheckpointError):
    """A tensor exists that no module accounts for."""


class ShapeMismatchError(CheckpointError):
    """A tensor's shape differs from the shape that its module needs."""


class DtypeMismatchError(CheckpointError):
    """A tensor's dtype differs from the dtypes that its scheme allows."""


class BadValueError(CheckpointError):
    """Stored values that no producer means: NaN, infinite or zero scales, indices out of range."""


class UnsafeFileError(CheckpointError):
    """Reading the file would execute code."""


class MeaningError(BitgrainError):
    """Something about what the files say."""


class UnknownFormatError(MeaningError):
    """No registered format recognizes the checkpoint."""


class ConfigError(MeaningError):
    """A configuration key is missing, unknown or impossible."""


class ConflictingConfigError(MeaningError):
    """Two descriptions of the same checkpoint disagree."""


class RuleMismatchError(MeaningError):
    """A rule of the configuration matches nothing, or the tensors contradict it."""


class LabelMismatchError(MeaningError):
    """The data contradict the label that the configuration gives them."""


class RunError(BitgrainError):
    """Something about running on this machine."""


class NoKernelError(RunError):
    """No kernel can run a module under the chosen policy; lists every candidate with its reason."""


class LayoutError(RunError):
    """A tensor does not have the layout that an operation needs."""


class ShardError(RunError):
    """A weight cannot be cut at the requested place."""


class UnsupportedArchitectureError(RunError):
    """No model file exists for the architecture."""


class MissingDependencyError(RunError):
    """An optional package is needed and absent or broken."""


class RequestError(BitgrainError):
    """An option, a prompt or a name given by the user cannot be honoured."""


class PromptTooLongError(RequestError):
    """The prompt and the requested tokens do not fit the model's context."""


class ManyProblemsError(BitgrainError):
    """Several problems that were found together; `problems` holds each one."""

    def __init__(self, where: str, problems: Sequence[BitgrainError]) -> None:
        self.problems = tuple(problems)
        shown = [f"{i}. {type(p).__name__}: {p}" for i, p in enumerate(self.problems, 1)]
        super().__init__(
            where,
            f"{len(self.problems)} problems\n" + "\n".join(shown),
            "none of these",
            "mend each of them; the list is complete as far as one pass can see",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (ManyProblemsError, (self.where, self.problems))

    def moved_to(self, where: str) -> BitgrainError:
        return ManyProblemsError(where, self.problems)

    def as_dict(self) -> dict[str, object]:
        return {"type": type(self).__name__, "where": self.where, "problems": [p.as_dict() for p in self.problems]}


def raise_all(where: str, problems: Sequence[BitgrainError]) -> None:
    """Raise nothing, the one problem, or all problems as one ManyProblemsError."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ManyProblemsError(where, problems)
