"""Scales that an activation function's output is divided by; they belong to the linear module that reads it.

    y = inner(act(x) / scales)

The producer stores them beside the activation function (`mlp.act.scales` [K]) where no norm or linear could take them up.
Source: AutoAWQ 0.2.9, awq/modules/act.py; formats specification, part 1, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES, TensorHeader
from bitgrain.errors import BadValueError, BitgrainError, UnexpectedTensorError
from bitgrain.formats.around import SchemeAround
from bitgrain.formats.awq.schemes import PER_WORD
from bitgrain.formats.base import TensorRule
from bitgrain.formats.value_checks import require_scale
from bitgrain.weights import ChannelScale, Transformed, Weight

LOCAL = "act_scales"


@dataclass(frozen=True, slots=True)
class ScaledInputScheme(SchemeAround):
    """Another scheme whose input is divided by `act_scales` [K] first."""

    def tensors(self) -> tuple[TensorRule, ...]:
        return (*self.inner.tensors(), TensorRule(LOCAL, FLOAT_CODES, ((self.shape[1],),)))

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        scales = require_scale(LOCAL, tensors[LOCAL], signed=True).float()
        zeros = int((scales == 0).sum())
        if zeros:
            raise BadValueError(LOCAL, f"{zeros} zeros", "scales that an input can be divided by", "the file is damaged; fetch or write it again")
        return Transformed(self.inner.to_weight(tensors), (ChannelScale(1.0 / scales),))


def in_features(qweight: TensorHeader, layout: str) -> int:
    """K of a packed matrix, by its layout; 0 where that is not known."""
    if len(qweight.shape) != 2:
        return 0
    rows, columns = qweight.shape
    return {"gemm": rows, "gemv": columns * PER_WORD, "gemv_fast": columns, "marlin": rows * 16}.get(layout, 0)


def scaled_inputs(tensors: Mapping[str, TensorHeader], layout: str, problems: list[BitgrainError]) -> dict[str, str]:
    """Stored name of each such tensor to the linear module that it belongs to: the one beside it that reads as many values.

    Tensors of which that is not decided are added to `problems`.
    """
    found: dict[str, str] = {}
    beside: dict[str, dict[str, int]] = {}
    for name, header in tensors.items():
        module, _, local = name.rpartition(".")
        if local == "qweight":
            beside.setdefault(module.rpartition(".")[0], {})[module] = in_features(header, layout)
    for name, header in tensors.items():
        module, _, local = name.rpartition(".")
        if local != "scales" or len(header.shape) != 1 or f"{module}.qweight" in tensors:
            continue
        readers = [reader for reader, size in beside.get(module.rpartition(".")[0], {}).items() if size == header.shape[0]]
        if len(readers) == 1:
            found[name] = readers[0]
        else:
            problems.append(_undecided(name, header, readers))
    return found


def _undecided(name: str, header: TensorHeader, readers: list[str]) -> BitgrainError:
    which = f"{len(readers)} linear modules beside it read that many: {', '.join(readers)}" if readers else "no linear module beside it reads that many"
    return UnexpectedTensorError(
        f"{header.file}: {name}", f"{header.describe()}, scales of an activation function, and {which}", "one module beside it that reads as many values",
        "quantize the model without scaled activations, or fetch the right checkpoint",
    )  # fmt: skip
