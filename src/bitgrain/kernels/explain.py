"""Selections told to people: one row per set of modules that differ only in their indices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitgrain.grouping import merged_name, pattern_of
from bitgrain.kernels.selection import Selection


def explain_rows(selections: Mapping[str, Selection]) -> list[dict[str, Any]]:
    """One row per set of modules with equal pattern and equal selection: modules, kernel, fidelity, candidates."""
    groups: dict[tuple[str, int], list[str]] = {}
    by_id = {id(s): s for s in selections.values()}
    same: dict[str, int] = {}
    for label, selection in selections.items():
        text = repr(selection.as_dict())
        groups.setdefault((pattern_of(label), same.setdefault(text, id(selection))), []).append(label)
    rows = []
    for (_, key), labels in groups.items():
        rows.append({"modules": merged_name(labels), "count": len(labels), **by_id[key].as_dict()})
    return rows
