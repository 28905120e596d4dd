"""QTIP checkpoints: golden modules of the producer, every decoder and storage order by a naive decoder, damage, and a whole model."""

import numpy as np
import pytest
import torch

import bitgrain
from bitgrain.errors import (
    BadValueError,
    BitgrainError,
    ConfigError,
    LabelMismatchError,
    MissingTensorError,
    RuleMismatchError,
    ShapeMismatchError,
    ShardError,
)
from bitgrain.formats.evidence import Evidence
from bitgrain.formats.qtip import QtipConfig
from bitgrain.weights.synthetic import sample_weight
from bitgrain.weights.trellis import trellis_spec
from tests.checkpoints import LAYERS, edited
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.incoherent_models import DAMAGES, NOT_A_NUMBER, change, dense_weight, joint_shapes, signs, write_module, write_pair
from tests.unit.formats.synthetic import header

HYBRID = {"L": 16, "K": 2, "V": 2, "tlut_bits": 9, "decode_mode": "quantlut_sym", "td_x": 16, "td_y": 16}
PLAIN = {"L": 16, "K": 2, "V": 1, "tlut_bits": 0, "decode_mode": "3inst", "td_x": 16, "td_y": 16}


def settings(mode, window, bits, step, table=0, **more):
    return {"L": window, "K": bits, "V": step, "tlut_bits": table, "decode_mode": mode, "td_x": 16, "td_y": 16, **more}


def test_golden_modules_have_the_producers_values():
    folders = golden_folders("qtip")
    assert [check_golden(folder) for folder in folders] == [2, 2, 2, 2]


# --- a reader of its own: bit by bit, tile by tile ------------------------------------------------------------------
def naive_value(mode, state, table, size):
    """The V values of one window."""
    if mode in ("1mad", "2mad"):
        x = (state * 34038481 + 76625530) % 2**32
        if mode == "2mad":
            x = (state * 264435761 + 1013904223) % 2**32
            x = ((x * 1664525 >> 32) + x) % 2**32
        return [np.float32(sum(x.to_bytes(4, "little")) - 510) / np.float32(147.800537109375)]
    if mode == "3inst":
        x = ((state * 89226354 + 64248484) % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
        low, high = np.frombuffer(x.to_bytes(4, "little"), dtype="<f2")
        return [np.float16(low + high)]
    if mode == "lut":
        return table[state].tolist()
    z = state * (state + 1)
    if mode == "quantlut":
        return table[(z >> 16 - size) % (1 << size)].tolist()
    first, *rest = table[(z >> 15 - size) % (1 << size)].tolist()
    return [-first if z >> 15 & 1 else first, *rest]


def naive_tile(bit_text, params, table):
    """256 values of a circular text of bits, in the order of the stream."""
    window, advance = params["L"], params["K"] * params["V"]
    twice, values = bit_text + bit_text, []
    for start in range(0, len(bit_text), advance):
        values += naive_value(params["decode_mode"], int(twice[start : start + window], 2), table, params["tlut_bits"])
    return values


def for_kernel(params):
    return params["decode_mode"] == "quantlut_sym" and params["L"] == 16 and params["V"] == 2 and params["K"] in (2, 3, 4) and params["tlut_bits"] == 9


def bit_texts(words, params, n, k):
    """The bits of every tile, tiles row-major, from the stored words."""
    bits = params["K"]
    if not for_kernel(params):
        return ["".join(f"{int(w) & 0xFFFF:016b}" for w in row) for row in words]
    stored = iter(words.contiguous().view(torch.uint8).flatten().tolist())
    tiles = {}
    for big_row in range(n // 32):
        for big_column in range(k // 32):
            for _ in range(32):
                for column in range(2):
                    for row in range(2):
                        piece = [next(stored) for _ in range(bits)]
                        at = (2 * big_row + row, 2 * big_column + column)
                        tiles[at] = tiles.get(at, "") + "".join(f"{byte:08b}" for byte in reversed(piece))
    return [tiles[r, c] for r in range(n // 16) for c in range(k // 16)]


def place(p, params):
    """(row, column) of value p of a tile."""
    if not for_kernel(params):
        return divmod(p, 16)
    return 8 * (p >> 1 & 1) + (p >> 5), 8 * (p >> 2 & 1) + 2 * (p >> 3 & 3) + (p & 1)


def make(params, n, k, seed=0, rcp=0, tp_rank=8, dtype=torch.float16):
    """(tensors, decoded codes) of a random module."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(-(1 << 15), 1 << 15, (n * k // 256, 16 * params["K"]), generator=g).to(torch.int16)
    tensors = {
        "trellis": words,
        "SU": signs(k, g).to(dtype),
        "SV": signs(n, g) * (torch.rand(n, generator=g) + 0.5) / k**0.5,
        "rcp": torch.tensor(rcp),
        "tp_rank": torch.tensor(tp_rank),
    }
    if params["decode_mode"] in ("lut", "quantlut", "quantlut_sym"):
        tensors["tlut"] = torch.randn(1 << params["tlut_bits"], params["V"], generator=g).half()
    values = torch.empty(n, k)
    for tile, text in enumerate(bit_texts(words, params, n, k)):
        high, wide = divmod(tile, k // 16)
        for p, value in enumerate(naive_tile(text, params, tensors.get("tlut"))):
            row, column = place(p, params)
            values[16 * high + row, 16 * wide + column] = float(value)
    return tensors, values


CASES = [
    settings("1mad", 16, 3, 1), settings("2mad", 16, 4, 1), settings("3inst", 16, 2, 1), settings("3inst", 12, 5, 1), settings("2mad", 14, 1, 1),
    settings("lut", 10, 2, 2, 10), settings("lut", 6, 3, 1, 6), settings("quantlut", 16, 2, 2, 9), settings("quantlut", 16, 3, 1, 7),
    settings("quantlut_sym", 16, 2, 2, 9), settings("quantlut_sym", 16, 3, 2, 9), settings("quantlut_sym", 16, 4, 2, 9),
    # one setting away from the kernel's: the plain order
    settings("quantlut_sym", 16, 5, 2, 9), settings("quantlut_sym", 16, 1, 2, 9), settings("quantlut_sym", 16, 2, 2, 8), settings("quantlut_sym", 15, 2, 2, 9),
    settings("quantlut_sym", 16, 2, 1, 9),
]  # fmt: skip


@pytest.mark.parametrize("params", CASES, ids=lambda p: "-".join(str(p[key]) for key in ("decode_mode", "L", "K", "V", "tlut_bits")))
def test_every_decoder_and_order_decodes_as_the_naive_decoder_does(tmp_path, params):
    tensors, values = make(params, 96, 64, seed=params["K"])
    checkpoint = bitgrain.open_checkpoint(write_module(tmp_path, tensors, params))
    assert torch.equal(checkpoint.dequantize("layer.weight"), values)
    want = dense_weight(values, tensors["SU"], tensors["SV"])
    torch.testing.assert_close(checkpoint.effective_weight("layer.weight"), want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rcp", "on_input", "on_output"), [(0, 1, 1), (1, 4, 1), (2, 1, 4)])
@pytest.mark.parametrize("split", [None, "said"])
def test_transforms_work_in_the_blocks_of_tensor_parallel_writers(tmp_path, rcp, on_input, on_output, split):
    params = PLAIN if split is None else {**PLAIN, "split_for_tp": rcp != 0}
    tensors, values = make(params, 192, 128, rcp=rcp, tp_rank=4)
    got = bitgrain.open_checkpoint(write_module(tmp_path, tensors, params)).effective_weight("layer.weight")
    want = dense_weight(values, tensors["SU"], tensors["SV"], on_input, on_output)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


def test_writers_before_slices_store_neither_of_their_tensors(tmp_path):
    tensors, values = make(PLAIN, 32, 64)
    del tensors["rcp"], tensors["tp_rank"]
    checkpoint = bitgrain.open_checkpoint(write_module(tmp_path / "old", tensors, PLAIN))
    assert torch.equal(checkpoint.dequantize("layer.weight"), values)
    with pytest.raises(BitgrainError, match="rcp"):
        bitgrain.open_checkpoint(write_module(tmp_path / "new", tensors, {**PLAIN, "split_for_tp": False}))


def test_v_proj_may_have_a_width_of_its_own(tmp_path):
    params = {**HYBRID, "K_v_proj": 4}
    tensors, values = make({**params, "K": 4}, 32, 64)
    folder = write_module(tmp_path, tensors, params)
    with pytest.raises(ShapeMismatchError, match="trellis"):
        bitgrain.open_checkpoint(folder)
    renamed = edited(folder, tmp_path / "v", lambda held: held.update({n.replace("layer.", "a.v_proj."): held.pop(n) for n in list(held)}))
    assert torch.equal(bitgrain.open_checkpoint(renamed).dequantize("a.v_proj.weight"), values)


# --- the canonical weight -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", [trellis_spec(3, "1mad", 16, 1), trellis_spec(2, "quantlut_sym", 16, 2, 9, "fragments")], ids=["rows", "fragments"])
def test_trellis_weight_is_cut_at_tiles_only(spec):
    weight = sample_weight(spec, 64, 48, seed=1)
    whole = weight.dequantize()
    assert torch.equal(weight.rows(16, 48).dequantize(), whole[16:48]) and torch.equal(weight.columns(32, 48).dequantize(), whole[:, 32:])
    assert torch.equal(weight.gather_rows(torch.tensor([63, 0, 17, 17])), whole[[63, 0, 17, 17]])
    for cut in (lambda: weight.rows(8, 64), lambda: weight.columns(0, 40), lambda: weight.columns(16, 16)):
        with pytest.raises(ShardError):
            cut()


def test_trellis_weights_of_different_tables_stay_apart():
    spec = trellis_spec(2, "lut", 8, 1, 8)
    with pytest.raises(ShardError, match="tables"):
        type(sample_weight(spec, 16, 16)).concat([sample_weight(spec, 16, 16, seed) for seed in (0, 1)])


def test_a_matrix_of_several_chunks_decodes_as_its_parts(monkeypatch):
    weight = sample_weight(trellis_spec(2, "3inst", 16, 1), 80, 64)
    whole = weight.dequantize()
    monkeypatch.setattr("bitgrain.weights.trellis.CHUNK", 2 * 16 * 64)
    assert torch.equal(weight.dequantize(), whole)


# --- configuration --------------------------------------------------------------------------------------------------
def evidence(params, tensors=None):
    headers = {name: header(name, t) for name, t in (tensors or {}).items()}
    return Evidence({} if params is None else {"quip_params": params}, None, {}, headers, {n.rpartition(".")[2]: n for n in headers})


def test_detection_needs_the_settings_of_a_trellis_or_names():
    assert QtipConfig.detect(evidence(HYBRID)).score == 100
    assert QtipConfig.detect(evidence({"codebook": "E8P12"})) is None
    named = {"a.trellis": torch.zeros(2, 32), "a.SU": torch.zeros(16), "a.SV": torch.zeros(16)}
    assert QtipConfig.detect(evidence(None, named)).score == 50
    # another format has three-dimensional tensors of this name
    assert QtipConfig.detect(evidence(None, named | {"a.trellis": torch.zeros(2, 1, 32)})) is None


@pytest.mark.parametrize(
    ("change_of", "named"),
    [
        ({"L": None}, "L"), ({"L": 40}, "L"), ({"K": None}, "K"), ({"K": 9}, "K"), ({"K": 2.5}, "K"), ({"V": 3}, "V"), ({"V": None}, "V"),
        ({"decode_mode": "4inst"}, "decode_mode"), ({"decode_mode": None}, "decode_mode"), ({"tlut_bits": 0}, "tlut_bits"), ({"tlut_bits": 16}, "tlut_bits"),
        ({"decode_mode": "lut"}, "tlut_bits"), ({"decode_mode": "1mad"}, "V"), ({"td_x": 8}, "td_x"), ({"td_y": 32}, "td_y"), ({"L": 3}, "L"),
        ({"K_v_proj": 0}, "K_v_proj"), ({"split_for_tp": 1}, "split_for_tp"), ({"skip_list": ["q_3"]}, "skip_list"), ({"tlutbits": 9}, "tlut_bits"),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(change_of, named):
    with pytest.raises(BitgrainError, match=rf"quip_params\.{named}\b|nearest known: {named}"):
        QtipConfig.parse(evidence({**HYBRID, **change_of}))


def test_settings_that_the_writer_saves_beside_are_known():
    parsed = QtipConfig.parse(evidence({**HYBRID, "codebook": "bitshift", "codebook_version": 0, "split_for_tp": False, "skip_list": None}))
    assert parsed.bits == parsed.v_bits == 2 and parsed.split is False and parsed.skipped == ()


# --- damage ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["trellis", "SU", "SV", "tlut", "rcp", "tp_rank"])
def test_damaged_tensor_is_refused_by_name(tmp_path, name, damage):
    tensors, _ = make(HYBRID, 64, 64)
    folder = write_module(tmp_path, tensors, HYBRID)
    bitgrain.open_checkpoint(folder).dequantize("layer.weight")
    change(folder, f"layer.{name}", DAMAGES[damage])
    with pytest.raises(BitgrainError, match=name):
        bitgrain.open_checkpoint(folder).dequantize("layer.weight")


@pytest.mark.parametrize(("name", "damage"), [("SU", "NaN"), ("SU", "zero"), ("SV", "NaN"), ("SV", "zero"), ("tlut", "NaN")])
def test_impossible_values_are_refused_by_name(tmp_path, name, damage):
    tensors, _ = make(HYBRID, 32, 32)
    tensors[name] = NOT_A_NUMBER[damage](tensors[name])
    with pytest.raises(BadValueError, match=f"layer.{name}"):
        bitgrain.open_checkpoint(write_module(tmp_path, tensors, HYBRID)).dequantize("layer.weight")


@pytest.mark.parametrize(("rcp", "tp_rank", "named"), [(3, 8, "rcp"), (-1, 8, "rcp"), (1, 0, "tp_rank"), (0, 0, "tp_rank"), (1, 3, "tp_rank"), (2, 128, "tp_rank"), (2, -2, "tp_rank")])
def test_impossible_slices_are_refused_by_name(tmp_path, rcp, tp_rank, named):
    tensors, _ = make(PLAIN, 96, 64, rcp=rcp, tp_rank=tp_rank)
    with pytest.raises(BadValueError, match=f"layer.{named}"):
        bitgrain.open_checkpoint(write_module(tmp_path, tensors, PLAIN)).dequantize("layer.weight")


@pytest.mark.parametrize(("rcp", "split"), [(0, True), (1, False), (2, False)])
def test_slices_must_agree_with_the_configuration(tmp_path, rcp, split):
    tensors, _ = make(PLAIN, 96, 64, rcp=rcp, tp_rank=2)
    with pytest.raises(LabelMismatchError, match="split_for_tp"):
        bitgrain.open_checkpoint(write_module(tmp_path, tensors, {**PLAIN, "split_for_tp": split})).dequantize("layer.weight")


@pytest.mark.parametrize(("params", "n", "k"), [(PLAIN, 24, 64), (HYBRID, 48, 64), (PLAIN, 16, 16 * 9 * 5), (HYBRID, 64, 80)])
def test_sizes_without_tiles_or_transforms_are_refused_from_headers(tmp_path, params, n, k):
    tensors = {"trellis": torch.zeros(n // 16 * (k // 16), 32, dtype=torch.int16), "SU": torch.ones(k), "SV": torch.ones(n), "rcp": torch.tensor(0), "tp_rank": torch.tensor(8)}
    with pytest.raises(ShapeMismatchError, match=r"layer\.trellis"):
        bitgrain.open_checkpoint(write_module(tmp_path, tensors, params))


def test_codes_without_a_section_are_refused_by_the_sections_name(tmp_path):
    with pytest.raises(ConfigError, match="quip_params"):
        bitgrain.open_checkpoint(write_module(tmp_path, make(PLAIN, 32, 64)[0], None))


# --- a whole model --------------------------------------------------------------------------------------------------
INTERMEDIATE = 96


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(quantized, dense) Llamas: the kernel's order, v_proj of four bits, transforms in two blocks, one module skipped."""
    quantized, dense, params = {}, {}, {**HYBRID, "K_v_proj": 4, "split_for_tp": True, "skip_list": ["0_gate"]}
    for layer in range(LAYERS):
        for name, (n, k) in joint_shapes(INTERMEDIATE).items():
            full, on_input = f"model.layers.{layer}.{name}", name.endswith(("o_proj", "down_proj"))
            tensors, values = make({**params, "K": 4 if "v_proj" in name else 2}, n, k, seed=len(quantized), rcp=1 if on_input else 2, tp_rank=2)
            weight = dense_weight(values, tensors["SU"], tensors["SV"], 2 if on_input else 1, 1 if on_input else 2)
            dense[f"{full}.weight"] = weight
            quantized |= {f"{full}.weight": weight.float()} if full.endswith("0.mlp.gate_proj") else {f"{full}.{local}": t for local, t in tensors.items()}
    return write_pair(tmp_path_factory.mktemp("qtip"), INTERMEDIATE, params, quantized, dense)


def test_model_computes_as_its_dense_equal(models):
    ids = torch.arange(3, 15)
    quantized, dense = (bitgrain.load_model(folder, device="cpu", dtype="float32") for folder in models)
    torch.testing.assert_close(quantized.logits(ids), dense.logits(ids), rtol=1e-3, atol=1e-4)


def test_model_generates_and_its_plan_names_the_rule(models):
    llm = bitgrain.LLM(models[0], device="cpu", dtype="float32")
    tokens = llm.generate([[3, 4, 5]], bitgrain.SamplingParams(max_tokens=4, ignore_eos=True, temperature=0.0))
    assert len(tokens[0].token_ids) == 4
    plan = bitgrain.open_checkpoint(models[0]).plan
    assert "skip_list '0_gate'" in plan.modules["model.layers.0.mlp.gate_proj"].why
    assert not any(fusion.fused for fusion in plan.fusions)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["trellis", "tlut", "SV", "rcp"])
def test_damaged_tensor_of_a_model_is_refused_by_name(models, tmp_path, name, damage):
    folder = edited(models[0], tmp_path / "copy")
    change(folder, f"model.layers.1.mlp.down_proj.{name}", DAMAGES[damage])
    with pytest.raises(BitgrainError, match=rf"down_proj\.{name}"):
        bitgrain.load_model(folder, device="cpu")


def test_skipped_module_with_codes_is_refused(models, tmp_path):
    folder = edited(models[0], tmp_path / "copy", config=lambda c: c["quip_params"].update(skip_list=["0_gate", "1_down"]))
    with pytest.raises(RuleMismatchError, match=r"layers\.1\.mlp\.down_proj"):
        bitgrain.open_checkpoint(folder)


def test_module_of_the_wrong_size_for_the_architecture_is_refused(models, tmp_path):
    folder = edited(models[0], tmp_path / "copy", config=lambda c: c.update(intermediate_size=192))
    with pytest.raises(BitgrainError, match=r"mlp\.down_proj\.trellis"):
        bitgrain.open_checkpoint(folder)


def test_missing_table_is_refused_by_name(models, tmp_path):
    folder = edited(models[0], tmp_path / "copy", lambda held: held.pop("model.layers.0.self_attn.q_proj.tlut"))
    with pytest.raises(MissingTensorError, match=r"q_proj\.tlut"):
        bitgrain.open_checkpoint(folder)
