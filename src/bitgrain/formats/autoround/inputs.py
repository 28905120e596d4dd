"""How the input of a module is quantized, from its settings.

    int            dynamic: the symmetric or asymmetric integer formulas of weights.ActivationSpec
    fp8            dynamic: s = max(amax, 1 / 512) / 448 (448 * 512 is the producer's bound on 1 / s); static: the stored scale
    mx_fp, mx_int  s = 2^(floor(log2 amax) - emax) for each 32 columns; "rceil" in the type: 2^ceil(log2(amax / max))
    nv_fp          s = e4m3(g * amax / 6) / g for each 16 columns, g the stored input_global_scale
    nv_e5m3        s = e5m3(amax / 6) for each block, no second scale
Source: auto-round 0.16.1, data_type/*.py.  Its integer inputs are read with the range of compressed-tensors, to which it
exports them: it has no kernel of its own for them.
"""

from __future__ import annotations

from bitgrain.formats.autoround.settings import ModuleSettings
from bitgrain.weights import NO_ACTIVATION, ActivationSpec

FP4, FP8, FP8_WIDE, INT4 = "fp4_e2m1", "fp8_e4m3fn", "fp8_e5m2", "fp4_e0m3"
MX_ELEMENTS = {4: FP4, 6: "fp6_e2m3", 8: FP8}
INPUT_GLOBAL_SCALE = "input_global_scale"
# The producer keeps dynamic FP8 scales above 1 / (448 * 512).
_LEAST_SCALE = 1 / (448 * 512)
_MAX = {FP8: 448.0, FP8_WIDE: 57344.0}


def activation_of(settings: ModuleSettings, stores_second: bool) -> ActivationSpec:
    """The input quantization of a module.

    Args:
        stores_second: the module has a stored second scale of its input.
    """
    if not settings.quantizes_input:
        return NO_ACTIVATION
    kind, group = settings.input_kind, settings.input_group
    if kind in ("mx_fp", "mx_int"):
        element = INT4 if kind == "mx_int" else _mx_element(settings)
        return ActivationSpec(element, "group", group, scale_type="e8m0", exponent_rule="ceil" if "rceil" in settings.input_type else "floor")
    if kind == "nv_fp":
        static = stores_second or "static_gs" in settings.input_type
        return ActivationSpec(FP4, "group", group, scale_type="e4m3", second_scale="static" if static else "dynamic", second_divides=static)
    if kind == "nv_e5m3":
        return ActivationSpec(FP4, "group", group, scale_type="e5m3")
    granularity = {-1: "token", 0: "tensor"}.get(group, "group")
    size = group if granularity == "group" else 0
    if kind == "int":
        return ActivationSpec(f"int{settings.input_bits}", granularity, size, symmetric=settings.input_symmetric)
    element = FP8_WIDE if kind == "fp8_e5m2" else FP8
    if not settings.input_dynamic:
        return ActivationSpec(element, "tensor", dynamic=False)
    return ActivationSpec(element, granularity, size, lower_bound=_MAX[element] * _LEAST_SCALE)


def _mx_element(settings: ModuleSettings) -> str:
    return "fp6_e3m2" if settings.input_type == "mx_fp6e3m2" else MX_ELEMENTS[settings.input_bits]
