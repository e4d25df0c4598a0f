"""What a text costs without some value vectors, beside vectors that it should not rest on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from overhaul import session
from overhaul.data.examples import IGNORED, Batch, Examples
from overhaul.errors import RequestError
from overhaul.objectives import evaluate, token_nll
from overhaul.value_vectors import Location, ValueVectors
from overhaul.value_vectors.search import Words

CLOSEST = 32
"""A control is drawn among so many vectors of the same block whose length is closest."""


def rises(
    vectors: ValueVectors,
    sets: Mapping[str, Sequence[Location]],
    texts: Mapping[str, tuple[Examples, Words]],
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """How many nats a word of each text costs more where a set of vectors is zero, by set and text.

    Args:
        vectors: of the model, which is as it was afterwards, bit for bit.
        sets: of locations.
        texts: each with the tokens that count in it.
        batch_size: examples in one forward.

    Raises:
        RequestError: no such token carries loss.
    """
    before = {name: _nats(vectors, name, *text, batch_size) for name, text in texts.items()}
    found: dict[str, dict[str, float]] = {}
    for name, locations in session.progress(sets.items(), "ablating value vectors", len(sets)):
        with ablated(vectors, locations):
            after = {text: _nats(vectors, text, *given, batch_size) for text, given in texts.items()}
        found[name] = {text: after[text] - before[text] for text in texts}
    return found


@contextmanager
def ablated(vectors: ValueVectors, locations: Sequence[Location]) -> Iterator[None]:
    """Inside the `with`, these vectors of a model in memory are zero; afterwards they are the same bits as before."""
    places: list[tuple[Tensor, Tensor]] = []
    for location in locations:
        writer = vectors.writers[location.layer]
        column = vectors.weight(writer.parameter)[writer.place(location)]
        places.append((column, column.clone()))
    try:
        for column, _ in places:
            column.zero_()
        yield
    finally:
        for column, kept in places:
            column.copy_(kept)


def matched(vectors: ValueVectors, locations: Sequence[Location], draw: torch.Generator) -> list[Location]:
    """As many other vectors, each of the block of one of these and about as long, drawn at random."""
    taken, found = set(locations), list[Location]()
    norms = {layer: vectors.norms(layer) for layer in {one.layer for one in locations}}
    for location in locations:
        lengths = norms[location.layer]
        apart = (lengths - lengths[vectors.writers[location.layer].number(location)]).abs()
        free = [one for n in apart.argsort().tolist() if (one := vectors.at(location.layer, n)) not in taken]
        if not free:
            raise RequestError(
                f"Block {location.layer} has no vector left to draw a control from. Look at fewer vectors."
            )
        found.append(free[int(torch.randint(min(CLOSEST, len(free)), (1,), generator=draw))])
        taken.add(found[-1])
    return found


def _nats(vectors: ValueVectors, name: str, examples: Examples, words: Words, batch_size: int) -> float:
    """Nats a token that counts, over those that carry loss."""

    def sums(logits: Tensor, batch: Batch) -> Tensor:
        labels = batch["labels"][:, 1:]
        counts = words.to(labels.device)[labels.clamp_min(0)] & (labels != IGNORED)
        return torch.stack([token_nll(logits, batch["labels"])[counts].double().sum(), counts.sum().double()]).cpu()

    total = sum(evaluate(vectors.stack.model, sums, list(examples.batches(batch_size))), torch.zeros(2).double())
    if not total[1]:
        raise RequestError(
            f"inspect.concept_vectors: of the {int(words.sum())} words of `{name}` none carries loss in it, so what they "
            "cost cannot be measured. Give text, or answers, that hold them; or other `words`."
        )
    return float(total[0] / total[1])
