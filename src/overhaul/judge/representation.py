"""Does a model forget, or only hide? What its layers still hold, read by lens, probe, similarity and patching.

    lens     log p_l(y | x) = mean_t log softmax(head(norm(h_l)))[y_t],  h_l the stream after l blocks
    probe    argmax_c (W z(h_l) + b)_c,  logistic regression on the standardised state after l blocks
    CKA      |Y'X|^2 / (|X'X| |Y'Y|),  columns centred, Frobenius norms
    depth    the share of blocks of the unlearned model after which the original has lost the answer for good

The logit lens, linear CKA (Kornblith et al., arXiv:1905.00414), and activation patching from the unlearned into the
original model, layer by layer. A layer is a number of blocks: 0 is what enters the first, the last one what leaves all.

1. Norm and head of the lens are whatever the model does after its last block (softcaps, projections), run by the model
   itself; the last layer of the lens is the model's own answer.
2. A probe finds what can be told apart, not what the model uses. It stands beside the majority class and beside the same
   probe trained on shuffled labels, and says something about forgetting only beside a retrained model.
3. CKA is accumulated over batches as products of features, [d, d] in float64: no matrix of samples against samples.
4. Patching reads a stream with blocks that were trained on another. What they cannot read counts as gone, so a model
   that was trained from other weights can have depth 0 whatever it knows; look at questions that it kept as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from overhaul.data.examples import IGNORED, Examples
from overhaul.errors import RequestError
from overhaul.judge._layers import Products, batches, check, moved, predicting, summaries
from overhaul.judge._layers import answers as answers
from overhaul.modes import at_rest
from overhaul.stack import LayerStack
from overhaul.stack.calls import Calls, State
from overhaul.trace.flow import states

STEPS = 5000
"""Most iterations of a probe's solver."""


@dataclass(frozen=True)
class Lens:
    """What the output head makes of every layer.

    Attributes:
        logp: layer -> example -> mean log-probability of the answer's tokens in nats.
        whole: layer -> example -> whether every token of the answer was the most probable one.
    """

    logp: list[list[float]]
    whole: list[list[bool]]

    @property
    def probability(self) -> list[float]:
        """Layer -> mean over the examples of P(y|x), the geometric mean of the answer's token probabilities."""
        return [statistics.fmean(map(math.exp, layer)) for layer in self.logp]

    @property
    def best(self) -> int:
        """The layer at which the answers are most probable; the earliest of equals."""
        return max(range(len(self.logp)), key=lambda layer: self.probability[layer])


@dataclass(frozen=True)
class Probe:
    """How well a linear probe tells labels apart.

    Attributes:
        accuracy: layer -> share of the test examples that are told.
        recall: label -> layer -> share of its own test examples that are told; labels without any are left out.
        majority: share of the test examples that have the most common label of the training examples.
        shuffled: layer -> accuracy of the same probe when the training labels were shuffled: chance.
    """

    accuracy: list[float]
    recall: Mapping[Hashable, list[float]]
    majority: float
    shuffled: list[float]


@dataclass(frozen=True)
class Depth:
    """What the original says when its first layers are the unlearned model's.

    Attributes:
        original: mean over the examples of the answer's mean log-probability, in nats, with nothing patched.
        curve: the same with the stream after l blocks of the unlearned model in place of its own, for l = 0 to all.
    """

    original: float
    curve: list[float]

    @property
    def gone(self) -> float:
        """The share of blocks after which the answer is gone for good: 0 from the start, 1 in the last block alone.

        Gone is below the middle between original and last layer: NaN where that lost nothing, and vague where little.
        """
        end = self.curve[-1]
        if not end < self.original:
            return math.nan
        known = [layer for layer, value in enumerate(self.curve) if value > (self.original + end) / 2]
        return (known[-1] + 1 if known else 0) / (len(self.curve) - 1)


@torch.no_grad()
def lens(model: nn.Module, examples: Examples) -> Lens:
    """The logit lens at the positions that predict answer tokens (or the class of an image).

    Args:
        model: a language model, or an image model whose blocks all have one shape; left as it was.
        examples: sequences whose labels mark the answer, or images.

    Raises:
        RequestError: an example has no answer, the model has no stack of blocks or one in stages, or its blocks cannot
            be run by hand.
        RunError: a layer's output is not finite.
    """
    check(examples)
    stack = LayerStack.of(model)
    if len(stack.lists) > 1:
        raise RequestError(
            f"The blocks of {type(model).__name__} come in stages of other shapes, which its head cannot read; use `probe`."
        )
    logp = [[math.nan] * len(examples) for _ in range(len(stack) + 1)]
    whole = [[False] * len(examples) for _ in logp]
    with at_rest(model):
        for places, batch in batches(model, examples):
            calls = Calls.record(stack, batch)
            for layer, state in enumerate(states(calls)):
                for place, mean, told in zip(places, *answers(calls.finish(state), batch), strict=True):
                    logp[layer][place], whole[layer][place] = mean, told
    return Lens(logp, whole)


def probe(model: nn.Module, train: Examples, test: Examples, by: str | None = None) -> Probe:
    """Train a linear probe on the state after every layer: of the last prompt token, or the mean over an image.

    Args:
        model: a language or image model; left as it was.
        train: what the probe learns: at least two labels, each with two examples or more.
        test: what it is judged on; other examples of the same labels.
        by: the row column that holds the label; the image's class if None.

    Raises:
        RequestError: a row lacks the column, a label has a single training example or none, there is one label only,
            examples have no prompt, or the model's blocks cannot be found or run by hand.
        RunError: a state is not finite.
    """
    taught, asked = _labels(train, by), _labels(test, by)
    classes = _classes(taught, asked)
    order = torch.randperm(len(taught), generator=torch.Generator().manual_seed(0)).tolist()
    layers = list(zip(summaries(model, train), summaries(model, test), strict=True))

    def hits(known: Tensor, new: Tensor, labels: Sequence[Any]) -> list[bool]:
        told = classifier(known, [classes.index(label) for label in labels]).predict(new.numpy())
        return [classes[n] == label for n, label in zip(told, asked, strict=True)]

    found = [hits(known, new, taught) for known, new in layers]
    recall = {
        label: [statistics.fmean(hit for hit, own in zip(layer, asked, strict=True) if own == label) for layer in found]
        for label in classes
        if label in asked
    }
    return Probe(
        accuracy=list(map(statistics.fmean, found)),
        recall=recall,
        majority=asked.count(statistics.mode(taught)) / len(asked),
        shuffled=[statistics.fmean(hits(known, new, [taught[n] for n in order])) for known, new in layers],
    )


def check_probe(train: Examples, test: Examples, by: str | None) -> None:
    """Refuse what `probe` cannot learn, before anything is run. Arguments and errors are those of `probe`."""
    _classes(_labels(train, by), _labels(test, by))


def classifier(known: Float[Tensor, "n d"], labels: Sequence[int]) -> Any:
    """Scikit-learn's logistic regression, fitted to states that are standardised by what they are themselves."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=STEPS)).fit(known.numpy(), labels)


@torch.no_grad()
def cka(model: nn.Module, other: nn.Module, examples: Examples) -> list[float]:
    """Linear CKA of two models' states after every layer: 1 where one is the other up to rotation and scale.

    Args:
        model: a language or image model; left as it was.
        other: one with as many blocks, of any width; left as it was.
        examples: samples are the positions that predict answer tokens, or images (the mean over each).

    Returns:
        Layer -> CKA, between 0 and 1; NaN at a layer where all samples are alike.

    Raises:
        RequestError: the models differ in depth, an example has no answer, or blocks cannot be found or run by hand.
        RunError: a state is not finite.
    """
    check(examples)
    stacks = _pair(model, other)
    products: dict[int, Products] = {}
    with at_rest(model), at_rest(other):
        for _, batch in batches(model, examples):
            both = [states(Calls.record(stack, moved(batch, stack.model))) for stack in stacks]
            for layer, pair in enumerate(zip(*both, strict=True)):
                first, second = (predicting(state, batch["labels"]) for state in pair)
                if layer not in products:
                    products[layer] = Products(first[0], second[0])
                products[layer].add(first, second)
    return [found.cka() for found in products.values()]


@torch.no_grad()
def depth(unlearned: nn.Module, original: nn.Module, examples: Examples) -> Depth:
    """Patch the stream of the unlearned model into the original, at all positions, after each number of blocks.

    Runs (L + 1) (L + 2) / 2 blocks, and the head L + 2 times, on every batch.

    Args:
        unlearned: left as it was.
        original: the model before unlearning, of the same depth and width; left as it was.
        examples: what was to be forgotten: sequences whose labels mark the answer, or images.

    Raises:
        RequestError: the models differ in depth or width, an example has no answer, or blocks cannot be found or run by
            hand.
        RunError: an output is not finite.
    """
    check(examples)
    stack, own = _pair(unlearned, original)
    sums = [0.0] * (len(own) + 2)
    with at_rest(unlearned), at_rest(original):
        for _, batch in batches(original, examples):
            theirs, ours = Calls.record(stack, moved(batch, unlearned)), Calls.record(own, batch)
            _same_shape(theirs.entering, ours.entering)
            for layer, state in enumerate(states(theirs)):
                state = tuple(None if part is None else part.to(batch["labels"].device) for part in state)
                sums[layer] += _onwards(ours, layer, state)
            sums[-1] += _onwards(ours, 0, ours.entering)
    *curve, whole = (total / len(examples) for total in sums)
    return Depth(whole, curve)


def _onwards(calls: Calls, layer: int, state: State) -> float:
    """The summed mean log-probability of the answers of a batch when the model goes on from this state at this layer."""
    for place in range(layer, len(calls.stack)):
        state = calls.run(place, state)
    return math.fsum(answers(calls.finish(state), dict(calls.inputs))[0])


# what is refused


def _labels(examples: Examples, by: str | None) -> list[Any]:
    """The label of every example, all of which have a prompt or are images."""
    check(examples)
    if examples.kind != "images" and any(int(item["labels"][0]) != IGNORED for item in examples.items):
        raise RequestError("A probe reads the state behind a prompt, and texts have none: encode them as qa or chat.")
    if by is None:
        if examples.kind != "images":
            raise RequestError("Only images have a class of their own: name the row column that holds it, by='person'.")
        return [int(item["labels"]) for item in examples.items]
    if lacking := [place for place, row in enumerate(examples.rows) if by not in row]:
        raise RequestError(
            f"Row {lacking[0]} has no column {by!r} to be told apart by. It has: {sorted(examples.rows[lacking[0]])}."
        )
    return [row[by] for row in examples.rows]


def _classes(taught: Sequence[Any], asked: Sequence[Any]) -> list[Any]:
    """The labels, in the order in which they are met."""
    classes = list(dict.fromkeys(taught))
    if len(classes) < 2:
        raise RequestError(f"A probe tells labels apart; the training examples have {classes[0]!r} alone.")
    few = [label for label in dict.fromkeys([*taught, *asked]) if taught.count(label) < 2]
    if few:
        raise RequestError(
            f"{few[0]!r} has {taught.count(few[0])} training examples, from which no probe can learn it; give two or more."
        )
    return classes


def _pair(model: nn.Module, other: nn.Module) -> tuple[LayerStack, LayerStack]:
    stacks = LayerStack.of(model), LayerStack.of(other)
    if len(stacks[0]) != len(stacks[1]):
        raise RequestError(
            f"The models have {len(stacks[0])} and {len(stacks[1])} blocks, so their layers do not correspond. Compare "
            "models of one depth."
        )
    return stacks


def _same_shape(one: State, two: State) -> None:
    shapes = [[None if part is None else tuple(part.shape) for part in state] for state in (one, two)]
    if shapes[0] != shapes[1]:
        raise RequestError(
            f"The streams of the models have the shapes {shapes[0]} and {shapes[1]}; one can be put in place of the other "
            "only where both are of one width."
        )
