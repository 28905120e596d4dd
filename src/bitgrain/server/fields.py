"""Reads JSON requests field by field: every field is honoured or refused by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from bitgrain.errors import RequestError

T = TypeVar("T")
D = TypeVar("D")

MAX_BODY_BYTES = 64 << 20


class BadRequest(RequestError):
    """A request that cannot be honoured.

    Args:
        param: the field to blame, for the OpenAI error shape.
        status, code: HTTP status and machine-readable code.
    """

    def __init__(
        self, where: str, found: str, needed: str, action: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(where, found, needed, action)
        self.param, self.status, self.code = param, status, code


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises:
        BadRequest: not JSON, not an object, or a key stands twice.
    """
    try:
        value = json.loads(body, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except BadRequest:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRequest("body", f"not valid JSON ({error})", "a JSON object", "correct the request's body", code="invalid_json") from error
    if not isinstance(value, dict):
        raise BadRequest("body", f"a JSON {_kind(value)}", "a JSON object", "correct the request's body", code="invalid_json")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise BadRequest(
            "body", f"keys that stand twice: {', '.join(map(repr, twice))}", "unique keys", "remove one of them", param=twice[0]
        )
    return value


def _refuse_constant(name: str) -> None:
    raise BadRequest("body", f"the value {name}, which JSON does not have", "a finite number", "correct the value", code="invalid_json")


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)


class Fields:
    """One JSON object being read; what nobody has taken at the end is refused.

    Args:
        where: path of the object inside the request, "" for the request itself.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values, self._where = dict(values), where
        self._known: list[str] = []

    def path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def take(self, name: str, check: Callable[[Any], T | None], needed: str, default: D) -> T | D:
        """Value of a field, or `default` when it is absent or null; `check` returns None for a value that is not valid."""
        self._known.append(name)
        value = self._values.pop(name, None)
        if value is None:
            return default
        checked = check(value)
        if checked is None:
            raise self.bad(name, value, needed)
        return checked

    def flag(self, name: str, default: bool = False) -> bool:
        return self.take(name, lambda v: v if isinstance(v, bool) else None, "true or false", default)

    def integer(self, name: str, default: D, low: int | None = None, high: int | None = None) -> int | D:
        def check(value: Any) -> int | None:
            if not isinstance(value, int) or isinstance(value, bool):
                return None
            return value if (low is None or value >= low) and (high is None or value <= high) else None

        bounds = [f"≥ {low}"] * (low is not None) + [f"≤ {high}"] * (high is not None)
        return self.take(name, check, f"a whole number {' and '.join(bounds)}".strip(), default)

    def string(self, name: str, default: D) -> str | D:
        return self.take(name, lambda v: v if isinstance(v, str) else None, "a string", default)

    def object(self, name: str) -> dict[str, Any]:
        return self.take(name, lambda v: v if isinstance(v, dict) else None, "an object", {})

    def raw(self, name: str) -> Any:
        """Value of a field as it stands; None when absent."""
        return self.take(name, lambda v: v, "", None)

    def neutral(self, name: str, *allowed: Any) -> None:
        """Accept a field of the interface that is not supported, as long as its value changes nothing."""
        self._known.append(name)
        value = self._values.pop(name, None)
        # 1 == True in Python, but not in JSON; 0 and 0.0 are one number there
        same = (value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)
        if value is not None and not any(same):
            shown = ", ".join(json.dumps(a) for a in allowed)
            raise BadRequest(
                self.path(name),
                _shown(value),
                f"null{' or ' + shown if shown else ''}: this server does not support anything else here",
                f"leave {self.path(name)!r} out",
                param=self.path(name),
                code="unsupported_parameter",
            )

    def informational(self, *names: str) -> None:
        """Take fields that describe the sender and ask for nothing."""
        for name in names:
            self.raw(name)

    def end(self) -> None:
        """Refuse every field that was not taken.

        Raises:
            BadRequest: names all of them, and the nearest known names.
        """
        if not self._values:
            return
        unknown = sorted(self._values)
        near = sorted({n for u in unknown for n in difflib.get_close_matches(u, self._known, 2)})
        raise BadRequest(
            ", ".join(map(self.path, unknown)),
            f"unknown field{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}",
            f"fields among {', '.join(sorted(set(self._known)))}",
            f"did you mean {', '.join(map(repr, near))}?" if near else "leave the unknown fields out",
            param=self.path(unknown[0]),
            code="unknown_parameter",
        )

    def bad(self, name: str, value: Any, needed: str) -> BadRequest:
        return BadRequest(
            self.path(name), _shown(value), needed, f"correct {self.path(name)!r}", param=self.path(name), code="invalid_value"
        )


def _shown(value: Any, limit: int = 120) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= limit else text[:limit] + " …"


def token_ids(value: Any) -> list[int] | None:
    """A non-empty list of whole numbers, or None."""
    if isinstance(value, list) and value and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        return value
    return None


def prompts(value: Any) -> tuple[list[str | list[int]], bool] | None:
    """(prompts, whether several were sent) of a string, a list of strings, token ids or a list of token ids; else None."""
    if isinstance(value, str):
        return [value], False
    if (ids := token_ids(value)) is not None:
        return [ids], False
    if isinstance(value, list) and value and (all(isinstance(v, str) for v in value) or all(token_ids(v) is not None for v in value)):
        return list(value), True
    return None


def string_list(value: Any) -> tuple[str, ...] | None:
    """A string or a list of strings, else None."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if _all(value, str) else None


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) for v in value)


def neutral_fields(fields: Fields, names: Mapping[str, Iterable[Any]]) -> None:
    """Apply Fields.neutral to a table of names and neutral values."""
    for name, allowed in names.items():
        fields.neutral(name, *allowed)
