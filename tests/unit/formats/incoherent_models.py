"""Small models between Hadamard transforms, and the dense models that they must equal: by matrices, with nothing of the package."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitgrain.formats.hadamard_tables import ROWS
from tests.checkpoints import HEADS, HIDDEN, KV_HEADS, LAYERS, llama_config, llama_tensors, write_checkpoint, write_tokenizer

HEAD_DIM = HIDDEN // HEADS


def dense_hadamard(n: int) -> Tensor:
    """float64 [n, n]: (B_m kron Sylvester) / sqrt(n), B_m read digit by digit from the table."""
    m = next((size for size in sorted(ROWS, reverse=True) if n % size == 0), 1)
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n // m:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    assert len(h) * m == n
    if m > 1:
        bits = "".join(f"{int(digit, 16):04b}" for digit in ROWS[m])
        base = torch.tensor([1.0 if bit == "1" else -1.0 for bit in bits], dtype=torch.float64).view(m, m)
        h = torch.kron(base, h)
    return h / n**0.5


def blocks(n: int, count: int) -> Tensor:
    """`count` such matrices along the diagonal."""
    return torch.block_diag(*[dense_hadamard(n // count)] * count)


def dense_weight(codes: Tensor, inputs: Tensor, outputs: Tensor, on_input: int = 1, on_output: int = 1) -> Tensor:
    """float64 [N, K]: diag(outputs) H_N codes H_K^T diag(inputs), the transforms in that many blocks."""
    n, k = codes.shape
    return outputs.double()[:, None] * (blocks(n, on_output) @ codes.double() @ blocks(k, on_input).T) * inputs.double()[None]


def signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0


def joint_shapes(intermediate: int) -> dict[str, tuple[int, int]]:
    """(N, K) of every matrix of the small Llama, by its name inside a layer."""
    kv = KV_HEADS * HEAD_DIM
    attention = {"q_proj": (HIDDEN, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN), "o_proj": (HIDDEN, HIDDEN)}
    mlp = {"gate_proj": (intermediate, HIDDEN), "up_proj": (intermediate, HIDDEN), "down_proj": (HIDDEN, intermediate)}
    return {f"self_attn.{name}": shape for name, shape in attention.items()} | {f"mlp.{name}": shape for name, shape in mlp.items()}


def write_pair(folder: Path, intermediate: int, params: dict, quantized: dict[str, Tensor], dense: dict[str, Tensor]) -> tuple[Path, Path]:
    """(quantized, dense) checkpoints that share everything but their matrices."""
    config = llama_config(intermediate_size=intermediate, torch_dtype="float32")
    shared = {name: tensor for name, tensor in llama_tensors(dtype=torch.float32).items() if "_proj." not in name}
    assert len(shared) == 3 + 2 * LAYERS
    first = write_tokenizer(write_checkpoint(folder / "quantized", shared | quantized, {**config, "quip_params": params}))
    second = write_checkpoint(folder / "dense", shared | {name: tensor.float() for name, tensor in dense.items()}, config)
    return first, second


def write_module(folder: Path, tensors: dict[str, Tensor], params: dict | None) -> Path:
    """A checkpoint of one module called `layer`."""
    return write_checkpoint(folder, {f"layer.{name}": tensor for name, tensor in tensors.items()}, {} if params is None else {"quip_params": params})


def change(folder: Path, name: str, edit) -> None:
    """Replace one tensor of a checkpoint by edit(tensor); None removes it."""
    tensors = load_file(folder / "model.safetensors")
    new = edit(tensors.pop(name))
    save_file(tensors | ({} if new is None else {name: new}), folder / "model.safetensors", metadata={"format": "pt"})


DAMAGES = {
    "removed": lambda t: None,
    "longer": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)[:1]]) if t.dim() < 2 else torch.cat([t, t[:1]]),
    "another dtype": lambda t: t.to(torch.uint8) if t.is_floating_point() or t.dim() == 0 else t.to(torch.float32),
    "another rank": lambda t: t.reshape(1, 1, 1) if t.dim() == 0 else t[None],
}
NOT_A_NUMBER = {"NaN": lambda t: t.clone().fill_(torch.nan), "zero": torch.zeros_like}
