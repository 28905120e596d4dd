"""The transforms of a compressed-tensors configuration: which modules' inputs, outputs, queries and keys are mapped, and how.

    transform_config.config_groups.<group>    type, head_dim, randomize, apply: [{targets, ignore, location, inverse}]
    weight_input, weight_output               part of the stored weights: nothing is left to do
    input, output                             x M or y M over blocks of head_dim entries (all entries without it)
    q_attn, k_cache                           the same for queries and keys after their rotary embedding

The matrix of a group and size is one object for all modules that use it, and is stored under the first of them as
<module>.<group>_<location>.weight (with .perm beside it for `randomize`).  Of a group of type random-matrix an inverse is
a matrix of its own.  Source: compressed-tensors 0.12 to 0.20 transform/ (names, keys and rules, written anew).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bitgrain.checkpoint.headers import TensorHeader
from bitgrain.errors import ConfigError, ConflictingConfigError
from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.compressed_tensors.names import WHERE
from bitgrain.formats.compressed_tensors.schemes.transformed import MATRIX_TYPE, TYPES, OnlineTransform
from bitgrain.formats.compressed_tensors.targets import TargetRules
from bitgrain.formats.config_reader import ConfigReader, words

OFFLINE = ("weight_input", "weight_output")
LINEAR_ONLINE = ("input", "output")
ATTENTION_ONLINE = ("q_attn", "k_cache")
LOCATIONS = (*OFFLINE, *LINEAR_ONLINE, *ATTENTION_ONLINE)
PLACE = f"{WHERE}.transform_config"
_PRECISIONS = words("float64 float32 float16 bfloat16 torch.float64 torch.float32 torch.float16 torch.bfloat16")
_TENSORS = ("weight", "perm")
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Application:
    """One entry of a group's `apply`.

    Args:
        kind:      the group's type.
        head_dim:  entries of a block; 0: all of them.
        permuted:  a stored permutation stands before and behind the matrix (`randomize`).
    """

    group: str
    kind: str
    location: str
    inverse: bool
    head_dim: int
    permuted: bool
    targets: TargetRules
    ignore: TargetRules

    @property
    def name(self) -> str:
        """What stands between a module's name and the tensor's."""
        return f"{self.group}_{self.location}"

    @property
    def matrix_key(self) -> tuple[str, bool]:
        """Applications with equal keys use one matrix for one size."""
        return self.group, self.inverse and self.kind == MATRIX_TYPE


@dataclass(frozen=True, slots=True)
class Transforms:
    """All of them, with the matrices that the checkpoint stores.

    Args:
        applications: in the order in which the producer applied them.
        stored:       full names of tensors of online transforms.
    """

    applications: tuple[Application, ...] = ()
    stored: Mapping[str, TensorHeader] = field(default_factory=dict)

    @property
    def rules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(rule for a in self.applications for rule in (*a.targets.rules, *a.ignore.rules)))

    def split_name(self, full: str) -> tuple[str, str] | None:
        """(module, local name) of a tensor of an online transform; None of any other."""
        head, _, last = full.rpartition(".")
        module, _, name = head.rpartition(".")
        online = any(a.name == name for a in self.applications if a.location not in OFFLINE)
        return (module, f"{name}.{last}") if online and last in _TENSORS else None

    def attention_of(self, full: str) -> str | None:
        """The attention module that a tensor of queries' and keys' transforms is stored under; None for any other tensor."""
        found = self.split_name(full)
        return found[0] if found is not None and found[1].rpartition(".")[0].endswith(ATTENTION_ONLINE) else None

    def of(self, module: ModuleView, matched: set[str]) -> list[Application]:
        """The online ones that name a module, in order; adds the rules that did, of offline ones too, to `matched`."""
        found: list[Application] = []
        for application in self.applications:
            ignored, targets = application.ignore.matches(module), application.targets.matches(module)
            matched.update(ignored, targets)
            if targets and not ignored and application.location not in OFFLINE:
                found.append(application)
        names = [a.name for a in found]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ConflictingConfigError(f"{PLACE}: {module.name}", f"{twice} is applied twice", "each location of a group once", "narrow the targets in `apply`")
        places = ATTENTION_ONLINE if module.kind is ModuleKind.ATTENTION else () if module.kind is ModuleKind.EMBEDDING else LINEAR_ONLINE
        for application in found:
            if application.location not in places:
                raise ConfigError(
                    f"{PLACE}.config_groups.{application.group}", f"location {application.location!r} at {module.name}, a module of kind {module.kind.value}",
                    f"one of {', '.join((*places, *OFFLINE))}", "this transform is not supported by this version",
                )  # fmt: skip
        return found

    def resolved(self, module: str, application: Application, width: int) -> OnlineTransform:
        """An application at one module, with the place of its matrix.

        Args:
            width: entries of what is mapped; 0 if that is not known before the block size.
        Raises:
            ConfigError: blocks that do not divide the width.
            ConflictingConfigError: several stored matrices could be meant.
        """
        size = application.head_dim or width
        if size < 1 or width % size:
            raise ConfigError(
                f"{PLACE}.config_groups.{application.group}.head_dim", f"{application.head_dim or None} for {width} entries of {module} at {application.location!r}",
                "a divisor of them", "correct the configuration",
            )  # fmt: skip
        source = self._source(f"{module}.{application.name}", application, size)
        return OnlineTransform(application.name, application.location, application.kind, size, application.inverse, application.permuted, source, module)

    def _source(self, own: str, application: Application, size: int) -> str:
        """What stands before ".weight" of the stored matrix; "" if it is to be computed."""
        if f"{own}.weight" in self.stored or f"{own}.perm" in self.stored:
            return own
        keys: dict[str, set[tuple[str, bool]]] = {}
        for a in self.applications:
            keys.setdefault(a.name, set()).add(a.matrix_key)
        found = []
        for full, header in self.stored.items():
            prefix, _, last = full.rpartition(".")
            if last == "weight" and header.shape == (size, size) and keys.get(prefix.rpartition(".")[2]) == {application.matrix_key}:
                found.append(prefix)
        if len(found) > 1:
            raise ConflictingConfigError(
                f"{own}.weight", f"absent, and {' and '.join(f'{prefix}.weight' for prefix in found[:2])} could both stand for it",
                "one matrix of the group and size", "fetch or write the checkpoint again",
            )  # fmt: skip
        computed = application.kind == TYPES[0] and not application.permuted and not self.stored and not size & (size - 1)
        return found[0] if found else "" if computed else own


def check_tied_head(transforms: Transforms, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Raise ConfigError if a head that stores nothing of its own has an online transform: it would be the embedding's matrix without.

    Args:
        config: config.json.
    """
    if config.get("tie_word_embeddings") is not True or any(name.startswith(f"{HEAD}.") for name in tensors):
        return
    found = transforms.of(ModuleView(HEAD, ModuleKind.LM_HEAD, {}), set())
    if found:
        raise ConfigError(
            f"{PLACE}.config_groups.{found[0].group}", f"{found[0].location} of {HEAD}, which is tied to the embedding", "a head with a weight of its own",
            "add the head to `ignore`, or save it untied",
        )  # fmt: skip


def parse_transforms(value: Any, tensors: Mapping[str, TensorHeader]) -> Transforms:
    """The transforms that `transform_config` announces.

    Args:
        tensors: every stored tensor.
    Raises:
        ConfigError: unknown types, locations and keys, impossible values; all of them at once.
    """
    if not value:
        return Transforms()
    if not isinstance(value, Mapping):
        raise ConfigError(PLACE, repr(value)[:200], "an object of groups, or null", "correct the configuration")
    reader = ConfigReader(value, PLACE)
    groups = reader.section("config_groups", "an object of groups")
    found: list[Application] = []
    for name, entry in groups.items():
        found += reader.collect(lambda name=name, entry=entry: _parse_group(name, entry)) or ()  # type: ignore[misc]
    reader.finish()
    transforms = Transforms(tuple(found))
    stored = {full: header for full, header in tensors.items() if transforms.split_name(full) is not None}
    return Transforms(tuple(found), stored)


def _parse_group(name: str, entry: Any) -> Iterable[Application]:
    where = f"{PLACE}.config_groups.{name}"
    if not isinstance(entry, Mapping):
        raise ConfigError(where, repr(entry)[:200], "an object of type and apply", "correct the configuration")
    reader = ConfigReader(entry, where)
    reader.skip(("apply",))
    if entry.get("type") is None:
        reader.problem("type", "absent", f"one of {', '.join(TYPES)}")
    kind = reader.choice("type", {t: t for t in TYPES}, TYPES[0])
    permuted = reader.flag("randomize") is True
    if permuted and kind == MATRIX_TYPE:
        permuted = False  # the library has no permutations for it
    reader.need("requires_grad", lambda v: v is False, "false: matrices that are no longer trained", "save the model after its training ended")
    reader.need("precision", lambda v: str(v) in _PRECISIONS, f"one of {', '.join(sorted(_PRECISIONS))}", "correct the configuration")
    head_dim = reader.integer("head_dim", minimum=1, default=0)
    applied = entry.get("apply")
    if not isinstance(applied, list):
        reader.problem("apply", repr(applied)[:200], "a list of objects with targets and location")
        applied = []
    found = []
    for place, data in enumerate(applied):
        read = reader.collect(lambda place=place, data=data: _parse_application(f"{where}.apply[{place}]", data))  # type: ignore[misc]
        if read is not None:
            targets, ignore, location, inverse = read
            if location in ATTENTION_ONLINE and not head_dim:
                reader.problem("head_dim", "absent", f"the entries of a block for location {location!r}")
            found.append(Application(name, kind, location, inverse, head_dim, permuted, targets, ignore))
    reader.finish()
    return found


def _parse_application(where: str, data: Any) -> tuple[TargetRules, TargetRules, str, bool]:
    if not isinstance(data, Mapping):
        raise ConfigError(where, repr(data)[:200], "an object with targets and location", "correct the configuration")
    reader = ConfigReader(data, where)
    if data.get("location") is None:
        reader.problem("location", "absent", f"one of {', '.join(LOCATIONS)}")
    location = reader.choice("location", {place: place for place in LOCATIONS}, OFFLINE[0])
    targets, ignore, inverse = reader.names("targets"), reader.names("ignore"), reader.flag("inverse") is True
    if not targets and not reader.problems:
        reader.problem("targets", repr(data.get("targets")), "a list of at least one target")
    reader.finish()
    return TargetRules(targets, f"{where}.targets"), TargetRules(ignore, f"{where}.ignore"), location, inverse

