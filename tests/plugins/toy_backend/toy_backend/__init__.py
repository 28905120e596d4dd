"""A backend of its own distribution: docs/bring-up-a-backend.md makes it step by step."""

from toy_backend.experts import Int8Experts
from toy_backend.linear import Int8Linear, WeightOnlyLinear

KERNELS = [
    ("linear", "toychip", WeightOnlyLinear("toychip")),
    ("linear", "toychip", Int8Linear("toychip")),
    ("experts", "toychip", Int8Experts("toychip")),
]
