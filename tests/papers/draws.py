"""The random numbers of `gaussian()` and `coin()`, by NumPy alone.

The hash is lowbias32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/); a gaussian is the quantile of
the normal distribution for 32 bits, by a rational function in single precision.
"""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B9


def mix(x: np.ndarray | int) -> np.ndarray:
    x = np.asarray(x, np.uint64) & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def bits(places: np.ndarray, parameter: int, step: int, draw: int = 0, seed: int = 0) -> np.ndarray:
    """parameter: its position among all. step, draw: from 0. places: of elements, in row-major order."""
    places = np.asarray(places, np.uint64)
    stream = mix(GOLDEN ^ seed % 2**32)
    while seed := seed >> 32:
        stream = mix(stream ^ seed % 2**32)
    stream = mix(mix(stream + parameter) + draw * GOLDEN)
    turn = mix(stream + step)
    return mix(mix(places ^ stream) + turn + (places >> 32) * GOLDEN)


def quantile(random: np.ndarray) -> np.ndarray:
    tail = ((random & 0x7FFFFFFF).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31)
    v = np.float32(1) - np.sqrt(np.sqrt(np.sqrt(tail)))
    top = bottom = np.zeros_like(v)
    for a, b in zip(
        (35.998756, -49.462112, -47.554634, 53.003052, 10.025879),
        (14.792576, -26.882782, 2.5363402, 8.7788601, 1.0),
        strict=True,
    ):
        top, bottom = top * v + np.float32(a), bottom * v + np.float32(b)
    return np.where(random >> 31, -1, 1).astype(np.float32) * (v * top / bottom)


def gaussian(shape: tuple[int, ...], *place: int, **named: int) -> np.ndarray:
    return quantile(bits(np.arange(np.prod(shape)), *place, **named)).astype(np.float64).reshape(shape)


def coin(shape: tuple[int, ...], *place: int, **named: int) -> np.ndarray:
    return np.where(bits(np.arange(np.prod(shape)), *place, **named) >> 31, -1.0, 1.0).reshape(shape)
