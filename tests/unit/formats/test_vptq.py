"""VPTQ: vectors of rows against a naive decoder, storage of indices, settings, whole models, damage refused by name."""

import pytest
import torch

import bitgrain
from bitgrain.errors import BadValueError, BitgrainError, ConfigError, RuleMismatchError, ShardError
from bitgrain.formats.base import ModuleKind
from bitgrain.formats.detect import detect
from bitgrain.formats.vptq import VptqConfig
from bitgrain.formats.vptq.schemes import unpack_items
from bitgrain.weights import VectorCodebookWeight
from tests.checkpoints import edited, linear_shapes, llama_config, llama_tensors, write_checkpoint
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.golden_cases import fixture_cases, problems_of
from tests.unit.formats.synthetic import NAME, evidence, view

IDS = torch.arange(3, 15)


def settings(n, k, v=8, entries=256, residual=-1, groups=1, outlier=(-1, -1, 0), packed=True, norm=True, perm=True, bias=False, **changes):
    """Settings of a module as the writer spells them; outlier = (rows per vector, entries, columns)."""
    return {
        "in_features": k, "out_features": n, "vector_lens": [outlier[0], v], "num_centroids": [outlier[1], entries],
        "num_res_centroids": [-1, residual], "group_num": groups, "group_size": (k - outlier[2]) // groups, "outlier_size": outlier[2],
        "indices_as_float": False, "enable_norm": norm, "enable_perm": perm, "is_indice_packed": packed, "bias": bias, "vector_quant_dim": "out",
        **changes,
    }  # fmt: skip


def pack(main, residual, bits, more):
    """int32 words of the items of each row, made one bit at a time."""
    rows = []
    for row, second in zip(main.reshape(-1, main.shape[-1]).tolist(), residual.reshape(-1, main.shape[-1]).tolist(), strict=True):
        stream = sum((a | b << bits) << (place * (bits + more)) for place, (a, b) in enumerate(zip(row, second, strict=True)))
        count = -(-len(row) * (bits + more) // 32)
        words = [stream >> (32 * i) & 0xFFFFFFFF for i in range(count)]
        rows.append([w - (1 << 32) if w >= 1 << 31 else w for w in words])
    return torch.tensor(rows, dtype=torch.int32).view(*main.shape[:-1], -1)


def as_words(index, dtype=torch.int16):
    return index.to(torch.uint16).view(dtype)


def module_tensors(cfg, seed=0, dtype=torch.float16, words=torch.int16, size_of_scale=1.0):
    """(tensors as the writer stores them, the weight by loops over rows and groups)."""
    draw = torch.Generator().manual_seed(seed)
    n, k, groups, size, outliers = (cfg[key] for key in ("out_features", "in_features", "group_num", "group_size", "outlier_size"))
    (u, v), (few, entries), residual = cfg["vector_lens"], cfg["num_centroids"], cfg["num_res_centroids"][1]
    main = torch.randint(0, entries, (groups, -(-n // v), size), generator=draw)
    second = torch.randint(0, max(residual, 1), main.shape, generator=draw)
    main[0, 0, 0] = entries - 1
    books = torch.randn(groups, entries, v, generator=draw).to(dtype)
    more = (torch.randn(groups, max(residual, 1), v, generator=draw) / 8).to(dtype)
    tensors = {"centroids.weight": books.reshape(groups, -1)}
    if cfg["is_indice_packed"]:
        tensors["indices"] = pack(main, second, entries.bit_length() - 1, residual.bit_length() - 1 if residual > 0 else 0)
    else:
        tensors["indices"] = as_words(main, words)
    if residual > 0:
        tensors["res_centroids.weight"] = more.reshape(groups, -1)
        if not cfg["is_indice_packed"]:
            tensors["res_indices"] = as_words(second, words)
    stored = torch.zeros(n, k)
    for row in range(n):
        for group in range(groups):
            value = books[group, main[group, row // v], row % v].float()
            if residual > 0:
                value = value + more[group, second[group, row // v], row % v].float()
            stored[row, outliers + group * size : outliers + (group + 1) * size] = value
    if u > 1:
        book = torch.randn(few, u, generator=draw).to(dtype)
        index = torch.randint(0, few, (1, -(-n // u), outliers), generator=draw)
        tensors |= {"outlier_centroids.weight": book.reshape(1, -1), "outlier_indices": as_words(index, words)}
        for row in range(n):
            stored[row, :outliers] = book[index[0, row // u], row % u].float()
    want = stored
    if cfg["enable_perm"]:
        perm = torch.randperm(k, generator=draw)
        tensors["perm"] = as_words(perm) if cfg["is_indice_packed"] else perm
        want = torch.empty_like(stored)
        for place, column in enumerate(perm.tolist()):
            want[:, column] = stored[:, place]
    if cfg["enable_norm"]:
        tensors["weight_scale"] = ((torch.rand(k, generator=draw) + 0.5) * size_of_scale).to(dtype)
        tensors["weight_bias"] = (torch.randn(k, generator=draw) * 0.1 * size_of_scale).to(dtype)
        want = want * tensors["weight_scale"].float() + tensors["weight_bias"].float()
    if cfg["bias"]:
        tensors["bias"] = torch.randn(n, generator=draw).to(dtype)
    return tensors, want


def parse(layers, shared=None, **more):
    return VptqConfig.parse(evidence({"quant_method": "vptq", "config_for_layers": layers, "shared_layer_config": shared or {}, **more}))


def decode(cfg, tensors, shape=None):
    module = view(tensors, shape=shape)
    scheme = parse({NAME: cfg}).decide(module).scheme
    assert problems_of(scheme, module) == []
    weight = scheme.to_weight(tensors)
    assert (weight.spec, weight.shape) == (scheme.weight_spec, scheme.shape)
    return weight


@pytest.mark.parametrize("folder", fixture_cases("vptq"))
def test_fixture_equals_golden(folder):
    assert check_golden(folder) == 1


@pytest.mark.parametrize("folder", golden_folders("vptq"), ids=lambda f: f.name)
def test_golden_module_equals_golden(folder):
    assert check_golden(folder) == 1


# --- what codes mean -----------------------------------------------------------------------------------------------------
CASES = {
    "packed": settings(24, 32),
    "residual": settings(24, 32, entries=4096, residual=256),
    "32-bit items": settings(16, 24, 4, 65536, 65536),
    "more bits in the residual": settings(16, 40, 8, 16, 128),
    "rows that end inside a vector": settings(20, 32, 6, 512, 64),
    "fewer rows than a vector": settings(5, 16, 8, 64, 4),
    "groups": settings(16, 36, groups=3, residual=16),
    "outliers": settings(22, 40, residual=16, outlier=(4, 64, 8)),
    "outliers and groups": settings(22, 40, residual=16, groups=2, outlier=(6, 300, 8)),
    "outlier codebook without columns": settings(16, 24, outlier=(4, 64, 0)),
    "not packed": settings(24, 32, packed=False),
    "not packed, residual, outliers": settings(22, 40, entries=700, residual=500, outlier=(4, 65, 8), packed=False),
    "no permutation": settings(24, 32, perm=False, outlier=(4, 64, 8)),
    "no scale": settings(24, 32, norm=False),
    "only codes": settings(24, 32, norm=False, perm=False, bias=True),
    "one row per vector": settings(7, 24, 1, 16),
    "width not a multiple of words": settings(16, 13, 8, 32),
}


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_vectors_equal_naive_decoder(cfg):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensors, want = module_tensors(cfg, dtype=dtype)
        weight = decode(cfg, tensors)
        assert torch.equal(weight.dequantize(), want)
        assert torch.equal(weight.effective(), want)
        index = torch.tensor([want.shape[0] - 1, 0, 3])
        assert torch.equal(weight.gather_rows(index), want[index])


@pytest.mark.parametrize("words", [torch.int16, torch.uint16, torch.float16])
def test_unpacked_indices_are_unsigned_whatever_they_are_called(words):
    cfg = settings(8, 24, 4, 65536, 65536, outlier=(4, 65536, 8), packed=False, indices_as_float=words == torch.float16)
    tensors, want = module_tensors(cfg, words=words)
    assert torch.equal(decode(cfg, tensors).dequantize(), want)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.int64, torch.int32])
@pytest.mark.parametrize("packed", [True, False])
def test_permutation_is_read_from_every_type(dtype, packed):
    cfg = settings(8, 40, packed=packed)
    tensors, want = module_tensors(cfg)
    perm = tensors["perm"].long() & 0xFFFF
    tensors["perm"] = perm.to(dtype)
    assert torch.equal(decode(cfg, tensors).dequantize(), want)


def test_absent_settings_follow_from_the_tensors():
    for cfg in (settings(16, 24), settings(16, 24, packed=False, norm=False, perm=False)):
        tensors, want = module_tensors(cfg)
        short = {key: cfg[key] for key in ("vector_lens", "num_centroids")}
        assert torch.equal(decode(short, tensors, want.shape).dequantize(), want)


def test_items_behind_the_last_one_must_be_zero():
    cfg = settings(16, 13, 8, 32, residual=4)
    tensors, _ = module_tensors(cfg)
    tensors["indices"][0, 0, -1] |= -(1 << 31)
    with pytest.raises(BadValueError, match="indices"):
        decode(cfg, tensors)


def test_items_cross_words():
    words = torch.tensor([[-1, 0x5, 0]], dtype=torch.int32)
    assert unpack_items(words, 12, 6).tolist() == [[4095, 4095, 0x5FF, 0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("centroids.weight", lambda t: t.mul_(float("nan"))), ("centroids.weight", lambda t: t.zero_()), ("res_centroids.weight", lambda t: t[0].fill_(float("inf"))),
        ("outlier_centroids.weight", lambda t: t[0].fill_(float("nan"))), ("outlier_indices", lambda t: t.fill_(64)), ("outlier_indices", lambda t: t.fill_(-1)),
        ("indices", lambda t: t[0, 1].fill_(300)), ("res_indices", lambda t: t[0, 1].fill_(16)), ("perm", lambda t: t.fill_(3)), ("perm", lambda t: t.add_(1)),
        ("weight_scale", lambda t: t.zero_()), ("weight_scale", lambda t: t.fill_(float("nan"))), ("weight_bias", lambda t: t.fill_(float("inf"))),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(name, spoil):
    cfg = settings(24, 40, entries=300, residual=16, outlier=(4, 64, 8), packed=False)
    tensors, _ = module_tensors(cfg)
    decode(cfg, tensors)
    spoil(tensors[name])
    with pytest.raises(BadValueError, match=name):
        decode(cfg, tensors)


# --- the canonical weight ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "cfg", [CASES["outliers and groups"], CASES["groups"], CASES["packed"]], ids=["outliers-groups", "groups", "plain"]
)
def test_any_columns_of_a_weight_are_exact(cfg):
    tensors, want = module_tensors(cfg)
    weight = decode(cfg, tensors)
    for start, stop in ((0, 7), (7, 8), (5, 30)):
        assert torch.equal(weight.columns(start, stop).dequantize(), want[:, start:stop])
    assert torch.equal(weight.columns(2, 30).columns(3, 9).dequantize(), want[:, 5:11])


def test_rows_of_a_weight_are_exact_at_whole_vectors_only():
    cfg = settings(22, 40, residual=16, outlier=(4, 64, 8))
    tensors, want = module_tensors(cfg)
    weight = decode(cfg, tensors)
    assert torch.equal(weight.rows(8, 16).dequantize(), want[8:16])
    assert torch.equal(weight.rows(16, 22).dequantize(), want[16:])
    assert torch.equal(VectorCodebookWeight.concat([weight.rows(0, 16), weight.rows(16, 22)]).dequantize(), want)
    for start, stop in ((4, 16), (0, 20)):
        with pytest.raises(ShardError, match="multiples of 8"):
            weight.rows(start, stop)
    with pytest.raises(ShardError, match="inside a vector"):
        VectorCodebookWeight.concat([weight.rows(16, 22), weight.rows(0, 16)])
    with pytest.raises(ShardError, match="codebooks"):
        VectorCodebookWeight.concat([weight, decode(cfg, module_tensors(cfg, seed=1)[0])])


# --- configuration -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector_quant_dim": "in"}, "vector_quant_dim"), ({"norm_dim": 1}, "norm_dim"), ({"num_res_centroids": [16, 16]}, "num_res_centroids"),
        ({"outlier_size": 8}, "outlier_size"), ({"vector_lens": [-1, -1]}, "vector_lens"), ({"num_centroids": [-1, 65537]}, "num_centroids"),
        ({"vector_lens": 8}, "vector_lens"), ({"group_num": 0}, "group_num"), ({"enable_prem": True}, "nearest known: enable_perm"),
        ({"enable_norm": 1}, "enable_norm"), ({"in_features": 0}, "in_features"), ({"num_centroids": None}, "num_centroids"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_with_their_module(change, message):
    with pytest.raises(BitgrainError, match=rf"(?s){NAME}.*{message}"):
        parse({NAME: settings(16, 24) | change})


@pytest.mark.parametrize("change", [{"group_size": 20}, {"group_num": 5}, {"in_features": 32}, {"num_centroids": [-1, 300]}])
def test_settings_that_do_not_fit_together_are_refused(change):
    cfg = settings(16, 24)
    with pytest.raises(ConfigError, match=NAME):
        decode(cfg | change, module_tensors(cfg)[0])


def test_no_settings_at_all_is_refused():
    for section in (
        {"quant_method": "vptq"},
        {"quant_method": "vptq", "config_for_layers": {}},
        {"quant_method": "vptq", "config_for_layers": []},
    ):
        with pytest.raises(BitgrainError, match="config_for_layers"):
            VptqConfig.parse(evidence(section))


def test_tensors_without_a_configuration_name_what_is_missing():
    tensors, _ = module_tensors(settings(16, 24))
    bare = evidence(None, {f"{NAME}.{local}": t for local, t in tensors.items()})
    config, claim = detect(bare)
    assert (config, claim.score) == (VptqConfig, 50)
    with pytest.raises(ConfigError, match="config_for_layers"):
        config.parse(bare)


def test_exact_names_come_before_shared_ones_and_exclusions_before_both():
    own, shared = settings(16, 24, bias=True), settings(16, 24)
    config = parse({NAME: own}, {"down_proj": shared}, modules_to_not_convert=["model.layers.2"])
    quantized = view(module_tensors(own)[0])
    assert config.decide(quantized).scheme.stored.biased
    other = view(module_tensors(shared)[0], NAME.replace(".0.", ".1."))
    assert not config.decide(other).scheme.stored.biased
    excluded = view(module_tensors(shared)[0], NAME.replace(".0.", ".2."))
    with pytest.raises(RuleMismatchError, match="modules_to_not_convert"):
        config.decide(excluded)
    unknown = view(module_tensors(shared)[0], "model.layers.0.mlp.up_proj")
    with pytest.raises(RuleMismatchError, match="up_proj"):
        config.decide(unknown)
    config.trust_tensors = True
    with pytest.raises(ConfigError, match="nothing about"):
        config.decide(unknown)
    dense = {"weight": torch.ones(8, 16, dtype=torch.bfloat16)}
    assert config.rule_for(view(dense, "model.embed_tokens", ModuleKind.EMBEDDING))[0] is False
    assert config.matched_rules == {NAME, "down_proj", "model.layers.2"}


# --- whole models --------------------------------------------------------------------------------------------------------
def quantized_llama():
    """(checkpoint tensors, dense tensors, config_for_layers, shared_layer_config): linear modules of various settings."""
    tensors = llama_tensors(dtype=torch.float32)
    stored, dense, layers, shared = dict(tensors), dict(tensors), {}, {}
    for seed, (name, (n, k)) in enumerate(linear_shapes().items()):
        tail = name.rpartition(".")[2]
        if tail in ("gate_proj", "up_proj"):
            cfg = shared[tail] = settings(n, k, 6, 64, 16, bias=True)
        else:
            cfg = layers[name] = (
                settings(n, k, 8, 64, 16, outlier=(4, 16, 8)) if seed % 2 else settings(n, k, 8, 64, groups=2, packed=False)
            )
        parts, want = module_tensors(cfg, seed, size_of_scale=0.1)
        del stored[f"{name}.weight"]
        stored |= {f"{name}.{local}": t for local, t in parts.items()}
        dense[f"{name}.weight"] = want
        if cfg["bias"]:
            dense[f"{name}.bias"] = parts["bias"].float()
    return stored, dense, layers, shared


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vptq")
    stored, dense, layers, shared = quantized_llama()
    write_checkpoint(folder / "dense", dense, llama_config(mlp_bias=False))
    section = {"quant_method": "vptq", "config_for_layers": layers, "shared_layer_config": shared}
    return write_checkpoint(folder / "codes", stored, llama_config(quantization_config=section))


def test_llama_of_codes_gives_the_logits_of_its_dense_weights(llama):
    got = bitgrain.load_model(llama, device="cpu", dtype=torch.float32).logits(IDS)
    want = bitgrain.load_model(llama.parent / "dense", device="cpu", dtype=torch.float32).logits(IDS)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    checkpoint = bitgrain.open_checkpoint(llama)
    assert checkpoint.plan.fusions and not any(f.fused for f in checkpoint.plan.fusions)


def change(name, edit):
    def apply(tensors):
        tensors[f"{DAMAGED}.{name}"] = edit(tensors[f"{DAMAGED}.{name}"]).contiguous()

    return apply


def put(name, tensor):
    return lambda tensors: tensors.update({f"{DAMAGED}.{name}": tensor}) if tensor is not None else tensors.pop(f"{DAMAGED}.{name}")


DAMAGED = "model.layers.0.self_attn.k_proj"  # packed, with residual and outliers
EVERY = (
    "centroids.weight",
    "res_centroids.weight",
    "outlier_centroids.weight",
    "indices",
    "outlier_indices",
    "perm",
    "weight_scale",
    "weight_bias",
)
DAMAGE = {
    **{f"without-{name}": (put(name, None), name) for name in EVERY},
    **{f"short-{name}": (change(name, lambda t: t[..., :-1]), name) for name in EVERY},
    **{f"float8-{name}": (change(name, lambda t: t.to(torch.float8_e4m3fn)), name) for name in EVERY},
    **{
        f"nan-{name}": (change(name, lambda t: t * float("nan")), name)
        for name in EVERY
        if "centroids" in name or name.startswith("weight")
    },
    "zero-scale": (change("weight_scale", lambda t: t * 0), "weight_scale"),
    "zero-centroids": (change("centroids.weight", lambda t: t * 0), "centroids.weight"),
    "zero-perm": (change("perm", lambda t: t * 0), "perm"),
    "vector-missing": (change("indices", lambda t: t[:, :-1]), "indices"),
    "outlier-range": (change("outlier_indices", lambda t: t + 16), "outlier_indices"),
    "unpacked": (change("indices", lambda t: t.to(torch.int16)), "indices"),
    "extra-indices": (put("res_indices", torch.zeros(1, 4, 56, dtype=torch.int16)), "res_indices"),
    "extra": (put("rotation", torch.ones(4)), "rotation"),
    "dense-beside": (put("weight", torch.ones(32, 64)), "weight"),
    "bias-nan": (put("bias", torch.full((32,), float("nan"))), "bias"),
}


@pytest.mark.parametrize(("damage", "name"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_tensor_is_refused_by_name(llama, tmp_path, damage, name):
    with pytest.raises(BitgrainError, match=rf"k_proj\.{name}\b"):
        bitgrain.load_model(edited(llama, tmp_path / "damaged", damage), device="cpu")


def test_missing_bias_is_refused_where_the_settings_have_one(llama, tmp_path):
    with pytest.raises(BitgrainError, match=r"gate_proj\.bias"):
        bitgrain.load_model(edited(llama, tmp_path / "damaged", lambda t: t.pop("model.layers.1.mlp.gate_proj.bias")), device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("in_features", 72, "k_proj"), ("out_features", 40, "k_proj"), ("vector_lens", [4, 4], "k_proj.centroids"), ("num_centroids", [16, 128], "centroids.weight"),
     ("num_res_centroids", [-1, -1], "k_proj.res_centroids"), ("num_res_centroids", [-1, 32], "res_centroids"), ("enable_perm", False, "k_proj.perm"),
     ("enable_norm", False, "k_proj.weight_scale"), ("outlier_size", 16, "k_proj"), ("is_indice_packed", False, "k_proj.indices")],
)  # fmt: skip
def test_settings_that_contradict_the_tensors_are_refused(llama, tmp_path, key, value, named):
    def spoil(config):
        config["quantization_config"]["config_for_layers"][DAMAGED][key] = value

    with pytest.raises(BitgrainError, match=named):
        bitgrain.load_model(edited(llama, tmp_path / "damaged", config=spoil), device="cpu")
