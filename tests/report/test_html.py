"""report.html: self-contained, escaped, complete, and showing the numbers of report.json."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from made_up import REPORTS, image_report, judged_only, language_report, odd_report
from overhaul.errors import RunError
from overhaul.report import numbers, sentences
from overhaul.report.html import ASIDE, SAMPLES_SHOWN, render, write_html

VOID = {"meta", "link", "br", "wbr"}
INLINE = {"a", "b", "data", "i", "small", "span", "wbr"}


@pytest.fixture(params=REPORTS)
def any_report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return REPORTS[request.param]()


@pytest.fixture
def report() -> dict[str, Any]:
    return language_report()


class Page(HTMLParser):
    """The parsed page: tags with attributes, text by enclosing tag, and whether every tag was closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in INLINE:
            self.words.append(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def figures(html: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(figure) for figure in re.findall(r"<figure.*?</figure>", html, re.S)]


def test_nothing_is_loaded_from_anywhere(any_report: dict[str, Any]) -> None:
    html = render(any_report)
    page = Page(html)
    assert not {"script", "img", "iframe", "object", "embed", "video", "audio", "base", "form"} & {
        t for t, _ in page.tags
    }
    assert [link["href"] for link in page.named("link")] == ["data:,"]
    assert "url(" not in html and "@import" not in html
    for _, attributes in page.tags:
        assert not {"src", "srcset", "style", "data", "poster", "action", "background"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    for anchor in page.named("a"):
        assert re.fullmatch(r"https://arxiv\.org/abs/[\w.-]+(/\d+)?", anchor["href"] or "")
    (policy,) = [meta["content"] for meta in page.named("meta") if "http-equiv" in meta]
    assert policy is not None and policy.startswith("default-src 'none'")


def test_text_is_shown_as_it_was_written() -> None:
    odd = odd_report()
    page = Page(render(odd))
    hostile = " ".join(odd["title"].split())
    # title, heading, class, source, group headings, label, role, stages, samples, step, knob, fact, recipe, machine
    assert page.text.count(hostile) > 20
    assert "{{ 7*7 }}" in page.text and "49" not in page.text


def test_every_measure_and_every_value_is_on_the_page(any_report: dict[str, Any]) -> None:
    html = render(any_report)
    page = Page(html)
    for measure in any_report["measures"]:
        assert " ".join(measure["label"].split()) in page.text
        assert numbers.small_print(measure, counted=False) in page.text
    finite = [value for m in grouped(any_report) for value in m["values"] if value is not None]
    stored = [json.loads(data["value"] or "") for data in page.named("data")]
    assert json.dumps(stored) == json.dumps(finite)


def grouped(report: dict[str, Any]) -> list[Any]:
    return [measure for rows in numbers.by_group(report["measures"]).values() for measure in rows]


def test_numbers_shown_are_those_of_the_report_rounded(report: dict[str, Any]) -> None:
    factor = {"%": 0.01, " k": 1e3, " M": 1e6, " kB": 1e3, " MB": 1e6, " MFLOPs": 1e6, " ms": 1.0, "": 1.0}
    cells = re.findall(r'<data value="([^"]+)">([^<]+)</data>', render(report))
    assert len(cells) == sum(value is not None for m in report["measures"] for value in m["values"])
    for exact, shown in cells:
        match = re.fullmatch(r"([\d.,e+-]+)(.*)", shown)
        assert match is not None, shown
        assert float(match[1].replace(",", "")) * factor[match[2]] == pytest.approx(float(exact), rel=0.006, abs=6e-4)


def test_nulls_are_dashes(report: dict[str, Any]) -> None:
    rows = re.findall(r"<tr>.*?</tr>", render(report), re.S)
    (row,) = [row for row in rows if "perplexity" in row]
    assert re.search(r'<td class="figure" data-head="[^"]+">–</td>', row)
    assert "not compared" in row
    assert "None" not in Page(render(report)).text


def test_verdicts_stand_before_the_table(report: dict[str, Any]) -> None:
    text = Page(render(report)).text
    for said in sentences.group_verdicts(report["measures"]):
        assert text.index(said.sentence) < text.index("What was measured")
    assert numbers.TOLERANCE in text
    assert "n = 20 is itself uncertain" in text


def test_a_verdict_has_a_sign_and_a_word_beside_its_colour(report: dict[str, Any]) -> None:
    cells = re.findall(r'<td class="outcome (good|bad|even)" data-head="verdict">(.*?)</td>', render(report), re.S)
    assert len(cells) == len(report["measures"])
    for (colour, cell), measure in zip(cells, grouped(report), strict=True):
        seen = numbers.verdict(measure)
        assert colour == {True: "good", False: "bad", None: "even"}[seen.good]
        assert f">{seen.sign}</span>" in cell and seen.word in cell


def test_one_stage_has_no_change_column() -> None:
    html = render(judged_only())
    assert 'data-head="verdict"' not in html and '<td class="outcome' not in html
    assert "nothing to compare it with yet" in html
    assert "<h2>Steps</h2>" not in html and "<figure>" not in html


def test_an_image_report_has_no_empty_sections() -> None:
    html = render(image_report())
    assert "What the model says" not in html and "<h2>Training</h2>" not in html
    assert len(figures(html)) == 1


def test_charts_are_well_formed_and_finite(any_report: dict[str, Any]) -> None:
    for figure in figures(render(any_report)):
        assert next(figure.iter("svg")).attrib["viewBox"]
        for node in figure.iter():
            for name, value in node.attrib.items():
                if name != "aria-label":
                    assert not re.search(r"\b(nan|inf|None)\b", value, re.I), (node.tag, name, value)


def test_every_step_that_touched_layers_is_drawn(report: dict[str, Any]) -> None:
    titles = [next(figure.iter("b")).text for figure in figures(render(report))]
    depth, loss, aside, found = ["forget.npo", "shrink.drop_layers", "shrink.drop_layers", "shrink.heal"], 2, 3, 4
    assert titles[: len(depth)] == depth
    assert len(titles) == len(depth) + loss + aside + found


def test_learning_rate_is_drawn_on_demand_only(report: dict[str, Any]) -> None:
    before, _, folded = render(report).partition("<summary>Learning rate and gradient norm</summary>")
    assert not [name for name in ("learning rate", *ASIDE) if f">{name}</text>" in before]
    assert ">learning rate</text>" in folded and ">gradient norm</text>" in folded


def test_a_single_term_is_not_drawn_beside_the_loss_it_equals(report: dict[str, Any]) -> None:
    (heal,) = [f for f in figures(render(report)) if "shrink.heal: loss" in ElementTree.tostring(f, "unicode")]
    assert len(list(heal.iter("polyline"))) == 1


def test_samples_show_each_stage_and_whether_it_is_as_expected(report: dict[str, Any]) -> None:
    cards = re.findall(r'<article class="sample">.*?</article>', render(report), re.S)
    assert len(cards) == len(report["samples"])
    text = [Page(card).text for card in cards]
    assert text[0].startswith("Where was Ada Quill born? expected Marrowick before Marrowick = equal")
    assert text[0].count("≠ different") == 3 and "nothing ≠ different" in text[0]
    assert "equal" not in text[-1] and "different" not in text[-1]  # free text has no expected answer
    assert "shrink.drop_layers –" in text[-1]


def test_many_samples_are_folded() -> None:
    odd = odd_report()
    page = render(odd)
    assert f"<summary>{9 - SAMPLES_SHOWN} more</summary>" in page
    assert page.count('<article class="sample">') == len(odd["samples"])


def test_steps_tell_knobs_facts_time_and_paper(report: dict[str, Any]) -> None:
    html = render(report)
    text = Page(html).text
    assert "18.4 s · peak memory 612 MB · forget n = 20 · retain n = 380" in text
    assert "retain_weight 1" in text and "final loss 0.4123" in text and "dropped 5, 6" in text
    assert '<a href="https://arxiv.org/abs/2404.05868"' in html
    assert ">arXiv:2403.03853</a>" in html  # also where the step wrote the prefix itself


def test_recipe_seed_and_machine_are_kept(report: dict[str, Any]) -> None:
    html = render(report)
    text = Page(html).text
    assert " ".join(report["recipe"].split()) in text
    assert "memory 16.7 GB" in text and "torch 2.13.0" in text and "overhaul 0.1.0" in text and "seed 0" in text
    assert "4 March 2026, 15:06" in text


def test_wide_content_scrolls_in_a_box_that_the_keyboard_reaches(report: dict[str, Any]) -> None:
    html = render(report)
    for wide in ("<table", "<pre"):
        box = html[: html.index(wide)].rstrip().rpartition("<")[2]
        assert box.startswith('div class="scroll" tabindex="0" role="region" aria-label=')


def test_light_dark_phone_and_print_have_their_rules(report: dict[str, Any]) -> None:
    html = render(report)
    for rule in ("(prefers-color-scheme: dark)", "@media (max-width", "@media print"):
        assert rule in html
    assert 'name="viewport" content="width=device-width' in html


def test_the_file_is_replaced_whole(report: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_html(report, path)
    assert path.read_text(encoding="utf-8") == render(report)
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_written_is_said(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a file lies where a folder should be"):
        write_html(report, tmp_path / "file" / "report.html")
