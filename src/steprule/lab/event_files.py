"""TensorBoard's event files: numbers by name, step and time, written and read without TensorBoard."""

from __future__ import annotations

import math
import struct
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from steprule.lab.errors import LabError

__all__ = ["Scalar", "begin_events", "event_of", "read_events", "record_of"]

# CRC-32C (Castagnoli), as the format asks for; zlib has another one.
POLYNOMIAL = 0x82F63B78
VERSION = b"brain.Event:2"
MASK, LIMIT = 0xA282EAD8, 0xFFFFFFFF
HEADER = struct.Struct("<Q")
CHECK = struct.Struct("<I")
LARGEST = 1 << 28
# Wire types of protobuf: a number in groups of seven bits, eight bytes, a length and so many bytes, four bytes.
GROUPS, EIGHT, BYTES, FOUR = 0, 1, 2, 5
# The numbers of the fields of Event, of Summary.Value and of TensorProto that are used.
WALL_TIME, STEP, FILE_VERSION, SUMMARY = 1, 2, 3, 5
TAG, SIMPLE_VALUE, TENSOR = 1, 2, 8
DTYPE, CONTENT, FLOATS, DOUBLES = 1, 4, 5, 6
FLOAT_TYPE, DOUBLE_TYPE = 1, 2


@dataclass(frozen=True)
class Scalar:
    """One number of an event file; seconds since 1970."""

    tag: str
    step: int
    seconds: float
    value: float


def _table() -> tuple[int, ...]:
    values: list[int] = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
        values.append(value)
    return tuple(values)


TABLE = _table()


def _masked_crc(data: bytes) -> int:
    crc = LIMIT
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= LIMIT
    return ((crc >> 15 | crc << 17) + MASK) & LIMIT


def record_of(data: bytes) -> bytes:
    """The bytes of a record: its length and its data, each with a checksum."""
    length = HEADER.pack(len(data))
    return length + CHECK.pack(_masked_crc(length)) + data + CHECK.pack(_masked_crc(data))


def begin_events(seconds: float) -> bytes:
    """What an event file begins with. seconds: since 1970."""
    return record_of(_eight(WALL_TIME, seconds) + _bytes(FILE_VERSION, VERSION))


def event_of(step: int, seconds: float, numbers: Mapping[str, float]) -> bytes:
    """The record of one step's numbers by name. seconds: since 1970."""
    values = b"".join(
        _bytes(1, _bytes(TAG, tag.encode()) + _four(SIMPLE_VALUE, value)) for tag, value in numbers.items()
    )
    return record_of(
        _eight(WALL_TIME, seconds) + _key(STEP, GROUPS) + _groups(step % (1 << 64)) + _bytes(SUMMARY, values)
    )


def _groups(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _key(field: int, kind: int) -> bytes:
    return _groups(field << 3 | kind)


def _bytes(field: int, data: bytes) -> bytes:
    return _key(field, BYTES) + _groups(len(data)) + data


def _eight(field: int, value: float) -> bytes:
    return _key(field, EIGHT) + struct.pack("<d", value)


def _four(field: int, value: float) -> bytes:
    try:
        return _key(field, FOUR) + struct.pack("<f", value)
    except OverflowError:  # larger than any float of 32 bits
        return _key(field, FOUR) + struct.pack("<f", math.copysign(math.inf, value))


def read_events(file: Path) -> list[Scalar]:
    """All numbers of an event file, in its order; a record that is not finished yet is left out.

    Raises `LabError` if it cannot be read or is damaged.
    """
    found: list[Scalar] = []
    try:
        with open(file, "rb") as stream:
            for data in _records(stream, file):
                found += _scalars(data)
    except OSError as error:
        raise LabError(f"cannot read {file}: {error.strerror}.") from error
    except (ValueError, IndexError, struct.error) as error:
        raise LabError(f"{file} is damaged or not a TensorBoard event file.") from error
    return found


def _records(stream: IO[bytes], file: Path) -> Generator[bytes]:
    while len(head := stream.read(12)) == 12:
        (length,) = HEADER.unpack(head[:8])
        if CHECK.unpack(head[8:])[0] != _masked_crc(head[:8]) or length > LARGEST:
            raise LabError(f"{file} is damaged or not a TensorBoard event file.")
        data, check = stream.read(length), stream.read(4)
        if len(data) < length or len(check) < 4:
            return
        # Pictures and graphs can be large; only what is read needs to be right.
        if length < 1 << 16 and CHECK.unpack(check)[0] != _masked_crc(data):
            raise LabError(f"{file} is damaged: a record is not what was written.")
        yield data


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: number and value, as a whole number or as bytes."""
    at = 0
    while at < len(data):
        key, at = _read_groups(data, at)
        kind = key & 7
        if kind == GROUPS:
            value, at = _read_groups(data, at)
            yield key >> 3, value
            continue
        if kind == BYTES:
            length, at = _read_groups(data, at)
        elif kind in (EIGHT, FOUR):
            length = 8 if kind == EIGHT else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > len(data):
            raise ValueError("a field is longer than its message")
        yield key >> 3, data[at : at + length]
        at += length


def _read_groups(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _scalars(data: bytes) -> Iterator[Scalar]:
    step, seconds, summaries = 0, 0.0, list[bytes]()
    for field, value in _fields(data):
        if field == STEP and isinstance(value, int):
            step = value - (1 << 64) if value >> 63 else value
        elif field == WALL_TIME and isinstance(value, bytes):
            (seconds,) = struct.unpack("<d", value)
        elif field == SUMMARY and isinstance(value, bytes):
            summaries.append(value)
    for summary in summaries:
        for field, value in _fields(summary):
            if field == 1 and isinstance(value, bytes):
                tag, number = _tag_and_number(value)
                if number is not None:
                    yield Scalar(tag, step, seconds, number)


def _tag_and_number(data: bytes) -> tuple[str, float | None]:
    tag, number = "", None
    for field, value in _fields(data):
        if isinstance(value, int):
            continue
        if field == TAG:
            tag = value.decode(errors="replace")
        elif field == SIMPLE_VALUE:
            (number,) = struct.unpack("<f", value)
        elif field == TENSOR:
            number = _number_of_tensor(value)
    return tag, number


def _number_of_tensor(data: bytes) -> float | None:
    """The number in a tensor of one element, as newer writers store scalars; None for anything else."""
    kind, number = 0, None
    for field, value in _fields(data):
        if field == DTYPE and isinstance(value, int):
            kind = value
        elif isinstance(value, bytes) and field in (CONTENT, FLOATS, DOUBLES):
            single = kind == FLOAT_TYPE and len(value) == 4
            double = kind == DOUBLE_TYPE and len(value) == 8
            if single or double:
                (number,) = struct.unpack("<f" if single else "<d", value)
    return number
