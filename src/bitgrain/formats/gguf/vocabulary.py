"""The vocabulary in a GGUF file's metadata: tokens, what kind each is, scores, and the ids with a role.

Source: formats specification, part 2, section 1.5; llama.cpp of llama-cpp-python 0.3.36, the vocabulary's loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from typing import Any

from bitgrain.errors import BitgrainError, ConfigError, DamagedFileError, raise_all
from bitgrain.formats.config_reader import words

KEY = "tokenizer.ggml."
FETCH = "fetch or write the file again"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
KINDS = {0: "undefined", NORMAL: "normal", UNKNOWN: "unknown", CONTROL: "control", USER: "user-defined", UNUSED: "unused", BYTE: "byte"}
MAX_TOKENS = 1 << 21
MAX_TOKEN_BYTES = 1 << 16

# Tokens that end a text or a turn wherever they occur in a vocabulary: the metadata of older files name but one of them.
END_TEXTS = words(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] "
    "<|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~["
)
# Tokens for filling in the middle, by the keys that may name one; the last three roles end a text too.
MIDDLE_TEXTS: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("fim_pre", "prefix"): ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>"),
    ("fim_suf", "suffix"): ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>"),
    ("fim_mid", "middle"): ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>"),
    ("fim_pad",): ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("fim_rep",): ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("fim_sep",): ("<|file_sep|>",),
}
ENDING_ROLES = ("fim_pad", "fim_rep", "fim_sep")
# Marks of the channels of an answer, which are part of its text.
SHOWN_TEXTS = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id.

    Args:
        tokens:   texts, all different; bytes that are no UTF-8 show as U+FFFD.
        kinds:    one of KINDS each.
        scores:   0 where the file has none.
        unspeakable: ids of tokens whose bytes are no UTF-8: no text becomes them.
        ends:     ids that end a text.
    """

    file: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    unspeakable: frozenset[int]
    ends: tuple[int, ...]
    properties: Mapping[str, Any]

    def role(self, name: str, default: int | None = None) -> int | None:
        """Id of the token with a role ("bos"); the default where the file does not say, if there is such a token."""
        stated = self.properties.get(f"{KEY}{name}_token_id")
        if stated is None:
            return default if default is not None and default < len(self.tokens) else None
        return int(stated)

    def flag(self, name: str, default: bool) -> bool:
        value = self.properties.get(KEY + name)
        return default if value is None else bool(value)


def read_vocabulary(file: str, properties: Mapping[str, Any], ends_by_default: int | None) -> Vocabulary:
    """The checked vocabulary.

    Args:
        ends_by_default: the end token of the kind of tokenizer, where the file names none.
    Raises:
        ConfigError, DamagedFileError, ManyProblemsError: lists that are absent, disagree, or hold what they must not; ids without a token.
    """
    problems: list[BitgrainError] = []
    raw = _list_of(file, properties, "tokens", str, problems)
    if not raw:
        raise_all(file, problems)
        raise ConfigError(f"{file}: {KEY}tokens", "absent or empty", "the tokens of the vocabulary", FETCH)
    if len(raw) > MAX_TOKENS:
        raise DamagedFileError(f"{file}: {KEY}tokens", f"{len(raw)} tokens", f"at most {MAX_TOKENS}", FETCH)
    tokens, unspeakable = _readable(file, raw, problems)
    kinds = _per_token(file, properties, "token_type", int, len(raw), NORMAL, problems)
    scores = _per_token(file, properties, "scores", (int, float), len(raw), 0.0, problems)
    strange = [i for i, kind in enumerate(kinds) if kind not in KINDS]
    if strange:
        found = f"{kinds[strange[0]]} for token {strange[0]}" + (f", and {len(strange) - 1} more" if len(strange) > 1 else "")
        problems.append(DamagedFileError(f"{file}: {KEY}token_type", found, f"one of {', '.join(f'{k} ({v})' for k, v in KINDS.items())}", FETCH))
    if any(isnan(score) for score in scores):
        problems.append(DamagedFileError(f"{file}: {KEY}scores", "a score that is not a number", "numbers", FETCH))
    _check_roles(file, properties, len(raw), problems)
    raise_all(file, problems)
    kinds, ends = _settle(tokens, kinds, properties)
    stated = [properties.get(f"{KEY}{name}_token_id") for name in ("eos", "eot", "eom")]
    if stated[0] is None and ends_by_default is not None and ends_by_default < len(tokens):
        stated[0] = ends_by_default
    ends = tuple(dict.fromkeys([*(i for i in stated if i is not None), *ends]))
    return Vocabulary(file, tokens, kinds, tuple(map(float, scores)), unspeakable, ends, properties)


def _list_of(file: str, properties: Mapping[str, Any], name: str, kind: Any, problems: list[BitgrainError]) -> list[Any]:
    """The list under a key, empty if it is absent or no such list."""
    value = properties.get(KEY + name)
    if value is None:
        return []
    if not isinstance(value, list) or any(not isinstance(v, kind) or isinstance(v, bool) for v in value):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        found = f"a list that holds {sorted({type(v).__name__ for v in value})}" if isinstance(value, list) else f"a {type(value).__name__}"
        problems.append(DamagedFileError(f"{file}: {KEY}{name}", found, f"a list of {kinds}", FETCH))
        return []
    return value


def _per_token(file: str, properties: Mapping[str, Any], name: str, kind: Any, count: int, absent: Any, problems: list[BitgrainError]) -> tuple[Any, ...]:
    found = _list_of(file, properties, name, kind, problems)
    if found and len(found) != count:
        problems.append(DamagedFileError(f"{file}: {KEY}{name}", f"{len(found)} entries", f"one for each of the {count} tokens", FETCH))
    return tuple(found) if len(found) == count else (absent,) * count


def _readable(file: str, raw: list[str], problems: list[BitgrainError]) -> tuple[tuple[str, ...], frozenset[int]]:
    """Texts of all tokens, and the ids of those that were no UTF-8; empty ones get a name, as the format's runtime gives it."""
    tokens: dict[str, int] = {}
    unspeakable = set()
    for i, stored in enumerate(raw):
        text = stored or f"[EMPTY_{i}]"
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") + f"\ufffd{i}"
                unspeakable.add(i)
        if len(text) > MAX_TOKEN_BYTES:
            problems.append(DamagedFileError(f"{file}: {KEY}tokens", f"token {i} has {len(text)} characters", f"at most {MAX_TOKEN_BYTES}", FETCH))
        first = tokens.setdefault(text, i)
        if first != i:
            problems.append(DamagedFileError(f"{file}: {KEY}tokens", f"{text[:60]!r} is token {first} and token {i}", "every token once", FETCH))
            return tuple(tokens), frozenset()
    return tuple(tokens), frozenset(unspeakable)


def _check_roles(file: str, properties: Mapping[str, Any], count: int, problems: list[BitgrainError]) -> None:
    for role in ("bos", "eos", "eot", "eom", "unknown"):
        key = f"{KEY}{role}_token_id"
        value = properties.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count):
            problems.append(ConfigError(f"{file}: {key}", repr(value)[:40], f"the id of one of the {count} tokens", FETCH))
    for flag in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        value = properties.get(KEY + flag)
        if value is not None and not isinstance(value, bool):
            problems.append(ConfigError(f"{file}: {KEY}{flag}", repr(value)[:40], "true or false", FETCH))


def _settle(tokens: tuple[str, ...], kinds: tuple[int, ...], properties: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(kinds, ids that end a text) with the kinds that some texts have whatever the file calls them."""
    ids = {text: i for i, text in enumerate(tokens)}
    settled = dict(enumerate(kinds))
    ends = {text for text in END_TEXTS if text in ids}
    for names, texts in MIDDLE_TEXTS.items():
        stated = [i for name in names if isinstance(i := properties.get(f"{KEY}{name}_token_id"), int) and 0 <= i < len(tokens)]
        present = [] if stated else [text for text in texts if text in ids]
        settled.update({ids[text]: CONTROL for text in present})
        if names[0] in ENDING_ROLES:
            ends |= {*(tokens[i] for i in stated), *present}
    settled.update({ids[text]: CONTROL for text in ends & END_TEXTS})
    settled.update({ids[text]: USER for text in SHOWN_TEXTS if text in ids})
    # where answers have channels, a channel's end does not end the answer
    if "<|end|>" in ends and ({"<|return|>", "<|call|>"} <= ends or ("<|flush|>" in ends and ends & {"<|call|>", "<|calls|>"})):
        ends.discard("<|end|>")
        settled[ids["<|end|>"]] = USER
    if "<|tool_response>" in ends and "</s>" in ends:
        ends.discard("</s>")
        settled[ids["</s>"]] = NORMAL
    return tuple(settled[i] for i in range(len(tokens))), tuple(sorted(ids[text] for text in ends))
