"""The tensors of a QuIP# module.

    Qidxs        int64 [N, K bits / 64], codes of eight columns in the order of the writer's kernel (`unpack_e8p`)
    SU, SV       [K], [N]: signs and magnitudes of the input and of the output
    Wscale       one number, multiplied into SV (1 where the writer has done so)
    codebook_id  one number: the codebook
    scaleWH      [K], divides the input (rescale_WH)
    fuse_scales  [P], where the module is P modules of one input stored as one: multiplies each part's outputs
Source: formats specification, section 4.2; QuIP# (commit 1d8f873) lib/linear and lib/codebook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError, LabelMismatchError
from bitgrain.formats.base import Scheme, TensorRule, scalar_shapes
from bitgrain.formats.incoherence import hadamard
from bitgrain.formats.value_checks import require_finite, require_scale
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, ChannelScale, LatticeWeight, Transformed, Weight, WeightSpec
from bitgrain.weights.lattice import lattice_spec

ROWS, COLUMNS = 16, 64  # N and K of a block of codes


@dataclass(frozen=True, slots=True)
class Codebook:
    """One of the writer's codebooks.

    Args:
        number:  what codebook_id holds.
        version: of the storage order, as codebook_version says.
        divisor: of the residual's points, unless resid_scale_override says otherwise.
    """

    bits: int
    number: int
    version: int
    divisor: float = 1.0


CODEBOOKS = {"e8p12": Codebook(2, 7, 1), "e8p12rvq3b": Codebook(3, 18, 0, 2.04), "e8p12rvq4b": Codebook(4, 17, 1, 3.45)}


def unpack_e8p(words: Tensor) -> Tensor:
    """int16 [N, 8 W], the e8p codes of int64 words [N, W].

    The words of 16 rows and 64 columns are stored [8 pairs of rows, 4 pairs of codes] row by row, blocks row-major.  A word
    holds codes i = (row i % 2, column i // 2): byte i of its low half is code i's high byte, bit 4 j + i of its high half
    bit j of the low one.
    """
    n, width = words.shape
    blocks = words.reshape(n // ROWS, width // 2, ROWS // 2, 4).transpose(1, 2).reshape(n // 2, 2 * width)
    codes = []
    for i in range(4):
        code = (blocks >> 8 * i & 255) << 8
        for j in range(8):
            code |= (blocks >> 32 + 4 * j + i & 1) << j
        codes.append(code.to(torch.int16))
    return torch.stack(codes, dim=-1).view(n // 2, 2 * width, 2, 2).permute(0, 3, 1, 2).reshape(n, 4 * width)


@dataclass(frozen=True, slots=True)
class QuipScheme(Scheme):
    """A matrix of lattice codes between Hadamard transforms.

    Args:
        shape:    (N, K), multiples of 16 and 64.
        divisor:  of the residual's points.
        rescaled: scaleWH is stored.
        joint:    the module is several of one input, and fuse_scales is stored.
        heights:  N of each of these; () where the architecture is not known.
    """

    shape: tuple[int, int]
    codebook: Codebook
    divisor: float
    rescaled: bool = False
    joint: bool = False
    heights: tuple[int, ...] = ()
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def weight_spec(self) -> WeightSpec:
        return lattice_spec(self.codebook.bits)

    @property
    def transforms_input(self) -> bool:
        return True

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        rules = [
            TensorRule("Qidxs", ("I64",), ((n, k * self.codebook.bits // 64),)),
            TensorRule("SU", FLOAT_CODES, ((k,),)),
            TensorRule("SV", FLOAT_CODES, ((n,),)),
            TensorRule("Wscale", FLOAT_CODES, scalar_shapes()),
            TensorRule("codebook_id", ("I64", "I32"), scalar_shapes()),
        ]
        rules += [TensorRule("scaleWH", FLOAT_CODES, ((k,),))] if self.rescaled else []
        rules += [TensorRule("fuse_scales", FLOAT_CODES, ((len(self.heights) or -1,),))] if self.joint else []
        return tuple(rules)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        number = int(tensors["codebook_id"].reshape(-1)[0])
        if number != self.codebook.number:
            raise LabelMismatchError("codebook_id", f"codebook {number}", f"{self.codebook.number}, as quip_params.codebook says", "correct quip_params.codebook, or fetch the right checkpoint")
        n, k = self.shape
        inputs = require_scale("SU", tensors["SU"], signed=True).float()
        if self.rescaled:
            inputs = inputs / _divisors("scaleWH", tensors["scaleWH"])
        outputs = require_scale("SV", tensors["SV"], signed=True).float() * self._output_scale(tensors)
        return Transformed(
            self._codes(tensors["Qidxs"]),
            (ChannelScale(inputs), hadamard(k, transpose=True)),
            outputs=(hadamard(n), ChannelScale(outputs)),
        )

    def _codes(self, words: Tensor) -> LatticeWeight:
        width = self.shape[1] // 32
        codes, rest = unpack_e8p(words[:, :width]), words[:, width:]
        if self.codebook.bits == 2:
            return LatticeWeight(codes)
        # a word of the three-bit codebook is eight one-byte codes, low byte first
        second = rest.contiguous().view(torch.uint8) if self.codebook.bits == 3 else unpack_e8p(rest)
        return LatticeWeight(codes, second, self.divisor)

    def _output_scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """float32 [1] or [N]: Wscale, times the scale of the part that a row belongs to."""
        scale = require_scale("Wscale", tensors["Wscale"]).float().reshape(1)
        if not self.joint:
            return scale
        parts = require_scale("fuse_scales", tensors["fuse_scales"], signed=True).float()
        if self.heights:
            return scale * parts.repeat_interleave(torch.tensor(self.heights))
        if bool((parts != parts[0]).any()):
            raise LabelMismatchError("fuse_scales", f"{len(parts)} different scales", "an architecture that says which rows each belongs to", "add config.json of a known architecture")
        return scale * parts[0]


def _divisors(name: str, values: Tensor) -> Tensor:
    """float32 of the same shape, once they are finite and none is zero."""
    found = require_finite(name, values).float()
    if bool((found == 0).any()):
        raise BadValueError(name, f"{int((found == 0).sum())} zeros", "divisors that are not zero", "the file is damaged; fetch or write it again")
    return found
