"""Random numbers in rules: `gaussian()` and `coin()`.

There is no generator: every number is a hash of the seed, of the parameter's position among all parameters, of
how many steps it has taken (estimates of the curvature count, too), of the element's place in row-major order,
and of which draw of the step it is. So all runners draw the same numbers, and so do the processes that train
copies or shards of a model, however torch is seeded in each. The first three are in one state entry, the noise
key: its upper 32 bits are the stream, made of the seed and the position, and its lower ones count the steps.

A gaussian is the normal distribution's quantile of 32 random bits: a sign, and a tail of 31 bits. Only
operations that are rounded correctly everywhere are used, in single precision, so that it has the same bits on
every machine. Its distribution function is within 1e-6 of the normal one, and in the tails within a factor of
1.0005; its variance is 1 + 3e-6; it is never beyond 6.34. In double precision it has the same values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from steprule import rule_errors
from steprule.engine import blocks
from steprule.engine.blocks import Region
from steprule.engine.composition import Composition
from steprule.engine.sharding import parts
from steprule.engine.sharding.parts import region_in
from steprule.engine.storage import GOLDEN, NOISE_KEY, mix

# |gaussian| is v·TOP(v)/BOTTOM(v), where v is 1 - ⁸√(2·tail); highest power first. They minimize the larger of
# the distribution function's error and 1/100 of the value's.
TOP = (35.998756, -49.462112, -47.554634, 53.003052, 10.025879)
BOTTOM = (14.792576, -26.882782, 2.5363402, 8.7788601, 1.0)
TAILS = 2.0**-31
# How many elements are drawn at a time, so that temporaries stay small.
PIECE = 1 << 18
_LOW = 0xFFFFFFFF


def create(
    composition: Composition, group: Mapping[str, Any], there: Mapping[str, Any], place: int
) -> dict[str, Tensor]:
    """The state entry that a parameter needs for its draws, if the composition has any.

    place: its position among all parameters of the optimizer.
    """
    if NOISE_KEY in there or not composition.seeds:
        return {}
    stream = GOLDEN
    for name in composition.seeds.values():
        for word in _words(int(group[name])):
            stream = mix(stream ^ word)
    stream = mix(stream + place)
    return {NOISE_KEY: torch.tensor((stream << 32) - (stream >> 31 << 64), device="cpu")}


def _words(seed: int) -> Iterator[int]:
    """A whole number, 32 bits at a time."""
    yield seed & _LOW
    while seed := seed >> 32:
        yield seed & _LOW


def drawn(
    word: str, draw: int, key: int, like: Tensor, dtype: torch.dtype, region: Region | None = None
) -> Tensor:
    """A random number for every element of a tensor.

    draw: which of the step it is. key: the parameter's noise key. region: which part of a whole tensor it is.
    """
    region = parts.region_of(like) if region is None else region
    whole = region.shape == region.whole
    places = None if whole else blocks.positions(region, like.device).reshape(-1)
    local = parts.local(like)
    numbers = torch.empty(local.shape, dtype=dtype, device=local.device)
    make = _gaussian if word == "gaussian" else _coin
    flat = numbers.view(-1)
    for first in range(0, flat.numel(), PIECE):
        last = min(first + PIECE, flat.numel())
        own = torch.arange(first, last, device=local.device) if places is None else places[first:last]
        flat[first:last] = make(_bits(key, draw, own))
    return parts.like(like, numbers, like.shape)


def _bits(key: int, draw: int, places: Tensor) -> Tensor:
    """32 random bits for each place."""
    stream = mix((key >> 32) + draw * GOLDEN)
    turn = mix(key + stream)
    return mix(mix(places ^ stream) + turn + (places >> 32) * GOLDEN)


def _gaussian(bits: Tensor) -> Tensor:
    tail = ((bits & 0x7FFFFFFF).float() + 0.5) * TAILS
    v = 1 - _root(_root(_root(tail)))
    size = v * _polynomial(v, TOP) / _polynomial(v, BOTTOM)
    return torch.where(bits >> 31 != 0, -size, size)


def _coin(bits: Tensor) -> Tensor:
    return torch.where(bits >> 31 != 0, -1.0, 1.0)


def _root(x: Tensor) -> Tensor:
    # torch's square root is off by one unit in the last place on some processors.
    return x.double().sqrt().float()


def _polynomial(v: Tensor, coefficients: Iterable[float]) -> Tensor:
    first, *rest = coefficients
    value = torch.full_like(v, first)
    for coefficient in rest:
        value = value * v + coefficient
    return value


class Draws:
    """What one step of one parameter draws.

    seeded: the rule and the modifiers that have a seed.
    """

    def __init__(self, seeded: Iterable[str], state: Mapping[str, Any], like: Tensor):
        self._seeded = seeded
        self._state = state
        self._like = like
        self._region = region_in(state)
        self._count = 0

    def next(self, owner: str, word: str, dtype: torch.dtype) -> Tensor:
        """The next draw. Raises: TypeError if its owner has no seed."""
        if owner not in self._seeded:
            raise rule_errors.drawn_without_seed(owner, word)
        self._count += 1
        key = int(self._state[NOISE_KEY])
        return drawn(word, self._count - 1, key, self._like, dtype, self._region)
