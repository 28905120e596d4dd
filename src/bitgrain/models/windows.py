"""Which layers attend to a sliding window only."""

from __future__ import annotations

from bitgrain.models.config_keys import ConfigKeys

LAYER_TYPES = ("full_attention", "sliding_attention")
DEFAULT_WINDOW = 4096
DEFAULT_MAX_WINDOW_LAYERS = 28
DEFAULT_PATTERN = 6
# Rules with a switch, see read_windows.
SWITCHED = ("chosen", "even", "switched")


def read_windows(keys: ConfigKeys, rule: str, layers: int) -> tuple[int | None, ...]:
    """Per layer, tokens that a token attends to (itself included), or None for all.

    Args:
        rule: "none":     the architecture has no window;
              "every":    all layers, when `sliding_window` is a number;
              "chosen":   when `use_sliding_window`, the layers that `layer_types` names or else those from `max_window_layers` on;
              "even":     when `use_sliding_window`, the layers that `layer_types` names or else every second one, the first among
                          them, below `max_window_layers`;
              "switched": when `use_sliding_window`, all layers;
              "alternate": the layers that `layer_types` names or else every second one, the first among them;
              "pattern":   the layers that `layer_types` names or else all but every n-th, n being `sliding_window_pattern`;
              "named":     the layers that `layer_types` names or else all, when `sliding_window` is a number.
    """
    types = _layer_types(keys, layers)
    keys.read("sliding_window")
    stated = keys.values.get("sliding_window")
    switch = keys.flag("use_sliding_window")
    if rule == "none":
        if stated is not None and switch is not False:
            keys.problem(
                "sliding_window",
                repr(stated),
                "absent",
                "this architecture attends to all tokens; correct `architectures` or remove the key",
            )
        return _agreeing(keys, types, None, layers)
    if rule == "alternate":
        return _periodic(keys, types, layers, 2)
    if rule == "pattern":
        return _periodic(keys, types, layers, keys.size("sliding_window_pattern", default=DEFAULT_PATTERN))
    if rule == "named" and types is not None:
        return _periodic(keys, types, layers, 1)
    absent = "sliding_window" not in keys.values
    off = stated == 0 and rule in SWITCHED and not switch  # the library writes 0 for a window that is switched off
    size = None if off or (stated is None and not absent) else keys.size("sliding_window", default=DEFAULT_WINDOW)
    if rule in ("every", "named"):
        if switch is False and size is not None:
            keys.problem(
                "use_sliding_window", "false", "absent", "this architecture has no such switch: set sliding_window to null instead"
            )
        return _agreeing(keys, types, size, layers)
    size = size if switch else None
    first = keys.count("max_window_layers", default=0 if rule == "switched" else DEFAULT_MAX_WINDOW_LAYERS)
    if rule == "switched":
        if size is not None and first > 0 and types is None:
            keys.problem(
                "max_window_layers",
                str(first),
                "0 or absent",
                "this architecture's window holds for all layers, and programs disagree on this key",
            )
        return _agreeing(keys, types, size, layers)
    if types is None and rule == "even":
        return tuple(size if i < first and not i % 2 else None for i in range(layers))
    if types is None:
        return tuple(size if i >= first else None for i in range(layers))
    if size is None and "sliding_attention" in types:
        keys.problem(
            "layer_types",
            "sliding_attention, but no window is in force",
            "use_sliding_window and sliding_window",
            "correct the configuration",
        )
    return tuple(size if kind == "sliding_attention" else None for kind in types)


def _periodic(keys: ConfigKeys, types: tuple[str, ...] | None, layers: int, period: int) -> tuple[int | None, ...]:
    """The layers that `types` names or else all but every `period`-th."""
    if types is None:
        types = tuple(LAYER_TYPES[bool((i + 1) % period)] for i in range(layers))
    if LAYER_TYPES[1] not in types:
        return (None,) * layers
    size = keys.size("sliding_window")
    return tuple(size if kind == LAYER_TYPES[1] else None for kind in types)


def _layer_types(keys: ConfigKeys, layers: int) -> tuple[str, ...] | None:
    _, value = keys.read("layer_types")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != layers or any(kind not in LAYER_TYPES for kind in value):
        keys.problem("layer_types", repr(value)[:200], f"{layers} entries, each {' or '.join(LAYER_TYPES)}")
        return None
    return tuple(value)


def _agreeing(keys: ConfigKeys, types: tuple[str, ...] | None, size: int | None, layers: int) -> tuple[int | None, ...]:
    """The same window for all layers; layer types that say otherwise are a problem."""
    needed = LAYER_TYPES[0] if size is None else LAYER_TYPES[1]
    if types is not None and set(types) != {needed}:
        keys.problem(
            "layer_types",
            repr(sorted(set(types))),
            f"only {needed}",
            "this architecture treats all layers alike; correct the key, or sliding_window",
        )
    return (size,) * layers
