"""What the server serves: an engine, and how it is called."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest

from bitgrain.engine.engine import Engine
from bitgrain.errors import BitgrainError
from bitgrain.server.failures import wrong_model
from bitgrain.server.fields import MAX_BODY_BYTES, BadRequest, Fields, parse_object

ANY_MODEL = "default"


@dataclass(frozen=True, slots=True)
class Served:
    """One served model.

    Args:
        names: what clients may write in `model`, the first of them in answers.
        path:  where the checkpoint is.
        plan:  plain data for GET /plan: what the checkpoint is and which kernels run it.
    """

    engine: Engine
    names: tuple[str, ...]
    path: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, fields: Fields) -> None:
        """Take `model`; refuse the name of a model that is not served."""
        name = fields.string("model", self.name)
        known = (*self.names, self.path, ANY_MODEL)
        if name not in known:
            raise wrong_model(name, known)

    def token_text(self, token_id: int) -> str:
        tokenizer = self.engine.tokenizer
        return "" if tokenizer is None else tokenizer.token_text(token_id)


async def read_fields(http: HttpRequest) -> Fields:
    """The fields of a request's JSON body.

    Raises:
        BadRequest: the body is too large or not a JSON object.
    """
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise BadRequest("body", f"more than {MAX_BODY_BYTES} bytes", "a smaller body", "send fewer prompts at once", status=413)
    return Fields(parse_object(bytes(body)))


def finish_name(reason: str) -> str:
    """The OpenAI name of a finish reason; errors and cancellations have been raised before."""
    if reason not in ("stop", "length"):
        raise BitgrainError("request", f"ended with {reason}", "stop or length", "report this")
    return reason
