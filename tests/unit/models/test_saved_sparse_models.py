"""Checkpoints with experts that the transformers library writes itself, config.json included, from load to generated text."""

import pytest
import torch

import bitgrain
from tests.checkpoints import write_tokenizer
from tests.unit.models.sparse_models import SPARSE, ids_of, library_model
from tests.unit.models.tiny_models import random_tensors

pytest.importorskip("transformers", reason="the transformers library is not installed: nothing to compare with")


@pytest.mark.parametrize("name", SPARSE)
def test_saved_model_generates_what_the_library_generates(tmp_path, name):
    config = {**SPARSE[name], "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    theirs = library_model(config, random_tensors(config, seed=4))
    theirs.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    prompts = [ids_of(11, seed=5), ids_of(3, seed=6)]
    with torch.inference_mode():
        want = theirs(prompts[0][None]).logits[0]
        texts = [theirs.generate(p[None], max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(p) :].tolist() for p in prompts]
    found = bitgrain.load_model(tmp_path, device="cpu", dtype="float32").logits(prompts[0])
    assert (found - want).abs().max() < 5e-5 * want.std()
    greedy = bitgrain.SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    with bitgrain.LLM(tmp_path, device="cpu", dtype="float32") as llm:
        assert [list(done.token_ids) for done in llm.generate([p.tolist() for p in prompts], greedy)] == texts
