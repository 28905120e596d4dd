"""A format of its own distribution: `steps` int8 [N, K] times one float32 `step`; docs/add-a-format.md explains it.

quantization_config: {"quant_method": "toy-steps", "skip": ["lm_head"]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitgrain.formats.base import ModuleView, QuantConfig, Scheme, TensorRule, scalar_shapes
from bitgrain.formats.evidence import Detection, Evidence
from bitgrain.formats.matching import matches_segments
from bitgrain.formats.value_checks import require_scale
from bitgrain.weights import NO_ACTIVATION, ActivationSpec, IntAffineWeight, Weight, WeightSpec


@dataclass(frozen=True, slots=True)
class StepsScheme(Scheme):
    """W[n, k] = steps[n, k] * step."""

    shape: tuple[int, int]
    activation: ActivationSpec = NO_ACTIVATION

    @property
    def weight_spec(self) -> WeightSpec:
        return WeightSpec("int_affine", "uint8", 8, "tensor", zero="constant", scale_dtype="float32")

    def tensors(self) -> tuple[TensorRule, ...]:
        return (TensorRule("steps", ("I8",), (self.shape,)), TensorRule("step", ("F32",), scalar_shapes()))

    def to_weight(self, tensors: Mapping[str, Tensor]) -> Weight:
        step = require_scale("step", tensors["step"]).reshape(1, 1)
        # canonical codes are unsigned: flipping the top bit adds 128, which is then the zero point
        codes = tensors["steps"].view(torch.uint8) ^ 0x80
        return IntAffineWeight.from_codes(codes, 8, step, 128, self.shape[1])


@dataclass(slots=True)
class StepsConfig(QuantConfig):
    """The toy's configuration: modules to skip."""

    name = "toy-steps"
    aliases = ("steps",)

    skip: tuple[str, ...] = ()

    @classmethod
    def detect(cls, evidence: Evidence) -> Detection | None:
        if evidence.method == cls.name:
            return Detection(100, ("quant_method is toy-steps",))
        return None

    @classmethod
    def parse(cls, evidence: Evidence) -> StepsConfig:
        return cls(tuple(evidence.settings().get("skip", ())))

    def is_quantized(self, module: ModuleView) -> bool:
        return "steps" in module.tensors or "step" in module.tensors

    def rule_for(self, module: ModuleView) -> tuple[bool, str]:
        for rule in self.skip:
            if matches_segments(rule, module.name):
                self.matched_rules.add(rule)
                return False, f"skip: {rule}"
        return True, "toy-steps quantizes every other module"

    def quantized_scheme(self, module: ModuleView) -> Scheme:
        return StepsScheme(module.shape or tuple(module.tensors["steps"].shape))

    def rules(self) -> tuple[str, ...]:
        return self.skip


CONFIG = StepsConfig
