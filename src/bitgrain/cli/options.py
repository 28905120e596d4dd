"""Options that several commands share, and the loading that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgrain.bundled import default_model, models
from bitgrain.errors import RequestError

if TYPE_CHECKING:
    from bitgrain.engine.llm import LLM
    from bitgrain.engine.sampling import SamplingParams


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint folder, file, hub id or bundled name (default: the bundled demo model)"
    )
    parser.add_argument("--model-path", metavar="MODEL", help="the same as MODEL")


def add_plan_arguments(parser: argparse._ActionsContainer) -> None:
    """Options that decide what the checkpoint's modules mean."""
    parser.add_argument(
        "--quantization", metavar="NAME",
        help="the checkpoint's format, which must agree with the files; or what an unquantized checkpoint becomes while it loads: int8, fp8, mxfp4, …",
    )  # fmt: skip
    parser.add_argument("--quantization-ignore", action="append", default=[], metavar="PATTERN", help="modules that stay in 16 bits then; may be repeated")
    parser.add_argument("--quantization-rule", action="append", default=[], metavar="PATTERN=NAME", help="what these modules become; may be repeated")
    parser.add_argument(
        "--model-impl", choices=("auto", "bitgrain", "transformers"),
        help="whose modelling code: bitgrain's, the transformers library's, or (auto, the default) the library's only where bitgrain has none",
    )  # fmt: skip
    parser.add_argument("--trust-remote-code", action="store_true", help="run modelling code that the checkpoint brings, where nobody else knows the architecture")
    parser.add_argument("--trust-tensors", action="store_true", help="believe quantized tensors that a rule of the configuration excludes")


def plan_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for open_checkpoint(); only what the user stated.

    Raises:
        RequestError: a rule that is no pair, or two rules for one pattern.
    """
    given = {
        "quantization": args.quantization,
        "ignore": tuple(args.quantization_ignore) or None,
        "rules": _pairs("--quantization-rule", args.quantization_rule, "pattern=name, such as *.down_proj=int8") or None,
        "trust_tensors": args.trust_tensors or None,
        "model_impl": args.model_impl,
        "trust_remote_code": args.trust_remote_code or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of load_model() under the names that users of serving engines type."""
    group = parser.add_argument_group("loading")
    add_plan_arguments(group)
    group.add_argument("--dequantize", action="store_true", help="keep quantized weights in memory in 16 bits")
    group.add_argument("--prepared-folder", metavar="PATH", help="keep weights in their kernels' layouts there: the next start is faster")
    group.add_argument("--kv-cache-dtype", metavar="TYPE", help='type of the KV cache (default "auto")')
    group.add_argument("--dtype", metavar="TYPE", help="compute type: auto, bfloat16, float16, float32")
    group.add_argument("--device", metavar="NAME", help="torch device (default: the platform's own)")
    group.add_argument("--tp-size", "--tensor-parallel-size", type=int, default=1, metavar="N", help="must be 1: one process")
    group.add_argument("--fidelity", choices=("exact", "fast"), help="fast admits kernels that change numerics (default exact)")
    group.add_argument("--kernel", action="append", default=[], metavar="OP=NAME", help="force a kernel; may be repeated")
    group.add_argument("--forbid", action="append", default=[], metavar="NAME", help="never use this kernel; may be repeated")
    group.add_argument("--require", choices=("native",), help="refuse to run on emulating kernels")
    group.add_argument("--context-length", type=int, metavar="N", help="tokens per sequence, at most the model's own")
    group.add_argument("--mem-fraction-static", type=float, metavar="F", help="refused: the KV cache is not allocated ahead")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--max-running-requests", type=int, metavar="N", help="sequences in one batch (default 32)")
    group.add_argument("--chunked-prefill-size", type=int, metavar="N", help="prompt tokens in one step (default 512)")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, metavar="N", help="tokens to generate at most")
    group.add_argument("--temperature", type=float, metavar="T", help="0: always the most probable token (default 0)")
    group.add_argument("--top-p", type=float, metavar="P", help="smallest set of tokens with this mass")
    group.add_argument("--top-k", type=int, metavar="K", help="the K most probable tokens")
    group.add_argument("--min-p", type=float, metavar="P", help="tokens at least this probable, relative to the first")
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")


def model_path(args: argparse.Namespace) -> str:
    """The checkpoint that a command line names.

    Raises:
        RequestError: two different ones, or none and no bundled model.
    """
    if args.model and args.model_path and args.model != args.model_path:
        raise RequestError("MODEL and --model-path", f"{args.model!r} and {args.model_path!r}", "one model", "leave one of them out")
    name = args.model or args.model_path
    if not name:
        return str(default_model())
    bundled = models()
    return str(bundled[name]) if name in bundled and not Path(name).exists() else name


def load_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for LLM(); only what the user stated.

    Raises:
        RequestError: an option that cannot be honoured.
    """
    _refuse(args)
    given = {
        **plan_options(args),
        "dequantize": args.dequantize or None,
        "prepared_folder": args.prepared_folder,
        "kv_cache": args.kv_cache_dtype,
        "dtype": args.dtype,
        "device": args.device,
        "fidelity": args.fidelity,
        "kernels": kernel_pairs(args.kernel) or None,
        "forbid": tuple(args.forbid) or None,
        "require": args.require,
        "context_length": args.context_length,
        "max_running_requests": getattr(args, "max_running_requests", None),
        "chunked_prefill_size": getattr(args, "chunked_prefill_size", None),
    }
    return {name: value for name, value in given.items() if value is not None}


def _refuse(args: argparse.Namespace) -> None:
    if args.tp_size != 1:
        raise RequestError(
            f"--tp-size {args.tp_size}", "more than one process", "1: this version runs in one process", "leave --tp-size out"
        )
    if args.mem_fraction_static is not None:
        raise RequestError(
            f"--mem-fraction-static {args.mem_fraction_static}",
            "a share of memory to allocate ahead",
            "no such option: the KV cache grows with the requests",
            "bound the memory with --max-running-requests and --context-length",
        )


def kernel_pairs(pairs: list[str]) -> dict[str, str]:
    """{"linear": "reference.linear"} of ["linear=reference.linear"].

    Raises:
        RequestError: not a pair, or two kernels for one operation.
    """
    return _pairs("--kernel", pairs, "operation=name, such as linear=reference.linear")


def _pairs(option: str, pairs: list[str], example: str) -> dict[str, str]:
    """{"a": "b"} of ["a=b"]; see kernel_pairs()."""
    found: dict[str, str] = {}
    for pair in pairs:
        key, sign, name = pair.rpartition("=")
        if not (key and sign and name):
            raise RequestError(f"{option} {pair}", "not a pair", example, "correct the option")
        if found.setdefault(key, name) != name:
            raise RequestError(f"{option} {key}=…", f"{found[key]} and {name}", f"one value for {key}", "leave one out")
    return found


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """Sampling parameters of a command line: greedy unless a temperature is stated.

    Raises:
        RequestError: values that cannot be honoured.
    """
    from bitgrain.engine.sampling import SamplingParams

    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    filters = [f"--{name.replace('_', '-')}" for name in ("top_p", "top_k", "min_p", "seed") if name in given]
    if filters and given.get("temperature", 0) == 0:
        raise RequestError(
            ", ".join(filters),
            "options of random sampling, but the temperature is 0",
            "a --temperature above 0",
            "add --temperature, or leave them out",
        )
    return SamplingParams(**{"temperature": 0.0, **given})


def load(args: argparse.Namespace, progress: Callable[[int, int], None] | None = None) -> LLM:
    """The model, its tokenizer and a running engine."""
    path, options = model_path(args), load_options(args)
    from bitgrain.engine.llm import LLM

    return LLM(path, progress=progress, **options)
