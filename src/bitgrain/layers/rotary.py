"""Rotary position embedding with every scaling of its frequencies.

    angle[t, i] = position[t] * frequency[i],  i < D / 2
    x'[i]         = (x[i] cos - x[i + D/2] sin) * attention_factor
    x'[i + D/2]   = (x[i + D/2] cos + x[i] sin) * attention_factor

Interleaved pairs are (2 i, 2 i + 1) instead of (i, i + D/2).  Where only a part of each head is rotated, D is its size.
Frequencies are float32, computed in the order of operations of the transformers library, so that they agree to the bit.
Source: RoFormer (arXiv 2104.09864); transformers modeling_rope_utils, 5.19.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """Unscaled: frequency[i] = theta^(-2i / D).

    Args:
        head_dim: D, even.
    """

    theta: float
    head_dim: int

    @property
    def attention_factor(self) -> float:
        """Multiplier of cosine and sine."""
        return 1.0

    @property
    def depends_on_length(self) -> bool:
        """Whether frequencies are chosen by the length that a sequence may reach."""
        return False

    def periods(self, theta: float | None = None) -> Tensor:
        """float32 [D / 2]: theta^(2i / D), the reciprocal of the unscaled frequencies."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        return torch.as_tensor((self.theta if theta is None else theta) ** exponent)

    def frequencies(self, length: int) -> Tensor:
        """float32 [D / 2] for a sequence of up to `length` tokens."""
        return 1.0 / self.periods()

    def reach(self, max_position: int) -> int:
        """Longest sequence, when the configuration states `max_position` for the unscaled model."""
        return max_position


@dataclass(frozen=True, slots=True)
class LinearRope(Rope):
    """Positions divided by `factor`."""

    factor: float

    def frequencies(self, length: int) -> Tensor:
        return 1.0 / self.periods() / self.factor

    def reach(self, max_position: int) -> int:
        return int(max_position * self.factor)


@dataclass(frozen=True, slots=True)
class DividedRope(Rope):
    """Each frequency divided by a number of its own.

    Args:
        divisors: D / 2 of them, above 0.
    """

    divisors: tuple[float, ...]

    def frequencies(self, length: int) -> Tensor:
        return 1.0 / self.periods() / torch.tensor(self.divisors, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class DynamicRope(Rope):
    """Theta grows with lengths L past the trained one: theta * (factor L / max_position - (factor - 1))^(D / (D - 2))."""

    factor: float
    max_position: int

    @property
    def depends_on_length(self) -> bool:
        return True

    def frequencies(self, length: int) -> Tensor:
        length = max(length, self.max_position)
        growth = (self.factor * length / self.max_position) - (self.factor - 1)
        return 1.0 / self.periods(self.theta * growth ** (self.head_dim / (self.head_dim - 2)))

    def reach(self, max_position: int) -> int:
        return int(max_position * self.factor)


@dataclass(frozen=True, slots=True)
class Llama3Rope(Rope):
    """Wavelengths above original / low_freq_factor are stretched by `factor`, those below original / high_freq_factor kept,
    those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original: int

    def frequencies(self, length: int) -> Tensor:
        plain = 1.0 / self.periods()
        wavelength = 2 * math.pi / plain
        longest, shortest = self.original / self.low_freq_factor, self.original / self.high_freq_factor
        stretched = torch.where(wavelength > longest, plain / self.factor, plain)
        smooth = (self.original / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - smooth) * stretched / self.factor + smooth * stretched
        return torch.where((wavelength >= shortest) & (wavelength <= longest), between, stretched)


@dataclass(frozen=True, slots=True)
class YarnRope(Rope):
    """Frequencies between `beta_slow` and `beta_fast` rotations over the trained length blend from interpolated to kept.

    Args:
        original: trained length.
        factor:   stretch of the context.
        scale:    attention factor if the configuration states one, else None: 0.1 ln(factor) + 1, or the quotient of two
                  such terms with the weights `mscale` and `mscale_all_dim`.
        truncate: round the bounds of the blend to whole dimensions.
    Source: arXiv 2309.00071.
    """

    factor: float
    original: int
    scale: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    @property
    def attention_factor(self) -> float:
        if self.scale is not None:
            return self.scale
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1.0)

    @property
    def score_factor(self) -> float:
        """What models with latent attention multiply scores by: the square of the term with the weight `mscale_all_dim`."""
        return self._grown(self.mscale_all_dim) ** 2

    def _grown(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

    def _dimension(self, rotations: float) -> float:
        """The (fractional) dimension that rotates so often over the trained length."""
        return (self.head_dim * math.log(self.original / (rotations * 2 * math.pi))) / (2 * math.log(self.theta))

    def frequencies(self, length: int) -> Tensor:
        low, high = self._dimension(self.beta_fast), self._dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001  # keeps the ramp finite
        ramp = torch.clamp((torch.arange(self.head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
        kept = 1 - ramp
        periods = self.periods()
        return 1.0 / (self.factor * periods) * (1 - kept) + 1.0 / periods * kept

    def reach(self, max_position: int) -> int:
        return max(max_position, int(self.original * self.factor))


@dataclass(frozen=True, slots=True)
class LongRope(Rope):
    """Each frequency divided by its own factor: `short` up to the trained length, `long` past it.

    Args:
        scale: attention factor if the configuration states one, else None: sqrt(1 + ln(factor) / ln(original)).
    Source: arXiv 2402.13753.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    factor: float
    scale: float | None = None

    @property
    def depends_on_length(self) -> bool:
        return True

    @property
    def attention_factor(self) -> float:
        if self.scale is not None:
            return self.scale
        return 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original))

    def frequencies(self, length: int) -> Tensor:
        factors = torch.tensor(self.long if length > self.original else self.short, dtype=torch.float32)
        return 1.0 / (factors * self.periods())


class Rotary:
    """Cosines and sines of a batch's positions.

    Args:
        dtype:       of the result.
        interleaved: they are for interleaved pairs.
    """

    def __init__(self, rope: Rope, dtype: torch.dtype, interleaved: bool = False) -> None:
        self.rope, self.dtype, self.interleaved = rope, dtype, interleaved
        self._fixed = None if rope.depends_on_length else rope.frequencies(0)

    def angles(self, positions: Tensor, lengths: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
        """(cosine, sine), each [T, 1, D], the two entries of a pair alike.

        Args:
            positions: int64 [T].
            lengths:   (rows, tokens that the sequence may reach) of each sequence in turn.
        """
        if self._fixed is not None:
            self._fixed = frequency = self._fixed.to(positions.device)
        else:
            frequency = torch.cat([self.rope.frequencies(most).expand(rows, -1) for rows, most in lengths]).to(positions.device)
        angle = positions[:, None].float() * frequency
        angle = (angle.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat((angle, angle), dim=-1))[:, None, :]
        factor = self.rope.attention_factor
        return (angle.cos() * factor).to(self.dtype), (angle.sin() * factor).to(self.dtype)


@dataclass(frozen=True, slots=True)
class QueryGrowth:
    """Multiplier of queries beyond the trained length: 1 + beta ln(1 + floor(position / original)).

    Source: transformers 5.19 modeling_ministral3.
    """

    beta: float
    original: int

    def at(self, positions: Tensor) -> Tensor:
        """float32 [T] for int64 positions [T]."""
        return 1 + self.beta * torch.log(1 + torch.floor(positions / self.original))
