"""From a GGUF file's metadata to its tokenizer and chat template.

Source: formats specification, part 2, section 1.5; llama.cpp of llama-cpp-python 0.3.36, the vocabulary's loader.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bitgrain.checkpoint.described_tokenizer import PieceScores, SpecialToken, TokenizerDescription
from bitgrain.errors import BitgrainError, ConfigError, DamagedFileError, raise_all
from bitgrain.formats.evidence import Evidence
from bitgrain.formats.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from bitgrain.formats.gguf.vocabulary import CONTROL, FETCH, KEY, UNKNOWN, UNUSED, USER, Vocabulary, read_vocabulary
from bitgrain.formats.matching import nearest_names

SPACE = "▁"
SCORED, RANKED = "llama", "gpt2"
# what other programs read, and this one does not
NO_MODELS = (None, "none", "no_vocab")
OTHER_MODELS = {"bert": "WordPiece", "t5": "unigram", "rwkv": "RWKV", "plamo2": "PLaMo 2", "gemma4": "Gemma 4", "hybriddna": "DNA", "whitespace": "whole words"}
BESIDE = "put the tokenizer.json of the model that the file was made from beside it, or compute from token ids with load_model()"
WHOLE = "tokenizer.huggingface.json"
MAX_SHOWN, MAX_MERGES = 5, 1 << 22
NOT_STATED_BPE_BOS = 11  # the begin token where a ranked vocabulary names none
SCORED_BOS, SCORED_EOS, SCORED_UNKNOWN = 1, 2, 0
# ranked special tokens that keep the white space behind them, in the models whose other ones swallow it
KEEPS_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def describe_tokenizer(evidence: Evidence, beside: bool) -> TokenizerDescription | None:
    """The tokenizer that the file holds; None if one beside it has to serve.

    Raises:
        ConfigError: none, a kind of tokenizer, or rules for cutting text, that are not implemented; and nothing beside the file.
        DamagedFileError, ManyProblemsError: the vocabulary contradicts itself.
    """
    file, found = next(iter(evidence.metadata), "metadata"), evidence.properties
    model, whole = found.get(f"{KEY}model"), found.get(WHOLE)
    if whole is not None:
        return _whole(file, whole, found)
    rules = PRE_TOKENIZERS.get(str(found.get(f"{KEY}pre")))
    if model == SCORED:
        return _scored(read_vocabulary(file, found, SCORED_EOS))
    if model == RANKED and rules is not None:
        return _ranked(read_vocabulary(file, found, None), rules)
    if beside:
        return None
    raise _unknown_rules(file, found.get(f"{KEY}pre")) if model == RANKED else _unknown_model(file, model)


def _unknown_model(file: str, model: object) -> ConfigError:
    kind = OTHER_MODELS.get(model) if isinstance(model, str) else None
    what = "the file holds no tokenizer" if model in NO_MODELS else f"a {kind} tokenizer, which is not implemented" if kind else "a tokenizer that is not known"
    shown = what if model is None else f"{str(model)[:40]!r}: {what}"
    return ConfigError(f"{file}: {KEY}model", shown, f"{SCORED!r} or {RANKED!r}, or the whole tokenizer under {WHOLE}", BESIDE)


def _unknown_rules(file: str, name: object) -> ConfigError:
    near = nearest_names(name, PRE_TOKENIZERS, 3) if isinstance(name, str) else ()
    hint = f" (nearest: {', '.join(near)})" if near else ""
    old = "rules of a time when they had no names, which fit no model well"
    shown = f"absent: {old}" if name is None else f"'default': {old}" if name == "default" else f"{str(name)[:40]!r}, rules that are not known"
    action = f"other rules would cut text wrongly in silence; {BESIDE}, or convert the model again"
    return ConfigError(f"{file}: {KEY}pre", shown, f"the name of rules for cutting text, one of {', '.join(sorted(PRE_TOKENIZERS))}{hint}", action)


def _whole(file: str, text: object, found: Mapping[str, Any]) -> TokenizerDescription:
    where = f"{file}: {WHOLE}"
    try:
        contents = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(where, f"not valid JSON: {error}", "the contents of a tokenizer.json", FETCH) from None
    if not isinstance(contents, dict):
        raise DamagedFileError(where, f"no JSON object: {str(text)[:40]!r}", "the contents of a tokenizer.json", FETCH)
    tokens = found.get(f"{KEY}tokens")
    config: dict[str, Any] = {**_templates(file, found)}
    if isinstance(tokens, list) and tokens:
        vocabulary = read_vocabulary(file, found, None)
        config |= _roles(vocabulary, vocabulary.role("bos"), vocabulary.role("eos"))
        stated = [flag for flag in ("add_bos_token", "add_eos_token") if found.get(KEY + flag) is not None]
        config |= {flag: vocabulary.flag(flag, False) for flag in stated}
        return TokenizerDescription(where, contents, config, {"eos_token_id": list(vocabulary.ends)})
    return TokenizerDescription(where, contents, config)


def _scored(vocabulary: Vocabulary) -> TokenizerDescription:
    """Neighbours merge by the score of the token that they become; bytes of what is no token have tokens of their own."""
    unknown = vocabulary.role("unknown", SCORED_UNKNOWN)
    prefix = SPACE if vocabulary.flag("add_space_prefix", True) else ""
    ids = {text: i for i, text in enumerate(vocabulary.tokens) if i not in vocabulary.unspeakable}
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {"type": "BPE", "byte_fallback": True, "vocab": {text: i for i, text in enumerate(vocabulary.tokens)}, "merges": []}
    tokenizer = _json(vocabulary, model, {"type": "Sequence", "decoders": decoders})
    config = _config(vocabulary, SCORED_BOS, SCORED_EOS, add_bos=True)
    scores = PieceScores(ids, vocabulary.scores, SPACE, prefix, unknown)
    return TokenizerDescription(vocabulary.file, tokenizer, config, {"eos_token_id": list(vocabulary.ends)}, _specials(vocabulary), scores)


def _ranked(vocabulary: Vocabulary, rules: PreTokenizer) -> TokenizerDescription:
    """Byte-pair merging over GPT-2's alphabet of bytes, in pieces that the rules cut."""
    merges = _merges(vocabulary)
    # fillers that keep the embedding's size are no tokens of any text
    fillers = {text for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind == UNUSED}
    if fillers:
        fillers -= {text for left, right in merges for text in (left, right, left + right)}
    vocab = {text: i for i, text in enumerate(vocabulary.tokens) if text not in fillers}
    model = {"type": "BPE", "ignore_merges": rules.ignore_merges, "vocab": vocab, "merges": merges}
    cuts = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in rules.patterns]
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = _json(vocabulary, model, bytewise, {"type": "Sequence", "pretokenizers": [*cuts, bytewise]})
    bos = NOT_STATED_BPE_BOS if rules.has_bos else None
    config = _config(vocabulary, bos, NOT_STATED_BPE_BOS, rules.add_bos)
    return TokenizerDescription(vocabulary.file, tokenizer, config, {"eos_token_id": list(vocabulary.ends)}, _specials(vocabulary))


def _merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Pairs of tokens by rank."""
    where = f"{vocabulary.file}: {KEY}merges"
    stored = vocabulary.properties.get(f"{KEY}merges")
    if not isinstance(stored, list) or not all(isinstance(merge, str) for merge in stored):
        raise DamagedFileError(where, "absent" if stored is None else "no list of texts", "the merges of the vocabulary, 'left right' each", FETCH)
    if len(stored) > MAX_MERGES:
        raise DamagedFileError(where, f"{len(stored)} merges", f"at most {MAX_MERGES}", FETCH)
    known, problems = set(vocabulary.tokens), []
    pairs: dict[tuple[str, str], None] = {}  # the first of equal ones counts
    for rank, merge in enumerate(stored):
        at = merge.find(" ", 1)  # a space at the very beginning is part of the left side
        left, right = merge[:at], merge[at + 1 :]
        if at < 0 or left not in known or right not in known or left + right not in known:
            problems.append(_bad_merge(where, rank, merge, known))
            if len(problems) == MAX_SHOWN:
                break
        pairs[left, right] = None
    raise_all(where, problems)
    return list(pairs)


def _bad_merge(where: str, rank: int, merge: str, known: set[str]) -> BitgrainError:
    left, _, right = merge.partition(" ")
    lost = next((text for text in (left, right, left + right) if text not in known), None)
    why = f"names {_shown(lost)}, which is no token" if left and right and lost is not None else "has no two sides"
    return DamagedFileError(where, f"merge {rank}, {_shown(merge)}, {why}", "two tokens, whose joined texts are a token", FETCH)


def _shown(text: str) -> str:
    return repr(text[:40].encode("utf-8", "replace").decode("utf-8"))


def _json(vocabulary: Vocabulary, model: Mapping[str, Any], decoder: Mapping[str, Any], pre_tokenizer: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Contents of a tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": t.token_id, "content": t.text, "special": t.control, **flags} for t in sorted(_specials(vocabulary), key=lambda t: t.token_id)]
    return {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model}


def _specials(vocabulary: Vocabulary) -> tuple[SpecialToken, ...]:
    """Control, unknown and user-defined tokens, the longest first, in the order in which they are looked for."""
    name = vocabulary.properties.get("general.name")
    strips = isinstance(name, str) and any(part in name.lower() for part in ("phi-3", "phi3"))
    found = []
    for i, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        if kind in (CONTROL, UNKNOWN, USER) and i not in vocabulary.unspeakable:
            found.append(SpecialToken(text, i, kind != USER, strips and text not in KEEPS_SPACE))
    return tuple(sorted(found, key=lambda token: -len(token.text.encode())))


def _config(vocabulary: Vocabulary, bos: int | None, eos: int, add_bos: bool) -> dict[str, Any]:
    """tokenizer_config.json's contents; `bos` and `eos`: where the file names none but wants one put there."""
    config = {**_roles(vocabulary, vocabulary.role("bos"), vocabulary.role("eos")), **_templates(vocabulary.file, vocabulary.properties)}
    for flag, key, default, wanted in (("add_bos_token", "bos", bos, add_bos), ("add_eos_token", "eos", eos, False)):
        config[flag] = vocabulary.flag(flag, wanted)
        token = vocabulary.role(key, default)
        if config[flag] and token is None:
            raise ConfigError(f"{vocabulary.file}: {KEY}{key}_token_id", f"absent, with {KEY}{flag} true", "the id of a token", FETCH)
        if config[flag] and token is not None:
            config[f"{key}_token"] = vocabulary.tokens[token]
    return config


def _roles(vocabulary: Vocabulary, bos: int | None, eos: int | None) -> dict[str, Any]:
    """Texts of the tokens with a role, as chat templates use them."""
    ids = {"bos": bos, "eos": eos, "unk": vocabulary.role("unknown"), "pad": None}
    padding = vocabulary.properties.get(f"{KEY}padding_token_id")
    if isinstance(padding, int) and 0 <= padding < len(vocabulary.tokens):
        ids["pad"] = padding
    return {f"{name}_token": vocabulary.tokens[i] for name, i in ids.items() if i is not None}


def _templates(file: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """`chat_template`: one text, or a list of named ones."""
    prefix = "tokenizer.chat_template"
    plain, names = found.get(prefix), found.get(f"{prefix}s")
    for key, value, fits in ((prefix, plain, isinstance(plain, str)), (f"{prefix}s", names, isinstance(names, list) and all(isinstance(n, str) for n in names))):
        if value is not None and not fits:
            raise ConfigError(f"{file}: {key}", f"a {type(value).__name__}", "a template" if key == prefix else "a list of names", FETCH)
    named = {str(name): found.get(f"{prefix}.{name}") for name in names or ()}
    for name, template in named.items():
        if not isinstance(template, str):
            raise ConfigError(f"{file}: {prefix}.{name}", "absent" if template is None else f"a {type(template).__name__}", f"a template, as {prefix}s names it", FETCH)
    if plain is not None:
        named.setdefault("default", plain)
    if set(named) <= {"default"}:
        return {"chat_template": named["default"]} if named else {}
    return {"chat_template": [{"name": name, "template": template} for name, template in named.items()]}
