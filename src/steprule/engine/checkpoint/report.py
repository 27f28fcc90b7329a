"""What loading a checkpoint did, as a value and as a printed table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steprule import errors

# A hyper-parameter that differs in more groups than this has one line for all of them.
GROUPS_SHOWN = 3


@dataclass(frozen=True)
class Change:
    """Something that differs between the checkpoint and the optimizer."""

    what: str
    saved: Any
    current: Any
    taken: str = "saved"


@dataclass(frozen=True)
class LoadReport:
    """What `load_state_dict` took from a checkpoint, and what it did not. `print` shows a table.

    matched_by: "name" or "position". matched: the parameters that were found in the checkpoint.
    missing: parameters and slots that the checkpoint lacks. Such a parameter keeps the state it has. One that
    lacks a slot is reset, unless an option adds the slot: then only that slot starts from its initial value.
    unexpected: parameters, slots and hyper-parameters that the optimizer does not have; they are not used.
    reshaped: parameters of another shape, which keep the state they have.
    moved: parameters that were in another group. converted: values whose type has changed.
    nonfinite: state that is NaN or infinite.
    notes: keys of the checkpoint's groups that are not hyper-parameters here, kept unchanged.
    renamed: the names that differ, if no name matched and the position decided.
    hyperparameters: those that differ, and whether the "saved" or the "current" value was taken.
    """

    rule: str
    matched_by: str
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[Change, ...] = ()
    moved: tuple[Change, ...] = ()
    converted: tuple[Change, ...] = ()
    nonfinite: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    renamed: tuple[Change, ...] = ()
    hyperparameters: tuple[Change, ...] = ()

    def __str__(self) -> str:
        total = len(self.matched)
        head = f"{self.rule}: {total} parameter{'s' * (total != 1)} matched by {self.matched_by}"
        return "\n".join([head, *as_table(self._rows())])

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        yield from (("missing", name, "not in the checkpoint") for name in self.missing)
        yield from (("unexpected", name, "not in the optimizer") for name in self.unexpected)
        for change in self.reshaped:
            yield "reshaped", change.what, f"{change.saved} in the checkpoint, {change.current} here"
        for change in self.moved:
            yield "moved", change.what, f"from group {change.saved} to group {change.current}"
        for change in self.converted:
            yield "converted", change.what, f"from {change.saved} to {change.current}"
        for change in self.renamed:
            yield "by position", change.what, f"'{change.saved}' in the checkpoint"
        yield from (("note", text, "not a hyper-parameter, kept") for text in self.notes)
        yield from (("not finite", name, "NaN or infinite in the checkpoint") for name in self.nonfinite)
        rest, folded = _in_many_groups(self.hyperparameters)
        yield from folded
        for change in rest:
            saved, current = plain(change.saved), plain(change.current)
            values = f"{saved} in the checkpoint, {current} here: {change.taken} value taken"
            yield "hyper-parameter", change.what, values


def _in_many_groups(changes: Iterable[Change]) -> tuple[list[Change], list[tuple[str, str, str]]]:
    """The changes that need a row of their own, and one row for those of several groups."""
    by_name: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        by_name.setdefault((change.what.partition(" (group ")[0], change.taken), []).append(change)
    rest: list[Change] = []
    names: dict[tuple[str, int], list[str]] = {}
    for (name, taken), found in by_name.items():
        if len(found) > GROUPS_SHOWN:
            names.setdefault((taken, len(found)), []).append(name)
        else:
            rest += found
    rows = [
        ("hyper-parameter", ", ".join(them), f"{taken} values taken in {count} groups")
        for (taken, count), them in names.items()
    ]
    return rest, rows


def plain(value: Any) -> str:
    """A hyper-parameter, as messages show it."""
    return repr(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)


def as_table(rows: Iterable[tuple[str, str, str]], limit: int = 12) -> list[str]:
    """Lines with three aligned columns. Of many rows of one kind: the first few, and how many more."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for kind, what, text in rows:
        kinds.setdefault(kind, []).append((what, text))
    cells: list[tuple[str, str, str]] = []
    for kind, entries in kinds.items():
        shown = entries[:limit] if len(entries) > limit + 1 else entries
        cells += [(kind if i == 0 else "", *entry) for i, entry in enumerate(shown)]
        if len(entries) > len(shown):
            cells.append(("", f"and {len(entries) - len(shown)} more", ""))
    first, second = (max((len(row[i]) for row in cells), default=0) for i in (0, 1))
    return [f"    {a:{first}}  {b:{second}}  {c}".rstrip() for a, b, c in cells]


def quoted(names: Iterable[str]) -> str:
    """Names in quotes, for a sentence."""
    return errors.listed(f"'{name}'" for name in names)
