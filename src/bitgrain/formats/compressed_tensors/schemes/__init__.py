"""What the tensors of one module mean, by the kind of storage."""

from bitgrain.formats.compressed_tensors.schemes.block_floats import block_float_scheme
from bitgrain.formats.compressed_tensors.schemes.integers import IntScheme, packed_words
from bitgrain.formats.compressed_tensors.schemes.sparse import SPARSE_NAMES, SparseScheme, without_zeros_left_out
from bitgrain.formats.compressed_tensors.schemes.tiled24 import Tiled24Scheme, tiled24_scheme
from bitgrain.formats.compressed_tensors.schemes.transformed import OnlineTransform, RotatedHeads, TransformedScheme

__all__ = [
    "IntScheme",
    "OnlineTransform",
    "RotatedHeads",
    "SPARSE_NAMES",
    "SparseScheme",
    "Tiled24Scheme",
    "TransformedScheme",
    "block_float_scheme",
    "packed_words",
    "tiled24_scheme",
    "without_zeros_left_out",
]
