"""docs/data.md: every file on the page is read by the line below it, as what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from overhaul.data.materials import Source, load_rows

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
PARTS = re.compile(r"^```(?P<kind>\w+)(?: (?P<name>\S+))?\n(?P<text>.*?)^```$|Read as `(?P<row>\{.*?\})`", re.M | re.S)


def test_the_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, read, told = None, 0, 0
    for part in PARTS.finditer(PAGE):
        if part["row"]:
            assert first == json.loads(part["row"].replace("\n", " "))
            told += 1
        elif part["name"]:
            Path(part["name"]).parent.mkdir(parents=True, exist_ok=True)
            Path(part["name"]).write_text(part["text"], encoding="utf-8")
        elif part["kind"] == "python":
            exec(part["text"], {})
        else:
            materials = yaml.safe_load(part["text"])
            found = [load_rows(Source.model_validate(one), tmp_path) for one in materials.values()]
            first, read = found[0][0], read + len(found)
    assert read >= 25 and told >= 12
