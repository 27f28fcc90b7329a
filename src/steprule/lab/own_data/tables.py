"""Reads tables: CSV, TSV, Parquet, and folders that Hugging Face's `save_to_disk` has written."""

from __future__ import annotations

import csv
import gzip
import importlib
import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steprule.lab.errors import LabError

__all__ = ["Table", "is_table", "read_table"]

SEPARATORS = (",", ";", "\t")


@dataclass(frozen=True)
class Table:
    """Columns by name. lines: where each row is in the file, for messages."""

    file: Path
    columns: dict[str, Sequence[Any]]
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, row: int, column: str) -> str:
        """Where a value is: `houses.csv, line 7, column 'area'`."""
        return f"{self.file.name}, line {self.lines[row]}, column '{column}'"


def is_table(path: Path) -> bool:
    """Whether this is a table by its name."""
    return _kind(path) in (".csv", ".tsv", ".parquet") or (path / "state.json").is_file()


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else "".join(suffixes[-1:])


def read_table(path: Path) -> Table:
    """The table in a file or folder. Raises `LabError` that names file, line and column."""
    if path.is_dir() or _kind(path) == ".parquet":
        return _read_arrow(path)
    return _read_text(path, "\t" if _kind(path) == ".tsv" else None)


def _read_text(path: Path, separator: str | None) -> Table:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise LabError(f"{path.name} cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise LabError(f"{path.name}, line {line}: it is not UTF-8. Save the file as UTF-8.") from None
    if separator is None:
        head = text.partition("\n")[0]
        separator = max(SEPARATORS, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    names: list[str] = []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not names:
                names = _names(path, row)
            elif len(row) != len(names):
                raise LabError(
                    f"{path.name}, line {reader.line_num}: it has {len(row)} values, but the first line names "
                    f"{len(names)} columns."
                )
            else:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise LabError(f"{path.name}, line {reader.line_num}: {error}.") from None
    if not rows:
        raise LabError(f"{path.name} has no rows: it needs a line of column names and then values.")
    return Table(path, dict(zip(names, zip(*rows, strict=True), strict=True)), lines)


def _names(path: Path, row: Sequence[str]) -> list[str]:
    names = [name.strip() for name in row]
    for i, name in enumerate(names):
        if not name or name in names[:i]:
            problem = f"column {i + 1} has no name" if not name else f"two columns are called '{name}'"
            raise LabError(f"{path.name}, first line: {problem}. It must name every column.")
    return names


def _read_arrow(path: Path) -> Table:
    if importlib.util.find_spec("pyarrow") is None:
        raise LabError(f"{path.name} is read with pyarrow: pip install pyarrow")
    try:
        if path.is_dir():
            # A memory map would keep the file open.
            ipc: Any = importlib.import_module("pyarrow.ipc")
            arrow: Any = importlib.import_module("pyarrow")
            state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
            parts: list[Any] = []
            for given in state["_data_files"]:
                with ipc.open_stream(io.BytesIO((path / given["filename"]).read_bytes())) as reader:
                    parts.append(reader.read_all())
            read = arrow.concat_tables(parts)
        else:
            parquet: Any = importlib.import_module("pyarrow.parquet")
            read = parquet.read_table(io.BytesIO(path.read_bytes()))
        columns: dict[str, Sequence[Any]] = {
            str(name): read.column(name).to_pylist() for name in read.column_names
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path.name} cannot be read: {str(error).splitlines()[0].rstrip('.')}.") from error
    rows = max(map(len, columns.values()), default=0)
    if not rows:
        raise LabError(f"{path.name} has no rows.")
    return Table(path, columns, range(1, rows + 1))
