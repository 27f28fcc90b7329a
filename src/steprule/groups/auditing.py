"""Whether an optimizer has the parameters of a model: all of them, once, and no others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn, optim

from steprule import group_errors
from steprule.engine.checkpoint.report import as_table

WHY = {
    "missing": "trainable, but in no group",
    "duplicated": "listed more than once",
    "frozen": "listed, but frozen (requires_grad=False)",
    "foreign": "listed, but not in the model",
}


@dataclass(frozen=True)
class Audit:
    """How the parameters of an optimizer differ from those of a model. `print` shows a table.

    parameters: how many the model has. Each of the others has names, with what there is to say:
    missing: trainable, but in no group, so they never move. duplicated: listed more than once. frozen: listed,
    but with requires_grad=False; one that still has a gradient would move. foreign: listed, but not in the
    model; one whose name the model gives to another tensor was listed before the model was changed.
    """

    parameters: int
    missing: Mapping[str, str]
    duplicated: Mapping[str, str]
    frozen: Mapping[str, str]
    foreign: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether the optimizer has every trainable parameter of the model once, and nothing else."""
        return not any(self.findings().values())

    def findings(self) -> dict[str, Mapping[str, str]]:
        """The four kinds by name."""
        return {kind: getattr(self, kind) for kind in WHY}

    def __str__(self) -> str:
        found = self.findings()
        counts = ", ".join(f"{len(found[kind])} {kind}" for kind in found if found[kind])
        head = f"{self.parameters} parameters: {counts or 'every trainable one is in one group'}"
        rows = ((kind, name, text) for kind in found for name, text in found[kind].items())
        return "\n".join([head, *as_table(rows)])


class _Listed(NamedTuple):
    """A parameter in an optimizer: where it is, and its name or place there."""

    param: Tensor
    where: str
    name: str


def audit(
    model: nn.Module, optimizer: optim.Optimizer | Sequence[optim.Optimizer], *, strict: bool = False
) -> Audit:
    """Compare the parameters of an optimizer with those of a model, by identity; the report has names.

        print(steprule.audit(model, optimizer))
        steprule.audit(model, AdamW(groups), strict=True)  # raises if the groups leave a parameter out

    optimizer: of steprule or of torch, or several that share the model. strict: raise unless all is well.

    Raises: TypeError for another kind of argument; ValueError with the names, if strict.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise group_errors.audit_without_module(type(model).__name__)
    places: dict[int, list[_Listed]] = {}
    for entry in _listed(optimizer):
        places.setdefault(id(entry.param), []).append(entry)
    own = dict(model.named_parameters())
    ours = {name: places.pop(id(param), []) for name, param in own.items()}
    missing = {name: WHY["missing"] for name, x in own.items() if x.requires_grad and not ours[name]}
    report = Audit(
        parameters=len(own),
        missing=missing,
        duplicated={x: f"in {' and '.join(y.where for y in there)}" for x, there in ours.items() if there[1:]},
        frozen={x: f"in {ours[x][0].where}" for x, y in own.items() if ours[x] and not y.requires_grad},
        foreign=_foreign([x for there in places.values() for x in there], missing),
    )
    if strict and not report.ok:
        raise group_errors.audit_failed({WHY[kind]: list(x) for kind, x in report.findings().items() if x})
    return report


def _listed(given: Any) -> Iterator[_Listed]:
    """Every entry of every group of one or several optimizers."""
    several = isinstance(given, (list, tuple))
    optimizers = list(cast("Iterable[Any]", given if several else [given]))
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    for number, (optimizer, kind) in enumerate(zip(optimizers, kinds, strict=True)):
        groups: Any = getattr(optimizer, "param_groups", None)
        if not isinstance(groups, list):
            raise group_errors.audit_without_optimizer(kind)
        which = f"{kind} (optimizer {number})" if kinds.count(kind) > 1 else kind
        who = f" of {which}" if several else ""
        for index, group in enumerate(cast("list[dict[str, Any]]", groups)):
            note = f" ({group['name']})" if group.get("name") else ""
            names: list[str] = group.get("param_names") or []
            for place, param in enumerate(group["params"]):
                unnamed = f"parameter {place} of group {index}{who}"
                yield _Listed(param, f"group {index}{note}{who}", names[place] if names else unnamed)


def _foreign(entries: Sequence[_Listed], missing: Iterable[str]) -> dict[str, str]:
    """The parameters that the model does not have, with what there is to say of them."""
    names = Counter(entry.name for entry in entries)
    found: dict[str, str] = {}
    for entry in entries:
        key = entry.name if names[entry.name] == 1 else f"{entry.name} in {entry.where}"
        found[key] = f"in {entry.where}, with shape {tuple(entry.param.shape)}"
        if entry.name in missing:
            found[key] = f"in {entry.where}; the model has another tensor of this name, made later"
    return found
