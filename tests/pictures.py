"""Reads SVG text as a picture: where its texts are, and what lies within it."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass

# A typical letter's share of the font's size, less generous than what charts leave room for.
LETTER = 0.55
NUMBER = re.compile(r"-?\d+\.?\d*")


@dataclass(frozen=True)
class Words:
    """A text and the box that it takes."""

    text: str
    left: float
    right: float
    top: float
    bottom: float

    def covers(self, other: Words) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def tree_of(svg: str) -> ET.Element:
    """The picture as elements, without the names of namespaces."""
    return ET.fromstring(re.sub(r' xmlns="[^"]*"', "", svg, count=1))


def texts_in(svg: str) -> list[Words]:
    """All texts, moved by the groups that they are in."""
    return [*_texts(tree_of(svg), 0.0, 0.0)]


def _texts(parent: ET.Element, x: float, y: float) -> Iterator[Words]:
    for child in parent:
        dx, dy = x, y
        if "transform" in child.attrib:
            moved = [float(number) for number in NUMBER.findall(child.attrib["transform"])]
            dx, dy = x + moved[0], y + moved[1]
        if child.tag == "text":
            size = 15 if child.get("class") == "title" else 12
            width = size * LETTER * len(child.text or "")
            left = dx + float(child.attrib["x"])
            left -= {"middle": width / 2, "end": width}.get(child.get("text-anchor", ""), 0.0)
            base = dy + float(child.attrib["y"])
            yield Words(child.text or "", left, left + width, base - 0.75 * size, base + 0.2 * size)
        yield from _texts(child, dx, dy)


def assert_readable(svg: str) -> None:
    """No text covers another, and all of them are inside of the picture."""
    root = tree_of(svg)
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    texts = texts_in(svg)
    for one, other in itertools.combinations(texts, 2):
        assert not one.covers(other), (one, other)
    for one in texts:
        assert one.left >= 0, one
        assert one.right <= width, one
        assert one.top >= 0, one
        assert one.bottom <= height, one


def assert_inside(svg: str) -> None:
    """All that is drawn has finite coordinates inside of the picture."""
    root = tree_of(svg)
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    for child in root.iter():
        for name in ("x", "y", "cx", "cy", "width", "height"):
            if name in child.attrib:
                value = float(child.attrib[name])
                assert math.isfinite(value), child.attrib
                assert -12 <= value <= max(width, height) + 1, child.attrib
        # A legend's samples are relative to their places.
        if child.get("class") in ("line", "band", "seed") and "h" not in child.get("d", "h"):
            numbers = [float(number) for number in NUMBER.findall(child.attrib["d"])]
            assert all(-1 <= x <= width + 1 for x in numbers[::2])
            assert all(-1 <= y <= height + 1 for y in numbers[1::2])
