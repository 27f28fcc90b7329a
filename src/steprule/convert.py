"""Taking the state of one rule over into another, as far as it means the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steprule import errors
from steprule.catalogue import catalogue
from steprule.engine import for_torch, storage
from steprule.engine.for_torch import ConversionReport

__all__ = ["ConversionReport", "convert_state"]

MEAN = "mean of the gradients"
SQUARE = "mean of their squares"
LARGEST = "largest mean of their squares"
VARIANCE = "mean of their squared distance to the mean"

_ADAMS = ("Adam", "AMSGrad", "AdamW", "NAdam", "RAdam", "SparseAdam")
# What is not named here means something that no other rule keeps.
MEANINGS: dict[str, dict[str, str]] = {
    **{name: {"exp_avg": MEAN, "exp_avg_sq": SQUARE, "max_exp_avg_sq": LARGEST} for name in _ADAMS},
    **{name: {"square_avg": SQUARE} for name in ("RMSprop", "Adadelta")},
    **{name: {"exp_avg": MEAN} for name in ("Adamax", "Lion", "Sophia")},
    "AdaBelief": {"exp_avg": MEAN, "exp_avg_var": VARIANCE},
    "Muon": {"momentum_buffer": MEAN},
}
# A mean that is kept beside one of these at its start makes steps that are too large.
DIVIDES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_ADAMS, ("exp_avg_sq",)),
    **dict.fromkeys(("RMSprop", "Adadelta"), ("square_avg",)),
    "NAdam": ("exp_avg_sq", "mu_product"),
    "Adamax": ("exp_inf",),
    "Sophia": ("hessian",),
    "AdaBelief": ("exp_avg_var",),
}
# Where the meaning itself is not there: something larger, so that no step is too large.
INSTEAD = {VARIANCE: SQUARE}


def convert_state(
    state_dict: Mapping[str, Any], from_: str | type | None = None, to: str | type = "torch"
) -> tuple[dict[str, Any], ConversionReport]:
    """A checkpoint of one rule as a checkpoint of another, and a report of what was kept.

    When: changing the rule in the middle of training without losing the averages it has gathered.

        converted, report = convert_state(adamw.state_dict(), from_="AdamW", to="AdaBelief")
        adabelief.load_state_dict(converted)

    Only slots that mean the same are kept, and the step count with them. All that the new rule divides by
    has to be among them, else everything is reset: a mean that is kept beside a divisor at its start
    makes steps that are far too large. AdaBelief's variance starts from Adam's mean square, which is
    larger. Hyper-parameters are not converted, since lr means another thing in each rule.

    Numbers in 8 bits and parameters with more bits beside them go along; a rule that looks at whole matrices
    gets them as plain numbers.

    to="torch" makes a checkpoint that the class of the same name in torch.optim can load: slots in 8 bits are
    decoded, and what torch does not know is dropped. Hyper-parameters stay. `from_` may then be left out; if it
    is given, what this class of torch cannot do is refused.

        converted, report = convert_state(adamw.state_dict(), to="torch")

    state_dict: not changed; the result shares its tensors. from_, to: names or classes of rules.

    Raises: ValueError for an unknown rule or a state that `from_` did not write.
    """
    if not isinstance(state_dict, Mapping) or {"state", "param_groups"} - set(state_dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.not_convertible("this is no state dict", "Pass what optimizer.state_dict() returned.")
    if to == "torch":
        return for_torch.convert(state_dict, None if from_ is None else _rule(from_))
    if from_ is None:
        raise errors.not_convertible("from_ is missing", "Give the rule that wrote the state.")
    old, new = _rule(from_), _rule(to)
    states = {place: storage.codes_apart(saved) for place, saved in state_dict["state"].items()}
    for saved in states.values():
        for key in saved:
            if key.removesuffix("_codes") not in _keys(old) and not _beside(key, old):
                problem = f"the state has '{key}', which {old.__name__} does not keep"
                raise errors.not_convertible(problem, "Give as from_ the rule that wrote it.")
    sources = _sources(old, new)
    state: dict[Any, dict[str, Any]] = {}
    for place, saved in states.items():
        converted = _converted(saved, sources, new)
        if converted:
            state[place] = converted
    kept = {key: _what(old, new, key, source) for key, source in sources.items()} if state else {}
    everything = dict.fromkeys(key for saved in states.values() for key in saved)
    present = [key.removesuffix("_codes") for key in everything if not _beside(key, old)]
    wanted = [slot.key for slot in new.slots.values() if slot.when is None]
    wanted += ["step"] * _counts(new)
    report = ConversionReport(
        from_=old.__name__,
        to=new.__name__,
        kept=kept,
        dropped=tuple(key for key in present if key not in sources.values() or not state),
        reset=tuple(key for key in wanted if key not in kept),
    )
    keep = ("params", "param_names", "param_shapes", "name")
    groups = [{k: v for k, v in group.items() if k in keep} for group in state_dict["param_groups"]]
    return {"state": state, "param_groups": groups}, report


def _rule(given: str | type) -> Any:
    if isinstance(given, type):
        return given
    rules = catalogue()
    if given not in rules:
        raise errors.not_convertible(f"no rule '{given}'", errors.nearest(given, rules))
    return rules[given]


def _sources(old: Any, new: Any) -> dict[str, str]:
    """For each slot of the new rule that can be filled: the slot of the old one that fills it."""
    if old is new:
        return {key: key for key in _keys(old)}
    by_meaning = {meaning: key for key, meaning in _meanings(old).items()}
    sources: dict[str, str] = {}
    for key, meaning in _meanings(new).items():
        source = by_meaning.get(meaning) or by_meaning.get(INSTEAD.get(meaning, ""))
        if source is not None:
            sources[key] = source
    if not sources or any(key not in sources for key in DIVIDES.get(new.__name__, ())):
        return {}
    counted = _counts(old) and _counts(new)
    return {"step": "step", **sources} if counted else sources


def _keys(rule: Any) -> list[str]:
    counted = ["step"] * bool(getattr(rule, "counts_steps", False))
    return [*counted, *(slot.key for slot in rule.slots.values()), *sorted(rule.further_state)]


def _counts(rule: Any) -> bool:
    return getattr(rule, "counts_steps", False) is True


def _beside(key: str, rule: Any) -> bool:
    """Whether the entry belongs to how slots are stored, and is none of the rule's own."""
    return key in {*storage.EXTRA_KEYS, *(f"{slot.key}_scale" for slot in rule.slots.values())}


def _meanings(rule: Any) -> dict[str, str]:
    known = MEANINGS.get(rule.__name__, {})
    return {slot.key: known[slot.key] for slot in rule.slots.values() if slot.key in known}


def _what(old: Any, new: Any, key: str, source: str) -> str:
    if key == "step" or old is new:
        return f"{old.__name__}'s {source}"
    meaning = MEANINGS[old.__name__][source]
    note = "" if MEANINGS[new.__name__][key] == meaning else ", which is larger"
    return f"{old.__name__}'s {source}: {meaning}{note}"


def _converted(saved: Mapping[str, Any], sources: Mapping[str, str], new: Any) -> dict[str, Any]:
    """The state of one parameter in the new rule; empty if what it would divide by is missing."""
    known = {key: source for key, source in sources.items() if storage.holds(saved, source)}
    found: dict[str, Any] = {}
    for key, source in known.items():
        coded = source not in saved
        if coded and getattr(new, "traced", False):
            found |= {f"{key}_{what}": saved[f"{source}_{what}"] for what in ("codes", "scale")}
        elif coded or saved[source] is not None:
            found[key] = storage.load(saved, source) if coded else saved[source]
    beside = ("step", *(f"{key}_scale" for key in known))
    whole = [value for key, value in found.items() if key not in beside and isinstance(value, Tensor)]
    if not whole or any(not storage.holds(found, key) for key in DIVIDES.get(new.__name__, ())):
        return {}
    if _counts(new) and "step" not in found:
        found["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    for slot in new.slots.values():
        if not storage.holds(found, slot.key) and slot.when is None:
            defaults = {name: field.default for name, field in new.fields.items()}
            created = slot.create(whole[0], defaults, None if whole[0].is_floating_point() else torch.float32)
            found |= {} if created is None else {slot.key: created}
    if getattr(new, "traced", False):
        found |= {key: saved[key] for key in storage.EXTRA_KEYS if saved.get(key) is not None}
    return found
