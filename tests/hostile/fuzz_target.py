"""What a fuzzer runs on bytes that claim to be a GGUF model: open it, decode a little of it; only BitgrainError may come out.

    python -m tests.hostile.fuzz_target CORPUS_FOLDER -max_total_time=600 -timeout=10 -rss_limit_mb=2048

needs the package atheris.  Inputs that are worth keeping lie in tests/hostile/corpus; test_fuzz_corpus.py runs each of them.
An input may hold several files: shards of a split model, divided by SHARD.
"""

from __future__ import annotations

import random
import re
import struct
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # at run time the package is imported in functions: after the fuzzer has hooked its import
    import bitgrain

SHARD = b"\xff\xfeSHARD\xfe\xff"
MAX_SHARDS = 3
# parameters that are decoded of one model: enough for the seeds, and quick
MAX_DECODED = 1 << 18
KEY = re.compile(rb"[a-z0-9_]+(?:\.[a-z0-9_]+)+")
WORDS = (0, 1, 2, 3, 8, 9, 31, 32, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def run_input(data: bytes, folder: Path) -> str:
    """"opened", or the name of the error that refused the input.

    Raises:
        Exception: anything but a BitgrainError is a defect.
    """
    import bitgrain
    from bitgrain.errors import BitgrainError

    files = data.split(SHARD)[:MAX_SHARDS]
    names = ["m.gguf"] if len(files) == 1 else [f"m-{i + 1:05d}-of-{len(files):05d}.gguf" for i in range(len(files))]
    for name, content in zip(names, files, strict=True):
        (folder / name).write_bytes(content)
    try:
        checkpoint = bitgrain.open_checkpoint(folder / names[0])
        checkpoint.plan.to_json()
        decode(checkpoint)
        read_tokenizer(checkpoint)
    except BitgrainError as error:
        str(error)
        return type(error).__name__
    finally:
        for name in names:
            (folder / name).unlink()
    return "opened"


def decode(checkpoint: bitgrain.api.Checkpoint) -> None:
    left = MAX_DECODED
    for name, row in checkpoint.plan.modules.items():
        if row.scheme is not None and row.tensors and row.shape[0] * row.shape[1] <= left:
            left -= row.shape[0] * row.shape[1]
            checkpoint.dequantize(f"{name}.weight")


def read_tokenizer(checkpoint: bitgrain.api.Checkpoint) -> None:
    from bitgrain.engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_checkpoint(checkpoint.files)
    ids = tokenizer.encode("a b  c\n1234 \u00e9\u4e2d")
    tokenizer.decode(ids)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time the engine's own mutation; else a number behind some key, or a tensor's size, becomes a special one."""
    import atheris

    dice = random.Random(seed)
    if dice.random() < 0.4:
        return bytes(atheris.Mutate(data, max_size))
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        places = [found.end() for found in KEY.finditer(bytes(changed))]
        if not places:
            break
        at = dice.choice(places) + dice.choice((0, 4, 4, 4, 8, 12, 16, 20, 24, 28))
        form = dice.choice("BIQ")
        word = dice.choice((*WORDS, dice.getrandbits(8), dice.getrandbits(16))) & (2 ** (8 * struct.calcsize(form)) - 1)
        changed[at : at + struct.calcsize(form)] = struct.pack(f"<{form}", word)
    if dice.random() < 0.1:
        del changed[dice.randrange(len(changed) + 1) :]
    return bytes(changed[:max_size])


def main() -> None:
    import atheris

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        atheris.Setup(sys.argv, lambda data: run_input(data, Path(folder)), custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["bitgrain"], enable_loader_override=False):
        import bitgrain.engine.tokenizer
        import bitgrain.formats.gguf
        import bitgrain.models.loading
    main()
