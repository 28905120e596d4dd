"""Whole models on a device that refuses to mix its tensors with the host's: nothing is left on the host, and little is read back."""

import pytest
import torch

import bitgrain
from bitgrain.engine.engine import Engine
from bitgrain.engine.llm import LLM
from bitgrain.quantize import TARGETS
from tests.checkpoints import write_checkpoint
from tests.unit.models.sparse_models import DEEPSEEK_V3, QWEN2_MOE
from tests.unit.models.tiny_models import GEMMA2, GEMMA3, GPT_OSS, LLAMA, MINISTRAL3, PHI3, QWEN3_MOE, random_tensors
from tests.unit.platforms.elsewhere import DEVICE, Built, Elsewhere, Seen, device

IDS = torch.tensor([5, 9, 17, 33, 2, 40, 41])
DENSE = {str(c["model_type"]): c for c in (LLAMA, GEMMA2, GEMMA3, MINISTRAL3, PHI3)}
SPARSE = {str(c["model_type"]): c for c in (QWEN3_MOE, QWEN2_MOE, GPT_OSS, DEEPSEEK_V3)}
# tokens, positions and rows of a batch
SENT = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Gives the folder of a family's tiny model."""
    folder, made = tmp_path_factory.mktemp("families"), {}

    def path(name):
        if name not in made:
            config = {**(DENSE | SPARSE)[name], "torch_dtype": "float32"}
            made[name] = write_checkpoint(folder / name, random_tensors(config), config)
        return made[name]

    return path


def both(path, **options):
    """(logits on the host by the floor, logits on the device, what the second pass asked of the device, what it sent)."""
    wanted = bitgrain.load_model(path, forbid=("cpu",), **options).logits(IDS)
    with device() as seen:
        model = bitgrain.load_model(path, device=DEVICE.type, **options)
        model.logits(IDS)
        seen.reads.clear()
        seen.sends = 0
        got = model.logits(IDS)
        assert isinstance(got, Elsewhere)
        return wanted, got.inner, dict(seen.reads), seen.sends


@pytest.mark.parametrize("name", DENSE)
def test_dense_model_lives_on_its_device_and_reads_nothing_back(name, checkpoint):
    wanted, got, reads, sends = both(checkpoint(name))
    assert torch.equal(wanted, got) and reads == {} and sends == SENT


@pytest.mark.parametrize("name", SPARSE)
def test_experts_live_on_their_device(name, checkpoint):
    wanted, got, reads, sends = both(checkpoint(name))
    # the floor asks which experts a step needs: two lists per layer; kernels of experts do without
    assert torch.equal(wanted, got) and sends == SENT and set(reads) <= {"tolist", "aten::unique_consecutive"}


@pytest.mark.parametrize("target", TARGETS)
def test_every_online_scheme_lives_on_its_device(target, checkpoint):
    wanted, got, reads, _ = both(checkpoint("llama"), quantization=target)
    assert torch.equal(wanted, got) and reads == {}


@pytest.mark.parametrize("cache", ["auto", "fp8_e4m3", "fp8_e5m2", "int8", "int4", "nvfp4"])
def test_engine_runs_with_every_cache_and_every_way_of_sampling(cache, checkpoint, monkeypatch):
    prompts = [IDS.tolist(), [7, 8]]
    params = [
        bitgrain.SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True),
        bitgrain.SamplingParams(max_tokens=3, temperature=0.8, top_p=0.9, seed=1, logprobs=2, repetition_penalty=1.2, presence_penalty=0.1, ignore_eos=True),
    ]

    def tokens(model):
        with LLM.from_parts(model, None) as llm:
            return [llm.generate([prompt], one)[0].token_ids for prompt, one in zip(prompts, params, strict=True)]

    wanted = tokens(bitgrain.load_model(checkpoint("llama"), forbid=("cpu",), kv_cache=cache))
    run = Engine._run
    with device():

        def inside(engine):  # modes are of one thread, and the engine has its own
            with Seen(), Built():
                run(engine)

        monkeypatch.setattr(Engine, "_run", inside)
        assert tokens(bitgrain.load_model(checkpoint("llama"), device=DEVICE.type, kv_cache=cache)) == wanted


def test_device_refuses_what_a_real_one_refuses():
    with device() as seen:
        here, there = torch.ones(3), torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="expected all tensors to be on one device"):
            here + there
        with pytest.raises(RuntimeError, match="expected all tensors to be on one device"):
            here[torch.tensor([1], device=DEVICE)]
        assert float((there * 2).sum()) == 6 and sum(seen.reads.values()) == 1
        assert type(there.to("cpu")) is torch.Tensor and sum(seen.reads.values()) == 2
