"""The absence of quantization: claimed only where nothing looks quantized."""

import pytest
import torch

from bitgrain.errors import BitgrainError, RuleMismatchError
from bitgrain.formats.unquantized import UnquantizedConfig
from tests.unit.formats.golden_cases import Case, decode_all, fixture_cases
from tests.unit.formats.synthetic import NAME, evidence, view

DENSE = {f"{NAME}.weight": torch.ones(4, 8), "model.norm.weight": torch.ones(8)}
QUANTIZED = {
    "qweight": torch.zeros(1, dtype=torch.int32), "weight_packed": torch.zeros(1, dtype=torch.int32), "weight_scale": torch.ones(1),
    "weight_scale_inv": torch.ones(1), "W_q": torch.zeros(1, dtype=torch.uint8), "weight": torch.zeros(2, 2, dtype=torch.int8),
    "SCB": torch.ones(1), "gate_up_proj_blocks": torch.zeros(1, dtype=torch.uint8), "weight.absmax": torch.ones(1), "weight._data": torch.zeros(1, dtype=torch.int8),
    "_weight_qdata": torch.zeros(1, dtype=torch.int8), "Qidxs": torch.zeros(1, dtype=torch.int64),
}  # fmt: skip


@pytest.mark.parametrize("folder", fixture_cases("unquantized"))
def test_fixture_weights_equal_golden(folder):
    case = Case(folder)
    assert UnquantizedConfig.detect(case.evidence()).score == 1
    assert decode_all(case, UnquantizedConfig.parse(case.evidence())) >= len(case.weights())


def test_dense_module_is_dense():
    choice = UnquantizedConfig.parse(evidence(None, DENSE)).decide(view({"weight": torch.ones(4, 8, dtype=torch.float16)}))
    assert (choice.scheme.label, choice.scheme.shape) == ("dense float16", (4, 8))


@pytest.mark.parametrize("local", QUANTIZED)
def test_checkpoint_with_a_quantized_tensor_is_not_claimed(local):
    found = evidence(None, DENSE | {f"{NAME}.{local}": QUANTIZED[local]})
    assert UnquantizedConfig.detect(evidence(None, DENSE)).score == 1
    assert UnquantizedConfig.detect(found) is None
    with pytest.raises(BitgrainError, match=NAME):
        UnquantizedConfig.parse(found)


def test_checkpoint_with_a_configuration_is_not_claimed():
    assert UnquantizedConfig.detect(evidence({"quant_method": "x"}, DENSE)) is None
    assert UnquantizedConfig.detect(evidence({"bits": 4}, DENSE)) is None
    assert UnquantizedConfig.detect(evidence(None, DENSE, {"quantize_config.json": {"quant_method": "x"}})) is None


def test_quantized_module_is_refused_by_name():
    with pytest.raises(RuleMismatchError, match=NAME):
        UnquantizedConfig.parse(evidence(None, DENSE)).decide(view({"weight": torch.zeros(2, 2, dtype=torch.int8)}))
