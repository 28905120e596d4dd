"""Packed block types: elements and bytes per block, and where a block keeps its 16-bit scales.

A row of K elements is K / elements blocks, one after another; no block crosses a row.
Source: ggml's block structures (llama.cpp, ggml-common.h, 2026-05); formats specification, part 2, section 1.2.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockType:
    """One packed type.

    Args:
        elements: elements per block.
        nbytes:   bytes per block.
        bits:     bits that an element's code takes, scales left out, rounded up.
        scales:   byte positions of float16 scales (and minima) inside a block.
    """

    elements: int
    nbytes: int
    bits: int
    scales: tuple[int, ...] = ()

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k elements, k a multiple of `elements`."""
        return k // self.elements * self.nbytes


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, 4, (0,)),
    "Q4_1": BlockType(32, 20, 4, (0, 2)),
    "Q5_0": BlockType(32, 22, 5, (0,)),
    "Q5_1": BlockType(32, 24, 5, (0, 2)),
    "Q8_0": BlockType(32, 34, 8, (0,)),
    "Q2_K": BlockType(256, 84, 2, (80, 82)),
    "Q3_K": BlockType(256, 110, 3, (108,)),
    "Q4_K": BlockType(256, 144, 4, (0, 2)),
    "Q5_K": BlockType(256, 176, 5, (0, 2)),
    "Q6_K": BlockType(256, 210, 6, (208,)),
    "IQ2_XXS": BlockType(256, 66, 2, (0,)),
    "IQ2_XS": BlockType(256, 74, 2, (0,)),
    "IQ3_XXS": BlockType(256, 98, 3, (0,)),
    "IQ1_S": BlockType(256, 50, 1, (0,)),
    "IQ4_NL": BlockType(32, 18, 4, (0,)),
    "IQ3_S": BlockType(256, 110, 3, (0,)),
    "IQ2_S": BlockType(256, 82, 2, (0,)),
    "IQ4_XS": BlockType(256, 136, 4, (0,)),
    "IQ1_M": BlockType(256, 56, 1),  # its scale is spread over the block
    "TQ1_0": BlockType(256, 54, 2, (52,)),
    "TQ2_0": BlockType(256, 66, 2, (64,)),
    "MXFP4": BlockType(32, 17, 4),
    "NVFP4": BlockType(64, 36, 4),
    "Q1_0": BlockType(128, 18, 1, (0,)),
    "Q2_0": BlockType(64, 18, 2, (0,)),
}
