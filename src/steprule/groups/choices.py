"""What users decide about parameters, by patterns of their names, and the table that shows it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.nn.parameter import is_lazy

from steprule import group_errors
from steprule.engine.parts import is_rule
from steprule.groups.roles import Known


def first_matches(who: str, patterns: Iterable[str], params: Sequence[Known]) -> list[str | None]:
    """For each parameter the first pattern that matches one of its names.

    Raises: ValueError for a pattern that matches nothing, or only what others before it match.
    """
    patterns = list(patterns)
    found = [[x for x in patterns if any(fnmatch.fnmatchcase(n, x) for n in each.names)] for each in params]
    for pattern in patterns:
        with_it = [matches for matches in found if pattern in matches]
        if not with_it:
            raise group_errors.pattern_matches_nothing(who, pattern, [x for y in params for x in y.names])
        if not any(matches[0] == pattern for matches in with_it):
            before = list(dict.fromkeys(matches[0] for matches in with_it))
            raise group_errors.pattern_comes_too_late(who, pattern, before)
    return [matches[0] if matches else None for matches in found]


def check_rule(who: str, what: str, given: Any) -> None:
    """Refuse what is not a rule with its hyper-parameters."""
    pair = cast("Sequence[Any]", given if isinstance(given, (tuple, list)) else ())
    options: Any = pair[1] if len(pair) == 2 else None
    if not (isinstance(options, Mapping) and is_rule(pair[0])):
        raise group_errors.not_a_rule(who, what, cast(object, given))
    for key in ("params", "rule"):
        if key in options:
            raise group_errors.decided_elsewhere(who, what, key)


def shape_text(param: Tensor) -> str:
    """The shape of a parameter, for a table."""
    return "no shape yet" if is_lazy(param) else str(tuple(param.shape))


def as_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ("  ".join(x.ljust(width) for x, width in zip(row, widths, strict=True)) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)
