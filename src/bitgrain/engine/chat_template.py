"""Renders chat templates in the environment that checkpoints' templates are written for."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from bitgrain.errors import MissingDependencyError, RequestError


class ChatTemplate:
    """One compiled template.

    Source of the environment (trim_blocks, lstrip_blocks, loop controls, tojson without HTML escapes, raise_exception,
    strftime_now): transformers, documentation of chat templates, version 5.

    Raises:
        RequestError: the template's syntax is wrong.
        MissingDependencyError: jinja2 is absent.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            import jinja2
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise MissingDependencyError(
                "chat template", f"jinja2 cannot be imported ({error})", "jinja2 ≥ 3.1", "pip install jinja2"
            ) from error
        # the sandbox keeps a checkpoint's template from reaching Python objects
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise RequestError(
                "chat template", f"it cannot be compiled: {error}", "a valid jinja template", "mend the checkpoint's chat template"
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **values: Any) -> str:
        """The prompt for a conversation.

        Raises:
            RequestError: the template refuses these messages; its own words are in `found`.
        """
        variables = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **values,
            "messages": [dict(m) for m in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(variables)
        except Exception as error:  # a template is a program of the checkpoint's author and may fail in any way
            raise RequestError(
                "messages",
                f"the model's chat template refuses them: {error}",
                "a conversation that this model's template accepts",
                "change the roles or their order, or send a plain completion",
            ) from error


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
