"""What every modifier does, to lists with one array per tensor.

A modifier changes the gradients, then the parameters before the rule sees them, then the changes that the rule
makes of them, then the new parameters; what it leaves alone, it returns as it got it. `evaluated` is what the
weights are evaluated with.
"""

from __future__ import annotations

import math

import numpy as np

from papers import draws

from .mars import corrected

Arrays = list[np.ndarray]


class Modifier:
    def gradients(self, thetas: Arrays, gs: Arrays) -> Arrays:
        return gs

    def parameters(self, thetas: Arrays, lr: float) -> Arrays:
        return thetas

    def changes(self, thetas: Arrays, gs: Arrays, us: Arrays, lr: float) -> Arrays:
        return us

    def applied(self, olds: Arrays, news: Arrays, lr: float) -> Arrays:
        return news

    def estimated(self) -> None:
        """A curvature was estimated."""

    def evaluated(self, thetas: Arrays) -> Arrays:
        return thetas


class GlobalNormClip(Modifier):
    """Pascanu et al. 2013, §3.2, algorithm 1, over all parameters."""

    def __init__(self, max_norm: float = 1.0):
        self.max_norm = max_norm

    def gradients(self, thetas: Arrays, gs: Arrays) -> Arrays:
        norm = math.sqrt(sum(float(np.sum(g**2)) for g in gs))
        return [g * min(1.0, self.max_norm / norm) for g in gs] if norm else gs


class NormClip(Modifier):
    """Pascanu et al. 2013, §3.2, algorithm 1, for each tensor."""

    def __init__(self, max_norm: float = 1.0):
        self.max_norm = max_norm

    def gradients(self, thetas: Arrays, gs: Arrays) -> Arrays:
        return [g * self.max_norm / np.linalg.norm(g) if np.linalg.norm(g) > self.max_norm else g for g in gs]


class ValueClip(Modifier):
    """Every element between -c and c."""

    def __init__(self, clip_value: float = 1.0):
        self.clip_value = clip_value

    def gradients(self, thetas: Arrays, gs: Arrays) -> Arrays:
        return [np.clip(g, -self.clip_value, self.clip_value) for g in gs]


class AdaptiveClip(Modifier):
    """Brock et al. 2021, equation 3: the norms of units, which are what has one first index."""

    def __init__(self, clip_factor: float = 0.01, eps: float = 1e-3):
        self.clip_factor, self.eps = clip_factor, eps

    def gradients(self, thetas: Arrays, gs: Arrays) -> Arrays:
        made: Arrays = []
        for theta, g in zip(thetas, gs, strict=True):
            weights, gradients = (x.reshape(len(x) if x.ndim > 1 else 1, -1) for x in (theta, g))
            limit = self.clip_factor * np.maximum(np.linalg.norm(weights, axis=1), self.eps)
            size = np.linalg.norm(gradients, axis=1)
            scale = np.where(size > limit, limit / np.where(size > 0, size, 1.0), 1.0)
            made.append((gradients * scale[:, None]).reshape(g.shape))
        return made


class Centralize(Modifier):
    """Yong et al. 2020, equation 1: the mean over all but the first index."""

    def gradients(self, thetas: Arrays, gs: Arrays) -> Arrays:
        axes = [tuple(range(1, g.ndim)) for g in gs]
        return [g - g.mean(axis, keepdims=True) if axis else g for g, axis in zip(gs, axes, strict=True)]


class MARSCorrection(Modifier):
    """Yuan et al. 2024, algorithm 1: the gradient of a matrix, corrected by how it changed."""

    def __init__(self, gamma: float = 0.025, beta: float = 0.95):
        self.gamma, self.beta = gamma, beta
        self.last: Arrays = []

    def gradients(self, thetas: Arrays, gs: Arrays) -> Arrays:
        last = self.last or [np.zeros_like(g) for g in gs]
        self.last = gs
        pairs = zip(gs, last, strict=True)
        return [corrected(g, old, self.gamma, self.beta) if g.ndim > 1 else g for g, old in pairs]


class OrthoGrad(Modifier):
    """Prieto et al. 2025, ⊥Grad: the part of g that is orthogonal to θ, as long as g."""

    def gradients(self, thetas: Arrays, gs: Arrays) -> Arrays:
        made: Arrays = []
        for theta, g in zip(thetas, gs, strict=True):
            along = theta / np.linalg.norm(theta) if theta.any() else theta
            o = g - np.sum(g * along) * along
            parallel = np.linalg.norm(o) <= 1e-6 * np.linalg.norm(g)
            made.append(g if parallel else o / np.linalg.norm(o) * np.linalg.norm(g))
        return made


class GrokFast(Modifier):
    """Lee et al. 2024, Grokfast-EMA: the average starts as the first gradient."""

    def __init__(self, decay: float = 0.98, strength: float = 2.0):
        self.alpha, self.lamb = decay, strength
        self.average: Arrays | None = None

    def gradients(self, thetas: Arrays, gs: Arrays) -> Arrays:
        old = gs if self.average is None else self.average
        self.average = [self.alpha * e + (1 - self.alpha) * g for e, g in zip(old, gs, strict=True)]
        return [g + self.lamb * e for g, e in zip(gs, self.average, strict=True)]


class Grams(Modifier):
    """Cao et al. 2024, algorithm 1."""

    def changes(self, thetas: Arrays, gs: Arrays, us: Arrays, lr: float) -> Arrays:
        return [-np.sign(g) * np.abs(u) for u, g in zip(us, gs, strict=True)]


class Cautious(Modifier):
    """Liang et al. 2024, algorithm 1."""

    def __init__(self, floor: float = 1e-3):
        self.floor = floor

    def changes(self, thetas: Arrays, gs: Arrays, us: Arrays, lr: float) -> Arrays:
        masks = [(u * g < 0).astype(float) for u, g in zip(us, gs, strict=True)]
        return [u * k / max(k.mean(), self.floor) for u, k in zip(us, masks, strict=True)]


class UpdateClip(Modifier):
    """Shazeer, Stern 2018, §6."""

    def __init__(self, max_rms: float = 1.0):
        self.max_rms = max_rms

    def changes(self, thetas: Arrays, gs: Arrays, us: Arrays, lr: float) -> Arrays:
        return [u / max(1.0, math.sqrt(np.mean((u / lr) ** 2)) / self.max_rms) for u in us]


class TrustRatio(Modifier):
    """You et al. 2020, algorithm 2."""

    def changes(self, thetas: Arrays, gs: Arrays, us: Arrays, lr: float) -> Arrays:
        changed: Arrays = []
        for theta, u in zip(thetas, us, strict=True):
            weight, length = np.linalg.norm(theta), np.linalg.norm(u / lr)
            changed.append(u * (weight / length if weight > 0 and length > 0 else 1.0))
        return changed


class EMA(Modifier):
    """An exponential average that starts at the first weights."""

    def __init__(self, decay: float = 0.999):
        self.decay = decay
        self.average: Arrays | None = None

    def applied(self, olds: Arrays, news: Arrays, lr: float) -> Arrays:
        old = news if self.average is None else self.average
        self.average = [self.decay * a + (1 - self.decay) * x for a, x in zip(old, news, strict=True)]
        return news

    def evaluated(self, thetas: Arrays) -> Arrays:
        assert self.average is not None
        return self.average


class Average(Modifier):
    """Izmailov et al. 2018: the mean of the weights after `start` steps; before that, the weights."""

    def __init__(self, start: int = 0):
        self.start = start
        self.seen: list[Arrays] = []

    def applied(self, olds: Arrays, news: Arrays, lr: float) -> Arrays:
        self.seen.append(news)
        return news

    def evaluated(self, thetas: Arrays) -> Arrays:
        since = self.seen[self.start :] or self.seen[-1:]
        return [np.mean(of_one, axis=0) for of_one in zip(*since, strict=True)]


class Lookahead(Modifier):
    """Zhang et al. 2019, algorithm 1: the slow weights start where training starts."""

    def __init__(self, every: int = 5, step_back: float = 0.5):
        self.every, self.alpha = every, step_back
        self.steps = 0
        self.slow: Arrays | None = None

    def applied(self, olds: Arrays, news: Arrays, lr: float) -> Arrays:
        self.slow = olds if self.slow is None else self.slow
        self.steps += 1
        if self.steps % self.every:
            return news
        self.slow = [a + self.alpha * (x - a) for a, x in zip(self.slow, news, strict=True)]
        return self.slow


class OuterNesterov(Modifier):
    """Kallusky et al. 2025: Nesterov momentum on what k steps have changed."""

    def __init__(self, every: int = 30, outer_lr: float = 0.7, momentum: float = 0.5):
        self.every, self.eta, self.mu = every, outer_lr, momentum
        self.steps = 0
        self.slow: Arrays | None = None
        self.b: Arrays = []

    def applied(self, olds: Arrays, news: Arrays, lr: float) -> Arrays:
        if self.slow is None:
            self.slow, self.b = olds, [np.zeros_like(x) for x in olds]
        self.steps += 1
        if self.steps % self.every:
            return news
        ds = [w - x for w, x in zip(self.slow, news, strict=True)]
        self.b = [self.mu * b + d for b, d in zip(self.b, ds, strict=True)]
        self.slow = [w - self.eta * (self.mu * b + d) for w, b, d in zip(self.slow, self.b, ds, strict=True)]
        return self.slow


class RadialBrake(Modifier):
    """The norm grows by s times what it would."""

    def __init__(self, growth: float = 0.5):
        self.s = growth

    def applied(self, olds: Arrays, news: Arrays, lr: float) -> Arrays:
        applied: Arrays = []
        for old, new in zip(olds, news, strict=True):
            before, after = np.linalg.norm(old), np.linalg.norm(new)
            wanted = before + self.s * (after - before) if after > before else after
            applied.append(new / after * wanted if after else new)
        return applied


class ToStart(Modifier):
    """θ ← θ - lr·λ·(θ - θ0)."""

    def __init__(self, strength: float = 0.01):
        self.lamb = strength
        self.start: Arrays | None = None

    def parameters(self, thetas: Arrays, lr: float) -> Arrays:
        self.start = thetas if self.start is None else self.start
        return [x - lr * self.lamb * (x - x0) for x, x0 in zip(thetas, self.start, strict=True)]


class Noise(Modifier):
    """Welling, Teh 2011, eq. 4."""

    def __init__(self, sigma: float = 0.01, seed: int = 0):
        self.sigma, self.seed = sigma, seed
        self.steps = 0

    def estimated(self) -> None:
        self.steps += 1

    def applied(self, olds: Arrays, news: Arrays, lr: float) -> Arrays:
        noises = [draws.gaussian(x.shape, i, self.steps, seed=self.seed) for i, x in enumerate(news)]
        self.steps += 1
        return [x + math.sqrt(lr) * self.sigma * xi for x, xi in zip(news, noises, strict=True)]


class Hyperball(Modifier):
    """Every step has length lr·R, and ends on the ball of radius R."""

    def __init__(self) -> None:
        self.radius: list[float] | None = None

    def applied(self, olds: Arrays, news: Arrays, lr: float) -> Arrays:
        if self.radius is None:
            self.radius = [float(np.linalg.norm(x)) for x in olds]
        applied: Arrays = []
        for old, new, radius in zip(olds, news, self.radius, strict=True):
            u = new - old
            length = np.linalg.norm(u)
            there = old + (lr * radius / length if length else 0.0) * u
            applied.append(radius * there / np.linalg.norm(there))
        return applied


class ScheduleFree(Modifier):
    """Defazio et al. 2024, algorithm 1: z moves, x averages, the parameter is between them."""

    def __init__(self, momentum: float = 0.9):
        self.beta = momentum
        self.top = self.sum = 0.0
        self.z: Arrays | None = None
        self.x: Arrays = []

    def applied(self, olds: Arrays, news: Arrays, lr: float) -> Arrays:
        if self.z is None:
            self.z = self.x = olds
        self.top = max(self.top, lr)
        self.sum += self.top**2
        c = self.top**2 / self.sum
        self.z = [z + new - old for z, new, old in zip(self.z, news, olds, strict=True)]
        self.x = [(1 - c) * x + c * z for x, z in zip(self.x, self.z, strict=True)]
        return [(1 - self.beta) * z + self.beta * x for x, z in zip(self.x, self.z, strict=True)]

    def evaluated(self, thetas: Arrays) -> Arrays:
        return self.x


class Metrics(Modifier):
    """Measures, and changes nothing."""
