"""Which format wrote a checkpoint: evidence gathered, weighed and shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from bitgrain.checkpoint.described_tokenizer import TokenizerDescription
from bitgrain.checkpoint.files import CheckpointFiles
from bitgrain.errors import (
    BitgrainError,
    ConfigError,
    ConflictingConfigError,
    RequestError,
    ShapeMismatchError,
    UnknownFormatError,
    raise_all,
)
from bitgrain.formats.base import QuantConfig
from bitgrain.formats.evidence import SMALL_BYTES, Detection, Evidence
from bitgrain.formats.matching import nearest_names
from bitgrain.formats.registry import canonical_name, formats
from bitgrain.formats.spellings import respelled
from bitgrain.quantize import TARGETS

# Where the quantization section of config.json may stand.
TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")


def gather_evidence(files: CheckpointFiles) -> Evidence:
    """All that detection may look at.

    Raises:
        ConfigError: the quantization section is not an object.
    """
    section = respelled(_quantization_section(files.config), files.tensors)
    sidecars = {name: respelled(contents, files.tensors) for name, contents in files.sidecars.items()}
    suffixes: dict[str, str] = {}
    for name in files.tensors:
        suffixes.setdefault(name.rpartition(".")[2], name)
    return Evidence(files.config, section, sidecars, files.tensors, suffixes, files.metadata, _small_reader(files), files.properties)


def described(files: CheckpointFiles) -> CheckpointFiles:
    """The checkpoint with the configuration that its container's own description gives, where it has one."""
    if not files.properties:
        return files
    evidence = gather_evidence(files)
    config, _ = detect(evidence)
    return replace(files, config=config.model_config(evidence))


def described_tokenizer(files: CheckpointFiles) -> TokenizerDescription | None:
    """The tokenizer that a checkpoint's container holds; None: it stands in the files beside it.

    The container's own wins over files; those serve where it holds none, or one of a kind that is not implemented.

    Raises:
        ConfigError, DamagedFileError, ManyProblemsError: see QuantConfig.tokenizer().
    """
    if not files.properties:
        return None
    evidence = gather_evidence(files)
    config, _ = detect(evidence)
    return config.tokenizer(evidence, (files.root / "tokenizer.json").is_file())


def _small_reader(files: CheckpointFiles) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        header = files.tensors[name]
        if header.nbytes > SMALL_BYTES:
            where = f"{header.file}: {name}"
            raise ShapeMismatchError(where, f"{header.describe()}, {header.nbytes} bytes", f"a description of at most {SMALL_BYTES} bytes", "fetch the right checkpoint")
        return files.read(name).clone()

    return read


def _quantization_section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    places = [config, *(config[s] for s in TEXT_SECTIONS if isinstance(config.get(s), dict))]
    for place in places:
        for key in ("quantization_config", "compression_config"):
            section = place.get(key)
            if section is None:
                continue
            if not isinstance(section, dict):
                raise ConfigError(f"config.json: {key}", f"a {type(section).__name__}", "an object", "correct config.json")
            return section
    return None


def detect(evidence: Evidence) -> tuple[type[QuantConfig], Detection]:
    """The format with the strongest claim, and its evidence.

    Raises:
        UnknownFormatError: nobody claims the checkpoint, or its quant_method is not known.
        ConflictingConfigError: two formats claim it equally, or the files disagree.
    """
    claims = []
    for name, config in formats().items():
        claim = config.detect(evidence)
        if claim is not None and claim.score > 0:
            claims.append((claim.score, name, config, claim))
    claims.sort(key=lambda c: (-c[0], c[1]))
    if not claims:
        raise _unknown(evidence)
    if len(claims) > 1 and claims[0][0] == claims[1][0]:
        shown = "; ".join(f"{name}: {', '.join(claim.reasons)}" for score, name, _, claim in claims if score == claims[0][0])
        raise ConflictingConfigError("format", shown, "one format with the strongest evidence", "remove the wrong configuration")
    _, _, config, claim = claims[0]
    _check_files_agree(evidence, config)
    return config, claim


def answers_to(config: type[QuantConfig], asked: str | None) -> bool:
    """Whether a user's word is the format's name, or one of its aliases or hints."""
    wanted = (asked or "").lower().replace("_", "-")
    return wanted in {config.name, *(word.lower().replace("_", "-") for word in (*config.aliases, *config.hints))}


def check_hint(asked: str, config: type[QuantConfig], claim: Detection, is_target: bool) -> None:
    """Refuse a hint that the evidence contradicts; `is_target`: it is something that an unquantized checkpoint can become.

    Raises:
        ConflictingConfigError: it names another format.
        RequestError: it names nothing.
    """
    if is_target and config.holds_plain_weights:
        return
    if not is_target and config.holds_plain_weights and canonical_name(asked) is None:
        found = "neither a format nor what an unquantized checkpoint can become"
        raise RequestError(f"quantization = {asked!r}", found, f"one of {', '.join(TARGETS)}, or none", "choose one of them, or leave the option out")
    if not is_target and canonical_name(asked) is None:
        found, known = "no such format", formats().names()
        raise RequestError(f"quantization = {asked!r}", found, f"{config.name!r}, which the checkpoint is; all: {', '.join(known)}", "leave the option out")
    hint = "; to quantize an unquantized checkpoint while it loads, see `bitgrain formats`" if config.holds_plain_weights else ""
    raise ConflictingConfigError(
        f"quantization = {asked!r}", f"the checkpoint is {config.name} ({', '.join(claim.reasons)})", f"{config.name!r} or one of its other names",
        f"leave the option out to run the checkpoint as it is{hint}",
    )  # fmt: skip


def _unknown(evidence: Evidence) -> UnknownFormatError:
    known = formats().names()
    method = evidence.method
    if method is not None:
        near = nearest_names(method, known)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        return UnknownFormatError(
            f"quant_method = {method!r}", "no format of that name is registered", f"one of {', '.join(known)}{hint}",
            "correct quant_method, or install the package that brings the format",
        )
    shown = ", ".join(f"{suffix} (e.g. {example})" for suffix, example in sorted(evidence.suffixes.items())[:12])
    return UnknownFormatError(
        "checkpoint", f"no quantization configuration, and tensors that no format claims: {shown or 'none'}",
        f"a quantization_config of one of {', '.join(known)}", "fetch the checkpoint's configuration files",
    )


def _check_files_agree(evidence: Evidence, config: type[QuantConfig]) -> None:
    sections = {"config.json: quantization_config": evidence.quantization, **evidence.sidecars}
    seen: dict[str, tuple[str, Any]] = {}
    problems: list[BitgrainError] = []
    for source, section in sections.items():
        for key, value in (section or {}).items():
            if key in config.informational or value is None:
                continue
            first_source, first = seen.setdefault(key, (source, value))
            if first != value:
                problems.append(
                    ConflictingConfigError(f"{source}: {key}", repr(value), f"{first!r} as in {first_source}", "find out which file is right and correct the other")
                )
    raise_all("quantization configuration", problems)
