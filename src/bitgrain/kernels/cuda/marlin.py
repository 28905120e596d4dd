"""Four-bit symmetric weights through the Marlin-class product of an installed serving package, found in torch's registry of operators."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bitgrain.errors import BadValueError
from bitgrain.kernels.base import Fidelity, LinearProblem, Prepared, Refusal
from bitgrain.kernels.cuda import contracts
from bitgrain.numerics.interleave import pack_marlin_tiles, permute_marlin_scales
from bitgrain.platforms.probe import target
from bitgrain.weights import ActivationSpec, IntAffineWeight, Weight

PROOF = "contract-tested, not run on hardware"
# where packages register products whose names end so, of which one has the contract; the modules are what registers it when it is imported
SPACES, ENDING = ("_C", "sgl_kernel"), "marlin_gemm"
MODULES = ("vllm._C", "vllm._C_stable_libtorch", "sgl_kernel")
GROUPS = (32, 64, 128)
ROW_STEP, COLUMN_STEP = 64, 128


class MarlinLinear:
    """y = x W^T + b with W = (code - 8) * s rounded to x's dtype inside the product: changes numerics by that rounding.

    The arguments are passed by the names that the registered schema has, so that versions which add or drop optional ones are served;
    a version with an argument that this does not know is refused by name.
    Source: vLLM csrc/torch_bindings.cpp (marlin_gemm, stored versions of 2025 and 2026), vllm/scalar_type.py; IST-DASLab marlin, 2f6d7c1.
    """

    name = "cuda.marlin"
    rank = 60
    proof = PROOF

    def __init__(self, platform: str) -> None:
        self.platform = platform

    @property
    def build(self) -> str:
        """What a remembered self-test depends on besides the kernel's name."""
        return f"{torch.__version__} {sorted(target(self.platform).features)}"

    def state(self) -> str:
        """ "available (operator; proof)", or why not."""
        found = registered()
        return f"available ({found[0]}; {PROOF})" if found else "no installed package registers a Marlin-class operator"

    def fidelity(self, problem: LinearProblem) -> Fidelity:
        return Fidelity.APPROXIMATE

    def refusal(self, problem: LinearProblem) -> Refusal | None:
        why = self._problem(problem) or self._absent()
        return Refusal(why) if why else None

    def _absent(self) -> str:
        found = target(self.platform)
        if found.state != "present" or "sm75" in found.features or "sm70" in found.features:
            return "takes an installed package's operator, on devices that are present and from sm80 on"
        operator = registered()
        if operator is None:
            return "no installed package registers a Marlin-class operator (vllm and sgl_kernel do)"
        unknown = unknown_arguments(operator[1])
        return f"{operator[0]} asks for {', '.join(unknown)}, which bitgrain does not know" if unknown else ""

    def _problem(self, problem: LinearProblem) -> str:
        spec = problem.weight
        if spec.kind != "int_affine" or spec.bits != 4 or spec.zero != "constant" or spec.group_index or spec.row_index:
            return f"takes 4-bit symmetric integer weights, columns in order, not {spec.describe()}"
        if spec.granularity == "group" and (spec.group_size not in GROUPS or problem.k % spec.group_size):
            return f"takes whole groups of {', '.join(map(str, GROUPS))}, or one per channel, not {spec.group_size} in K = {problem.k}"
        if spec.granularity == "tensor":
            return "takes one scale per group or channel"
        if not problem.activation.is_none:
            return "does not quantize activations"
        if problem.dtype == "float32":
            return "takes 16-bit activations"
        if problem.n % ROW_STEP or problem.k % COLUMN_STEP:
            return f"takes N a multiple of {ROW_STEP} and K of {COLUMN_STEP}, not {problem.n} and {problem.k}"
        return ""

    def prepare(self, weight: Weight, activation: ActivationSpec) -> Prepared:
        assert isinstance(weight, IntAffineWeight)  # _problem() asked for the kind
        if weight.zero != contracts.MIDDLE:
            raise BadValueError("weight", f"a zero point of {weight.zero}", f"{contracts.MIDDLE}, the one of symmetric codes", f"--forbid {self.name}")
        scale = permute_marlin_scales(weight.scale.t().contiguous(), weight.scale.shape[1] > 1)
        device = scale.device
        tensors = {"codes": pack_marlin_tiles(weight.codes().t().contiguous()), "scale": scale, "workspace": workspace(weight.shape[0], device)}
        return Prepared(weight.shape, tensors, activation)

    def apply(self, x: Tensor, prepared: Prepared, bias: Tensor | None) -> Tensor:
        (n, k), held = prepared.shape, prepared.tensors
        if x.shape[0] == 0:
            return x.new_zeros(0, n)
        if held["scale"].dtype != x.dtype:
            held["scale"] = held["scale"].to(x.dtype)  # once: the first input tells the dtype
        found = registered()
        operator = contracts.marlin_gemm if x.device.type == "cpu" or found is None else found[1]
        y = operator(**arguments(operator, x, held, n, k))
        return y if bias is None else (y.float() + bias.float()).to(x.dtype)


def arguments(operator: Callable[..., Tensor], x: Tensor, held: dict[str, Tensor], n: int, k: int) -> dict[str, Any]:
    """The product's arguments by the names of its schema; optional ones that it does not have are left out."""
    values: dict[str, Any] = {
        "a": x, "b_q_weight": held["codes"], "b_scales": held["scale"], "workspace": held["workspace"], "size_m": x.shape[0], "size_n": n, "size_k": k,
        "b_type_id": contracts.UINT4_MIDDLE_8, "b_q_type_id": contracts.UINT4_MIDDLE_8, "is_k_full": True, "use_atomic_add": False, "use_fp32_reduce": True,
        "is_zp_float": False, "has_zp": False,
    }  # fmt: skip
    return {name: values.get(plain(name)) for name, _ in schema(operator)}


def unknown_arguments(operator: Callable[..., Tensor]) -> list[str]:
    """Required arguments that arguments() has no value for."""
    known = {"a", "b_q_weight", "b_scales", "workspace", "size_m", "size_n", "size_k", "b_type_id", "b_q_type_id", "is_k_full", "use_atomic_add", "use_fp32_reduce"}
    return [name for name, optional in schema(operator) if not optional and plain(name) not in known | {"is_zp_float", "has_zp"}]


def plain(name: str) -> str:
    """An argument's name without what says that it may be missing."""
    return name.removesuffix("_or_none").removesuffix("_maybe")


def schema(operator: Callable[..., Tensor]) -> list[tuple[str, bool]]:
    """(name, whether None is taken) of each argument without a default."""
    found: Any = operator
    return [(a.name, isinstance(a.type, torch.OptionalType)) for a in found._schema.arguments if not a.has_default_value()]


def workspace(n: int, device: torch.device) -> Tensor:
    """int32 zeros that the product uses as locks, and leaves zero: enough for every version, four per multiprocessor and 16 per 64 columns."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return torch.zeros(4 * processors + n // 64 * 16, dtype=torch.int32, device=device)


@lru_cache(maxsize=1)
def registered() -> tuple[str, Callable[..., Tensor]] | None:
    """(name, operator) of the first Marlin-class product that is registered, or that an installed package registers when it is imported."""
    for module in ("", *MODULES):
        with suppress(Exception):  # whatever a package raises that was built for another torch
            if module and find_spec(module.partition(".")[0]) is not None:
                import_module(module)
        found = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.partition("::")[0] in SPACES and name.endswith(ENDING))
        operators = [(name, getattr(getattr(torch.ops, name.partition("::")[0]), name.partition("::")[2]).default) for name in found]
        # others of that ending multiply other types, or experts: they ask for other things
        operators = [(name, operator) for name, operator in operators if {"b_type_id", "b_q_type_id"} & {argument for argument, _ in schema(operator)}]
        if operators:
            return min(operators, key=lambda one: (len(unknown_arguments(one[1])), one[0]))
    return None
