"""A checkpoint's tokenizer: text to tokens and back, end tokens and the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgrain.checkpoint.described_tokenizer import TokenizerDescription
from bitgrain.engine.chat_template import ChatTemplate
from bitgrain.engine.fragments import FragmentEncoder, ScoreMerger
from bitgrain.engine.sampling import suggested_by
from bitgrain.engine.text_stream import TextStream
from bitgrain.errors import ConflictingConfigError, DamagedFileError, MissingDependencyError, RequestError

if TYPE_CHECKING:
    import tokenizers

    from bitgrain.checkpoint.files import CheckpointFiles

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
    """What `tokenizer.json` and the small files next to it say.

    Args:
        backend:    the parsed tokenizer.json; truncation and padding are switched off, since a prompt is never cut in silence.
        config:     tokenizer_config.json.
        generation: generation_config.json.
        model:      config.json.
        template:   source of the chat template; None: there is none.
        where:      folder, for messages.
        encoder:    (text, parse special tokens) to ids, where not the library's rules apply but a container's own.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        template: str | None = None,
        where: str = "tokenizer",
        encoder: Callable[[str, bool], list[int]] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._config, self._where, self._encoder = backend, dict(config or {}), where, encoder
        self._template_source = template if template is not None else _template_of(self._config)
        self.bos_token = _token_text(self._config.get("bos_token"))
        self.eos_token = _token_text(self._config.get("eos_token"))
        self.eos_token_ids = self._find_eos(generation or {}, model or {})
        self.suggested_sampling = suggested_by(generation or {})
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        skipped = (i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._open_tokens = frozenset([*skipped, *(i for token, i in vocabulary.items() if _BYTE_TOKEN.fullmatch(token))])

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder (or of the folder that a checkpoint file is in).

        Raises:
            DamagedFileError: tokenizer.json is absent, or a file cannot be parsed.
        """
        folder = Path(folder)
        folder = folder.parent if folder.is_file() else folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise DamagedFileError(
                str(path),
                "there is no such file",
                "a tokenizer in the `tokenizers` library's format",
                "copy tokenizer.json and tokenizer_config.json from the model that the checkpoint was made from",
            )
        template = folder / "chat_template.jinja"
        return cls(
            _read_backend(path),
            _read_json(folder / "tokenizer_config.json"),
            _read_json(folder / "generation_config.json"),
            _read_json(folder / "config.json"),
            template.read_text(encoding="utf-8") if template.is_file() else None,
            str(folder),
        )

    @classmethod
    def from_checkpoint(cls, files: CheckpointFiles) -> Tokenizer:
        """The tokenizer that the checkpoint's container holds, or else the one in the files beside it.

        Raises:
            ConfigError, DamagedFileError, ManyProblemsError: there is none, or it cannot be used.
        """
        from bitgrain.api import own_tokenizer

        description = own_tokenizer(files)
        return cls.from_folder(files.root) if description is None else cls.from_description(description)

    @classmethod
    def from_description(cls, described: TokenizerDescription) -> Tokenizer:
        """The tokenizer that a container describes."""
        backend = _parse_backend(json.dumps(described.tokenizer, ensure_ascii=False), described.where)
        encoder: FragmentEncoder | None = None
        if described.specials is not None:
            encoder = FragmentEncoder(described.specials, _plain_encode(backend) if described.scores is None else ScoreMerger(described.scores, described.where))
        return cls(backend, described.config, described.generation, where=described.where, encoder=encoder)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a tokenizer that has tokens which the model does not know; a model may know more (padding).

        Raises:
            ConflictingConfigError: names both sizes.
        """
        if self.size > vocab_size:
            raise ConflictingConfigError(
                self._where,
                f"the tokenizer has token ids up to {self.size - 1} ({self.size} tokens), the model has a vocabulary of {vocab_size}",
                f"a tokenizer with at most {vocab_size} tokens",
                "this is the tokenizer of another model, or tokens were added to it; take the one that belongs to the checkpoint",
            )

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`, with the tokens that the tokenizer puts around every text unless told otherwise.

        `add_bos_token` and `add_eos_token` in tokenizer_config.json, where stated, decide; otherwise the post-processor does.

        Args:
            parse_special: False: control tokens that are spelled out in the text stay letters.
        Raises:
            RequestError: the text holds half of a surrogate pair, which no encoding has.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError("prompt", f"text that is not valid Unicode ({error.reason})", "valid Unicode", "mend the text") from error
        stated = [key for key in ("add_bos_token", "add_eos_token") if isinstance(self._config.get(key), bool)]
        if self._encoder is not None:
            ids = self._encoder(text, parse_special)
        else:
            backend = self._backend if parse_special else self._literal
            ids = backend.encode(text, add_special_tokens=add_special_tokens and not stated).ids
        if add_special_tokens and stated:
            ids = [*self._around("add_bos_token", self.bos_token), *ids, *self._around("add_eos_token", self.eos_token)]
        return ids

    @cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which control tokens in a text are letters; a copy, since others may be using the first one."""
        backend = _parse_backend(self._backend.to_str(), self._where)
        backend.encode_special_tokens = True
        return backend

    def _around(self, key: str, token: str | None) -> list[int]:
        found = self._backend.token_to_id(token) if self._config.get(key) is True and token is not None else None
        return [] if found is None else [found]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the tokens; ids without a token (vocabulary padding) have no text."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token inside a sentence, special tokens included: a decoder may strip a space from the first token only."""
        once, twice = (self.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
        return twice[len(once) :]

    def leaves_text_open(self, token_id: int) -> bool:
        """Whether the text before a token may still change after it: byte tokens (<0xNN>) and those that decoding skips."""
        return token_id in self._open_tokens

    def stream(self) -> TextStream:
        """A decoder for one growing sequence."""
        return TextStream(self)

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    @property
    def chat_templates(self) -> tuple[str, ...]:
        """Names of the stored chat templates; the one called "default" is used."""
        named = self._config.get("chat_template")
        if isinstance(named, list):
            return tuple(str(entry.get("name")) for entry in named if isinstance(entry, dict))
        return ("default",) if self.has_chat_template else ()

    @cached_property
    def _template(self) -> ChatTemplate:
        if self._template_source is None:
            raise RequestError(
                self._where,
                f"of its chat templates ({', '.join(self.chat_templates)}) none is the default" if self.chat_templates else "the checkpoint has no chat template",
                "chat_template.jinja, or `chat_template` in tokenizer_config.json",
                "send a plain completion, or add the template of the model that the checkpoint was made from",
            )
        return ChatTemplate(self._template_source, self._special_tokens())

    def _special_tokens(self) -> dict[str, str]:
        names = (key for key in self._config if key.endswith("_token"))
        return {key: text for key in names if (text := _token_text(self._config[key])) is not None}

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **values: Any) -> str:
        """The prompt text of a conversation; it holds its special tokens, so encode it without adding any.

        Raises:
            RequestError: there is no template, or it refuses the messages.
        """
        return self._template.render(messages, add_generation_prompt, **values)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **values: Any) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer."""
        return self.encode(self.render_chat(messages, **values), add_special_tokens=False)

    def _find_eos(self, generation: Mapping[str, Any], model: Mapping[str, Any]) -> frozenset[int]:
        """Every end token that one of the three files names."""
        found: set[int] = set()
        text_model = model.get("text_config")
        for source in (generation, model, text_model if isinstance(text_model, dict) else {}):
            value = source.get("eos_token_id")
            found.update(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and i >= 0)
        if self.eos_token is not None and (token := self._backend.token_to_id(self.eos_token)) is not None:
            found.add(token)
        return frozenset(found)


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedFileError(str(path), f"it cannot be read: {error}", "a valid tokenizer.json", "fetch the file again") from error
    return _parse_backend(text, str(path))


def _parse_backend(text: str, where: str) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependencyError(where, f"the package tokenizers cannot be imported ({error})", "tokenizers", "pip install tokenizers") from error
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for whatever is wrong in the file
        raise DamagedFileError(where, f"it cannot be read: {error}", "a valid tokenizer.json", "fetch the file again") from error


def _plain_encode(backend: tokenizers.Tokenizer) -> Callable[[str], list[int]]:
    """Cutting and merging alone: nothing is looked for first, and nothing is put around."""
    import tokenizers

    plain = tokenizers.Tokenizer(backend.model)
    plain.pre_tokenizer = backend.pre_tokenizer

    def encode(text: str) -> list[int]:
        ids: list[int] = plain.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(str(path), f"not valid JSON: {error}", "a JSON object", "fetch the file again") from error
    if not isinstance(value, dict):
        raise DamagedFileError(str(path), f"a JSON {type(value).__name__}", "a JSON object", "fetch the file again")
    return value


def _token_text(value: object) -> str | None:
    """A special token is a string, or an object with its string in `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_of(config: Mapping[str, Any]) -> str | None:
    """`chat_template` is a string, or a list of named ones of which "default" counts."""
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
