"""POST /generate, in SGLang's shape."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from bitgrain.engine.request import Collected, Finish, Request
from bitgrain.engine.sampling import MAX_TOP_LOGPROBS, SamplingParams
from bitgrain.errors import BitgrainError
from bitgrain.server.failures import describe
from bitgrain.server.fields import Fields, neutral_fields, prompts, string_list
from bitgrain.server.logprobs import generate_logprobs
from bitgrain.server.running import Prompt, collect_all, encode, event, merged, submit
from bitgrain.server.sampling_fields import SGLANG_NAMES, read_sampling
from bitgrain.server.served import Served, read_fields

SAMPLING_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_new_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "no_stop_trim": (False,),
    "stop_regex": ([], ""),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "logit_bias": ({},),
    "custom_params": ({},),
    "stream_interval": (1,),
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "input_embeds": (),
    "image_data": ([],),
    "video_data": ([],),
    "audio_data": ([],),
    "modalities": ([],),
    "token_ids_logprob": (),
    "lora_path": (),
    "session_params": (),
    "custom_logit_processor": (),
    "return_hidden_states": (False,),
    "logprob_start_len": (-1,),
    "log_metrics": (True,),
}


@dataclass(frozen=True, slots=True)
class GenerateJob:
    """A validated request.

    Args:
        many: the prompts came as a list, so the answer is one.
        ids:  the sender's own request ids, one per prompt, or none.
    """

    prompts: list[Prompt]
    params: list[SamplingParams]
    many: bool
    stream: bool
    with_text: bool
    ids: tuple[str, ...]


def _read(fields: Fields, served: Served) -> GenerateJob:
    asked, many = _read_prompts(fields)
    logprobs = _read_logprobs(fields)
    params = _read_params(fields, len(asked), {**served.engine.suggested_sampling, "logprobs": logprobs})
    ids = fields.take("rid", string_list, "a string, or one per prompt", ())
    if ids and len(ids) != len(asked):
        raise fields.bad("rid", list(ids), f"{len(asked)} ids, one per prompt")
    stream, with_text = fields.flag("stream"), fields.flag("return_text_in_logprobs")
    neutral_fields(fields, NEUTRAL)
    fields.end()
    return GenerateJob(asked, params, many, stream, with_text, ids)


def _read_prompts(fields: Fields) -> tuple[list[Prompt], bool]:
    def texts(value: Any) -> tuple[list[Prompt], bool] | None:
        found = prompts(value)
        return found if found and all(isinstance(p, str) for p in found[0]) else None

    def ids(value: Any) -> tuple[list[Prompt], bool] | None:
        found = prompts(value)
        return found if found and not any(isinstance(p, str) for p in found[0]) else None

    text = fields.take("text", texts, "a string, or a list of strings", None)
    tokens = fields.take("input_ids", ids, "a list of token ids, or a list of such lists", None)
    if text is not None and tokens is not None:
        raise fields.bad("input_ids", tokens[0], "`text` or `input_ids`, not both")
    found = text or tokens
    if found is None:
        raise fields.bad("text", None, "`text` or `input_ids`")
    return found


def _read_logprobs(fields: Fields) -> int | None:
    wanted = fields.flag("return_logprob")
    top = fields.integer("top_logprobs_num", 0, 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise fields.bad("top_logprobs_num", top, "`return_logprob`: true next to it")
    return top if wanted else None


def _read_params(fields: Fields, count: int, defaults: dict[str, Any]) -> list[SamplingParams]:
    """One set for all prompts, or a list with one per prompt."""

    def objects(value: Any) -> list[dict[str, Any]] | None:
        several = value if isinstance(value, list) else [value] * count
        return several if len(several) == count and all(isinstance(v, dict) for v in several) else None

    given: list[dict[str, Any]] = fields.take("sampling_params", objects, "an object, or one object per prompt", [{}] * count)
    read = []
    for i, values in enumerate(given):
        inner = Fields(values, "sampling_params" if values is given[0] else f"sampling_params[{i}]")
        read.append(read_sampling(inner, SGLANG_NAMES, **defaults))
        neutral_fields(inner, SAMPLING_NEUTRAL)
        inner.end()
    return read


def generate_router(served: Served) -> APIRouter:
    router = APIRouter()

    @router.post("/generate")
    async def generate(http: HttpRequest) -> Response:
        job = _read(await read_fields(http), served)
        ids = [await encode(served.engine, prompt) for prompt in job.prompts]
        requests = submit(served.engine, list(zip(ids, job.params, strict=True)), job.ids)
        several = job.many or len(requests) > 1
        if job.stream:
            return StreamingResponse(_events(served, job, requests, several), media_type="text/event-stream")
        done = await collect_all(http, requests)
        answers = [_answer(served, job, request, whole) for request, whole in zip(requests, done, strict=True)]
        return JSONResponse(answers if several else answers[0])

    return router


def _answer(served: Served, job: GenerateJob, request: Request, whole: Collected) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "id": request.id,
        "finish_reason": _finish(whole.finish, len(whole.token_ids)),
        "prompt_tokens": len(request.prompt_ids),
        "completion_tokens": len(whole.token_ids),
        "cached_tokens": 0,
    }
    if whole.finish is not None:
        meta["e2e_latency"] = (request.finished_at or time.monotonic()) - request.submitted_at
    if request.params.logprobs is not None:
        meta |= generate_logprobs(whole.logprobs, served.token_text, job.with_text)
    return {"text": whole.text, "output_ids": list(whole.token_ids), "meta_info": meta}


def _finish(finish: Finish | None, generated: int) -> dict[str, Any] | None:
    if finish is None:
        return None
    if finish.reason == "length":
        return {"type": "length", "length": generated}
    return {"type": finish.reason, "matched": finish.matched}


async def _events(served: Served, job: GenerateJob, requests: Sequence[Request], several: bool) -> AsyncIterator[str]:
    """Cumulative answers: each event holds everything so far."""
    wholes = [Collected() for _ in requests]
    try:
        async for index, delta in merged(requests):
            wholes[index].add(delta)
            answer = _answer(served, job, requests[index], wholes[index])
            yield event({**answer, **({"index": index} if several else {})})
    except BitgrainError as error:
        yield event(describe(error)[1])
    yield event("[DONE]")
