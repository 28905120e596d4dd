"""Every dense family through plan, loading and generation with quantized weights, against the same model with the weights that they mean."""

import pytest
import torch

import bitgrain
from bitgrain.engine.llm import LLM
from tests.checkpoints import write_checkpoint
from tests.unit.models.quantized import PRODUCERS, quantize
from tests.unit.models.tiny_models import DENSE, LLAMA, random_tensors

# multiples of 32 everywhere, so that groups and blocks are whole
EVEN = {"intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 96}
FAMILIES = {name: {**config, **EVEN} for name, config in {"llama": LLAMA, **DENSE}.items()}
CASES = [(family, producer) for family in FAMILIES for producer in ("packed-int4", "float8-blocks")]
CASES += [("phi3", producer) for producer in ("gptq", "awq", "float8-channel")] + [("glm4", "gptq"), ("gemma2", "awq")]


def written(folder, config, producer):
    """(the quantized checkpoint, the dense one that means the same)."""
    writer, section = PRODUCERS[producer]
    tensors = random_tensors(config, seed=3)
    stored, meant = quantize(tensors, writer)
    assert len(stored) > len(tensors)
    return write_checkpoint(folder / "q", stored, {**config, "quantization_config": section}), write_checkpoint(folder / "d", meant, config)


@pytest.mark.parametrize(("family", "producer"), CASES, ids=lambda v: v)
def test_quantized_model_computes_what_its_weights_mean(tmp_path, family, producer):
    quantized, dense = written(tmp_path, FAMILIES[family], producer)
    plan = bitgrain.open_checkpoint(quantized).plan
    linears = [row for name, row in plan.modules.items() if name.endswith("_proj")]
    assert linears and all(row.label.startswith("W4A16" if "4" in producer or producer in ("gptq", "awq") else "W8A8") for row in linears)
    ids = torch.arange(20) * 7 % 96
    model, twin = (bitgrain.load_model(path, device="cpu", dtype="float32", activations="none") for path in (quantized, dense))
    expected = twin.logits(ids)
    assert (model.logits(ids) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_model_generates(tmp_path, family):
    quantized, _ = written(tmp_path, FAMILIES[family], "packed-int4")
    model = bitgrain.load_model(quantized, device="cpu", dtype="float32")
    prompt = [5, 9, 17, 33, 2, 71, 8, 40, 12]
    with LLM.from_parts(model, None) as llm:
        (completion,) = llm.generate([prompt], bitgrain.SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
    for token in completion.token_ids:
        assert token == int(model.logits(torch.tensor(prompt))[-1].argmax())
        prompt.append(token)
    assert len(completion.token_ids) == 5
