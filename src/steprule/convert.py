"""Converting the state of one rule into the state of another, as far as their slots mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steprule import errors
from steprule.catalogue import catalogue
from steprule.engine import storage
from steprule.engine.checkpoint import for_torch
from steprule.engine.checkpoint.for_torch import ConversionReport
from steprule.engine.rule import RuleOptimizer

__all__ = ["ConversionReport", "convert_state"]

MEAN = "mean of the gradients"
SQUARE = "mean of their squares"
LARGEST = "largest mean of their squares"
VARIANCE = "mean of their squared distance to the mean"

_ADAMS = (
    *("Adam", "AMSGrad", "AdamW", "NAdam", "RAdam", "SparseAdam", "NAdamW"),
    *("AdamAtan2", "LAMB", "AdEMAMix", "AdamP"),
)
_MEANS = ("Adamax", "Lion", "Sophia", "SophiaH", "AdaHessian", "Signum", "Adan", "StableAdamW", "Yogi")
# Slots that are not listed mean something that no other rule keeps.
MEANINGS: dict[str, dict[str, str]] = {
    **{name: {"exp_avg": MEAN, "exp_avg_sq": SQUARE, "max_exp_avg_sq": LARGEST} for name in _ADAMS},
    **{name: {"square_avg": SQUARE} for name in ("RMSprop", "Adadelta")},
    # The squares of Adan, StableAdamW and Yogi are those of something else, or averaged in another way.
    **{name: {"exp_avg": MEAN} for name in _MEANS},
    # Its exp_avg is the mean of gradients that are divided already.
    "LaProp": {"exp_avg_sq": SQUARE},
    "AdaBelief": {"exp_avg": MEAN, "exp_avg_var": VARIANCE},
    # What NorMuon and AdaMuon divide by does not decide how long their steps are.
    **{name: {"momentum_buffer": MEAN} for name in ("Muon", "NorMuon", "AdaMuon", "Scion")},
}
# What each rule divides by. If one of these were reset and the mean kept, the steps would be too large.
DIVIDES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*_ADAMS, "LaProp", "Adan", "StableAdamW", "Yogi"), ("exp_avg_sq",)),
    **dict.fromkeys(("RMSprop", "Adadelta"), ("square_avg",)),
    "NAdam": ("exp_avg_sq", "mu_product"),
    "Adamax": ("exp_inf",),
    **dict.fromkeys(("Sophia", "SophiaH"), ("hessian",)),
    "AdaHessian": ("exp_hessian_diag_sq", "estimates"),
    "AdaBelief": ("exp_avg_var",),
}
# What fills a slot if nothing has its own meaning: something larger, so that no step is too large.
INSTEAD = {VARIANCE: SQUARE}


def convert_state(
    state_dict: Mapping[str, Any], from_: str | type | None = None, to: str | type = "torch"
) -> tuple[dict[str, Any], ConversionReport]:
    """Convert a checkpoint of one rule to another rule, and report what was kept.

    When: changing the rule in the middle of training without losing the averages it has gathered.

        converted, report = convert_state(adamw.state_dict(), from_="AdamW", to="AdaBelief")
        adabelief.load_state_dict(converted)

    Only slots that mean the same in both rules are kept, together with the step count. If anything that the
    new rule divides by is missing, the whole state is reset: a mean that is kept next to a divisor that was
    reset makes the steps far too large. AdaBelief's variance starts from Adam's mean square, which is larger.
    Hyper-parameters are not converted, because lr means something different in each rule.

    Slots in 8 bits stay in 8 bits, and the entries of `low_precision` are kept. For a rule on whole matrices,
    slots are decoded and those entries are left out.

    to="torch" makes a checkpoint for the torch.optim class of the same name: slots in 8 bits are decoded, and
    entries that torch does not know are dropped. Hyper-parameters are kept. `from_` may be left out; if it is
    given, options that torch's class does not have raise an error.

        converted, report = convert_state(adamw.state_dict(), to="torch")

    state_dict: not changed; the result shares its tensors. from_, to: names or classes of rules.

    Raises: ValueError for an unknown rule, a state that `from_` did not write, or options that torch lacks.
    """
    if not isinstance(state_dict, Mapping) or {"state", "param_groups"} - set(state_dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise errors.not_convertible("this is not a state dict", "Pass what optimizer.state_dict() returned.")
    if to == "torch":
        return for_torch.convert(state_dict, None if from_ is None else _rule(from_))
    if from_ is None:
        raise errors.not_convertible("from_ is missing", "Give the rule that wrote the state.")
    old, new = _rule(from_), _rule(to)
    states = {place: storage.codes_apart(saved) for place, saved in state_dict["state"].items()}
    _check_writer(old, states)
    sources = _sources(old, new)
    state: dict[Any, dict[str, Any]] = {}
    for place, saved in states.items():
        converted = _converted(saved, sources, new)
        if converted:
            state[place] = converted
    report = _report(old, new, states, sources if state else {})
    keep = ("params", "param_names", "param_shapes", "name")
    groups = [{k: v for k, v in group.items() if k in keep} for group in state_dict["param_groups"]]
    return {"state": state, "param_groups": groups}, report


def _check_writer(rule: Any, states: Mapping[Any, Mapping[str, Any]]) -> None:
    """Refuse a state with entries that the rule does not keep."""
    for saved in states.values():
        for key in saved:
            if key.removesuffix("_codes") not in _keys(rule) and not _beside(key, rule):
                problem = f"the state has '{key}', which {rule.__name__} does not keep"
                raise errors.not_convertible(problem, "Give as from_ the rule that wrote it.")


def _report(
    old: Any, new: Any, states: Mapping[Any, Mapping[str, Any]], sources: Mapping[str, str]
) -> ConversionReport:
    """What was done; `sources` is empty if nothing was kept."""
    kept = {key: _what(old, new, key, source) for key, source in sources.items()}
    everything = dict.fromkeys(key for saved in states.values() for key in saved)
    present = [key.removesuffix("_codes") for key in everything if not _beside(key, old)]
    wanted = [slot.key for slot in new.slots.values() if slot.when is None]
    wanted += ["step"] * _counts(new)
    return ConversionReport(
        from_=old.__name__,
        to=new.__name__,
        kept=kept,
        dropped=tuple(key for key in present if key not in sources.values()),
        reset=tuple(key for key in wanted if key not in kept),
    )


def _rule(given: str | type) -> Any:
    if isinstance(given, type):
        return given
    rules = catalogue()
    if given not in rules:
        raise errors.not_convertible(f"there is no rule '{given}'", errors.nearest(given, rules))
    return rules[given]


def _sources(old: Any, new: Any) -> dict[str, str]:
    """The slots of the new rule that can be filled, each with the slot of the old rule that fills it."""
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
    """Whether the entry says how slots are stored, and is not one of the rule's own."""
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
    """The state of one parameter in the new rule; empty if something it would divide by is missing."""
    known = {key: source for key, source in sources.items() if storage.holds(saved, source)}
    found: dict[str, Any] = {}
    for key, source in known.items():
        coded = source not in saved
        if coded and issubclass(new, RuleOptimizer):
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
    if issubclass(new, RuleOptimizer):
        found |= {key: saved[key] for key in storage.EXTRA_KEYS if saved.get(key) is not None}
    return found
