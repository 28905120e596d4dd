"""FP8 experts that are stored together, one tensor for a whole layer.

    fp8         gate_up_proj e4m3 [E, 2I, H]      gate_up_proj_scale_inv [E, ceil(2I / r), ceil(H / c)], or [E, 2, 1] per tensor
                down_proj e4m3 [E, H, I]          down_proj_scale_inv    [E, ceil(H / r), ceil(I / c)], or [E, 1, 1]
                static inputs: gate_up_proj_activation_scale, down_proj_activation_scale [E]
    fbgemm_fp8  gate_up_proj e4m3 [E, H, 2I]      gate_up_proj_scale     [E, 1, 2I]
                down_proj e4m3 [E, I, H]          down_proj_scale        [E, H, 1]
Source: formats specification, section 5; transformers 5.19 FP8Experts and FbgemmFp8Llama4TextExperts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.checkpoint.parts import StoredPart
from bitgrain.errors import UnknownFormatError
from bitgrain.formats.expert_stacks import BIAS, WEIGHT, ExpertStack, Piece, divide_experts, number, spellings, stacked_name
from bitgrain.formats.fp8.schemes import FLOAT8_CODES

SCALE_NAMES = ("weight_scale_inv", "weight_scale")
INPUTS = spellings(number("activation_scale"), number("input_scale"))


def divide_fused(
    tensors: Mapping[str, TensorHeader], experts: ExpertStack | None, strategy: str, block: tuple[int, int] | None
) -> dict[str, StoredPart]:
    """Every part by name, see expert_stacks.divide_experts.

    Args:
        strategy, block: of the weights' scales, as in FP8Config.
    Raises:
        UnknownFormatError: fused experts of an architecture that is not known: which rows are gate's is its matter.
    """
    rows, columns = {
        "block": ((block[0],), (block[1],)) if block is not None else ((), ()),
        "channel": ((1,), (0,)),
        "tensor": ((0,), (0,)),
        "": ((0, 1), (0,)),  # the stored scale's size decides
    }[strategy]
    weight = replace(WEIGHT, needs=SCALE_NAMES, needing=FLOAT8_CODES)
    scales = spellings(*(Piece(name, rows, columns, needs=(WEIGHT.local,)) for name in SCALE_NAMES))
    pieces = {**spellings(weight, BIAS), **scales, **INPUTS}
    if experts is None:
        _refuse_fused(tensors, scales.keys() | INPUTS.keys())
    return divide_experts(tensors, experts, pieces)


def _refuse_fused(tensors: Mapping[str, TensorHeader], suffixes: set[str]) -> None:
    fused = sorted(name for name in tensors if (place := stacked_name(name)) is not None and place[2] in suffixes)
    if fused:
        raise UnknownFormatError(
            fused[0],
            f"experts fused into three-dimensional tensors ({len(fused)} scale tensors named so), and no architecture that says how they lie",
            "an architecture that is known, or per-expert tensors such as experts.0.gate_proj.weight",
            "correct `architectures` in config.json, or use the checkpoint with per-expert names",
        )
