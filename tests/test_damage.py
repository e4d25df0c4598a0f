"""Damaged checkpoints: each is refused in one sentence that names where, or opens as what it is; none waits or breaks."""

from __future__ import annotations

import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from damaged import Damage, configs, tokenizers, weights
from overhaul import models
from overhaul.errors import OverhaulError

SUITES: dict[str, list[tuple[str, Damage]]] = {
    "weights": list(weights()),
    "configs": list(configs()),
    "tokenizers": list(tokenizers()),
}
SECONDS = 60


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def opened(place: Path) -> tuple[Any, Any]:
    """All that `plan` and `run` do with a folder."""
    known = models.facts(place)
    models.check_shapes(known)
    models.count_tokens(known)
    return models.open_model(place)


@torch.no_grad()
def says(model: Any, tokenizer: Any) -> torch.Tensor:
    text = "the cat, (7) sat."
    ids = [1, *range(5, 12)] if tokenizer is None else tokenizer(text)["input_ids"]
    return model(torch.tensor([ids])).logits


def outcome(damage: Damage, folder: Path, place: Path, expected: torch.Tensor | None) -> str:
    """ "right", "refused", or what went wrong."""
    shutil.copytree(folder, place)
    damage(place)
    try:
        with at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, tokenizer = opened(place)
            found = says(model, tokenizer)
            again = says(*models.open_model(models.save(model, tokenizer, place.with_name("again"))))
    except OverhaulError as error:
        said = str(error)
        named = str(place) in said or "architectures" in said
        return "refused" if "\n" not in said and len(said) < 900 and named else f"refused as {said!r}"
    except (Exception, TimeoutError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        shutil.rmtree(place.with_name("again"), ignore_errors=True)
        shutil.rmtree(place)
    if expected is not None and not torch.equal(found, expected):
        return "opened as something else"
    return "right" if torch.equal(found, again) and bool(found.isfinite().all()) else "not what it was when saved"


@pytest.mark.parametrize(("suite", "least"), [("weights", 80), ("configs", 80), ("tokenizers", 20)])
def test_damaged_checkpoints_are_refused_or_open_as_what_they_are(
    suite: str, least: int, folder: Path, tmp_path: Path
) -> None:
    assert len(SUITES[suite]) == len(dict(SUITES[suite])) >= least
    expected = says(*models.open_model(folder)) if suite == "weights" else None
    found = {name: outcome(damage, folder, tmp_path / "m", expected) for name, damage in SUITES[suite]}
    wrong = {name: said for name, said in found.items() if said not in ("right", "refused")}
    counts = Counter(found.values())
    print(f"{suite}: tried {len(found)}, right {counts['right']}, refused {counts['refused']}, wrong {len(wrong)}")
    assert not wrong, "\n".join(f"{name}: {said}" for name, said in wrong.items())
