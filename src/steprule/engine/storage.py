"""How values are stored between steps: state in fewer bits, and 16-bit parameters that lose nothing.

Every format can be recognized from the state alone, so a checkpoint says how to read it:

| state entry          | meaning                                                                             |
|----------------------|-------------------------------------------------------------------------------------|
| a slot in bf16, fp16 | the value, rounded to nearest even                                                  |
| `<key>_codes`, int8  | a small float with a sign, 4 bits of exponent and 3 of mantissa, times a power of   |
|                      | two that a block of neighbours shares: `<key>_scale`, uint8, has its exponent as    |
|                      | float32 has it, 255 where the block is not finite                                   |
| `<key>_codes`, uint8 | the same for slots that are never negative, with 5 bits of exponent; only 0 is 0    |
| `slot_rounding_key`  | codes and bf16 are rounded up or down at random, by a hash of this and the position |
| `compensation`       | what the parameter's 16 bits leave out, itself in 16 bits (Kahan)                   |
| `low_bits`           | the lower half of the parameter in fp32, as int16 in two bytes, which every backend |
|                      | of torch.distributed can send; the parameter holds the upper half                   |
| `rounding_key`       | the parameter is rounded up or down at random, by a hash of this and the position   |

Codes are small floats because the small elements of a block matter as much as its largest. Rounding is random
because a slow average moves by less than one code per step (0.999·v is v again in bf16), and because random
rounding has no bias. Neighbours and positions are those in the lines and blocks of the whole tensor (see
`blocks`), so that a shard has the scales and the noise of the whole. Codes have a key of their own, so that a
torch optimizer that loads them fails instead of using them as the slot.

The first rounding keys come only from the parameter's position among all parameters of the optimizer, not from
torch.manual_seed or the process, so that replicas in several processes stay equal. After that they are part of
the state and of checkpoints.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from steprule import errors, process_errors
from steprule.engine import blocks
from steprule.engine.blocks import Region
from steprule.engine.fields import HALF, Slot, parameter
from steprule.engine.sharding import parts
from steprule.engine.sharding.parts import region_in

SMALLEST = 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = (*DTYPES, "int8")
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int8: "int8"}
LOW_PRECISION = ("none", "stochastic", "kahan", "master")
# A code is what is above the low 20 bits of a float32 between CODE_0 and 1.875: 3 bits of mantissa below the
# last bits of the exponent. It represents that float minus CODE_0, so that code 0 is 0 and the smallest codes
# are evenly spaced.
MANTISSA = 20
CODES = {torch.int8: 128, torch.uint8: 256}
CODE_0 = {torch.int8: 2.0**-15, torch.uint8: 2.0**-31}
# The exponent bits of a float32, and what they are where it is not finite.
EXPONENT, NOT_FINITE = 23, 255
# How many neighbours in memory shared a scale, a float32, in older checkpoints.
OLDER_BLOCK = 256
# A block whose largest element is below this is stored as zeros.
TINIEST = 2.0**-120
# The scale of a block is the power of two below its largest element times this. All elements are then below
# 1.875 scales, where noise cannot carry past the highest code. It is a power of two so that an element that
# hardly changes keeps its code whatever its neighbours do, instead of being rounded again at every step.
HEADROOM = 16 / 15 * (1 + 2.0**-22)
# The bits of 1.0 and of infinity.
ONE, INFINITE = 0x3F800000, 0x7F800000
SLOT_KEY = "slot_rounding_key"
# Of the random numbers that a rule draws (see draws.py); it is kept as the other keys are.
NOISE_KEY = "noise_key"
# What `marks` puts under a slot's own key: the number of bits of its codes.
MARK = 8
# The state entry that each `low_precision` adds for a parameter.
BESIDE = {"kahan": "compensation", "master": "low_bits", "stochastic": "rounding_key"}
KEYS = ("rounding_key", SLOT_KEY, NOISE_KEY)
EXTRA_KEYS = (*BESIDE.values(), SLOT_KEY, NOISE_KEY)
GOLDEN = 0x9E3779B9
_UINT32 = 0xFFFFFFFF
TOO_SMALL = "fp16 has no value between 0 and 6e-8, and steps divide by this slot"


def named(asked: Any) -> Any:
    """What `state_dtype` asks for, with names in place of torch dtypes."""
    if isinstance(asked, Mapping):
        return {key: named(value) for key, value in cast(Mapping[str, Any], asked).items()}
    return _NAMES.get(asked, asked) if isinstance(asked, torch.dtype) else asked


def check(who: str, slots: dict[str, Slot], group: dict[str, Any], index: int | None) -> None:
    """Refuse storage that does not exist, or that would spoil a slot."""
    wanted = group.get("state_dtype")
    if wanted is not None and not isinstance(wanted, (str, dict)):
        allowed = f"one of {', '.join(KINDS)}, or a dict from slot to one of them"
        raise errors.wrong_type(who, "state_dtype", wanted, allowed, index)
    keys = {slot.key for slot in slots.values() if not slot.per_tensor}
    named = cast(dict[str, Any], wanted) if isinstance(wanted, dict) else {}
    for key in named:
        if key not in keys:
            raise errors.no_slot_to_store(who, key, keys, index)
    for slot in slots.values():
        kind = kind_of(slot, group)
        if kind not in (None, *KINDS):
            raise errors.out_of_range(who, "state_dtype", kind, f"one of {', '.join(KINDS)}", index)
        if slot.starts is parameter and named.get(slot.key, "fp32") != "fp32":
            reason = "it starts as a copy of the parameter, and small differences to it would be lost"
            raise errors.not_to_be_kept_so(who, slot.key, str(named[slot.key]), reason, "fp32", index)
        if slot.per in ("row", "column") and named.get(slot.key, "fp32") != "fp32":
            reason = f"it has only one value per {slot.per}, so that nothing would be saved"
            raise errors.not_to_be_kept_so(who, slot.key, str(named[slot.key]), reason, "fp32", index)
        if slot.per in ("left", "right") and named.get(slot.key, "fp32") != "fp32":
            # Of random products, 5,000 came to a tenth of their sum in bf16, averages with β = 0.999 to half.
            reason = "products of matrices are summed up in it, and in bf16 a sum stops growing after some 500"
            raise errors.not_to_be_kept_so(who, slot.key, str(named[slot.key]), reason, "fp32", index)
        if kind == "int8" and slot.not_in_8_bits is not None:
            raise errors.not_to_be_kept_so(who, slot.key, kind, slot.not_in_8_bits, "bf16", index)
        if kind == "fp16" and slot.never_negative:
            raise errors.not_to_be_kept_so(who, slot.key, kind, TOO_SMALL, "bf16", index)
    for pair in (slot for slot in slots.values() if slot.subtracted_from and slot.exists(group)):
        for slot in slots.values():
            kind = kind_of(slot, group)
            if slot.key in (pair.key, pair.subtracted_from) and kind not in (None, "fp32"):
                reason = f"'{pair.key}' is subtracted from '{pair.subtracted_from}', which may become negative"
                raise errors.not_to_be_kept_so(who, slot.key, kind, reason, "fp32", index)
    low = group.get("low_precision")
    if low is not None and low not in LOW_PRECISION:
        allowed = "one of " + ", ".join(LOW_PRECISION)
        raise errors.out_of_range(who, "low_precision", low, allowed, index)
    if group.get("differentiable"):
        kinds = {kind_of(slot, group) for slot in slots.values()}
        rounding = [f"state_dtype='{kind}'" for kind in ("int8", "bf16") if kind in kinds]
        rounding += [f"low_precision='{low}'"] if low not in (None, "none") else []
        if rounding:
            raise errors.rounding_has_no_tape(who, rounding[0], index)


def check_parameters(who: str, slots: dict[str, Slot], group: dict[str, Any], index: int) -> None:
    """Refuse parameters that cannot be stored in this way."""
    if any(kind_of(slot, group) == "int8" for slot in slots.values()):
        names: list[str] = group.get("param_names") or []
        for place, param in enumerate(group["params"]):
            if (cut := cut_block(param)) is not None:
                name = f"'{names[place]}'" if names else f"parameter {place}"
                raise process_errors.codes_in_parts(who, name, cut, index)
    if group.get("low_precision") in ("stochastic", "master"):
        for place, param in enumerate(group["params"]):
            if param.dtype == torch.float16:
                raise errors.only_bfloat16(who, group["low_precision"], f"parameter {place}", index)


def cut_block(param: Any) -> tuple[int, int] | None:
    """Whether processes share a block of codes: which one has a part of it, and how long the block is.

    All processes come to the same.
    """
    if not parts.sharded(param) or param.numel() < SMALLEST:
        return None
    shape, mesh = tuple(param.shape), param.device_mesh
    at = _cut_at(shape, tuple(param.placements), tuple(mesh.shape))
    return None if at is None else (int(mesh.mesh[at]), blocks.layout(shape).block)


@cache
def _cut_at(
    shape: tuple[int, ...], placements: tuple[Any, ...], mesh: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Where in a mesh a process has a part of a block."""
    own = blocks.layout(shape)
    for at in product(*map(range, mesh)):
        if blocks.cuts(own, parts.region_at(shape, placements, mesh, at)):
            return at
    return None


def kind_of(slot: Slot, group: dict[str, Any]) -> str | None:
    """What `state_dtype` asks for this slot; None is the parameter's own dtype."""
    wanted: Any = group.get("state_dtype")
    if not slot.has_elements or slot.starts is parameter:
        return None
    kind = named(cast(dict[str, str], wanted).get(slot.key) if isinstance(wanted, dict) else wanted)
    # What has one value per row or column is small, and is never kept in fewer bits than the parameter.
    return kind if slot.per == "element" or kind == "fp32" else None


def kind_for(slot: Slot, param: Tensor, group: dict[str, Any]) -> str | None:
    """The same for one parameter, or None if it has no effect: 8 bits are not worth it for small tensors."""
    kind = None if param.is_complex() else kind_of(slot, group)
    return None if kind == "int8" and param.numel() < SMALLEST else kind


def dtype_for(slot: Slot, param: Tensor, kind: str | None) -> torch.dtype:
    """The dtype of a slot, or of its codes."""
    if kind == "int8":
        return torch.uint8 if slot.never_negative else torch.int8
    return DTYPES.get(kind or "") or slot.dtype_for(param)


def create(slot: Slot, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The initial state entries of a slot."""
    kind = kind_for(slot, param, group)
    start = slot.create(param, group, torch.float32 if kind == "int8" else DTYPES.get(kind or ""))
    if start is None:
        return {}
    return _codes(slot, start) if kind == "int8" else {slot.key: start}


def _codes(slot: Slot, value: Tensor) -> dict[str, Tensor]:
    """The entries of a slot in 8-bit codes, rounded to nearest."""
    codes = torch.empty_like(value, dtype=torch.uint8 if slot.never_negative else torch.int8)
    own, region, here = blocks.layout(value.shape), parts.region_of(value), parts.local(value)
    scale = here.new_empty(blocks.scales_of(own, region).shape, dtype=torch.uint8)
    _encode(here, here.new_full((), 1 << (MANTISSA - 1), dtype=torch.int32), parts.local(codes), scale, region)
    return {f"{slot.key}_codes": codes, f"{slot.key}_scale": parts.like(value, scale, own.scales)}


def recode(state: dict[str, Any], slot: Slot, dtype: torch.dtype) -> None:
    """Store a slot in this dtype from now on, rounded to nearest. An integer dtype means codes."""
    stored: Tensor = state[entry_of(state, slot.key)]
    into = torch.float32 if dtype in CODES else dtype
    value = torch.empty_like(stored, dtype=into).copy_(load(state, slot.key))
    for key in (slot.key, f"{slot.key}_codes", f"{slot.key}_scale"):
        state.pop(key, None)
    state.update(_codes(slot, value) if dtype in CODES else {slot.key: value})


def rounds_slots(state: dict[str, Any], group: Mapping[str, Any]) -> bool:
    """Whether the group asks for slots that are rounded at random, and the state has any."""
    asked: Any = group.get("state_dtype")
    kinds: set[Any] = set(cast(dict[str, str], asked).values()) if isinstance(asked, dict) else {asked}
    return bool(kinds & {"int8", "bf16"} and rounded_at_random(state | {SLOT_KEY: None}))


def beside_parameter(param: Tensor, group: Mapping[str, Any]) -> str | None:
    """The key of the entry that `low_precision` adds for this parameter, or None."""
    return BESIDE.get(group.get("low_precision") or "") if param.dtype in HALF else None


def create_for_parameter(
    param: Tensor, group: dict[str, Any], state: dict[str, Any], place: int
) -> dict[str, Tensor]:
    """The state entries that a parameter needs besides its rule's slots.

    place: its position among all parameters of the optimizer. The first rounding keys are made from it, so that
    no two parameters share their noise and all processes that train copies of a model round the same way.
    After that the keys are in the state.
    """
    beside = beside_parameter(param, group)
    key = mix(GOLDEN + place)
    entries: dict[str, Tensor] = {}
    if SLOT_KEY not in state and rounds_slots(state, group):
        entries[SLOT_KEY] = torch.tensor(key, device="cpu")
    if beside is None or beside in state:
        return entries
    if beside == "rounding_key":
        return entries | {beside: torch.tensor(mix(key ^ GOLDEN), device="cpu")}
    dtype = param.dtype if beside == "compensation" else torch.int16
    zeros = torch.zeros_like(parts.local(param), dtype=dtype, memory_format=torch.preserve_format)
    more = [] if beside == "compensation" else [2]
    return entries | {beside: parts.like(param, in_bytes(zeros) if more else zeros, (*param.shape, *more))}


def keeps_more(state: Mapping[str, Any]) -> bool:
    """Whether the state has entries that torch's own operations would ignore."""
    return any(key in state for key in EXTRA_KEYS if key != NOISE_KEY)


# Slots


def entry_of(state: Mapping[str, Any], key: str) -> str:
    """The key of the state entry that holds a slot: its own, or that of its codes."""
    return key if key in state or f"{key}_codes" not in state else f"{key}_codes"


def codes_apart(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a saved state, with codes under a key of their own.

    Older checkpoints have the codes under the slot's key; newer ones may have `MARK` there.
    """
    entries: dict[str, Any] = {}
    for key, value in saved.items():
        if f"{key}_scale" in saved and isinstance(value, Tensor) and value.dtype in CODES:
            entries[f"{key}_codes"] = value
        elif f"{key}_codes" not in saved or isinstance(value, Tensor):
            entries[key] = value
    return entries


def is_older(state: Mapping[str, Any], key: str) -> bool:
    """Whether a slot is in codes of an older form, with a float32 for each 256 neighbours in memory."""
    scale: Any = state.get(f"{key}_scale")
    return isinstance(scale, Tensor) and scale.dtype == torch.float32


def older_scales(param: Tensor) -> tuple[int, ...]:
    """The shape of the scales of a slot in that form."""
    return (-(-param.numel() // OLDER_BLOCK),)


def marks(state: Mapping[str, Any], slots: Iterable[Slot]) -> dict[str, int]:
    """Entries for the keys of slots in codes, so that torch does not take a missing slot for a first step.

    torch's SGD and Muon create a momentum buffer that is missing. With a number in its place they fail.
    """
    return {slot.key: MARK for slot in slots if f"{slot.key}_codes" in state}


def holds(state: Mapping[str, Any], key: str) -> bool:
    """Whether the state has this slot, as elements or as codes."""
    return key in state or f"{key}_codes" in state


def load(state: Mapping[str, Any], key: str) -> Tensor:
    """A slot's elements in the floating dtype they are stored in; codes are decoded to float32."""
    stored: Tensor = state[entry_of(state, key)]
    if stored.dtype not in CODES:
        return stored
    zero, scale = CODE_0[stored.dtype], state[f"{key}_scale"]
    older, region = is_older(state, key), region_in(state) or blocks.whole(stored.shape)
    block, width = (OLDER_BLOCK, stored.numel()) if older else _block_and_width(region)
    code = _in_blocks(stored.to(torch.int32), block, width)
    bits = ((code & (CODES[stored.dtype] - 1)) << MANTISSA) + bits_of(zero)
    size = bits.view(torch.float32) - zero
    value = torch.where(code < 0, -size, size) * (scale if older else powers(scale)).reshape(-1, 1)
    return _out_of_blocks(value, width, stored.shape)


def store(state: dict[str, Any], key: str, value: Tensor, among: Collection[str] | None = None) -> None:
    """Store the elements of a slot, rounded once to its format.

    among: the keys of the slots of this step, by which random rounding tells them apart; all if it is None.
    """
    stored: Tensor = state[entry_of(state, key)]
    if stored.dtype in CODES:
        region = region_in(state) or blocks.whole(stored.shape)
        noise = noise_for(_key_of(state, key, among), stored, region)
        _encode(value.float(), noise >> (32 - MANTISSA), stored, state[f"{key}_scale"], region)
    elif stored.dtype == torch.bfloat16 and SLOT_KEY in state:
        key_of_slot = _key_of(state, key, among)
        noise = noise_for(key_of_slot, stored, _region_of_slot(stored, region_in(state)))
        parts.local(stored).copy_(_to_bfloat16(parts.local(value).float(), noise >> 16))
    else:
        stored.copy_(value)


def rounded_at_random(state: dict[str, Any]) -> list[str]:
    """The keys of the slots that are rounded at random."""
    if SLOT_KEY not in state:
        return []
    slots = {key: x for key, x in state.items() if isinstance(x, Tensor) and key not in EXTRA_KEYS}
    rounded = (key for key, x in slots.items() if x.dtype == torch.bfloat16 or key.endswith("_codes"))
    return sorted(key.removesuffix("_codes") for key in rounded)


def _key_of(state: dict[str, Any], key: str, among: Collection[str] | None) -> int:
    """The rounding key of a slot."""
    rounded = [x for x in rounded_at_random(state) if among is None or x in among]
    return int(state[SLOT_KEY]) ^ salt_of(rounded.index(key))


def _region_of_slot(stored: Tensor, region: Region | None) -> Region | None:
    """Which part of a whole slot this is; a slot per row or column is cut where the parameter is."""
    if region is None or parts.sharded(stored) or stored.shape == region.shape:
        return region
    cut = zip(stored.shape, *region, strict=True)
    sizes = [(size, here, first) if own == here else (own, own, 0) for own, size, here, first in cut]
    return Region(*zip(*sizes, strict=True))


def salt_of(place: int) -> int:
    """The part of the key that gives each of a parameter's slots its own noise."""
    return place * GOLDEN & _UINT32


def noise_for(key: int, like: Tensor, region: Region | None = None) -> Tensor:
    """32 bits for each element: equal steps of the golden ratio, from a random start in each block.

    region: which part of a whole tensor it is, row by row; without it all, as it lies in memory, or what a
    DTensor has here.
    """
    order = None if region is not None or parts.sharded(like) else blocks.order(like)
    if order is not None:
        return noise_for(key, like.permute(order)).permute([order.index(d) for d in range(like.dim())])
    region = parts.region_of(like) if region is None else region
    block, place = blocks.places(blocks.layout(region.whole), region, like.device)
    return (mix(block ^ key) + place * GOLDEN) & _UINT32


def next_keys(state: dict[str, Any]) -> None:
    """Set the keys of the next step."""
    for key in KEYS:
        if key in state:
            state[key].fill_(next_key(key, int(state[key])))


def next_key(name: str, key: Any) -> Any:
    """The key of the step after this one; for ints and int64 tensors."""
    return key + 1 if name == NOISE_KEY else mix(key + 1)


def _encode(value: Tensor, noise: Tensor, codes: Tensor, scale: Tensor, region: Region) -> None:
    """Write the codes and scales of float32 elements, which are this region of the parameter."""
    zero = CODE_0[codes.dtype]
    block, width = _block_and_width(region)
    found = _in_blocks(value, block, width)
    largest = found.abs().amax(dim=1)
    exponent = (largest * HEADROOM).view(torch.int32) & INFINITE
    exponent = torch.where(largest < TINIEST, 0, exponent)
    # If an element is NaN or infinite, the whole block becomes NaN.
    exponent = torch.where(largest.isfinite(), exponent, INFINITE)
    scale.copy_((exponent >> EXPONENT).to(torch.uint8).reshape(scale.shape))
    inverse = torch.where(exponent > 0, 2 * ONE - exponent, 0).view(torch.float32)
    size = found.abs() * inverse[:, None] + zero
    up = _in_blocks(noise.to(torch.int32).expand(value.shape), block, width)
    code = (size.view(torch.int32) + up) >> MANTISSA
    if codes.dtype == torch.uint8:
        # If a second moment became 0 while its mean did not, the step would be infinite.
        code = torch.where(found > 0, code.clamp(min=(bits_of(zero) >> MANTISSA) + 1), code)
    code &= CODES[codes.dtype] - 1
    if codes.dtype == torch.int8:
        code |= found.view(torch.int32) >> 31 << 7
    codes.copy_(_out_of_blocks(code, width, codes.shape).to(codes.dtype))


def powers(scale: Tensor) -> Tensor:
    """The powers of two with these exponents; NaN where a block is not finite."""
    found = (scale.to(torch.int32) << EXPONENT).view(torch.float32)
    return torch.where(scale == NOT_FINITE, torch.nan, found)


def bits_of(x: float) -> int:
    """The bits of a number as a float32."""
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    return bits


def _block_and_width(region: Region) -> tuple[int, int]:
    """How long the blocks of a region are, which cuts none, and how much of a line it has."""
    own = blocks.layout(region.whole)
    part = blocks.part_of(own, region)
    if part is None or blocks.cuts(own, region):
        raise AssertionError("8-bit codes are never in part of a block")
    return own.block, part.width


def _in_blocks(x: Tensor, block: int, width: int) -> Tensor:
    """The blocks of lines of this width, each in a row; the last one of a line is padded with zeros."""
    lines = x.reshape(-1, max(1, width))
    return torch.nn.functional.pad(lines, (0, -width % block)).reshape(-1, block)


def _out_of_blocks(rows: Tensor, width: int, shape: torch.Size) -> Tensor:
    """What `_in_blocks` was given."""
    per_line = -(-width // rows.shape[1]) * rows.shape[1]
    return rows.reshape(-1, max(1, per_line))[:, :width].reshape(shape)


# 16-bit parameters


def load_parameter(param: Tensor, state: dict[str, Any]) -> Tensor:
    """The parameter; a 16-bit one in float32, together with what its 16 bits leave out.

    That goes for one that had 16 bits until now, too.
    """
    wide = param.float() if param.dtype in HALF else param
    if "compensation" in state:
        return wide + state["compensation"].to(wide.dtype)
    if "low_bits" in state:
        upper, lower = parts.local(wide).float(), of_bytes(parts.local(state["low_bits"]))
        bits = upper.contiguous().view(torch.int32) + lower.to(torch.int32)
        return parts.like(param, bits.view(torch.float32), param.shape)
    return wide


def restore_parameter(param: Tensor, state: dict[str, Any], before: dict[str, Any]) -> None:
    """Store the parameter as its state asks for now. before: the entries that it was stored with."""
    with torch.no_grad():
        value = load_parameter(param, before)
        if param.dtype in HALF:
            store_parameter(param, state, value)
        else:
            param.copy_(value)


def in_bytes(x: Tensor) -> Tensor:
    """The same memory of 16-bit numbers as bytes, in one dimension more."""
    return x.unsqueeze(-1).view(torch.uint8)


def of_bytes(x: Tensor) -> Tensor:
    """The same memory of `in_bytes` as 16-bit numbers."""
    return x.view(torch.int16).squeeze(-1)


def store_parameter(param: Tensor, state: dict[str, Any], value: Tensor) -> None:
    """Store the parameter in its 16 bits, and what they leave out in the state."""
    if "rounding_key" in state:
        noise = noise_for(int(state["rounding_key"]), param, region_in(state)) >> 16
        parts.local(param).copy_(_to_bfloat16(parts.local(value), noise))
    elif "low_bits" in state:
        bits = parts.local(value).contiguous().view(torch.int32)
        # Round half up, not to even: the lower half must fit into 16 bits with a sign.
        upper = (bits + 0x8000) >> 16
        of_bytes(parts.local(state["low_bits"])).copy_((bits - (upper << 16)).to(torch.int16))
        parts.local(param).copy_((upper << 16).view(torch.float32))
    else:
        param.copy_(value)
        if "compensation" in state:
            left_out = value - param.float()
            state["compensation"].copy_(torch.where(left_out.isfinite(), left_out, 0.0))


def _to_bfloat16(value: Tensor, noise: Tensor) -> Tensor:
    """Float32 values, rounded up or down to bfloat16 values by 16 bits of noise."""
    bits = value.contiguous().view(torch.int32) + noise.to(torch.int32)
    return torch.where(value.isfinite(), (bits & -0x10000).view(torch.float32), value)


def mix(x: Any) -> Any:
    """32 bits, well mixed (lowbias32, Wellons 2018); for ints and int64 tensors."""
    x = x & _UINT32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _UINT32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _UINT32
    return x ^ (x >> 16)
