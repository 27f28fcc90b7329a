"""Which hyper-parameters a group has after loading: the saved ones or its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

from torch import Tensor

from steprule import errors, group_errors, rule_errors
from steprule.engine import group_keys, views
from steprule.engine.checkpoint import origin
from steprule.engine.checkpoint.matching import SHAPES, Match, Place, names_of
from steprule.engine.checkpoint.report import Change, plain
from steprule.engine.evaluation import EVALUATING
from steprule.engine.fields import SKIPPED_STEPS

CHOICES = ("saved", "current")
# Keys that belong to the parameters or to the group itself, not to its settings.
OWN = frozenset(
    {"params", "param_names", SHAPES, "name", SKIPPED_STEPS, "rule", "modifiers", EVALUATING, views.KEY}
)
# Keys of schedulers and WeightDecay, each with the hyper-parameters that it belongs to.
FOLLOWS = {
    "initial_lr": ("lr",),
    "max_lr": ("lr",),
    "min_lr": ("lr",),
    "swa_lr": ("lr",),
    "base_momentum": ("momentum", "betas"),
    "max_momentum": ("momentum", "betas"),
    "weight_decay_mode": ("weight_decay",),
    "peak_lr": ("weight_decay",),
    "decoupled_weight_decay": ("weight_decay",),
}
# How the state is stored: decided by the optimizer that loads, unless "saved" is asked for by name.
STORAGE = ("state_dtype", "low_precision")
_ABSENT = object()


def chooser(
    who: str, hyperparams: Any, known: set[str], groups: Iterable[Mapping[str, Any]]
) -> Callable[[str], str]:
    """'saved' or 'current' for every key, from what the user asked for.

    known: the rule's hyper-parameters. Keys of the groups may be named as well.

    Raises: ValueError for a choice or a hyper-parameter that does not exist.
    """
    allowed = "'saved', 'current', or a dict from names to these"
    if not isinstance(hyperparams, Mapping):
        if hyperparams not in CHOICES:
            raise errors.out_of_range(f"{who}.load_state_dict", "hyperparams", hyperparams, allowed)
        return lambda key: "current" if key in STORAGE else hyperparams
    asked = cast("Mapping[str, str]", hyperparams)
    for name, choice in asked.items():
        if name not in known.union(FOLLOWS, *groups):
            raise errors.unknown_hyperparameter(who, name, known)
        if choice not in CHOICES:
            raise errors.out_of_range(f"{who}.load_state_dict", f"hyperparams['{name}']", choice, allowed)

    def choose(key: str) -> str:
        leaders = [name for name in (key, *FOLLOWS.get(key, ())) if name in asked]
        return asked[leaders[0]] if leaders else "current" if key in STORAGE else "saved"

    return choose


class Resumed:
    """The groups that an optimizer has after loading: `groups`, and what there is to report."""

    def __init__(
        self,
        optimizer: Any,
        saved: list[dict[str, Any]],
        match: Match,
        choose: Callable[[str], str],
        strict: bool,
    ):
        self.who = type(optimizer).__name__
        self.optimizer = optimizer
        self.saved = saved
        self.choose = choose
        self.strict = strict
        self.differences: list[Change] = []
        self.unexpected: list[str] = []
        self.notes: list[str] = []
        own: list[dict[str, Any]] = optimizer.param_groups
        self.names_rules = any("rule" in group for group in (*saved, *own))
        pairs = match.pairs + match.reshaped
        if match.by == "position":
            self.sources = [[index] for index in range(len(own))]
            self.homes: list[int | None] = list(range(len(own)))
        else:
            shared = Counter((here.group, there.group) for there, here in pairs)
            self.sources = [sorted(i for g, i in shared if g == index) for index in range(len(own))]
            self.homes = [self._home(index, shared) for index in range(len(own))]
        self.own = own
        self._check_views(pairs)
        self.groups = [self._group(index) for index in range(len(own))]

    def _check_views(self, pairs: Sequence[tuple[Place, Place]]) -> None:
        """Report parameters whose matrices lie in them in another way than when they were saved."""
        for there, here in pairs:
            saved = self.saved[there.group]
            known: list[Any] = saved.get(views.KEY) or []
            place = list(saved["params"]).index(there.key)
            before = known[place] if place < len(known) else None
            old = views.View(**cast("dict[str, Any]", before or {}))
            new = views.of(self.own[here.group], here.key)
            if old != new:
                seen, now = (str(x) or "as they are" for x in (old, new))
                if self.strict:
                    raise group_errors.other_views(self.who, here.label, seen, now)
                self.differences.append(Change(f"{here.label}: views", seen, now, "current"))

    def moved(self, match: Match) -> list[Change]:
        """The parameters whose group here does not continue the one they were saved in."""
        return [
            Change(here.label, there.group, here.group, "current")
            for there, here in match.pairs
            if there.group != (here.group if self.homes[here.group] is None else self.homes[here.group])
        ]

    def _home(self, index: int, shared: Counter[tuple[int, int]]) -> int | None:
        """The saved group that this group continues: each must have most of the other's parameters."""
        here = {i: n for (g, i), n in shared.items() if g == index}
        for i, count in here.items():
            there = sum(n for (_, j), n in shared.items() if j == i)
            if 2 * count > sum(here.values()) and 2 * count > there:
                return i
        return None

    def _group(self, index: int) -> dict[str, Any]:
        own = self.own[index]
        home = self.homes[index]
        sources = [self.saved[i] for i in (self.sources[index] if home is None else [home])]
        fitted = {key: value for key, value in own.items() if key != "params"}
        sources = self._of_same_parts(index, sources)
        for key in dict.fromkeys(key for source in sources for key in source):
            if key in OWN:
                continue
            if key not in fitted and not self._takes(key, sources, index):
                continue
            values = [source.get(key, _ABSENT) for source in sources]
            value = self._value(key, values, index)
            if value is not _ABSENT:
                fitted[key] = deepcopy(value)
        for key in STORAGE:
            if key in fitted and self.choose(key) == "saved" and not any(key in x for x in sources):
                self.differences.append(Change(f"{key} (group {index})", None, fitted.pop(key)))
        if len(sources) == 1:
            names = {"param_names": names_of(sources[0]), "name": sources[0].get("name")}
            fitted |= {k: deepcopy(v) for k, v in names.items() if v is not None and k not in fitted}
        evaluating = any(source.get(EVALUATING) for source in sources)
        fitted = {key: value for key, value in fitted.items() if key != EVALUATING}
        fitted |= {EVALUATING: True} if evaluating else {}
        counts = [source[SKIPPED_STEPS] for source in sources if SKIPPED_STEPS in source]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise errors.out_of_range(self.who, SKIPPED_STEPS, max(counts, key=str), "a whole number", index)
        fitted |= {SKIPPED_STEPS: max(counts)} if counts else {}
        return {"params": own["params"], **self.optimizer._normalize(fitted, index)}

    def _of_same_parts(self, index: int, sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The sources whose hyper-parameters are those of the group's rule. Other modifiers are reported."""
        own = self.own[index]
        rule, modifiers = self.optimizer.who(own), own.get("modifiers") or ()
        kept: list[dict[str, Any]] = []
        for source in sources:
            saved_rule, saved = self._rule_of(source, own), source.get("modifiers") or ()
            pairs = {"the rule": (saved_rule, rule), "the modifiers": (_listed(saved), _listed(modifiers))}
            for what, (there, here) in pairs.items():
                if there != here:
                    if self.strict:
                        raise rule_errors.other_modifiers(self.who, what, there, here, index)
                    self.differences.append(Change(f"{what} (group {index})", there, here, "current"))
            kept += [source] if saved_rule == rule else []
        return kept

    def _rule_of(self, source: Mapping[str, Any], own: Mapping[str, Any]) -> str:
        if not self.names_rules:
            return source.get("rule", self.optimizer.who(own))
        return origin.rule_of_saved(source, self.optimizer.rule_of(own))

    def same_rule(self, there: Place, here: Place) -> bool:
        """Whether a saved parameter was stepped by the rule that steps it now."""
        own = self.own[here.group]
        return self._rule_of(self.saved[there.group], own) == self.optimizer.who(own)

    def _takes(self, key: str, sources: list[dict[str, Any]], index: int) -> bool:
        """Whether the group takes over a key that it does not have yet."""
        known = self.optimizer.known_keys(self.own[index])
        if key in known or key in FOLLOWS:
            return True
        if any(key.partition(".")[0] in (source.get("modifiers") or ()) for source in sources):
            self.unexpected.append(f"hyper-parameter '{key}' (group {index})")
            return False
        values = [source[key] for source in sources if key in source]
        problem = self._not_a_note(key, values, known, index)
        if problem is None:
            self.notes += [f"{key} = {plain(values[0])} (group {index})"]
            return True
        if self.strict and any(value is not None and value is not False for value in values):
            raise problem
        self.unexpected.append(f"hyper-parameter '{key}' (group {index})")
        return False

    def _not_a_note(self, key: str, values: list[Any], known: set[str], index: int) -> Exception | None:
        """What is wrong with treating this key as a note of the user's, if anything."""
        if key in (theirs := origin.hyperparameters_of_torch(self.optimizer.rule_of(self.own[index]))):
            neutral = all(value is None or value is False or same(value, theirs[key]) for value in values)
            return None if neutral else errors.option_of_another_version(self.who, key, values[0], index)
        try:
            for value in values:
                group_keys.check(self.who, {key: value}, known, index)
        except ValueError as problem:
            return problem
        return None

    def _value(self, key: str, saved: list[Any], index: int) -> Any:
        """The group's value for one key; differences are recorded."""
        current = self.own[index].get(key, _ABSENT)
        differing = [value for value in saved if value is not _ABSENT and not same(value, current)]
        if not differing:
            return current
        choice, settled = self.choose(key), self._settled(key, saved, index)
        choice = "current" if key in self.optimizer.rule_of(self.own[index]).fixed else choice
        # What parameters share is state: never kept as it is here, and no difference to report.
        state = key in self._shared(index)
        choice = "saved" if state else choice
        if current is _ABSENT:
            taken = "saved" if choice == "saved" and settled else "current"
            if key in STORAGE:
                self.differences.append(Change(f"{key} (group {index})", differing[0], None, taken))
            return saved[0] if taken == "saved" else _ABSENT
        if choice == "saved" and not settled:
            if self.strict and key in self.optimizer.known_keys(self.own[index]):
                values = ", ".join(dict.fromkeys(plain(value) for value in differing))
                problem = (
                    f"parameter group {index} has {key} = {plain(current)}, but its parameters come from "
                    f"saved groups that were divided differently, with {key} = {values}"
                )
                fix = f"Pass hyperparams={{'{key}': 'current'}}, or strict=False, to keep {plain(current)}."
                raise errors.checkpoint(self.who, problem, fix)
            choice = "current"
        if state and choice == "saved":
            return differing[0]
        self.differences.append(Change(f"{key} (group {index})", differing[0], current, choice))
        return differing[0] if choice == "saved" else current

    def _shared(self, index: int) -> set[str]:
        """The keys of slots that the group's parameters share."""
        slots = self.optimizer.composition(self.own[index]).slots.values()
        return {slot.key for slot in slots if slot.shared}

    def _settled(self, key: str, saved: list[Any], index: int) -> bool:
        """Whether the checkpoint determines this group's value.

        It does not if the group's parameters were saved with different values, or in one group with parameters
        for which the optimizer now has another value.
        """
        if self.homes[index] is not None:
            return True
        if any(not same(value, saved[0]) for value in saved):
            return False
        sharing = [g for i, g in enumerate(self.own) if set(self.sources[i]) & set(self.sources[index])]
        return all(same(group.get(key, _ABSENT), self.own[index].get(key, _ABSENT)) for group in sharing)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def same(one: Any, other: Any) -> bool:
    """Whether two hyper-parameters have the same value; a list may equal a tuple."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        left, right = cast("list[Any]", one), cast("list[Any]", other)
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        return one.shape == other.shape and bool((one.cpu() == other.cpu()).all())
    alike = type(one) is type(other) or _both_numbers(one, other)  # pyright: ignore[reportUnknownArgumentType]
    try:
        return alike and bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return False  # a note may be anything, such as an array


def _both_numbers(one: Any, other: Any) -> bool:
    return all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (one, other))
