"""Trains the demo tokenizer: byte-level BPE, one token per digit, `<s>` added in front of plain text."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from problems import training_documents

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCABULARY = 512
TRAINING_SEED = 11

# A document is <s>, the problem, a line break, the worked answer, </s>; a conversation is one document after the
# other. System messages are left out: the model has never seen one. Content may be a string or a list of text parts.
CHAT_TEMPLATE = (
    "{%- macro text(content) -%}"
    "{%- if content is string -%}{{ content | trim }}"
    "{%- else -%}{%- for part in content -%}{{ part.text | trim }}{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{ bos_token + text(message.content) + '\\n' }}"
    "{%- elif message.role == 'assistant' -%}"
    "{%- if loop.first -%}{{ bos_token }}{%- endif -%}{{ text(message.content) + eos_token }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def trained(documents: int) -> Tokenizer:
    """A tokenizer trained on the first documents of the stream."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{d.prompt}\n{d.answer}" for d in itertools.islice(training_documents(TRAINING_SEED), documents))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Saves tokenizer.json and tokenizer_config.json into a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Trains and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("src/bitgrain/bundled/arithmetic-bf16"))
    parser.add_argument("--documents", type=int, default=60_000)
    arguments = parser.parse_args()
    write(trained(arguments.documents), arguments.out)


if __name__ == "__main__":
    main()
