"""Makes a task from a user's own file or folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn

from steprule.lab.errors import LabError
from steprule.lab.networks import network_for_images, network_for_rows
from steprule.lab.own_data.columns import Target, inputs_of, target_of
from steprule.lab.own_data.images import class_folders, decoded, idx_files, read_folder, read_idx
from steprule.lab.own_data.source import SIZE, Source, digest
from steprule.lab.own_data.tables import Table, is_table, read_table
from steprule.lab.tasks import Score, Task, accuracy
from steprule.lab.text import CONTEXT, character_task

__all__ = ["task"]

SPLIT_SEED = 0
# Validation and test, in percent of the rows.
HELD_OUT = 15
FEWEST = 20
# About so many steps are a training, and so many epochs at most.
STEPS, MOST_EPOCHS = 600, 50
VALIDATION_FOLDERS = ("validation", "valid", "val", "test")
ARRAYS, LABELS = ("X", "x", "images", "inputs", "data"), ("y", "Y", "labels", "targets", "target")
KINDS = (
    "CSV, TSV, Parquet, .npz, .txt, idx files, a folder of folders of images, or one of Hugging Face's "
    "save_to_disk"
)

Part = tuple[Any, Any]

r_squared = Score("R²", "", nn.functional.mse_loss, lambda error: 1 - error)
"""The share of the target's variance that is explained; the target is standardised."""


def task(source: Source) -> Task:
    """The task that a file or folder means. Raises `LabError` that says where it cannot be read."""
    path = source.path
    for given in filter(None, (path, source.validation)):
        if not given.exists():
            raise LabError(f"no such file or folder: {given}")
    facts = {"data sha256": digest(path)}
    if source.validation is not None:
        facts["validation sha256"] = digest(source.validation)
    if path.suffix == ".txt":
        return _of_text(source, facts)
    if is_table(path):
        return _of_table(source, facts)
    if path.suffix == ".npz":
        return _of_arrays(source, facts)
    if (path / "dataset_dict.json").is_file():
        parts = ", ".join(folder.name for folder in class_folders(path))
        raise LabError(
            f"'{path}' holds several data sets ({parts}). Give one, such as --data {path / 'train'}."
        )
    if source.target is not None:
        raise LabError("--target is for tables and Hugging Face's folders; this is neither.")
    if (found := idx_files(path)) is not None:
        return _of_idx(source, *found, facts)
    if path.is_dir() and class_folders(path):
        return _of_folder(source, facts)
    raise LabError(f"'{path}' is none of {KINDS}.")


# The kinds


def _of_text(source: Source, facts: dict[str, str]) -> Task:
    text, validation = _text(source.path), source.validation and _text(source.validation)
    count = len(text) // CONTEXT
    if count * HELD_OUT < 100 * 2 or (validation is not None and len(validation) <= CONTEXT):
        raise LabError(f"{source.path.name} is too short: a text needs 1,000 characters or more.")
    made = character_task(
        text,
        name=source.path.name,
        beginning=text[:4],
        epochs=_epochs(count * (100 - 2 * HELD_OUT) // 100, 16),
        held_out=HELD_OUT,
        validation=validation,
    )
    return replace(made, facts={**made.facts, **facts})


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise LabError(f"{path.name}, line {line}: it is not UTF-8. Save the file as UTF-8.") from None
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror}.") from error


def _of_table(source: Source, facts: dict[str, str]) -> Task:
    table = read_table(source.path)
    target = target_of(table, source.target)
    other = None if source.validation is None else read_table(source.validation)
    pictures = [name for name, values in table.columns.items() if _is_picture(values[0])]
    if pictures:
        size = source.size or SIZE

        def images(of: Table) -> Any:
            return decoded(of.columns[pictures[0]], size, f"{of.file.name}, column '{pictures[0]}'")

        validation = None if other is None else (images(other), target_of(other, target.name, target.classes))
        return _of_images(images(table), target, validation, facts)
    parts = _split(target, len(table), validation_given=other is not None)
    inputs = inputs_of(table, target.name, parts[0])
    rows = inputs.rows(table)
    facts |= {"inputs": inputs.told}
    if inputs.left_out:
        facts["left out"] = ", ".join(f"{name} ({why})" for name, why in inputs.left_out.items())
    validation = None
    if other is not None:
        validation = inputs.rows(other), target_of(other, target.name, target.classes)
    return _made(network_for_rows, (inputs.width,), torch.tensor(rows), target, parts, validation, facts)


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and {*cast("dict[str, Any]", value)} == {"bytes", "path"}


def _of_arrays(source: Source, facts: dict[str, str]) -> Task:
    rows, target = _arrays(source.path, source.target, None)
    validation = (
        None if source.validation is None else _arrays(source.validation, source.target, target.classes)
    )
    if rows.ndim > 2:
        return _of_images(
            _channels_first(rows), target, validation and (_channels_first(validation[0]), validation[1]), facts
        )
    parts = _split(target, len(rows), validation_given=validation is not None)

    def table(values: Any) -> Table:
        return Table(source.path, {f"{i}": values[:, i] for i in range(values.shape[1])}, range(len(values)))

    inputs = inputs_of(table(rows), "", parts[0])
    given = None if validation is None else (inputs.rows(table(validation[0])), validation[1])
    facts |= {"inputs": inputs.told}
    return _made(
        network_for_rows,
        (inputs.width,),
        torch.tensor(inputs.rows(table(rows))),
        target,
        parts,
        given,
        facts,
    )


def _arrays(path: Path, name: str | None, classes: Sequence[str] | None) -> tuple[Any, Target]:
    try:
        with numpy.load(path, allow_pickle=False) as held:
            arrays = {key: held[key] for key in held.files}
    except (OSError, ValueError, EOFError) as error:
        raise LabError(f"{path.name} cannot be read: {error}.") from error
    inputs = [key for key in ARRAYS if key in arrays]
    targets = [key for key in LABELS if key in arrays] if name is None else [name]
    if not inputs or not targets or targets[0] not in arrays:
        raise LabError(
            f"{path.name} has the arrays {', '.join(arrays) or 'none'}; it needs inputs ({', '.join(ARRAYS)}) "
            f"and a target ({', '.join(LABELS)}, or --target NAME)."
        )
    rows, values = arrays[inputs[0]], arrays[targets[0]].squeeze()
    if rows.ndim not in (2, 3, 4) or values.ndim != 1 or len(rows) != len(values):
        raise LabError(
            f"{path.name}: {inputs[0]} is of shape {rows.shape} and {targets[0]} of shape {values.shape}; "
            "needed are rows (number, columns) or images (number, height, width) and as many targets."
        )
    if rows.dtype.kind not in "biuf":
        raise LabError(f"{path.name}: {inputs[0]} holds {rows.dtype}, not numbers.")
    column = Table(path, {targets[0]: values.tolist()}, range(len(values)))
    return rows, target_of(column, targets[0], classes)


def _channels_first(images: Any) -> Any:
    """(number, height, width), with channels last or first, as (number, channel, height, width)."""
    if images.ndim == 3:
        return images[:, None]
    return images.transpose(0, 3, 1, 2) if images.shape[3] in (1, 3, 4) else images


def _of_idx(source: Source, train: Path, test: Path | None, facts: dict[str, str]) -> Task:
    images, labels = read_idx(train)
    names = [str(i) for i in range(int(labels.max()) + 1)]
    target = Target("label", labels, names)
    given = None if source.validation is None else read_idx(source.validation)
    validation = None if given is None else (given[0], Target("label", given[1], names))
    held = None if test is None else read_idx(test)
    return _of_images(images, target, validation, facts, held)


def _of_folder(source: Source, facts: dict[str, str]) -> Task:
    size, path, validation = source.size or SIZE, source.path, source.validation
    inside = {folder.name: folder for folder in class_folders(path)}
    if "train" in inside and set(inside) <= {"train", *VALIDATION_FOLDERS}:
        path = inside["train"]
        validation = validation or next((inside[name] for name in VALIDATION_FOLDERS if name in inside), None)
    images, labels, names = read_folder(path, size)
    given = None if validation is None else read_folder(validation, size, names)
    facts |= {"images": f"{len(images):,}, brought to {size} × {size}"}
    return _of_images(
        images,
        Target("folder", labels, names),
        None if given is None else (given[0], Target("folder", given[1], names)),
        facts,
    )


def _of_images(
    images: Any,
    target: Target,
    validation: tuple[Any, Target] | None,
    facts: dict[str, str],
    test: Part | None = None,
) -> Task:
    parts = _split(target, len(images), validation_given=validation is not None, test_given=test is not None)
    return _made(
        network_for_images, images.shape[1:], torch.tensor(images), target, parts, validation, facts, test
    )


# What they have in common


def _split(target: Target, count: int, validation_given: bool, test_given: bool = False) -> list[Any]:
    """The rows of train, validation and test: 70, 15 and 15 % of each class, or all of them for train."""
    if count < FEWEST:
        raise LabError(f"there are only {count} rows; at least {FEWEST} are needed.")
    if validation_given:
        return [numpy.arange(count)]
    draw = numpy.random.default_rng(SPLIT_SEED)
    groups = [numpy.flatnonzero(target.values == i) for i in range(len(target.classes))] or [
        numpy.arange(count)
    ]
    parts: list[list[Any]] = [[], [], []]
    for rows in groups:
        shuffled = draw.permutation(rows)
        held = (len(rows) * HELD_OUT + 50) // 100
        ends = [len(rows) - (1 if test_given else 2) * held, len(rows) - (0 if test_given else held)]
        for part, piece in zip(parts, numpy.split(shuffled, ends), strict=True):
            part.append(piece)
    found = [draw.permutation(numpy.concatenate(pieces)) for pieces in parts]
    if not len(found[1]):
        raise LabError("every class has so few rows that none is left for validation. Give --validation FILE.")
    return found


def _made(
    network: Any,
    shape: Sequence[int],
    inputs: Tensor,
    target: Target,
    parts: Sequence[Any],
    validation: tuple[Any, Target] | None,
    facts: dict[str, str],
    test: Part | None = None,
) -> Task:
    mean, spread = 0.0, 1.0
    if not target.classes:
        known = target.values[parts[0]]
        mean, spread = float(known.mean()), float(known.std())
        if not spread > 0:
            raise LabError(f"the target '{target.name}' has the same value in every row.")

    def as_target(values: Any) -> Tensor:
        if target.classes:
            return torch.tensor(values).long()
        return torch.tensor((values - mean) / spread, dtype=torch.float32)[:, None]

    targets = as_target(target.values)
    pieces = [(inputs[torch.tensor(rows)], targets[torch.tensor(rows)]) for rows in parts]
    if validation is not None:
        given, values = validation
        pieces.append((torch.tensor(given), as_target(values.values)))
    held: Any = pieces[2] if len(pieces) > 2 else None
    if test is not None:
        held = torch.tensor(test[0]), as_target(test[1])
    count = len(pieces[0][1])
    batch_size = 32 if count < 5000 else 64 if count < 50_000 else 256
    scale = "" if target.classes else f"; standardised with mean {mean:.4g} and deviation {spread:.4g}"
    return Task(
        model=network(*shape, len(target.classes) or 1),
        train=pieces[0],
        validation=pieces[1],
        test=held,
        loss=nn.functional.cross_entropy if target.classes else nn.functional.mse_loss,
        score=accuracy if target.classes else r_squared,
        epochs=_epochs(count, batch_size),
        batch_size=batch_size,
        threads=1,
        loss_label="cross-entropy (nats)"
        if target.classes
        else "mean squared error (of the standardised target)",
        facts={**facts, "target": target.told + scale},
    )


def _epochs(count: int, batch_size: int) -> int:
    """How many passes take about 600 steps."""
    return max(1, min(MOST_EPOCHS, round(STEPS * batch_size / max(1, count))))
