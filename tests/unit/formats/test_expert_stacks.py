"""Stacked experts of every layout become the same matrices per expert; layouts that can be read in two ways are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

import bitgrain
from bitgrain.errors import BitgrainError, MissingTensorError, ShapeMismatchError, UnexpectedTensorError
from bitgrain.formats.expert_stacks import BIAS, PLAIN, WEIGHT, ExpertStack, Piece, divide_experts, number, spellings, stacked_name
from tests.unit.formats.synthetic import header
from tests.unit.models.tiny_models import QWEN3_MOE, random_tensors

E, H, I = 3, 10, 4  # noqa: E741
PARENT = "model.layers.0.mlp.experts"
STACK = ExpertStack(E, H, I)


def numbered(*shape, dtype=torch.float32):
    """Values that are all different."""
    count = int(torch.tensor(shape).prod())
    return torch.arange(count).view(shape).to(dtype)


def parts_of(tensors, stack=STACK, pieces=PLAIN):
    """What modules see: part name to its values; full names under PARENT."""
    full = {f"{PARENT}.{name}": tensor for name, tensor in tensors.items()}
    parts = divide_experts({name: header(name, tensor) for name, tensor in full.items()}, stack, pieces)
    seen = {}
    for name, part in parts.items():
        values = part.of(full[part.source])
        assert part.header.shape == tuple(values.shape), name
        seen[name.removeprefix(f"{PARENT}.")] = values
    return seen


def check(seen, local, gate_up, down):
    """Compare with [E, 2, ...] of gate and up, and [E, ...] of down."""
    for e in range(E):
        assert torch.equal(seen[f"{e}.gate_proj.{local}"], gate_up[e, 0])
        assert torch.equal(seen[f"{e}.up_proj.{local}"], gate_up[e, 1])
        assert torch.equal(seen[f"{e}.down_proj.{local}"], down[e])


# --- weights and biases ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "alternating"])
@pytest.mark.parametrize("transposed", [False, True], ids=["n-k", "k-n"])
@pytest.mark.parametrize("dotted", [False, True])
def test_fused_weights_and_biases(interleaved, transposed, dotted):
    gate_up, down, bias, down_bias = numbered(E, 2, I, H), numbered(E, H, I), numbered(E, 2, I), numbered(E, H)
    join = (lambda t: t.transpose(1, 2).flatten(1, 2)) if interleaved else (lambda t: t.flatten(1, 2))
    turn = (lambda t: t.mT.contiguous()) if transposed else (lambda t: t)
    weight, own = (".weight", ".bias") if dotted else ("", "_bias")
    stored = {
        f"gate_up_proj{weight}": turn(join(gate_up)), f"gate_up_proj{own}": join(bias),
        f"down_proj{weight}": turn(down), f"down_proj{own}": down_bias,
    }  # fmt: skip
    # H, I and 2I differ, so that the shapes say which way matrices lie, whatever the architecture's own way is
    for declared in (False, True):
        seen = parts_of(stored, ExpertStack(E, H, I, transposed=declared, interleaved=interleaved))
        assert len(seen) == 6 * E
        check(seen, "weight", gate_up, down)
        check(seen, "bias", bias, down_bias)


@pytest.mark.parametrize("transposed", [False, True])
def test_separate_stacks_of_gate_and_up(transposed):
    gate_up, down = numbered(E, 2, I, H), numbered(E, H, I)
    turn = (lambda t: t.mT.contiguous()) if transposed else (lambda t: t)
    stored = {"gate_proj": turn(gate_up[:, 0]), "up_proj": turn(gate_up[:, 1]), "down_proj": turn(down)}
    check(parts_of(stored), "weight", gate_up, down)


@pytest.mark.parametrize("transposed", [False, True])
def test_square_matrix_lies_as_the_other_one_of_its_layer(transposed):
    stack = ExpertStack(E, 4, 4, transposed=not transposed)
    gate_up, down = numbered(E, 2, 4, 4), numbered(E, 4, 4)
    turn = (lambda t: t.mT.contiguous()) if transposed else (lambda t: t)
    check(parts_of({"gate_up_proj": turn(gate_up.flatten(1, 2)), "down_proj": turn(down)}, stack), "weight", gate_up, down)


@pytest.mark.parametrize("transposed", [False, True])
def test_squares_alone_lie_as_the_architecture_says(transposed):
    down = numbered(E, 4, 4)
    seen = parts_of({"down_proj": down}, ExpertStack(E, 4, 4, transposed=transposed))
    assert torch.equal(seen["1.down_proj.weight"], down[1].T if transposed else down[1])


def test_matrices_of_a_layer_that_lie_in_two_ways_are_refused():
    with pytest.raises(ShapeMismatchError) as caught:
        parts_of({"gate_up_proj": numbered(E, 2 * I, H), "down_proj": numbered(E, I, H)})
    assert "down_proj" in str(caught.value) and "gate_up_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gate_up_proj", (E - 1, 2 * I, H)), ("gate_up_proj", (E, 2 * I, H + 1)), ("gate_up_proj", (E, I, H)), ("gate_up_proj", (2 * I, H)),
        ("down_proj", (E, H, 2 * I)), ("down_proj", (E, H, I, 1)), ("down_proj", ()), ("gate_up_proj_bias", (E, I)), ("down_proj_bias", (E, I)),
        ("down_proj_bias", (H,)),
    ],
)  # fmt: skip
def test_stack_of_another_shape_is_refused_by_name(name, shape):
    good = {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I), "gate_up_proj_bias": (E, 2 * I), "down_proj_bias": (E, H)}
    stored = {n: numbered(*s) for n, s in good.items()}
    with pytest.raises(ShapeMismatchError) as caught:
        parts_of({**stored, name: torch.zeros(shape)})
    assert f"{PARENT}.{name}:" in str(caught.value) and f"{E} experts" in str(caught.value)


def test_every_stack_that_does_not_fit_is_listed():
    with pytest.raises(BitgrainError, match=r"2 problems(.|\n)*gate_up_proj_bias(.|\n)*down_proj_bias"):
        parts_of({"gate_up_proj": numbered(E, 2 * I, H), "gate_up_proj_bias": numbered(E, 1), "down_proj": numbered(E, H, I), "down_proj_bias": numbered(E, 1)})


def test_missing_bias_of_an_architecture_that_has_them_is_one_error():
    with pytest.raises(MissingTensorError, match="gate_up_proj_bias"):
        parts_of({"gate_up_proj": numbered(E, 2 * I, H), "down_proj": numbered(E, H, I), "down_proj_bias": numbered(E, H)}, ExpertStack(E, H, I, biased=True))


def test_expert_that_is_stored_twice_is_one_error():
    with pytest.raises(UnexpectedTensorError) as caught:
        parts_of({"down_proj": numbered(E, H, I), "1.down_proj.weight": numbered(H, I)})
    assert f"{PARENT}.1.down_proj.weight" in str(caught.value)


def test_what_is_no_stack_stays_whole():
    stored = {"0.down_proj.weight": numbered(H, I), "down_proj_unknown": numbered(3)}
    assert parts_of(stored).keys() == stored.keys()
    stacked = {"gate_up_proj": numbered(E, 2 * I, H)}
    assert parts_of(stacked, None).keys() == stacked.keys()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a.experts.gate_up_proj", ("a.experts", "gate_up_proj", "")),
        ("experts.down_proj_scale_inv", ("experts", "down_proj", "_scale_inv")),
        ("a.experts.up_proj.weight_packed", ("a.experts", "up_proj", ".weight_packed")),
        ("a.experts.3.up_proj.weight", None),
        ("a.shared_experts.up_proj.weight", None),
        ("a.shared_expert.gate_up_proj", None),
        ("a.experts.gate_up_projs.0.weight", None),
        ("a.mlp.down_proj.weight", None),
    ],
)
def test_names_of_stacks(name, place):
    assert stacked_name(name) == place


def test_spellings_of_a_piece():
    assert set(spellings(WEIGHT)) == {"", ".weight"}
    assert set(spellings(BIAS)) == {"_bias", ".bias"}
    assert set(spellings(Piece("weight_scale_inv"))) == {"_scale_inv", "_weight_scale_inv", ".weight_scale_inv"}
    assert set(spellings(number("input_scale"))) == {"_input_scale", ".input_scale"}


# --- scales and packed weights ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(E,), (E, 1), (E, 1, 1)])
def test_one_number_per_expert_is_shared_by_gate_and_up(shape):
    scale = torch.tensor([2.0, 3.0, 5.0]).view(shape)
    seen = parts_of({"gate_up_proj_input_scale": scale}, pieces=spellings(number("input_scale")))
    assert seen["1.gate_proj.input_scale"].item() == seen["1.up_proj.input_scale"].item() == 3.0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(E, 2), (E, 2, 1), (E, 1, 2)])
def test_one_number_per_half(shape, interleaved):
    scale = torch.tensor([[2.0, 3.0], [5.0, 7.0], [11.0, 13.0]]).view(shape)
    seen = parts_of({"gate_up_proj_weight_scale_2": scale}, ExpertStack(E, H, I, interleaved=interleaved), spellings(number("weight_scale_2")))
    assert (seen["1.gate_proj.weight_scale_2"].item(), seen["1.up_proj.weight_scale_2"].item()) == (5.0, 7.0)
    assert seen["2.up_proj.weight_scale_2"].numel() == 1


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (None, 1)], ids=["n", "n-1", "1-n"])
def test_scale_per_row_lies_in_any_way(shape, interleaved):
    rows, down = numbered(E, 2, I), numbered(E, H)
    join = rows.transpose(1, 2).flatten(1) if interleaved else rows.flatten(1)
    place = (lambda t: t[:, None]) if shape == (None, 1) else (lambda t: t.view(*t.shape, *shape))
    stack = ExpertStack(E, H, I, interleaved=interleaved)
    seen = parts_of({"gate_up_proj_scale": place(join), "down_proj_scale": place(down)}, stack, spellings(Piece("weight_scale", (1,), (0,))))
    assert torch.equal(seen["2.up_proj.weight_scale"].flatten(), rows[2, 1]) and torch.equal(seen["1.gate_proj.weight_scale"].flatten(), rows[1, 0])
    assert torch.equal(seen["0.down_proj.weight_scale"].flatten(), down[0])
    assert seen["0.down_proj.weight_scale"].shape == ((H,) if shape == () else (H, 1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_codes_that_are_packed_along_k_with_block_scales(transposed, dotted):
    stack = ExpertStack(E, 64, 48)
    turn = (lambda t: t.mT.contiguous()) if transposed else (lambda t: t)
    codes, scale = numbered(E, 2, 48, 8, dtype=torch.int32), numbered(E, 2, 48, 2)
    down, down_scale = numbered(E, 64, 6, dtype=torch.int32), numbered(E, 64, 2)
    sep = "." if dotted else "_"
    stored = {
        f"gate_up_proj{sep}weight_packed": turn(codes.flatten(1, 2)), f"gate_up_proj{sep}weight_scale": turn(scale.flatten(1, 2)),
        f"down_proj{sep}weight_packed": turn(down), f"down_proj{sep}weight_scale": turn(down_scale),
    }  # fmt: skip
    seen = parts_of(stored, stack, spellings(Piece("weight_packed", columns=(8,)), Piece("weight_scale", columns=(32,))))
    check(seen, "weight_packed", codes, down)
    check(seen, "weight_scale", scale, down_scale)


def test_packed_codes_whose_shape_allows_both_ways_are_decided_by_their_layer():
    stack = ExpertStack(E, 64, 4)  # 2I = 8 = 64 / 8 words: [E, 8, 8] either way
    pieces = spellings(Piece("weight_packed", columns=(8,)))
    codes, down = numbered(E, 8, 8, dtype=torch.int32), numbered(E, 1, 64, dtype=torch.int32)
    seen = parts_of({"gate_up_proj_weight_packed": codes, "down_proj_weight_packed": numbered(E, 64, 1, dtype=torch.int32)}, stack, pieces)
    assert torch.equal(seen["0.up_proj.weight_packed"], codes[0, 4:])
    assert torch.equal(parts_of({"down_proj_weight_packed": down}, stack, pieces)["1.down_proj.weight_packed"], down[1].T)


BLOCK = Piece("weight_scale_inv", rows=(4,), columns=(4,))


@pytest.mark.parametrize("size", [4, 8])
def test_blocks_of_rows_that_end_with_gate_are_cut_there(size):
    scale = numbered(E, 2 * size // 4, 3)
    seen = parts_of({"gate_up_proj_scale_inv": scale}, ExpertStack(E, H, size), spellings(BLOCK))
    assert torch.equal(seen["1.gate_proj.weight_scale_inv"], scale[1, : size // 4])
    assert torch.equal(seen["1.up_proj.weight_scale_inv"], scale[1, size // 4 :])


def test_one_block_over_all_rows_is_shared():
    scale = numbered(E, 1, 3)
    seen = parts_of({"gate_up_proj_scale_inv": scale}, ExpertStack(E, H, 2), spellings(BLOCK))
    assert torch.equal(seen["1.gate_proj.weight_scale_inv"], scale[1]) and torch.equal(seen["1.up_proj.weight_scale_inv"], scale[1])


def test_blocks_that_start_anew_at_up_are_cut_there():
    scale = numbered(E, 4, 3)  # 5 rows in blocks of 4, twice; together they would be 3 blocks
    seen = parts_of({"gate_up_proj_scale_inv": scale}, ExpertStack(E, H, 5), spellings(BLOCK))
    assert torch.equal(seen["1.up_proj.weight_scale_inv"], scale[1, 2:])


@pytest.mark.parametrize(
    ("size", "blocks", "interleaved", "why"),
    [(5, 3, False, "the end of gate"), (7, 4, False, "or up may start"), (6, 3, False, "the end of gate"), (8, 4, True, "alternate")],
    ids=["straddled", "two-readings", "straddled-evenly", "alternating"],
)
def test_blocks_that_do_not_divide_in_one_way_are_refused(size, blocks, interleaved, why):
    with pytest.raises(ShapeMismatchError, match=f"gate_up_proj_scale_inv(.|\n)*{why}"):
        parts_of({"gate_up_proj_scale_inv": numbered(E, blocks, 3)}, ExpertStack(E, H, size, interleaved=interleaved), spellings(BLOCK))


def test_pieces_that_need_each_other():
    pieces = spellings(Piece("weight", needs=("weight_scale", "weight_scale_inv"), needing=("F8_E4M3",)), number("weight_scale"))
    weight = torch.zeros(E, H, I)
    assert len(parts_of({"down_proj": weight}, pieces=pieces)) == E
    assert len(parts_of({"down_proj": weight.to(torch.float8_e4m3fn), "down_proj_scale": numbered(E)}, pieces=pieces)) == 2 * E
    with pytest.raises(MissingTensorError, match="down_proj_scale or .*down_proj_scale_inv"):
        parts_of({"down_proj": weight.to(torch.float8_e4m3fn)}, pieces=pieces)


# --- whole checkpoints --------------------------------------------------------------------------------------------------------
MOE = {**QWEN3_MOE, "num_hidden_layers": 2, "hidden_size": 128, "moe_intermediate_size": 64, "torch_dtype": "float32"}
COUNT = MOE["num_experts"]


def stacked(tensors, transposed=False):
    """Qwen3-MoE tensors with the experts of each layer fused, as transformers 5 holds them in memory."""
    held = dict(tensors)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        take = lambda part, prefix=prefix: torch.stack([held.pop(f"{prefix}.{e}.{part}.weight") for e in range(COUNT)])  # noqa: E731
        gate_up = torch.cat([take("gate_proj"), take("up_proj")], 1)
        down = take("down_proj")
        held[f"{prefix}.gate_up_proj"], held[f"{prefix}.down_proj"] = (t.mT if transposed else t for t in (gate_up, down))
    return held


def write(folder, tensors, settings):
    folder.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_fused_experts_give_the_logits_of_separate_ones(tmp_path, transposed):
    tensors = random_tensors(MOE)
    ids = torch.arange(20)
    want = bitgrain.load_model(write(tmp_path / "separate", tensors, MOE)).logits(ids)
    fused = bitgrain.load_model(write(tmp_path / "fused", stacked(tensors, transposed), MOE))
    assert torch.equal(fused.logits(ids), want)
    row = fused.plan.modules["model.layers.1.mlp.experts.5.up_proj"]
    assert row.sources == ("model.layers.1.mlp.experts.gate_up_proj",) and row.nbytes == 64 * 128 * 4


def fp8_experts(layout):
    """(tensors with fp8 experts per expert, the same fused, quantization section) of one layout."""
    tensors = random_tensors(MOE)
    g = torch.Generator().manual_seed(1)
    positive = lambda *shape: torch.rand(shape, generator=g) * 1e-3 + 1e-3  # noqa: E731
    apart, fused = dict(tensors), stacked(tensors)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for part, n, k in (("gate_up_proj", 128, 128), ("down_proj", 128, 64)):
            codes = (torch.randn(COUNT, n, k, generator=g) * 100).to(torch.float8_e4m3fn)
            full = f"{prefix}.{part}"
            if layout == "fbgemm":
                scale = positive(COUNT, n)
                fused[full], fused[f"{full}_scale"] = codes.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn), scale[:, None] if part == "gate_up_proj" else scale[..., None]
                rows = scale[..., None]
            elif layout == "block":
                rows = positive(COUNT, n // 32, k // 32)
                fused[full], fused[f"{full}_scale_inv"] = codes, rows
            else:
                rows = positive(COUNT, 2 if part == "gate_up_proj" else 1, 1)
                fused[full], fused[f"{full}_scale_inv"] = codes, rows
                fused[f"{full}_activation_scale"] = positive(COUNT) + 0.05
            for e in range(COUNT):
                halves = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {part: 0}
                for own, i in halves.items():
                    step, wide = n // len(halves), len(rows[e]) // len(halves)
                    name = f"{prefix}.{e}.{own}"
                    apart[f"{name}.weight"] = codes[e].view(torch.uint8)[i * step : (i + 1) * step].clone().view(torch.float8_e4m3fn)
                    apart[f"{name}.weight_scale{'' if layout == 'fbgemm' else '_inv'}"] = rows[e, i * wide : (i + 1) * wide].clone()
                    if layout == "tensor":
                        apart[f"{name}.activation_scale"] = fused[f"{full}_activation_scale"][e].clone()
    kept = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn", "mlp.gate")] + ["lm_head"]
    section = {
        "block": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
        "tensor": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        "fbgemm": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    }[layout]
    return apart, fused, {**section, "modules_to_not_convert": kept}


@pytest.mark.parametrize("layout", ["block", "tensor", "fbgemm"])
def test_fp8_fused_experts_give_the_logits_of_separate_ones(tmp_path, layout):
    apart, fused, section = fp8_experts(layout)
    settings = {**MOE, "quantization_config": section}
    ids = torch.arange(20)
    separate = bitgrain.load_model(write(tmp_path / "separate", apart, settings))
    together = bitgrain.load_model(write(tmp_path / "fused", fused, settings))
    assert torch.equal(together.logits(ids), separate.logits(ids))
    label = together.plan.modules["model.layers.0.mlp.experts.3.up_proj"].label
    assert label == separate.plan.modules["model.layers.0.mlp.experts.3.up_proj"].label and "fp8" in label


@pytest.mark.parametrize("lost", ["gate_up_proj_scale_inv", "down_proj_scale_inv", "down_proj"])
def test_fp8_fused_experts_that_lack_a_tensor_are_one_error(tmp_path, lost):
    _, fused, section = fp8_experts("block")
    del fused[f"model.layers.1.mlp.experts.{lost}"]
    with pytest.raises(MissingTensorError, match=f"layers.1.mlp.experts.{lost}"):
        bitgrain.open_checkpoint(write(tmp_path / "c", fused, {**MOE, "quantization_config": section}))


def test_fp8_fused_experts_of_an_unknown_architecture_are_refused(tmp_path):
    _, fused, section = fp8_experts("block")
    settings = {**MOE, "architectures": ["UnheardOfForCausalLM"], "quantization_config": section}
    with pytest.raises(BitgrainError, match=r"UnknownFormatError: .*experts\.down_proj"):
        bitgrain.open_checkpoint(write(tmp_path / "c", fused, settings))
