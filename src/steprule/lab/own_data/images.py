"""Reads images: folders of folders, the idx files of MNIST, and columns of encoded pictures."""

from __future__ import annotations

import gzip
import importlib
import io
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy

from steprule.lab.errors import LabError

__all__ = ["class_folders", "decoded", "idx_files", "read_folder", "read_idx"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def class_folders(path: Path) -> list[Path]:
    """The folders in a folder, in the order of their names; each is a class."""
    return sorted(x for x in path.iterdir() if x.is_dir() and not x.name.startswith("."))


def read_folder(path: Path, size: int, classes: Sequence[str] | None = None) -> tuple[Any, Any, list[str]]:
    """Images as bytes (number, channel, height, width), their classes as numbers, and the classes' names.

    classes: those of the training data, for validation data.
    """
    folders = class_folders(path)
    names = [folder.name for folder in folders] if classes is None else [*classes]
    pictures: list[Any] = []
    labels: list[int] = []
    for folder in folders:
        if folder.name not in names:
            raise LabError(f"'{folder}' is a class that the training data do not have.")
        for file in sorted(x for x in folder.iterdir() if x.suffix.lower() in PICTURES):
            pictures.append(_opened(file, file, size))
            labels.append(names.index(folder.name))
    if not pictures:
        raise LabError(f"'{path}' has no images in its folders ({', '.join(PICTURES)}).")
    return _stacked(pictures), numpy.array(labels), names


def decoded(pictures: Sequence[Any], size: int, place: str) -> Any:
    """Pictures in the form of Hugging Face's columns, `{"bytes": …, "path": …}`, as bytes."""
    opened: list[Any] = []
    for row, picture in enumerate(pictures):
        held = cast("dict[str, Any]", picture).get("bytes") if isinstance(picture, dict) else None
        if not held:
            raise LabError(f"{place}, row {row + 1}: there is no picture.")
        opened.append(_opened(io.BytesIO(held), f"{place}, row {row + 1}", size))
    return _stacked(opened)


def _opened(given: Any, what: object, size: int) -> Any:
    image: Any = importlib.import_module("PIL.Image")
    try:
        with image.open(given) as opened:
            grey = opened.mode in ("L", "1")
            picture = opened.convert("L" if grey else "RGB").resize((size, size))
            return numpy.asarray(picture).reshape(size, size, 1 if grey else 3).transpose(2, 0, 1)
    except (OSError, ValueError, SyntaxError) as error:
        raise LabError(f"{what} cannot be read as an image: {error}.") from error


def _stacked(pictures: Sequence[Any]) -> Any:
    """One array; grey pictures among coloured ones get three equal channels."""
    channels = max(len(picture) for picture in pictures)
    return numpy.stack([numpy.broadcast_to(x, (channels, *x.shape[1:])) for x in pictures])


def idx_files(path: Path) -> tuple[Path, Path | None] | None:
    """The images for training and for the test, if this is one of MNIST's files or a folder of them."""
    if path.is_file():
        return (path, None) if IMAGES in path.name else None
    train = sorted(path.glob(f"train-{IMAGES}*"))
    test = sorted(path.glob(f"t10k-{IMAGES}*"))
    return (train[0], test[0] if test else None) if train else None


def read_idx(file: Path) -> tuple[Any, Any]:
    """Images (number, 1, height, width) and their classes, from the file of labels beside it."""
    labels = file.with_name(file.name.replace(IMAGES, LABELS))
    if not labels.exists():
        raise LabError(f"{labels.name} must be beside {file.name}.")
    images, classes = _array(file), _array(labels)
    if images.ndim != 3 or classes.ndim != 1 or len(images) != len(classes):
        raise LabError(f"{file.name} is of shape {images.shape}, and {labels.name} of shape {classes.shape}.")
    return images[:, None], classes.astype(numpy.int64)


def _array(file: Path) -> Any:
    try:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
        zeros, kind, dimensions = struct.unpack(">HBB", raw[:4])
        if zeros or kind not in IDX_TYPES:
            raise ValueError("it does not begin as an idx file does")
        shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
        dtype = numpy.dtype(IDX_TYPES[kind])
        held = raw[4 + 4 * dimensions :]
        if len(held) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it has {len(held)} bytes of values for the shape {shape}")
        return numpy.frombuffer(held, dtype).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise LabError(f"{file.name} cannot be read: {error}.") from error
