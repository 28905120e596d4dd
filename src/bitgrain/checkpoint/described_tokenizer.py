"""The tokenizer of a container that describes its model itself, in the words of the usual files beside a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that is looked for in a text before anything else is cut.

    Args:
        control: it is a token only where a text may hold control tokens; elsewhere it is letters like any other.
        strips:  ASCII white space that follows it belongs to it.
    """

    text: str
    token_id: int
    control: bool
    strips: bool = False


@dataclass(frozen=True, slots=True)
class PieceScores:
    """How text becomes tokens where neighbours merge by the score of what they become, instead of by a list of pairs.

    Args:
        ids:     token to id: every token that text may become.
        values:  score by id; of two neighbours that may merge, those go first whose result scores higher, then the left ones.
        space:   what stands for a space.
        prefix:  what is put before every text and after every special token.
        unknown: token for bytes that have none; None: such a text cannot be encoded.
    """

    ids: Mapping[str, int]
    values: tuple[float, ...]
    space: str
    prefix: str
    unknown: int | None


@dataclass(frozen=True, slots=True)
class TokenizerDescription:
    """All that makes a tokenizer.

    Args:
        where:      what messages call the source.
        tokenizer:  contents of tokenizer.json, in the `tokenizers` library's format.
        config:     what tokenizer_config.json would say: special tokens, add_bos_token, add_eos_token, chat templates.
        generation: what generation_config.json would say: the tokens that end a text.
        specials:   tokens to look for first; None: those that `tokenizer` names, by its own rules.
        scores:     None: `tokenizer` holds the merges.
    """

    where: str
    tokenizer: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    specials: tuple[SpecialToken, ...] | None = None
    scores: PieceScores | None = None
