"""A checkpoint of compare_models.py as a model of OpenVINO, with the same weights bit for bit.

    PYTHON benchmarks/compare_openvino.py FOLDER/w4 FOLDER/ov-w4 [--head-bits 8]

PYTHON is that of an environment that has the package openvino; nothing else is needed.  Codes and scales are those of the
safetensors file: four bits as i4 [N, K / group, group] with scales [N, K / group, 1], bytes as i8 [N, K] with scales [N, 1], all
multiplied out by nodes that OpenVINO folds into its products.  Scales are stored as float16, and a scale that float16 would round
is refused; embedding and head stay bfloat16.  OpenVINO 2026.4 holds a head of floats as float32 where the processor multiplies no
bfloat16, twice the bytes; with --head-bits 8 the head is rounded to bytes per row, as its own exporter does.  The graph is what openvino-genai expects of a decoder: input_ids, attention_mask,
position_ids and beam_idx, caches as variables [batch, heads, tokens, head size].  Matrices are mapped, never held all at once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino.op import Constant
from openvino.op.util import Variable, VariableInfo

MASKED = np.float32(-65504)  # the least float16


class Checkpoint:
    """A folder with config.json and one model.safetensors, mapped."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        path = folder / "model.safetensors"
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._entries = json.loads(file.read(length))
        self._data = np.memmap(path, np.uint8, "r", 8 + length)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> list[int]:
        return self._entries[name]["shape"]

    def raw(self, name: str, dtype: str) -> np.ndarray:
        """uint8 [bytes of the tensor], which must have this type."""
        entry = self._entries[name]
        if entry["dtype"] != dtype:
            raise SystemExit(f"{name} is {entry['dtype']}, not {dtype}")
        return self._data[slice(*entry["data_offsets"])]

    def floats(self, name: str) -> np.ndarray:
        """float32 of a bfloat16 tensor."""
        bits = self.raw(name, "BF16").view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(self.shape(name))


def constant(data: np.ndarray, shape: list[int], dtype: ov.Type) -> ov.Node:
    """A constant of the bytes in data."""
    tensor = ov.Tensor(dtype, ov.Shape(shape))
    np.copyto(np.asarray(tensor.data).reshape(-1).view(np.uint8), data)
    return Constant(tensor, shared_memory=True)


def integers(values: list[int]) -> ov.Node:
    return ops.constant(np.array(values, dtype=np.int64))


def half(name: str, values: np.ndarray) -> np.ndarray:
    """The same values as float16."""
    found = values.astype(np.float16)
    if not np.array_equal(found.astype(np.float32), values):
        raise SystemExit(f"{name}: float16 would round it")
    return found


def codes_of_fours(words: np.ndarray) -> np.ndarray:
    """uint8 [bytes]: i4 with the first of two codes in the low half, from codes that are stored plus eight, the first in the lowest."""
    return words ^ np.uint8(0x88)


def rounded(values: np.ndarray) -> ov.Node:
    """float32 [N, K] of values that are rounded to bytes, a scale for each row."""
    scale = np.maximum(np.abs(values).max(1, keepdims=True) / 127, 1e-7).astype(np.float16)
    codes = np.clip(np.rint(values / scale.astype(np.float32)), -127, 127).astype(np.int8)
    return ops.convert(ops.multiply(ops.convert(ops.constant(codes), "f16"), ops.constant(scale)), "f32")


def matrix(held: Checkpoint, base: str) -> ov.Node:
    """float32 [N, K] of a module, as a graph of its stored form."""
    if f"{base}.weight_packed" in held:
        n, groups = held.shape(f"{base}.weight_scale")
        k = 8 * held.shape(f"{base}.weight_packed")[1]
        codes = constant(codes_of_fours(held.raw(f"{base}.weight_packed", "I32")), [n, groups, k // groups], ov.Type.i4)
        scale = half(base, held.floats(f"{base}.weight_scale")).reshape(n, groups, 1)
        wide = ops.reshape(ops.multiply(ops.convert(codes, "f16"), ops.constant(scale)), integers([n, k]), False)
        return ops.convert(wide, "f32")
    name = f"{base}.weight"
    if f"{base}.weight_scale" in held:
        codes = constant(held.raw(name, "I8"), held.shape(name), ov.Type.i8)
        scale = half(base, held.floats(f"{base}.weight_scale"))
        return ops.convert(ops.multiply(ops.convert(codes, "f16"), ops.constant(scale)), "f32")
    return ops.convert(constant(held.raw(name, "BF16"), held.shape(name), ov.Type.bf16), "f32")


class Decoder:
    """The graph of a Llama model; all products in float32 as far as the graph says, rotation in halves."""

    def __init__(self, held: Checkpoint, head_bits: int) -> None:
        self.held, self.head_bits = held, head_bits
        config = held.config
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.size = config.get("head_dim") or config["hidden_size"] // self.heads
        self.tokens = self._input("input_ids", [-1, -1], ov.Type.i64)
        self.mask = self._input("attention_mask", [-1, -1], ov.Type.i64)
        self.positions = self._input("position_ids", [-1, -1], ov.Type.i64)
        self.beams = self._input("beam_idx", [-1], ov.Type.i32)
        self.batch = ops.gather(ops.shape_of(self.tokens), integers([0]), integers([0]))
        self.cos, self.sin = self._rotation()
        self.allowed: ov.Node | None = None
        self.sinks: list[ov.Node] = []

    @staticmethod
    def _input(name: str, shape: list[int], dtype: ov.Type) -> ov.Node:
        found = ops.parameter(shape, dtype)
        found.set_friendly_name(name)  # openvino-genai finds the tokens by it, and the others by the name of the output
        found.output(0).set_names({name})
        return found

    def _rotation(self) -> tuple[ov.Node, ov.Node]:
        """float32 [batch, 1, tokens, head size] each."""
        frequency = self.held.config["rope_theta"] ** (-np.arange(0, self.size, 2, dtype=np.float64) / self.size)
        column = ops.unsqueeze(ops.convert(self.positions, "f32"), integers([1]))  # [batch, 1, tokens]
        rows = ops.broadcast(ops.constant(frequency.astype(np.float32).reshape(1, -1, 1)), ops.concat([self.batch, integers([1]), integers([1])], 0), broadcast_spec="BIDIRECTIONAL")
        angle = ops.transpose(ops.matmul(rows, column, False, False), integers([0, 2, 1]))
        both = ops.concat([angle, angle], -1)
        return ops.unsqueeze(ops.cos(both), integers([1])), ops.unsqueeze(ops.sin(both), integers([1]))

    def linear(self, x: ov.Node, base: str) -> ov.Node:
        return ops.matmul(x, matrix(self.held, base), False, True)

    def norm(self, x: ov.Node, name: str) -> ov.Node:
        square = ops.reduce_mean(ops.power(x, np.float32(2)), integers([-1]), True)
        scale = ops.divide(np.float32(1), ops.sqrt(ops.add(square, np.float32(self.held.config["rms_norm_eps"]))))
        return ops.multiply(ops.multiply(x, scale), ops.constant(self.held.floats(name).reshape(1, 1, -1)))

    def split(self, x: ov.Node, heads: int) -> ov.Node:
        """[batch, heads, tokens, head size]"""
        return ops.transpose(ops.reshape(x, integers([0, 0, heads, self.size]), True), integers([0, 2, 1, 3]))

    def rotated(self, x: ov.Node) -> ov.Node:
        middle, step, last = integers([self.size // 2]), integers([1]), integers([3])
        lower = ops.slice(x, integers([0]), middle, step, last)
        upper = ops.slice(x, middle, integers([np.iinfo(np.int64).max]), step, last)
        return ops.add(ops.multiply(x, self.cos), ops.multiply(ops.concat([ops.multiply(upper, np.float32(-1)), lower], -1), self.sin))

    def cached(self, x: ov.Node, name: str) -> ov.Node:
        """What the variable holds, and x behind it; the variable holds both from then on."""
        shape = ops.concat([self.batch, integers([self.kv_heads]), integers([0]), integers([self.size])], 0)
        info = VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape([-1, self.kv_heads, -1, self.size]), ov.Type.f32, name
        variable = Variable(info)
        before = ops.gather(ops.read_value(ops.broadcast(np.float32(0), shape), variable), self.beams, ops.constant(np.int64(0)))
        joined = ops.concat([before, x], 2)
        self.sinks.append(ops.assign(joined, variable))
        return joined

    def spread(self, x: ov.Node) -> ov.Node:
        """Each key or value head as many times as query heads share it."""
        if self.heads == self.kv_heads:
            return x
        shape = ops.shape_of(x)
        first, tokens = (ops.gather(shape, integers([axis]), integers([0])) for axis in (0, 2))
        wide = ops.concat([first, integers([self.kv_heads]), integers([self.heads // self.kv_heads]), tokens, integers([self.size])], 0)
        return ops.reshape(ops.broadcast(ops.unsqueeze(x, integers([2])), wide, broadcast_spec="BIDIRECTIONAL"), integers([0, self.heads, -1, self.size]), True)

    def bias(self, keys: ov.Node) -> ov.Node:
        """float32 [batch, 1, tokens, tokens of the cache]: 0 where a token may look, the same for all layers."""
        if self.allowed is None:
            total = ops.gather(ops.shape_of(keys), ops.constant(np.int64(2)), ops.constant(np.int64(0)))
            key = ops.range(ops.constant(np.int64(0)), total, ops.constant(np.int64(1)), "i64")
            seen = ops.less_equal(ops.unsqueeze(key, integers([0, 1, 2])), ops.unsqueeze(self.positions, integers([1, 3])))
            kept = ops.greater(ops.unsqueeze(self.mask, integers([1, 2])), ops.constant(np.int64(0)))
            self.allowed = ops.select(ops.logical_and(seen, kept), np.float32(0), MASKED)
        return self.allowed

    def attention(self, x: ov.Node, layer: int) -> ov.Node:
        base = f"model.layers.{layer}.self_attn"
        query = self.rotated(self.split(self.linear(x, f"{base}.q_proj"), self.heads))
        key = self.cached(self.rotated(self.split(self.linear(x, f"{base}.k_proj"), self.kv_heads)), f"past_key_values.{layer}.keypresent.{layer}.key")
        value = self.cached(self.split(self.linear(x, f"{base}.v_proj"), self.kv_heads), f"past_key_values.{layer}.valuepresent.{layer}.value")
        found = ops.scaled_dot_product_attention(query, self.spread(key), self.spread(value), self.bias(key), causal=False)
        return self.linear(ops.reshape(ops.transpose(found, integers([0, 2, 1, 3])), integers([0, 0, self.heads * self.size]), True), f"{base}.o_proj")

    def mlp(self, x: ov.Node, layer: int) -> ov.Node:
        base = f"model.layers.{layer}.mlp"
        return self.linear(ops.multiply(ops.swish(self.linear(x, f"{base}.gate_proj")), self.linear(x, f"{base}.up_proj")), f"{base}.down_proj")

    def model(self) -> ov.Model:
        x = ops.gather(matrix(self.held, "model.embed_tokens"), self.tokens, ops.constant(np.int64(0)))
        for layer in range(self.held.config["num_hidden_layers"]):
            base = f"model.layers.{layer}"
            x = ops.add(x, self.attention(self.norm(x, f"{base}.input_layernorm.weight"), layer))
            x = ops.add(x, self.mlp(self.norm(x, f"{base}.post_attention_layernorm.weight"), layer))
        head = matrix(self.held, "lm_head") if self.head_bits == 16 else rounded(self.held.floats("lm_head.weight"))
        logits = ops.matmul(self.norm(x, "model.norm.weight"), head, False, True)
        logits.output(0).set_names({"logits"})
        return ov.Model([ops.result(logits, name="logits")], self.sinks, [self.tokens, self.mask, self.positions, self.beams], "decoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--head-bits", type=int, choices=(8, 16), default=16)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    held = Checkpoint(args.checkpoint)
    ov.save_model(Decoder(held, args.head_bits).model(), args.out / "openvino_model.xml", compress_to_fp16=False)
    # last: a folder with it is whole
    (args.out / "config.json").write_text(json.dumps({key: value for key, value in held.config.items() if key != "quantization_config"}, indent=1))


if __name__ == "__main__":
    main()
