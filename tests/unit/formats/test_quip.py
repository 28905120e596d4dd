"""QuIP# checkpoints: golden modules of the producer, every codebook by a naive decoder, damage, and a whole model stored fused."""

from functools import lru_cache

import pytest
import torch

import bitgrain
from bitgrain.errors import (
    BitgrainError,
    ConfigError,
    LabelMismatchError,
    MissingTensorError,
    RuleMismatchError,
    ShapeMismatchError,
    UnexpectedTensorError,
)
from bitgrain.formats.evidence import Evidence
from bitgrain.formats.hadamard_tables import ROWS
from bitgrain.formats.incoherence import base_size, hadamard
from bitgrain.formats.quip import QuipConfig
from bitgrain.numerics.e8_lattice import e8_ball, e8p_codebook
from tests.checkpoints import LAYERS, edited
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.incoherent_models import (
    DAMAGES,
    NOT_A_NUMBER,
    change,
    dense_hadamard,
    dense_weight,
    joint_shapes,
    signs,
    write_module,
    write_pair,
)
from tests.unit.formats.synthetic import header

BASE = {"codesz": 8, "pack_out": False, "idx_dtype": "torch.int64", "lora_rank": 0, "rank": 0, "rescale_WH": False, "resid_scale_override": -1}
PARAMS = {
    2: {**BASE, "codebook": "E8P12", "packsz": 4, "codebook_version": 1},
    3: {**BASE, "codebook": "E8P12RVQ3B", "packsz": 8 / 3, "codebook_version": 0},
    4: {**BASE, "codebook": "E8P12RVQ4B", "packsz": 2, "codebook_version": 1},
}
NUMBERS, DIVISORS = {2: 7, 3: 18, 4: 17}, {3: 2.04, 4: 3.45}


def test_golden_modules_have_the_producers_values():
    folders = golden_folders("quip")
    assert [check_golden(folder) for folder in folders] == [2, 2]


# --- a writer of its own: from codes to stored tensors, and from codes to values, one number at a time ----------------
def pack_e8p(codes):
    """int64 [N, K / 32] of 16-bit codes [N, K / 8], word by word."""
    n, c = codes.shape
    words = []
    for pair_row in range(n // 2):
        for pair_column in range(c // 2):
            low = high = 0
            for i in range(4):
                code = int(codes[2 * pair_row + i % 2, 2 * pair_column + i // 2])
                low |= (code >> 8) << 8 * i
                for j in range(8):
                    high |= (code >> j & 1) << 4 * j + i
            words.append(high << 32 | low)
    signed = [w - (1 << 64) if w >> 63 else w for w in words]
    return torch.tensor(signed).view(n // 16, 8, c // 8, 4).transpose(1, 2).reshape(n, c // 4)


def pack_bytes(codes):
    """int64 [N, C / 8]: eight one-byte codes per word, low byte first."""
    values = [[sum(int(c) << 8 * i for i, c in enumerate(row[at : at + 8])) for at in range(0, len(row), 8)] for row in codes]
    return torch.tensor([[w - (1 << 64) if w >> 63 else w for w in row] for row in values])


@lru_cache(maxsize=1)
def magnitudes():
    return sorted(v for v in half_integers(8) if sum(x * x for x in v) <= 10) + NORM_12


def naive_e8p(code):
    """Eight numbers of a code, by the definition of the specification."""
    row, s = magnitudes()[code >> 8], code & 255
    parity = bin(s).count("1") % 2
    s ^= parity
    stored = [row[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    if sum(row) % 2:
        stored[7] = -stored[7]
    stored = [-x if s >> j & 1 else x for j, x in enumerate(stored)]
    return [x + (-0.25 if parity else 0.25) for x in (stored[(0, 4, 1, 5, 2, 6, 3, 7)[i]] for i in range(8))]


def half_integers(length):
    return [[]] if length == 0 else [[x, *rest] for x in (0.5, 1.5, 2.5) for rest in half_integers(length - 1)]


def by_halves(text):
    return [[int(c) / 2 for c in word] for word in text.split()]


NORM_12 = by_halves(
    "31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133 33133311 33133131 33131331 33133113 33131313"
    " 33131133 31333311 31333131 31331331 31333113 31331313 13331133 13333311 13333131 13331331 13333113 13331313 11331333 33113331"
)


def make(bits, n, k, seed=0, dtype=torch.float16, fused=0, rescale=False, divisor=None):
    """(tensors, decoded codes) of a random module."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << 16, (n, k // 8), generator=g)
    values = torch.tensor([[x for c in row for x in naive_e8p(int(c))] for row in codes], dtype=torch.float64)
    words = pack_e8p(codes)
    if bits == 3:
        second = torch.randint(0, 256, (n, k // 8), generator=g)
        words = torch.cat([words, pack_bytes(second)], 1)
        values = values + e8_ball()[second].double().view(n, k) / (divisor or DIVISORS[3])
    if bits == 4:
        second = torch.randint(0, 1 << 16, (n, k // 8), generator=g)
        words = torch.cat([words, pack_e8p(second)], 1)
        values = values + torch.tensor([[x for c in row for x in naive_e8p(int(c))] for row in second], dtype=torch.float64) / (divisor or DIVISORS[4])
    tensors = {
        "Qidxs": words,
        "SU": signs(k, g).to(dtype),
        "SV": (signs(n, g) * (torch.rand(n, generator=g) + 0.5) / k**0.5).to(dtype),
        "Wscale": torch.tensor(1.0),
        "codebook_id": torch.tensor(NUMBERS[bits]),
    }
    if rescale:
        tensors["scaleWH"] = torch.rand(k, generator=g) + 0.5
    if fused:
        tensors["fuse_scales"] = torch.rand(fused, generator=g) + 0.5
    return tensors, values


@pytest.mark.parametrize(("n", "k"), [(16, 64), (48, 192), (32, 1280)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_codebook_decodes_as_the_naive_decoder_does(tmp_path, bits, n, k):
    tensors, values = make(bits, n, k, seed=bits)
    checkpoint = bitgrain.open_checkpoint(write_module(tmp_path, tensors, PARAMS[bits]))
    torch.testing.assert_close(checkpoint.dequantize("layer.weight"), values.float(), rtol=1e-6, atol=1e-6)
    if bits == 2:
        assert torch.equal(checkpoint.dequantize("layer.weight"), values.float())
    want = dense_weight(values, tensors["SU"], tensors["SV"])
    torch.testing.assert_close(checkpoint.effective_weight("layer.weight"), want.float(), rtol=1e-4, atol=1e-5)


def test_e8p_codebook_has_the_values_of_every_thirteenth_code():
    codes = range(0, 1 << 16, 13)
    assert torch.equal(e8p_codebook()[list(codes)], torch.tensor([naive_e8p(c) for c in codes]))


def test_e8_ball_holds_distinct_lattice_points_of_the_right_norms():
    ball = e8_ball()
    assert len(torch.unique(ball, dim=0)) == 256
    assert torch.equal((ball * ball).sum(1), torch.tensor([2.0] * 56 + [0.0] + [2.0] * 184 + [4.0] * 15))
    assert bool((ball.sum(1) % 2 == 0).all()) and not (2 * ball % 1).any()
    assert ball[0].tolist() == [-1, -1, 0, 0, 0, 0, 0, 0] and ball[113].tolist() == [-0.5] * 8
    assert ball[241].tolist() == [2] + [0] * 7 and ball[255].tolist() == [0] * 6 + [-2, 0]


def test_wscale_scale_wh_and_override_of_the_residual_take_part(tmp_path):
    params = {**PARAMS[4], "rescale_WH": True, "resid_scale_override": 2.5}
    tensors, values = make(4, 32, 64, rescale=True, divisor=2.5)
    tensors["Wscale"] = torch.tensor(0.25)
    checkpoint = bitgrain.open_checkpoint(write_module(tmp_path, tensors, params))
    want = dense_weight(values, tensors["SU"] / tensors["scaleWH"], tensors["SV"].float() * 0.25)
    torch.testing.assert_close(checkpoint.effective_weight("layer.weight"), want.float(), rtol=1e-4, atol=1e-6)


# --- transforms -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("m", sorted(ROWS))
def test_base_matrices_are_hadamard_and_applied_in_their_orientation(m):
    h = dense_hadamard(4 * m)
    torch.testing.assert_close(h @ h.T, torch.eye(4 * m, dtype=torch.float64))
    x = torch.randn(3, 4 * m)
    torch.testing.assert_close(hadamard(4 * m).apply(x), (x.double() @ h.T).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hadamard(4 * m, transpose=True).apply(x), (x.double() @ h).float(), rtol=1e-4, atol=1e-5)


def test_base_of_a_transform_is_the_largest_that_leaves_a_power_of_two():
    sizes = {14336: 28, 11008: 172, 13824: 108, 5120: 20, 6144: 12, 28672: 28, 17920: 140, 4096: 1, 1: 1, 12: 12, 22016: 172, 14592: None, 40: 20, 6: None, 720: None, 0: None}
    assert {size: base_size(size) for size in sizes} == sizes


# --- configuration --------------------------------------------------------------------------------------------------
def evidence(params, tensors=None):
    headers = {name: header(name, t) for name, t in (tensors or {}).items()}
    return Evidence({} if params is None else {"quip_params": params}, None, {}, headers, {n.rpartition(".")[2]: n for n in headers})


def test_detection_needs_a_codebook_section_or_names():
    assert QuipConfig.detect(evidence(PARAMS[2])).score == 100
    assert QuipConfig.detect(evidence({"L": 16, "K": 2, "codebook": "bitshift"})) is None
    assert QuipConfig.detect(evidence(None, {"layer.Qidxs": torch.zeros(1)})).score == 50
    assert QuipConfig.detect(evidence(None)) is None


@pytest.mark.parametrize(
    ("change_of", "named"),
    [
        ({"codebook": "E8P13"}, "codebook"), ({"codebook": None}, "codebook"), ({"codesz": 4}, "codesz"), ({"packsz": 2}, "packsz"),
        ({"pack_out": True}, "pack_out"), ({"idx_dtype": "torch.int32"}, "idx_dtype"), ({"codebook_version": 0}, "codebook_version"),
        ({"codebook_version": None}, "codebook_version"), ({"lora_rank": 64}, "lora_rank"), ({"rank": 2}, "rank"), ({"rescale_WH": "yes"}, "rescale_WH"),
        ({"resid_scale_override": "auto"}, "resid_scale_override"), ({"rescale_wh": True}, "rescale_WH"), ({"skip_list": ["3_mlp"]}, "skip_list"),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(change_of, named):
    with pytest.raises(BitgrainError, match=named):
        QuipConfig.parse(evidence({**PARAMS[2], **change_of}))


def test_all_problems_of_a_configuration_come_at_once():
    with pytest.raises(BitgrainError) as raised:
        QuipConfig.parse(evidence({**PARAMS[2], "codesz": 4, "lora_rank": 1, "resid_scale": 1}))
    assert all(key in str(raised.value) for key in ("codesz", "lora_rank", "resid_scale"))


def test_minimal_section_and_other_names_of_the_format(tmp_path):
    tensors, values = make(3, 16, 64)
    folder = write_module(tmp_path, tensors, {"codebook": "e8p12rvq3b"})
    for name in ("quip", "quip#", "quipsharp"):
        checkpoint = bitgrain.open_checkpoint(folder, quantization=name)
        torch.testing.assert_close(checkpoint.dequantize("layer.weight"), values.float(), rtol=1e-6, atol=1e-6)


# --- damage ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["Qidxs", "SU", "SV", "Wscale", "codebook_id", "scaleWH"])
def test_damaged_tensor_is_refused_by_name(tmp_path, name, damage):
    tensors, _ = make(2, 32, 64, rescale=True)
    folder = write_module(tmp_path, tensors, {**PARAMS[2], "rescale_WH": True})
    bitgrain.open_checkpoint(folder).dequantize("layer.weight")
    change(folder, f"layer.{name}", DAMAGES[damage])
    with pytest.raises(BitgrainError, match=name):
        bitgrain.open_checkpoint(folder).dequantize("layer.weight")


@pytest.mark.parametrize("damage", NOT_A_NUMBER)
@pytest.mark.parametrize("name", ["SU", "SV", "Wscale", "scaleWH"])
def test_impossible_values_are_refused_by_name(tmp_path, name, damage):
    tensors, _ = make(2, 32, 64, rescale=True)
    tensors[name] = NOT_A_NUMBER[damage](tensors[name])
    folder = write_module(tmp_path, tensors, {**PARAMS[2], "rescale_WH": True})
    with pytest.raises(BitgrainError, match=f"layer.{name}"):
        bitgrain.open_checkpoint(folder).dequantize("layer.weight")


def test_single_zero_among_divisors_is_refused(tmp_path):
    tensors, _ = make(2, 32, 64, rescale=True)
    tensors["scaleWH"][5] = 0
    with pytest.raises(BitgrainError, match="scaleWH"):
        bitgrain.open_checkpoint(write_module(tmp_path, tensors, {**PARAMS[2], "rescale_WH": True})).dequantize("layer.weight")


def test_codes_of_another_codebook_are_refused(tmp_path):
    tensors, _ = make(2, 32, 64)
    with pytest.raises(LabelMismatchError, match="codebook_id"):
        bitgrain.open_checkpoint(write_module(tmp_path / "id", tensors | {"codebook_id": torch.tensor(17)}, PARAMS[2])).dequantize("layer.weight")
    with pytest.raises(ShapeMismatchError, match="Qidxs"):
        bitgrain.open_checkpoint(write_module(tmp_path / "width", tensors, PARAMS[4]))


@pytest.mark.parametrize("extra", ["scaleWH", "A", "weight", "fuse_scale"])
def test_tensors_that_the_configuration_does_not_explain_are_refused(tmp_path, extra):
    tensors, _ = make(2, 32, 64)
    with pytest.raises(UnexpectedTensorError, match=extra):
        bitgrain.open_checkpoint(write_module(tmp_path, tensors | {extra: torch.ones(64)}, PARAMS[2]))


def test_scale_wh_that_the_configuration_promises_must_be_there(tmp_path):
    tensors, _ = make(2, 32, 64)
    with pytest.raises(MissingTensorError, match="scaleWH"):
        bitgrain.open_checkpoint(write_module(tmp_path, tensors, {**PARAMS[2], "rescale_WH": True}))


@pytest.mark.parametrize(("n", "k"), [(24, 64), (16, 96), (16, 320 * 9)])
def test_sizes_without_blocks_or_transforms_are_refused_from_headers(tmp_path, n, k):
    tensors = {"Qidxs": torch.zeros(n, k // 32, dtype=torch.int64), "SU": torch.ones(k), "SV": torch.ones(n), "Wscale": torch.tensor(1.0), "codebook_id": torch.tensor(7)}
    with pytest.raises(ShapeMismatchError, match=r"layer\.Qidxs"):
        bitgrain.open_checkpoint(write_module(tmp_path, tensors, PARAMS[2]))


def test_codes_without_a_section_are_refused_by_the_sections_name(tmp_path):
    with pytest.raises(ConfigError, match="quip_params"):
        bitgrain.open_checkpoint(write_module(tmp_path, make(2, 32, 64)[0], None))


# --- a whole model, stored as the producer stores it ------------------------------------------------------------------
INTERMEDIATE = 192
JOINED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.upgate_proj": ("up_proj", "gate_proj")}


def fused_model(folder, bits):
    """(quantized, dense) Llamas: q, k, v and up, gate each one module, the last layer's down_proj left dense by skip_list."""
    shapes, quantized, dense = joint_shapes(INTERMEDIATE), {}, {}
    skipped = f"model.layers.{LAYERS - 1}.mlp.down_proj"
    for layer in range(LAYERS):
        for name in (*JOINED, "self_attn.o_proj", "mlp.down_proj"):
            group, _, _ = name.rpartition(".")
            parts = [f"{group}.{p}" for p in JOINED.get(name, ())] or [name]
            heights, k = [shapes[p][0] for p in parts], shapes[parts[0]][1]
            tensors, values = make(bits, sum(heights), k, seed=len(quantized), fused=len(parts) if name in JOINED else 0)
            scale = tensors.get("fuse_scales", torch.ones(1)).repeat_interleave(torch.tensor(heights))
            weight = dense_weight(values, tensors["SU"], tensors["SV"].float() * scale)
            full = f"model.layers.{layer}"
            if f"{full}.{name}" == skipped:
                quantized[f"{skipped}.weight"] = weight.float()
            else:
                quantized |= {f"{full}.{name}.{local}": t for local, t in tensors.items()}
            dense |= {f"{full}.{p}.weight": w for p, w in zip(parts, weight.split(heights), strict=True)}
    return write_pair(folder, INTERMEDIATE, {**PARAMS[bits], "skip_list": [f"{LAYERS - 1}_down"], "model_version": 1}, quantized, dense)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return fused_model(tmp_path_factory.mktemp("quip"), 2)


def test_model_of_fused_modules_computes_as_its_dense_equal(models):
    ids = torch.arange(3, 15)
    quantized, dense = (bitgrain.load_model(folder, device="cpu", dtype="float32") for folder in models)
    torch.testing.assert_close(quantized.logits(ids), dense.logits(ids), rtol=1e-3, atol=1e-4)
    again = bitgrain.load_model(models[0], device="cpu", dtype="float32", activations="none")
    assert torch.equal(again.logits(ids), quantized.logits(ids))


def test_model_of_fused_modules_generates(models):
    llm = bitgrain.LLM(models[0], device="cpu", dtype="float32")
    tokens = llm.generate([[3, 4, 5]], bitgrain.SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0))
    assert len(tokens[0].token_ids) == 4


def test_plan_says_what_is_stored_as_one(models):
    plan = bitgrain.open_checkpoint(models[0]).plan
    row = plan.modules["model.layers.0.self_attn.qkv_proj"]
    assert row.shape == (128, 64) and "skip_list '1_down'" in plan.modules["model.layers.1.mlp.down_proj"].why
    assert [name.rpartition("layers.0.")[2] for name in plan.modules if "layers.0." in name and "_proj" in name] == [
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.upgate_proj", "mlp.down_proj",
    ]  # fmt: skip
    fusion = next(f for f in plan.fusions if f.modules[0] == "model.layers.0.mlp.gate_proj")
    assert fusion.fused and fusion.joint == "model.layers.0.mlp.upgate_proj" and fusion.places == (1, 0)


@pytest.mark.parametrize("damage", ["removed", "longer"])
@pytest.mark.parametrize("name", ["self_attn.qkv_proj.fuse_scales", "mlp.upgate_proj.Qidxs", "self_attn.o_proj.SV", "mlp.down_proj.SU"])
def test_damaged_tensor_of_a_model_is_refused_by_name(models, tmp_path, name, damage):
    full = f"model.layers.0.{name}"
    folder = edited(models[0], tmp_path / "copy")
    change(folder, full, DAMAGES[damage])
    with pytest.raises(BitgrainError, match=full):
        bitgrain.load_model(folder, device="cpu")


def test_parts_beside_the_joint_module_are_refused(models, tmp_path):
    folder = edited(models[0], tmp_path / "copy", lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)}))
    with pytest.raises(BitgrainError, match="qkv_proj"):
        bitgrain.open_checkpoint(folder)


def test_skipped_module_with_codes_is_refused(models, tmp_path):
    folder = edited(models[0], tmp_path / "copy", config=lambda c: c["quip_params"].update(skip_list=["1_down", "0_down"]))
    with pytest.raises(RuleMismatchError, match=r"layers\.0\.mlp\.down_proj"):
        bitgrain.open_checkpoint(folder)


def test_different_fuse_scales_need_an_architecture(tmp_path):
    tensors, values = make(2, 32, 64, fused=2)
    with pytest.raises(LabelMismatchError, match="fuse_scales"):
        bitgrain.open_checkpoint(write_module(tmp_path / "two", tensors, PARAMS[2])).effective_weight("layer.weight")
    tensors["fuse_scales"] = torch.tensor([2.0, 2.0])
    got = bitgrain.open_checkpoint(write_module(tmp_path / "one", tensors, PARAMS[2])).effective_weight("layer.weight")
    torch.testing.assert_close(got, dense_weight(values, tensors["SU"], 2 * tensors["SV"].float()).float(), rtol=1e-4, atol=1e-5)
