"""Learning-rate schedules that torch.optim.lr_scheduler lacks.

    optimizer = steprule.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = steprule.schedules.WarmupCosine(optimizer, warmup_steps=500, total_steps=20_000)
    for batch in data:
        ...
        optimizer.step()
        schedule.step()  # once per optimizer step

They work with every torch optimizer, and together with torch's own schedules, also inside SequentialLR and
ChainedScheduler. Below, lr is the group's lr before the schedule, and t = 1, 2, 3, … counts optimizer steps.
Everything that uses the group's lr follows the schedule, including decoupled weight decay. To resume, create
the schedule first and load the optimizer afterwards: creating a schedule sets the lr of step 1, as in torch.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from steprule import errors
from steprule.engine.fields import Field

__all__ = ["Noam", "Warmup", "WarmupCosine"]


class _Scaled(LRScheduler):
    """A schedule that multiplies lr by a factor that depends on the step."""

    def factor(self, t: int) -> float:
        """What lr is multiplied by for step t of the optimizer, counted from 1."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """The lr of the next step: the current lr times the change of the factor.

        This way other schedules, and changes of lr by the user, keep their effect.
        """
        before = self.factor(self.last_epoch) if self.last_epoch > 0 else 1.0
        change = self.factor(self.last_epoch + 1) / before if before else 1.0
        return [group["lr"] * change for group in self.optimizer.param_groups]

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        """The lr computed from the first lr alone; torch calls this to jump to a step."""
        return [base * self.factor(self.last_epoch + 1) for base in self.base_lrs]

    def _whole(self, name: str, value: int, at_least: int) -> int:
        field = Field(0, name, "int", at_least=at_least)
        return int(field.check(type(self).__name__, value, None))


class Warmup(_Scaled):
    """A linear rise from lr/warmup_steps at step 1 to lr at step warmup_steps, then constant.

    When: the first steps of an adaptive rule are too large, because its moments have averaged few gradients.

        lr · min(1, t/warmup_steps)

    warmup_steps: 0 for none. last_epoch: as in torch; -1 to start.

    Raises: TypeError or ValueError for an invalid number of steps.
    Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2, https://arxiv.org/abs/1706.02677
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, last_epoch: int = -1):
        self.warmup_steps = self._whole("warmup_steps", warmup_steps, 0)
        super().__init__(optimizer, last_epoch)

    def factor(self, t: int) -> float:
        """min(1, t/warmup_steps)."""
        return t / self.warmup_steps if t < self.warmup_steps else 1.0


class Noam(_Scaled):
    """A linear rise, then a decrease with the inverse square root of the step, scaled by the model's width.

    When: transformers with normalization after each layer. The optimizer's lr is a multiplier, usually about 1.

        lr · d_model^-½ · min(t^-½, t·warmup_steps^-3/2)        largest at step warmup_steps

    d_model: the model's width, at least 1. warmup_steps: 0 for no rise. last_epoch: as in torch; -1 to start.

    Raises: TypeError or ValueError for an invalid width or number of steps.
    Source: Vaswani et al. 2017, "Attention Is All You Need", section 5.3, equation 3,
    https://arxiv.org/abs/1706.03762
    """

    def __init__(self, optimizer: Optimizer, d_model: int, warmup_steps: int, last_epoch: int = -1):
        self.d_model = self._whole("d_model", d_model, 1)
        self.warmup_steps = self._whole("warmup_steps", warmup_steps, 0)
        super().__init__(optimizer, last_epoch)

    def factor(self, t: int) -> float:
        """d_model^-½ · min(t^-½, t·warmup_steps^-3/2)."""
        rising = t < self.warmup_steps
        return self.d_model**-0.5 * (t * self.warmup_steps**-1.5 if rising else t**-0.5)


class WarmupCosine(_Scaled):
    """A linear rise to lr, then half a cosine down to floor·lr at step total_steps, then constant.

    When: the number of steps is known in advance. The usual choice for language and vision models.

        t ≤ warmup_steps:  lr · t/warmup_steps
        else:              lr · (floor + (1-floor)·(1 + cos(π·u))/2)
        u = min(1, (t-warmup_steps)/(total_steps-warmup_steps))

    warmup_steps: 0 for no rise. total_steps: more than warmup_steps. floor: the share of lr at the end, from
    0 to 1. last_epoch: as in torch; -1 to start.

    Raises: TypeError or ValueError for values outside these ranges.
    Source: Loshchilov and Hutter 2017, "SGDR", section 3, equation 5, without restarts,
    https://arxiv.org/abs/1608.03983
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        floor: float = 0.1,
        last_epoch: int = -1,
    ):
        who = type(self).__name__
        self.warmup_steps = self._whole("warmup_steps", warmup_steps, 0)
        self.total_steps = self._whole("total_steps", total_steps, 1)
        if self.total_steps <= self.warmup_steps:
            allowed = f"above warmup_steps = {self.warmup_steps}"
            raise errors.out_of_range(who, "total_steps", total_steps, allowed)
        self.floor = float(Field(0.1, "floor", at_least=0, at_most=1).check(who, floor, None))
        super().__init__(optimizer, last_epoch)

    def factor(self, t: int) -> float:
        """The rise, then the cosine, then floor."""
        if t < self.warmup_steps:
            return t / self.warmup_steps
        if t >= self.total_steps:
            return self.floor
        u = (t - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * u)) / 2
