"""What `--data` names, as one name that means the same in every folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from steprule.lab.errors import LabError

__all__ = ["SIZE", "Source", "digest"]

SIZE = 32


@dataclass(frozen=True)
class Source:
    """A user's file or folder.

    target: the column to predict, for tables. validation: another file of the kind to evaluate with. size:
    height and width to which the images of a folder are brought.
    """

    path: Path
    target: str | None = None
    validation: Path | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        """The task's name, as in `file:///home/me/houses.csv?target=price`."""
        asked = {
            "target": self.target,
            "validation": None if self.validation is None else self.validation.resolve().as_uri(),
            "size": self.size,
        }
        query = urlencode({key: value for key, value in asked.items() if value is not None})
        return self.path.resolve().as_uri() + (f"?{query}" if query else "")

    @classmethod
    def named(cls, name: str) -> Source:
        """The source with this `name`."""
        parts = urlsplit(name)
        asked = {key: values[0] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        validation = asked.get("validation")
        return cls(
            path=_path(name),
            target=asked.get("target"),
            validation=None if validation is None else _path(validation),
            size=int(asked["size"]) if "size" in asked else None,
        )

    @property
    def options(self) -> list[str]:
        """The options of the command line that mean this source."""
        given = {"--target": self.target, "--validation": self.validation, "--size": self.size}
        rest = [word for key, value in given.items() if value is not None for word in (key, str(value))]
        return ["--data", str(self.path), *rest]


def _path(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def digest(path: Path) -> str:
    """The SHA-256 of a file, or of the names and the hashes of all files in a folder."""
    try:
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listed = [f"{file.relative_to(path)} {digest(file)}\n" for file in files]
        return hashlib.sha256("".join(listed).encode(errors="surrogateescape")).hexdigest()
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror}.") from error
