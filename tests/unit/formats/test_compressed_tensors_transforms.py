"""compressed-tensors transforms: whole small models against dense matrices written out here; sharing, order, refusals."""

import copy
import json

import pytest
import torch
from safetensors import safe_open

import bitgrain
from bitgrain.errors import BadValueError, BitgrainError, ConfigError, ConflictingConfigError
from bitgrain.layers.decoding import ModuleReader
from bitgrain.models.batch import Batch, Segment
from bitgrain.numerics.hadamard_factors import factor_hadamard, read_signs, require_hadamard
from bitgrain.weights import Rotation
from tests.checkpoints import HEAD_DIM, edited, linear_shapes, llama_config, llama_tensors, write_checkpoint
from tests.golden_checks import check_golden, golden_folders
from tests.unit.formats.golden_cases import FIXTURES

DOWN, Q, K = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
ATTENTION = "model.layers.0.self_attn"
TOKENS = torch.tensor([5, 7, 11, 13, 2, 9, 40, 3, 21, 17])


# --- written out: dense matrices, one entry at a time ------------------------------------------------------------------
def sylvester(n):
    return torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)], dtype=torch.float64)


def paley(q=11):
    """[q + 1, q + 1] of +-1: a Hadamard matrix that is neither Sylvester's nor symmetric."""
    squares = {x * x % q for x in range(1, q)}
    h = torch.ones(q + 1, q + 1, dtype=torch.float64)
    for i in range(q):
        h[i + 1, 0] = -1
        for j in range(q):
            h[i + 1, j + 1] = 1 if i == j or (i - j) % q in squares else -1
    return h


def random_hadamard(n, base=None):
    torch.manual_seed(n)
    signs = torch.randint(0, 2, (n,)).double() * 2 - 1
    plain = sylvester(n) if base is None else torch.kron(base, sylvester(n // len(base)))
    return signs[:, None] * plain


def blocks(matrix, width):
    """The matrix repeated along the diagonal."""
    return torch.block_diag(*[matrix] * (width // len(matrix)))


def orthonormal(matrix, perm=None, inverse=False):
    m = matrix if perm is None else torch.stack([torch.stack([matrix[i, j] for j in perm]) for i in perm])
    return (m.t() if inverse else m) / len(m) ** 0.5


def group(kind, *applied, head_dim=None, **more):
    entries = [{"targets": t, "location": place, "inverse": inverse, "ignore": ["lm_head"]} for t, place, inverse in applied]
    return {"type": kind, "head_dim": head_dim, "randomize": False, "requires_grad": False, "precision": "torch.float64", "apply": entries, **more}


def config_of(groups, **more):
    return llama_config(
        torch_dtype="float32",
        quantization_config={
            "quant_method": "compressed-tensors", "quantization_status": "compressed", "version": "0.17.0", "config_groups": {}, "format": "dense",
            "ignore": [], "transform_config": {"config_groups": groups},
        }, **more,
    )  # fmt: skip


def write(folder, groups, stored, change=lambda tensors: None, **more):
    tensors = llama_tensors(dtype=torch.float32) | stored
    change(tensors)
    return write_checkpoint(folder, tensors, config_of(groups, **more))


def weight_of(name):
    return llama_tensors(dtype=torch.float32)[f"{name}.weight"].double()


LINEAR = ["Linear"]
DOWNS = ["re:.*down_proj$"]
HADAMARD12 = paley()


@pytest.mark.parametrize("folder", golden_folders("compressed-tensors-transform"), ids=lambda f: f.name)
def test_golden_module_equals_golden(folder):
    assert check_golden(folder) > 0


def test_fixture_equals_golden():
    if not FIXTURES.is_dir():
        pytest.skip("../shared/fixtures is absent")
    folder = FIXTURES / "llmcompressor-quip-w4a16-g64"
    facts = json.loads((folder / "case.json").read_text())
    checkpoint = bitgrain.open_checkpoint(folder)
    with safe_open(str(folder / "golden.safetensors"), "pt") as golden:
        wanted = [c for c in facts["checks"] if c["type"] == "effective_weight"]
        assert len(wanted) == 8
        for check in wanted:
            got = checkpoint.effective_weight(check["name"])[check["rows"]]
            torch.testing.assert_close(got, golden.get_tensor(f"effective/{check['name']}"), rtol=check["rtol"], atol=check["atol"])
        got = bitgrain.load_model(folder, device="cpu", dtype="float32").logits(golden.get_tensor("input_ids"))
        torch.testing.assert_close(got, golden.get_tensor("logits/none"), rtol=0, atol=5e-4)
    row = checkpoint.plan.modules["model.layers.1.mlp.up_proj"]
    assert row.as_dict()["shares"] == [f"{Q}.u_output.weight", f"{Q}.v_input.weight"]
    assert row.nbytes == 512 * 32 * 4 + 512 * 4 * 4 + 16  # what another module stores is not counted again


# --- what each kind means ------------------------------------------------------------------------------------------------
KINDS = {
    "hadamard-32": ("hadamard", sylvester(32), None),
    "random-16": ("random-hadamard", random_hadamard(16), None),
    "random-96-from-12": ("random-hadamard", random_hadamard(96, HADAMARD12), None),
    "random-48-permuted": ("random-hadamard", random_hadamard(48, HADAMARD12), torch.randperm(48, generator=torch.Generator().manual_seed(1))),
    "hadamard-8-permuted": ("hadamard", sylvester(8), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])),
    "hadamard-12-of-no-butterfly": ("random-hadamard", HADAMARD12[torch.tensor([5, 0, 1, 2, 3, 4, 6, 7, 8, 9, 11, 10])], None),
}


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("name", KINDS)
def test_input_transform_equals_dense_matrix(tmp_path, name, inverse):
    kind, matrix, perm = KINDS[name]
    stored = {f"{DOWN}.R4_input.weight": matrix}
    if perm is not None:
        stored[f"{DOWN}.R4_input.perm"] = perm
    groups = {"R4": group(kind, (DOWNS, "input", inverse), head_dim=len(matrix), randomize=perm is not None)}
    checkpoint = bitgrain.open_checkpoint(write(tmp_path / "m", groups, stored))
    for module in (DOWN, DOWN.replace("0", "1")):
        expected = weight_of(module) @ blocks(orthonormal(matrix, perm, inverse), 96).t()
        torch.testing.assert_close(checkpoint.effective_weight(f"{module}.weight").double(), expected, rtol=0, atol=1e-5)
        assert torch.equal(checkpoint.dequantize(f"{module}.weight").double(), weight_of(module))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_random_matrix_is_stored_as_it_is_applied(tmp_path, inverse):
    torch.manual_seed(3)
    matrix = torch.rand(32, 32, dtype=torch.float64)
    groups = {"u": group("random-matrix", (DOWNS, "output", inverse), head_dim=32)}
    checkpoint = bitgrain.open_checkpoint(write(tmp_path / "m", groups, {f"{DOWN}.u_output.weight": matrix}))
    expected = blocks(matrix, 64).t() @ weight_of(DOWN)
    torch.testing.assert_close(checkpoint.effective_weight(f"{DOWN}.weight").double(), expected, rtol=0, atol=1e-4)


def test_inverse_of_a_random_matrix_is_a_matrix_of_its_own(tmp_path):
    torch.manual_seed(4)
    matrix, other = torch.rand(2, 64, 64, dtype=torch.float64)
    groups = {"g": group("random-matrix", ([Q, K], "input", False), ([Q], "output", True))}
    stored = {f"{Q}.g_input.weight": matrix, f"{Q}.g_output.weight": other}
    checkpoint = bitgrain.open_checkpoint(write(tmp_path / "m", groups, stored))
    torch.testing.assert_close(checkpoint.effective_weight(f"{Q}.weight").double(), other.t() @ weight_of(Q) @ matrix.t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(checkpoint.effective_weight(f"{K}.weight").double(), weight_of(K) @ matrix.t(), rtol=1e-5, atol=1e-4)


def test_output_transform_comes_behind_the_bias(tmp_path):
    h = random_hadamard(32)
    bias = torch.randn(64)
    groups = {"u": group("random-hadamard", ([DOWN], "output", True), head_dim=32)}
    folder = write(tmp_path / "m", groups, {f"{DOWN}.u_output.weight": h, f"{DOWN}.bias": bias})
    checkpoint = bitgrain.open_checkpoint(folder)
    reader = ModuleReader(checkpoint.files, checkpoint.plan)
    got = reader.weight(reader.row(DOWN))[2]
    torch.testing.assert_close(got.double(), bias.double() @ blocks(orthonormal(h, inverse=True), 64), rtol=0, atol=1e-5)


def test_last_input_transform_runs_first_and_first_output_transform_first(tmp_path):
    a, b = random_hadamard(8), random_hadamard(16)
    groups = {"a": group("random-hadamard", ([DOWN], "input", False), ([DOWN], "output", False), head_dim=8),
              "b": group("random-hadamard", ([DOWN], "input", False), ([DOWN], "output", False), head_dim=16)}  # fmt: skip
    stored = {f"{DOWN}.a_input.weight": a, f"{DOWN}.b_input.weight": b}  # of one size and module: the outputs' are shared too
    checkpoint = bitgrain.open_checkpoint(write(tmp_path / "m", groups, stored))
    xs = blocks(orthonormal(b), 96) @ blocks(orthonormal(a), 96)
    ys = blocks(orthonormal(a), 64) @ blocks(orthonormal(b), 64)
    expected = (xs @ weight_of(DOWN).t() @ ys).t()
    torch.testing.assert_close(checkpoint.effective_weight(f"{DOWN}.weight").double(), expected, rtol=0, atol=1e-5)


# --- whole models ----------------------------------------------------------------------------------------------------------
def quip(kind, head_dim):
    return {"v": group(kind, (LINEAR, "input", False), (LINEAR, "weight_input", True), head_dim=head_dim),
            "u": group(kind, (LINEAR, "weight_output", False), (LINEAR, "output", True), head_dim=head_dim)}  # fmt: skip


def rotated(tensors, v, u):
    """The producer's offline part: W' = U^T W V, so that x V and y U^T give the plain model."""
    for name, (n, k) in linear_shapes().items():
        w = tensors[f"{name}.weight"].double()
        tensors[f"{name}.weight"] = (blocks(orthonormal(u), n).t() @ w @ blocks(orthonormal(v), k)).float()


def quip_folder(folder):
    v, u = random_hadamard(16), random_hadamard(32)
    groups = quip("random-hadamard", 16)
    groups["u"]["head_dim"] = 32
    return write(folder, groups, {f"{Q}.v_input.weight": v, f"{Q}.u_output.weight": u}, lambda t: rotated(t, v, u))


def plain_logits(tmp_path):
    folder = write_checkpoint(tmp_path / "plain", llama_tensors(dtype=torch.float32), llama_config(torch_dtype="float32"))
    return bitgrain.load_model(folder, device="cpu", dtype="float32").logits(TOKENS)


def test_online_transforms_give_the_plain_model(tmp_path):
    model = bitgrain.load_model(quip_folder(tmp_path / "m"), device="cpu", dtype="float32")
    torch.testing.assert_close(model.logits(TOKENS), plain_logits(tmp_path), rtol=0, atol=1e-4)


def test_offline_transforms_need_nothing(tmp_path):
    groups = {"R1": group("hadamard", (LINEAR, "weight_input", True), (["re:.*embed_tokens$"], "weight_output", False))}
    folder = write(tmp_path / "m", groups, {})
    assert torch.equal(bitgrain.load_model(folder, device="cpu", dtype="float32").logits(TOKENS), plain_logits(tmp_path))


def heads(*keys, kind="hadamard", head_dim=8, **more):
    return {"R3": group(kind, *((["re:.*self_attn$"], place, False) for place in keys), head_dim=head_dim, **more)}


@pytest.mark.parametrize("permuted", [False, True], ids=["plain", "permuted"])
def test_queries_and_keys_are_cached_rotated(tmp_path, permuted):
    h, perm = random_hadamard(8), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4]) if permuted else None
    stored = {f"{ATTENTION}.R3_q_attn.weight": h} | ({f"{ATTENTION}.R3_q_attn.perm": perm} if permuted else {})
    folder = write(tmp_path / "m", heads("q_attn", "k_cache", kind="random-hadamard", randomize=permuted), stored)
    logits, keys = [], []
    for path in (folder, write_checkpoint(tmp_path / "plain", llama_tensors(dtype=torch.float32), llama_config(torch_dtype="float32"))):
        model = bitgrain.load_model(path, device="cpu", dtype="float32")
        cache = model.new_cache(len(TOKENS))
        rows = torch.arange(len(TOKENS))
        model(Batch(TOKENS, rows, (Segment(cache, 0, len(TOKENS)),), rows))
        logits.append(model.logits(TOKENS))
        keys.append([cache.read(layer, torch.float32)[0].clone() for layer in (0, 1)])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    expected = blocks(orthonormal(h, perm), HEAD_DIM)
    for rotated_keys, plain_keys in zip(*keys, strict=True):  # the second layer uses the matrix that the first one stores
        torch.testing.assert_close(rotated_keys.double(), plain_keys.double() @ expected, rtol=0, atol=1e-4)
        assert not torch.allclose(rotated_keys, plain_keys, atol=0.1)


def test_rotation_of_keys_alone_changes_the_scores(tmp_path):
    folder = write(tmp_path / "m", heads("k_cache"), {f"{ATTENTION}.R3_k_cache.weight": sylvester(8)})
    got = bitgrain.load_model(folder, device="cpu", dtype="float32").logits(TOKENS)
    assert (got - plain_logits(tmp_path)).abs().max() > 0.01


def test_rotated_heads_are_shown_in_the_plan(tmp_path):
    folder = write(tmp_path / "m", heads("q_attn", "k_cache"), {f"{ATTENTION}.R3_q_attn.weight": sylvester(8)})
    plan = bitgrain.open_checkpoint(folder).plan
    assert plan.modules[ATTENTION].label == "KV cache 16-bit, hadamard 8 at q_attn, hadamard 8 at k_cache"
    assert plan.modules["model.layers.1.self_attn"].as_dict()["shares"] == [f"{ATTENTION}.R3_q_attn.weight"]


def test_matrix_that_is_fixed_by_its_size_is_computed_where_none_is_stored(tmp_path):
    groups = {"R4": group("hadamard", (DOWNS, "input", False), head_dim=32)}
    checkpoint = bitgrain.open_checkpoint(write(tmp_path / "m", groups, {}))
    expected = weight_of(DOWN) @ blocks(orthonormal(sylvester(32)), 96).t()
    torch.testing.assert_close(checkpoint.effective_weight(f"{DOWN}.weight").double(), expected, rtol=0, atol=1e-5)
    assert checkpoint.plan.modules[DOWN].label.endswith("hadamard 32 at input, computed")


# --- refusals ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [f"{Q}.v_input.weight", f"{Q}.u_output.weight"])
@pytest.mark.parametrize("damage", ["deleted", "renamed", "shape", "entry", "not orthogonal", "type"])
def test_damaged_matrix_is_refused_by_name(tmp_path, name, damage):
    def change(tensors):
        matrix = tensors.pop(name)
        if damage == "renamed":
            tensors[f"{name}_old"] = matrix
        elif damage == "shape":
            tensors[name] = matrix[:-1]
        elif damage == "type":
            tensors[name] = matrix.to(torch.int8)
        elif damage != "deleted":
            matrix[1, 2] = 0.5 if damage == "entry" else -matrix[1, 2]
            tensors[name] = matrix

    folder = edited(quip_folder(tmp_path / "m"), tmp_path / "damaged", tensors=change)
    with pytest.raises(BitgrainError) as caught:
        bitgrain.load_model(folder, device="cpu", dtype="float32")
    assert name in str(caught.value)


def test_matrix_of_a_module_without_the_transform_is_refused(tmp_path):
    groups = {"R4": group("hadamard", (DOWNS, "input", False), head_dim=32)}
    stored = {f"{DOWN}.R4_input.weight": sylvester(32), f"{K}.R4_input.weight": sylvester(32)}
    with pytest.raises(BitgrainError, match=rf"(?s){K}\.R4_input\.weight.*does not declare"):
        bitgrain.open_checkpoint(write(tmp_path / "m", groups, stored))


def test_matrix_of_heads_without_a_transform_is_refused(tmp_path):
    groups = heads("q_attn", "k_cache") | {"R4": group("hadamard", (DOWNS, "input", False), head_dim=32)}
    groups["R3"]["apply"][0]["ignore"] = [ATTENTION]
    stored = {f"{ATTENTION}.R3_q_attn.weight": sylvester(8), f"{DOWN}.R4_input.weight": sylvester(32)}
    with pytest.raises(BitgrainError, match=rf"{ATTENTION}\.R3_q_attn\.weight"):
        bitgrain.open_checkpoint(write(tmp_path / "m", groups, stored))


def test_two_matrices_for_one_user_are_refused(tmp_path):
    groups = {"R4": group("random-hadamard", (LINEAR, "input", False), head_dim=16)}
    stored = {f"{DOWN}.R4_input.weight": random_hadamard(16), f"{Q}.R4_input.weight": -random_hadamard(16)}
    with pytest.raises(BitgrainError, match="could both stand for it"):
        bitgrain.open_checkpoint(write(tmp_path / "m", groups, stored))


def test_permutation_is_needed_and_checked(tmp_path):
    groups = {"R4": group("hadamard", (DOWNS, "input", False), head_dim=8, randomize=True)}
    matrix = {f"{DOWN}.R4_input.weight": sylvester(8)}
    with pytest.raises(BitgrainError, match=r"R4_input\.perm: absent"):
        bitgrain.open_checkpoint(write(tmp_path / "absent", groups, matrix))
    folder = write(tmp_path / "twice", groups, matrix | {f"{DOWN}.R4_input.perm": torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])})
    with pytest.raises(BadValueError, match=r"R4_input\.perm"):
        bitgrain.open_checkpoint(folder).effective_weight(f"{DOWN}.weight")


def test_head_tied_to_the_embedding_has_no_transform(tmp_path):
    groups = {"v": group("hadamard", (LINEAR, "input", False))}
    groups["v"]["apply"][0]["ignore"] = []
    folder = write(tmp_path / "m", groups, {}, lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True)
    with pytest.raises(BitgrainError, match="tied to the embedding"):
        bitgrain.open_checkpoint(folder)


def edit(path, value):
    def change(groups):
        *inner, last = path
        for key in inner:
            groups = groups[key]
        groups[last] = value

    return change


REFUSALS = {
    "type": (edit(["v", "type"], "fourier"), ConfigError, r"groups\.v\.type.*fourier"),
    "type-absent": (edit(["v", "type"], None), ConfigError, r"groups\.v\.type"),
    "location": (edit(["v", "apply", 0, "location"], "attn"), ConfigError, r"groups\.v\.apply\[0\]\.location"),
    "location-absent": (edit(["v", "apply", 0, "location"], None), ConfigError, r"apply\[0\]\.location"),
    "targets-absent": (edit(["v", "apply", 0, "targets"], []), ConfigError, r"apply\[0\]\.targets"),
    "apply": (edit(["v", "apply"], {"input": 1}), ConfigError, r"groups\.v\.apply"),
    "apply-entry": (edit(["v", "apply", 0], "input"), ConfigError, r"apply\[0\]"),
    "group": (edit(["v"], 1), ConfigError, r"groups\.v"),
    "group-key": (edit(["v", "seed"], 7), ConfigError, r"groups\.v: unknown keys: seed"),
    "apply-key": (edit(["v", "apply", 0, "scale"], 7), ConfigError, r"apply\[0\]: unknown keys: scale"),
    "trained": (edit(["v", "requires_grad"], True), ConfigError, "requires_grad"),
    "precision": (edit(["v", "precision"], "torch.int8"), ConfigError, "precision"),
    "head-dim": (edit(["v", "head_dim"], -8), ConfigError, "head_dim"),
    "blocks": (edit(["v", "head_dim"], 40), ConfigError, r"head_dim.*64 entries|head_dim.*96 entries"),
    "twice": (lambda groups: groups["v"]["apply"].append(copy.deepcopy(groups["v"]["apply"][0])), ConflictingConfigError, "v_input is applied twice"),
    "heads-without-blocks": (lambda groups: groups.update(heads("q_attn", head_dim=None)), ConfigError, r"R3\.head_dim"),
    "heads-of-a-linear": (edit(["v", "apply", 0, "location"], "q_attn"), ConfigError, r"q_attn.*linear"),
    "embedding": (edit(["v", "apply", 0, "targets"], ["model.embed_tokens"]), ConfigError, r"'input' at model\.embed_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_transform_configuration_is_refused_by_name(tmp_path, name):
    change, kind, pattern = REFUSALS[name]
    groups = {"v": group("hadamard", (LINEAR, "input", False), head_dim=16)}
    bitgrain.open_checkpoint(write(tmp_path / "good", groups, {}))
    change(groups)
    with pytest.raises(BitgrainError, match=f"(?s){pattern}") as caught:
        bitgrain.open_checkpoint(write(tmp_path / "m", groups, {}))
    problems = getattr(caught.value, "problems", [caught.value])
    assert any(isinstance(p, kind) for p in problems)


@pytest.mark.parametrize("value", [["R4"], {"groups": {"R4": {}}}, {"config_groups": ["R4"]}, "R4"], ids=str)
def test_unreadable_transform_config_is_refused(tmp_path, value):
    config = config_of({})
    config["quantization_config"]["transform_config"] = value
    with pytest.raises(BitgrainError, match="transform_config"):
        bitgrain.open_checkpoint(write_checkpoint(tmp_path / "m", llama_tensors(), config))


# --- factors -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("matrix", "base"), [(sylvester(16), 1), (-sylvester(8), 1), (random_hadamard(64), 1), (random_hadamard(96, HADAMARD12), 12)])
def test_factors_give_the_matrix_again(matrix, base):
    factors = factor_hadamard(read_signs("h", matrix))
    assert (1 if factors.base is None else len(factors.base)) == base
    signs = torch.ones(len(matrix)) if factors.signs is None else factors.signs
    inner = torch.ones(1, 1) if factors.base is None else factors.base
    assert torch.equal(signs[:, None].double() * torch.kron(inner.double(), sylvester(len(matrix) // base)), matrix)


def test_matrix_without_factors_stays_dense(tmp_path):
    matrix = KINDS["hadamard-12-of-no-butterfly"][1]
    assert factor_hadamard(read_signs("h", matrix)) is None
    groups = {"R4": group("random-hadamard", (DOWNS, "input", False), head_dim=12)}
    checkpoint = bitgrain.open_checkpoint(write(tmp_path / "m", groups, {f"{DOWN}.R4_input.weight": matrix}))
    reader = ModuleReader(checkpoint.files, checkpoint.plan)
    (transform,) = reader.weight(reader.row(DOWN))[0].inputs
    assert isinstance(transform, Rotation)


def test_many_rows_are_checked_like_few():
    big = random_hadamard(2048, sylvester(64))
    matrix = read_signs("h", big)
    assert torch.equal(matrix.double(), big)
    require_hadamard("h", matrix, None)
    matrix[1500, 3] *= -1
    with pytest.raises(BadValueError, match="orthogonal"):
        require_hadamard("h", matrix, factor_hadamard(matrix))
