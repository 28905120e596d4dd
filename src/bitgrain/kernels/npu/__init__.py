"""Kernels of Ascend NPUs, through torch_npu's operators.  Nothing here imports torch_npu before a kernel runs.

Tested against models of the operators' contracts only (contracts.py); no result here was run on hardware.
"""

from bitgrain.kernels.npu.experts import NpuExperts
from bitgrain.kernels.npu.fp8_matmul import NpuFloat8Linear
from bitgrain.kernels.npu.int4_matmul import NpuInt4Linear
from bitgrain.kernels.npu.int8_matmul import NpuInt8Linear
from bitgrain.kernels.npu.mx_matmul import NpuMicroscaledLinear
from bitgrain.kernels.npu.weight_only import NpuWeightOnly

_LINEAR = (NpuInt4Linear, NpuInt8Linear, NpuWeightOnly, NpuMicroscaledLinear, NpuFloat8Linear)
_CLASSES = (*(("linear", kernel) for kernel in _LINEAR), ("experts", NpuExperts))

KERNELS = [(operation, "npu", kernel("npu")) for operation, kernel in _CLASSES]
