"""Needle: remove a concept by the value vectors that carry it, and touch nothing else.

Hong, Yu, Yang, Ravfogel and Geva, "Intrinsic Test of Unlearning Using Parametric Knowledge Traces", EMNLP 2025,
arXiv:2406.11614.

    v <- v + N(0, sigma^2 I)
    then, in "ascent", up the loss of `forget`:   L(v) = mean over answer tokens of log pi_v(y_t | x, y_<t)

v is a column of one MLP's down projection: d numbers for each vector, and every other number of the model keeps its bits.

How it differs from the paper and its code:

1. What trains is the d numbers alone, cut out of their matrix. The code masks the gradient of the whole matrix; AdamW's
   decay still shrinks the other columns then, by rate times decay a step, and the embeddings likewise.
2. The paper's rate, 0.2, is for one vector of a 7B model after noise of 0.1. A rate above a hundred times the size of the
   vectors' numbers is refused.
3. The ascent has no lower bound, so it ends as in `forget.gradient_ascent` (`stop_at`, `retain_drop`); noise that has
   done as much alone is followed by none.
4. `edit="zero"` takes the vector out. Vectors that are not given are found by their score on `forget` and `retain`, as in
   `inspect.concept_vectors`, which also tells whether the concept rests on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.utils import parametrize

from overhaul import session
from overhaul.data.examples import Examples, Rows
from overhaul.errors import RequestError, RunError
from overhaul.finite import check_given
from overhaul.forget._training import Training, limit_of, unlearn
from overhaul.forget.gradient_ascent import ga_term
from overhaul.method import Outcome, Table, method
from overhaul.objectives import check_labelled, units
from overhaul.references import reference_nll
from overhaul.value_vectors import Location, ValueVectors, Writer, parsed
from overhaul.value_vectors.search import activities, best_of, concept_words, ranked

NAME = "forget.needle"
FASTEST = 100.0
"""A step of AdamW changes each number by the rate; more than so many times its size is no step."""


@method(verb="forget", paper="2406.11614", changes="weights", rank=lambda knobs: 1, makes={"vectors": "rows"})
def needle(
    model: nn.Module,
    forget: Examples | None = None,
    retain: Examples | None = None,
    vectors: Rows | None = None,
    *,
    edit: Literal["ascent", "noise", "zero"] = "ascent",
    sigma: Annotated[float, Ge(0)] = 0.1,
    at: str = "",
    count: Annotated[int, Ge(1)] = 1,
    words: str = "",
    k: Annotated[int, Ge(1)] = 200,
    contrast: Annotated[float, Ge(1)] = 2.0,
    training: Training = Training(lr=0.2, epochs=1.0),
) -> Outcome:
    """Remove a concept by changing the MLP value vectors that carry it: d numbers each, and nothing else.

    Args:
        model: a causal language model, changed in place.
        forget: text about the concept: for "ascent", and to find vectors.
        retain: text about something else: to find vectors; in "ascent" watched, see `retain_drop`.
        vectors: places of vectors, rows with `layer`, `index` and for a mixture `expert`: what `inspect.concept_vectors`
            made, or a file. Else they are found in `forget` and `retain`.
        edit: noise and then training up the loss of `forget`; noise alone; or zero.
        sigma: standard deviation of the noise on each number; 0 for none.
        at: places of vectors, layer:index or layer:expert:index, with commas between them.
        count: vectors to find.
        words: those that the concept is known by, with commas between them, instead of what tells `forget` from `retain`.
        k: tokens that a vector is read by, to find it.
        contrast: a token belongs to the concept if it is so many times as frequent in `forget` as in `retain`.
        training: length, rate and limits of the ascent.

    Returns:
        The model. Facts: how many numbers were changed, and of the ascent what `forget.gradient_ascent` says. Table: every
        vector's length before, how far it was moved, and the cosine. `made["vectors"]` are the places.

    Raises:
        RequestError: nothing says which vectors, or nothing would change them; a place that the model does not have; a rate
            that is out of proportion; weights that are not finite, or noise that makes them so.
        RunError: nothing was changed; training diverged (the last good weights are kept).
    """
    for role, given in (("forget", forget), ("retain", retain), ("vectors", vectors)):
        if given is not None and not len(given):
            raise RequestError(f"{NAME}: the role `{role}` is empty. Leave it out, or give it.")
    if edit == "ascent" and forget is None:
        raise RequestError(
            f'{NAME}: an ascent needs the role `forget`. Give it, or write edit: "noise" or edit: "zero".'
        )
    if edit == "noise" and not sigma:
        raise RequestError(f"{NAME}: noise of sigma=0 changes nothing. Write a larger one, such as 0.1.")
    own = ValueVectors.of(model, NAME)
    rows = [*(vectors or []), *(parsed(at, "at") if at else [])]
    if rows:
        locations = own.located(rows, NAME)
        session.begins()
        check_given(NAME, model)
    else:
        locations = _found(own, forget, retain, words, count, k, contrast, training.batch_size)
    before = torch.stack([own.vector(one) for one in locations])
    draw = torch.Generator().manual_seed(torch.initial_seed())
    noise = sigma * torch.randn(before.shape, generator=draw)
    start = torch.zeros_like(before) if edit == "zero" else before + noise
    _check_held(own, locations, start, sigma)
    outcome = Outcome(model)
    if edit == "ascent":
        assert forget is not None
        try:
            outcome = _ascend(own, locations, start, sigma, forget, retain, training)
        except RequestError:  # the noise is in the model by then
            _write(own, locations, before)
            raise
    else:
        _write(own, locations, start)
    moved = torch.stack([own.vector(one) for one in locations])
    changed = int((moved != before).sum())
    if not changed:
        raise RunError(f"{NAME} changed no number of {len(locations)} vectors: {_why(edit, before, outcome.facts)}")
    outcome.facts = {"vectors": len(locations), "numbers_changed": changed, **outcome.facts}
    outcome.tables["vectors"] = _table(locations, before, moved)
    outcome.made["vectors"] = [one.row() for one in locations]
    return outcome


def _check_held(own: ValueVectors, locations: Sequence[Location], start: Tensor, sigma: float) -> None:
    """Refuse vectors that the weights cannot hold, or whose lengths cannot be told, before any is written."""
    for location, vector in zip(locations, start, strict=True):
        dtype = own.weight(own.writers[location.layer].parameter).dtype
        if not vector.to(dtype).isfinite().all() or not vector.norm().isfinite():
            raise RequestError(
                f"{NAME}: noise of sigma={sigma:g} makes the vector {location} larger than {dtype} holds. Write a smaller "
                "sigma, such as 0.1."
            )


def _why(edit: str, before: Tensor, facts: Mapping[str, object]) -> str:
    """Why nothing has changed, and what would."""
    if edit == "zero":
        return "they are zero already. Name other vectors."
    if said := facts.get("stopped_because"):
        return f"{said}, so nothing was to be done. Raise `stop_at`, or set sigma."
    size = float(before.square().mean().sqrt())
    return f"what was added is too small for weights of size {size:.2g} in their dtype. Write a larger sigma or lr."


def _found(
    own: ValueVectors,
    forget: Examples | None,
    retain: Examples | None,
    words: str,
    count: int,
    k: int,
    contrast: float,
    batch_size: int,
) -> list[Location]:
    """The best vectors for what tells `forget` from `retain`."""
    if forget is None or retain is None:
        lacking = "forget" if forget is None else "retain"
        raise RequestError(
            f"{NAME}: nothing says which vectors are meant. Give their places (`vectors`, or at: 20:10513), or text about "
            f"the concept and about something else to find them: the role `{lacking}` is missing."
        )
    size = own.unembedding().words
    if k >= size:
        raise RequestError(f"{NAME}: k={k}, but there are only {size} tokens. Write a smaller k.")
    marks = concept_words(forget, retain, size, contrast, words, NAME, roles=("forget", "retain"))
    session.begins()
    check_given(NAME, own.stack.model)
    (found,) = ranked(own, [marks], [activities(own, forget, batch_size)], k, count)
    return [one.location for one in best_of(found, count, NAME)]


@torch.no_grad()
def _write(own: ValueVectors, locations: Sequence[Location], values: Tensor) -> None:
    for location, value in zip(locations, values, strict=True):
        writer = own.writers[location.layer]
        own.weight(writer.parameter)[writer.place(location)].copy_(value)


def _ascend(
    own: ValueVectors,
    locations: Sequence[Location],
    start: Tensor,
    sigma: float,
    forget: Examples,
    retain: Examples | None,
    training: Training,
) -> Outcome:
    """Train the vectors from `start` on, and nothing else."""
    model, size = own.stack.model, float(start.square().mean().sqrt())
    if not size:
        raise RequestError(
            f"{NAME}: the vectors are zero, so no rate is in proportion to them. Set sigma, or name other vectors."
        )
    if training.lr > FASTEST * size:
        raise RequestError(
            f"{NAME}: lr={training.lr:g} is more than {FASTEST:g} times the size of the vectors' numbers ({size:.2g}), by "
            f"which a step would change them. Write a rate of {size:.1g} to {10 * size:.1g}."
        )
    check_labelled("forget", forget)
    session.begins()
    with _alone(own, locations, start) as trains:
        tokens = max(1, sum(units(batch) for batch in forget.batches(64)))
        limit = limit_of(model, forget, training)
        nats = float(reference_nll(model, forget, training.batch_size).sum()) / tokens
        if limit is not None and nats >= limit:
            by = "noise alone" if sigma else "the model as it is"
            said = f"{by} makes the answers of `forget` cost {nats:.3g} nats a token"
            return Outcome(model, facts={"steps": 0, "stopped_early": "yes", "stopped_because": said})
        outcome = unlearn("needle", model, forget, retain, ga_term("forget"), training, trainable=trains)
    return replace(outcome, model=model)


class _Columns(nn.Module):
    """A matrix with some of its vectors in parameters of their own."""

    def __init__(self, writer: Writer, locations: Sequence[Location], start: Tensor) -> None:
        super().__init__()
        self.places = [writer.place(one) for one in locations]
        self.vectors = nn.Parameter(start)

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix with the vectors in their places; it gets no gradient itself."""
        whole = weight.detach().clone()
        for place, vector in zip(self.places, self.vectors, strict=True):
            whole[place] = vector
        return whole


@contextmanager
def _alone(own: ValueVectors, locations: Sequence[Location], start: Tensor) -> Iterator[Callable[[str], bool]]:
    """Inside the `with`, the vectors are parameters of their own, which it tells by name; they are written back at its end.

    Of bfloat16 weights they are rounded as those are, in every forward.
    """
    names: set[str] = set()
    held: list[tuple[_Columns, list[Location]]] = []
    try:
        with ExitStack() as undo:
            for layer in sorted({one.layer for one in locations}):
                writer = own.writers[layer]
                name = writer.parameter.rpartition(".")[2]
                chosen = [n for n, one in enumerate(locations) if one.layer == layer]
                columns = _Columns(
                    writer, [locations[n] for n in chosen], start[chosen].to(own.weight(writer.parameter))
                )
                parent = own.stack.model.get_submodule(writer.module)
                parametrize.register_parametrization(parent, name, columns, unsafe=True)
                undo.callback(parametrize.remove_parametrizations, parent, name, leave_parametrized=False)
                names.add(f"{writer.module}.parametrizations.{name}.0.vectors")
                held.append((columns, [locations[n] for n in chosen]))
            yield names.__contains__
    finally:  # where training diverged, the last good ones
        for columns, places in held:
            _write(own, places, columns.vectors.detach())


def _table(locations: Sequence[Location], before: Tensor, after: Tensor) -> Table:
    cosines = torch.nn.functional.cosine_similarity(before, after, dim=1).tolist()
    lengths, moved = before.norm(dim=1).tolist(), (after - before).norm(dim=1).tolist()
    return Table(
        ("layer:index", "length before", "moved by", "cosine"),
        tuple(zip(map(str, locations), lengths, moved, cosines, strict=True)),
    )
