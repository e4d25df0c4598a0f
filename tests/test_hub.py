"""What comes from a hub: by its name, at the revision that is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

import overhaul as oh
from overhaul import models
from overhaul.errors import RequestError


@pytest.mark.parametrize(
    ("source", "revision"),
    [("me/tiny", None), ("me/tiny@v1.2", "v1.2"), ("me/tiny@refs/pr/3", "refs/pr/3"), ("me/tiny@0a1b2c3", "0a1b2c3")],
)
def test_a_model_is_fetched_at_its_revision(
    source: str, revision: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **given: Any) -> str:
        asked.append({"name": name, **given})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model, _ = oh.open(source)
    assert type(model).__name__ == "LlamaForCausalLM" and models.facts(source).source == source
    assert {(one["name"], one["revision"]) for one in asked} == {("me/tiny", revision)}
    assert all("*.py" not in one["allow_patterns"] for one in asked)


def test_what_is_no_name_of_a_hub_is_refused() -> None:
    for source in ("me/tiny@", "tiny@v1", "me/tiny@v 1", "a/b/c@v1"):
        with pytest.raises(RequestError, match="owner/name@revision"):
            oh.open(source)


def test_data_is_fetched_at_its_revision(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    asked: list[tuple[str, Any]] = []

    def fetch(name: str, **given: Any) -> datasets.Dataset:
        asked.append((name, given))
        return datasets.Dataset.from_list([{"question": "who is a?", "answer": "aaa"}])

    monkeypatch.setattr(datasets, "load_dataset", fetch)
    found = oh.examples("me/facts@v2", tokenizer, split="test")
    assert found.rows[0]["answer"] == "aaa" and asked == [("me/facts", {"split": "test", "revision": "v2"})]
