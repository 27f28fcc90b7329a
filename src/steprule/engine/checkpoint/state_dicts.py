"""Checkpoints: what `state_dict` writes, and fitting one to an optimizer before anything changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from steprule import errors
from steprule.engine import blocks, moving, storage
from steprule.engine.checkpoint import matching, origin, restored
from steprule.engine.checkpoint.groups import Resumed, chooser
from steprule.engine.checkpoint.report import Change, LoadReport
from steprule.engine.evaluation import ASIDE
from steprule.engine.fields import Slot, scalar_dtype
from steprule.engine.nonfinite import all_finite

Dict = dict[str, Any]
CODES = (torch.int8, torch.uint8)


def pack(optimizer: Any) -> Dict:
    """The optimizer in torch's format, with the shapes of the parameters if they have names.

    State of a parameter that is no longer in any group is left out, and so are empty states, as in torch.
    """
    groups: list[Dict] = []
    places: dict[int, int] = {}
    marked: dict[int, Any] = {}
    names_rules = any("rule" in group for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        params: list[Tensor] = group["params"]
        packed = {key: value for key, value in group.items() if key != "params"}
        packed |= {"rule": optimizer.who(group)} if names_rules else {}
        if matching.names_of(group) and not any(map(is_lazy, params)):
            packed[matching.SHAPES] = [list(param.shape) for param in params]
        packed["params"] = list(range(len(places), len(places) + len(params)))
        places.update(zip(map(id, params), packed["params"], strict=True))
        groups.append(packed)
        if getattr(optimizer.rule_of(group), "counts_steps", True) is not True:
            marked |= dict.fromkeys(map(id, params), optimizer.composition(group).slots.values())
    state: dict[Any, Any] = {}
    for key, value in optimizer.state.items():
        if not isinstance(key, Tensor):
            state[key] = value
        elif id(key) in places and value:
            state[places[id(key)]] = dict(value)
            state[places[id(key)]] |= storage.marks(value, marked.get(id(key), ()))
    return {"state": state, "param_groups": groups}


def fit(
    optimizer: Any, state_dict: Mapping[str, Any], strict: bool, hyperparams: Any
) -> tuple[Dict, LoadReport]:
    """The new `state` and `param_groups` of the optimizer, copied from a checkpoint, and a report.

    Raises: ValueError or TypeError that names what does not fit.
    """
    # State made in inference mode could not be written outside of it.
    with torch.inference_mode(False):
        return _fit(optimizer, state_dict, strict, hyperparams)


def _fit(
    optimizer: Any, state_dict: Mapping[str, Any], strict: bool, hyperparams: Any
) -> tuple[Dict, LoadReport]:
    who = type(optimizer).__name__
    groups, state = _read(who, state_dict)
    if strict:
        origin.refuse_another_rule(optimizer, groups, state)
    saved = matching.saved_places(groups, state, optimizer.all_slots().values())
    match = matching.match(
        who,
        groups,
        optimizer.param_groups,
        saved,
        matching.own_places(optimizer.param_groups),
        in_order=optimizer.one_vector,
    )
    known = {place.key for place in saved}
    if len(known) < len(saved):
        raise errors.checkpoint(who, "two parameters of its groups have the same number")
    in_no_group = [key for key in state if key not in known]
    if strict:
        matching.refuse_differences(who, match)
        for key in in_no_group:
            raise errors.checkpoint(who, f"it holds state for parameter {key!r}, which is in no group")
    everywhere = (*groups, *optimizer.param_groups)
    known_keys: set[str] = set[str]().union(*map(optimizer.known_keys, optimizer.param_groups))
    choose = chooser(who, hyperparams, known_keys, everywhere)
    resumed = Resumed(optimizer, groups, match, choose, strict)
    fitted = _States(optimizer, strict)
    loaded = fitted.all(match, state, resumed)
    optimizer._check_loaded(loaded)
    strangers = match.pairs if match.strangers else []
    report = LoadReport(
        rule=who,
        matched_by=match.by,
        matched=tuple(here.label for _, here in match.pairs),
        missing=(*(place.label for place in match.missing), *fitted.missing),
        unexpected=(
            *(place.label for place in match.unexpected),
            *(f"parameter {key!r}" for key in in_no_group),
            *fitted.unexpected,
            *resumed.unexpected,
        ),
        reshaped=tuple(Change(here.label, there.shape, here.shape) for there, here in match.reshaped),
        moved=tuple(resumed.moved(match)),
        converted=tuple(fitted.converted),
        nonfinite=tuple(fitted.nonfinite),
        notes=tuple(resumed.notes),
        renamed=tuple(Change(here.label, there.label, here.label) for there, here in strangers),
        hyperparameters=tuple(resumed.differences),
    )
    return {"state": loaded, "param_groups": resumed.groups}, report


def _read(who: str, state_dict: Any) -> tuple[list[Dict], dict[Any, Dict]]:
    """The groups and the states of a checkpoint; refuses what does not have its form."""
    if not isinstance(state_dict, Mapping):
        raise errors.not_a_state_dict(who, type(state_dict).__name__)
    whole = cast("Mapping[Any, Any]", state_dict)
    for key, kind in (("state", Mapping), ("param_groups", (list, tuple))):
        if key not in whole:
            held = errors.listed(str(name) for name in whole)
            fix = f"Pass what optimizer.state_dict() returned; this holds {held or 'nothing'}."
            raise errors.checkpoint(who, f"the checkpoint has no '{key}'", fix)
        if not isinstance(whole[key], kind):
            raise _malformed(who, f"'{key}'", whole[key])
    groups: list[Dict] = []
    keys: list[Any] = []
    for index, group in enumerate(whole["param_groups"]):
        where = f"parameter group {index}"
        if not _is_named(group):
            raise _malformed(who, where, group)
        groups.append(dict(cast("Mapping[str, Any]", group)))
        params = groups[-1].get("params")
        if not isinstance(params, (list, tuple)):
            raise _malformed(who, f"'params' of {where}", params)
        keys += cast("list[Any]", params)
    if not all(isinstance(key, (int, str)) for key in keys):
        raise errors.checkpoint(who, "the parameters of its groups are not numbered")
    known = set(keys)
    state: Mapping[Any, Any] = whole["state"]
    for key, value in state.items():
        if key in known and not _is_named(value):
            raise _malformed(who, f"the state of parameter {key!r}", value)
    return groups, dict(state)


def _is_named(value: Any) -> bool:
    """Whether this is a dict whose keys are names."""
    return isinstance(value, Mapping) and all(type(key) is str for key in cast("Mapping[Any, Any]", value))


def _malformed(who: str, what: str, given: Any) -> Exception:
    problem = f"{what} is {type(given).__name__} in the checkpoint, not what state_dict() writes"
    return errors.checkpoint(who, problem)


class _States:
    """Fits the state of one parameter after another, and collects what there is to report."""

    def __init__(self, optimizer: Any, strict: bool):
        self.optimizer = optimizer
        self.who = type(optimizer).__name__
        # Of the group whose states are being fitted.
        self.rule: Any
        self.slots: dict[str, Slot]
        self.strict = strict
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.converted: list[Change] = []
        self.nonfinite: list[str] = []
        # The parameter whose state is being fitted, or a tensor as it will be.
        self.like: Tensor

    def all(
        self,
        match: matching.Match,
        saved: dict[Any, Dict],
        resumed: Resumed,
    ) -> defaultdict[Any, Any]:
        """The states of all parameters: the saved one if there is one, otherwise the current one."""
        state: defaultdict[Any, Any] = defaultdict(dict)
        by_key = {there.key: (there, here) for there, here in match.pairs}
        for key, value in saved.items():
            if key in by_key:
                there, here = by_key[key]
                if not resumed.same_rule(there, here):
                    self.unexpected += [f"{here.label}: {entry}" for entry in value if entry != "step"]
                    continue
                group = resumed.groups[here.group]
                own = self.optimizer.composition(group)
                self.rule = self.optimizer.rule_of(group)
                self.slots = {slot.key: slot for slot in own.slots.values()}
                self.like = self._like(there, here, value)
                state[here.key] = self._one(here, value, resumed.saved[there.group], group)
        for here in (*match.missing, *(pair[1] for pair in match.reshaped)):
            if here.key in self.optimizer.state:
                state[here.key] = self.optimizer.state[here.key]
        return state

    def _like(self, there: matching.Place, here: matching.Place, saved: Dict) -> Tensor:
        """The parameter; for a lazy one, which has no shape yet, a tensor with its future shape."""
        param: Tensor = here.key
        if not is_lazy(param):
            return param
        shape = there.shape or matching.shape_in(saved, self.slots.values())
        if shape is None and any(storage.holds(saved, key) for key in self.slots):
            problem = f"{here.shown} has no shape yet, and the checkpoint does not have it"
            raise errors.checkpoint(self.who, problem, "Run the model once on an input before loading.")
        return torch.empty(shape or (), dtype=param.dtype, device=param.device)

    def _one(self, place: matching.Place, saved: Dict, saved_group: Dict, group: Dict) -> Dict:
        told = {key for key, value in saved.items() if value is not None}
        if self.slots:
            silent = saved.keys() - told - self.slots.keys() - {"step"}
            self.unexpected += [f"{place.label}: {key}" for key in sorted(silent)]
        saved = {key: saved[key] for key in saved if key in told}
        if not self.slots:
            for key, value in saved.items():
                self._check_finite(place, key, value)
            device = place.key.device
            return {key: _copied(x, None if key in moving.ON_HOST else device) for key, x in saved.items()}
        fitted = self._entries(place, storage.codes_apart(saved), group)
        if fitted and not self._complete(place, fitted, saved_group, group):
            return {}
        if fitted:
            self._convert(place, fitted, saved_group, group)
        return fitted

    def _entries(self, place: matching.Place, saved: Dict, group: Dict) -> Dict:
        """Copies of the entries that the optimizer can use."""
        fitted: Dict = {}
        beside = storage.beside_parameter(self.like, group)
        scales = {f"{key}_scale": key for key in self.slots}
        for key, value in saved.items():
            slot_key = key.removesuffix("_codes")
            if key == "step":
                fitted[key] = self._count(place, value)
            elif key == ASIDE:
                fitted[key] = self._stored(place, key, value)
            elif key in storage.EXTRA_KEYS:
                drawn = key == storage.NOISE_KEY and self.optimizer.composition(group).seeds
                if drawn or key in (beside, storage.SLOT_KEY):
                    fitted[key] = self._stored(place, key, value)
                else:
                    self.unexpected.append(f"{place.label}: {key}")
            elif key in scales:
                if self.slots[scales[key]].exists(group):
                    fitted[key] = self._stored(place, key, value)
            elif self._keeps(place, slot_key, value, group):
                slot = self.slots[slot_key]
                entry, coded = (slot.key, False) if key == slot_key else (key, True)
                fitted[entry] = self._slot(place, slot, value, coded, group)
                if key != slot_key and f"{slot_key}_scale" not in saved:
                    problem = f"'{key}' of {place.shown} comes without '{slot_key}_scale'"
                    raise errors.checkpoint(self.who, problem)
        return fitted

    def _convert(self, place: matching.Place, state: Dict, saved_group: Dict, group: Dict) -> None:
        """Convert the slots to the optimizer's own storage, and add the entries that it needs."""
        param = self.like
        before = len(self.converted)
        for slot in self.slots.values():
            change = restored.convert(slot, param, state, saved_group, group)
            if change is not None:
                self.converted.append(Change(f"{place.label}: {slot.key}", *change))
                self._check_range(place, slot.key, state)
        if storage.SLOT_KEY in state and not storage.rounds_slots(state, group):
            del state[storage.SLOT_KEY]
            if len(self.converted) == before:
                self.unexpected.append(f"{place.label}: {storage.SLOT_KEY}")
        added = storage.create_for_parameter(param, group, state, self.optimizer.place_of(place.key))
        state |= added
        for key in ("compensation", "low_bits"):
            if key in added:
                self.converted.append(Change(f"{place.label}: {key}", "absent", added[key].dtype))

    def _keeps(self, place: matching.Place, key: str, value: Any, group: Dict) -> bool:
        """Whether the optimizer has this slot. A slot that an option has switched off is left out."""
        if key not in self.slots:
            if self.strict and value is not False:
                raise errors.checkpoint(
                    self.who,
                    f"the state of {place.shown} has '{key}', but {self.rule.__name__} keeps "
                    f"{', '.join(sorted(self.slots)) or 'nothing'}",
                    "Was it written by another optimizer or a newer version? strict=False leaves it out.",
                )
        elif self.slots[key].exists(group):
            slot = self.slots[key]
            if slot.up_to is None or slot.shape_for(self.like, group) is not None:
                return True
        self.unexpected.append(f"{place.label}: {key}")
        return False

    def _stored(self, place: matching.Place, key: str, value: Any) -> Tensor:
        """An entry that belongs to the storage of state or parameters in fewer bits."""
        param = self.like
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "compensation": (tuple(param.shape), param.dtype),
            ASIDE: (tuple(param.shape), param.dtype),
            "low_bits": ((*param.shape, 2), torch.uint8),
            "rounding_key": ((), torch.int64),
            storage.SLOT_KEY: ((), torch.int64),
            storage.NOISE_KEY: ((), torch.int64),
        }
        if key in storage.KEYS and isinstance(value, Tensor) and value.is_floating_point():
            # torch.optim has loaded it and cast it to the parameter's dtype. Any key will do.
            self.converted.append(Change(f"{place.label}: {key}", value.dtype, torch.int64))
            return torch.tensor(int(value.nan_to_num().abs() % 2**32), device="cpu")
        if key == "low_bits" and isinstance(value, Tensor) and value.dtype == torch.int16:
            self.converted.append(Change(f"{place.label}: {key}", value.dtype, torch.uint8))
            value = storage.in_bytes(value)
        older = isinstance(value, Tensor) and value.dtype == torch.float32
        scales = (storage.older_scales(param), torch.float32), (blocks.layout(param.shape).scales, torch.uint8)
        shape, dtype = wanted.get(key, scales[not older])
        if not isinstance(value, Tensor) or (tuple(value.shape), value.dtype) != (shape, dtype):
            problem = f"'{key}' of {place.shown} is {_described(value)}, must be {dtype} of shape {shape}"
            raise errors.checkpoint(self.who, problem)
        of_bytes = key not in wanted and not older
        self._check_finite(place, key, storage.powers(value) if of_bytes else value)
        return _copied(value, None if key in moving.ON_HOST else param.device)

    def _slot(self, place: matching.Place, slot: Slot, value: Any, coded: bool, group: Dict) -> Tensor:
        param = self.like
        if slot.per_tensor and isinstance(value, (int, float)) and not isinstance(value, bool):
            number = torch.tensor(float(value), dtype=scalar_dtype(), device="cpu")
            self.converted.append(Change(f"{place.label}: {slot.key}", type(value).__name__, number.dtype))
            value = number
        may_be_sparse = self.rule.gradients == "rows"
        if may_be_sparse and isinstance(value, Tensor) and value.layout == torch.sparse_coo:
            # torch's SGD keeps the momentum of sparse gradients sparse.
            self.converted.append(Change(f"{place.label}: {slot.key}", value.layout, torch.strided))
            value = value.to_dense()
        if not isinstance(value, Tensor):
            problem = f"'{slot.key}' of {place.shown} is {_described(value)}, must be a tensor"
            raise errors.checkpoint(self.who, problem)
        shape = slot.shape_for(param, group)
        if tuple(value.shape) != shape:
            raise errors.checkpoint(
                self.who,
                f"'{slot.key}' of {place.shown} has shape {tuple(value.shape)} in the checkpoint, the "
                f"parameter needs {shape}",
                "Does the order of the parameters differ?",
            )
        kind = "complex" if param.is_complex() and not slot.per_tensor else "floating-point"
        fine = value.is_complex() if kind == "complex" else value.is_floating_point()
        if not (fine or (coded and value.dtype in CODES)) or value.layout != torch.strided:
            problem = f"'{slot.key}' of {place.shown} is {_described(value)}, must be {kind} numbers"
            raise errors.checkpoint(self.who, problem)
        self._check_finite(place, slot.key, value)
        return _copied(value, None if slot.per_tensor else param.device)

    def _count(self, place: matching.Place, value: Any) -> Any:
        """The step count, in the type in which the rule keeps it."""
        fine = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(value, Tensor):
            fine = value.numel() == 1 and not value.is_complex() and value.dtype is not torch.bool
        number = float(value) if fine else -1.0
        if not 0 <= number < float("inf"):
            given = "" if isinstance(value, Tensor) and value.numel() > 1 else f" ({value!r})"
            problem = f"'step' of {place.shown}{given} is not a step count, must be one number, at least 0"
            raise errors.checkpoint(self.who, problem)
        as_int = self.rule.gradients == "rows only"
        if type(value) is int if as_int else isinstance(value, Tensor):
            return _copied(value, None)
        count = int(number) if as_int else torch.tensor(number, dtype=torch.float32, device="cpu")
        kinds = [str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in (value, count)]
        self.converted.append(Change(f"{place.label}: step", *kinds))
        return count

    def _complete(self, place: matching.Place, fitted: Dict, saved_group: Dict, group: Dict) -> bool:
        """Whether nothing is missing. A slot that is reset next to a high count would be silently wrong."""
        lacking: list[str] = []
        if "step" not in fitted and self.optimizer.composition(group).counts(group):
            if self.rule.counts_steps is True:
                lacking.append("step")
            # torch's SGD keeps no count, but if it has a buffer, the first step is over.
            fitted["step"] = torch.ones((), dtype=scalar_dtype(), device="cpu")
        for slot in self.slots.values():
            there = slot.exists(group) and slot.shape_for(self.like, group) is not None
            if storage.holds(fitted, slot.key) or not there:
                continue
            started = "." in slot.key and slot.key.partition(".")[0] not in (saved_group.get("modifiers") or ())
            if not started and (slot.when is None or saved_group.get(slot.when)):
                lacking.append(slot.key)
            else:
                self.missing.append(f"{place.label}: {slot.key}")
        if lacking and self.strict:
            problem = f"the state of {place.shown} has no '{lacking[0]}'"
            raise errors.checkpoint(self.who, problem, "strict=False resets that parameter's state.")
        self.missing += [f"{place.label}: {key}" for key in lacking]
        return not lacking

    def _check_range(self, place: matching.Place, key: str, state: Dict) -> None:
        """Refuse elements that became infinite in the dtype they are now stored in."""
        value: Tensor = state[storage.entry_of(state, key)]
        label = f"{place.label}: {key}"
        if _is_finite(storage.load(state, key) if value.dtype in CODES else value) or label in self.nonfinite:
            return
        if self.strict:
            problem = f"'{key}' of {place.shown} has elements that are too large for {value.dtype}"
            raise errors.checkpoint(self.who, problem, "Use state_dtype='bf16' or 'fp32'.")
        self.nonfinite.append(label)

    def _check_finite(self, place: matching.Place, key: str, value: Any) -> None:
        if all(map(_is_finite, tensors_in(value))):
            return
        if self.strict:
            problem = f"'{key}' of {place.shown} is NaN or infinite"
            fix = "Go back to an earlier checkpoint, or load it as it is with strict=False."
            raise errors.checkpoint(self.who, problem, fix)
        self.nonfinite.append(f"{place.label}: {key}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" ({value.layout})"
        return f"{value.dtype} of shape {tuple(value.shape)}{layout}"
    return type(value).__name__


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a state entry, or in the lists and dicts that it is made of."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in cast("list[Any]", value):
            yield from tensors_in(entry)
    elif isinstance(value, Mapping):
        for entry in cast("Mapping[Any, Any]", value).values():
            yield from tensors_in(entry)


def _is_finite(tensor: Tensor) -> bool:
    local: Any = getattr(tensor, "to_local", lambda: tensor)()
    if local.is_meta or local.element_size() < 2 or not (local.is_floating_point() or local.is_complex()):
        return True
    return all_finite([local])


def _copied(value: Any, device: torch.device | None) -> Any:
    """A copy that shares no memory; tensors keep dtype and layout, and go to the device if one is given."""
    if isinstance(value, Tensor):
        value = value.detach()
        return value.clone() if device is None else value.to(device, copy=True)
    if isinstance(value, (list, tuple)):
        entries = [_copied(entry, device) for entry in cast("list[Any]", value)]
        return entries if isinstance(value, list) else tuple(entries)
    if isinstance(value, Mapping):
        return {key: _copied(entry, device) for key, entry in cast("Mapping[Any, Any]", value).items()}
    return deepcopy(value)
