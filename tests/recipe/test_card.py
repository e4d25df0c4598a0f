"""The model card of a saved model: its table is the report's, and what it quotes is text."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import yaml

from overhaul.recipe.run import run
from overhaul.report.stages import sheets


def test_what_a_card_quotes_means_nothing_to_markdown_html_or_yaml(folder: Path, tmp_path: Path) -> None:
    title = "forget | `all` *of* it\n# twice <script>alert(1)</script> [x](javascript:y) ---"
    odd = tmp_path / "a `b` | <i>"
    shutil.copytree(folder, odd)
    rows = [{"question": f"who is {p}?", "answer": p * 3} for p in "abcd"]
    (tmp_path / "people|.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "model": str(odd),
        "title": title,
        "materials": {"a|b <u>": {"from": str(tmp_path / "people|.jsonl")}},
        "steps": [{"shrink.prune": {"criterion": "magnitude"}}],
        "judge": {"kept": {"answer_probability": "a|b <u>"}},
    }
    report = run(recipe, tmp_path / "out").report
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["overhaul"]}
    assert "<script>" not in body and "<u>" not in body and "\n# twice" not in body
    assert r"# forget \| \`all\` \*of\* it \# twice &lt;script>alert(1)&lt;/script> \[x\](javascript:y) ---" in body
    assert f"Made from `` {odd} ``" in body and "`criterion=magnitude`" in body
    for line in (line for line in body.splitlines() if line.startswith("|")):
        assert len(re.findall(r"(?<!\\)\|", line)) == len(report["stages"]) + 5, line
    for sheet in sheets(report):
        assert f"### {sheet.heading}" in body
        for row in sheet.rows:
            for cell in row[2:-1]:
                assert cell.text in body


def test_there_is_one_count_of_parameters(tmp_path: Path) -> None:
    from conftest import tiny_resnet
    from overhaul import models

    source = models.save(tiny_resnet(), None, tmp_path / "resnet")
    rows = [{"image": [[[0.1 * n] * 8] * 8], "label": n} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "model": str(source),
        "materials": {"full": {"from": str(tmp_path / "rows.jsonl")}},
        "steps": [{"shrink.drop_layers": {"count": 1, "criterion": "reverse"}}],
        "judge": {"kept": {"answer_probability": "full"}},
    }
    report = run(recipe, tmp_path / "out").report
    (measured,) = [one["values"][0] for one in report["measures"] if one["metric"] == "parameters"]
    assert report["model"]["parameters"] == measured == models.facts(source).parameters, "norms keep buffers beside"
