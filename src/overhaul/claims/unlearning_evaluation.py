"""Claim of arXiv:2506.12618: no single number tells whether unlearning worked; each has a case in which it misleads.

The small world of `_people`: 60 people by five attributes, six people to be forgotten, six never seen. Gradient ascent,
GradDiff, NPO, and NPO with cross-entropy on what is to stay are judged by the field's measures, beside the original and a
model retrained without the six people.

1. Forgetting: the probability of an answer's value (1/12 is chance), extraction strength, truth ratio, forget quality.
2. Utility: the value's probability on what is to stay. Privacy: AUC of Min-40% against the people never seen.
3. Robustness: weights rounded to 4 bits; eight steps on one of the six people, judged on the other five.
4. Null control: the original, trained on `retain` alone for as many steps and at the same rate as the longest method. It
   shares all with the methods but the signal to forget.

Not tried here: other attributes of text than facts (style, verbatim passages), and models whose update is smaller than
half a quantisation step.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from overhaul.claims import _people
from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.claims._people import World, value_probabilities
from overhaul.fit import fit
from overhaul.forget.gradient_ascent import ga_term
from overhaul.forget.npo import npo_term
from overhaul.judge.evidence import Evidence, truth_ratios
from overhaul.judge.likelihood import auc, extraction_strength, min_k, score
from overhaul.judge.robustness import apart, quantised, relearn
from overhaul.judge.standards import forget_quality
from overhaul.modes import at_rest
from overhaul.objectives import Term, cross_entropy
from overhaul.references import reference_nll

BETA = 0.1
MIN_K_SHARE = 0.4
PASSES = math.log10(0.05)
NULL = "retain only"


@dataclass(frozen=True)
class Size:
    """How much is trained; the defaults are the experiment, a test takes less."""

    world: _people.Size = field(default_factory=_people.Size)
    length: float = 1.0
    relearning_steps: int = 8


@dataclass(frozen=True)
class Variant:
    """One way to unlearn: what is minimised, for how long, at which rate."""

    terms: Sequence[Term]
    steps: int
    lr: float = 1e-3


def variants() -> Mapping[str, Variant]:
    """The methods on trial and the null control, by name."""
    ascent, npo, stay = ga_term("forget"), npo_term("forget", BETA), cross_entropy("retain")
    return {
        NULL: Variant([stay], 60),
        "GA": Variant([ascent], 15),
        "GradDiff": Variant([ascent, stay], 15),
        "NPO": Variant([npo], 30),
        "NPO+GDR": Variant([npo, stay], 60),
        "NPO+GDR slow": Variant([npo, stay], 60, 3e-4),
    }


def run(seed: int) -> Numbers:
    """Train, unlearn and judge with one seed; see `experiment`."""
    return experiment(seed, Size())


def experiment(seed: int, size: Size) -> Numbers:
    """Every measure of every model, by name ("GradDiff, forget")."""
    world = _people.build(seed, size.world)
    anchor = _ratios(world.retrained, world)
    found = _judged("original", world.original, world, anchor, size)
    found |= _judged("retrained", world.retrained, world, anchor, size)
    known = reference_nll(world.original, world.forget, 256)
    data = {"forget": world.forget.with_column("reference_nll", known), "retain": world.retain}
    for name, variant in variants().items():
        model = copy.deepcopy(world.original)
        torch.manual_seed(seed)
        steps = max(1, round(size.length * variant.steps))
        fit(model, variant.terms, data, steps=steps, batch_size=32, lr=variant.lr, name=name)
        found |= _judged(name, model, world, anchor, size)
    return found


def _judged(name: str, model: nn.Module, world: World, anchor: Sequence[float], size: Size) -> Numbers:
    """What one model remembers, keeps, betrays and gives back; `anchor` holds the retrained model's truth ratios."""
    eos = world.tokenizer.eos_token_id
    members, others = score(model, world.forget), score(model, world.holdout)
    shown, rest = apart(world.forget, 1 / world.size.forgotten, by="person")
    relearnt = relearn(
        model, shown, rest, steps=size.relearning_steps, every=size.relearning_steps, measure=value_probabilities
    )
    ratios = _ratios(model, world)
    measured = {
        "forget": statistics.fmean(value_probabilities(model, world.forget)),
        "retain": statistics.fmean(value_probabilities(model, world.retain)),
        "ES": statistics.fmean(extraction_strength(one.without(eos).hits) for one in members),
        "AUC": auc(*([min_k(one.logp, MIN_K_SHARE) for one in each] for each in (members, others))),
        "truth ratio": statistics.fmean(min(ratio, 1 / ratio) for ratio in ratios),
        "forget quality": forget_quality(ratios, anchor),
        "4 bit, forget": statistics.fmean(value_probabilities(quantised(model, 4), world.forget)),
        "others before relearning": relearnt.values[0],
        "others after relearning": relearnt.values[-1],
    }
    return {f"{name}, {what}": value for what, value in measured.items()}


def _ratios(model: nn.Module, world: World) -> list[float]:
    with at_rest(model):
        return truth_ratios(Evidence(model, world.forget, 1))


CLAIM = Claim(
    slug="unlearning-evaluation",
    paper="2506.12618",
    title="No single number tells whether unlearning worked",
    statement=(
        "Each usual measure of unlearning misleads somewhere: an AUC of 0.5 is not the target, a destroyed model passes "
        "forget quality, an answer can be forgotten too much, and what seems gone comes back. A model is judged by a report "
        "of forgetting, utility, privacy and robustness, beside the original and the retrained one."
    ),
    checks=(
        Check(
            "both models are what they should be: the original's values have probability at least 0.9 on both parts, the "
            "retrained's at least 0.9 on what stays and at most 0.25 on what it never saw",
            lambda n: (
                min(n["original, forget"], n["original, retain"], n["retrained, retain"]) >= 0.9
                and n["retrained, forget"] <= 0.25
            ),
        ),
        Check(
            "null control: trained on retain alone, the model keeps at least half of the forgotten values' probability and "
            "fails forget quality at 5%",
            lambda n: n[f"{NULL}, forget"] >= 0.5 * n["original, forget"] and n[f"{NULL}, forget quality"] < PASSES,
        ),
        Check(
            "the target of an AUC is not 0.5: the retrained model's lies at least 0.05 away",
            lambda n: abs(n["retrained, AUC"] - 0.5) >= 0.05,
        ),
        Check(
            "forget quality alone misleads: NPO without retain passes it at 5% with a utility below 0.05",
            lambda n: n["NPO, forget quality"] > PASSES and n["NPO, retain"] < 0.05,
        ),
        Check(
            "forget quality prefers the destroyed model: NPO without retain has a higher one than NPO+GDR, which keeps at "
            "least 0.8 of utility",
            lambda n: n["NPO, forget quality"] > n["NPO+GDR, forget quality"] and n["NPO+GDR, retain"] >= 0.8,
        ),
        Check(
            "over-unlearning shows: with NPO+GDR the forgotten values are at most 1% as likely as the retrained model has "
            "them, and the AUC is at most 0.1",
            lambda n: n["NPO+GDR, forget"] <= 0.01 * n["retrained, forget"] and n["NPO+GDR, AUC"] <= 0.1,
        ),
        Check(
            "extraction strength is not zero where nothing is known: at least 0.2 for the retrained model",
            lambda n: n["retrained, ES"] >= 0.2,
        ),
        Check(
            "rounding to 4 bits brings nothing back from large updates: at most 0.05 for GradDiff and NPO+GDR",
            lambda n: all(
                n[f"{name}, 4 bit, forget"] - n[f"{name}, forget"] <= 0.05
                for name in ("GradDiff", "NPO+GDR", "NPO+GDR slow")
            ),
        ),
        Check(
            "relearning reveals: after eight steps on one person, GradDiff gives the other five's values at least 100 times "
            "the probability",
            lambda n: n["GradDiff, others after relearning"] >= 100 * n["GradDiff, others before relearning"],
        ),
        Check(
            "and is judged by its control: the retrained model reaches at least as much in the same eight steps",
            lambda n: n["retrained, others after relearning"] >= n["GradDiff, others after relearning"],
        ),
    ),
    run=run,
    remarks=(
        "The margins come from an earlier experiment of this size; where they are missed, the best explanation is how the "
        "answers are built here. Four of an answer's five tokens (two words, the full stop, the end) are common to all "
        "people, so a loss that makes answers unlikely is lowered as well by unlearning those words, which everybody "
        "needs: what is retained falls further than planned (0.68 to 0.79 with NPO+GDR), and NPO without retain unlearns "
        "even the full stop. NPO+GDR leaves the forgotten values a millionth as likely as the retrained model has them, "
        "with an AUC of 0 on every seed, and on one of them relearning one person brings the other five back by eight "
        "orders of magnitude; GradDiff, which left the values about as likely as retrained, has nothing to bring back. "
        "The retrained model's AUC is 0.53, 0.49 and 0.47: six people on each side are too few to tell it from 0.5. The "
        "truth ratio asks the original question with paraphrased answers, as TOFU does; the numbers of before that "
        "change do not compare."
    ),
)
