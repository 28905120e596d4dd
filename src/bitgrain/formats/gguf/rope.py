"""Rotary settings: metadata, and the tensors of frequency divisors that some models store instead.

    rope_freqs.weight                 [D / 2] divisors of the frequencies; how Llama 3's scaling is stored
    rope_factors_{short,long}.weight  [D / 2] divisors up to and past the trained length
Source: formats specification, part 2, section 1.3.
"""

from __future__ import annotations

from math import isfinite, log
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitgrain.formats.gguf.metadata import Description

DIVISORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
# tensors that are read here, and the rule under which the plan leaves them out
ROPE_TENSORS = dict.fromkeys((DIVISORS, SHORT, LONG), "divisors of the rotary frequencies are part of the configuration")
KINDS = ("none", "linear", "yarn", "longrope")


def rope_parameters(keys: Description, head_dim: int) -> dict[str, Any]:
    """rope_theta, rope_scaling and partial_rotary_factor, where they say something."""
    rotated = keys.integer("rope.dimension_count", minimum=2, default=head_dim)
    settings: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", default=10000.0)}
    if rotated != head_dim and keys.kind != "deepseek2":
        settings["partial_rotary_factor"] = rotated / head_dim
    kind = keys.text("rope.scaling.type", default="none")
    if kind not in KINDS:
        keys.problem("rope.scaling.type", repr(kind), f"one of {', '.join(KINDS)}", "the scaling is not implemented")
    factor = keys.number("rope.scaling.factor", default=1.0, strict=False) or 1.0
    original = keys.integer("rope.scaling.original_context_length", minimum=0, default=0)
    attention = keys.number("rope.scaling.attn_factor", default=1.0)
    # whether the file's author fine-tuned the model on the longer context; no formula reads it
    keys.skip(("rope.scaling.finetuned",))
    stored = {name: values for name in ROPE_TENSORS if (values := _divisors(keys, name, rotated // 2))}
    scaling = _yarn(keys, factor, original, attention) if kind == "yarn" else None
    if kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor}
    if SHORT in stored and LONG in stored:
        scaling = {
            "rope_type": "longrope", "short_factor": stored[SHORT], "long_factor": stored[LONG], "attention_factor": attention,
            "original_max_position_embeddings": original or None,
        }  # fmt: skip
    elif DIVISORS in stored:
        if scaling is not None:
            keys.problem("rope.scaling.type", f"{kind!r} beside {DIVISORS}", "one of the two", "two scalings at once are not implemented")
        scaling = {"rope_type": "divided", "frequency_divisors": stored[DIVISORS]}
    elif kind == "longrope" or stored:
        keys.problem("rope.scaling.type", f"{kind!r} with {', '.join(stored) or 'no tensor of factors'}", f"both {SHORT} and {LONG}", "fetch or write the file again")
    return settings if scaling is None else {**settings, "rope_scaling": scaling}


def _yarn(keys: Description, factor: float, original: int, attention: float) -> dict[str, Any]:
    """YaRN; the writer's attention factor multiplies the usual 0.1 ln(factor) + 1."""
    attention *= keys.number("rope.scaling.yarn_attn_factor", default=1.0)
    keys.need("rope.scaling.yarn_ext_factor", lambda v: v in (1, -1), "1", "the blend is not implemented")
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if original:
        scaling["original_max_position_embeddings"] = original
    for key, name in (("rope.scaling.yarn_beta_fast", "beta_fast"), ("rope.scaling.yarn_beta_slow", "beta_slow")):
        if keys.read(key)[1] is not None:
            scaling[name] = keys.number(key)
    weight = keys.number("rope.scaling.yarn_log_multiplier", default=0.0, strict=False)
    if weight and keys.kind == "deepseek2":
        # stored as a tenth of the weight; numerator and denominator of the factor cancel in the models that state it
        scaling["mscale"] = scaling["mscale_all_dim"] = weight * 10
    elif weight and keys.kind == "mistral3":
        scaling |= {"mscale": 1.0, "mscale_all_dim": weight}
    elif weight:
        keys.problem("rope.scaling.yarn_log_multiplier", repr(weight), "absent", "the attention factor is not implemented")
    elif attention != 1:
        scaling["attention_factor"] = attention * (1 + 0.1 * log(factor) if factor > 1 else 1.0)
    return scaling


def _divisors(keys: Description, name: str, count: int) -> list[float]:
    """The values of a stored tensor of divisors; empty where there is none."""
    header = keys.evidence.tensors.get(name)
    if header is None:
        return []
    if header.shape != (count,) or header.dtype != "F32":
        keys.problem("rope.dimension_count", f"{name} is {header.describe()}", f"F32 [{count}], half of the rotated dimensions", "fetch or write the file again")
        return []
    values = [float(v) for v in keys.evidence.read_small(name)]
    if not all(isfinite(v) and v > 0 for v in values):
        keys.problem("rope.dimension_count", f"{name} holds values that are no divisors", "numbers above 0", "the file is damaged; fetch or write it again")
        return []
    return values
