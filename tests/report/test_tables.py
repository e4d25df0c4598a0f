"""Tables, heat maps and points of the steps: complete, aligned with their names, and plain about what is missing."""

from __future__ import annotations

import io
import itertools
import math
import re
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from made_up import language_report, step
from overhaul.outcome import Table
from overhaul.report import tables
from overhaul.report.heat import MOST, heat
from overhaul.report.html import render
from overhaul.report.terminal import print_table


def cells(figure: str) -> list[ElementTree.Element]:
    """The cells with a title, in the order of the values."""
    return [node for node in ElementTree.fromstring(figure).iter("rect") if node.find("title") is not None]


def opacity(figure: str) -> list[float]:
    return [float(cell.attrib["fill-opacity"]) for cell in cells(figure)]


def drawn(values: Any, unit: str = "") -> str:
    return heat("title", values, range(len(values)), range(len(values[0])), "row", "column", unit)


def test_a_cell_says_where_it_stands_and_what_it_holds() -> None:
    figure = heat("t", [[0.25, 0.5], [0.75, None]], ["a", "b"], ["x", "y"], "part", "stage", "share")
    titles = [cell.findtext("title") for cell in cells(figure)]
    assert titles == ["a, x: 25.0%", "a, y: 50.0%", "b, x: 75.0%", "b, y: no value"]
    assert "grey: no value" in figure and figure.count('class="struck"') == 1
    assert ">part<" in figure and ">stage<" in figure and ">share<" in figure


def test_values_of_one_sign_darken_as_they_rise_and_those_of_both_are_held_against_zero() -> None:
    assert opacity(drawn([[1.0, 2.0, 4.0]])) == pytest.approx([0.06, 0.06 + 0.94 / 3, 1.0], abs=1e-3)
    figure = drawn([[-4.0, 0.0, 2.0]])
    assert [cell.attrib["class"] for cell in cells(figure)] == ["warm", "cold", "cold"]
    assert opacity(figure) == pytest.approx([1.0, 0.0, 0.5])


def test_the_colour_bar_is_labelled_at_its_ends_and_its_middle() -> None:
    texts = [node.text for node in ElementTree.fromstring(drawn([[1.0, 3.0]], "ms")).iter("text")]
    assert [text for text in texts if text and text.endswith(" ms")] == ["3.00 ms", "2.00 ms", "1.00 ms"]
    # where there are both signs, 0 is in the middle
    texts = [node.text for node in ElementTree.fromstring(drawn([[-1.0, 4.0]])).iter("text")]
    assert texts[-3:] == ["4", "0", "−4"]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (8, 8), (32, 80), (3, 500), (300, 2)])
def test_cells_fill_the_canvas_and_stay_inside(rows: int, columns: int) -> None:
    figure = drawn([[math.sin(i + j) for j in range(columns)] for i in range(rows)])
    element = ElementTree.fromstring(figure)
    _, _, width, height = map(float, element.find("svg").attrib["viewBox"].split())  # pyright: ignore[reportOptionalMemberAccess]
    assert len(cells(figure)) <= MOST**2
    for node in element.iter("rect"):
        x, y, w, h = (float(node.attrib[name]) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width + 1 and 0 <= y <= y + h <= height + 1
    assert len({(cell.attrib["x"], cell.attrib["y"]) for cell in cells(figure)}) == len(cells(figure))


def test_names_never_lie_on_each_other() -> None:
    names = [f"attention.block_{n}" for n in range(40)]
    figure = ElementTree.fromstring(heat("t", [[1.0] * 40] * 40, names, names, "row", "column", ""))
    texts = [node for node in figure.iter("text") if (node.text or "").startswith("attention")]
    side = [float(node.attrib["y"]) for node in texts if "transform" not in node.attrib]
    feet = [float(node.attrib["x"]) for node in texts if "transform" in node.attrib]
    assert min(b - a for a, b in itertools.pairwise(side)) >= 11
    assert min(b - a for a, b in itertools.pairwise(feet)) >= 11


def test_many_values_are_drawn_as_means() -> None:
    figure = drawn([[float(j)] * 2 for j in range(2 * MOST)])
    assert "mean of up to 2" in figure
    assert cells(figure)[0].findtext("title") == "0, 0: 0.5"


def test_nothing_finite_draws_nothing() -> None:
    assert drawn([[None, math.nan]]) == ""


def test_the_page_holds_every_table_and_product() -> None:
    page = render(language_report())
    for title in ("effect on later blocks", "logit lens", "accuracy by task", "candidates", "criteria"):
        assert title in page
    text = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"0-1-2-4\s+1.235\s+6\s+yes", text)
    assert "kept: 1,204 rows" in text and "made/kept.jsonl" in text
    assert "adapter: checkpoint" in text
    assert "What the steps found" not in render({**language_report(), "steps": [step("a.b")]})


def test_a_long_table_is_cut_and_says_so() -> None:
    table = asdict(Table(("n",), tuple((n,) for n in range(tables.MOST_ROWS + 5))))
    (found,) = tables.findings([step("a.b", tables={"long": table})])
    assert len(found.rows) == tables.MOST_ROWS and found.left_out == 5


def test_the_terminal_shows_the_small_tables_and_counts_the_others() -> None:
    raw = io.StringIO()
    print_table(language_report(), Console(file=raw, width=100, color_system=None))
    text = raw.getvalue()
    assert re.search(r"0-1-2-4\s+1.235\s+6\s+yes", text) and re.search(r"wanda\s+0.5\s+0.9", text)
    assert "3 tables and figures are on the page." in text
    assert "shrink.drop_layers left kept: 1,204 rows (made/kept.jsonl)" in text


def test_a_terminal_leaves_long_cells_to_the_page() -> None:
    short, long = (asdict(Table(("pattern",), (("1, " * n,),))) for n in (20, 21))
    assert tables.small(short) and not tables.small(long)


def test_steps_of_one_method_are_told_apart_by_their_place() -> None:
    names = [step["name"] for step in tables.told_apart([{"name": name} for name in ("a.b", "c.d", "a.b")])]
    assert names == ["a.b, step 1", "c.d", "a.b, step 3"]
