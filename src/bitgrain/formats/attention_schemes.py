"""What a checkpoint says of an attention module: how its cache is quantized, and what its queries and keys go through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from bitgrain.weights import Transform

if TYPE_CHECKING:
    from bitgrain.formats.base import TensorRule


class HeadTransforms(ABC):
    """Maps of an attention module's queries and keys behind their rotary embedding.  Frozen dataclasses; made from headers.

    They run whatever the cache is stored as, because only the producer knows that the two cancel in the scores.
    """

    @abstractmethod
    def tensors(self) -> tuple[TensorRule, ...]:
        """Every tensor that they need."""

    @property
    @abstractmethod
    def borrowed(self) -> tuple[tuple[str, str], ...]:
        """As Scheme.borrowed."""

    @abstractmethod
    def to_transforms(self, tensors: Mapping[str, Tensor], head_dim: int) -> tuple[tuple[Transform, ...], tuple[Transform, ...]]:
        """(those of queries, those of keys), each in the order in which they run.

        Args:
            tensors: local name to data, as stored.
        Raises:
            BadValueError: the data cannot mean what the headers promise.
        """

    @abstractmethod
    def describe(self) -> str:
        """Short text for the plan."""


@dataclass(frozen=True, slots=True)
class KVCacheScheme:
    """What a checkpoint says about quantizing one attention module's cache.

    Args:
        element:     "none" or an element type ("fp8_e4m3fn", "int8").
        granularity: "tensor", "head", ...
        symmetric:   no zero points.
        scales:      (full tensor name, which) of every stored one; which is "k", "v", "q", "kv", "k_zero" or "v_zero";
                     "k_bias" and "v_bias" are subtracted before rounding and added back.
        dynamic:     scales are computed when the cache is written; none are stored.
        fixed_scale: none are stored because the producer uses this one for keys and values everywhere.
        heads:       maps of queries and keys, so that keys are cached in another basis; None: there are none.
    """

    element: str = "none"
    granularity: str = "tensor"
    symmetric: bool = True
    scales: tuple[tuple[str, str], ...] = ()
    dynamic: bool = False
    fixed_scale: float | None = None
    heads: HeadTransforms | None = None

    def describe(self) -> str:
        return self._stored_as() + (f", {self.heads.describe()}" if self.heads is not None else "")

    def _stored_as(self) -> str:
        if self.element == "none":
            return "16-bit"
        if self.fixed_scale is not None:
            return f"{self.element} {self.granularity}, scale fixed at {self.fixed_scale:g}"
        return f"{self.element} {self.granularity}" + ("" if self.scales else ", no stored scales")
