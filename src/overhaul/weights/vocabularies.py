"""Models whose tokenizers number words differently, read as if they had one vocabulary.

A row of an embedding, or of a head that is a tensor of its own, stands for a word. With another vocabulary a row is

1. the model's own, where its tokenizer has the word;
2. else the first model's, where that one has it, or where no tokenizer names the row;
3. else the mean of those of all models that have it.

Rows are gathered from the files piece by piece (`pieces`); nothing is permuted in memory. Words are the same where their
strings are. The first model's words keep their numbers, and its rows of no word stay (mergekit cuts them off); further
words follow in the order of the models, and of their numbers there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from overhaul.errors import RequestError
from overhaul.models import Checkpoint, load_processor, planned
from overhaul.processor import TOKENIZERS
from overhaul.weights.depths import built_names
from overhaul.weights.index import TensorIndex, vocabulary

Places = NDArray[numpy.int64]
"""For each row of a new vocabulary its row in a model, or -1."""


@dataclass(frozen=True)
class Reworded(Checkpoint):
    """A checkpoint that is read with another vocabulary. Create it with `reworded`.

    Attributes:
        index: its tensors as they are then, by the first model's names.
        tokenizer: of the new vocabulary, where it is not the first model's.
        rows: of the new vocabulary.
    """

    index: TensorIndex = field(default=None, repr=False)  # pyright: ignore[reportAssignmentType]
    tokenizer: Any = field(default=None, repr=False)
    rows: int = 0

    def write_words(self, folder: Path) -> None:
        """Put the tokenizer into a folder that was made of this model, and the number of rows into its config."""
        if self.tokenizer is not None:
            for name in TOKENIZERS:
                (folder / name).unlink(missing_ok=True)  # of another kind they would be read beside the new ones
            self.tokenizer.save_pretrained(folder)
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        holder = config if "vocab_size" in config or "text_config" not in config else config["text_config"]
        if holder["vocab_size"] != self.rows:
            holder["vocab_size"] = self.rows
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Rule:
    """Where the row of a word comes from.

    Attributes:
        model: the number of a model; None for a row of zeros.
        row: of that model.
        force: for all models, also those that have the word.
    """

    model: int | None
    row: int = 0
    force: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The words of a merged model.

    Attributes:
        union: with the words that the tokenizer lacks and a model's has: tokens of their own, which no merge rule leads to.
        of: whose tokenizer it is; the first model's if None.
        cut: without the rows that are of no word.
        prefer_first: a model that lacks a word has the first model's row for it, before the mean of all that have one.
        rules: by word; one that the tokenizer lacks is added to it.
    """

    union: bool = False
    of: Checkpoint | None = None
    cut: bool = False
    prefer_first: bool = True
    rules: Mapping[str, Rule] = field(default_factory=dict)


def reworded(indexes: Sequence[TensorIndex], known: Sequence[Checkpoint], wanted: Vocabulary) -> list[Checkpoint]:
    """The same models, all with the same words.

    Args:
        indexes: their tensors, by the first one's names.
        known: their facts.
        wanted: which words.

    Raises:
        RequestError: a model has no tokenizer that can be read, or its rows are not known.
    """
    held = [words_of(one) for one in known]
    numbers, tokenizer = dict(held[0]), None
    if wanted.of is not None and wanted.of.folder != known[0].folder:
        numbers, tokenizer = words_of(wanted.of), load_processor(wanted.of)
    others = [word for one in held for word in one] if wanted.union else []
    if more := [word for word in dict.fromkeys([*others, *wanted.rules]) if word not in numbers]:
        tokenizer = _with_words(wanted.of or known[0], known, more)
        numbers = tokenizer.get_vocab()
    first = 0 if wanted.cut or (wanted.of is not None and tokenizer is not None) else _rows(known[0])
    size = max(first, *(number + 1 for number in numbers.values())) if tokenizer is not None or not first else first
    own = [_places(numbers, one, size, _rows(facts)) for one, facts in zip(held, known, strict=True)]
    nameless = numpy.setdiff1d(numpy.arange(first), numpy.fromiter(numbers.values(), numpy.int64))
    own[0][nameless] = nameless
    names = _of_words(known[0], indexes[0])
    made: list[Checkpoint] = []
    for n, (index, facts) in enumerate(zip(indexes, known, strict=True)):
        tensors = dict(index.tensors)
        taken = _filled(own, n, wanted.prefer_first)
        for word, rule in wanted.rules.items():
            if rule.force or own[n][numbers[word]] < 0:
                for number, places in enumerate(taken):
                    places[numbers[word]] = rule.row if number == rule.model else -1
        for name in names:
            parts = [(one.tensors[name], places) for one, places in zip(indexes, taken, strict=True)]
            shape = (size, *index.tensors[name].shape[1:])
            tensors[name] = replace(index.tensors[name], shape=shape, rows=tuple(parts))
        new = replace(index, tensors=tensors)
        made.append(Reworded(**vars(facts), index=new, tokenizer=tokenizer if not n else None, rows=size))
    return made


def _filled(own: Sequence[Places], number: int, prefer_first: bool) -> list[Places]:
    """For one model, the rows that are taken of each: the mean of those that are there is the new row."""
    mine, first = own[number] >= 0, (own[0] >= 0) & prefer_first
    taken = [numpy.where(~mine & ~first, places, -1) for places in own]
    taken[0] = numpy.where(~mine & first, own[0], taken[0])
    taken[number] = numpy.where(mine, own[number], taken[number])
    return taken


def _places(numbers: Mapping[str, int], held: Mapping[str, int], size: int, rows: int) -> Places:
    found = numpy.full(size, -1, numpy.int64)
    for word, number in numbers.items():
        if number < size and held.get(word, rows) < rows:
            found[number] = held[word]
    return found


def words_of(known: Checkpoint) -> dict[str, int]:
    """A tokenizer's words with their numbers, in the order of these."""
    found = words(known.folder)
    if not found:
        raise RequestError(
            f"{known.source} has no tokenizer.json (or vocab.json), so it is not known which row of its embedding is which "
            'word. Put it beside the weights (`tokenizer.save_pretrained(folder)`), or leave `tokenizer` at "same".'
        )
    return {found[number]: number for number in sorted(found)}


def _rows(known: Checkpoint) -> int:
    rows = vocabulary(known.config)
    if not isinstance(rows, int):
        raise RequestError(f"{known.source}: config.json does not say how many words the model has (`vocab_size`).")
    return rows


def _with_words(of: Checkpoint, known: Sequence[Checkpoint], more: Sequence[str]) -> Any:
    """A tokenizer with further words, each as the tokenizer that has it says (special or not)."""
    tokenizer = load_processor(of)
    added: dict[str, Any] = {}
    for one in known:
        for token in load_processor(one).added_tokens_decoder.values():
            added.setdefault(token.content, token)
    tokenizer.add_tokens([added.get(word, word) for word in more])
    return tokenizer


def _of_words(known: Checkpoint, index: TensorIndex) -> list[str]:
    """The stored tensors whose rows are words."""
    model: Any = planned(known)
    ends = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    parameters = {id(one) for end in ends if end is not None for one in end.parameters(recurse=False)}
    if not parameters:
        raise RequestError(f"{known.source}: its class does not say where its embedding is.")
    own = {name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in parameters}
    built = built_names(model, index.tensors)
    return [name for name in index.tensors if built[name] in own]


def words(folder: Path) -> dict[int, str]:
    """A folder's words by number, from tokenizer.json or vocab.json; none where it has neither."""
    if (folder / "tokenizer.json").exists():
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        listed = (content.get("model") or {}).get("vocab") or {}
        found = (
            {n: w for w, n in listed.items()} if isinstance(listed, dict) else {n: w[0] for n, w in enumerate(listed)}
        )
        return found | {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    if (folder / "vocab.json").exists():
        return {n: w for w, n in json.loads((folder / "vocab.json").read_text(encoding="utf-8")).items()}
    return {}
