"""Tasks of lm-evaluation-harness made here: a YAML file and its rows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager

from overhaul.judge.harness import tasks
from overhaul.judge.harness.surroundings import quietly

CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}  # fmt: skip


def write(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], **changes: Any) -> None:
    """A task that reads `rows`; what is None is left out."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    task = {"task": name, **data, "test_split": "test", "fewshot_split": "test", "doc_to_text": "q: {{question}} a:"}
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole = {key: value for key, value in {**task, **changes}.items() if value is not None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))


def directly(folder: Path, tasks: Path, names: list[str], dtype: str = "auto", **options: Any) -> dict[str, Any]:
    """What lm-eval gives of itself for a saved folder, where the tasks lie."""
    evaluate: Any = lm_eval.simple_evaluate
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    given = {"pretrained": str(folder), "device": "cpu", "dtype": dtype}
    with quietly(), contextlib.chdir(tasks):
        return evaluate("hf", given, names, task_manager=manager, **options)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval has no tasks but those of the folder that is named: reading its own takes longer than a test may."""
    read = tasks._indexed
    monkeypatch.setattr(tasks, "_indexed", lambda folder, stamps, alone=True: read(folder, stamps, folder is not None))
