"""Linear kernels over the matrix products that torch brings for GPUs: one class each, an instance per platform that has the operator.

Tested against models of the operators' contracts on host tensors; no result here was run on hardware.
"""

from bitgrain.kernels.torch_library.block_scaled import BlockScaledLinear
from bitgrain.kernels.torch_library.dense import DenseLinear
from bitgrain.kernels.torch_library.float8 import Float8Linear
from bitgrain.kernels.torch_library.int4_weights import Int4WeightLinear
from bitgrain.kernels.torch_library.int8 import Int8Linear
from bitgrain.kernels.torch_library.int8_weights import Int8WeightLinear

# (class, the platforms whose builds of torch have its operator)
_CLASSES = (
    (DenseLinear, ("cuda", "hip", "xpu")),
    (Float8Linear, ("cuda", "hip")),
    (BlockScaledLinear, ("cuda",)),
    (Int8Linear, ("cuda", "hip", "xpu")),
    (Int4WeightLinear, ("cuda", "hip")),
    (Int8WeightLinear, ("cuda",)),
)

KERNELS = [("linear", platform, kernel(platform)) for kernel, platforms in _CLASSES for platform in platforms]
