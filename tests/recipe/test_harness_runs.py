"""Tasks of lm-evaluation-harness in recipes: rows of the report and of comparisons, kept by what they depend on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml

import overhaul as oh
from conftest import tiny_llama, tiny_vit
from lm_tasks import CHOICE, directly, write
from lm_tasks import few as few
from overhaul import models
from overhaul.errors import RequestError, RunError
from overhaul.recipe.compare import compare
from overhaul.recipe.run import run

ROWS = [
    {"question": f"who is {letter}?", "choices": ["a", "b", letter * 2], "gold": n % 3}
    for n, letter in enumerate("cdefgh")
]


def recipe(folder: Path, base: Path, **changes: Any) -> Path:
    tasks = base / "tasks"
    data = {"data_files": {"test": "rows.jsonl"}}  # found beside the task
    write(tasks, "own", ROWS, **CHOICE | {"metric_list": CHOICE["metric_list"][:1], "dataset_kwargs": data})
    (base / "text.jsonl").write_text('{"text": "a small text to read"}\n' * 4)
    content = {
        "model": str(folder),
        "materials": {"text": {"from": "text.jsonl"}},
        "steps": [{"shrink.drop_layers": {"count": 1, "criterion": "reverse"}}],
        "judge": {"kept": {"lm_eval": "own", "include_path": "tasks", "perplexity": "text"}},
        **changes,
    }
    path = base / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def expected(folder: Path, tasks: Path) -> tuple[float, float]:
    own = directly(folder, tasks, ["own"], "float32")["results"]["own"]
    return own["acc,none"], own["acc_stderr,none"]


def scored(report: dict[str, Any]) -> dict[str, Any]:
    (measure,) = [one for one in report["measures"] if one["metric"] == "lm_eval.acc"]
    return measure


IDLE = """
import sys
from overhaul.recipe.run import run
report = run(sys.argv[1], sys.argv[2]).report
assert any(one["metric"] == "lm_eval.acc" for one in report["measures"])
assert "lm_eval" not in sys.modules and "torch" not in sys.modules, "a finished run is told by its stamps"
import overhaul, overhaul.recipe.plan, overhaul.listing, overhaul.judge.judge
assert "lm_eval" not in sys.modules
"""


@pytest.mark.smoke
def test_a_run_measures_every_stage_as_lm_eval_does_and_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = recipe(folder, tmp_path), tmp_path / "out"
    measure = scored(run(path, out).report)
    right = [expected(one, tmp_path / "tasks") for one in (folder, out / "model")]
    assert list(zip(measure["values"], measure["stderrs"], strict=True)) == right
    assert (measure["on"], measure["n"], measure["unit"], measure["wanted"]) == ("own", len(ROWS), "share", "same")
    page = (out / "report.html").read_text()
    assert "acc on own" in page and f"± {100 * right[0][1]:.1f}%" in page
    subprocess.run([sys.executable, "-c", IDLE, path, out], check=True, timeout=120)

    asked: list[int] = []
    evaluate = lm_eval.evaluate
    monkeypatch.setattr(lm_eval, "evaluate", lambda *a, **k: asked.append(1) or evaluate(*a, **k), raising=False)
    data = tmp_path / "tasks" / "rows.jsonl"
    data.write_text(data.read_text())
    assert scored(run(path, out).report) == measure and not asked, "the same rows, written anew"
    data.write_text("\n".join(map(json.dumps, [{**row, "gold": 2 - row["gold"]} for row in ROWS])))
    again = scored(run(path, out).report)
    assert len(asked) == 2 and list(zip(again["values"], again["stderrs"], strict=True)) == [
        expected(one, tmp_path / "tasks") for one in (folder, out / "model")
    ]


@pytest.mark.smoke
def test_a_comparison_has_the_tasks_and_their_errors(folder: Path, tmp_path: Path) -> None:
    entries = [{"shrink.drop_layers": {"count": count, "criterion": "reverse"}} for count in (1, 2)]
    done = compare(recipe(folder, tmp_path, compare=entries), out=tmp_path / "out")
    place = next(n for n, one in enumerate(done.report["measures"]) if one["metric"] == "lm_eval.acc")
    rows = {row["label"]: row for row in done.report["rows"]}
    for row in rows.values():
        source = Path(row["facts"]["models"][0])
        source = source if source.is_absolute() else tmp_path / "out" / source
        assert (row["values"][place][0], row["stderrs"][place][0]) == expected(source, tmp_path / "tasks")
    assert len(rows) >= 3 and "±" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_limit_on_a_task_ends_the_run(folder: Path, tmp_path: Path) -> None:
    judged = {"kept": {"lm_eval": {"on": "own", "at_least": 1.0}, "include_path": "tasks"}}
    with pytest.raises(RunError, match=r"lm_eval\.acc on own is 0\.\d+, below its limit of 1"):
        run(recipe(folder, tmp_path, judge=judged), tmp_path / "out")


@pytest.mark.usefixtures("few")
def test_plan_refuses_what_a_run_would(folder: Path, tmp_path: Path) -> None:
    oh.plan(recipe(folder, tmp_path))
    path = recipe(folder, tmp_path, judge={"kept": {"lm_eval": ["own", "ovn"], "include_path": "tasks"}})
    with pytest.raises(RequestError, match=r"judge\.kept\.lm_eval: .* no task 'ovn'. Did you mean 'own'"):
        oh.plan(path)
    path = recipe(folder, tmp_path)
    (tmp_path / "tasks" / "rows.jsonl").write_text('{"question": "a?", "gold": 0}\n')
    with pytest.raises(RequestError, match="'own'.*'choices' is undefined"):
        oh.plan(path)
    (tmp_path / "tasks" / "rows.jsonl").unlink()
    with pytest.raises(RequestError, match="'own' cannot be loaded"):
        oh.plan(path)


def test_plan_refuses_models_that_tasks_cannot_be_put_to(tmp_path: Path) -> None:
    silent = models.save(tiny_llama(), None, tmp_path / "silent")
    with pytest.raises(RequestError, match="has no tokenizer.*leave lm_eval out"):
        oh.plan(recipe(silent, tmp_path, judge={"kept": {"lm_eval": "own", "include_path": "tasks"}}, materials={}))
    seeing = models.save(tiny_vit(), None, tmp_path / "seeing")
    with pytest.raises(RequestError, match="lm_eval"):
        oh.plan(recipe(seeing, tmp_path, judge={"kept": {"lm_eval": "own", "include_path": "tasks"}}, materials={}))


def test_data_of_the_hub_is_said_to_be_away(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(**_: Any) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.load_dataset", away)
    path = recipe(folder, tmp_path)
    write(tmp_path / "tasks", "own", [], **CHOICE | {"dataset_path": "allenai/ai2_arc", "dataset_kwargs": None})
    with pytest.raises(RequestError, match=r"'own' cannot be loaded.*'allenai/ai2_arc'.*HF_HUB_OFFLINE"):
        oh.plan(path)
