"""What every modifier has: its name, its hyper-parameters and its slots."""

from __future__ import annotations

import re
from typing import Any, ClassVar

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
    # Whether only every n-th step has it. n is its field `every`; its slot `steps`, one per group, counts them.
    rests: ClassVar[bool] = False
    # The names of modifiers and rules that it makes no sense with, or "weight_decay", each with the reason.
    not_with: ClassVar[dict[str, str]] = {}

    def __init__(self, **values: Any):
        self.values = values

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.values.items())
        return f"{type(self).__name__}({given})"


def snake_case(name: str) -> str:
    """The name of a class as a key: GlobalNormClip is global_norm_clip, and EMA is ema."""
    return _BEFORE_CAPITAL.sub("_", name).lower()
