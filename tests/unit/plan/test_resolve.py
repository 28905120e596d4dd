"""The plan: what each module means, why, and that everything wrong is found from headers, together."""

import json

import pytest
import torch

import bitgrain
from bitgrain.errors import (
    BitgrainError,
    ConflictingConfigError,
    DtypeMismatchError,
    ManyProblemsError,
    MissingTensorError,
    RuleMismatchError,
    ShapeMismatchError,
    UnexpectedTensorError,
    UnknownFormatError,
)
from tests.checkpoints import LAYERS, edited, linear_shapes, llama_config, llama_tensors, small_llama, write_checkpoint

DOWN = "model.layers.1.mlp.down_proj"


def int8_tensors() -> dict[str, torch.Tensor]:
    """The small Llama with int8 weights per channel, as compressed-tensors stores them."""
    tensors = llama_tensors()
    for name in linear_shapes():
        weight = tensors.pop(f"{name}.weight").float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[f"{name}.weight"] = torch.round(weight / scale).to(torch.int8)
        tensors[f"{name}.weight_scale"] = scale.bfloat16()
    return tensors


def int8_config(**quantization) -> dict:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}
    section = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return llama_config(quantization_config={**section, **quantization})


@pytest.fixture
def int8_llama(tmp_path):
    return write_checkpoint(tmp_path / "int8", int8_tensors(), int8_config())


def test_every_module_has_a_scheme_and_a_reason(int8_llama):
    plan = bitgrain.open_checkpoint(int8_llama).plan
    assert plan.format == "compressed-tensors" and plan.evidence
    assert plan.modules[DOWN].label == "W8A16 int8 channel" and "Linear" in plan.modules[DOWN].why
    assert plan.modules["lm_head"].label == "dense bfloat16" and "lm_head" in plan.modules["lm_head"].why
    assert plan.modules["model.norm"].kind == "vector"
    assert all(module.why for module in plan.modules.values())


def test_totals_count_every_stored_byte(int8_llama):
    checkpoint = bitgrain.open_checkpoint(int8_llama)
    assert checkpoint.plan.totals["bytes"] == sum(h.nbytes for h in checkpoint.files.tensors.values())


def test_hash_names_the_decision_and_changes_with_it(int8_llama, tmp_path):
    plan = bitgrain.open_checkpoint(int8_llama).plan
    assert plan.hash == bitgrain.open_checkpoint(int8_llama).plan.hash
    assert json.loads(plan.to_json())["modules"][DOWN]["shape"] == [64, 96]
    assert plan.hash != bitgrain.open_checkpoint(small_llama(tmp_path / "dense")).plan.hash


def test_equal_schemes_fuse(int8_llama):
    fusions = bitgrain.open_checkpoint(int8_llama).plan.fusions
    assert len(fusions) == 2 * LAYERS and all(f.fused for f in fusions)


def test_different_schemes_on_one_input_stay_side_by_side(int8_llama, tmp_path):
    dense = llama_tensors()
    name = "model.layers.0.self_attn.v_proj"

    def make_dense(tensors):
        tensors.pop(f"{name}.weight_scale")
        tensors[f"{name}.weight"] = dense[f"{name}.weight"]

    plan = bitgrain.open_checkpoint(edited(int8_llama, tmp_path / "mixed", make_dense)).plan
    fusion = next(f for f in plan.fusions if name in f.modules)
    assert not fusion.fused and "v_proj dense bfloat16" in fusion.why
    assert "dense" in plan.modules[name].why


DAMAGES = {
    "deleted": (lambda t: t.pop(f"{DOWN}.weight_scale"), MissingTensorError, f"{DOWN}.weight_scale"),
    "whole module deleted": (lambda t: (t.pop(f"{DOWN}.weight_scale"), t.pop(f"{DOWN}.weight")), MissingTensorError, DOWN),
    "added beside": (lambda t: t.update({f"{DOWN}.input_rotation": torch.zeros(4)}), UnexpectedTensorError, "input_rotation"),
    "unknown module": (lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(4, 4)}), UnexpectedTensorError, "model.layers.0.extra"),
    "retyped": (lambda t: t.update({f"{DOWN}.weight_scale": t[f"{DOWN}.weight_scale"].double()}), DtypeMismatchError, f"{DOWN}.weight_scale"),
    "row missing": (lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"][1:]}), BitgrainError, DOWN),
    "norm of another size": (lambda t: t.update({"model.norm.weight": torch.ones(63)}), ShapeMismatchError, "model.norm.weight"),
    "embedding of another size": (lambda t: t.update({"model.embed_tokens.weight": torch.ones(47, 64)}), BitgrainError, "model.embed_tokens"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_from_headers_and_named(int8_llama, tmp_path, damage):
    change, kind, name = DAMAGES[damage]
    with pytest.raises(kind, match=name.replace(".", r"\.")):
        bitgrain.open_checkpoint(edited(int8_llama, tmp_path / "damaged", change))


def test_all_problems_are_listed_at_once(int8_llama, tmp_path):
    def damage(tensors):
        for name in list(linear_shapes())[:3]:
            tensors.pop(f"{name}.weight_scale")

    with pytest.raises(ManyProblemsError) as caught:
        bitgrain.open_checkpoint(edited(int8_llama, tmp_path / "damaged", damage))
    assert len(caught.value.problems) == 3


def test_excluded_module_with_quantized_tensors_is_refused_unless_the_tensors_are_trusted(tmp_path):
    path = write_checkpoint(tmp_path / "m", int8_tensors(), int8_config(ignore=["lm_head", DOWN]))
    with pytest.raises(RuleMismatchError, match="weight_scale"):
        bitgrain.open_checkpoint(path)
    row = bitgrain.open_checkpoint(path, trust_tensors=True).plan.modules[DOWN]
    assert row.label.startswith("W8A16") and "trusted" in row.why


def test_rule_that_matches_nothing_is_reported_with_the_nearest_names(tmp_path):
    path = write_checkpoint(tmp_path / "m", int8_tensors(), int8_config(ignore=["lm_head", "model.layers.1.mlp.dwn_proj"]))
    notes = bitgrain.open_checkpoint(path).plan.notes
    assert any("dwn_proj" in n and "nearest: model.layers.1.mlp.down_proj" in n for n in notes)


def test_unknown_method_is_refused_with_the_known_ones(tmp_path):
    path = small_llama(tmp_path / "m", quantization_config={"quant_method": "grain9000"})
    with pytest.raises(UnknownFormatError, match="grain9000"):
        bitgrain.open_checkpoint(path)


def test_sidecar_that_contradicts_config_is_refused(int8_llama):
    (int8_llama / "quantization_config.json").write_text(json.dumps({"quant_method": "compressed-tensors", "format": "float-quantized"}))
    with pytest.raises(ConflictingConfigError, match="float-quantized"):
        bitgrain.open_checkpoint(int8_llama)


@pytest.mark.parametrize("alias", ["compressed-tensors", "compressed_tensors"])
def test_quantization_hint_that_agrees_is_accepted(int8_llama, alias):
    assert bitgrain.open_checkpoint(int8_llama, quantization=alias).plan.format == "compressed-tensors"


def test_quantization_hint_that_disagrees_is_refused_with_the_evidence(int8_llama):
    with pytest.raises(ConflictingConfigError, match="the checkpoint is compressed-tensors"):
        bitgrain.open_checkpoint(int8_llama, quantization="awq_marlin")
    with pytest.raises(BitgrainError, match="neither a format|no such format"):
        bitgrain.open_checkpoint(int8_llama, quantization="nonsense")


def test_quantized_tensors_without_a_configuration_are_not_taken_for_dense(tmp_path):
    path = write_checkpoint(tmp_path / "m", int8_tensors(), llama_config())
    with pytest.raises(BitgrainError):
        bitgrain.open_checkpoint(path)


def test_tied_head_has_no_tensors_of_its_own(tmp_path):
    tensors = llama_tensors()
    tensors.pop("lm_head.weight")
    row = bitgrain.open_checkpoint(write_checkpoint(tmp_path / "m", tensors, llama_config(tie_word_embeddings=True))).plan.modules["lm_head"]
    assert row.tied_to == "model.embed_tokens" and row.nbytes == 0


def test_missing_head_of_an_untied_model_is_an_error(tmp_path):
    tensors = llama_tensors()
    tensors.pop("lm_head.weight")
    with pytest.raises(MissingTensorError, match=r"lm_head\.weight"):
        bitgrain.open_checkpoint(write_checkpoint(tmp_path / "m", tensors, llama_config()))


def test_stored_rotary_frequencies_are_ignored_under_a_named_rule(tmp_path):
    tensors = llama_tensors()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[name] = torch.ones(8)
    plan = bitgrain.open_checkpoint(write_checkpoint(tmp_path / "m", tensors, llama_config())).plan
    assert "configuration" in plan.ignored[name]


def test_unknown_architecture_still_resolves(tmp_path):
    path = small_llama(tmp_path / "m", architectures=["NovelForCausalLM"])
    plan = bitgrain.open_checkpoint(path).plan
    assert plan.modules[DOWN].kind == "linear" and plan.modules["model.embed_tokens"].kind == "embedding"
    with pytest.raises(BitgrainError, match="NovelForCausalLM"):
        bitgrain.load_model(path)


def test_configuration_over_dense_tensors_leaves_every_module_dense_and_says_so(tmp_path):
    path = small_llama(tmp_path / "m", quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})
    row = bitgrain.open_checkpoint(path).plan.modules[DOWN]
    assert row.label == "dense bfloat16" and "its tensors are dense" in row.why


def test_only_weights_are_matrices(tmp_path):
    tensors = llama_tensors()
    tensors[f"{DOWN}.bias"] = torch.ones(64).bfloat16()
    checkpoint = bitgrain.open_checkpoint(write_checkpoint(tmp_path / "m", tensors, llama_config()))
    assert torch.equal(checkpoint.dequantize(f"{DOWN}.weight"), tensors[f"{DOWN}.weight"].float())
    assert torch.equal(checkpoint.dequantize("model.norm.weight"), tensors["model.norm.weight"].float())
    for name in (f"{DOWN}.bias", f"{DOWN}.wish", "no.such.module.weight"):
        with pytest.raises(BitgrainError, match="correct the name"):
            checkpoint.dequantize(name)


def test_file_that_is_wrong_everywhere_is_refused_quickly_and_wholly(tmp_path):
    """Hints cost time that grows with the names on both sides; the first problems have them, all are listed."""
    tensors = {f"model.layers.0.other_{i}.weight": torch.zeros(1) for i in range(400)}
    config = llama_config(num_hidden_layers=60)
    with pytest.raises(ManyProblemsError) as caught:
        bitgrain.open_checkpoint(write_checkpoint(tmp_path / "wrong", tensors, config))
    texts = [str(problem) for problem in caught.value.problems]
    assert len(texts) >= 60 * 9 + 400
    hinted = ["nearest" in text for text in texts]
    assert any(hinted) and not any(hinted[-100:])
