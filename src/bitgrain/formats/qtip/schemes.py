"""The tensors of a QTIP module.

    trellis   int16 [(N / 16) (K / 16), 16 bits], a bit stream per tile of 16 x 16, tiles row-major; two storage orders
    tlut      [2^tlut_bits, V], the table of the decoders that have one
    SU, SV    [K], [N]: signs and magnitudes of the input and of the output
    rcp       0; 1: the input's, 2: the output's transform works in tp_rank blocks (written for tensor parallelism)
    tp_rank   number of these blocks
Source: formats specification, section 4.3; QTIP (commit e90c668) lib/linear, lib/codebook and lib/utils/kernel_*.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.checkpoint.headers import FLOAT_CODES
from bitgrain.errors import BadValueError, LabelMismatchError
from bitgrain.formats.base import Scheme, TensorRule, scalar_shapes
from bitgrain.formats.incoherence import base_size, hadamard
from bitgrain.formats.value_checks import require_finite, require_scale
from bitgrain.numerics.trellis_codes import TABLED
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, ChannelScale, Hadamard, Transformed, TrellisWeight, Weight, WeightSpec
from bitgrain.weights.trellis import TILE, TILE_BYTES_PER_BIT, trellis_spec

INTEGERS = ("I64", "I32")


@dataclass(frozen=True, slots=True)
class Trellis:
    """Settings of the codes.

    Args:
        window:     bits of a window (L).
        step:       weights per window (V).
        decoder:    decode_mode.
        table_bits: tlut_bits of a decoder that has a table, else 0.
    """

    window: int
    step: int
    decoder: str
    table_bits: int

    def written_for_kernel(self, bits: int) -> bool:
        """Whether the writer stores such codes in the order of its matrix kernel; it does so wherever that kernel exists."""
        return bits in (2, 3, 4) and (self.window, self.step, self.decoder, self.table_bits) == (16, 2, "quantlut_sym", 9)


def word_bytes(words: Tensor) -> Tensor:
    """uint8 [T, 2 W]: the bytes of int16 words [T, W], high byte first."""
    return words.contiguous().view(torch.uint8).view(*words.shape, 2).flip(-1).reshape(words.shape[0], -1)


def kernel_bytes(words: Tensor, n: int, k: int, bits: int) -> Tensor:
    """uint8 [N K / 256, 32 bits]: the bit streams, most significant bit first, of words in the kernel's order.

    The bytes are stored [N / 32, K / 32, 32, K pair, N pair, bits], the last axis in reverse.
    """
    stored = words.contiguous().view(torch.uint8).view(n // 32, k // 32, 32, 2, 2, bits)
    return stored.flip(-1).permute(0, 4, 1, 3, 2, 5).reshape(-1, TILE_BYTES_PER_BIT * bits)


@dataclass(frozen=True, slots=True)
class QtipScheme(Scheme):
    """A matrix of trellis codes between Hadamard transforms.

    Args:
        shape: (N, K), multiples of 16; of 32 where the codes are written for the kernel.
        split: whether transforms work in blocks; None where the configuration does not say.
        sliced: rcp and tp_rank are stored; writers before October 2024 did not know them.
    """

    shape: tuple[int, int]
    trellis: Trellis
    bits: int
    split: bool | None = None
    sliced: bool = True
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def weight_spec(self) -> WeightSpec:
        settings = self.trellis
        order = "fragments" if settings.written_for_kernel(self.bits) else "rows"
        return trellis_spec(self.bits, settings.decoder, settings.window, settings.step, settings.table_bits, order)

    @property
    def transforms_input(self) -> bool:
        return True

    def tensors(self) -> tuple[TensorRule, ...]:
        n, k = self.shape
        rules = [
            TensorRule("trellis", ("I16", "U16"), (((n // TILE) * (k // TILE), 16 * self.bits),)),
            TensorRule("SU", FLOAT_CODES, ((k,),)),
            TensorRule("SV", FLOAT_CODES, ((n,),)),
        ]
        if self.trellis.decoder in TABLED:
            rules.append(TensorRule("tlut", FLOAT_CODES, ((1 << self.trellis.table_bits, self.trellis.step),)))
        if self.sliced:
            rules += [TensorRule("rcp", INTEGERS, scalar_shapes()), TensorRule("tp_rank", INTEGERS, scalar_shapes())]
        return tuple(rules)

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        n, k = self.shape
        on_input, on_output = self._blocks(tensors)
        inputs = require_scale("SU", tensors["SU"], signed=True).float()
        outputs = require_scale("SV", tensors["SV"], signed=True).float()
        return Transformed(
            self._codes(tensors),
            (ChannelScale(inputs), _hadamard(k, on_input, transpose=True)),
            outputs=(_hadamard(n, on_output), ChannelScale(outputs)),
        )

    def _codes(self, tensors: Mapping[str, Tensor]) -> TrellisWeight:
        (n, k), settings, words = self.shape, self.trellis, tensors["trellis"]
        for_kernel = settings.written_for_kernel(self.bits)
        stream = kernel_bytes(words, n, k, self.bits) if for_kernel else word_bytes(words)
        table = require_finite("tlut", tensors["tlut"]) if settings.decoder in TABLED else None
        packed = stream.view(n // TILE, k // TILE, -1)
        return TrellisWeight(packed, self.bits, settings.window, settings.step, settings.decoder, table, "fragments" if for_kernel else "rows")

    def _blocks(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """Number of blocks of the input's and of the output's transform."""
        if not self.sliced:
            return 1, 1
        side, count = (int(tensors[name].reshape(-1)[0]) for name in ("rcp", "tp_rank"))
        if side not in (0, 1, 2):
            raise BadValueError("rcp", f"the value {side}", "0 (whole transforms), 1 (the input in blocks) or 2 (the output in blocks)", "the file is damaged; fetch or write it again")
        if self.split is not None and self.split != bool(side):
            raise LabelMismatchError("rcp", f"the value {side}", f"{'1 or 2' if self.split else '0'}, because quip_params.split_for_tp is {str(self.split).lower()}", "correct quip_params.split_for_tp, or fetch the right checkpoint")
        size = self.shape[1] if side == 1 else self.shape[0]
        # a base matrix of the whole size is one of each block, too
        if count < 1 or (side and (size % count or base_size(size // count) is None)):
            raise BadValueError("tp_rank", f"the value {count}", f"a number of blocks that {size} divides into" if side else "a number above zero", "the file is damaged; fetch or write it again")
        return (count if side == 1 else 1), (count if side == 2 else 1)


def _hadamard(size: int, blocks: int, transpose: bool = False) -> Hadamard:
    return hadamard(size // blocks, transpose)
