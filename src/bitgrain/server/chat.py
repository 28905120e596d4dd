"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from bitgrain.engine.request import Request
from bitgrain.engine.sampler import TokenLogprob
from bitgrain.engine.sampling import MAX_TOP_LOGPROBS, SamplingParams
from bitgrain.errors import BitgrainError, RequestError
from bitgrain.server.completions import INFORMATIONAL, NEUTRAL, read_stream, says_something, usage
from bitgrain.server.failures import describe
from bitgrain.server.fields import BadRequest, Fields, neutral_fields
from bitgrain.server.logprobs import chat_logprobs
from bitgrain.server.running import collect_all, event, merged, submit
from bitgrain.server.sampling_fields import OPENAI_NAMES, read_sampling
from bitgrain.server.served import Served, finish_name, read_fields

ROLES = ("system", "user", "assistant")

CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **NEUTRAL,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
# keys of a message that clients send back from earlier answers
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "tool_call_id": (),
}


@dataclass(frozen=True, slots=True)
class ChatJob:
    """A validated request."""

    messages: list[dict[str, str]]
    template_values: dict[str, Any]
    params: SamplingParams
    stream: bool
    include_usage: bool


def _read(fields: Fields, served: Served) -> ChatJob:
    served.check_name(fields)
    messages = _read_messages(fields)
    template_values = fields.object("chat_template_kwargs")
    params = read_sampling(fields, OPENAI_NAMES, **served.engine.suggested_sampling, max_tokens=None, logprobs=_read_logprobs(fields))
    stream, include_usage = read_stream(fields)
    neutral_fields(fields, CHAT_NEUTRAL)
    fields.informational(*INFORMATIONAL)
    fields.end()
    reserved = sorted({"messages", "add_generation_prompt"} & set(template_values))
    if reserved:
        raise fields.bad("chat_template_kwargs", reserved, "values besides the conversation itself")
    return ChatJob(messages, template_values, params, stream, include_usage)


def _read_logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("logprobs")
    top = fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise fields.bad("top_logprobs", top, "`logprobs`: true next to it")
    return (top or 0) if wanted else None


def _read_messages(fields: Fields) -> list[dict[str, str]]:
    needed = "a list of messages, each an object with `role` and `content`"
    given = fields.take("messages", lambda v: v if isinstance(v, list) and v else None, needed, [])
    if not given:
        raise fields.bad("messages", None, needed)
    return [_read_message(value, f"messages[{i}]") for i, value in enumerate(given)]


def _read_message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise BadRequest(
            where, repr(value)[:120], "an object with `role` and `content`", "correct the message", param=where, code="invalid_value"
        )
    fields = Fields(value, where)
    role = fields.take("role", lambda v: v if isinstance(v, str) and v in ROLES else None, f"one of {', '.join(ROLES)}", "")
    content = fields.take("content", lambda v: _content(v, where), "a string, or a list of parts of type `text`", None)
    neutral_fields(fields, MESSAGE_NEUTRAL)
    fields.end()
    if not role or content is None:
        raise fields.bad("content" if role else "role", None, "a value")
    return {"role": role, "content": content}


def _content(value: Any, where: str) -> str | None:
    """The text of a message; parts become lines, since many templates know only strings."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        return None
    texts = []
    for i, part in enumerate(value):
        fields = Fields(part if isinstance(part, dict) else {"type": part}, f"{where}.content[{i}]")
        fields.take("type", lambda v: v if v == "text" else None, 'the type "text"; this server reads no other kind', "text")
        texts.append(fields.take("text", lambda v: v if isinstance(v, str) else None, "a string", None))
        fields.end()
    return None if any(text is None for text in texts) else "\n".join(str(text) for text in texts)


def chat_router(served: Served) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(http: HttpRequest) -> Response:
        job = _read(await read_fields(http), served)
        tokenizer = served.engine.tokenizer
        if tokenizer is None:
            raise RequestError("messages", "the server has no tokenizer", "token ids", "use /generate with input_ids")
        ids = await asyncio.to_thread(tokenizer.encode_chat, job.messages, **job.template_values)
        requests = submit(served.engine, [(ids, job.params)])
        base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
        if job.stream:
            head = {**base, "object": "chat.completion.chunk"}
            return StreamingResponse(_events(served, job, requests, head), media_type="text/event-stream")
        done = await collect_all(http, requests)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": whole.text, "refusal": None},
                "logprobs": _logprobs(served, job, whole.logprobs),
                "finish_reason": finish_name(whole.finish.reason if whole.finish else "error"),
            }
            for index, whole in enumerate(done)
        ]
        counts = usage(requests, job.params.n, sum(len(whole.token_ids) for whole in done))
        return JSONResponse({**base, "object": "chat.completion", "choices": choices, "usage": counts})

    return router


def _logprobs(served: Served, job: ChatJob, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    return None if job.params.logprobs is None else chat_logprobs(entries, served.token_text)


async def _events(served: Served, job: ChatJob, requests: Sequence[Request], head: dict[str, Any]) -> AsyncIterator[str]:
    generated = 0
    extra: dict[str, Any] = {"usage": None} if job.include_usage else {}

    def chunk(index: int, delta: dict[str, str], logprobs: dict[str, Any] | None = None, finish: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**head, "choices": [choice], **extra})

    try:
        for index in range(len(requests)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, delta in merged(requests):
            generated += len(delta.token_ids)
            if not says_something(delta):
                continue
            finish = finish_name(delta.finish.reason) if delta.finish else None
            logprobs = _logprobs(served, job, delta.logprobs) if delta.logprobs else None
            yield chunk(index, {"content": delta.text} if delta.text else {}, logprobs, finish)
        if job.include_usage:
            yield event({**head, "choices": [], "usage": usage(requests, job.params.n, generated)})
    except BitgrainError as error:
        yield event(describe(error)[1])
    yield event("[DONE]")
