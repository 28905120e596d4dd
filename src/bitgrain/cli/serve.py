"""Serve a model over HTTP: SGLang's /generate, OpenAI's completions and chat, /metrics, and a page to chat at /."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgrain.cli.options import add_engine_arguments, add_load_arguments, add_model_argument, load, load_options, model_path
from bitgrain.cli.progress import progress_bar
from bitgrain.errors import MissingDependencyError, RequestError

if TYPE_CHECKING:
    from bitgrain.engine.llm import LLM

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 30000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_argument(parser)
    parser.add_argument("--host", default=DEFAULT_HOST, help=f"address to listen on (default {DEFAULT_HOST}: this machine only)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"port to listen on; 0: any free one (default {DEFAULT_PORT})")
    names = "what clients write in `model`; may be repeated (default: the folder's name)"
    parser.add_argument("--served-model-name", action="append", metavar="NAME", help=names)
    add_load_arguments(parser)
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    listen = _require_server()
    path = model_path(args)
    load_options(args)  # a refused option should not cost the time to load a model
    names = _names(args, path)
    listener = listen.bind(args.host, args.port)
    try:
        with progress_bar(f"loading {names[0]}") as step:
            llm = load(args, step)
        with llm:
            return _serve(llm, names, path, listener)
    finally:
        listener.close()


def _require_server() -> Any:
    try:
        import bitgrain.server.listen as listen
    except ImportError as error:
        raise MissingDependencyError(
            "bitgrain serve", f"the server's packages cannot be imported ({error})", "the extra `server`", 'pip install "bitgrain[server]"'
        ) from error
    return listen


def _names(args: argparse.Namespace, path: str) -> tuple[str, ...]:
    names = tuple(args.served_model_name or [Path(path).resolve().name if Path(path).exists() else path])
    if not all(name.strip() for name in names):
        raise RequestError("--served-model-name", "an empty name", "a name", "give the model a name, or leave the option out")
    return names


def _serve(llm: LLM, names: tuple[str, ...], path: str, listener: Any) -> int:
    from bitgrain.server import listen
    from bitgrain.server.app import create_app
    from bitgrain.server.served import Served

    served = Served(llm.engine, names, path, describe_model(llm.model))
    server = listen.make_server(create_app(served), on_start=lambda: _announce(listen.url_of(listener), served.name))
    server.run(sockets=[listener])
    if server.interrupted:
        raise KeyboardInterrupt
    return 0 if server.started else 1


def _announce(url: str, name: str) -> None:
    body = json.dumps({"text": "1 + 1 =", "sampling_params": {"temperature": 0, "max_new_tokens": 16}})
    print(f"bitgrain serves {name} at {url}  (chat in the browser; stop with Ctrl-C)")
    print(f"  curl {url}/generate -H 'Content-Type: application/json' -d '{body}'")
    sys.stdout.flush()


def describe_model(model: Any) -> dict[str, Any]:
    """Plain data for GET /plan: a summary, a row per module, the kernels chosen, and those in words."""
    kernels = [dict(row) for row in model.explain()]
    described: dict[str, Any] = {"summary": {}, "modules": [], "kernels": kernels, "explain": "\n".join(map(_explain_row, kernels))}
    plan = getattr(model, "plan", None)
    if plan is not None:
        totals = plan.totals
        summary = {name: totals[name] for name in ("modules", "parameters", "bytes", "bits_per_weight")}
        described["summary"] = {"format": plan.format, **summary, "plan_hash": plan.hash}
        described["modules"] = [{"module": name, "scheme": m.label, "bytes": m.nbytes, "why": m.why} for name, m in plan.modules.items()]
    return described


def _explain_row(row: dict[str, Any]) -> str:
    """One group of modules with its kernel, and below it each rejected kernel with the reason."""
    lines = [f"{row['modules']} (x{row['count']}): {row['kernel']} ({row['fidelity']})"]
    lines += [f"  not {c['kernel']}: {c['reason']}" for c in row["candidates"] if c["reason"]]
    return "\n".join(lines)
