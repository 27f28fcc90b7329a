"""The words that a generated GPU kernel is written in, besides Triton's own.

They round and store values bit for bit as `reference` and `storage` do. Importing this module imports
Triton, so only a generated kernel does it.
"""
# Triton has no type annotations: arguments and results here are blocks of values on the device.
# pyright: basic, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from steprule.engine import draws, storage
from steprule.engine.program import exact

# Module-level numbers must be constants for Triton.
LANES = tl.constexpr(exact.LANES)
EXPONENT, NOT_FINITE = tl.constexpr(storage.EXPONENT), tl.constexpr(storage.NOT_FINITE)
MANTISSA = tl.constexpr(storage.MANTISSA)
STEP = tl.constexpr(storage.GOLDEN)
HEADROOM = tl.constexpr(storage.HEADROOM)
TINIEST = tl.constexpr(storage.TINIEST)
TOP, BOTTOM, TAILS = tl.constexpr(draws.TOP), tl.constexpr(draws.BOTTOM), tl.constexpr(draws.TAILS)
ONE, INFINITE = tl.constexpr(storage.ONE), tl.constexpr(storage.INFINITE)


def _kind(dtype):
    """For one kind of codes: the float that code 0 stands for, its bits, and the highest code."""
    return tl.constexpr(
        (storage.CODE_0[dtype], storage.bits_of(storage.CODE_0[dtype]), storage.CODES[dtype] - 1)
    )


SIGNED, UNSIGNED = (_kind(dtype) for dtype in storage.CODES)
# The lowest code above 0, as the leading bits of a float.
LEAST = tl.constexpr((UNSIGNED.value[1] >> storage.MANTISSA) + 1)


@triton.jit
def power(x, y):
    """xʸ as C's `pow` computes it, in double precision."""
    x, y = tl.broadcast(x.to(tl.float64), y.to(tl.float64))
    size = tl.exp(y * tl.log(tl.abs(x)))
    size = tl.where((y == 0.0) | (tl.abs(x) == 1.0), 1.0, size)
    whole = tl.floor(y) == y
    odd = whole & (tl.floor(y * 0.5) * 2.0 != y)
    negative = x.to(tl.int64, bitcast=True) < 0
    size = tl.where(negative & odd, size * -1.0, size)
    undefined = (x < 0.0) & (tl.abs(x) < float("inf")) & (tl.floor(y) != y)
    return tl.where(undefined | ((x != x) & (y != 0.0)), float("nan"), size).to(tl.float32)


@triton.jit
def atan2(y, x):
    """The angle of (x, y) as C's `atan2` computes it, in double precision."""
    y, x = tl.broadcast(y.to(tl.float64), x.to(tl.float64))
    height, width = tl.abs(y), tl.abs(x)
    steep = height > width
    low, high = tl.where(steep, width, height), tl.where(steep, height, width)
    # Of two infinities and of two zeros, there is no quotient.
    same = low == high
    # atan as in Cephes: a rational function up to 0.66, beyond it from π/4 on.
    far = (low > high * 0.66) | (same & (low > 0.0))
    above = tl.where(same, 0.0, tl.where(far, low - high, low))
    r = above / tl.where(same, 1.0, tl.where(far, low + high, high))
    z = r * r
    # A number of its own, not in an operation, would be rounded to single precision.
    top = z * -8.750608600031904122785e-1 + -1.615753718733365076637e1
    top = top * z + -7.500855792314704667340e1
    top = top * z + -1.228866684490136173410e2
    top = top * z + -6.485021904942025371773e1
    bottom = z + 2.485846490142306297962e1
    bottom = bottom * z + 1.650270098316988542046e2
    bottom = bottom * z + 4.328810604912902668951e2
    bottom = bottom * z + 4.853903996359136964868e2
    bottom = bottom * z + 1.945506571482613964425e2
    angle = r * (z * top / bottom) + r
    angle = tl.where(far, (angle + 3.061616997868383e-17) + 0.7853981633974483, angle)
    angle = tl.where(steep, (6.123233995736766e-17 - angle) + 1.5707963267948966, angle)
    left = x.to(tl.int64, bitcast=True) < 0
    angle = tl.where(left, (1.2246467991473532e-16 - angle) + 3.141592653589793, angle)
    angle = tl.where(y.to(tl.int64, bitcast=True) < 0, angle * -1.0, angle)
    return tl.where((x != x) | (y != y), float("nan"), angle)


@triton.jit
def largest(x):
    """The largest lane; NaN if any lane is NaN."""
    undefined = tl.max(tl.where(x == x, 0, 1))
    return tl.where(undefined == 0, tl.max(tl.where(x == x, x, float("-inf"))), float("nan"))


@triton.jit
def largest_along(x):
    """The largest entry of each column; NaN if any of its entries is NaN."""
    undefined = tl.max(tl.where(x == x, 0, 1), 0)
    return tl.where(undefined == 0, tl.max(tl.where(x == x, x, float("-inf")), 0), float("nan"))


@triton.jit
def bits_of(x):
    """The bits of a float32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    """The float32 with these bits."""
    return bits.to(tl.float32, bitcast=True)


# 16-bit values. bfloat16 is handled as raw bits here, so that rounding is the same on every machine.


@triton.jit
def from_bfloat16(bits):
    """The bfloat16 value of 16 bits, as float32."""
    return float_of(bits.to(tl.uint32) << 16)


@triton.jit
def to_bfloat16(x):
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, bits, 0x7FC0).to(tl.uint16)


@triton.jit
def to_bfloat16_at_random(x, noise):
    """Round up or down by 16 bits of noise."""
    bits = (x.to(tl.uint32, bitcast=True) + (noise >> 16)) >> 16
    return tl.where(tl.abs(x) < float("inf"), bits.to(tl.uint16), to_bfloat16(x))


@triton.jit
def from_halves(upper, lower):
    """A float32 from a bfloat16 and the signed remainder stored with it."""
    return float_of((upper.to(tl.int32) << 16) + lower.to(tl.int32))


@triton.jit
def upper_half(x):
    """The bfloat16 of a float32, rounded half up."""
    return (bits_of(x) + 0x8000) >> 16


@triton.jit
def finite_or_zero(x):
    """The value, or 0 where it is NaN or infinite."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def mixed(x):
    """`storage.mix`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_at(key, block, place):
    """32 random bits for an element of a block, as in `storage.noise_for`."""
    return mixed(key ^ block.to(tl.uint32)) + place.to(tl.uint32) * STEP


@triton.jit
def within(q, width, strip, begun, across, length, SHARING: tl.constexpr):
    """Which element of a chunk each lane is, and whether it is one, if each block has so many lanes.

    q: the lane. width: the elements of a line. strip: of a block. begun: how many of its first block are
    before it. across: the blocks of a line.
    """
    block = q // SHARING
    line = block // across
    end = (block - line * across + 1) * strip - begun
    along = tl.maximum(end - strip, 0) + q % SHARING
    i = line * width + along
    return i, (along < end) & (along < width) & (i < length)


# Random numbers, as in `draws`.


@triton.jit
def stream_of(key, salt):
    """The stream of a draw, from the parameter's noise key."""
    return mixed((key >> 32).to(tl.uint32) + salt)


@triton.jit
def turn_of(key, stream):
    """What a stream is shifted by in this step."""
    return mixed(key.to(tl.uint32) + stream)


@triton.jit
def bits_at(stream, turn, place):
    """32 random bits for an element's place."""
    return mixed(mixed(place.to(tl.uint32) ^ stream) + turn + (place >> 32).to(tl.uint32) * STEP)


@triton.jit
def gaussian(bits):
    """The quantile of the normal distribution for 32 random bits."""
    tail = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * TAILS
    v = 1.0 - tl.sqrt_rn(tl.sqrt_rn(tl.sqrt_rn(tail)))
    top = (((v * TOP[0] + TOP[1]) * v + TOP[2]) * v + TOP[3]) * v + TOP[4]
    bottom = (((v * BOTTOM[0] + BOTTOM[1]) * v + BOTTOM[2]) * v + BOTTOM[3]) * v + BOTTOM[4]
    return signed(tl.div_rn(v * top, bottom), bits)


@triton.jit
def coin(bits):
    """1 or -1, by the first of 32 random bits."""
    return signed(tl.full(bits.shape, 1.0, tl.float32), bits)


@triton.jit
def signed(size, bits):
    """A size with its sign changed if the first bit is set."""
    return float_of(size.to(tl.uint32, bitcast=True) ^ (bits & 0x80000000))


# Codes


@triton.jit
def from_code(code, scale, KIND: tl.constexpr):
    """Decode values from their codes and the scales of their blocks."""
    zero: tl.constexpr = KIND[0]
    scale = tl.where(scale == NOT_FINITE, float("nan"), float_of(scale.to(tl.int32) << EXPONENT))
    bits = ((code.to(tl.int32) & KIND[2]) << MANTISSA) + KIND[1]
    size = float_of(bits) - zero
    return tl.where(code < 0, size * -1.0, size) * scale


@triton.jit
def store_codes(
    codes,
    scales,
    first,
    i,
    inside,
    x,
    noise,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARING: tl.constexpr,
):
    """Encode values as codes, rounded up or down by noise, with the scales of their blocks."""
    zero: tl.constexpr = KIND[0]
    rows: tl.constexpr = BLOCK // SHARING
    if inside is not None:
        x = tl.where(inside, x, 0.0)
    top = float_of(tl.max(tl.reshape(bits_of(tl.abs(x)), (rows, SHARING)), 1))
    exponent = tl.where(top < TINIEST, 0, bits_of(top * HEADROOM) & INFINITE)
    exponent = tl.where(bits_of(top) >= INFINITE, INFINITE, exponent)
    inverse = float_of(tl.where(exponent > 0, 2 * ONE - exponent, 0))
    inverse = tl.reshape(tl.broadcast_to(inverse[:, None], (rows, SHARING)), (BLOCK,))
    code = (bits_of(tl.abs(x) * inverse + zero) + (noise >> (32 - MANTISSA)).to(tl.int32)) >> MANTISSA
    if KIND[2] == 255:
        code = tl.where(x > 0.0, tl.maximum(code, LEAST), code)
    code = code & KIND[2]
    if KIND[2] == 127:
        code = code | ((bits_of(x) >> 31) << 7)
    blocks = first // SHARING + tl.arange(0, rows)
    tl.store(scales + blocks, (exponent >> EXPONENT).to(tl.uint8), any_inside(inside, rows, SHARING))
    tl.store(codes + i, code.to(codes.dtype.element_ty), inside)


# Sums


@triton.jit
def added(total, sums, loose, i, inside, x, EACH: tl.constexpr):
    """The sums of lanes with one element more each; of a loose tensor, each element is stored.

    sums: where the chunk has room for them, every EACH-th number.
    """
    if inside is not None:
        x = tl.where(inside, x, 0.0)
    if loose:
        tl.store(sums + EACH * i, x, inside)
    return total + x


@triton.jit
def store_lanes(sums, loose, block, count, total, EACH: tl.constexpr, rows: tl.constexpr):
    """Store the sums of blocks, of which each has 16 lanes, unless their tensor is loose."""
    if loose == 0:
        blocks = block + tl.arange(0, rows)
        found = folded(tl.reshape(total, (rows, LANES)), rows)
        tl.store(sums + EACH * blocks, found, blocks < count)


@triton.jit
def store_sums(
    sums, loose, first, i, inside, x, EACH: tl.constexpr, BLOCK: tl.constexpr, SHARING: tl.constexpr
):
    """Store the sum of each block; of a loose tensor, each element.

    sums: where the chunk has room for them, every EACH-th number.
    """
    rows: tl.constexpr = BLOCK // SHARING
    if inside is not None:
        x = tl.where(inside, x, 0.0)
    if loose:
        tl.store(sums + EACH * i, x, inside)
    else:
        blocks = first // SHARING + tl.arange(0, rows)
        tl.store(sums + EACH * blocks, block_sums(x, rows, SHARING), any_inside(inside, rows, SHARING))


@triton.jit
def any_inside(inside, rows: tl.constexpr, SHARING: tl.constexpr):
    """Whether any lane of each block is an element; None if all are."""
    found = None
    if inside is not None:
        found = tl.max(tl.reshape(inside.to(tl.int32), (rows, SHARING)), 1) != 0
    return found


@triton.jit
def block_sums(x, rows: tl.constexpr, SHARING: tl.constexpr):
    """The sum of each block: see `exact`."""
    turns: tl.constexpr = SHARING // LANES
    x = tl.permute(tl.reshape(x, (rows, turns, LANES)), (0, 2, 1))
    if turns == 8:
        a, b = tl.split(tl.reshape(x, (rows, LANES, 4, 2)))
        a, c = tl.split(tl.reshape(a, (rows, LANES, 2, 2)))
        b, d = tl.split(tl.reshape(b, (rows, LANES, 2, 2)))
        x0, x4 = tl.split(a)
        x1, x5 = tl.split(b)
        x2, x6 = tl.split(c)
        x3, x7 = tl.split(d)
        total = ((((((x0 + x1) + x2) + x3) + x4) + x5) + x6) + x7
    elif turns == 4:
        a, b = tl.split(tl.reshape(x, (rows, LANES, 2, 2)))
        x0, x2 = tl.split(a)
        x1, x3 = tl.split(b)
        total = ((x0 + x1) + x2) + x3
    else:
        x0, x1 = tl.split(x)
        total = x0 + x1
    return folded(total, rows)


@triton.jit
def folded(x, rows: tl.constexpr):
    """The sum of each row of 16: its first half plus the second, until one is left."""
    x = halved(halved(halved(halved(x, rows, 8), rows, 4), rows, 2), rows, 1)
    return tl.reshape(x, (rows,))


@triton.jit
def halved(x, rows: tl.constexpr, half: tl.constexpr):
    """The first half of each row plus the second."""
    a, b = tl.split(tl.permute(tl.reshape(x, (rows, 2, half)), (0, 2, 1)))
    return a + b
