"""Turns the columns of a table into numbers, by what the training rows show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy

from steprule.lab.errors import LabError, did_you_mean
from steprule.lab.own_data.tables import Table

__all__ = ["Inputs", "Target", "inputs_of", "numbers_of", "target_of"]

MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
MOST_WORDS = 50
# A whole number with more different values than this is a quantity, not a class.
MOST_CLASSES = 20
# If so many of a column's values are numbers, the others are mistakes.
NEARLY_ALL = 0.95


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in MISSING
    return value is None or (isinstance(value, float) and math.isnan(value))


def numbers_of(table: Table, name: str) -> Any:
    """The column as floats, with NaN for missing values; None if it holds words or other things.

    Raises `LabError` for infinity, and for the few words in a column of numbers.
    """
    values = table.columns[name]
    numbers = numpy.full(len(values), numpy.nan)
    wrong: list[int] = []
    present = 0
    for row, value in enumerate(values):
        if _is_missing(value):
            continue
        present += 1
        try:
            numbers[row] = float(value)
        except (TypeError, ValueError):
            wrong.append(row)
        else:
            if not math.isfinite(numbers[row]):
                raise LabError(f"{table.place(row, name)}: {value} is not a finite number.")
    if not present or len(wrong) > (1 - NEARLY_ALL) * present:
        return None
    if wrong:
        raise LabError(
            f"{table.place(wrong[0], name)}: {str(values[wrong[0]])[:40]!r} is not a number, and "
            f"{present - len(wrong)} of the column's {present} values are. Correct it, or leave it empty."
        )
    return numbers


def _words_of(table: Table, name: str) -> list[str | None] | None:
    """The column as words, with None for missing values; None if it holds other things."""
    values = table.columns[name]
    if not all(_is_missing(value) or isinstance(value, str) for value in values):
        return None
    return [None if _is_missing(value) else str(value).strip() for value in values]


# Targets


@dataclass(frozen=True)
class Target:
    """What is predicted: classes as whole numbers, or numbers.

    classes: their names; empty for numbers.
    """

    name: str
    values: Any
    classes: Sequence[str]

    @property
    def told(self) -> str:
        """Name and kind, as in `species, 3 classes`."""
        return f"{self.name}, {f'{len(self.classes)} classes' if self.classes else 'numbers'}"


def target_of(table: Table, name: str | None, classes: Sequence[str] | None = None) -> Target:
    """The column to predict.

    classes: those of the training data, for validation data; empty for numbers. Raises `LabError` if there is
    no such column, or a value is missing.
    """
    listed = ", ".join(table.columns)
    if name is None:
        raise LabError(f"give the column to predict, --target NAME. {table.file.name} has: {listed}.")
    if name not in table.columns:
        raise LabError(f"{table.file.name} has no column '{name}'. {did_you_mean(name, table.columns)}")
    for row, value in enumerate(table.columns[name]):
        if _is_missing(value):
            raise LabError(
                f"{table.place(row, name)}: the target is missing. Fill it in, or leave the row out."
            )
    numbers = numbers_of(table, name)
    if classes is None:
        classes = _classes_of(table, name, numbers)
    if not classes:
        if numbers is None:
            raise LabError(f"{table.file.name}, column '{name}' must have numbers, as in the training data.")
        return Target(name, numbers, ())
    texts = [f"{value:g}" for value in numbers] if numbers is not None else _words_of(table, name) or []
    number = {text: i for i, text in enumerate(classes)}
    for row, text in enumerate(texts):
        if text not in number:
            raise LabError(f"{table.place(row, name)}: the training data have no class '{text}'.")
    return Target(name, numpy.array([number[str(text)] for text in texts]), classes)


def _classes_of(table: Table, name: str, numbers: Any) -> list[str]:
    """The classes of a target; none if it is a quantity."""
    if numbers is not None:
        different = numpy.unique(numbers)
        whole = bool((different == different.round()).all())
        if not whole or len(different) > MOST_CLASSES:
            return []
        found = [f"{value:g}" for value in different]
    else:
        words = _words_of(table, name)
        if words is None:
            raise LabError(f"{table.file.name}, column '{name}' has neither numbers nor words to predict.")
        found = sorted({str(word) for word in words})
        if len(found) > len(words) / 2:
            raise LabError(
                f"{table.file.name}, column '{name}' has {len(found)} different words in {len(words)} rows: "
                "these are no classes."
            )
    if len(found) < 2:
        raise LabError(f"{table.file.name}, column '{name}' has the same value in every row.")
    return found


# Inputs


@dataclass(frozen=True)
class Inputs:
    """How the columns become numbers.

    numbers: mean and standard deviation of each; words: those that have a column each. left_out: reasons by
    name.
    """

    numbers: dict[str, tuple[float, float]]
    words: dict[str, Sequence[str | None]]
    left_out: dict[str, str]

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return len(self.numbers) + sum(map(len, self.words.values()))

    @property
    def told(self) -> str:
        """How many there are, as in `5 columns of numbers, 2 of words (7 different)`."""
        different = self.width - len(self.numbers)
        words = f"{len(self.words)} of words ({different} different)" if self.words else ""
        numbers = f"{len(self.numbers)} columns of numbers" if self.numbers else ""
        return ", ".join(filter(None, [numbers, words]))

    def rows(self, table: Table) -> Any:
        """The table as floats: numbers standardised, with missing ones at the mean, and a 1 for each word.

        Raises `LabError` if a column is missing or has words where the training data have numbers.
        """
        parts: list[Any] = []
        for name in [*self.numbers, *self.words]:
            if name not in table.columns:
                raise LabError(f"{table.file.name} has no column '{name}', which the training data have.")
        for name, (mean, spread) in self.numbers.items():
            numbers = numbers_of(table, name)
            if numbers is None:
                raise LabError(
                    f"{table.file.name}, column '{name}' must have numbers, as in the training data."
                )
            parts.append(numpy.nan_to_num((numbers - mean) / spread)[:, None])
        for name, known in self.words.items():
            words = _words_of(table, name) or []
            parts.append(numpy.array([[float(word == one) for one in known] for word in words]))
        return numpy.concatenate(parts, axis=1).astype(numpy.float32)


def inputs_of(table: Table, target: str, train: Any) -> Inputs:
    """How all columns but the target become numbers, by the training rows alone.

    train: their numbers. Raises `LabError` if no column is left.
    """
    numbers: dict[str, tuple[float, float]] = {}
    words: dict[str, Sequence[str | None]] = {}
    left_out: dict[str, str] = {}
    for name in table.columns:
        if name == target:
            continue
        column = numbers_of(table, name)
        if column is not None:
            known = column[train][~numpy.isnan(column[train])]
            spread = float(known.std()) if len(known) else 0.0
            if spread > 0:
                numbers[name] = float(known.mean()), spread
            else:
                left_out[name] = "always the same"
            continue
        texts = _words_of(table, name)
        if texts is None:
            left_out[name] = "neither numbers nor words"
            continue
        found = Counter(texts[i] for i in cast("list[int]", train.tolist()))
        if len(found) > MOST_WORDS:
            left_out[name] = f"{len(found)} different words"
        elif len(found) < 2:
            left_out[name] = "always the same"
        else:
            words[name] = sorted(found, key=lambda word: (word is None, word or ""))
    if not numbers and not words:
        reasons = ", ".join(f"{name}: {why}" for name, why in left_out.items())
        raise LabError(
            f"{table.file.name} has no column to predict '{target}' from ({reasons or 'there is no other'})."
        )
    return Inputs(numbers, words, left_out)
