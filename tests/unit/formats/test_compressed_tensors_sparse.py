"""compressed-tensors, sparse storage: bitmasks over float, fp8 and int8 weights, and the layout marlin-24; naive encoders; refusals."""

import pytest
import torch

from bitgrain.errors import BadValueError, ConfigError, ShapeMismatchError
from bitgrain.formats.compressed_tensors import CompressedTensorsConfig
from bitgrain.formats.evidence import Evidence
from tests.unit.formats.golden_cases import problems_of
from tests.unit.formats.synthetic import NAME, evidence, ramp, view

STRUCTURED, FREE = "sparse-24-bitmask", "sparse-bitmask"
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}


def section(sparse, weights=None, storage=None):
    config = {"quant_method": "compressed-tensors", "version": "0.12.2"}
    if sparse:
        config["sparsity_config"] = {"format": sparse, "targets": ["Linear"], "ignore": ["lm_head"], "global_sparsity": 0.5, "registry_requires_subclass": False,
                                     "sparsity_structure": "2:4" if sparse == STRUCTURED else "unstructured"}  # fmt: skip
    if weights is not None:
        config |= {"format": storage, "quantization_status": "compressed", "ignore": ["lm_head"],
                   "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}}  # fmt: skip
    return config


def parse(config, tensors=None):
    """The configuration; the tensors' data may be read as a checkpoint's."""
    named = {f"{NAME}.{local}": t for local, t in (tensors or {}).items()}
    plain = evidence(config, named)
    return CompressedTensorsConfig.parse(Evidence(plain.config, plain.quantization, {}, plain.tensors, plain.suffixes, {}, named.__getitem__))


def sparse_weight(n, k, dtype, structured):
    """A matrix of which some columns are zero, at most two of each four (of the flattened matrix) if structured."""
    generator = torch.Generator().manual_seed(n + k)
    dense = torch.randn(n, k, generator=generator)
    kept = torch.rand(n, k, generator=generator) > 0.55
    if structured:
        kept = torch.zeros(n * k // 4, 4, dtype=torch.bool).scatter_(1, torch.rand(n * k // 4, 4, generator=generator).topk(2, 1).indices, True).view(n, k)
    kept[0] &= torch.arange(k) < 2  # nearly empty
    return (dense * 50 * kept).round().to(torch.int8) if dtype is torch.int8 else (dense * kept).to(dtype)


def encoded(weight, structured):
    """`weight` as the producer stores it, number by number."""
    n, k = weight.shape
    mask = torch.zeros(n, -(-k // 8), dtype=torch.uint8)
    values, offsets = [], []
    flat = weight.float().flatten().tolist()
    chosen = set()
    for start in range(0, n * k, 4) if structured else ():
        nonzero = [i for i in range(start, start + 4) if flat[i] != 0]
        chosen |= set((nonzero + [i for i in range(start, start + 4) if i not in nonzero])[:2])
    for row in range(n):
        offsets.append(len(values))
        for column in range(k):
            if row * k + column in chosen or (not structured and flat[row * k + column] != 0):
                mask[row, column // 8] |= 1 << (column % 8)
                values.append(weight[row, column])
    kept = torch.stack([v.view(torch.uint8) if v.element_size() == 1 else v for v in values]).view(weight.dtype)
    tensors = {"compressed": kept.view(n, k // 2) if structured else kept, "bitmask": mask}
    if structured:
        return tensors | {"shape": torch.tensor([[n], [k]])}
    return tensors | {"shape": torch.tensor([n, k]), "row_offsets": torch.tensor(offsets)}


def stored(sparse, dtype, n, k):
    """(configuration, tensors, float32 weights)."""
    weight = sparse_weight(n, k, dtype, sparse == STRUCTURED)
    tensors = encoded(weight, sparse == STRUCTURED)
    if dtype not in (torch.float8_e4m3fn, torch.int8):
        return section(sparse), tensors, weight.float()
    scale = ramp(n, 1).abs() + 0.01
    kind, storage = (INT8, "int-quantized") if dtype is torch.int8 else (FP8, "float-quantized")
    return section(sparse, kind, storage), tensors | {"weight_scale": scale}, weight.float() * scale


def scheme_of(config, tensors, shape=None):
    module = view(tensors, shape=shape)
    scheme = parse(config, tensors).decide(module).scheme
    assert problems_of(scheme, module) == []
    return scheme


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8]


@pytest.mark.parametrize(("sparse", "size"), [(STRUCTURED, (6, 16)), (STRUCTURED, (5, 20)), (STRUCTURED, (4, 18)), (FREE, (6, 16)), (FREE, (5, 19)), (FREE, (1, 3))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_weight_decodes_like_the_naive_encoder_stored_it(sparse, size, dtype):
    config, tensors, want = stored(sparse, dtype, *size)
    scheme = scheme_of(config, tensors)
    weight = scheme.to_weight(tensors)
    assert torch.equal(weight.dequantize(), want)
    assert weight.spec == scheme.weight_spec and weight.shape == scheme.shape == size
    assert scheme_of(config, tensors, size) == scheme
    assert scheme.label.endswith("stored 2:4" if sparse == STRUCTURED else "stored sparse")


def test_sparse_and_whole_weights_may_fuse():
    config, tensors, _ = stored(STRUCTURED, torch.bfloat16, 6, 16)
    whole = {"weight": ramp(6, 16, dtype=torch.bfloat16)}
    assert scheme_of(config, tensors).fusion_key() == scheme_of(config, whole).fusion_key()


def test_bias_and_static_input_belong_to_the_whole_weight():
    config, tensors, want = stored(STRUCTURED, torch.float8_e4m3fn, 6, 16)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float"}
    tensors |= {"bias": torch.ones(6), "input_scale": torch.tensor([0.5])}
    scheme = scheme_of(config, tensors)
    assert torch.equal(scheme.to_weight(tensors).dequantize(), want)
    assert scheme.to_activation(tensors).scale == 0.5 and scheme.activation.element == "fp8_e4m3fn"
    assert torch.equal(scheme.to_bias(tensors), tensors["bias"])


def test_unquantized_checkpoint_needs_no_groups():
    assert parse(section(STRUCTURED)).groups == ()
    assert CompressedTensorsConfig.detect(evidence({"sparsity_config": {"format": FREE}})).score == 90
    with pytest.raises(ConfigError, match="config_groups"):
        parse({"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}})


@pytest.mark.parametrize("shape", [None, (6, 16)], ids=["unknown-architecture", "known-architecture"])
@pytest.mark.parametrize("sparse", [STRUCTURED, FREE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_missing_and_misshapen_tensors_are_found(sparse, dtype, shape):
    config, tensors, _ = stored(sparse, dtype, 6, 16)
    for name in tensors:
        less = {key: value for key, value in tensors.items() if key != name}
        module = view(less, shape=shape)
        assert f"missing {name}" in problems_of(parse(config, less).decide(module).scheme, module)
        if name in ("bitmask", "row_offsets", "weight_scale") or (name == "compressed" and sparse == STRUCTURED):
            module = view(tensors | {name: tensors[name][:-1]}, shape=shape)
            assert [p for p in problems_of(parse(config, tensors).decide(module).scheme, module) if p.startswith("shape")]


def test_sparse_tensors_without_the_setting_are_not_read():
    config, tensors, _ = stored(STRUCTURED, torch.float8_e4m3fn, 6, 16)
    del config["sparsity_config"]
    module = view(tensors)
    assert {"missing weight", "undeclared compressed", "undeclared bitmask"} <= set(problems_of(parse(config).decide(module).scheme, module))


def flip_kept(tensors):
    """Say that the first kept column of row 1 is another one."""
    row = tensors["bitmask"][1].clone()
    first = int(row[0]) & -int(row[0])
    tensors["bitmask"][1, 0] = int(row[0]) & ~first


DAMAGE = {
    "one-bit-less": (STRUCTURED, flip_kept, "bitmask", BadValueError),
    "one-bit-less-free": (FREE, flip_kept, "compressed", ShapeMismatchError),
    "two-bits-elsewhere": (FREE, lambda t: t["bitmask"][3, 0].fill_(0), "compressed", ShapeMismatchError),
    "three-and-one": (STRUCTURED, lambda t: t["bitmask"][0, 0].fill_(0b00010111), "bitmask", BadValueError),
    "bits-beyond": (FREE, lambda t: t["bitmask"][2, -1].fill_(0x80), "bitmask", BadValueError),
    "rows-elsewhere": (FREE, lambda t: t["row_offsets"][1].fill_(7), "row_offsets", BadValueError),
    "other-shape": (STRUCTURED, lambda t: t["shape"].fill_(20), "shape", ShapeMismatchError),
    "nan": (STRUCTURED, lambda t: t["compressed"][0].fill_(float("nan")), "weight", BadValueError),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_impossible_values_are_refused_by_name(name):
    sparse, change, where, kind = DAMAGE[name]
    config, tensors, _ = stored(sparse, torch.bfloat16, 6, 20)
    scheme = scheme_of(config, tensors)
    broken = {key: value.clone() for key, value in tensors.items()}
    change(broken)
    with pytest.raises(kind) as error:
        scheme.to_weight(broken)
    assert error.value.where == where


# --- marlin-24 ----------------------------------------------------------------------------------------------------------
def tiled_args(bits, group):
    return {"num_bits": bits, "type": "int", "symmetric": True, **({"strategy": "group", "group_size": group} if group else {"strategy": "channel"})}


def tiled_codes(n, k, bits, seed=0):
    """Signed codes of which two of each four columns may be other than zero, some rows with fewer."""
    generator = torch.Generator().manual_seed(n + k + bits + seed)
    half = 1 << (bits - 1)
    kept = torch.rand(n, k // 4, 4, generator=generator).topk(2, dim=2).indices
    codes = torch.randint(-half, half, (n, k // 4, 2), generator=generator)
    codes[1, :, 0] = 0
    codes[2] = 0
    return torch.zeros(n, k // 4, 4, dtype=torch.int64).scatter_(2, kept, codes).view(n, k)


def encode_tiled(codes, bits):
    """(weight_packed, meta), element by element: which element every bit of the kernel's words holds."""
    n, k = codes.shape
    kept = torch.zeros(n, k // 2, dtype=torch.int64)
    meta = torch.zeros(n, k // 16, dtype=torch.int64)
    for row in range(n):
        for run in range(k // 4):
            four = codes[row, 4 * run : 4 * run + 4].tolist()
            places = [i for i, v in enumerate(four) if v][:2]
            places = sorted((places + [i for i in (3, 2, 1, 0) if i not in places])[:2])
            kept[row, 2 * run : 2 * run + 2] = torch.tensor([four[places[0]], four[places[1]]])
            meta[row, run // 4] |= (places[0] | places[1] << 2) << (4 * (run % 4))
    unsigned = kept.t() + (1 << (bits - 1))  # [K / 2, N]
    words = torch.zeros(k // 32, n * bits // 2, dtype=torch.int64)
    per_word = 32 // bits
    inside = (0, 2, 4, 6, 1, 3, 5, 7) if bits == 4 else (0, 2, 1, 3)
    for strip in range(k // 32):
        for block in range(n // 64):
            for position in range(1024):
                # the word's position among its values, before they were interleaved
                position_before = position // per_word * per_word + inside[position % per_word]
                lane, rest = position_before // 32, position_before % 32
                j, half, row_of = rest // 8, rest // 4 % 2, rest % 4
                row = 16 * strip + 2 * (lane % 4) + (0, 1, 8, 9)[row_of]
                column = 64 * block + 16 * (lane // 8) + 8 * (lane // 4 % 2) + 4 * half + j
                at = 1024 * block + position
                words[strip, at // per_word] |= int(unsigned[row, column]) << (bits * (at % per_word))
    flat = torch.zeros(n * k // 16, dtype=torch.int64)
    for row in range(n):
        for column in range(k // 16):
            to_row = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
            to_column = column
            if to_row % 2 == 0 and column % 2 == 1:
                to_row, to_column = to_row + 1, column - 1
            elif to_row % 2 == 1 and column % 2 == 0:
                to_row, to_column = to_row - 1, column + 1
            flat[to_column // 2 * n * 2 + to_row * 2 + to_column % 2] = meta[row, column]
    return (words - (words >= 1 << 31).long() * (1 << 32)).int(), (flat - (flat >= 1 << 15).long() * (1 << 16)).to(torch.int16).view(k // 32, 2 * n)


def tiled_module(n, k, bits, group, seed=0):
    codes = tiled_codes(n, k, bits, seed)
    packed, meta = encode_tiled(codes, bits)
    scale = (ramp(n, k // group if group else 1).abs() + 0.01).half()
    # only where groups are shorter than the kept half of a row are scales permuted
    order = [8 * run + i for run in range(8) for i in (0, 4, 1, 5, 2, 6, 3, 7)] if group and group < k // 2 else list(range(64))
    stored_scale = scale.t().reshape(-1, 64)[:, order].reshape(-1, n).contiguous()
    want = codes.float() * torch.repeat_interleave(scale.float(), group or k, dim=1)
    return {"weight_packed": packed, "scale_packed": stored_scale, "meta": meta}, want


SIZES = [(64, 64, 32), (64, 128, 32), (128, 96, 32), (64, 96, 0), (192, 64, 64)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_tiled_weight_decodes_like_the_naive_encoder_stored_it(bits, size):
    n, k, group = size
    tensors, want = tiled_module(n, k, bits, group)
    config = section(None, tiled_args(bits, group), "marlin-24")
    scheme = scheme_of(config, tensors)
    weight = scheme.to_weight(tensors)
    assert torch.equal(weight.dequantize(), want)
    assert weight.spec == scheme.weight_spec and weight.shape == (n, k)
    assert scheme_of(config, tensors, (n, k)) == scheme


def test_static_input_of_a_tiled_weight_is_read():
    tensors, _ = tiled_module(64, 64, 4, 32)
    config = section(None, tiled_args(4, 32), "marlin-24")
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    tensors["input_scale"] = torch.tensor([0.5])
    assert scheme_of(config, tensors).to_activation(tensors).scale == 0.5


@pytest.mark.parametrize("shape", [None, (64, 64)], ids=["unknown-architecture", "known-architecture"])
@pytest.mark.parametrize("name", ["weight_packed", "scale_packed", "meta"])
def test_missing_and_misshapen_tiles_are_found(name, shape):
    tensors, _ = tiled_module(64, 64, 4, 32)
    config = parse(section(None, tiled_args(4, 32), "marlin-24"))
    module = view({key: value for key, value in tensors.items() if key != name}, shape=shape)
    assert problems_of(config.decide(module).scheme, module) == [f"missing {name}"]
    module = view(tensors | {name: tensors[name][:-1]}, shape=shape or (64, 64))
    assert problems_of(config.decide(module).scheme, module) == [f"shape {name}"]


@pytest.mark.parametrize("shape", [(32, 64), (64, 48), (64, 80)], ids=str)
def test_sizes_that_do_not_fill_tiles_are_refused(shape):
    module = view({"weight_packed": torch.zeros(1, 1, dtype=torch.int32), "scale_packed": torch.ones(1, 1)}, shape=shape)
    with pytest.raises(ShapeMismatchError, match=r"weight_packed.*\n.*N % 64"):
        parse(section(None, tiled_args(4, 32), "marlin-24")).decide(module)


@pytest.mark.parametrize(("name", "change"), [
    ("meta", lambda t: t.zero_()), ("scale_packed", lambda t: t.zero_()), ("scale_packed", lambda t: t.neg_()), ("scale_packed", lambda t: t.fill_(float("nan"))),
], ids=["same-column-twice", "zero-scales", "negative-scales", "nan-scales"])  # fmt: skip
def test_impossible_tiles_are_refused_by_name(name, change):
    tensors, _ = tiled_module(64, 64, 4, 32)
    change(tensors[name])
    scheme = scheme_of(section(None, tiled_args(4, 32), "marlin-24"), tensors)
    with pytest.raises(BadValueError) as error:
        scheme.to_weight(tensors)
    assert error.value.where == name
