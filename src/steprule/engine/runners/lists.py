"""The runner on lists of tensors: which groups and tensors it takes."""

from __future__ import annotations

from typing import Any

from steprule.engine.composition import Composition
from steprule.engine.program.program import Program
from steprule.engine.program.trace import trace
from steprule.engine.runners import foreach, sharing
from steprule.engine.runners.reference import Work
from steprule.engine.runners.runner import Prepared, Runner, only_the_reference


class Lists(Runner):
    """`torch._foreach_*` on lists of tensors."""

    name = "foreach"
    switch = "foreach"

    def why_not(self, own: Composition, group: dict[str, Any]) -> str | None:
        """Why torch's lists cannot run this in this group, or None."""
        reason = only_the_reference(own.rule, group)
        if reason is None and own.rule.on_matrices:
            return f"{own.rule.__name__} works on whole matrices, all equal ones at once"
        if reason is None and any(program.lined for program in trace(own, group).kinds):
            return "torch's lists of tensors have no rows and columns"
        kept = str(group.get("state_dtype"))
        if reason is None and (
            group.get("low_precision") not in (None, "none") or "int8" in kept or "bf16" in kept
        ):
            return "torch's lists of tensors cannot round at random or keep 8-bit codes"
        return reason

    def prepare(
        self, optimizer: Any, group: dict[str, Any], program: Program | None, after: dict[str, float]
    ) -> Prepared:
        """Prepare a step of the parameters whose gradients and storage torch's lists can take."""
        work: list[Work] = []
        left: list[Work] = []
        checked: list[Work] = optimizer.checked(group["params"], group)
        alone = sharing.memory([param for param, _, _ in checked])
        alone |= sharing.state({place: state for place, (_, _, state) in enumerate(checked)})
        for place, entry in enumerate(checked):
            (work if place not in alone and foreach.takes(entry) else left).append(entry)
        parts = foreach.prepare(optimizer.program(group), group, work, after)
        return parts, [param for param, _, _ in left]
