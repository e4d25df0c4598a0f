"""The terminal's table: complete at 100 columns, honest about what it leaves out, readable without colour."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from made_up import REPORTS, judged_only, language_report
from overhaul.report import numbers, sentences
from overhaul.report.terminal import print_table


@pytest.fixture(params=REPORTS)
def any_report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return REPORTS[request.param]()


@pytest.fixture
def report() -> dict[str, Any]:
    return language_report()


def printed(report: dict[str, Any], width: int = 100, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    print_table(report, Console(file=stream, width=width, color_system=None))
    return raw.getvalue().decode(encoding)


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(any_report: dict[str, Any], width: int) -> None:
    assert max(len(line) for line in printed(any_report, width).splitlines()) <= width


def test_a_hundred_columns_hold_four_stages(report: dict[str, Any]) -> None:
    text = printed(report)
    assert "Left out" not in text
    for row in report["measures"]:
        for value in row["values"]:
            assert numbers.humanise(value, row["unit"]).split()[0] in text
        assert numbers.change(row) in text
        assert f"{numbers.verdict(row).sign} {numbers.verdict(row).word}" in text


def test_every_measure_is_named(report: dict[str, Any]) -> None:
    text = printed(report, width=200)
    for row in report["measures"]:
        assert numbers.subject(row) in text


def test_stages_that_do_not_fit_are_left_out_and_named(report: dict[str, Any]) -> None:
    text = printed(report, width=80)
    assert "Left out here for width: forget.npo, shrink.drop_layers." in text
    rows = [line for line in text.splitlines() if "12.34" in line]
    assert "28.93" not in rows[0]


def test_verdict_sentences_follow_the_table(report: dict[str, Any]) -> None:
    text = squeezed(printed(report))
    for said in sentences.group_verdicts(report["measures"]):
        assert squeezed(f"{said.overall.sign} {said.heading}. {said.sentence}") in text


def test_markup_in_a_report_is_text(report: dict[str, Any]) -> None:
    row = {**report["measures"][3], "label": "[bold red]x[/] [/nope]"}
    assert "[bold red]x[/] [/nope] on retain" in printed({**report, "measures": [row]}, width=200)


def test_a_terminal_without_unicode_gets_plain_letters(any_report: dict[str, Any]) -> None:
    assert printed(any_report, encoding="ascii").isascii()


def test_one_stage_has_no_change() -> None:
    text = printed(judged_only())
    assert "verdict" not in text and "Measured once" in text


def test_what_is_compared_with_an_anchor_shows_its_value(report: dict[str, Any]) -> None:
    row = report["measures"][0]
    row |= {"wanted": "anchor", "anchor": 0.123}
    assert f"{numbers.verdict(row).word} ({numbers.humanise(0.123, row['unit'])})" in printed(report, width=200)


@pytest.mark.parametrize("width", [70, 100])
def test_a_stage_is_broken_between_its_words_alone(report: dict[str, Any], width: int) -> None:
    name = "rewire.attention_residuals"
    text = printed({**report, "stages": ["before", *[name] * 3]}, width=width)
    for word in ("rewire.", "attention_", "residuals"):
        assert word in text
