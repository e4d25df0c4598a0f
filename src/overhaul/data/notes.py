"""What is odd about a material and no reason to refuse it: said once, by `plan`, by `run`, and as a warning from Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from overhaul.data.examples import CLOSING, LABEL_SET, PROMPT_OVERLAP, Examples
from overhaul.data.forms import find_form, told_from
from overhaul.data.values import place_of
from overhaul.data.verifiers import find_verifier
from overhaul.errors import did_you_mean

LOOKED_AT = 1000
"""Rows that are looked at."""

MOST_SHOWN = 40
"""Values that an error lists, and letters that each may have."""

WORDS = 2
"""Words from which on a value is a text and no name of something."""

SELDOM_TEXT = frozenset(
    "id uid uuid index idx key hash file filename path url link source origin split title name author person group "
    "category topic subject class label lang language date time task type version license model".split()
)
"""What columns are called that tell a row from others and are not meant to be read."""

JUDGED = frozenset(
    "paraphrase paraphrased_answer paraphrased_question perturbed_answer translation wrong rejected".split()
)
"""Columns that metrics read, whether or not this recipe asks for them."""


def notes(rows: Sequence[Mapping[str, Any]], spec: Any, made: Examples, used: Collection[str] = ()) -> list[str]:
    """What to say of a material.

    Args:
        rows: of one source.
        spec: the source, a `materials.Source`.
        made: what became of the rows, or of the first of them.
        used: columns that something beside the material reads.
    """
    of_examples = (_inside, _alike, _endless, _several)
    return [*_unread(rows, spec, used), *(note for look in of_examples for note in look(rows, spec, made))]


def _unread(rows: Sequence[Mapping[str, Any]], spec: Any, used: Collection[str]) -> list[str]:
    """Columns of text that nothing reads, such as Alpaca's `input` where `prompt:` does not name it."""
    form = told_from(rows[0], spec) if spec.as_ is None else find_form(spec.as_)
    if form is None or form.kind not in ("tokens", "pairs") or spec.from_.startswith("starter:"):
        return []
    read = {
        *used,
        *form.reads(spec),
        *map(spec.column, form.optional),
        *spec.where,
        *spec.unless,
        *spec.columns.values(),
    }
    read |= JUDGED if spec.verify is None else {*JUDGED, *map(spec.column, find_verifier(spec.verify).columns)}
    first = list(itertools.islice(rows, LOOKED_AT))
    unread = [
        column
        for column in first[0]
        if column not in read
        and not SELDOM_TEXT & set(str(column).lower().replace("-", "_").split("_"))
        and any(_holds_text(row.get(column)) for row in first)
    ]
    if not unread:
        return []
    told = "the column {} holds text and is" if len(unread) == 1 else "the columns {} hold text and are"
    way_out = f" Name them in `prompt:`, as in {{{unread[0]}}}, if the model is to see them." if form.asked else ""
    return [f"{spec.from_}: {told.format(', '.join(map(repr, unread)))} never read.{way_out}"]


def _holds_text(value: Any) -> bool:
    """Whether a value is a text, or a list or a mapping with one, such as choices or passages."""
    if isinstance(value, str):
        return len(value.split()) >= WORDS
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(map(_holds_text, parts))


def _inside(rows: Sequence[Mapping[str, Any]], spec: Any, made: Examples) -> list[str]:
    """Prompts that end inside of a token."""
    first = list(itertools.islice(made.rows, LOOKED_AT))
    places = [n for n, row in enumerate(first) if row.get(PROMPT_OVERLAP)]
    if not places:
        return []
    before, answer = first[places[0]][PROMPT_OVERLAP], str(first[places[0]].get("answer", "an answer"))[:20]
    prompted = not all("messages" in row for row in first)
    way_out = " Where the prompt ends in a space, leave that out of `prompt:`." if prompted else ""
    return [
        f"{spec.from_}: in {len(places)} of {_of(rows, first)} rows the boundary between prompt and answer falls inside a "
        f"token (first: {before!r} before {answer!r}). That token counts as the answer's; answers are generated "
        f"from those before it.{way_out}"
    ]


def _of(rows: Sequence[Any], first: Sequence[Any]) -> str:
    return str(len(rows)) if len(first) == len(rows) else f"the first {len(first)}"


def _alike(rows: Sequence[Mapping[str, Any]], spec: Any, made: Examples) -> list[str]:
    """Pairs whose two answers are the same tokens."""
    if made.kind != "pairs":
        return []
    first = list(itertools.islice(made.items, LOOKED_AT))
    places = [n for n, item in enumerate(first) if item["input_ids"].equal(item["other_input_ids"])]
    if not places:
        return []
    where = place_of(rows[places[0]], f"row {places[0] + 1}")
    return [
        f"{spec.from_}: in {len(places)} of {_of(rows, first)} rows the chosen answer is the rejected one (first: {where}), "
        "and nothing is learnt from such a pair. Take them out."
    ]


def _answered(made: Examples) -> bool:
    """Whether these are prompts with answers, or for answers."""
    return made.kind in ("tokens", "pairs") and "prompt" in made.rows[0]


def _endless(rows: Sequence[Mapping[str, Any]], spec: Any, made: Examples) -> list[str]:
    """Answers that end nowhere, because neither the tokenizer nor a chat template has a token that ends them."""
    ends = ("eos_token_id", "sep_token_id")
    known = any(getattr(made.processor, name, None) is not None for name in ends)
    if known or not _answered(made) or CLOSING in made.rows[0]:
        return []
    return [
        f"{spec.from_}: the tokenizer has no EOS, so an answer that is learnt has no end, and one that is generated goes on "
        "to its limit unless generation_config.json names a token that ends it. Name one in tokenizer_config.json "
        "(`eos_token`)."
    ]


def _several(rows: Sequence[Mapping[str, Any]], spec: Any, made: Examples) -> list[str]:
    """Rows with several classes, of which a training learns one."""
    first = list(itertools.islice(made.items, LOOKED_AT))
    places = [n for n, item in enumerate(first) if LABEL_SET in item and len(item[LABEL_SET]) > 1]
    if not places:
        return []
    return [
        f"{spec.from_}: {len(places)} of {_of(rows, first)} rows list several classes. Accuracies, `inspect.groups` and "
        "`adapt.head` take any of them as right; everything else reads the first alone."
    ]


def filters(where: Mapping[str, Any], unless: Mapping[str, Any]) -> str:
    """The filters of a material, as a recipe writes them."""
    given = {name: value for name, value in (("where", where), ("unless", unless)) if value}
    line = yaml.safe_dump(given, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return f"`{line.strip()[1:-1]}`"


def other_values(where: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What a column has instead of the one text that was asked for, to end an error; "" where that would be no help."""
    for column, wanted in where.items():
        values = {value for row in itertools.islice(rows, LOOKED_AT) if isinstance(value := row.get(column), str)}
        if isinstance(wanted, str) and wanted not in values and all(len(value) <= MOST_SHOWN for value in values):
            return did_you_mean(wanted, sorted(values)[:MOST_SHOWN])
    return ""
