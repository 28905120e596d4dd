"""Which sparse storage a configuration names, and the matrix sizes that only a stored tensor tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitgrain.errors import ConfigError
from bitgrain.formats.compressed_tensors.names import WHERE
from bitgrain.formats.compressed_tensors.storage import SPARSE_FORMATS
from bitgrain.formats.config_reader import ConfigReader, words
from bitgrain.formats.evidence import Evidence

STRUCTURED = "sparse-24-bitmask"
# Where zeros are and how many; the tensors say it themselves.
_SAID_BY_TENSORS = words("targets ignore global_sparsity registry_requires_subclass")


def parse_sparsity(value: Any) -> str:
    """One of SPARSE_FORMATS, or "" where zeros are stored like other numbers.

    Raises:
        ConfigError: another storage, unknown keys.
    """
    where = f"{WHERE}.sparsity_config"
    if not value:
        return ""
    if not isinstance(value, Mapping):
        raise ConfigError(where, repr(value), "an object, or null", "correct the configuration")
    reader = ConfigReader(value, where)
    reader.skip(_SAID_BY_TENSORS)
    found = reader.choice("format", {"dense": "", **{name: name for name in SPARSE_FORMATS}}, "dense")
    structure = reader.text("sparsity_structure", default="")
    if found == STRUCTURED and structure not in ("", "2:4"):
        reader.problem("sparsity_structure", repr(structure), f"'2:4' for {STRUCTURED}")
    reader.finish()
    return found


def stored_shapes(evidence: Evidence) -> dict[str, tuple[int, int]]:
    """Module name to (N, K) as its `shape` tensor says it, for weights whose other headers leave K open."""
    shapes: dict[str, tuple[int, int]] = {}
    for name in evidence.tensors:
        module, _, local = name.rpartition(".")
        if local != "row_offsets":
            continue
        try:
            sizes = [int(v) for v in evidence.read_small(f"{module}.shape").flatten()]
        except KeyError:
            continue  # its absence is reported where headers are compared
        if len(sizes) == 2:
            shapes[module] = (sizes[0], sizes[1])
    return shapes
