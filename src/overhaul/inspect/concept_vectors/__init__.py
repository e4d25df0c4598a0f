"""Concept vectors: the MLP value vectors that carry a concept, and what unlearning left of them.

Hong, Yu, Yang, Ravfogel and Geva, "Intrinsic Test of Unlearning Using Parametric Knowledge Traces", EMNLP 2025,
arXiv:2406.11614.

    v_lj           what unit j of the MLP of block l adds to the stream for each unit of its activation (a column of the
                   down projection); T_k(v) the k tokens with the largest logits E v
    score          |T_k(v) and C| / k  *  ||v||  *  mean activation on the concept's text      (C: the concept's tokens)
    validation     nats that words of the concept cost more where the best vectors are zero
    trace          the same vectors before and after: cosine, distance, Jaccard of T_k; see `traces`

Unlearning that only suppresses an answer leaves the vectors as they were, and what is left can be brought back.

How it differs from the paper and its code:

1. Vectors are found from text by the score, both signs of each looked at. The paper has a language model grade top tokens of
   each layer, and people check them.
2. Validation sets the vectors to zero and measures nats on the concept's words and on others'. Controls are random vectors
   of the same blocks and lengths, and the vectors of the other text. The paper adds noise (`forget.needle` does) and
   compares greedy answers; its notebook lets the noise of one concept stay for the next. Here vectors are put back bit
   for bit.
3. Tokens after the edit are read by the unembedding of before, and once more by its own (the code has only its own).
4. One normalised number, the trace that is retained, beside the trace of other vectors of the same blocks and lengths, which
   shows what training moved anyway.
5. `norm="gain"` reads vectors with the gain of the final norm, which the paper leaves out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import nn

from overhaul import session
from overhaul.data.examples import Examples, Rows
from overhaul.errors import RequestError
from overhaul.finite import check_given
from overhaul.inspect.concept_vectors.ablation import matched, rises
from overhaul.inspect.concept_vectors.traces import Chance, Trace, traces
from overhaul.method import Outcome, Table, method
from overhaul.models import Checkpoint
from overhaul.pairs import corresponding
from overhaul.value_vectors import Location, ValueVectors, parsed
from overhaul.value_vectors.search import Found, Words, activities, best_of, concept_words, ranked, shares

NAME = "inspect.concept_vectors"
IN_A_LAYER = 10
"""Vectors of each block that are drawn."""
LISTED = 100
"""Words of the concept that are listed."""
SHOWN = 12
"""Tokens that a vector is shown with."""


@method(verb="inspect", paper="2406.11614", changes="nothing", memory="forward", makes={"vectors": "rows"})
def concept_vectors(
    model: nn.Module,
    concept: Examples | None = None,
    others: Examples | None = None,
    vectors: Rows | None = None,
    before: Checkpoint | None = None,
    after: Checkpoint | None = None,
    *,
    words: str = "",
    at: str = "",
    count: Annotated[int, Ge(1)] = 8,
    k: Annotated[int, Ge(1)] = 200,
    contrast: Annotated[float, Ge(1)] = 2.0,
    norm: Literal["none", "gain"] = "none",
    controls: Annotated[int, Ge(1)] = 5,
    batch_size: Annotated[int, Ge(1)] = 8,
) -> Outcome:
    """Find the value vectors of an MLP that carry a concept, and say what is left of them in another checkpoint.

    Give `concept` and `others` to find vectors, or their places (`vectors`, `at`); and `before` or `after` to compare. The
    other checkpoint is read from its files, a matrix at a time.

    Args:
        model: a causal language model. It stays as it is.
        concept: text about the concept.
        others: text about something else, which the concept's words are told by and which is the control.
        vectors: places found before, rows with `layer`, `index` and for a mixture `expert`: what an earlier step of this
            method made, or a file.
        before: the original of which `model` is an edited version. The vectors are those found in the original.
        after: an edited version of `model`.
        words: those that the concept is known by, with commas between them, instead of what tells `concept` from `others`.
        at: places of vectors, layer:index or layer:expert:index, with commas between them.
        count: vectors to find.
        k: tokens that a vector is read by.
        contrast: a token belongs to the concept if it is so many times as frequent in it as in `others`.
        norm: what vectors are read by: the output head alone, or with the gain of the final norm.
        controls: random draws of each control.
        batch_size: examples in one forward; does not change the values.

    Returns:
        No model. Facts: how many nats words of the concept and of the others cost more without the vectors, and without
        those of each control; means over the vectors of each measure of the trace, and the trace that is retained. Tables:
        the words of the concept, on which all scores rest (the 100 most frequent), with their shares of both texts, score
        by block and rank, the vectors with their most likely tokens, what each set of vectors costs where it is
        zero, and each vector's trace. Layers: best score. `made["vectors"]` are the places.

    Raises:
        RequestError: nothing says which vectors; one text without the other; no token tells them apart; a place that the
            model does not have; a checkpoint that does not correspond; or weights that are not finite.
    """
    own = ValueVectors.of(model, NAME)
    _check(concept, others, vectors, at, before, after)
    if k >= own.unembedding().words:
        raise RequestError(f"{NAME}: k={k}, but there are only {own.unembedding().words} tokens. Write a smaller k.")
    texts = _Texts.of(concept, others, own, contrast, words)
    given = [*(vectors or []), *(parsed(at, "at") if at else [])]
    looked = _Looked.at_places(own, given) if given else None
    other = before or after
    if other is not None:
        corresponding(NAME, {"model": model, "before" if before else "after": other})
    session.begins()
    check_given(NAME, model)
    twin = own.stored(other) if other is not None else None
    original = twin if before and twin else own
    gain, draw = norm == "gain", torch.Generator().manual_seed(torch.initial_seed())
    found: list[dict[int, list[Found]]] = []
    if looked is None:
        assert texts is not None
        active = [activities(own, one, batch_size) for one in (texts.concept, texts.others)]
        found = ranked(own, [texts.words, texts.their_words], active, k, max(count, IN_A_LAYER), gain)
        looked = _Looked.of(best_of(found[0], count, NAME))
    result = Outcome(None, facts={"vectors": len(looked.locations)}, made={"vectors": looked.rows})
    if found:
        _say_found(result, found[0], looked, texts)
    if texts is not None:
        result.tables["words of the concept"] = texts.table
    _say_vectors(result, original, looked, k, gain, concept)
    if texts is not None and before is None:
        _validate(result, own, texts, looked, found, controls, count, draw, batch_size)
    if twin is not None:
        sides = (twin, own) if before else (own, twin)
        _compare(result, *sides, looked, k, controls, draw, gain, texts)
    return result


@dataclass(frozen=True)
class _Texts:
    """The two texts, each with the words that count in it."""

    concept: Examples
    others: Examples
    words: Words
    their_words: Words

    @classmethod
    def of(
        cls, concept: Examples | None, others: Examples | None, vectors: ValueVectors, contrast: float, words: str
    ) -> _Texts | None:
        if concept is None or others is None:
            return None
        size = vectors.unembedding().words
        ours = concept_words(concept, others, size, contrast, words, NAME)
        theirs = concept_words(others, concept, size, contrast, "", NAME, roles=("others", "concept"))
        return cls(concept, others, ours, theirs & ~ours)

    @property
    def table(self) -> Table:
        """What all scores rest on: the concept's tokens, the most frequent first, with their shares of both texts."""
        ours, theirs = (shares(one, len(self.words)) for one in (self.concept, self.others))
        tokens = sorted(self.words.nonzero().flatten().tolist(), key=lambda token: (-float(ours[token]), token))
        decode: Any = self.concept.processor
        rows = [(repr(decode.decode([one])), float(ours[one]), float(theirs[one])) for one in tokens[:LISTED]]
        return Table(("token", "share of concept", "share of others"), tuple(rows))


@dataclass(frozen=True)
class _Looked:
    """The vectors that are looked at, whether each is read as it is (1) or negated (-1), and their rows as a product."""

    locations: list[Location]
    signs: list[int]
    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, found: Sequence[Found]) -> _Looked:
        return cls([one.location for one in found], [one.sign for one in found], [one.row() for one in found])

    @classmethod
    def at_places(cls, vectors: ValueVectors, given: Rows) -> _Looked:
        locations = vectors.located(given, NAME)
        known = {vectors.located([row], NAME)[0]: row for row in reversed(given)}
        signs = [-1 if known[one].get("sign") == -1 else 1 for one in locations]
        scores = ({"score": score} if isinstance(score := known[one].get("score"), float) else {} for one in locations)
        rows = [{**one.row(), "sign": sign, **score} for one, sign, score in zip(locations, signs, scores, strict=True)]
        return cls(locations, signs, rows)


def _check(
    concept: Examples | None,
    others: Examples | None,
    vectors: Rows | None,
    at: str,
    before: Checkpoint | None,
    after: Checkpoint | None,
) -> None:
    """Refuse what leaves open which vectors are meant, or what they are compared with."""
    if before is not None and after is not None:
        raise RequestError(f"{NAME}: `before` and `after` are both given. Give one: the other is the model itself.")
    for role, examples in (("concept", concept), ("others", others)):
        if examples is not None and not len(examples):
            raise RequestError(f"{NAME}: the role `{role}` has no examples.")
    if vectors is not None and not len(vectors):
        raise RequestError(f"{NAME}: the role `vectors` has no rows. Leave it out to find vectors in `concept`.")
    if (concept is None) != (others is None):
        missing, there = ("others", "concept") if others is None else ("concept", "others")
        raise RequestError(
            f"{NAME}: `{there}` is given without `{missing}`: with one text alone nothing tells the concept's words from "
            f"common ones, and nothing is a control. Give text about something else as `others`."
        )
    if vectors is not None or at:
        return
    if concept is None:
        raise RequestError(
            f"{NAME}: nothing says which vectors are meant. Give text about the concept (`concept`) and about other things "
            "(`others`), or places (`vectors`, or at: 20:10513)."
        )
    if before is not None:
        raise RequestError(
            f"{NAME}: the vectors of a concept are those of the original, and the model here is the edited one. Find them "
            "in a step before the edit and name them (vectors: {made: inspect.concept_vectors, name: vectors}), or make the "
            "original the recipe's model and the edited one `after`."
        )


def _say_found(result: Outcome, found: dict[int, list[Found]], looked: _Looked, texts: _Texts | None) -> None:
    """Scores by block and rank."""
    assert texts is not None
    best = result.made["vectors"][0]["score"]
    chance = float(texts.words.double().mean())
    result.facts |= {"best_score": best, "words": int(texts.words.sum()), "overlap_of_chance": chance}
    result.layers["best score"] = {layer: some[0].score for layer, some in found.items()}
    shown = min(IN_A_LAYER, min(map(len, found.values())))
    result.tables["score of the best vectors of each block"] = Table.grid(
        [[one.score for one in some[:shown]] for some in found.values()],
        list(found), range(1, shown + 1), along="block", across="rank in the block", unit="score",
    )  # fmt: skip


def _say_vectors(
    result: Outcome, vectors: ValueVectors, looked: _Looked, k: int, gain: bool, concept: Examples | None
) -> None:
    """The vectors with the tokens that they are read by."""
    stacked = torch.stack(
        [sign * vectors.vector(one) for one, sign in zip(looked.locations, looked.signs, strict=True)]
    )
    tops = vectors.unembedding(gain).top(stacked, min(k, SHOWN))[0].tolist()
    tokenizer = concept.processor if concept is not None else None
    rows = []
    for n, (location, sign) in enumerate(zip(looked.locations, looked.signs, strict=True)):
        told = [repr(tokenizer.decode([token])) if tokenizer else str(token) for token in tops[n]]
        score = looked.rows[n].get("score")
        rows.append((str(location), "+" if sign > 0 else "-", score, float(stacked[n].norm()), " ".join(told)))
    said = "most likely tokens" if tokenizer else "most likely tokens (numbers)"
    result.tables["vectors"] = Table(("layer:index", "sign", "score", "length", said), tuple(rows))


def _validate(
    result: Outcome,
    vectors: ValueVectors,
    texts: _Texts,
    looked: _Looked,
    found: list[dict[int, list[Found]]],
    controls: int,
    count: int,
    draw: torch.Generator,
    batch_size: int,
) -> None:
    """What the texts cost without the vectors, and without those of the controls."""
    sets: dict[str, Sequence[Location]] = {"of the concept": looked.locations}
    theirs = sorted((one for some in (found[1].values() if found else ()) for one in some), key=lambda one: -one.score)
    own = set(looked.locations)
    chosen = [one.location for one in theirs if one.score > 0 and one.location not in own][:count]
    if chosen:
        sets["of the others"] = chosen
    drawn = [f"random {n + 1}" for n in range(controls)]
    sets |= {name: matched(vectors, looked.locations, draw) for name in drawn}
    measured = {"concept": (texts.concept, texts.words), "others": (texts.others, texts.their_words)}
    cost = rises(vectors, sets, measured, batch_size)
    for text in measured:
        result.facts[f"{text}_nats_without"] = cost["of the concept"][text]
        result.facts[f"{text}_nats_without_random"] = statistics.fmean(cost[name][text] for name in drawn)
    result.facts["concept_nats_without_random_most"] = max(cost[name]["concept"] for name in drawn)
    if chosen:
        result.facts["concept_nats_without_those_of_others"] = cost["of the others"]["concept"]
    result.tables["what it costs without them"] = Table.grid(
        [[row[text] for text in measured] for row in cost.values()], list(cost), list(measured),
        along="vectors that are zero", across="words of", unit="nats a word more",
    )  # fmt: skip


MEASURES = ("cosine", "distance", "relative", "jaccard", "jaccard_own", "kept", "retained")
SAID = ("cosine", "distance", "distance / length", "Jaccard", "Jaccard, own head", "words kept", "retained")


def _compare(
    result: Outcome,
    before: ValueVectors,
    after: ValueVectors,
    looked: _Looked,
    k: int,
    controls: int,
    draw: torch.Generator,
    gain: bool,
    texts: _Texts | None,
) -> None:
    """The trace of the vectors, and of as many others that are as long."""
    said = texts.words if texts else None
    found, chances = traces(before, after, looked.locations, looked.signs, k, controls, draw, gain, said)
    random = matched(before, looked.locations, draw)
    control, _ = traces(before, after, random, looked.signs, k, controls, draw, gain, None)
    for name in MEASURES:
        known = [value for one in found if (value := getattr(one, name)) is not None]
        result.facts[f"trace_{name}"] = statistics.fmean(known) if known else None
    result.facts["trace_retained_by_random_vectors"] = statistics.fmean(one.retained for one in control)
    result.facts["chance_cosine"] = statistics.fmean(one.cosine for one in chances)
    result.facts["chance_jaccard"] = statistics.fmean(one.jaccard for one in chances)
    result.tables["traces"] = Table(
        ("layer:index", *SAID),
        tuple((str(one.location), *(getattr(one, name) for name in MEASURES)) for one in found),
    )
    result.tables["trace of each vector"] = _points(found, control, chances)


def _points(found: Sequence[Trace], control: Sequence[Trace], chances: Sequence[Chance]) -> Table:
    dots = [(f"{one.location}", one.cosine, one.jaccard) for one in found]
    several = {"other vectors, mean": control, "random ones in their place, mean": chances}
    for name, some in several.items():
        dots.append((name, statistics.fmean(c.cosine for c in some), statistics.fmean(c.jaccard for c in some)))
    return Table.points(dots, x="cosine before and after", y="Jaccard of tokens")
