"""The two-sided account of loading: what the files hold against what the plan declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bitgrain.errors import BitgrainError, MissingTensorError, UnexpectedTensorError, raise_all


class Ledger:
    """Every stored tensor is consumed once, part by part where modules share it, or ignored under a named rule; anything else is an error.

    Args:
        stored:  all tensor names of the checkpoint.
        ignored: tensor name to the rule under which it is left out.
        parts:   tensor name to the names of its parts, for tensors that several modules share.
    """

    def __init__(self, stored: Iterable[str], ignored: Mapping[str, str], parts: Mapping[str, Iterable[str]] | None = None) -> None:
        self._open = set(stored) - ignored.keys()
        self._ignored = dict(ignored)
        self._consumers: dict[tuple[str, str], str] = {}
        self._parts = {tensor: set(names) for tensor, names in (parts or {}).items()}

    def consume(self, tensor: str, consumer: str, part: str = "") -> None:
        """Record that `consumer` (a module) has read `tensor`, or one part of it.

        Raises:
            MissingTensorError: the checkpoint does not hold it.
            UnexpectedTensorError: another module has consumed it already.
        """
        key = (tensor, part if tensor in self._parts else "")
        if key in self._consumers:
            if self._consumers[key] != consumer:
                raise UnexpectedTensorError(
                    part or tensor, f"consumed by {self._consumers[key]} and again by {consumer}", "one consumer", "report this: the plan is wrong"
                )
            return
        left = self._parts.get(tensor)
        if tensor not in self._open or (left is not None and part not in left):
            raise MissingTensorError(part or tensor, "not in the checkpoint", f"the tensor, for {consumer}", "fetch or write the checkpoint again")
        if left is not None:
            left.discard(part)
        if not left:
            self._open.discard(tensor)
        self._consumers[key] = consumer

    def close(self, where: str) -> None:
        """Raise one error that lists every stored tensor, and every part of one, that nothing consumed."""
        problems: list[BitgrainError] = [
            UnexpectedTensorError(name, "no module consumed it", "an account of every tensor", "the model would run without it; fetch the right checkpoint")
            for tensor in sorted(self._open)
            for name in sorted(self._parts.get(tensor) or {tensor})
        ]
        raise_all(where, problems)
