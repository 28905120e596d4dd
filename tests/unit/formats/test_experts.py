"""Experts through the public API, over storages and schemes: what other engines got wrong, a test for each."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitgrain
from bitgrain.cli.main import main
from bitgrain.errors import BadValueError, BitgrainError, NoKernelError
from bitgrain.kernels.reference.experts import ReferenceExperts
from bitgrain.layers.decoding import ModuleReader
from bitgrain.layers.mlp import GatedLinears
from bitgrain.models.loading import LoadOptions, build_model

HIDDEN, SIZE, EXPERTS, VOCAB = 64, 96, 4, 48
IDS = torch.tensor([5, 1, 17, 40, 3, 3, 22, 9])
GROUPS = {"format": "pack-quantized", "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}, "targets": ["re:.*experts.*"]}


def config_of(hidden=HIDDEN, size=SIZE, experts=EXPERTS, layers=1, **changes):
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": hidden, "intermediate_size": size, "moe_intermediate_size": size,
        "num_experts": experts, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCAB, "hidden_act": "silu", "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "dtype": "float32", **changes,
    }  # fmt: skip


def dense_tensors(config):
    """Random weights by name, experts as modules of their own."""
    hidden, size, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    random = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (VOCAB, hidden), "lm_head": (VOCAB, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{p}_proj": (n, k) for p, n, k in (("q", 2 * head, hidden), ("k", head, hidden), ("v", head, hidden), ("o", hidden, 2 * head))}
        shapes[f"{layer}.mlp.gate"] = (config["num_experts"], hidden)
        for e in range(config["num_experts"]):
            shapes |= {f"{layer}.mlp.experts.{e}.{p}_proj": (size, hidden) for p in ("gate", "up")}
            shapes[f"{layer}.mlp.experts.{e}.down_proj"] = (hidden, size)
    tensors = {f"{name}.weight": torch.randn(shape, generator=random) * (1.5 / shape[1] ** 0.5) for name, shape in shapes.items()}
    norms = [(f"model.layers.{i}.{n}", hidden) for i in range(config["num_hidden_layers"]) for n in ("input_layernorm", "post_attention_layernorm")]
    norms += [(f"model.layers.{i}.self_attn.{n}_norm", head) for i in range(config["num_hidden_layers"]) for n in "qk"]
    return tensors | {f"{name}.weight": 1 + torch.randn(n, generator=random) / 8 for name, n in [*norms, ("model.norm", hidden)]}


def expert_names(tensors):
    return [name.removesuffix(".weight") for name in tensors if ".experts." in name]


def write(folder: Path, tensors, config, section=None) -> Path:
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config if section is None else {**config, "quantization_config": section}))
    return folder


def logits(folder, **options):
    checkpoint = bitgrain.open_checkpoint(folder)
    return build_model(checkpoint.files, checkpoint.plan, checkpoint.architecture, LoadOptions(device="cpu", dtype="float32", **options)).logits(IDS)


def experts_of(folder, **options):
    """The first layer's experts, built by the public API."""
    return bitgrain.load_model(folder, device="cpu", dtype="float32", **options).layers[0].mlp.experts


def words(codes):
    """int32 of eight 4-bit codes each along the last dimension, the first in the low bits."""
    eight = codes.to(torch.int64).unflatten(-1, (-1, 8))
    return (eight << (4 * torch.arange(8))).sum(-1).to(torch.int32)


def int4(weight, group=32):
    """(codes 0 to 15 around 8, scales [N, G], what they stand for) of the nearest symmetric integers."""
    n, k = weight.shape
    grouped = weight.view(n, -1, group)
    scale = (grouped.abs().amax(-1) / 7).half().float()
    codes = (grouped / scale[..., None]).round().clamp(-8, 7)
    return (codes + 8).view(n, k), scale, (codes * scale[..., None]).view(n, k)


def packed(tensors, names, group=32):
    """(tensors with `names` stored as int4 along K, tensors with what they stand for)."""
    stored, meant = dict(tensors), dict(tensors)
    for name in names:
        codes, scale, value = int4(stored.pop(f"{name}.weight"), group)
        stored |= {f"{name}.weight_packed": words(codes), f"{name}.weight_scale": scale.half(), f"{name}.weight_shape": torch.tensor(codes.shape)}
        meant[f"{name}.weight"] = value
    return stored, meant


def section_of(ignore=(), **groups):
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "config_groups": groups or {"group_0": GROUPS}, "ignore": list(ignore)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(packed checkpoint of int4 experts, dense checkpoint of the same numbers)."""
    root, config = tmp_path_factory.mktemp("experts"), config_of(layers=2)
    stored, meant = packed(dense_tensors(config), expert_names(dense_tensors(config)))
    return write(root / "packed", stored, config, section_of()), write(root / "dense", meant, config)


@pytest.mark.parametrize("options", [{}, {"kernels": {"experts": "reference.experts"}}, {"forbid": ("cpu",)}], ids=["default", "forced", "floor"])
def test_packed_experts_are_their_numbers(made, options):
    want = logits(made[1])
    torch.testing.assert_close(logits(made[0], **options), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_scales_of_gate_and_up_follow_the_hidden_size(tmp_path):
    """Hidden 4096, 128 rows on a partition, groups of 128: as many rows of down's scales as of gate's columns."""
    config = config_of(4096, 128, 2)
    tensors = dense_tensors(config)
    stored, meant = packed(tensors, expert_names(tensors), 128)
    section = section_of(group_0={**GROUPS, "weights": {**GROUPS["weights"], "group_size": 128}})
    assert stored["model.layers.0.mlp.experts.0.gate_proj.weight_scale"].shape == (128, 32)
    assert stored["model.layers.0.mlp.experts.0.down_proj.weight_scale"].shape == (4096, 1)
    folder, dense = write(tmp_path / "packed", stored, config, section), write(tmp_path / "dense", meant, config)
    want = logits(dense)
    for options in ({}, {"kernels": {"experts": "reference.experts"}}):
        torch.testing.assert_close(logits(folder, **options), want, rtol=1e-4, atol=2e-4 * want.abs().max().item())


def test_static_input_scales_of_experts_stay_apart(tmp_path):
    config, kind = config_of(), torch.float8_e4m3fn
    tensors = dense_tensors(config)
    values, scales = {}, {}
    for place, name in enumerate(expert_names(tensors)):
        weight = tensors.pop(f"{name}.weight")
        scale, scales[name] = weight.abs().amax() / 448, 0.0007 * 1.3**place
        tensors |= {f"{name}.weight": (weight / scale).to(kind), f"{name}.weight_scale": scale.reshape(1), f"{name}.input_scale": torch.tensor([scales[name]])}
        values[name] = tensors[f"{name}.weight"].float() * scale
    section = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["re:.*self_attn.*", "re:.*mlp.gate$", "lm_head"]}
    folder = write(tmp_path / "static", tensors, config, section)
    for options in ({}, {"forbid": ("cpu",)}):
        layer = experts_of(folder, **options)
        x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1))
        chosen = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2], [1, 3], [0, 3], [2, 0], [3, 1]])
        got = layer(x, torch.full((9, 2), 0.5), chosen)
        want = torch.zeros_like(x)
        for row, experts in enumerate(chosen.tolist()):
            for expert in experts:
                name = f"model.layers.0.mlp.experts.{expert}"

                def product(v, part, name=name):
                    s = torch.tensor(scales[f"{name}.{part}"])
                    return (v / s).clamp(-448, 448).to(kind).float() * s @ values[f"{name}.{part}"].T

                middle = torch.nn.functional.silu(product(x[row], "gate_proj")) * product(x[row], "up_proj")
                want[row] += 0.5 * product(middle, "down_proj")
        # a middle value between two codes may go either way; another expert's scale moves every row by tens of percent
        assert ((got - want).norm(dim=1) < 0.02 * want.norm(dim=1)).all()


def test_one_missing_scale_is_named_with_its_file(made, tmp_path):
    tensors = load_file(made[0] / "model.safetensors")
    gone = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    del tensors[gone]
    folder = write(tmp_path / "missing", tensors, config_of(layers=2), section_of())
    with pytest.raises(BitgrainError) as caught:
        bitgrain.load_model(folder)
    assert caught.value.where == gone and "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_scale_is_named_with_its_file(made, tmp_path, bad):
    tensors = load_file(made[0] / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj.weight_scale"
    tensors[name][5, 1] = bad
    with pytest.raises(BadValueError) as caught:
        bitgrain.load_model(write(tmp_path / "bad", tensors, config_of(layers=2), section_of()))
    assert caught.value.where == f"model.safetensors: {name}"


def fp8_experts(config):
    """Tensors with experts in fp8 and scales per tensor."""
    tensors = dense_tensors(config)
    for name in expert_names(tensors):
        weight = tensors[f"{name}.weight"]
        scale = weight.abs().amax() / 448
        tensors |= {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": scale.reshape(1, 1)}
    return tensors


def stacked(tensors, layers, experts, transposed=False):
    """The same with one tensor for the experts of a layer: gate above up, or each matrix turned."""
    found = {name: t for name, t in tensors.items() if ".experts." not in name}
    for i in range(layers):
        parent = f"model.layers.{i}.mlp.experts"
        kind = tensors[f"{parent}.0.down_proj.weight"].dtype
        plain = torch.uint8 if kind.itemsize == 1 else kind  # torch joins bytes, not fp8
        matrix = {(e, p): tensors[f"{parent}.{e}.{p}_proj.weight"].view(plain) for e in range(experts) for p in ("gate", "up", "down")}
        both = torch.stack([torch.cat([matrix[e, "gate"], matrix[e, "up"]]) for e in range(experts)])
        down = torch.stack([matrix[e, "down"] for e in range(experts)])
        if transposed:
            both, down = both.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        found |= {f"{parent}.gate_up_proj": both.view(kind), f"{parent}.down_proj": down.view(kind)}
        if kind.itemsize == 1:
            scale = {key: tensors[f"{parent}.{key[0]}.{key[1]}_proj.weight_scale_inv"] for key in matrix}
            found[f"{parent}.gate_up_proj_scale_inv"] = torch.stack([torch.cat([scale[e, "gate"], scale[e, "up"]]) for e in range(experts)])
            found[f"{parent}.down_proj_scale_inv"] = torch.stack([scale[e, "down"] for e in range(experts)])
    return found


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["self_attn", "mlp.gate", "lm_head"]}


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "turned"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "fp8"])
def test_stacked_and_single_experts_have_identical_logits(tmp_path, quantized, transposed):
    config = config_of(layers=2)
    tensors, section = (fp8_experts(config), FP8) if quantized else (dense_tensors(config), None)
    single = write(tmp_path / "single", tensors, config, section)
    joined = write(tmp_path / "joined", stacked(tensors, 2, EXPERTS, transposed), config, section)
    assert torch.equal(logits(joined), logits(single))


def test_a_bad_scale_in_a_stack_names_the_expert_and_the_stored_tensor(tmp_path):
    config = config_of()
    tensors = stacked(fp8_experts(config), 1, EXPERTS)
    tensors["model.layers.0.mlp.experts.gate_up_proj_scale_inv"][2, 1] = 0.0
    with pytest.raises(BadValueError, match=r"experts\.2\.up_proj.*part of model\.layers\.0\.mlp\.experts\.gate_up_proj_scale_inv"):
        bitgrain.load_model(write(tmp_path / "bad", tensors, config, FP8))


def test_packing_along_rows_or_columns_means_the_same(made, tmp_path):
    """[K / 8, N] words with the scales of a group in a row, against [N, K / 8] with those of a row in a row."""
    tensors = load_file(made[0] / "model.safetensors")
    turned = {name: t for name, t in tensors.items() if ".experts." not in name}
    for name in {n.rpartition(".")[0] for n in tensors if ".experts." in n}:
        codes = ((tensors[f"{name}.weight_packed"][..., None] >> (4 * torch.arange(8))) & 15).flatten(1)
        n, k = codes.shape
        turned[f"{name}.qweight"] = words(codes.t().contiguous().view(-1, 8, n).transpose(1, 2).contiguous()).view(k // 8, n)
        turned[f"{name}.qzeros"] = torch.full((k // 32, n // 8), 0x77777777, dtype=torch.int32)
        turned[f"{name}.scales"] = tensors[f"{name}.weight_scale"].t().contiguous()
        turned[f"{name}.g_idx"] = (torch.arange(k) // 32).int()
    section = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
    folder = write(tmp_path / "turned", turned, config_of(layers=2), section)
    assert torch.equal(logits(folder, kernels={"experts": "reference.experts"}), logits(made[0], kernels={"experts": "reference.experts"}))
    torch.testing.assert_close(logits(folder), logits(made[0]), rtol=1e-4, atol=1e-4)


def test_experts_left_unquantized_run_beside_quantized_ones(tmp_path):
    config = config_of()
    tensors = dense_tensors(config)
    left = [name for name in expert_names(tensors) if ".experts.1." in name]
    stored, meant = packed(tensors, [name for name in expert_names(tensors) if name not in left])
    folder = write(tmp_path / "mixed", stored, config, section_of(ignore=["re:.*experts.1\\..*"]))
    want = logits(write(tmp_path / "dense", meant, config))
    torch.testing.assert_close(logits(folder), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    torch.testing.assert_close(logits(folder, forbid=("cpu",)), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    groups = bitgrain.open_checkpoint(folder).plan.expert_groups["model.layers.0.mlp.experts"]
    assert [(g.members, g.together) for g in groups] == [((0, 2, 3), True), ((1,), True)]


def test_an_expert_and_half_of_another_in_other_schemes(tmp_path):
    """Expert 2 has 8 bits; of expert 3 only gate has: that one's halves are no matrix, and run apart."""
    config = config_of()
    tensors = dense_tensors(config)
    wide = [n for n in expert_names(tensors) if ".experts.2." in n or n.endswith("experts.3.gate_proj")]
    stored, meant = packed(tensors, [n for n in expert_names(tensors) if n not in wide])
    for name in wide:
        weight = stored.pop(f"{name}.weight")
        scale = weight.abs().amax(1, keepdim=True) / 127
        stored |= {f"{name}.weight": (weight / scale).round().to(torch.int8), f"{name}.weight_scale": scale}
        meant[f"{name}.weight"] = stored[f"{name}.weight"].float() * scale
    eight = {"format": "int-quantized", "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}, "targets": ["re:.*experts.2\\..*", "re:.*experts.3.gate_proj"]}
    folder = write(tmp_path / "mixed", stored, config, {**section_of(group_0=eight, group_1={**GROUPS, "targets": [r"re:.*experts\.([01]\..*|3\.(up|down)_proj)"]}), "format": "mixed-precision"})
    want = logits(write(tmp_path / "dense", meant, config))
    for options in ({}, {"forbid": ("cpu",)}):
        torch.testing.assert_close(logits(folder, **options), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    checkpoint = bitgrain.open_checkpoint(folder)
    groups = checkpoint.plan.expert_groups["model.layers.0.mlp.experts"]
    assert [(g.members, g.together) for g in groups] == [((0, 1), True), ((2,), True), ((3,), False)]
    assert "schemes differ" in groups[2].why
    model = bitgrain.load_model(folder, device="cpu", forbid=("cpu",))
    rows = {row["modules"]: row for row in model.explain() if ".experts" in row["modules"]}
    assert set(rows) == {f"model.layers.0.mlp.experts{end}" for end in ("[0-1]", "[2]", ".3.gate_proj", ".3.up_proj", ".3.down_proj")}
    assert rows["model.layers.0.mlp.experts.3.up_proj"]["note"] == groups[2].why
    plain = bitgrain.load_model(folder, device="cpu", kernels={"gate": "reference.gate"})
    assert [m.gate.name for m in plain.modules() if isinstance(m, GatedLinears)] == ["reference.gate"]  # of the one expert that is linear modules
    with pytest.raises(NoKernelError, match=r"experts\.3: run as linear modules"):
        bitgrain.load_model(folder, device="cpu", kernels={"experts": "reference.experts"})


@pytest.fixture
def cli(capsys):
    """Runs a command and gives what it prints."""

    def run(*arguments, status=0):
        assert main([str(a) for a in arguments]) == status
        return capsys.readouterr().out

    return run


def test_an_expert_smaller_than_a_group_on_a_rank_is_refused_by_inspect(made, cli):
    remarks = json.loads(cli("inspect", made[0], "--tp", 4, "--json", status=1))["shards"]["remarks"]
    down = [r for r in remarks if r["name"].endswith("experts.*.down_proj")]
    assert [(r["dim"], r["size"], r["count"]) for r in down] == [("K", SIZE, 2 * EXPERTS)]
    assert down[0]["verdict"].startswith("refused: a rank gets 24 of 96, less than the 32 that share a scale; at most 3 ranks")
    assert "refused: a rank gets 24 of 96" in cli("inspect", made[0], "--tp", 4, status=1)
    assert not [r for r in json.loads(cli("inspect", made[0], "--tp", 2, "--json"))["shards"]["remarks"] if "experts" in r["name"] and "refused" in r["verdict"]]


def test_explain_and_the_model_choose_alike(made, cli):
    found = json.loads(cli("explain", made[0], "--dtype", "float32", "--forbid", "cpu", "--json"))["modules"]
    chosen = {(r["modules"], r["kernel"]) for r in found if ".experts" in r["modules"]}
    model = bitgrain.load_model(made[0], device="cpu", dtype="float32", forbid=("cpu",))
    assert chosen == {(r["modules"], r["kernel"]) for r in model.explain() if ".experts" in r["modules"]} == {("model.layers.0-1.mlp.experts", "reference.experts")}


def test_experts_are_read_and_prepared_one_by_one(made, monkeypatch):
    """No more than one expert is held as it is stored, however many the layer has."""
    log = []
    read, prepare = ModuleReader.weight, ReferenceExperts.prepare
    monkeypatch.setattr(ModuleReader, "weight", lambda self, row: log.append(row.name) or read(self, row))
    monkeypatch.setattr(ReferenceExperts, "prepare", lambda self, *matrices: log.append("prepared") or prepare(self, *matrices))
    bitgrain.load_model(made[0], device="cpu", kernels={"experts": "reference.experts"})
    steps = [entry for entry in log if entry == "prepared" or ".experts." in entry]
    want = [[f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for p in ("gate", "up", "down")] + ["prepared"] for i in range(2) for e in range(EXPERTS)]
    assert steps == [entry for expert in want for entry in expert]
