"""A model without weights and tokenizers without files, small enough that a test's time is the engine's own."""

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from bitgrain.engine.tokenizer import Tokenizer as BitgrainTokenizer

PAD, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3
VOCAB = FIRST_BYTE + 256 + 40  # more than the tokenizer has, as padded vocabularies do

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' and not loop.first -%}{{ raise_exception('system must come first') }}{%- endif -%}"
    "[{{ message.role }}] {{ message.content }}\n"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}[assistant] {%- endif -%}"
)


@dataclass
class FakeCache:
    max_tokens: int
    history: list[int] = field(default_factory=list)

    def truncate(self, length):
        del self.history[length:]


@dataclass
class FakeModel:
    """Logits that depend on the whole history of a sequence and on nothing else.

    Args:
        script: text that is generated, whatever the prompt, then the end token; None: pseudo-random tokens.
        fail_on: a token that makes the step raise.
        nan_on:  a token after which the logits are NaN.
        gate:    when given, each step waits for it.
    """

    script: list[int] | None = None
    fail_on: int | None = None
    nan_on: int | None = None
    gate: threading.Event | None = None
    max_context: int = 512
    vocab_size: int = VOCAB
    batches: list[list[int]] = field(default_factory=list)
    fail_caches: int = 0

    def __post_init__(self):
        self.config = SimpleNamespace(eos_token_ids=(EOS,))

    def new_cache(self, max_tokens):
        if self.fail_caches:
            self.fail_caches -= 1
            raise MemoryError("no room for a cache")
        return FakeCache(max_tokens)

    def explain(self):
        refused = [{"kernel": "other.kernel", "fidelity": None, "reason": "no such instruction"}]
        return [
            {
                "modules": "layers.*",
                "count": 2,
                "problem": "linear",
                "platform": "fake",
                "kernel": "fake.kernel",
                "fidelity": "exact",
                "candidates": refused,
            }
        ]

    def forward(self, batch):
        if self.gate is not None:
            assert self.gate.wait(30)
        self.batches.append([s.length for s in batch.segments])
        wanted = set(batch.logit_rows.tolist())
        rows = []
        for segment in batch.segments:
            span = slice(segment.start, segment.start + segment.length)
            tokens, positions = batch.tokens[span].tolist(), batch.positions[span].tolist()
            if self.fail_on in tokens:
                raise RuntimeError(f"token {self.fail_on} is cursed")
            history = segment.cache.history
            assert positions == list(range(len(history), len(history) + len(tokens))), "positions must continue the cache"
            history.extend(tokens)
            assert len(history) <= segment.cache.max_tokens
            if segment.start + segment.length - 1 in wanted:
                rows.append(self._logits(history))
        assert len(rows) == len(wanted), "logits are asked for at the end of a segment only"
        return torch.stack(rows) if rows else torch.zeros(0, self.vocab_size)

    def _logits(self, history):
        if self.nan_on is not None and self.nan_on in history:
            return torch.full((self.vocab_size,), float("nan"))
        generator = torch.Generator().manual_seed(hash(tuple(history)) & 0x7FFFFFFF)
        logits = torch.randn(self.vocab_size, generator=generator) * 2
        logits[[PAD, BOS, EOS]] = -20
        logits[FIRST_BYTE + 256 :] = -20
        if self.script is not None:
            done = len(history) - self._prompt_length(history)
            logits[self.script[done] if done < len(self.script) else EOS] = 50
        return logits

    def _prompt_length(self, history):
        """The script has begun where the history ends with a beginning of it."""
        for size in range(min(len(self.script), len(history)), 0, -1):
            if history[-size:] == self.script[:size]:
                return len(history) - size
        return len(history)


def ids_of(text):
    """Tokens of the byte tokenizer without the ones around the text."""
    return [FIRST_BYTE + byte for byte in text.encode()]


def byte_backend(extra=()):
    """One token per byte, three special tokens, BOS in front."""
    alphabet = _byte_letters()
    vocab = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, **{alphabet[b]: FIRST_BYTE + b for b in range(256)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<s>", "</s>")])
    backend.add_tokens(list(extra))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return backend


def _byte_letters():
    """The printable letter that byte-level tokenizers write for each byte: unprintable ones move behind U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in printable]
    return {b: chr(b) if b in printable else chr(256 + moved.index(b)) for b in range(256)}


CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}


def byte_tokenizer(template=TEMPLATE, **config):
    return BitgrainTokenizer(byte_backend(), {**CONFIG, **config}, {"eos_token_id": [EOS]}, {}, template)


def fallback_tokenizer():
    """The other family: words with a mark in front, and byte tokens that decode all together."""
    words = ["▁", "▁a", "b", "▁the", "é", "�"]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return BitgrainTokenizer(backend, CONFIG)
