"""The text of charts, as reviewed: `python tests/test_charts.py` updates it. And what holds for any numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import assert_inside, assert_readable, texts_in, tree_of

from steprule.lab.reporting.axes import Axis, Scale, log_ticks, plain_ticks, scale_of, tick_texts, value_text
from steprule.lab.reporting.charts import Point, Series, line_chart
from steprule.lab.reporting.rows import Bar, Interval, Row, bar_chart, interval_chart
from steprule.lab.reporting.svg import Drawing

GOLDEN = Path(__file__).parent / "golden" / "charts"
NAN = math.nan


def drawings() -> dict[str, Drawing]:
    """One drawing of each kind, with all that it can hold."""
    curve = [Point(step, 2 * 0.99**step, f"AdamW, step {step}") for step in range(0, 301, 100)]
    band = [(point.x, point.y * 0.9, point.y * 1.2) for point in curve]
    seeds = [[(point.x, point.y * share) for point in curve] for share in (0.9, 1.2)]
    training = [
        Series("AdamW", 0, curve, band=band, seeds=seeds),
        Series(
            "Lion", 1, [Point(step, 2.2 * 0.989**step, f"Lion, step {step}") for step in range(0, 301, 100)]
        ),
    ]
    trials = [
        Point(1e-4, 2.3, "lr 0.0001, the default", "ring"),
        Point(1e-3, 0.4, "lr 0.001, stopped", "faint"),
        Point(1e-2, 0.03, "lr 0.01, chosen", "full"),
        Point(1e-1, NAN, "lr 0.1, diverged"),
    ]
    rows = [
        Row("AdamW", 0, Interval(0.03, 0.025, 0.036, "AdamW: 0.03", [0.028, 0.033], ["seed 1", "seed 2"])),
        Row("SGD <3", 3, Interval(0.05, 0.04, 0.06, "SGD: 0.05", [0.045, math.inf], ["seed 1", "diverged"])),
    ]
    bars = [
        ("AdamW", [Bar(1.04, "1.04 ×", "AdamW", strong=True), Bar(4.4, "4.40 ×", "torch", 1)]),
        ("SGD", [Bar(0.8, "0.80 ×", "SGD")]),
    ]
    loss = Axis("loss (nats)", log=True)
    return {
        "training": line_chart(training, Axis("step"), loss, "Training"),
        "trials": line_chart(
            [Series("AdamW", 0, trials)], Axis("lr", log=True), loss, "Learning rates", "diverged"
        ),
        "intervals": interval_chart(rows, loss, "Final losses"),
        "bars": bar_chart(bars, Axis("÷ floor", log=True), "Steps", limit=(1.0, "floor")),
    }


@pytest.mark.parametrize("name", drawings())
def test_charts_are_drawn_as_reviewed(name: str) -> None:
    drawn = drawings()[name].alone()
    assert_readable(drawn)
    assert_inside(drawn)
    assert drawn == (GOLDEN / f"{name}.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.04, 2.5, [0.05, 0.1, 0.2, 0.5, 1, 2]),
        (0.9, 9, [1, 2, 5]),
        (1, 1e3, [1, 10, 100, 1000]),
        (1e-8, 3, [1e-8, 1e-6, 1e-4, 1e-2, 1]),
    ],
)
def test_ticks_of_a_logarithmic_axis(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 550, [0, 100, 200, 300, 400, 500]),
        (-0.03, 0.02, [-0.03, -0.02, -0.01, 0, 0.01, 0.02]),
        (1.2, 1.3, [1.2, 1.22, 1.24, 1.26, 1.28, 1.3]),
    ],
)
def test_ticks_of_a_linear_axis(low: float, high: float, ticks: list[float]) -> None:
    assert plain_ticks(low, high) == pytest.approx(ticks)


def test_ticks_are_written_in_one_form() -> None:
    assert tick_texts([0.001, 0.01, 0.1]) == ["0.001", "0.01", "0.1"]
    assert tick_texts([1e-6, 1e-4, 1e-2]) == ["10⁻⁶", "10⁻⁴", "10⁻²"]
    assert tick_texts([0, 2e9, -4e9]) == ["0", "2·10⁹", "-4·10⁹"]
    assert tick_texts([0, 20000, 40000]) == ["0", "20,000", "40,000"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0421, "0.0421"),
        (1.5, "1.50"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (0, "0"),
        (1e-7, "10⁻⁷"),
        (None, "–"),
        (NAN, "–"),
        (math.inf, "∞"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert value_text(value) == text


def test_a_scale_shows_everything_between_its_ends() -> None:
    scale = scale_of([0.01, 10, NAN, math.inf], Axis("loss", log=True), 100, 300)
    assert scale.log
    assert 100 < scale.place(0.01) < 115
    assert 285 < scale.place(10) < 300
    assert scale.place(0.1) - scale.place(0.01) == pytest.approx(scale.place(1) - scale.place(0.1))
    assert scale.place(1e9) == 300  # beyond the end
    assert not scale_of([0, 1], Axis("loss", log=True), 0, 1).log
    assert isinstance(scale_of([], Axis("x"), 0, 1), Scale)


def test_names_at_the_ends_of_lines_do_not_cover_each_other() -> None:
    same = [Series(f"optimizer {n}", n, [Point(0, 1 + n / 1000), Point(9, 1 + n / 1000)]) for n in range(8)]
    drawn = line_chart(same, Axis("step"), Axis("loss"), "loss").alone()
    assert_readable(drawn)
    assert [word.text for word in texts_in(drawn) if "optimizer" in word.text]


numbers = st.floats(allow_nan=True, allow_infinity=True)
axes = st.builds(Axis, st.just("axis"), log=st.booleans(), zero=st.booleans(), whole=st.booleans())


@given(st.lists(st.tuples(numbers, numbers), max_size=4), axes, axes)
def test_any_numbers_make_a_picture(places: list[tuple[float, float]], x: Axis, y: Axis) -> None:
    points = [Point(a, b, "a < b & c") for a, b in places if math.isfinite(a)]
    band = [(point.x, point.y, point.y) for point in points]
    drawn = line_chart([Series("<a>", 9, points, band=band), Series("b", 1, points)], x, y, "a & b", "diverged")
    assert_inside(drawn.alone())


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=4), numbers, axes)
def test_any_bars_and_intervals_make_a_picture(lengths: list[float], end: float, axis: Axis) -> None:
    bars = [(f"<{length}>", [Bar(length, "&", "says")]) for length in lengths]
    assert_inside(bar_chart(bars, axis, "bars", limit=(1.0, "one")).alone())
    rows = [Row("name", 0, Interval(length, length, end, "says", [end], ["note"])) for length in lengths]
    assert_inside(interval_chart(rows, axis, "rows").alone())


def test_a_picture_of_its_own_has_its_colours_as_such() -> None:
    drawn = drawings()["training"].alone()
    assert "var(" not in drawn  # not every program that shows pictures knows variables
    assert "#0072b2" in drawn
    assert tree_of(drawn).find("title") is not None


def write_golden() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, drawing in drawings().items():
        (GOLDEN / f"{name}.svg").write_text(drawing.alone(), encoding="utf-8")


if __name__ == "__main__":
    write_golden()
