"""Text of others steers nothing: no terminal, no page, no card, no log; and a name means a name wherever it stands."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from overhaul import cli
from overhaul.quoting import code, escaped, shown

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
HOSTILE = (
    "</title><script>alert(1)</script>\"><img src=x onerror=alert(1)>' a|b `c` *d* [x](javascript:y) {{ 7*7 }} {% raw %}"
    " %s {0} $(touch ran) [red]e[/] [/f] :smile: \x1b[31mg\x1b]0;h\x07 \x9b1m \u202ei \u2066j"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("a\0b\x9bc\x7fd", "abcd"),
        ("\u202egnp.exe\u2069", "gnp.exe"),
        ("a\r\nb\rc\td\ne", "a\nb\nc\td\ne"),
        ("half \ud83d", "half \ufffd"),
        ("שלום\u200f, 😀 naïve\u2028x", "שלום\u200f, 😀 naïve\u2028x"),
    ],
)
def test_what_steers_is_left_out_and_what_has_a_shape_stays(text: str, expected: str) -> None:
    assert shown(text) == expected == shown(expected)


def test_markdown_has_it_in_a_line() -> None:
    assert escaped("a\x1b[1m\n# $b$ \ud800") == r"a\[1m \# \$b\$ " + "\ufffd"
    assert code("a\n`b` \x07c") == "`` a `b` c ``"


def test_a_terminal_shows_names_as_they_are() -> None:
    file = io.StringIO()
    cli.Terminal(file=file, width=60).print("a \x1b[2J:smile: b\ud800", markup=False)
    assert file.getvalue() == "a [2J:smile: b\ufffd\n"
    file = io.StringIO()
    cli.Terminal(file=file, width=60, force_terminal=True, color_system="standard").print("[red]a[/]")
    assert file.getvalue() == "\x1b[31ma\x1b[0m\n", "its own colours stay"


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """All that the command prints; it must do what it is asked to."""
    monkeypatch.setattr(sys, "argv", ["overhaul", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = "".join(capsys.readouterr())
    assert not stop.value.code, said
    return said


def test_hostile_names_and_rows_mean_nothing_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    part = HOSTILE.replace("/", "\u2044")[:80]  # as much as a file's name can have
    shutil.copytree(folder, tmp_path / f"m {part}")
    # a row is as long as the model reads
    rows = [{"person": p, "question": f"{p} {HOSTILE[:60]}", "answer": HOSTILE[-40:]} for p in "abcd"]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "title": HOSTILE,
        "model": str(tmp_path / f"m {part}"),
        "materials": {HOSTILE: {"from": "rows.jsonl"}, "plain": {"from": "rows.jsonl", "where": {"person": "a"}}},
        "steps": [{"shrink.prune": {"criterion": "magnitude"}}],
        "judge": {"forgotten": {"extraction": HOSTILE}, "kept": {"accuracy": "plain"}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / f"out {part}"
    said = [
        command(monkeypatch, capsys, *arguments)
        for arguments in (
            ("plan", "recipe.yaml"),
            ("run", "recipe.yaml", "-o", str(out)),
            ("report", str(out)),
            ("push", str(out), "me/mine"),
        )
    ]
    page, card, log = ((out / name).read_text() for name in ("report.html", "model/README.md", "run.log"))
    for text in (*said, page, card, log):
        assert not STEERING.search(text)
    assert str(out).translate({27: None, 7: None}) in said[1], "paths are printed as they are"
    assert not Page(page).tags & {"script", "img"} and not {name for name in Page(page).attributes if name[:2] == "on"}
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["overhaul"]}
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line.startswith("|")}) == 1
    assert all(re.match(r"\d{4}-\d\d-\d\d |    ", line) for line in log.splitlines())
    assert json.loads((out / "report.json").read_text())["title"] == HOSTILE, "the numbers' file has all of it"
    assert not (tmp_path / "ran").exists()
