"""Which modules have their input rotated while the model runs, as `algo_config` says.

A rotation that was merged into neighbouring weights (offline R1, R2) needs nothing at run time.  Online ones (R1 with
online_r1_rotation, R4) keep a matrix beside each module; `online_config.online_rotation_layers` lists them, and older
writers leave the list to be derived: the targets of `scaling_layers` for R1, every down_proj for R4.  R3 rotates queries
and keys alike after their position embedding, so that scores do not change; only a quantized cache would notice.
Source: amd-quark 0.13 algorithm/rotation/rotation.py (get_online_rotation_layers), quantization/config/config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitgrain.formats.config_reader import ConfigReader

R4_TARGET = "down_proj"
_PLACEHOLDER = re.compile(r"pre_layer_id|layer_id|\*")


@dataclass(frozen=True, slots=True)
class OnlineRotation:
    """The modules with a rotation of their own.

    Args:
        names:    exact module names; None where the patterns decide.
        patterns: regexes of whole module names.
        size:     rows of the matrix; None is K.
        prescale: the modules have an `input_prescale`, too.
    """

    names: frozenset[str] | None = None
    patterns: tuple[re.Pattern[str], ...] = field(default=())
    size: int | None = None
    prescale: bool = False

    def covers(self, module: str) -> bool:
        if self.names is not None:
            return module in self.names
        return any(pattern.fullmatch(module) for pattern in self.patterns)


NO_ROTATION = OnlineRotation()


def read_rotation(reader: ConfigReader, quantized_cache: bool) -> OnlineRotation:
    """The online rotation that `algo_config` names; problems go to `reader`."""
    _, value = reader.read("algo_config")
    algorithms = value if isinstance(value, list) else [value]
    for algorithm in algorithms:
        if isinstance(algorithm, Mapping) and str(algorithm.get("name")).lower() == "rotation":
            return _read(reader, algorithm, quantized_cache)
    return NO_ROTATION


def _read(parent: ConfigReader, values: Mapping[str, Any], quantized_cache: bool) -> OnlineRotation:
    reader = ConfigReader(values, parent.place("algo_config"))
    r1, r4 = reader.flag("r1") is not False, bool(reader.flag("r4"))
    online = r1 and bool(reader.flag("online_r1_rotation"))
    if reader.flag("r3") and quantized_cache:
        reader.problem("r3", "true, with a quantized KV cache", "false: keys would have to be rotated before they are stored", "quantize the model without r3")
    size = reader.integer("rotation_size", minimum=1, default=0) or None
    config = reader.section("online_config", "an object")
    parent.problems += reader.problems
    if not online and not r4:
        return NO_ROTATION
    listed = config.get("online_rotation_layers")
    prescale = bool(config.get("use_input_prescale"))
    if isinstance(listed, list):
        return OnlineRotation(frozenset(map(str, listed)), size=size, prescale=prescale)
    patterns = [rf"(?:.*\.)?{R4_TARGET}"] if r4 else []
    if online:
        patterns += [_regex(name) for name in _targets(values.get("scaling_layers"))]
    return OnlineRotation(None, tuple(re.compile(p) for p in dict.fromkeys(patterns)), size, prescale)


def _targets(scaling_layers: object) -> list[str]:
    """Module templates whose input is rotated: target_modules, or where that key is absent next_modules."""
    groups = scaling_layers.values() if isinstance(scaling_layers, Mapping) else ()
    entries = [entry for group in groups if isinstance(group, list) for entry in group if isinstance(entry, Mapping)]
    names = [entry["target_modules"] if entry.get("target_modules") is not None else entry.get("next_modules", ()) for entry in entries]
    return [name for listed in names for name in listed if isinstance(name, str)]


def _regex(template: str) -> str:
    """A template with layer numbers and * left open, as a regex; neither crosses a dot."""
    parts, at = [], 0
    for place in _PLACEHOLDER.finditer(template):
        parts += [re.escape(template[at : place.start()]), r"[^.]+" if place.group() == "*" else r"\d+"]
        at = place.end()
    return "".join([*parts, re.escape(template[at:])])
