"""The two-sided account of loading: what the files hold against what the plan declares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bitgrain.errors import BitgrainError, MissingTensorError, UnexpectedTensorError, raise_all


class Ledger:
    """Every stored tensor is consumed once or ignored under a named rule; anything else is an error.

    Args:
        stored:  all tensor names of the checkpoint.
        ignored: tensor name to the rule under which it is left out.
    """

    def __init__(self, stored: Iterable[str], ignored: Mapping[str, str]) -> None:
        self._open = set(stored) - ignored.keys()
        self._ignored = dict(ignored)
        self._consumers: dict[str, str] = {}

    def consume(self, tensor: str, consumer: str) -> None:
        """Record that `consumer` (a module) has read `tensor`.

        Raises:
            MissingTensorError: the checkpoint does not hold it.
            UnexpectedTensorError: another module has consumed it already.
        """
        if tensor in self._consumers:
            if self._consumers[tensor] != consumer:
                raise UnexpectedTensorError(
                    tensor, f"consumed by {self._consumers[tensor]} and again by {consumer}", "one consumer", "report this: the plan is wrong"
                )
            return
        if tensor not in self._open:
            raise MissingTensorError(tensor, "not in the checkpoint", f"the tensor, for {consumer}", "fetch or write the checkpoint again")
        self._open.discard(tensor)
        self._consumers[tensor] = consumer

    def close(self, where: str) -> None:
        """Raise one error that lists every stored tensor that nothing consumed."""
        problems: list[BitgrainError] = [
            UnexpectedTensorError(name, "no module consumed it", "an account of every tensor", "the model would run without it; fetch the right checkpoint")
            for name in sorted(self._open)
        ]
        raise_all(where, problems)
