"""AQLM: sums of codebook entries against a naive decoder, settings, layouts, whole models, damage refused by name."""

import pytest
import torch

import bitgrain
from bitgrain.errors import BadValueError, BitgrainError, ConfigError, RuleMismatchError, ShapeMismatchError, ShardError
from bitgrain.formats.aqlm import AqlmConfig
from bitgrain.formats.base import ModuleKind
from bitgrain.formats.detect import detect
from bitgrain.weights import AdditiveCodebookWeight
from tests.checkpoints import edited, linear_shapes, llama_config, llama_tensors, write_checkpoint
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.golden_cases import fixture_cases, problems_of
from tests.unit.formats.synthetic import evidence, view

SECTION = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 8,
           "linear_weights_not_to_quantize": ["lm_head.weight"]}  # fmt: skip
FIRST = "model.layers.0.self_attn.q_proj"
IDS = torch.arange(3, 15)


def section(books=2, bits=8, h=1, g=8, **changes):
    return SECTION | {"num_codebooks": books, "nbits_per_codebook": bits, "out_group_size": h, "in_group_size": g} | changes


def module_tensors(n, k, books=2, bits=8, h=1, g=8, dtype=torch.float16, seed=0):
    """Random tensors of a module as the writer stores them, and its weight by loops over single elements."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 1 << bits, (n // h, k // g, books), generator=generator)
    index[0, 0, 0] = (1 << bits) - 1  # stored as -1
    stored = torch.where(index >= 1 << (bits - 1), index - (1 << bits), index)
    codebooks = torch.randn(books, 1 << bits, h, g, generator=generator).to(dtype)
    scales = (torch.rand(n // h, 1, 1, 1, generator=generator) + 0.1).to(dtype)
    want = torch.zeros(n, k)
    for row in range(n):
        for column in range(k):
            for book in range(books):
                want[row, column] += codebooks[book, index[row // h, column // g, book], row % h, column % g].float()
            want[row, column] *= scales[row // h].float().item()
    return {"codes": stored.to(torch.int8 if bits <= 8 else torch.int16), "codebooks": codebooks, "scales": scales}, want


def parse(settings, tensors=None):
    return AqlmConfig.parse(evidence(settings, tensors))


def decode(config, tensors, shape=None):
    module = view(tensors, shape=shape)
    scheme = config.decide(module).scheme
    assert problems_of(scheme, module) == []
    weight = scheme.to_weight(tensors)
    assert (weight.spec, weight.shape) == (scheme.weight_spec, scheme.shape)
    return weight


@pytest.mark.parametrize("folder", fixture_cases("aqlm"))
def test_fixture_equals_golden(folder):
    assert check_golden(folder) == 2


@pytest.mark.parametrize("folder", golden_folders("aqlm"), ids=lambda f: f.name)
def test_golden_module_equals_golden(folder):
    assert check_golden(folder) == 2


# --- what codes mean -----------------------------------------------------------------------------------------------------
SETTINGS = [
    (1, 16, 1, 8), (2, 8, 1, 8), (4, 8, 2, 8), (2, 12, 1, 8), (1, 16, 1, 16), (8, 4, 1, 8), (3, 7, 4, 2), (1, 1, 1, 1), (1, 9, 3, 5), (1, 15, 1, 8),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("books", "bits", "h", "g"), SETTINGS)
def test_sum_of_entries_equals_naive_decoder(books, bits, h, g, dtype):
    tensors, want = module_tensors(3 * h, 2 * g, books, bits, h, g, dtype)
    weight = decode(parse(section(books, bits, h, g)), tensors)
    assert torch.equal(weight.dequantize(), want)
    index = torch.tensor([3 * h - 1, 0, h])
    assert torch.equal(weight.gather_rows(index), want[index])
    assert torch.equal(weight.effective(), want)


@pytest.mark.parametrize("h", [1, 2])
def test_codes_with_exchanged_dimensions_are_recognized_by_shape(h):
    tensors, want = module_tensors(24, 80, h=h)
    tensors["codes"] = tensors["codes"].transpose(0, 1).contiguous()
    for shape in (None, (24, 80)):
        assert torch.equal(decode(parse(section(h=h)), tensors, shape).dequantize(), want)


def test_only_codes_of_eight_bits_may_have_exchanged_dimensions():
    tensors, _ = module_tensors(24, 80, bits=6)
    tensors["codes"] = tensors["codes"].transpose(0, 1).contiguous()
    module = view(tensors, shape=(24, 80))
    assert problems_of(parse(section(bits=6)).decide(module).scheme, module) == ["shape codes"]


def test_square_grids_of_codes_keep_the_documented_order():
    tensors, want = module_tensors(8, 64)
    assert torch.equal(decode(parse(SECTION), tensors).dequantize(), want)


def test_codes_beyond_their_bits_are_refused():
    tensors, _ = module_tensors(8, 16, bits=12)
    tensors["codes"][3, 1, 0] = 4096
    with pytest.raises(BadValueError, match="codes.*4096"):
        decode(parse(section(bits=12)), tensors)


@pytest.mark.parametrize(("name", "value"), [("codebooks", float("nan")), ("scales", float("inf")), ("codebooks", 0.0), ("scales", 0.0)])
def test_bad_values_are_refused_by_name(name, value):
    tensors, _ = module_tensors(8, 16)
    if value == 0.0:
        tensors[name].zero_()
    else:
        tensors[name].view(-1)[5] = value
    with pytest.raises(BadValueError, match=name):
        decode(parse(SECTION), tensors)


def test_negative_scale_is_read():
    tensors, want = module_tensors(8, 16)
    tensors["scales"][3] *= -1
    want[3] *= -1
    assert torch.equal(decode(parse(SECTION), tensors).dequantize(), want)


@pytest.mark.parametrize("shape", [(15, 64), (16, 60)])
def test_sizes_that_blocks_do_not_divide_are_refused(shape):
    tensors, _ = module_tensors(16, 64, h=2)
    with pytest.raises(ShapeMismatchError, match="out_group_size 2"):
        parse(section(h=2)).decide(view(tensors, shape=shape))


# --- the canonical weight ------------------------------------------------------------------------------------------------
def test_parts_of_a_weight_are_exact_at_whole_blocks_only():
    tensors, want = module_tensors(12, 40, h=2)
    weight = decode(parse(section(h=2)), tensors)
    assert torch.equal(weight.rows(4, 10).dequantize(), want[4:10])
    assert torch.equal(weight.columns(8, 32).dequantize(), want[:, 8:32])
    assert torch.equal(AdditiveCodebookWeight.concat([weight.rows(0, 4), weight.rows(4, 12)]).dequantize(), want)
    assert torch.equal(weight.shard(0, 1, 3).dequantize(), want[4:8])
    for cut in (lambda: weight.rows(1, 4), lambda: weight.columns(0, 20), lambda: weight.shard(0, 0, 4)):
        with pytest.raises(ShardError, match="multiples"):
            cut()


def test_weights_with_codebooks_of_their_own_cannot_be_stacked():
    parts = [decode(parse(SECTION), module_tensors(8, 16, seed=seed)[0]) for seed in (0, 1)]
    with pytest.raises(ShardError, match="codebooks"):
        AdditiveCodebookWeight.concat(parts)


# --- configuration -------------------------------------------------------------------------------------------------------
def test_absent_settings_are_the_writers_defaults():
    books = parse({"quant_method": "aqlm"}).books
    assert (books.count, books.code_bits, books.block) == (1, 16, (1, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"nbits_per_codebook": 17}, "nbits_per_codebook"), ({"num_codebooks": 0}, "num_codebooks"), ({"in_group_size": "8"}, "in_group_size"),
     ({"out_group_size": -1}, "out_group_size"), ({"nbits_per_codebok": 8}, "nearest known: nbits_per_codebook"),
     ({"linear_weights_not_to_quantize": [None]}, "linear_weights_not_to_quantize")],
)  # fmt: skip
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(BitgrainError, match=message):
        parse(SECTION | change)


def test_first_published_section_and_bare_tensors_are_recognized():
    tensors, want = module_tensors(8, 16, bits=5)
    named = {f"{FIRST}.{local}": tensor for local, tensor in tensors.items()}
    bare = evidence(None, named)
    assert detect(bare)[0] is AqlmConfig
    assert torch.equal(decode(AqlmConfig.parse(bare), tensors).dequantize(), want)
    bare.config["aqlm"] = {k: v for k, v in section(bits=5).items() if k != "quant_method"}
    assert detect(bare)[1].score == 100
    assert torch.equal(decode(AqlmConfig.parse(bare), tensors).dequantize(), want)


@pytest.mark.parametrize("rule", [FIRST, f"{FIRST}.weight"])
def test_excluded_module_with_codes_is_refused_unless_trusted(rule):
    tensors, want = module_tensors(8, 16)
    config = parse(SECTION | {"linear_weights_not_to_quantize": [rule]})
    with pytest.raises(RuleMismatchError, match=FIRST):
        config.decide(view(tensors, FIRST))
    config.trust_tensors = True
    assert torch.equal(config.decide(view(tensors, FIRST)).scheme.to_weight(tensors).dequantize(), want)


def test_rules_match_whole_segments_and_embeddings_stay_dense():
    config = parse(SECTION | {"linear_weights_not_to_quantize": ["model.layers.0.mlp.gate.weight"]})
    dense = {"weight": torch.ones(8, 16, dtype=torch.bfloat16)}
    assert config.rule_for(view(dense, "model.layers.0.mlp.gate"))[0] is False
    assert config.rule_for(view(dense, "model.layers.0.mlp.gate_proj"))[0] is True
    assert config.rule_for(view(dense, "model.embed_tokens", ModuleKind.EMBEDDING))[0] is False


def test_rules_that_name_norms_are_not_reported_as_unmatched():
    named = {"model.norm.weight": torch.ones(8), "lm_head.weight": torch.ones(8, 8)}
    config = parse(SECTION | {"linear_weights_not_to_quantize": list(named)}, named)
    assert list(config.rules()) == ["lm_head.weight"]


# --- whole models --------------------------------------------------------------------------------------------------------
def row_module(n, k, books=2, bits=8, seed=0):
    """(tensors, weight) of a module of any size whose codes stand for parts of one row."""
    parts, _ = module_tensors(1, 8, books, bits, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 1 << bits, (n, k // 8, books), generator=generator)
    parts["codes"] = torch.where(index >= 1 << (bits - 1), index - (1 << bits), index).to(parts["codes"].dtype)
    parts["scales"] = (torch.rand(n, 1, 1, 1, generator=generator) * 0.1).half()
    entries = sum(parts["codebooks"][book, index[:, :, book], 0].float() for book in range(books))
    return parts, entries.reshape(n, k) * parts["scales"].float().reshape(-1, 1)


def quantized(tensors, books=2, bits=8):
    """(checkpoint tensors, dense tensors): every linear module replaced by random codes and by what they mean."""
    dense, stored = dict(tensors), dict(tensors)
    for seed, (name, (n, k)) in enumerate(linear_shapes().items()):
        parts, dense[f"{name}.weight"] = row_module(n, k, books, bits, seed)
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{local}": tensor for local, tensor in parts.items()}
    return stored, dense


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aqlm")
    stored, dense = quantized(llama_tensors(dtype=torch.float32))
    write_checkpoint(folder / "dense", dense, llama_config())
    return write_checkpoint(folder / "codes", stored, llama_config(quantization_config=SECTION))


def test_llama_of_codes_gives_the_logits_of_its_dense_weights(llama):
    got = bitgrain.load_model(llama, device="cpu", dtype=torch.float32).logits(IDS)
    want = bitgrain.load_model(llama.parent / "dense", device="cpu", dtype=torch.float32).logits(IDS)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    fusions = bitgrain.open_checkpoint(llama).plan.fusions
    assert fusions and all(not f.fused and "codebooks" in f.why for f in fusions)


def change(name, edit):
    def apply(tensors):
        tensors[f"{FIRST}.{name}"] = edit(tensors[f"{FIRST}.{name}"]).contiguous()

    return apply


def drop(name):
    return lambda tensors: tensors.pop(f"{FIRST}.{name}")


def add(name, tensor):
    return lambda tensors: tensors.update({f"{FIRST}.{name}": tensor})


DAMAGE = {
    **{f"without-{name}": (drop(name), name) for name in ("codes", "codebooks", "scales")},
    "row-of-codes-missing": (change("codes", lambda t: t[:-1]), "codes"),
    "column-of-codes-missing": (change("codes", lambda t: t[:, :-1]), "codes"),
    "code-of-a-book-missing": (change("codes", lambda t: t[:, :, :1]), "codes"),
    "wider-codes": (change("codes", lambda t: t.to(torch.int16)), "codes"),
    "codes-as-float": (change("codes", lambda t: t.half()), "codes"),
    "scale-missing": (change("scales", lambda t: t[:-1]), "scales"),
    "scales-flat": (change("scales", lambda t: t.reshape(-1)), "scales"),
    "scales-nan": (change("scales", lambda t: t * float("nan")), "scales"),
    "scales-zero": (change("scales", lambda t: t * 0), "scales"),
    "book-missing": (change("codebooks", lambda t: t[:1]), "codebooks"),
    "entries-missing": (change("codebooks", lambda t: t[:, :128]), "codebooks"),
    "wider-entries": (change("codebooks", lambda t: t.reshape(2, 128, 1, 16)), "codebooks"),
    "codebooks-nan": (change("codebooks", lambda t: t * float("nan")), "codebooks"),
    "codebooks-zero": (change("codebooks", lambda t: t * 0), "codebooks"),
    "extra": (add("rotation", torch.ones(4)), "rotation"),
    "dense-beside": (add("weight", torch.ones(64, 64)), "weight"),
    "short-bias": (add("bias", torch.ones(63)), "bias"),
    "bias-nan": (add("bias", torch.full((64,), float("nan"))), "bias"),
}


@pytest.mark.parametrize(("damage", "name"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_tensor_is_refused_by_name(llama, tmp_path, damage, name):
    with pytest.raises(BitgrainError, match=rf"q_proj\.{name}\b"):
        bitgrain.load_model(edited(llama, tmp_path / "damaged", damage), device="cpu")


@pytest.mark.parametrize(("key", "value"), [("in_group_size", 16), ("num_codebooks", 1), ("nbits_per_codebook", 7), ("out_group_size", 2)])
def test_settings_that_contradict_the_tensors_are_refused(llama, tmp_path, key, value):
    with pytest.raises(BitgrainError, match="codebooks"):
        bitgrain.load_model(
            edited(llama, tmp_path / "damaged", config=lambda c: c["quantization_config"].update({key: value})), device="cpu"
        )


def test_missing_configuration_error_is_a_config_error():
    with pytest.raises(ConfigError, match="num_codebooks"):
        parse(SECTION | {"num_codebooks": "two"})
