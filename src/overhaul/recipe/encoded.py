"""From a material's rows to examples that the model can read, and what is said where that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

from overhaul import models
from overhaul.data.examples import SEQUENCES, Examples, join
from overhaul.data.lazy import TextFile
from overhaul.data.materials import Row, Source
from overhaul.errors import OverhaulError, RequestError
from overhaul.positions import declared, left_out, most_positions


@contextmanager
def opening(known: models.Checkpoint) -> Iterator[None]:
    """What a library says of a tokenizer or image processor that it cannot read, in one sentence."""
    try:
        yield
    except OverhaulError:
        raise
    except Exception as error:  # each library has its own
        said = str(error).strip().partition("\n")[0]
        raise RequestError(
            f"{known.source}: its tokenizer or image processor cannot be opened ({type(error).__name__}: {said}). Copy "
            "those files again from where the model comes from."
        ) from error


AFFORDED = 20_000
"""Rows of a source that are all encoded before a run."""


def affordable(rows: Sequence[Row]) -> bool:
    """Whether all of a source is encoded in a moment: few rows, and no text that lies in a file."""
    return len(rows) <= AFFORDED and not any(isinstance(value, TextFile) for row in rows[:2] for value in row.values())


def encoded(
    role: str, parts: Sequence[tuple[Source, Sequence[Row]]], encode: Callable[[Sequence[Row], Source], Examples]
) -> Examples:
    """The examples of one material; `encode` makes those of one of its sources.

    Raises:
        RequestError: a row is not what its form reads.
    """
    try:
        return join([encode(rows, spec) for spec, rows in parts])
    except OverhaulError as error:
        raise type(error)(f"The material {role!r}: {error}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, TemplateError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise RequestError(
            f"The material {role!r} cannot be encoded: {what}. Its rows, `prompt:` and `columns:` must fit `as:`."
        ) from error


def check_encoded(data: Mapping[str, Examples], model: models.Checkpoint) -> None:
    """Whether something is left to learn from, and the model has every token and position.

    Raises:
        RequestError: it is not so.
    """
    for role, examples in data.items():
        if not len(examples):
            raise RequestError(f"The material {role!r} has rows, but no example is left once they are encoded.")
        if examples.kind in ("tokens", "pairs"):
            _check_tokens(role, examples, model.config)
            _check_length(role, examples, model)


def _check_tokens(role: str, examples: Examples, config: Mapping[str, Any]) -> None:
    """Whether the model's vocabulary has these tokens."""
    tops = [max(int(item[ids].max()) for ids in SEQUENCES.values() if ids in item) for item in examples.items]
    place = max(range(len(tops)), key=lambda n: tops[n])
    top = tops[place]
    text = config.get("text_config")
    size = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    if isinstance(size, int) and top >= size:
        word = examples.processor.convert_ids_to_tokens(top) if hasattr(examples.processor, "encode") else None
        raise RequestError(
            f"The material {role!r}, row {place + 1}, has token {top} ({word!r}), but the model's vocabulary ends at "
            f"{size - 1}, so there is no row for it. Take that word out of the text, or resize the embeddings "
            "(`model.resize_token_embeddings`) and save the model again."
        )


def _check_length(role: str, examples: Examples, known: models.Checkpoint) -> None:
    """Whether the model has positions for all tokens of every example."""
    most = declared(known.config)
    if most is None or examples.beyond(most - left_out(known.config)) is None:
        return
    network = models.planned(known)
    most = most if network is None else most_positions(network) or most
    if (found := examples.beyond(most)) is None:
        return
    place, length = found
    asked = examples.rows[place].get("question")
    which = f"number {place + 1}" if asked is None else f"the question {str(asked)[:60]!r}"
    way_out = f"Write `length: {most}`." if asked is None else "Shorten such rows or leave them out."
    raise RequestError(
        f"The material {role!r} has an example of {length} tokens ({which}), but the model ends at {most} positions: cut "
        f"there, its answer would be lost. {way_out}"
    )
