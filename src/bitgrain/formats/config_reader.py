"""Reading one section of a configuration: every key accounted for, every problem found in one pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from math import isfinite
from typing import Any, ClassVar, TypeVar

from bitgrain.errors import BitgrainError, ConfigError, ConflictingConfigError, raise_all
from bitgrain.formats.matching import nearest_names

T = TypeVar("T")
CORRECT, FETCH = "correct the configuration", "fetch the checkpoint's complete configuration"


def words(text: str) -> frozenset[str]:
    """The set of the words of a text; long lists of names read better as one."""
    return frozenset(text.split())


# Keys that AutoRound adds to every configuration it writes, whatever the format; none changes what the tensors mean.
# extra_config and rotation_config are not among them: they do.
AUTO_ROUND_KEYS = words(
    "act_bits act_data_type act_dynamic act_group_size act_sym amp autoround_version batch_size bits block_name_to_quantize"
    " data_type dataset enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input gradient_accumulate_steps"
    " group_size iters low_gpu_mem_usage lr minmax_lr nsamples packing_format provider quant_block_list regex_config"
    " scale_dtype seqlen static_attention_dtype static_attention_granularity static_kv_dtype static_kv_granularity super_bits super_group_size supported_types sym"
    " to_quant_block_names"
)


class ConfigReader:
    """The keys of one section.  Each reader marks its keys as known; `finish` reports all problems and unknown keys.

    A key whose value is null counts as absent.  When one setting has several spellings, those present must agree.
    What a reader cannot use becomes a problem, and it returns the default, so that reading goes on to the next key.

    Class attributes:
        joint: what stands between the section and a key in messages.
    Args:
        values: the section.
        where:  what messages call it.
    """

    joint: ClassVar[str] = "."

    def __init__(self, values: Mapping[str, Any], where: str = "quantization_config") -> None:
        self.values, self.where = values, where
        self.problems: list[BitgrainError] = []
        self._known: set[str] = set()

    def place(self, key: str) -> str:
        """What messages call a key."""
        return f"{self.where}{self.joint}{key}"

    def problem(self, key: str, found: str, needed: str, action: str = CORRECT) -> None:
        """Note a ConfigError about one key."""
        self.problems.append(ConfigError(self.place(key), found, needed, action))

    def collect(self, read: Callable[[], T]) -> T | None:
        """read(), or None after the BitgrainError that it raised was noted."""
        try:
            return read()
        except BitgrainError as problem:
            self.problems.append(problem)
            return None

    def read(self, *keys: str, same: Callable[[Any], Any] = lambda value: value) -> tuple[str, Any]:
        """(spelling, value) of the first spelling that is present; (first key, None) if none is."""
        self._known.update(keys)
        present = [(k, self.values[k]) for k in keys if self.values.get(k) is not None]
        for key, value in present[1:]:
            if same(value) != same(present[0][1]):
                found = f"{value!r}, but {present[0][0]} = {present[0][1]!r}"
                action = "find out which is right and correct the other"
                self.problems.append(ConflictingConfigError(self.place(key), found, "equal values", action))
        return present[0] if present else (keys[0], None)

    def integer(self, *keys: str, allowed: Collection[int] | None = None, minimum: int | None = None, default: int | None = None) -> int:
        """An integer; without a default its absence is a problem.

        Args:
            allowed: the values that are possible, `minimum` ignored.
        """
        key, value = self.read(*keys)
        if isinstance(allowed, range):
            needed = f"an integer in [{allowed[0]}, {allowed[-1]}]"
        else:
            least = "" if minimum is None else f" of at least {minimum}"
            needed = f"an integer{least}" if allowed is None else f"one of {', '.join(map(str, sorted(allowed)))}"
        if value is None:
            if default is not None:
                return default
            self.problem(key, "absent", needed, FETCH)
            return 0
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or (allowed is not None and value not in allowed) or (allowed is None and minimum is not None and value < minimum):
            self.problem(key, repr(value), needed)
            return default or 0
        return int(value)

    def number(self, *keys: str, default: float | None = None, minimum: float = 0.0, strict: bool = True) -> float:
        """A finite number above `minimum` (or equal to it, unless `strict`); without a default its absence is a problem."""
        key, value = self.read(*keys)
        needed = f"a number {'>' if strict else '>='} {minimum:g}"
        if value is None:
            if default is None:
                self.problem(key, "absent", needed, FETCH)
                return minimum + 1.0
            return default
        valid = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
        if not valid or value < minimum or (strict and value == minimum):
            self.problem(key, repr(value), needed)
            return default if default is not None else minimum + 1.0
        return float(value)

    def group_size(self, *keys: str, default: int) -> int:
        """A group size: above 0, or -1 for whole rows."""
        size = self.integer(*keys, default=default)
        if size < 1 and size != -1:
            key = next(k for k in keys if self.values.get(k) is not None)
            self.problem(key, repr(size), "a size above 0, or -1 for one group per row")
            return default
        return size

    def flag(self, *keys: str, needed: str = "true or false") -> bool | None:
        """True, False or, when absent, None."""
        key, value = self.read(*keys)
        if value is not None and not isinstance(value, bool):
            self.problem(key, repr(value), needed)
            return None
        return value

    def text(self, *keys: str, default: str) -> str:
        """A word, in lower case."""
        key, value = self.read(*keys, same=lambda v: str(v).lower())
        if value is None:
            return default
        if not isinstance(value, str):
            self.problem(key, repr(value), "a text")
            return default
        return value.lower()

    def choice(self, key: str, meanings: Mapping[str, T], default: str) -> T:
        """What the word under a key means; true and false count as words.

        Args:
            meanings: the words in lower case, among them `default`, the word that absence stands for.
        """
        _, value = self.read(key)
        word = default if value is None else str(value).lower()
        if word not in meanings:
            self.problem(key, repr(value)[:200], f"one of {', '.join(w for w in meanings if w)}")
            word = default
        return meanings[word]

    def names(self, *keys: str) -> tuple[str, ...]:
        """A list of names, nested lists flattened; a single text is one name; empty when absent."""
        key, value = self.read(*keys)
        try:
            return tuple(_flat_names(value))
        except TypeError:
            self.problem(key, repr(value)[:200], "a list of names")
            return ()

    def block(self, key: str) -> tuple[int, int] | None:
        """(rows, columns): a list of two positive integers or a text such as "128x128"; None when absent."""
        _, value = self.read(key)
        if value is None:
            return None
        parts = value.lower().split("x") if isinstance(value, str) else value
        try:
            rows, columns = (int(part) for part in parts)
        except (TypeError, ValueError):
            rows = columns = 0
        if rows < 1 or columns < 1 or any(isinstance(part, (bool, float)) for part in parts):
            self.problem(key, repr(value)[:200], "two positive integers [rows, columns]")
            return None
        return rows, columns

    def section(self, key: str, needed: str) -> Mapping[str, Any]:
        """The object under a key; empty when absent."""
        _, value = self.read(key)
        if value is None or isinstance(value, Mapping):
            return value or {}
        self.problem(key, f"a {type(value).__name__}", needed)
        return {}

    def need(self, key: str, accepts: Callable[[Any], bool], needed: str, action: str) -> None:
        """A key that, where present, must have a value that changes nothing here."""
        _, value = self.read(key)
        if value is not None and not accepts(value):
            self.problem(key, repr(value)[:200], needed, action)

    def skip(self, keys: Iterable[str]) -> None:
        """Keys that say how the checkpoint was made or run before, and nothing about its tensors; or that others read."""
        self._known.update(keys)

    def finish(self) -> None:
        """Raise every problem, with one more for all unknown keys; null and empty values say nothing and pass."""
        known = sorted(self._known)
        unknown = sorted(k for k, v in self.values.items() if k not in self._known and v not in (None, [], {}))
        if unknown:
            nearest = {key: nearest_names(key, known, 1) for key in unknown}
            shown = [f"{key} (nearest known: {near[0]})" if near else key for key, near in nearest.items()]
            meant = ", ".join(dict.fromkeys(near[0] for near in nearest.values() if near))
            self.problems.append(
                ConfigError(
                    self.where,
                    f"unknown keys: {', '.join(shown)}",
                    "keys whose meaning is known" + (f", such as {meant}" if meant else ""),
                    "correct the spelling, remove keys that say nothing about the tensors, or update bitgrain if the writer is newer",
                )
            )
        raise_all(self.where, self.problems)


def _flat_names(value: Any) -> Iterable[str]:
    if value is None:
        return
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            if part is None:
                raise TypeError
            yield from _flat_names(part)
    else:
        raise TypeError
