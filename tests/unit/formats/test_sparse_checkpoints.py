"""Quantized mixtures of experts: every module is found by name, and the model is its dequantized twin."""

from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from word_packers import Numbers, gemm_tensors, gptq_tensors, numbers, pack_rows

import bitgrain
from bitgrain.errors import BitgrainError
from bitgrain.inspect.choices import choose_for_plan
from bitgrain.kernels.selection import Policy
from tests.checkpoints import write_checkpoint
from tests.unit.models.sparse_models import DEEPSEEK_V3, MIXTRAL, QWEN2_MOE, ids_of, stacked
from tests.unit.models.test_causal_lm import batch_of
from tests.unit.models.tiny_models import random_tensors

EVEN = {"num_hidden_layers": 2, "torch_dtype": "float32"}
MODELS = {
    "mixtral": {**MIXTRAL, **EVEN, "intermediate_size": 64, "num_local_experts": 5},
    "qwen2_moe": {**QWEN2_MOE, **EVEN, "intermediate_size": 96, "num_experts": 5, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "deepseek_v3": {
        **DEEPSEEK_V3, **EVEN, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 64, "kv_lora_rank": 32, "v_head_dim": 16,
        "n_routed_experts": 6, "n_group": 3,
    },
}  # fmt: skip
KEPT = ("embed_tokens", "lm_head", "gate", "shared_expert_gate")


def is_matrix(name, value):
    module = name.removesuffix(".weight")
    return name.endswith(".weight") and value.dim() == 2 and module.rpartition(".")[2] not in KEPT


def packed(v: Numbers):
    return {"weight_packed": pack_rows(v.codes, 4), "weight_scale": v.scales, "weight_shape": torch.tensor(v.codes.shape)}


def four_bits(write, zero, section):
    """A writer of four-bit modules in groups of 32."""

    def quantize(name, value, index):
        v = numbers(*value.shape, 32, seed=index, zero=zero, dtype=torch.float16)
        spread = value.std() / v.weight().std()
        v = Numbers(v.bits, v.codes, v.zeros, (v.scales.float() * spread).abs().half(), v.groups)
        return {f"{name.removesuffix('.weight')}.{local}": t for local, t in write(v).items()}, v.weight()

    return quantize, section


def block_fp8(name, value, index):
    """Codes with a scale for each 16 x 16, so that sizes have many blocks, whole and broken."""
    rows, columns = (-(-size // 16) for size in value.shape)
    scale = torch.rand(rows, columns, generator=torch.Generator().manual_seed(index)) * 0.01 + 0.002
    full = scale.repeat_interleave(16, 0)[: value.shape[0]].repeat_interleave(16, 1)[:, : value.shape[1]]
    codes = (value / full).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * full


WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False, "actorder": None, "observer": "minmax"}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None, "output_activations": None}},
    "ignore": ["lm_head", "re:.*\\.gate$", "re:.*shared_expert_gate$"],
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "true_sequential": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["gate", "shared_expert_gate", "lm_head"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 16]}
FORMATS = {
    "compressed-tensors": four_bits(packed, 8, COMPRESSED),
    "gptq": four_bits(gptq_tensors, None, GPTQ),
    "awq": four_bits(gemm_tensors, None, AWQ),
    "fp8": (block_fp8, FP8),
}


def quantized(folder, model, kind):
    """(path of the quantized checkpoint, tensors of its dense twin)."""
    stored, twin = tensors_of(model, kind)
    return write_checkpoint(folder, stored, {**MODELS[model], "quantization_config": FORMATS[kind][1]}), twin


@cache
def tensors_of(model, kind):
    """(tensors of the quantized checkpoint, of its dense twin)."""
    quantize, _ = FORMATS[kind]
    stored, twin = {}, {}
    for index, (name, value) in enumerate(random_tensors(MODELS[model], seed=3).items()):
        if is_matrix(name, value):
            own, twin[name] = quantize(name, value, index)
            stored |= own
        else:
            stored[name] = twin[name] = value
    return stored, twin


def generate(model, prompt, count=6):
    """Greedy tokens through the cache, the prompt in two parts."""
    cache = model.new_cache(len(prompt) + count)
    model(batch_of([(cache, prompt[:4])]))
    pending, found = prompt[4:], []
    for _ in range(count):
        pending = model(batch_of([(cache, pending)]))[-1].argmax()[None]
        found.append(int(pending))
    return found


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_quantized_model_is_its_dequantized_twin(tmp_path, name, kind):
    path, twin = quantized(tmp_path / "q", name, kind)
    checkpoint = bitgrain.open_checkpoint(path)
    rows = {module: row for module, row in checkpoint.plan.modules.items() if row.scheme is not None}
    dense = {module for module, row in rows.items() if row.label.startswith("dense")}
    assert dense == {n.removesuffix(".weight") for n, t in twin.items() if n.endswith(".weight") and t.dim() == 2 and not is_matrix(n, t)}
    for tensor, value in twin.items():
        if tensor.endswith(".weight"):
            torch.testing.assert_close(checkpoint.dequantize(tensor), value, rtol=1e-6, atol=1e-7)
    found = bitgrain.load_model(path, device="cpu", dtype="float32", activations="none")
    want = bitgrain.load_model(write_checkpoint(tmp_path / "d", twin, MODELS[name]), device="cpu", dtype="float32")
    logits = want.logits(ids_of(24))
    assert (found.logits(ids_of(24)) - logits).abs().max() < 1e-4 * logits.std()
    assert generate(found, ids_of(9)) == generate(want, ids_of(9))
    as_stored = bitgrain.load_model(path, device="cpu", dtype="bfloat16")  # inputs quantized where the format says so
    assert all(0 <= token < 96 for token in generate(as_stored, ids_of(9)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_what_the_plan_promises_is_what_runs(tmp_path, name, dtype):
    path, _ = quantized(tmp_path / "q", name, "fp8" if dtype == "float32" else "gptq")
    plan = bitgrain.open_checkpoint(path).plan
    promised = choose_for_plan(plan, "cpu", Policy(), dtype)
    model = bitgrain.load_model(path, device="cpu", dtype=dtype)
    assert {label: s.as_dict() for label, s in promised.items()} == {label: s.as_dict() for label, s in model.selections.items()}
    kept = [module for module, row in plan.modules.items() if row.use == "dense copy"]
    assert [m.endswith("kv_b_proj") for m in kept] == [True] * (2 if name == "deepseek_v3" else 0) and not set(kept) & set(promised)


@pytest.mark.parametrize(("name", "kind"), [*zip(MODELS, FORMATS, strict=False), ("deepseek_v3", "fp8")])
def test_an_absent_tensor_of_one_expert_is_named(tmp_path, name, kind):
    path, _ = quantized(tmp_path / "q", name, kind)
    tensors = load_file(path / "model.safetensors")
    scale = next(n for n in tensors if ".layers.1." in n and ".experts.4." in n and "scale" in n)
    save_file({n: t for n, t in tensors.items() if n != scale}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitgrainError, match=scale.replace(".", r"\.")):
        bitgrain.open_checkpoint(path)


@pytest.mark.parametrize("name", MODELS)
def test_experts_that_are_stored_together_are_the_same_model(tmp_path, name):
    path, _ = quantized(tmp_path / "q", name, "fp8")
    tensors = load_file(path / "model.safetensors")
    both = {n: t.view(torch.uint8) if t.dtype is torch.float8_e4m3fn else t for n, t in tensors.items()}
    weights = stacked({n: t for n, t in both.items() if not n.endswith("_scale_inv")})
    scales = stacked({n.removesuffix("_scale_inv"): t for n, t in both.items() if n.endswith("_scale_inv")})
    merged = {n: t.view(torch.float8_e4m3fn) if t.dtype is torch.uint8 else t for n, t in weights.items()}
    merged |= {f"{n}_scale_inv": t for n, t in scales.items()}
    assert any(n.endswith("experts.gate_up_proj_scale_inv") for n in merged)
    config = {**MODELS[name], "quantization_config": FP8}
    other = write_checkpoint(tmp_path / "s", merged, config)
    models = [bitgrain.load_model(p, device="cpu", dtype="float32") for p in (path, other)]
    assert torch.equal(*(m.logits(ids_of(24)) for m in models))


def test_quantized_input_of_kv_b_counts_absorbed_and_expanded(tmp_path):
    path, twin = quantized(tmp_path / "q", "deepseek_v3", "fp8")
    model = bitgrain.load_model(path, device="cpu", dtype="float32")
    found = {}
    for way in ("absorbed", "expanded"):
        for layer in model.layers:
            layer.attention.path = way
        found[way] = model.logits(ids_of(24))
    weights_only = bitgrain.load_model(path, device="cpu", dtype="float32", activations="none").logits(ids_of(24))
    spread = weights_only.std()
    # inputs are rounded to 8 bits: rarely, float32 noise moves one to the neighbouring code
    assert (found["absorbed"] - found["expanded"]).abs().median() < 0.02 * (found["absorbed"] - weights_only).abs().median()
    assert (found["absorbed"] - weights_only).abs().median() > 1e-3 * spread
    attention = model.layers[0].attention
    assert not attention.kv_b.activation.is_none
    latent = torch.randn(5, 32)
    by_definition = attention.kv_b.activation.fake_quantize(latent) @ twin["model.layers.0.self_attn.kv_b_proj.weight"].t()
    torch.testing.assert_close(attention.kv_b.mapped(latent) @ attention.kv_b.weight.t(), by_definition, rtol=1e-4, atol=1e-4)
    assert attention.nbytes == 160 * 32 * 4
