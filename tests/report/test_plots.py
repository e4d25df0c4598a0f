"""Charts are well-formed, hold finite coordinates inside their frame, and say in words what they draw."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from overhaul.report import plots


def drawn(figure: str) -> ElementTree.Element:
    element = ElementTree.fromstring(figure)
    for node in element.iter():
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
            if name in node.attrib:
                assert math.isfinite(float(node.attrib[name])), (node.tag, name)
    return element


def places(figure: ElementTree.Element) -> list[list[tuple[float, float]]]:
    lines = [node.attrib["points"] for node in figure.iter("polyline")]
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in line.split())] for line in lines]


def test_lines_rise_where_values_rise_and_stay_inside() -> None:
    (line,) = places(drawn(plots.lines("fit", {"loss": [3.0, 2.0, 2.5, 1.0]}, "loss")))
    heights = [y for _, y in line]
    assert heights[0] < heights[2] < heights[1] < heights[3]  # pixels count downwards
    assert all(0 <= x <= plots.WIDTH and 0 <= y <= plots.HEIGHT for x, y in line)


def test_the_last_point_of_a_line_stands_at_the_last_step() -> None:
    (line,) = places(drawn(plots.lines("fit", {"loss": [float(i) for i in range(100)]}, "loss")))
    assert len(line) == 100
    assert line[-1][0] == pytest.approx(plots.WIDTH - plots.RIGHT, abs=0.1)


def test_a_long_curve_is_thinned_to_means() -> None:
    points, bucket = plots.thin([1.0, 3.0] * 500, most=100)
    assert bucket == 10 and len(points) == 100
    assert {value for _, value in points} == {2.0}
    assert points[0][0] == 5.5
    assert "mean of 5 steps" in plots.lines("fit", {"loss": [1.0] * 1000}, "loss")


def test_a_short_curve_is_drawn_as_it_is() -> None:
    assert plots.thin([5.0, None, math.nan, 7.0]) == ([(1.0, 5.0), (4.0, 7.0)], 1)


@pytest.mark.parametrize("values", [[], [None], [math.nan, math.inf]])
def test_nothing_finite_draws_nothing(values: list[float | None]) -> None:
    assert plots.lines("fit", {"loss": values}, "loss") == ""
    assert plots.bars("fit", dict(enumerate(values)), "share") == ""


def test_one_point_is_a_dot() -> None:
    figure = drawn(plots.lines("fit", {"loss": [2.0]}, "loss"))
    assert len(list(figure.iter("circle"))) == 1


def test_each_curve_has_its_own_style_and_a_key() -> None:
    figure = drawn(plots.lines("fit", {name: [1.0, 2.0] for name in "abcd"}, "loss"))
    styles = [node.attrib["class"] for node in figure.iter("polyline")]
    assert len(set(styles)) == 4
    legend = next(node for node in figure.iter("div") if node.attrib["class"] == "legend")
    assert "".join(legend.itertext()) == "abcd"


def test_bars_start_at_zero_and_grow_with_their_value() -> None:
    figure = drawn(plots.bars("ssd", {-1: 1.0, 0: 2.0, 1: -1.0, 2: 0.0}, "share"))
    bars = list(figure.iter("rect"))
    top = [float(bar.attrib["y"]) for bar in bars]
    height = [float(bar.attrib["height"]) for bar in bars]
    assert height[1] == pytest.approx(2 * height[0], abs=0.2) and height[3] == 0
    assert top[0] + height[0] == pytest.approx(top[2], abs=0.2)  # a negative bar hangs from the zero line
    assert [next(bar.iter("title")).text for bar in bars][:2] == ["depth -1: 1", "depth 0: 2"]
    assert "in" in [node.text for node in figure.iter("text")]


def test_a_hundred_blocks_keep_their_labels_apart() -> None:
    figure = drawn(plots.bars("ssd", {depth: 1.0 for depth in range(100)}, "share"))
    numbers = [node.text for node in figure.iter("text") if node.text and re.fullmatch(r"\d\d?", node.text)]
    assert 5 <= len(numbers) <= 16


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.03), (1.7, 2.9), (-5, 5), (0, 1e-7), (0, 3e6), (99.99, 100.01)]
)
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = plots.ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    assert len({plots.tick_label(value) for value in found}) == len(found)
    assert all(len(plots.tick_label(value)) <= 8 for value in found)


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0, 5.0], [-2.0, -2.0], [1e-30, 2e-30], [1e30, 3e30]])
def test_any_range_can_be_drawn(values: list[float]) -> None:
    drawn(plots.lines("fit", {"loss": values}, "loss"))
    drawn(plots.bars("fit", dict(enumerate(values)), "loss"))


def test_text_is_escaped_and_said_in_words() -> None:
    figure = drawn(plots.lines("<b>&", {"<i>": [3.0, 1.0]}, "<u>"))
    (image,) = [node for node in figure.iter("svg") if node.attrib.get("role") == "img"]
    assert image.attrib["aria-label"] == "<b>&: <i> from 3 to 1"
    assert not list(figure.iter("i")) and not list(figure.iter("u"))
