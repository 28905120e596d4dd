"""Stands in for torch_npu on the host: torch models of the operators' documented contracts, under the operators' names.

A call that breaks a contract raises LayoutError, so that kernels execute from checkpoint to logits without the device, and no
further than the contracts reach.  Nothing else of the package is here.
"""

from bitgrain.kernels.npu.contract_grouped import npu_grouped_matmul
from bitgrain.kernels.npu.contract_matmul import (
    npu_convert_weight_to_int4pack,
    npu_format_cast,
    npu_quant_matmul,
    npu_trans_quant_param,
    npu_weight_quant_batchmatmul,
)
from bitgrain.kernels.npu.contract_quantize import npu_dynamic_mx_quant, npu_dynamic_quant, npu_quantize
from bitgrain.kernels.npu.contract_types import FLOAT4 as float4_e2m1fn_x2
from bitgrain.kernels.npu.contract_types import MX_SCALE as float8_e8m0fnu

__all__ = [
    "float4_e2m1fn_x2",
    "float8_e8m0fnu",
    "npu_convert_weight_to_int4pack",
    "npu_dynamic_mx_quant",
    "npu_dynamic_quant",
    "npu_format_cast",
    "npu_grouped_matmul",
    "npu_quant_matmul",
    "npu_quantize",
    "npu_trans_quant_param",
    "npu_weight_quant_batchmatmul",
]
