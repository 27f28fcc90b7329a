"""What every modifier has: its name, its hyper-parameters and its slots."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from steprule.engine.fields import Field, Slot

_BEFORE_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


class ModifierBase:
    """The class attributes describe a modifier; an instance holds the hyper-parameters that a user gave.

    An instance is only how a modifier is written down. What is given to an optimizer goes into its groups, and
    from then on the groups say what the values are.
    """

    name: ClassVar[str] = ""
    fields: ClassVar[dict[str, Field]] = {}
    slots: ClassVar[dict[str, Slot]] = {}
    # The rows and columns that it sees: "flattened" or "stacked", as in `lines`.
    matrices: ClassVar[str] = "flattened"
    # Whether it needs the step count `t`.
    counts_steps: ClassVar[bool] = False
    # For `parameter`: whether it needs the change, and so comes after the rule.
    sees_change: ClassVar[bool] = False
    # Which of n steps has it: all, or the first or the last alone. It costs the others nothing.
    # n is its field `every`; its slot `steps`, one per group, counts them.
    acts: ClassVar[Literal["always", "first", "last"]] = "always"
    # The names of modifiers and rules that it makes no sense with, or "weight_decay", each with the reason.
    not_with: ClassVar[dict[str, str]] = {}

    def __init__(self, **values: Any):
        self.values = values

    @classmethod
    def rests(cls, group: Mapping[str, Any]) -> bool:
        """Whether the next step of a group goes without it, if not all have it."""
        every, taken = group[f"{cls.name}.every"], group[f"{cls.name}.steps"]
        return (taken if cls.acts == "first" else taken + 1) % every != 0

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.values.items())
        return f"{type(self).__name__}({given})"


def snake_case(name: str) -> str:
    """The name of a class as a key: GlobalNormClip is global_norm_clip, and EMA is ema."""
    return _BEFORE_CAPITAL.sub("_", name).lower()
