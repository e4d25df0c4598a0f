"""Which value vectors stand for a concept: by the tokens they make likely, their length, and how strongly they fire on it.

    C       tokens of the concept: those of its text that are words, and not as common in the text of others
    a       what a vector is multiplied with, at each position of the concept's text but the first of a sample
    score(v, sign)  =  |T_k(sign v) and C| / k  *  ||v||  *  mean max(sign a, 0)

A vector that fires negatively makes the tokens of -v likely, so both signs are looked at. Without the last factor one finds
vectors that never fire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from overhaul import session
from overhaul.data.examples import Examples, collate
from overhaul.errors import RequestError
from overhaul.modes import at_rest
from overhaul.objectives import check_positions
from overhaul.stack.calls import invoke, map_tensors
from overhaul.trace import counted, measure
from overhaul.trace.passing import passing
from overhaul.trace.reductions import wide
from overhaul.value_vectors import Location, ValueVectors

Words = Bool[Tensor, " v"]
"""For each token, whether it belongs to a concept."""

Activity = Float[Tensor, "2 n"]
"""Of each value vector of a block, the mean of its activation where that is positive, and of its negative where not."""


@dataclass(frozen=True)
class Found:
    """A vector that was found.

    Attributes:
        location: where it lies.
        sign: 1, or -1 where it is its negative that stands for the concept.
        score: the product of the rest.
        overlap: the share of its k most likely tokens that belong to the concept.
        norm: its length.
        activation: mean over positions of the part of its activation that has this sign.
    """

    location: Location
    sign: int
    score: float
    overlap: float
    norm: float
    activation: float

    def row(self) -> dict[str, Any]:
        """As a row of a product, which `ValueVectors.located` reads."""
        return {**self.location.row(), "sign": self.sign, "score": self.score}


def concept_words(
    concept: Examples,
    others: Examples,
    vocabulary: int,
    contrast: float,
    words: str,
    method: str,
    roles: tuple[str, str] = ("concept", "others"),
) -> Words:
    """The tokens of a concept.

    Args:
        concept: text about it, with its tokenizer.
        others: text about other things.
        vocabulary: how many tokens there are.
        contrast: a token counts if its share of the tokens in `concept` is at least so many times that in `others`.
        words: those that the concept is known by, with commas between them, instead of what tells the two texts apart.
        method: for messages.
        roles: the two texts, for messages.

    Raises:
        RequestError: there is no tokenizer, or no such token.
    """
    for role, examples in zip(roles, (concept, others), strict=True):
        if examples.kind != "tokens" or examples.processor is None:
            raise RequestError(
                f"{method}: `{role}` is text with a tokenizer, and this is {examples.kind if len(examples) else 'empty'}."
            )
    found = torch.zeros(vocabulary, dtype=torch.bool)
    if words:
        found[_spelt(words, concept.processor, method)] = True
        return found
    ours, theirs = (shares(examples, vocabulary) for examples in (concept, others))
    often = ((ours > 0) & (ours >= contrast * theirs)).nonzero().flatten().tolist()
    found[[token for token in often if is_word(token, concept.processor)]] = True
    if not bool(found.any()):
        raise RequestError(
            f"{method}: nothing tells `{roles[0]}` from `{roles[1]}`: of its {int((ours > 0).sum())} different tokens none "
            f"is a word that is {contrast:g} times as frequent there. Give a `{roles[1]}` that is about something else, "
            "name the words (`words:`), or lower `contrast`."
        )
    return found


def is_word(token: int, tokenizer: Any) -> bool:
    """Whether a token has a letter or digit, stands for itself, and is no stop word of English."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    text = tokenizer.decode([token]).strip().lower()
    is_text = any(character.isalnum() for character in text)
    return is_text and token not in tokenizer.all_special_ids and text not in ENGLISH_STOP_WORDS


def activities(vectors: ValueVectors, examples: Examples, batch_size: int) -> dict[int, Activity]:
    """How strongly each vector fires on a text, by block; a sample's first position does not count.

    What enters an expert is not seen. Its vectors' activations, times the weight that the router gives it, are the gradient
    of what the experts add to one feature; so those are means over each sample first, and parts of a sign after that.
    """
    check_positions(vectors.stack.model, examples)
    single = {layer: writer for layer, writer in vectors.writers.items() if writer.experts is None}
    found = _of_experts(vectors, examples) if len(single) < len(vectors.writers) else {}
    if single:
        sites = {layer: f"into.{writer.module}" for layer, writer in single.items()}
        batches = session.progress(examples.batches(batch_size), "activations", -(-len(examples) // batch_size))
        seen = measure(vectors.stack, batches, list(sites.values()), _halves, skip_first=1)
        found |= {layer: (seen[site][:2] / seen[site][2]).float().cpu() for layer, site in sites.items()}
    return dict(sorted(found.items()))


def ranked(
    vectors: ValueVectors,
    words: Sequence[Words],
    active: Sequence[Mapping[int, Activity]],
    k: int,
    keep: int,
    gain: bool = False,
) -> list[dict[int, list[Found]]]:
    """The best vectors of each block for several concepts, best first; of a vector the better of its two signs.

    Args:
        vectors: of a model.
        words: of each concept.
        active: of each concept, how strongly vectors fire on it, see `activities`.
        k: tokens that a vector is read by.
        keep: vectors of a block.
        gain: read them with the final norm's gain.
    """
    unembedding, marks = vectors.unembedding(gain), torch.stack([*words], dim=1)
    found: list[dict[int, list[Found]]] = [{} for _ in words]
    for layer in session.progress(vectors.writers, "projecting value vectors", len(vectors.writers)):
        norms = vectors.norms(layer)
        tops = unembedding.top(vectors.all(layer), k)
        overlap = torch.stack([_overlap(top, marks) for top in tops])  # [2, n, concepts]
        for place, by_layer in enumerate(found):
            scores = overlap[:, :, place] * norms * active[place][layer]
            best, sign = scores.max(dim=0)
            order = best.argsort(descending=True, stable=True)[:keep].tolist()
            by_layer[layer] = [
                Found(
                    vectors.at(layer, n), 1 - 2 * int(sign[n]), float(best[n]), float(overlap[sign[n], n, place]),
                    float(norms[n]), float(active[place][layer][sign[n], n]),
                )
                for n in order
            ]  # fmt: skip
    return found


def _overlap(top: Tensor, marks: Bool[Tensor, "v c"]) -> Float[Tensor, "n c"]:
    """The share of each vector's tokens that belong to each concept; some vectors at a time."""
    return torch.cat([marks[some].float().mean(dim=1) for some in top.split(4096)])


def best_of(found: Mapping[int, Sequence[Found]], count: int, method: str) -> list[Found]:
    """The best vectors over all blocks.

    Raises:
        RequestError: none is read by a word of the concept and fires on it.
    """
    order = sorted((one for some in found.values() for one in some if one.score > 0), key=lambda one: -one.score)
    if not order:
        raise RequestError(
            f"{method}: no value vector that fires on the text is read by a word of its concept. Raise `k`, or give more "
            "text."
        )
    return order[:count]


def shares(examples: Examples, vocabulary: int) -> Float[Tensor, " v"]:
    """Of each token, its share of those of a text."""
    tokens = torch.cat([item["input_ids"] for item in examples.items])
    return torch.bincount(tokens, minlength=vocabulary)[:vocabulary].double() / len(tokens)


def _spelt(words: str, tokenizer: Any, method: str) -> list[int]:
    """The tokens of some words: each spelling that is one token; where none is, the longest part of each."""
    found: set[int] = set()
    for word in filter(None, (part.strip() for part in words.split(","))):
        spellings = {
            f"{space}{form}" for space in ("", " ") for form in (word, word.lower(), word.capitalize(), word.upper())
        }
        cut = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in sorted(spellings)]
        unknown = getattr(tokenizer, "unk_token_id", None)
        cut = [[token for token in ids if token != unknown and tokenizer.decode([token]).strip()] for ids in cut]
        whole = {ids[0] for ids in cut if len(ids) == 1}
        found |= whole or {max(ids, key=lambda token: len(tokenizer.decode([token]).strip())) for ids in cut if ids}
    if not found:
        raise RequestError(f"{method}: words={words!r} has no token. Write words with commas between them.")
    return sorted(found)


def _halves(state: Tensor, mask: Tensor) -> Tensor:
    """Sums of the positive and of the negative parts of each activation, and the number of positions, [3, inner]."""
    rows = wide(counted(state, mask))
    return torch.stack([rows.clamp_min(0).sum(0), -rows.clamp_max(0).sum(0), torch.full_like(rows[0], len(rows))])


def _of_experts(vectors: ValueVectors, examples: Examples) -> dict[int, Activity]:
    mixed = {layer: writer for layer, writer in vectors.writers.items() if writer.experts is not None}
    model: Any = vectors.stack.model
    weights = {layer: model.get_parameter(writer.parameter) for layer, writer in mixed.items()}
    sums = {layer: torch.zeros(2, len(vectors.all(layer)), dtype=torch.float64) for layer in mixed}
    device, count = next(model.parameters()).device, 0
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        model.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for item in session.progress(examples.items, "activations of experts", len(examples)):
            length = len(item["input_ids"])
            if length < 2:
                continue
            batch = map_tensors(collate([item]), lambda tensor: tensor.to(device))
            with at_rest(model), torch.enable_grad(), passing(model, [one.module for one in mixed.values()]) as seen:
                invoke(model, batch)
            for layer, writer in mixed.items():
                feature = seen[writer.module].reshape(length, -1)[1:, 0].sum()
                (gradient,) = torch.autograd.grad(feature, weights[layer], retain_graph=True, allow_unused=True)
                if gradient is not None:
                    total = writer.rows(gradient)[:, 0].double().cpu()
                    sums[layer] += torch.stack([total.clamp_min(0), -total.clamp_max(0)])
            count += length - 1
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])
    if not count:
        raise RequestError("No text has two tokens, and the first of each does not count. Give longer texts.")
    return {layer: (total / count).float() for layer, total in sums.items()}
