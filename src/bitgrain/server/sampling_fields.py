"""Sampling parameters out of JSON fields, under each interface's own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitgrain.engine.sampling import SamplingParams
from bitgrain.errors import RequestError
from bitgrain.server.fields import BadRequest, Fields

_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "n",
)

# parameter -> field names that mean it
OPENAI_NAMES: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in _SAME},
    "max_tokens": ("max_tokens", "max_completion_tokens"),
    "seed": ("seed",),
}
SGLANG_NAMES: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in _SAME},
    "max_tokens": ("max_new_tokens",),
    "seed": ("sampling_seed", "seed"),
}


def read_sampling(fields: Fields, names: Mapping[str, tuple[str, ...]], **defaults: Any) -> SamplingParams:
    """Take every sampling field; absent ones and nulls keep `defaults`, or else SamplingParams' own.

    Raises:
        BadRequest: values that cannot be honoured, under the names that the request used.
    """
    values, used = dict(defaults), {}
    for parameter, aliases in names.items():
        given = {name: value for name in aliases if (value := fields.raw(name)) is not None}
        if len({repr(value) for value in given.values()}) > 1:
            raise BadRequest(
                " and ".join(map(fields.path, given)),
                "two values for one thing",
                "one of them",
                "leave one out",
                param=fields.path(next(iter(given))),
            )
        for name, value in given.items():
            values[parameter], used[parameter] = value, name
    try:
        return SamplingParams(**values)
    except RequestError as error:
        bad = [parameter for parameter in used if not _is_valid(parameter, values[parameter])]
        paths = [fields.path(used[parameter]) for parameter in bad]
        raise BadRequest(
            ", ".join(paths),
            error.found,
            error.needed,
            "correct the values named here",
            param=paths[0] if paths else None,
            code="invalid_value",
        ) from error


def _is_valid(parameter: str, value: Any) -> bool:
    try:
        SamplingParams(**{parameter: value})
    except RequestError:
        return False
    return True
