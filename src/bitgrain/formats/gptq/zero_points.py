"""The packed zero points: stored as they are, or minus one."""

from __future__ import annotations

import torch
from torch import Tensor

from bitgrain.errors import LabelMismatchError
from bitgrain.numerics.bitpack import unpack_dense, unpack_planar, words_as_bytes

# One in every field of a byte.  The writers of "minus one" subtract it from whole words.
_ONES = {2: 0x55, 4: 0x11, 8: 0x01}


def read_zero_points(words: Tensor, bits: int, columns: int, *, minus_one: bool, planar: bool) -> Tensor:
    """True zero points.

        zero = field + 1 if minus_one else field

    A zero point of 0 was stored by subtracting from the whole word, which borrows from the next field; so 2, 4 and 8
    bits are undone by adding to the whole word.  Three bits were converted field by field, modulo 8.

    Args:
        words: int8, int16, int32 or int64 [G, W], packed along N.
    Returns:
        int16 [N, G].
    """
    stream = words_as_bytes(words)
    if minus_one and bits in _ONES:
        stream = _add_to_words(stream, _ONES[bits], words.element_size())
    fields = unpack_planar(stream.view(torch.int32), bits, columns) if planar else unpack_dense(stream, bits, columns)
    zeros = fields.t().to(torch.int16)
    if minus_one and bits not in _ONES:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return zeros.contiguous()


def _add_to_words(stream: Tensor, step: int, width: int) -> Tensor:
    """Bytes [G, B] after adding `step` to each byte of little-endian words of `width` bytes, carries inside each word."""
    lanes = stream.view(stream.shape[0], -1, width)
    added = torch.empty_like(lanes)
    carry = torch.zeros(lanes.shape[:2], dtype=torch.int16, device=stream.device)
    for i in range(width):
        total = lanes[:, :, i].to(torch.int16) + step + carry
        added[:, :, i] = (total & 0xFF).to(torch.uint8)
        carry = total >> 8
    return added.view_as(stream)


def check_symmetric(zeros: Tensor, bits: int, label: str) -> None:
    """Refuse zero points that differ from the middle of the codes.

    A checkpoint called symmetric has 2**(bits-1) everywhere.  One that is off by one throughout was labelled with the
    wrong checkpoint_format: it stores the zero point as it is where the label says minus one, or the reverse.

    Raises:
        LabelMismatchError: names checkpoint_format, qzeros and the zero point.
    """
    middle = 1 << (bits - 1)
    wrong = zeros != middle
    if not bool(wrong.any()):
        return
    first = int(zeros[wrong][0])
    count, total = int(wrong.sum()), zeros.numel()
    shifted = count == total and bool((zeros == first).all()) and abs(first - middle) == 1
    if shifted:
        action = "set checkpoint_format to the one that fits: 'gptq' stores the zero point minus one, 'gptq_v2' stores it as it is"
    else:
        action = "set sym to false if the checkpoint is asymmetric, correct checkpoint_format, or fetch the file again"
    raise LabelMismatchError(
        "qzeros",
        f"{count} of {total} fields, read as {label}, give a zero point other than {middle} (the first: {first}), though sym is true",
        f"zero point {middle} everywhere, which sym and checkpoint_format promise",
        action,
    )
