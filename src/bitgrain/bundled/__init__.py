"""What comes with the package besides code: small models to try everything without a download, and records of what ran where."""

from __future__ import annotations

from pathlib import Path

from bitgrain.errors import RequestError

DEFAULT = "arithmetic-w4a16"


def models() -> dict[str, Path]:
    """Name to folder of every bundled model, in order of name."""
    here = Path(__file__).parent
    return {folder.name: folder for folder in sorted(here.iterdir()) if (folder / "config.json").is_file()}


def run_records_file() -> Path:
    """Where the package keeps the records of kernels that ran; it may be absent."""
    return Path(__file__).parent / "last_run.json"


def default_model() -> Path:
    """Folder of the model that commands use when none is named.

    Raises:
        RequestError: this installation has no bundled models.
    """
    found = models()
    if DEFAULT not in found:
        raise RequestError(
            "MODEL",
            f"none was given, and the bundled model {DEFAULT!r} is not part of this installation",
            "a model",
            "name a checkpoint folder",
        )
    return found[DEFAULT]
