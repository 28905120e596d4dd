"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from bitgrain.engine.request import Delta, Request
from bitgrain.engine.sampler import TokenLogprob
from bitgrain.engine.sampling import MAX_TOP_LOGPROBS, SamplingParams, Unstated
from bitgrain.errors import BitgrainError
from bitgrain.server.failures import describe
from bitgrain.server.fields import Fields, neutral_fields, prompts
from bitgrain.server.logprobs import completion_logprobs
from bitgrain.server.running import Prompt, collect_all, encode, event, merged, submit
from bitgrain.server.sampling_fields import OPENAI_NAMES, read_sampling
from bitgrain.server.served import Served, finish_name, read_fields

DEFAULT_TOKENS = Unstated(16)  # the interface's own default

# fields that both OpenAI endpoints accept as long as they ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logit_bias": ({},),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
INFORMATIONAL = ("user", "metadata", "safety_identifier", "prompt_cache_key")


@dataclass(frozen=True, slots=True)
class CompletionJob:
    """A validated request."""

    prompts: list[Prompt]
    params: SamplingParams
    stream: bool
    include_usage: bool


def read_stream(fields: Fields) -> tuple[bool, bool]:
    """(stream, include_usage)."""
    stream = fields.flag("stream")
    given = fields.object("stream_options")
    options = Fields(given, "stream_options")
    include_usage = options.flag("include_usage")
    options.neutral("continuous_usage_stats", False)
    options.neutral("include_obfuscation", True, False)
    options.end()
    if given and not stream:
        raise fields.bad("stream_options", given, "`stream`: true next to it")
    return stream, include_usage


def usage(requests: Sequence[Request], choices: int, generated: int) -> dict[str, int]:
    """Token counts; a prompt with several choices counts once."""
    prompt = sum(len(request.prompt_ids) for request in requests[::choices])
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _read(fields: Fields, served: Served) -> CompletionJob:
    served.check_name(fields)
    asked = fields.take("prompt", prompts, "a string, a list of strings, token ids, or a list of token ids", None)
    if asked is None:
        raise fields.bad("prompt", None, "a string, a list of strings, token ids, or a list of token ids")
    logprobs = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    params = read_sampling(fields, OPENAI_NAMES, **served.engine.suggested_sampling, max_tokens=DEFAULT_TOKENS, logprobs=logprobs)
    stream, include_usage = read_stream(fields)
    neutral_fields(fields, {**NEUTRAL, "echo": (False,), "suffix": ("",), "best_of": (1,)})
    fields.informational(*INFORMATIONAL)
    fields.end()
    return CompletionJob(asked[0], params, stream, include_usage)


def completions_router(served: Served) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        job = _read(await read_fields(http), served)
        ids = [await encode(served.engine, prompt) for prompt in job.prompts]
        requests = submit(served.engine, [(prompt, job.params) for prompt in ids])
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()), "model": served.name}
        if job.stream:
            return StreamingResponse(_events(served, job, requests, head), media_type="text/event-stream")
        done = await collect_all(http, requests)
        choices = [
            _choice(served, job, index, whole.text, whole.logprobs, finish_name(whole.finish.reason if whole.finish else "error"))
            for index, whole in enumerate(done)
        ]
        counts = usage(requests, job.params.n, sum(len(whole.token_ids) for whole in done))
        return JSONResponse({**head, "choices": choices, "usage": counts})

    return router


def _choice(
    served: Served, job: CompletionJob, index: int, text: str, entries: Sequence[TokenLogprob], finish: str | None, offset: int = 0
) -> dict[str, Any]:
    logprobs = None if job.params.logprobs is None else completion_logprobs(entries, served.token_text, offset)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


async def _events(served: Served, job: CompletionJob, requests: Sequence[Request], head: dict[str, Any]) -> AsyncIterator[str]:
    generated = 0
    offsets = [0] * len(requests)
    try:
        async for index, delta in merged(requests):
            generated += len(delta.token_ids)
            if not says_something(delta):
                continue
            finish = finish_name(delta.finish.reason) if delta.finish else None
            choice = _choice(served, job, index, delta.text, delta.logprobs, finish, offsets[index])
            offsets[index] += sum(len(served.token_text(entry.token_id)) for entry in delta.logprobs)
            yield event({**head, "choices": [choice], **({"usage": None} if job.include_usage else {})})
        if job.include_usage:
            yield event({**head, "choices": [], "usage": usage(requests, job.params.n, generated)})
    except BitgrainError as error:
        yield event(describe(error)[1])
    yield event("[DONE]")


def says_something(delta: Delta) -> bool:
    """Whether a delta is worth a message: steps whose text is held back add nothing that a client could show."""
    return bool(delta.text or delta.logprobs or delta.finish)
