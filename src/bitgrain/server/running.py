"""Runs engine requests for one HTTP request: all of them together, cancelled when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from bitgrain.engine.engine import Engine
from bitgrain.engine.llm import split_choices
from bitgrain.engine.request import Collected, Delta, Finish, Request
from bitgrain.engine.sampling import SamplingParams
from bitgrain.errors import BitgrainError, RequestError, RunError

Prompt = str | list[int]


class ClientLeft(Exception):
    """The connection was closed before the answer was complete."""


async def encode(engine: Engine, prompt: Prompt) -> Sequence[int]:
    """Token ids of a prompt; long texts do not hold up the event loop."""
    if not isinstance(prompt, str):
        return prompt
    if engine.tokenizer is None:
        raise RequestError("prompt", "text, but the server has no tokenizer", "token ids", "send token ids")
    return await asyncio.to_thread(engine.tokenizer.encode, prompt)


def submit(engine: Engine, prompts: Sequence[tuple[Sequence[int], SamplingParams]], ids: Sequence[str | None] = ()) -> list[Request]:
    """Submit every choice of every prompt, or none of them."""
    submitted: list[Request] = []
    try:
        for index, (prompt, params) in enumerate(prompts):
            for number, one in enumerate(split_choices(params)):
                own = ids[index] if index < len(ids) else None
                submitted.append(engine.submit(prompt, one, f"{own}-{number}" if own and params.n > 1 else own))
    except BaseException:
        cancel_all(submitted)
        raise
    return submitted


def cancel_all(requests: Sequence[Request]) -> None:
    for request in requests:
        request.cancel()


async def collect_all(http: HttpRequest, requests: Sequence[Request]) -> list[Collected]:
    """Every request to its end.

    Raises:
        ClientLeft:    the client closed the connection; the requests are cancelled.
        BitgrainError: a request failed.
    """
    work = asyncio.ensure_future(_collect_each(requests))
    watch = asyncio.ensure_future(_until_disconnect(http))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientLeft
        return await work
    finally:
        cancel_all(requests)
        work.cancel()
        watch.cancel()


async def _until_disconnect(http: HttpRequest) -> None:
    # the body has been read, so the only message that can still come is the disconnect
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _collect_each(requests: Sequence[Request]) -> list[Collected]:
    collected = []
    for request in requests:
        whole = Collected()
        async for delta in request:
            whole.add(delta)
        raise_failure(whole.finish)
        collected.append(whole)
    return collected


def raise_failure(finish: Finish | None) -> None:
    """Raise what ended a request, unless it ended as it should.

    Raises:
        BitgrainError: the request's error; RunError when the server dropped it.
    """
    if finish is not None and finish.error is not None:
        raise finish.error
    if finish is not None and finish.reason == "cancelled":
        raise RunError("request", "it was cancelled because the server stops", "a running server", "send it again later")


async def merged(requests: Sequence[Request]) -> AsyncIterator[tuple[int, Delta]]:
    """(index of the request, delta) in the order in which they come; leaving the loop cancels all requests.

    Raises:
        BitgrainError: a request failed.
    """
    queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
    tasks = [asyncio.ensure_future(_pump(index, request, queue)) for index, request in enumerate(requests)]
    unfinished = len(requests)
    try:
        while unfinished:
            index, delta = await queue.get()
            raise_failure(delta.finish)
            unfinished -= delta.finish is not None
            yield index, delta
    finally:
        cancel_all(requests)
        for task in tasks:
            task.cancel()


async def _pump(index: int, request: Request, queue: asyncio.Queue[tuple[int, Delta]]) -> None:
    try:
        async for delta in request:
            queue.put_nowait((index, delta))
    except BitgrainError as error:
        queue.put_nowait((index, Delta(finish=Finish("error", error=error))))


def event(data: Any) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"
