"""How text is cut before byte-pair merging, by the name that a file gives to the rules (tokenizer.ggml.pre).

Patterns follow the runtime that the container belongs to, not each model's first publisher, where the two differ: that runtime has
one class for letters of every case, so that the upper- and lower-case rules of the newer models see ASCII case alone.
Patterns are Oniguruma's; each cuts the pieces of the one before it into matches and what lies between them.  Its tables are of
Unicode 16, the runtime's a little older: characters that are in neither class there may be letters here.
Source: llama.cpp of llama-cpp-python 0.3.36, the vocabulary and Unicode sources.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SIGNS_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
LINES = r"\s*[\r\n]+"
GAPS = r"\s+(?!\S)|\s+"
# capitals first, then the rest; and capitals alone: letters that are not an ASCII letter count as both
CASED = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+"
CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*"
MARKED = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
ASCII_SIGNS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
# digits in threes, counted from the right; what stands before them stays with the first, as the runtime has it
THREES = r"(?<=\p{N})\p{N}{3}|(?>\P{N}*)\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\P{N}+"
CJK = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
# white space within the ranges does not belong to them
OLD_CJK = r"[[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]&&[^\s]]+"
WIDE_SIGNS = r"[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}-\x{3002}]"
NO_SENTENCE_SIGNS = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+"
# letters that have case, in the scripts that have it
CASE_LETTERS = (
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}"
    r"\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}"
    r"\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}"
    r"\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}"
    r"\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}"
    r"\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}"
    r"\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}"
    r"\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}"
    r"\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}"
    r"\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}"
)  # fmt: skip
ASIAN = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{8C48}-\x{FAFF}\x{3040}-\x{309F}\x{30A0}-\x{30FF}\x{FF65}-\x{FF9F}\x{2F00}-\x{2FDF}\x{E40}-\x{E7F}"
    r"\x{E80}-\x{EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+"
)
BOPOMOFO_AND_CJK = (
    r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}\x{FF1B}\x{FF0C}\x{3001}-\x{303F}"
    rf"\x{{FE30}}-\x{{FE4F}}]+|[\x{{3105}}-\x{{312F}}]+|{CJK}"
)

GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{GAPS}"
LLAMA3 = rf"{SUFFIX}|{WORD}|\p{{N}}{{1,3}}|{SIGNS}|{LINES}|{GAPS}"
QWEN2 = rf"{SUFFIX}|{WORD}|\p{{N}}|{SIGNS}|{LINES}|{GAPS}"
QWEN35 = rf"{SUFFIX}|{MARKED}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{LINES}|{GAPS}"
DEEPSEEK3 = rf"{ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES}|{GAPS}"
SPARK = rf"{ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+|[\r\n]|{GAPS}"
GPT4O = rf"{CASED}{SUFFIX}?|{CAPITALS}{SUFFIX}?|\p{{N}}{{1,3}}|{SIGNS_OR_SLASH}|{LINES}|{GAPS}"
TEKKEN = rf"{CASED}|{CAPITALS}|\p{{N}}|{SIGNS_OR_SLASH}|{LINES}|{GAPS}"
MARKED_CASE = rf"{MARKED}{SUFFIX}?|%s|{SIGNS_OR_SLASH}|{LINES}|{GAPS}"
MARKED_GPT4O = GPT4O.replace(r"\p{L}&&", r"\p{L}\p{M}&&")
BAILING = rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{WORD}|\p{{N}}|{SIGNS}|\s*[\r\n]|{GAPS}"
SEED = rf"{SUFFIX}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{LINES}|{GAPS}"
EXAONE_MOE = rf"{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{GAPS}"
JAIS2 = rf"{SUFFIX}|{WORD}|\p{{N}}{{1,3}}|{SIGNS}|{LINES}|" + "|".join(rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1)) + r"|\s{1,2}(?!\S)|\s"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One set of rules.

    Args:
        patterns:      applied one after another.
        ignore_merges: a piece that is a token becomes it, whatever its merges give.
        add_bos:       texts begin with the begin token where the file does not say.
        has_bos:       there is a begin token though the file names none.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    has_bos: bool = True


def _table() -> Iterator[tuple[str, PreTokenizer]]:
    llama3 = PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True)
    digits = PreTokenizer((r"\p{N}", GPT2))
    deepseek3 = PreTokenizer((r"\p{N}{1,3}", CJK, DEEPSEEK3))
    gpt2, qwen2, gpt4o = PreTokenizer((GPT2,)), PreTokenizer((QWEN2,)), PreTokenizer((GPT4O,))
    tiny_aya, bailing = PreTokenizer((THREES, MARKED_CASE % r"\p{N}{1,3}")), PreTokenizer((BAILING,))
    groups: tuple[tuple[str, PreTokenizer], ...] = (
        ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", llama3),
        ("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4", gpt2),
        ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", digits),
        ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", qwen2),
        ("qwen35", PreTokenizer((QWEN35,))),
        ("dbrx smaug-bpe", PreTokenizer((LLAMA3,))),
        ("chatglm-bpe", PreTokenizer((LLAMA3,), has_bos=False)),
        ("glm4 glm5", PreTokenizer((LLAMA3,), ignore_merges=True, has_bos=False)),
        ("deepseek-llm", PreTokenizer((r"[\r\n]", rf"\s?[{CASE_LETTERS}]+", rf"\s?{WIDE_SIGNS}+", r"(?<!\s)\s+\z", OLD_CJK, r"\p{N}+"))),
        ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", OLD_CJK, r"\p{N}"))),
        ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", deepseek3),
        ("spark2_5", PreTokenizer((r"\p{N}{1,3}", CJK, SPARK, r"\p{N}"))),
        ("gpt-4o llama4 kanana2 talkie minimax-m2", gpt4o),
        ("granite-embed-multi-97m", PreTokenizer((MARKED_GPT4O,), ignore_merges=True)),
        ("tekken", PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True)),
        ("tiny_aya cohere2moe", tiny_aya),
        ("youtu", PreTokenizer((BOPOMOFO_AND_CJK, MARKED_CASE % r"\p{N}"), ignore_merges=True)),
        ("falcon", PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"))),
        ("poro-chat bloom gpt3-finnish", PreTokenizer((NO_SENTENCE_SIGNS,))),
        ("viking", PreTokenizer((NO_SENTENCE_SIGNS, r"\p{N}"))),
        ("jais-2", PreTokenizer((JAIS2,))),
        ("bailingmoe bailingmoe2 llada-moe", bailing),
        ("seed-coder", PreTokenizer((SEED,))),
        ("ufakzeka", PreTokenizer((QWEN2.removeprefix(f"{SUFFIX}|"),))),
        ("afmoe", PreTokenizer((THREES, ASIAN, DEEPSEEK3))),
        ("laguna", PreTokenizer((r"[^\n]+|\n+", QWEN2))),
        ("exaone-moe", PreTokenizer((EXAONE_MOE,))),
        ("minicpm5", PreTokenizer((r"\p{N}{1,3}", LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")), ignore_merges=True)),
    )
    return ((name, rules) for names, rules in groups for name in names.split())


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = dict(_table())
