"""GET /metrics: the engine's counters as Prometheus text."""

from __future__ import annotations

from bitgrain.engine.statistics import EngineStatistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(statistics: EngineStatistics, model: str) -> str:
    """The exposition format, version 0.0.4; times in seconds."""
    label = f'model_name="{_escape(model)}"'
    s = statistics
    rows: list[tuple[str, str, str, list[tuple[str, float]]]] = [
        ("requests_total", "counter", "Requests submitted.", [("", s.submitted)]),
        ("requests_running", "gauge", "Sequences in the batch.", [("", s.running)]),
        ("requests_waiting", "gauge", "Requests in the queue.", [("", s.waiting)]),
        ("prompt_tokens_total", "counter", "Prompt tokens processed.", [("", s.prompt_tokens)]),
        ("generation_tokens_total", "counter", "Tokens generated.", [("", s.generated_tokens)]),
        ("engine_steps_total", "counter", "Batches run.", [("", s.steps)]),
        ("engine_step_seconds_total", "counter", "Time in batches.", [("", s.step_seconds)]),
        (
            "requests_finished_total",
            "counter",
            "Requests ended, by reason.",
            [(f',reason="{reason}"', s.finished[reason]) for reason in ("stop", "length", "cancelled", "error")],
        ),
    ]
    lines = []
    for name, kind, text, samples in rows:
        lines += [f"# HELP bitgrain_{name} {text}", f"# TYPE bitgrain_{name} {kind}"]
        lines += [f"bitgrain_{name}{{{label}{more}}} {_number(value)}" for more, value in samples]
    lines += _summary("time_to_first_token_seconds", "From submission to the first token.", label, s.first_token_seconds, s.first_tokens)
    lines += _summary("request_seconds", "From submission to the end.", label, s.request_seconds, sum(s.finished.values()))
    return "\n".join(lines) + "\n"


def _summary(name: str, text: str, label: str, total: float, count: int) -> list[str]:
    return [
        f"# HELP bitgrain_{name} {text}",
        f"# TYPE bitgrain_{name} summary",
        f"bitgrain_{name}_sum{{{label}}} {_number(total)}",
        f"bitgrain_{name}_count{{{label}}} {count}",
    ]


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6f}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
