"""From headers to a Plan: modules found, schemes chosen, every tensor accounted for, fusion decided last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from bitgrain.checkpoint.files import CheckpointFiles
from bitgrain.checkpoint.headers import FLOAT_CODES, TensorHeader
from bitgrain.checkpoint.parts import Step, Transpose, part_of, shared
from bitgrain.errors import (
    BitgrainError,
    DtypeMismatchError,
    MissingTensorError,
    ShapeMismatchError,
    UnexpectedTensorError,
    raise_all,
)
from bitgrain.formats.attention_schemes import KVCacheScheme
from bitgrain.formats.base import MATRIX_KINDS, Choice, ModuleKind, ModuleView, QuantConfig, TensorRule
from bitgrain.formats.detect import answers_to, check_hint, detect, gather_evidence
from bitgrain.formats.kv_scales import kv_scale_of
from bitgrain.formats.matching import NameHints
from bitgrain.formats.online import online_config, online_request
from bitgrain.formats.slots import ModelSlots, ModuleSlot
from bitgrain.plan import Fusion, ModulePlan, Plan

# Buffers that some writers save although the configuration gives them; the ledger names the rule.
IGNORED_SUFFIXES = {"rotary_emb.inv_freq": "rotary frequencies follow from the configuration"}

EMBEDDING_NAMES = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")
HEAD_NAMES = ("lm_head", "embed_out")


@dataclass(frozen=True, slots=True)
class ResolveOptions:
    """What the user asks of resolution.

    Args:
        quantization:  the format, which must agree with the evidence; or what an unquantized checkpoint is to become while
                       it loads, a name of quantize.TARGETS.
        ignore, rules: see formats.online.OnlineRequest.
        trust_tensors: where a rule excludes a module that has quantized tensors, believe the tensors.
    """

    quantization: str | None = None
    trust_tensors: bool = False
    ignore: tuple[str, ...] = ()
    rules: Mapping[str, str] = field(default_factory=dict)


def resolve(files: CheckpointFiles, slots: ModelSlots | None, options: ResolveOptions) -> Plan:
    """The plan of a checkpoint, from headers alone.

    Args:
        slots: the modules that the architecture must have; None when the architecture is not known, which still
               resolves every module but cannot see that one is absent.
    Raises:
        ManyProblemsError (or the single problem): everything that is missing, unexpected, misshapen or contradictory.
    """
    evidence = gather_evidence(files)
    asked = options.quantization
    online = online_request(asked, options.ignore, options.rules)
    format_class, detection = detect(evidence)
    if asked is not None and not answers_to(format_class, asked):
        check_hint(asked, format_class, detection, online is not None)
    config = format_class.parse(evidence)
    if online is not None and (options.rules or not answers_to(format_class, asked)):
        config = online_config(config, online, asked)
    config.trust_tensors = options.trust_tensors
    ignored = {n: rule for n in files.tensors for suffix, rule in IGNORED_SUFFIXES.items() if n.endswith(suffix)}
    ignored |= config.left_out(files.tensors) | (slots.left_out(files.tensors) if slots else {})
    resolution = _Resolution(files, config, slots, ignored)
    modules = resolution.modules()
    raise_all(files.label, resolution.problems)
    fusions = tuple(resolution.joints.get(group) or _fuse(group, modules) for group in slots.fusion_groups) if slots else ()
    notes = (*files.notes, *(slots.notes if slots else ()), *_unmatched_rules(config, modules, resolution.hints))
    return Plan(config.name, detection.reasons, modules, fusions, ignored, notes, slots.join if slots else "")


class _Resolution:
    """One pass over all modules, collecting problems instead of stopping at the first."""

    def __init__(self, files: CheckpointFiles, config: QuantConfig, slots: ModelSlots | None, ignored: Mapping[str, str]) -> None:
        self.files, self.config, self.slots = files, config, slots
        self.by_name: dict[str, ModuleSlot] = {s.name: s for s in slots.modules} if slots else {}
        self.problems: list[BitgrainError] = []
        self.hints = NameHints()
        self.local: dict[str, dict[str, TensorHeader]] = {}
        self.attention: dict[str, dict[str, TensorHeader]] = {}
        self.blamed: set[str] = set()
        kept = {name: header for name, header in files.tensors.items() if name not in ignored}
        self.parts = config.parts(kept, slots.experts if slots else None)
        self._turn_transposed()
        for name, part in self.parts.items():
            cache = None if config.is_own_scale(name) else kv_scale_of(name)
            attention = config.attention_of(name) if cache is None else cache[0]
            if attention is not None:
                self.attention.setdefault(attention, {})[name] = part.header
                continue
            slot = self.by_name.get(name)
            module, local = (name, "") if slot is not None and slot.bare else config.split_name(name)
            self.local.setdefault(module, {})[local] = part.header
        self.joints: dict[tuple[str, ...], Fusion] = {}
        for group in slots.fusion_groups if slots else ():
            self._join(group)

    def _turn_transposed(self) -> None:
        """Weights that the architecture stores [K, N] are seen as [N, K]; quantized ones are stored as everybody's."""
        for slot in (slot for slot in self.by_name.values() if slot.transposed):
            part = self.parts.get(f"{slot.name}.weight")
            if part is not None and not part.steps and part.header.dtype in FLOAT_CODES and len(part.header.shape) == 2:
                self.parts[part.header.name] = part_of(part.header, part.header.name, Transpose())

    def _join(self, group: tuple[str, ...]) -> None:
        """Let one slot stand for a group that the checkpoint stores as one module."""
        found = self.config.joint_module(group)
        if found is None or found[0] not in self.local or any(name in self.local for name in group):
            return
        name, places = found
        parts = [self.by_name[group[places.index(place)]] for place in range(len(group))]
        heights = tuple(part.shape[0] for part in parts)
        joint = ModuleSlot(name, parts[0].kind, (sum(heights), parts[0].shape[1]), parts[0].bias, heights=heights)
        # in the place of the group's first, so that the plan keeps the order of the model
        kept = {slot: joint if slot == group[0] else known for slot, known in self.by_name.items() if slot not in group[1:]}
        self.by_name = {slot.name: slot for slot in kept.values()}
        self.joints[group] = Fusion(group, True, f"stored as one module, {name}", name, places, heights)

    def modules(self) -> dict[str, ModulePlan]:
        rows: dict[str, ModulePlan] = {}
        order = list(dict.fromkeys([*self.by_name, *self.local])) if self.slots else list(self.local)
        for name in order:
            row = self._module(name)
            if row is not None:
                rows[name] = row
        for name in dict.fromkeys([*(self.slots.attention_modules if self.slots else ()), *self.attention]):
            row = self._attention(name)
            if row is not None:
                rows[name] = row
        return rows

    def _module(self, name: str) -> ModulePlan | None:
        slot = self.by_name.get(name)
        tensors = self.local.get(name, {})
        if self.slots is not None and slot is None:
            self._unexpected_module(name, tensors)
            return None
        if not tensors:
            return self._absent(slot) if slot else None
        kind = slot.kind if slot else _infer_kind(name, tensors)
        if kind is ModuleKind.VECTOR:
            return self._vector(name, tensors, slot)
        shape = (slot.shape[0], slot.shape[1]) if slot else None
        view = ModuleView(name, kind, tensors, shape, slot.heights if slot else ())
        try:
            choice = _choose(self.config, view)
        except BitgrainError as problem:
            self.problems.append(problem)
            return None
        view = replace(view, tensors=self._with_borrowed(name, tensors, choice.scheme.borrowed))
        if self._account(view, choice, slot):
            return None
        own = self.config.unties_head or self.config.is_quantized(view)
        tied = slot.tied_to if slot and not own else None
        return self._row(view, choice, tied)

    def _with_borrowed(self, module: str, tensors: Mapping[str, TensorHeader], borrowed: Sequence[tuple[str, str]], full: bool = False) -> dict[str, TensorHeader]:
        """The tensors and those of other modules that this one uses too; an absent one stays absent, for the comparison to find.

        Args:
            full: keys are full names, not local ones.
        """
        found = dict(tensors)
        for local, stored in borrowed:
            name = f"{module}.{local}" if module else local
            if stored in self.files.tensors:
                self.parts[name] = shared(self.files.tensors[stored], name)
                found[name if full else local] = self.parts[name].header
        return found

    def _row(self, view: ModuleView, choice: Choice, tied: str | None) -> ModulePlan:
        sources, steps = self._origin(view.tensors)
        return ModulePlan(
            view.name, view.kind, choice.scheme.shape, tuple(h.name for h in view.tensors.values()), tuple(view.tensors), _files(view.tensors),
            _bytes(view.tensors), choice.why, choice.scheme, tied_to=tied, has_bias=choice.scheme.holds_bias or "bias" in view.tensors,
            sources=sources, steps=steps, use=self.by_name[view.name].use if view.name in self.by_name else "",
        )  # fmt: skip

    def _origin(self, tensors: Mapping[str, TensorHeader]) -> tuple[tuple[str, ...], tuple[tuple[Step, ...], ...]]:
        """(stored names, steps) of a module's tensors; both empty where each is a stored tensor of the same name."""
        parts = [self.parts[header.name] for header in tensors.values()]
        if all(not part.steps and part.source == part.header.name for part in parts):
            return (), ()
        return tuple(p.source for p in parts), tuple(p.steps for p in parts)

    def _absent(self, slot: ModuleSlot) -> ModulePlan | None:
        if slot.tied_to is not None:
            return ModulePlan(slot.name, slot.kind, tuple(slot.shape), (), (), (), 0, "the configuration ties it", tied_to=slot.tied_to)
        near = self.hints.nearest(slot.name, self.local)
        self.problems.append(
            MissingTensorError(
                slot.name if slot.bare else f"{slot.name}.weight", f"the checkpoint holds no tensor of this module{_near(near)}",
                f"the {slot.kind.value} {list(slot.shape)} that the architecture has", f"fetch or write the checkpoint again, or correct {self.files.config_name}",
            )
        )  # fmt: skip
        return None

    def _unexpected_module(self, name: str, tensors: Mapping[str, TensorHeader]) -> None:
        near = self.hints.nearest(name, self.by_name)
        for header in tensors.values():
            self.problems.append(
                UnexpectedTensorError(
                    f"{header.file}: {header.name}", f"{header.describe()}, but the architecture has no module {name!r}{_near(near)}",
                    "tensors of known modules only", f"the model would run without it: correct {self.files.config_name}, or fetch the right checkpoint",
                )
            )  # fmt: skip

    def _vector(self, name: str, tensors: Mapping[str, TensorHeader], slot: ModuleSlot | None) -> ModulePlan | None:
        first = next(iter(tensors.values()))
        shape = tuple(slot.shape) if slot else first.shape
        if slot is not None:
            rules = [TensorRule("" if slot.bare else "weight", FLOAT_CODES, (tuple(slot.shape),))]
            if not slot.bare and self.config.norm_biases:
                rules.append(TensorRule("bias", FLOAT_CODES, (tuple(slot.shape),), required=False))
            if self._compare(name, tensors, rules):
                return None
        full = tuple(header.name for header in tensors.values())
        sources, steps = self._origin(tensors)
        why = "not a matrix: stored as is"
        return ModulePlan(name, ModuleKind.VECTOR, shape, full, tuple(tensors), _files(tensors), _bytes(tensors), why, sources=sources, steps=steps)

    def _attention(self, name: str) -> ModulePlan | None:
        tensors = self.attention.get(name, {})
        if self.slots is not None and name not in self.slots.attention_modules:
            self._unexpected_module("", tensors)
            return None
        view = ModuleView(name, ModuleKind.ATTENTION, tensors)
        try:
            cache = self.config.get_kv_cache_scheme(view)
        except BitgrainError as problem:
            self.problems.append(problem)
            return None
        known = {full for full, _ in cache.scales}
        if cache.heads is not None:
            rules = cache.heads.tensors()
            tensors = self._with_borrowed(name, tensors, cache.heads.borrowed, full=True)
            heads = {rule.name: tensors[view.full_name(rule.name)] for rule in rules if view.full_name(rule.name) in tensors}
            self._compare(name, heads, rules)
            known |= {header.name for header in heads.values()}
        for full in tensors.keys() - known:
            self.problems.append(
                UnexpectedTensorError(
                    f"{tensors[full].file}: {full}", "a tensor of an attention module that the configuration does not explain", "a kv_cache_scheme or transform_config that does, or no such tensor",
                    "correct the configuration",
                )
            )  # fmt: skip
        if not tensors and cache.element == "none" and cache.heads is None:
            return None
        return self._attention_row(name, tensors, cache)

    def _attention_row(self, name: str, tensors: Mapping[str, TensorHeader], cache: KVCacheScheme) -> ModulePlan:
        why = "scales of the KV cache are stored" if cache.scales else "the configuration says so"
        sources = tuple(self.parts[full].source for full in tensors)
        return ModulePlan(
            name, ModuleKind.ATTENTION, (), tuple(tensors), tuple(tensors), _files(tensors), _bytes(tensors), why, kv_cache=cache,
            sources=sources if sources != tuple(tensors) else (), steps=((),) * len(sources) if sources != tuple(tensors) else (),
        )  # fmt: skip

    def _account(self, view: ModuleView, choice: Choice, slot: ModuleSlot | None) -> bool:
        """Compare headers with the scheme's declaration; True when there is a problem."""
        scheme = choice.scheme
        bias = scheme.bias_rule()
        needs_bias = slot is not None and slot.bias == "required" and not scheme.holds_bias
        rules = (*scheme.tensors(), TensorRule(bias.name, bias.dtypes, bias.shapes, required=needs_bias))
        found = self._compare(view.name, view.tensors, rules)
        if view.shape is not None and scheme.shape != view.shape:
            self.problems.append(
                ShapeMismatchError(
                    view.name, f"the tensors make a matrix {list(scheme.shape)}", f"{list(view.shape)}, which {self.files.config_name} gives the module",
                    f"correct {self.files.config_name} (sizes, bits, group_size), or fetch the right checkpoint",
                )
            )  # fmt: skip
            return True
        return found

    def _compare(self, module: str, tensors: Mapping[str, TensorHeader], rules: Sequence[TensorRule]) -> bool:
        before = len(self.problems)
        declared = {rule.name: rule for rule in rules}
        for rule in rules:
            if rule.name not in tensors and rule.required:
                there = f"{', '.join(sorted(tensors))} in {', '.join(_files(tensors))}"
                self.problems.append(
                    MissingTensorError(f"{module}.{rule.name}", f"absent; the module has {there}", f"{'/'.join(rule.dtypes)} {list(rule.shapes[0])}", "fetch or write the checkpoint again")
                )
        wrong = len(self.problems) > before
        for local, header in tensors.items():
            part = self.parts[header.name]
            where = f"{header.file}: {header.name}" + (f", part of {part.source}" if part.steps else "")
            problem = _mismatch(where, header, declared.get(local), list(declared))
            if problem is not None and part.source not in self.blamed:
                self.problems.append(problem)
            if problem is not None:
                self.blamed.add(part.source)  # a tensor that modules share is wrong once, not once for each
                wrong = True
        return wrong


def _mismatch(where: str, header: TensorHeader, rule: TensorRule | None, declared: list[str]) -> BitgrainError | None:
    if rule is None:
        return UnexpectedTensorError(
            where, f"{header.describe()}, which the module's scheme does not declare", f"only {', '.join(declared)}",
            "the model would run without it: correct the configuration, or fetch the right checkpoint",
        )  # fmt: skip
    if header.dtype not in rule.dtypes:
        return DtypeMismatchError(where, header.dtype, " or ".join(rule.dtypes), "correct the configuration, or fetch the right checkpoint")
    if not rule.allows_shape(header.shape):
        needed = " or ".join(str(["any" if n == -1 else n for n in shape]) for shape in rule.shapes)
        return ShapeMismatchError(where, f"shape {list(header.shape)}", f"{needed}, by the configuration (bits, group_size, sizes)", "correct the configuration, or fetch the right checkpoint")
    return None


def _choose(config: QuantConfig, view: ModuleView) -> Choice:
    """Each kind asks for its own scheme; no module gets another kind's."""
    if view.kind is ModuleKind.EXPERT:
        return config.get_moe_scheme(view)
    if view.kind is ModuleKind.EMBEDDING:
        return config.get_embedding_scheme(view)
    if view.kind is ModuleKind.LM_HEAD:
        return config.get_lm_head_scheme(view)
    return config.get_linear_scheme(view)


def _infer_kind(name: str, tensors: Mapping[str, TensorHeader]) -> ModuleKind:
    """The kind of a module of an unknown architecture, from its name and the shapes of its tensors."""
    segments = name.split(".")
    if segments[-1] in EMBEDDING_NAMES:
        return ModuleKind.EMBEDDING
    if segments[-1] in HEAD_NAMES:
        return ModuleKind.LM_HEAD
    only_plain = set(tensors) <= {"weight", "bias"}
    weight = tensors.get("weight")
    if only_plain and (weight is None or len(weight.shape) != 2):
        return ModuleKind.VECTOR
    plain_parameter = not only_plain and all("weight" not in t and "scale" not in t and "zero" not in t for t in tensors)
    if plain_parameter and all(len(h.shape) < 2 for h in tensors.values()):
        return ModuleKind.VECTOR
    return ModuleKind.EXPERT if "experts" in segments else ModuleKind.LINEAR


def _fuse(group: Sequence[str], modules: Mapping[str, ModulePlan]) -> Fusion:
    """Whether modules of one input become one matrix; decided after each has its scheme."""
    rows = [modules[name] for name in group]
    schemes = [row.scheme for row in rows]
    if any(s is None or row.kind not in MATRIX_KINDS for s, row in zip(schemes, rows, strict=True)):
        return Fusion(tuple(group), False, "not all of them are matrices")
    if len({s.fusion_key() for s in schemes if s}) != 1:
        return Fusion(tuple(group), False, "schemes differ: " + "; ".join(f"{r.name.rpartition('.')[2]} {r.label}" for r in rows))
    first = schemes[0]
    assert first is not None  # checked above
    if first.weight_spec.group_index:
        return Fusion(tuple(group), False, "each part has its own order of columns (act-order)")
    if first.activation.has_stored_values:
        return Fusion(tuple(group), False, "each part has its own stored values for its input (static scale, second scale or clipping)")
    if first.transforms_input:
        return Fusion(tuple(group), False, "each part transforms its input in its own way")
    if first.has_own_codebooks:
        return Fusion(tuple(group), False, "each part has its own codebooks")
    if len({r.has_bias for r in rows}) != 1:
        return Fusion(tuple(group), False, "only some of them have a bias")
    return Fusion(tuple(group), True, "equal schemes on one input")


def _unmatched_rules(config: QuantConfig, modules: Mapping[str, ModulePlan], hints: NameHints) -> list[str]:
    unmatched = [rule for rule in config.rules() if rule not in config.matched_rules]
    return [f"rule {rule!r} of the configuration matches no module{_near(hints.nearest(rule, modules))}" for rule in unmatched]


def _near(names: Sequence[str]) -> str:
    return f" (nearest: {', '.join(names)})" if names else ""


def _files(tensors: Mapping[str, TensorHeader]) -> tuple[str, ...]:
    return tuple(sorted({h.file for h in tensors.values()}))


def _bytes(tensors: Mapping[str, TensorHeader]) -> int:
    return sum(h.nbytes for h in tensors.values())
