"""Several models before the same rows: opened one at a time, and refused where their answers could not be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from overhaul import processes, session
from overhaul.data.classes import labels_of, unnamed
from overhaul.data.examples import Examples, wrong_label
from overhaul.data.materials import written
from overhaul.data.verifiers import check_rows
from overhaul.errors import RequestError
from overhaul.judge.evidence import Evidence, kind_of
from overhaul.judge.metrics.generated import right_answers
from overhaul.models import Checkpoint, load_processor


def names_of(models: Sequence[Checkpoint]) -> list[str]:
    """What the models are called: the end of their paths where that tells them apart, with a number where nothing does."""
    sources = [one.source.rstrip("/") for one in models]
    ends = [PurePath(source).name or source for source in sources]
    names = ends if len(set(ends)) == len(ends) else sources
    return names if len(set(names)) == len(names) else [f"{n} {name}" for n, name in enumerate(names, 1)]


def check_kind(role: str, examples: Examples) -> bool:
    """Whether the rows have classes; else they are questions with answers.

    Raises:
        RequestError: they are neither, or no verifier can tell whether an answer is right.
    """
    if not len(examples):
        raise RequestError(f"inspect.groups: the role `{role}` is empty.")
    kind = kind_of(examples)
    if kind == "text" or (kind == "prompts" and not all("answer" in row or "verify" in row for row in examples.rows)):
        raise RequestError(
            f"inspect.groups: the role `{role}` holds {kind}, of which nothing is right or wrong. Give images or texts with "
            "a class, or questions with answers."
        )
    if kind != "images":
        check_rows(examples.rows)
    return kind == "images"


def check_classes(models: Sequence[Checkpoint], names: Sequence[str], data: Mapping[str, Examples]) -> None:
    """Whether all models tell the same classes apart, and the rows have no others.

    Raises:
        RequestError: they do not.
    """
    spaces = [labels_of(known.config) for known in models]
    for known, name, space in zip(models, names, spaces, strict=True):
        if space is None:
            raise RequestError(
                f"inspect.groups: {name} ({known.architecture}) has no classes by its config, but the rows have. Give "
                "models that classify, or questions with answers."
            )
        first = spaces[0]
        assert first is not None
        if len(space) != len(first):
            raise RequestError(
                f"inspect.groups: {names[0]} tells {len(first)} classes apart and {name} {len(space)}, so one label cannot "
                "mean the same to both. Compare models of one label space."
            )
        if space != first and not (unnamed(space) or unnamed(first)):
            other = next(label for label, number in space.items() if first.get(label) != number)
            raise RequestError(
                f"inspect.groups: class {space[other]} is {other!r} to {name}, but not to {names[0]}. Compare models of one "
                "label space, or correct `id2label` in config.json."
            )
    for role, examples in data.items():
        if wrong := wrong_label(examples, len(spaces[0] or ())):
            raise RequestError(
                f"inspect.groups: row {wrong[0] + 1} of the role `{role}` has the label {wrong[1]}, but the models tell "
                f"{len(spaces[0] or ())} classes apart, from 0. Correct the labels, or leave such rows out."
            )


def check_read_alike(models: Sequence[Checkpoint], names: Sequence[str], data: Mapping[str, Examples]) -> None:
    """Whether the rows, which are encoded once, are encoded as every model reads them.

    Raises:
        RequestError: a model has another tokenizer, or prepares images in another way.
    """
    own = next((each.processor for each in data.values() if each.processor is not None), None)
    for known, name in zip(models, names, strict=True) if own is not None else ():
        other = load_processor(known)
        if other is not None and _mark(other) != _mark(own):
            raise RequestError(
                f"inspect.groups: {name} reads its data by another {type(other).__name__} than the rows were encoded with "
                "(of the recipe's `model:`, or the processor given in Python), so it would be measured on what it does not "
                "know. Compare models that share one."
            )


def _mark(processor: Any) -> str:
    """All that decides what a model is given."""
    if hasattr(processor, "get_vocab"):
        return written(processor)
    return json.dumps(getattr(processor, "image_processor", processor).to_dict(), sort_keys=True, default=str)


def hits(
    models: Sequence[Checkpoint], data: Mapping[str, Examples], classified: bool, top: int
) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """What each model gets right of each role: at first and, of classes, within the first `top`, each [models, n]."""
    found: dict[str, list[tuple[list[bool], list[bool]]]] = {role: [] for role in data}
    for known in session.progress(models, "measuring models", len(models)):
        model = known.open().to(processes.device())
        for role, examples in data.items():
            evidence = Evidence(model, examples, limit=len(examples))
            if classified:
                ranks = evidence.ranks
                found[role].append(([rank == 0 for rank in ranks], [rank < top for rank in ranks]))
            else:
                right = right_answers(evidence)
                found[role].append(([right[place] for place in range(len(examples))], []))
        del model
    return {
        role: (np.array([one for one, _ in each]), np.array([more for _, more in each]) if classified else None)
        for role, each in found.items()
    }
