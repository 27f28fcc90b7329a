"""Schedule-free rules: an average of the weights in place of a falling learning rate."""

from __future__ import annotations

from typing import Any

from steprule.declare import Elementwise, WeightDecay, decay, hyper, parameter, scalar_slot, slot
from steprule.elementwise.radam import rectification
from steprule.words import Becomes, Number, becomes, ema_sq, larger, lerp, smaller, sqrt, where

NOT_DECOUPLED = "it would shrink y and not z, of which the average is made."


def averaged(h: Any, p: Number, s: Any, t: float, n: Number, step: Any, beta: Any) -> Becomes:
    """Move z by -step·n, and y, which is the parameter, towards the average of all z so far."""
    s.lr_max = larger(s.lr_max, step)
    weight = t**h.step_power * s.lr_max**h.weight_lr_power
    s.weight_sum = s.weight_sum + weight
    c = where(s.weight_sum > 0, weight / larger(s.weight_sum, 1e-300), 0.0)
    # In this form, a step of length 0 keeps a weight of -0.
    new = p - c * (p - s.z) + (step * (beta * (1 - c) - 1)) * n
    s.z = s.z - step * n
    return becomes(new)


def warmed_up(h: Any, t: float) -> Any:
    """lr, which rises over the first steps."""
    return h.lr * smaller(1.0, t / larger(h.warmup_steps, 1))


class ScheduleFreeSGD(Elementwise):
    """SGD with an average of its weights in place of a schedule.

    When: image models whose number of steps is not known beforehand. `optimizer.eval()` puts the average into
    the model, `optimizer.train()` goes back; call them where you call `model.eval()` and `model.train()`.

        y ← (1-c)·y + c·z + lr·(β·(1-c) - 1)·(g + λ·y)         y is the parameter, g is taken there
        z ← z - lr·(g + λ·y)
        c = w/Σw with w = tʳ·(largest lr so far)ᵖ               evaluate at x = y + (1-1/β)·(z-y)

    State: 1 value per element (z), 2 per tensor (lr_max, weight_sum).
    Source: Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky 2024, "The Road Less Scheduled", §4,
    https://arxiv.org/abs/2405.15682; the authors' SGDScheduleFree.
    """

    lr: float = hyper(
        default=1.0, at_least=0, search=(3e-2, 30.0), meaning="step size, larger than with a schedule"
    )
    momentum: float = hyper(default=0.9, above=0, below=1, meaning="β, between z (0) and the average (1)")
    weight_decay: float | WeightDecay = decay(
        default=0.0, mode="own", not_decoupled=NOT_DECOUPLED, meaning="λ, decays y"
    )
    warmup_steps: int = hyper(default=0, at_least=0, meaning="over how many steps lr rises")
    step_power: float = hyper(default=0.0, at_least=0, meaning="r, power of t in the weights of the average")
    weight_lr_power: float = hyper(
        default=2.0, at_least=0, meaning="p, power of lr in the weights of the average"
    )

    z = slot("z", starts=parameter)
    lr_max = scalar_slot("lr_max")
    weight_sum = scalar_slot("weight_sum")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: ScheduleFreeSGD, t: float) -> Becomes:
        return averaged(h, p, s, t, g + h.weight_decay * p, warmed_up(h, t), h.momentum)

    @staticmethod
    def evaluate(h: ScheduleFreeSGD, p: Number, s: ScheduleFreeSGD, t: float) -> Number:
        return lerp(p, s.z, 1 - 1 / h.momentum)


class ScheduleFreeAdamW(Elementwise):
    """AdamW with an average of its weights in place of a schedule.

    When: AdamW with a cosine schedule works, and the number of steps is not known beforehand. Needs a warm-up.
    `optimizer.eval()` puts the average into the model, `optimizer.train()` goes back.

        v ← β2·v + (1-β2)·g²            n = g/(√(v/(1-β2ᵗ)) + ε) + λ·y
        y ← (1-c)·y + c·z + lr·(β1·(1-c) - 1)·n                 y is the parameter, g is taken there
        z ← z - lr·n
        c = w/Σw with w = tʳ·(largest lr so far)ᵖ               evaluate at x = y + (1-1/β1)·(z-y)

    State: 2 values per element (z, exp_avg_sq), 2 per tensor (lr_max, weight_sum).
    Source: Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky 2024, "The Road Less Scheduled", algorithm 1,
    https://arxiv.org/abs/2405.15682; the authors' AdamWScheduleFree.
    """

    lr: float = hyper(default=2.5e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(
        default=(0.9, 0.999), above=0, below=1, meaning="between z (0) and the average (1); decay of v"
    )
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(
        default=0.0, mode="own", not_decoupled=NOT_DECOUPLED, meaning="λ, decays y"
    )
    warmup_steps: int = hyper(default=0, at_least=0, meaning="over how many steps lr rises")
    step_power: float = hyper(default=0.0, at_least=0, meaning="r, power of t in the weights of the average")
    weight_lr_power: float = hyper(
        default=2.0, at_least=0, meaning="p, power of lr in the weights of the average"
    )

    z = slot("z", starts=parameter)
    v = slot("exp_avg_sq", never_negative=True)
    lr_max = scalar_slot("lr_max")
    weight_sum = scalar_slot("weight_sum")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: ScheduleFreeAdamW, t: float) -> Becomes:
        beta1, beta2 = h.betas
        s.v = ema_sq(s.v, g, beta2)
        n = g / (sqrt(s.v / (1 - beta2**t)) + h.eps) + h.weight_decay * p
        return averaged(h, p, s, t, n, warmed_up(h, t), beta1)

    @staticmethod
    def evaluate(h: ScheduleFreeAdamW, p: Number, s: ScheduleFreeAdamW, t: float) -> Number:
        return lerp(p, s.z, 1 - 1 / h.betas[0])


class ScheduleFreeRAdam(Elementwise):
    """RAdam with an average of its weights in place of a schedule, and without a warm-up.

    When: as ScheduleFreeAdamW, with one hyper-parameter less to tune. `optimizer.eval()` puts the average into
    the model, `optimizer.train()` goes back.

        ρₜ > 4:  n = g/(√(v/(1-β2ᵗ)) + ε) + λ·y, and lr·rₜ for lr, with ρₜ and rₜ of RAdam
        else:    n = g + λ·y, and 0 for lr, or lr itself with silent_sgd_phase=False

    The rest is ScheduleFreeAdamW's.

    State: 2 values per element (z, exp_avg_sq), 2 per tensor (lr_max, weight_sum).
    Source: Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky 2024, "The Road Less Scheduled",
    https://arxiv.org/abs/2405.15682; the authors' RAdamScheduleFree, with the threshold of RAdam's paper.
    """

    lr: float = hyper(default=2.5e-3, at_least=0, search=(1e-4, 1e-1), meaning="step size")
    betas: tuple[float, float] = hyper(
        default=(0.9, 0.999), above=0, below=1, meaning="between z (0) and the average (1); decay of v"
    )
    eps: float = hyper(default=1e-8, at_least=0, meaning="ε, avoids division by zero")
    weight_decay: float | WeightDecay = decay(
        default=0.0, mode="own", not_decoupled=NOT_DECOUPLED, meaning="λ, decays y"
    )
    step_power: float = hyper(default=0.0, at_least=0, meaning="r, power of t in the weights of the average")
    weight_lr_power: float = hyper(
        default=2.0, at_least=0, meaning="p, power of lr in the weights of the average"
    )
    silent_sgd_phase: bool = hyper(default=True, meaning="rest while ρₜ is 4 or less")

    z = slot("z", starts=parameter)
    v = slot("exp_avg_sq", never_negative=True)
    lr_max = scalar_slot("lr_max")
    weight_sum = scalar_slot("weight_sum")

    @staticmethod
    def update(h: Any, p: Number, g: Number, s: ScheduleFreeRAdam, t: float) -> Becomes:
        beta1, beta2 = h.betas
        s.v = ema_sq(s.v, g, beta2)
        rho, rect = rectification(beta2, t, least=4 + 1e-9)
        adaptive = rho > 4
        n = where(adaptive, g / (sqrt(s.v / (1 - beta2**t)) + h.eps), g) + h.weight_decay * p
        step = h.lr * where(adaptive, rect, 0.0 if h.silent_sgd_phase else 1.0)
        return averaged(h, p, s, t, n, step, beta1)

    evaluate = staticmethod(ScheduleFreeAdamW.evaluate)
