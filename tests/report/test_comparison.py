"""A comparison says who won, beyond seeds and noise, and draws no difference where there is none."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from overhaul.quoting import code, escaped
from overhaul.report import plots
from overhaul.report.comparison import Comparison, Kind, Row
from overhaul.report.sheets import Cell, Sheet, markdown

MEASURES: list[dict[str, Any]] = [
    {"group": "forgotten", "metric": "rouge", "label": "ROUGE", "on": "forget", "unit": "share", "better": "up",
     "wanted": "down", "n": 20},
    {"group": "kept", "metric": "accuracy", "label": "accuracy", "on": "retain", "unit": "share", "better": "up",
     "wanted": "same", "n": 80},
]  # fmt: skip


def compared(**rows: Any) -> Comparison:
    kinds: dict[str, Kind] = {"before": "before", "noise": "null control"}
    start = Row("before", "before", [[1.0], [0.9]])
    made = [Row(label, kinds.get(label, "method"), values) for label, values in rows.items()]
    return Comparison("t", MEASURES, [start, *made], {"created": "", "machine": {}})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"a": [[0.1], [0.9]], "b": [[0.5], [0.5]]}, "a won: clearly ahead is a in ROUGE on forget, accuracy on retain."),
        ({"a": [[0.1], [0.9]], "b": [[0.12], [0.91]]}, "Nobody won: in none of the 2 judged measures"),
        ({"a": [[0.1], [0.5]], "b": [[0.5], [0.9]]}, "everywhere: clearly ahead is a in ROUGE on forget; b in accuracy"),
        ({"a": [[0.1], [0.9]], "b": [[0.5], [0.9]]}, "a in ROUGE on forget; nobody in the other"),
        # 20 points apart, and each varies by more from seed to seed
        ({"a": [[0.1, 0.5], [0.9, 0.9]], "b": [[0.3, 0.7], [0.9, 0.9]]}, "Nobody won: in none"),
        ({"a": [[0.30, 0.31], [0.9, 0.9]], "b": [[0.50, 0.51], [0.9, 0.9]]}, "clearly ahead is a in ROUGE on forget"),
        ({"a": [[0.5], [0.9]], "b": [[0.6], [0.9]], "noise": [[0.1], [0.9]]}, "Nobody won: in none"),
    ],
)  # fmt: skip
def test_who_won_is_said_with_what_chance_explains(rows: dict[str, list[list[float]]], said: str) -> None:
    found = compared(**rows)
    assert said in found.won()
    assert found.won() in found.to_html()


def test_what_is_to_stay_is_ranked_by_what_it_lost() -> None:
    found = compared(a=[[0.1], [0.6]], b=[[0.1], [0.88]], c=[[0.1], [0.95]])
    assert found.ranked("accuracy", "retain") == ["c", "b", "a"]


def test_one_method_wins_against_nobody() -> None:
    assert compared(a=[[0.1], [0.9]]).won() == ""


def test_noise_does_not_fill_the_axes() -> None:
    close = compared(a=[[0.500], [0.900]], b=[[0.501], [0.901]], before=[[0.5], [0.9]]).scatter()
    dots = [
        node for node in ElementTree.fromstring(str(close)).iter("circle") if node.attrib["class"].startswith("dot")
    ]
    for axis, pixels in (("cx", plots.WIDTH), ("cy", plots.HEIGHT)):
        places = [float(dot.attrib[axis]) for dot in dots[-2:]]
        assert abs(places[0] - places[1]) < 0.02 * pixels
    assert "axes cover 20 points of a share" in close
    assert plots._vertical([0.0, 0.01], 0.2).low == 0.0, "no share is below zero"


def test_markdown_shows_what_it_quotes_as_it_is() -> None:
    odd = "a|b `c` *d* <img src=x> [e](f)\n# g \\"
    assert escaped(odd) == r"a\|b \`c\` \*d\* &lt;img src=x> \[e\](f) \# g \\"
    assert escaped("a <= b & c > d") == "a <= b & c > d" and escaped("&lt; &#60;") == r"&amp;lt; &amp;\#60;"
    assert code("a`b``c") == "``` a`b``c ```" and code("plain") == "`plain`"
    table = markdown(Sheet("", [Cell("model"), Cell("x|y")], [[Cell("<b>"), Cell("1", "± 2", sign="✓")]]))
    assert table == "| model | x\\|y |\n|---|---:|\n| &lt;b> | ✓ 1 ± 2 |\n"
