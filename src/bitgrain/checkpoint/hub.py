"""Checkpoints by hub id: which files of a repository make up the model, and where their copies lie on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitgrain.checkpoint.gguf_files import SUFFIX, is_later_shard, shards_of
from bitgrain.errors import BitgrainError, MissingDependencyError, RequestError

# owner/name, and after a colon one of its files or what a file's name ends in
_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?::(?P<file>.+))?")
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]
# Files of the same kind that are no model of their own.
NO_MODELS = ("mmproj", "imatrix")
MAX_SHOWN = 12


def is_hub_id(text: str) -> bool:
    """Whether a text that is no path on this machine may name a repository: "owner/name" or "owner/name:FILE"."""
    found = _ID.fullmatch(text)
    if found is None or text.startswith("."):
        return False
    return found["file"] is not None or not text.endswith((".safetensors", SUFFIX))


def fetch(text: str) -> Path:
    """The local copy of a repository, or of the one file (and its further shards) that is the model; downloads what is absent.

    Raises:
        MissingDependencyError: the package for downloads is absent.
        RequestError: the hub does not give it, or several files could be meant.
    """
    found = _ID.fullmatch(text)
    if found is None:
        raise RequestError(text, "no hub id", "owner/name or owner/name:FILE", "check the name")
    try:
        import huggingface_hub
    except ImportError:
        raise MissingDependencyError(text, "no such folder, and the package for hub downloads is not installed", "a local path, or the extra `hub`", 'pip install "bitgrain[hub]"') from None
    repository, wanted = found["repository"], found["file"]
    try:
        root = Path(huggingface_hub.snapshot_download(repository, allow_patterns=FILES))
        if wanted is None and any(root.glob("*.safetensors")):
            return root
        names = [name for name in _listed(huggingface_hub, repository, root) if name.endswith(SUFFIX)]
        if wanted is None and not names:
            return root  # whoever opens the folder says what is in it
        chosen = _choose(repository, names, wanted)
        huggingface_hub.snapshot_download(repository, allow_patterns=shards_of(chosen))
        return root / chosen
    except BitgrainError:
        raise
    except Exception as error:
        shown = (str(error).splitlines() or [""])[0][:160]
        raise RequestError(text, f"not a local path, and the hub did not give it ({type(error).__name__}: {shown})", "a checkpoint that can be reached", "check the name and the network, or download it first") from None


def _listed(hub: Any, repository: str, root: Path) -> list[str]:
    """Every file of a repository; without a network those that are here already."""
    try:
        return list(hub.HfApi().list_repo_files(repository))
    except Exception:
        here = [str(place.relative_to(root)) for place in root.rglob(f"*{SUFFIX}")]
        if not here:
            raise
        return here


def _choose(repository: str, names: Sequence[str], wanted: str | None) -> str:
    """The file to open.

    Raises:
        RequestError: none, or several.
    """
    models = sorted(n for n in names if not is_later_shard(n) and not any(word in Path(n).name.lower() for word in NO_MODELS))
    fitting = models
    if wanted is not None:
        exact = [name for name in names if wanted in (name, Path(name).name)]
        fitting = exact or [name for name in models if _stem(name).lower().endswith(wanted.removesuffix(SUFFIX).lower())]
    if len(fitting) == 1:
        return fitting[0]
    listed = fitting or models
    shown = ", ".join(listed[:MAX_SHOWN]) + (f" and {len(listed) - MAX_SHOWN} more" if len(listed) > MAX_SHOWN else "")
    where = f"{repository}:{wanted}" if wanted else repository
    found = f"{len(fitting)} models fit: {shown}" if fitting else f"no such file; there are: {shown or 'none of this kind'}"
    example = f"{repository}:{listed[0] if listed else 'FILE' + SUFFIX}"
    raise RequestError(where, found, f"one model, as owner/name:FILE{SUFFIX}", f"say which one, for example {example}, or download it and give its path")


def _stem(name: str) -> str:
    """A file's name without suffix and shard number."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", Path(name).name.removesuffix(SUFFIX))
