"""Claim of arXiv:2312.15230, its pruning half: Wanda and SparseGPT prune a language model with less harm than magnitude.

The paper prunes OPT and Llama with calibration text from C4; here, the starter's Llama (8 blocks, 2 million parameters) with
prose from Python's reference, judged by the perplexity of held-out prose.

1. Baselines: the dense model and magnitude. Null control: a random mask of equal size, at the same places in every matrix.
2. A seed draws the 128 calibration passages and the random masks; the model is the same. Magnitude draws nothing.
3. What the paper does next, retraining a small part of the weights, needs methods of its own and is not tried here.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from overhaul import models
from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.data import corpora
from overhaul.data.encode import encode_text
from overhaul.data.examples import Examples
from overhaul.objectives import cross_entropy_sum, evaluate, units
from overhaul.selectors import select
from overhaul.shrink.prune import Rule, lowest, prune

CRITERIA = ("magnitude", "wanda", "sparsegpt")
PATTERNS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "70%": {"sparsity": 0.7},
    "2:4": {"sparsity": 0.5, "pattern": "2:4"},
}


@dataclass(frozen=True)
class Size:
    """How much is read; the defaults are the experiment, a test takes less."""

    samples: int = 128
    judged: int | None = None
    blocks: str = "all"


def run(seed: int) -> Numbers:
    """Prune and judge with one seed; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """Perplexity on held-out prose by criterion and pattern ("wanda, 2:4"), and the share of zeros."""
    dense, tokenizer = models.open_model("starter:docs-llama")
    text = encode_text(corpora.docs("train"), tokenizer)
    judged = encode_text(corpora.docs("validation"), tokenizer)[: size.judged]
    found: Numbers = {"dense": perplexity(dense, judged)}
    for pattern, knobs in PATTERNS.items():
        for criterion in CRITERIA:
            torch.manual_seed(seed)
            model = copy.deepcopy(dense)
            outcome = prune(model, text, criterion=criterion, samples=size.samples, blocks=size.blocks, **knobs)
            found[f"{criterion}, {pattern}"] = perplexity(model, judged)
            found[f"{criterion}, {pattern}, share of zeros"] = outcome.facts["sparsity"]
        model = copy.deepcopy(dense)
        _randomly(model, Rule(**knobs), seed)
        found[f"random mask, {pattern}"] = perplexity(model, judged)
    return found


@torch.no_grad()
def _randomly(model: nn.Module, rule: Rule, seed: int) -> None:
    """The null control: as many zeros in every matrix, anywhere."""
    draw = torch.Generator().manual_seed(seed)
    for name in select(model, "projections").modules:
        weight = model.get_parameter(f"{name}.weight")
        weight.masked_fill_(lowest(torch.rand(weight.shape, generator=draw), rule), 0)


def perplexity(model: nn.Module, examples: Examples) -> float:
    """The exponential of the mean loss of a token."""
    batches = list(examples.batches(32))
    return math.exp(sum(float(loss) for loss in evaluate(model, cross_entropy_sum, batches)) / sum(map(units, batches)))


def _at_most(found: Numbers, criterion: str, other: str, factors: dict[str, float]) -> bool:
    return all(found[f"{criterion}, {at}"] <= factor * found[f"{other}, {at}"] for at, factor in factors.items())


CLAIM = Claim(
    slug="perp",
    paper="2312.15230",
    title="Pruning by inputs, and making up for what goes, costs less than pruning by magnitude",
    statement=(
        "Pruning a language model to half of its weights at once raises perplexity least with SparseGPT, then Wanda, then "
        "magnitude; the gaps widen with a 2:4 pattern and with more zeros. That retraining well under 1% of the parameters "
        "then makes up for most of it, the paper's own part, is not tried here."
    ),
    checks=(
        Check(
            "each way zeroes what was asked for: the share within 0.005 of 0.5, 0.7 and 0.5",
            lambda found: all(
                abs(found[f"{criterion}, {at}, share of zeros"] - knobs["sparsity"]) <= 0.005
                for criterion in CRITERIA
                for at, knobs in PATTERNS.items()
            ),
        ),
        Check(
            "null control: a random mask is worse than magnitude, by a factor of at least 1.5 at 50% and at 2:4",
            lambda found: _at_most(found, "magnitude", "random mask", {"50%": 1 / 1.5, "2:4": 1 / 1.5}),
        ),
        Check(
            "Wanda's perplexity is at most 0.98 of magnitude's at 50% and at most 0.95 of it at 2:4",
            lambda found: _at_most(found, "wanda", "magnitude", {"50%": 0.98, "2:4": 0.95}),
        ),
        Check(
            "SparseGPT's perplexity is at most 0.95 of magnitude's at 50% and at most 0.9 of it at 2:4",
            lambda found: _at_most(found, "sparsegpt", "magnitude", {"50%": 0.95, "2:4": 0.9}),
        ),
        Check(
            "SparseGPT's perplexity is at most Wanda's at 50%, and at most 0.98 of it at 2:4",
            lambda found: _at_most(found, "sparsegpt", "wanda", {"50%": 1.0, "2:4": 0.98}),
        ),
        Check(
            "at 70%, Wanda's is at most 0.9 of magnitude's, and SparseGPT's at most 0.9 of Wanda's",
            lambda found: (
                _at_most(found, "wanda", "magnitude", {"70%": 0.9})
                and _at_most(found, "sparsegpt", "wanda", {"70%": 0.9})
            ),
        ),
        Check(
            "a pattern costs more than free places: 2:4 is worse than 50% with each criterion",
            lambda found: all(found[f"{criterion}, 2:4"] > found[f"{criterion}, 50%"] for criterion in CRITERIA),
        ),
    ),
    run=run,
)
