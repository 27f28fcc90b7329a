"""What `steprule bench` measures of a rule with modifiers, and what users of torch write in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import steprule
from steprule.engine.optimizer import CheckedOptimizer

__all__ = ["Modified"]


class Modified:
    """A rule with modifiers, built like the rule alone."""

    def __init__(self, rule: type[CheckedOptimizer], modifiers: Sequence[type[steprule.Modifier]]):
        self.rule = rule
        self.modifiers = modifiers
        self.__name__ = "+".join([rule.__name__, *(modifier.name for modifier in modifiers)])

    def __call__(self, params: Any, **options: Any) -> CheckedOptimizer:
        """The optimizer, with the modifiers' defaults."""
        make: Any = self.rule
        return make(params, modifiers=[modifier() for modifier in self.modifiers], **options)

    def by_hand(self, params: list[nn.Parameter]) -> ByHand:
        """torch's fused optimizer with what users add to it. Raises: ValueError if there is no such thing."""
        theirs: Any = getattr(torch.optim, self.rule.__name__, None)
        missing = [x.name for x in self.modifiers if x.name not in BEFORE | AFTER]
        if theirs is None or missing:
            raise ValueError(f"torch has no {' and no '.join(missing or [self.rule.__name__])}")
        names = [modifier.name for modifier in self.modifiers]
        before = [BEFORE[name](params) for name in names if name in BEFORE]
        after = [AFTER[name](params) for name in names if name in AFTER]
        return ByHand(theirs(params, fused=True), before, after)


class ByHand:
    """An optimizer of torch, and what is called before and after its step."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        before: Sequence[Callable[[], object]],
        after: Sequence[Callable[[], object]],
    ):
        self._all = [*before, optimizer.step, *after]

    def step(self) -> None:
        """Everything, in order."""
        for part in self._all:
            part()


def _clip_all(params: list[nn.Parameter]) -> Callable[[], object]:
    return lambda: nn.utils.clip_grad_norm_(params, 1.0)


def _clip_elements(params: list[nn.Parameter]) -> Callable[[], object]:
    return lambda: nn.utils.clip_grad_value_(params, 1.0)


def _average(params: list[nn.Parameter]) -> Callable[[], object]:
    averages = [param.detach().clone() for param in params]
    helpers: Any = torch.optim.swa_utils
    update = helpers.get_ema_multi_avg_fn(0.999)
    given: list[Tensor] = [param.detach() for param in params]
    return lambda: update(averages, given, 1)


# What users add, by the modifier's name.
BEFORE = {"global_norm_clip": _clip_all, "value_clip": _clip_elements}
AFTER = {"ema": _average}
