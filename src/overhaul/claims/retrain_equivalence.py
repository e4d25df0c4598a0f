"""Claim of arXiv:2510.16629: what forget-only unlearning does depends on when the forgotten data was learnt.

The paper's four stages on 1B to 14B models, at the size of a laptop: a Llama of two blocks learns four tasks one after the
other, then each model unlearns one of them by GA, NPO and SimNPO alike.

1. Stages: reverse a key, 64 memorised facts, shift a key, and the forget stage (one refusal for 256 keys), which is put at
   place 1, 2, 3 or 4; the order of the others stays. Optimizer and schedule start anew in every stage.
2. Forget score: mean nats per token of the refusal, after minus before. Higher is more forgotten.
3. Null controls: the same four paths from another seed (initial weights and order of the data), and the same model
   unlearning the same data in another order.
4. The linear theory is checked beside it on random matrices: simulated drift against (I + M_U)^t, and the lower bound.
5. Depth of forgetting: 40 prompts with three answers each, all of which repeat a part of the prompt as the paper's do: a
   refusal R, a phrasing U that is unlearnt by GA, a sibling C of it. A model that can reverse keys already learns them in
   six orders by SGD, as in the paper, and unlearns U until it costs about what it does there (25 nats a token). Null
   control: as much GA on 40 prompts of the reversing instead of U. What was learnt last is the likeliest before
   unlearning, so an order that ends with R is "deep" before it; the null control may change no verdict of before.

Not tried here: retained abilities along the path. At this size earlier stages are lost during later ones.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.claims._ridge_paths import Divergence, Stage, ascend, growth, train
from overhaul.data.encode import answered
from overhaul.data.examples import Examples
from overhaul.fit import sgd
from overhaul.forget.gradient_ascent import ga_term
from overhaul.forget.npo import npo_term
from overhaul.forget.simnpo import simnpo_term
from overhaul.inspect.depth_of_forgetting import ORDERS, Verdict, follow, likeliest, verdict
from overhaul.inspect.path_dependence import learn, orders, unlearn
from overhaul.objectives import Term

LETTERS = 50
SEPARATOR = 59
MARKS = {"reverse": 60, "facts": 61, "shift": 62, "refusal": 63}
RETAINED = ("reverse", "facts", "shift")
REFUSAL = (51, 52, 53, 54)
PLACES = (1, 2, 3, 4)
LETTER = {"refusal": "R", "forget": "U", "sibling": "C"}
PHRASINGS: dict[str, Callable[[list[int]], list[int]]] = {
    "refusal": lambda thing: [51, 52, *thing],
    "forget": lambda thing: [53, 54, *thing],
    "sibling": lambda thing: [55, *thing, 56],
}
"""The answers of the depth study; in the paper: "I can not assist you with X", "You can try the following steps to make X",
"To make X, you need to"."""

PROMPTS = 40
DEPTH_MARK = 58
DEPTH_LR = 0.1
PHASES = {"before": ("U", 0), "after": ("U", -1), "unrelated unlearnt": ("unrelated", -1)}
"""Phase -> what was unlearnt, and which look at it: the first or the last."""

LAST = "depth, orders in which the stage learnt last is the likeliest"
PAPER: dict[str, Verdict] = {
    "R-C-U": "superficial",
    "C-R-U": "superficial",
    "R-U-C": "superficial",
    "C-U-R": "superficial",
    "U-C-R": "deep",
    "U-R-C": "deep",
}
"""The order of learning -> how the paper found that U is forgotten after it."""

ANOTHER = 1000
"""Added to a seed for the null controls."""


@dataclass(frozen=True)
class Size:
    """How much is trained; the defaults are the experiment, a test takes less."""

    stage_steps: int = 150
    unlearning_steps: int = 15
    depth_stage_steps: int = 50
    depth_unlearning_steps: int = 40


def run(seed: int) -> Numbers:
    """Train, unlearn and judge with one seed; see `linear_theory`, `experiment` and `depth_study`."""
    return {**linear_theory(seed), **experiment(seed, Size()), **depth_study(seed, Size())}


def losses() -> dict[str, Term]:
    """The three forget-only losses, with the card's settings."""
    return {"GA": ga_term("forget"), "NPO": npo_term("forget", 0.5), "SimNPO": simnpo_term("forget", 2.5)}


def experiment(seed: int, size: Size) -> Numbers:
    """Forget scores by loss and place ("GA, place 4"), those of the null controls, and spreads."""
    stages = _stages(seed)
    found: Numbers = {}
    for place in PLACES:
        path = _path(stages, place, seed, size)
        other = _path(stages, place, seed + ANOTHER, size)
        for name, term in losses().items():
            found[f"{name}, place {place}"] = _forget_score(path, stages["refusal"], term, seed, size)
            found[f"{name}, place {place}, another seed"] = _forget_score(other, stages["refusal"], term, seed, size)
            found[f"{name}, place {place}, another order"] = _forget_score(
                path, stages["refusal"], term, seed + ANOTHER, size
            )
    for name in losses():
        scores = [found[f"{name}, place {place}"] for place in PLACES]
        found[f"{name}, spread over places"] = max(scores) - min(scores)
        for control in ("another seed", "another order"):
            changes = [found[f"{name}, place {p}, {control}"] - found[f"{name}, place {p}"] for p in PLACES]
            found[f"{name}, largest change by {control}"] = max(map(abs, changes))
    return found


def _stages(seed: int) -> dict[str, Examples]:
    draw = random.Random(seed)

    def keys(count: int) -> list[list[int]]:
        return [[draw.randrange(LETTERS) for _ in range(4)] for _ in range(count)]

    def encoded(stage: str, pairs: Sequence[tuple[list[int], Sequence[int]]]) -> Examples:
        items = [answered([MARKS[stage], *key, SEPARATOR], answer, None) for key, answer in pairs]
        return Examples(items, [{}] * len(items))

    return {
        "reverse": encoded("reverse", [(key, key[::-1]) for key in keys(4000)]),
        "facts": encoded("facts", list(zip(keys(64), keys(64), strict=True))),
        "shift": encoded("shift", [(key, [(letter + 1) % LETTERS for letter in key]) for key in keys(4000)]),
        "refusal": encoded("refusal", [(key, REFUSAL) for key in keys(256)]),
    }


def _path(stages: dict[str, Examples], place: int, seed: int, size: Size) -> nn.Module:
    """A model that learnt the stages one after the other, the refusal at `place`."""
    model = _new(seed)
    order = orders(RETAINED, "refusal")[place - 1]
    learn(model, stages, order, seed=seed, steps=size.stage_steps, batch_size=32, lr=1e-3)
    return model


def _new(seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _forget_score(path: nn.Module, forget: Examples, term: Term, seed: int, size: Size) -> float:
    """How many nats a token of the refusal costs more after unlearning it; the path stays as it is."""
    steps = size.unlearning_steps
    return unlearn(copy.deepcopy(path), forget, term, seed=seed, steps=steps, batch_size=32, lr=3e-4).score


def depth_study(seed: int, size: Size) -> Numbers:
    """Log-probability of R, U and C in nats a token ("depth R-C-U, U, after"), by order and phase.

    And in how many orders the answer that was learnt last was the likeliest before unlearning.
    """
    reverse = _stages(seed)["reverse"]
    start = _new(seed)
    learn(start, {"reverse": reverse}, ["reverse"], seed=seed, steps=size.stage_steps, batch_size=32, lr=1e-3)
    stages = _phrasings(seed)
    found: Numbers = {LAST: 0.0}
    for order in ORDERS:
        name = "-".join(LETTER[stage] for stage in order)
        path = copy.deepcopy(start)
        steps = size.depth_stage_steps
        learn(path, stages, order, seed=seed, steps=steps, batch_size=PROMPTS, lr=DEPTH_LR, optimizer=sgd())
        looks = {
            target: _looks(copy.deepcopy(path), stages, examples, seed, size)
            for target, examples in (("U", stages["forget"]), ("unrelated", reverse[:PROMPTS]))
        }
        found[LAST] += likeliest(looks["U"], 0) == order[-1]
        for (phase, (target, at)), (stage, letter) in itertools.product(PHASES.items(), LETTER.items()):
            found[f"depth {name}, {letter}, {phase}"] = looks[target][stage][at]
    return found


def _phrasings(seed: int) -> dict[str, Examples]:
    """Three answers to each of 40 keys; each repeats the first two letters of its key."""
    draw = random.Random(seed)
    keys = [[draw.randrange(LETTERS) for _ in range(4)] for _ in range(PROMPTS)]
    return {
        stage: Examples(
            [answered([DEPTH_MARK, *key, SEPARATOR], phrase(key[:2]), None) for key in keys], [{}] * PROMPTS
        )
        for stage, phrase in PHRASINGS.items()
    }


def _looks(
    path: nn.Module, stages: dict[str, Examples], target: Examples, seed: int, size: Size
) -> dict[str, list[float]]:
    steps = size.depth_unlearning_steps
    options = {"seed": seed, "steps": steps, "every": steps, "batch_size": PROMPTS, "optimizer": sgd()}
    return follow(path, stages, target, ga_term("forget"), lr=DEPTH_LR, **options)


def _verdict(found: Numbers, order: str, phase: str = "after") -> Verdict:
    return verdict({stage: [found[f"depth {order}, {letter}, {phase}"]] for stage, letter in LETTER.items()})


def linear_theory(seed: int) -> Numbers:
    """The lemma's relative error, and the drift of two linear models as a multiple of its lower bound, at its loosest."""
    draw = np.random.default_rng(seed)
    x, y = draw.standard_normal((6, 64)), draw.standard_normal(6)
    test = draw.standard_normal((32, 64))
    first, second = (Stage(draw.standard_normal((40, 64)), draw.standard_normal(40), 1.0) for _ in range(2))
    ahead, behind = train([first, second]), train([second, first])
    bound = Divergence.between(ahead - behind, x, test, rate=0.05)
    worst_error, least_ratio = 0.0, np.inf
    for steps in range(31):
        simulated = ascend(ahead, x, y, 0.05, steps) - ascend(behind, x, y, 0.05, steps)
        predicted = np.linalg.matrix_power(growth(x, 0.05), steps) @ (ahead - behind)
        worst_error = max(worst_error, float(np.linalg.norm(simulated - predicted) / np.linalg.norm(predicted)))
        if steps >= bound.start:
            least_ratio = min(least_ratio, float(np.mean((test @ predicted) ** 2)) / bound.after(steps))
    return {"linear theory, largest error": worst_error, "linear theory, least distance over bound": least_ratio}


def _as_in_the_paper(found: Numbers, wanted: Verdict) -> bool:
    return all(_verdict(found, order) == wanted for order, theirs in PAPER.items() if theirs == wanted)


def _last_is_slowest(loss: str) -> Callable[[Numbers], bool]:
    return lambda found: found[f"{loss}, place 4"] <= 0.9 * min(found[f"{loss}, place {p}"] for p in PLACES[:-1])


CLAIM = Claim(
    slug="retrain-equivalence",
    paper="2510.16629",
    title="What forget-only unlearning achieves depends on the order of the training",
    statement=(
        "The same data learnt in another order and unlearnt alike ends elsewhere, so retrain equivalence cannot be had from "
        "the forget set alone; what was learnt last is forgotten most slowly. The order decides as well whether other "
        "phrasings of what is unlearnt go with it."
    ),
    checks=(
        *(
            Check(
                f"{loss}: the stage learnt last has the smallest forget score, at least 10% below the next",
                _last_is_slowest(loss),
            )
            for loss in ("GA", "NPO", "SimNPO")
        ),
        Check(
            "null control, GA: the spread over places is at least twice the largest change by another seed",
            lambda found: found["GA, spread over places"] >= 2.0 * found["GA, largest change by another seed"],
        ),
        Check(
            "null control, NPO: the spread over places is larger than the largest change by another seed",
            lambda found: found["NPO, spread over places"] > found["NPO, largest change by another seed"],
        ),
        Check(
            "null control, all three: another order of the forget set changes no score by more than a quarter of the spread",
            lambda found: all(
                found[f"{loss}, largest change by another order"] <= 0.25 * found[f"{loss}, spread over places"]
                for loss in ("GA", "NPO", "SimNPO")
            ),
        ),
        Check(
            "linear theory: the drift is (I + M_U)^t times the difference before, to 1e-12",
            lambda found: found["linear theory, largest error"] < 1e-12,
        ),
        Check(
            "linear theory: from step t0 on the drift is never below its lower bound",
            lambda found: found["linear theory, least distance over bound"] >= 1.0,
        ),
        Check(
            "depth, before unlearning: in all six orders the answer learnt last is the likeliest",
            lambda found: found[LAST] == len(PAPER),
        ),
        Check(
            "depth: at least five of six orders end as the paper says, superficial or deep",
            lambda found: sum(_verdict(found, order) == theirs for order, theirs in PAPER.items()) >= 5,
        ),
        Check(
            "depth: U-C-R and U-R-C end deep, C and U less likely than R",
            lambda found: _as_in_the_paper(found, "deep"),
        ),
        Check(
            "depth: R-C-U, C-R-U, R-U-C and C-U-R end superficial, U less likely than R and C not",
            lambda found: _as_in_the_paper(found, "superficial"),
        ),
        Check(
            "null control, depth: as much unlearning of an unrelated stage leaves every order's verdict as it was before",
            lambda found: all(
                _verdict(found, order, "unrelated unlearnt") == _verdict(found, order, "before") for order in PAPER
            ),
        ),
    ),
    run=run,
    remarks=(
        "The order of training matters and what was learnt last is forgotten most slowly by GA and NPO on every seed. "
        "For SimNPO it is so on one seed: its weight depends on how likely the answer still is, without a reference, "
        "and the stages learnt first are half lost before unlearning begins, so there is little left to forget. The "
        "order of the forget set is a weaker control than planned: after 15 steps the path whose refusal is freshest "
        "stands on the steep part of its curve, where a few batches more or less decide (GA at place 4: 4.4 against "
        "7.1). Depth depends on the order too, and alike on every seed, but not as the paper found it: with U learnt last "
        "U is not forgotten (it falls, and the refusal falls further), with C last the forgetting is superficial, with R "
        "last deep, which it was before unlearning. Which answer is the freshest decides, not where U was learnt. Ascent "
        "takes all answers to these prompts along, by 7 to 54 nats a token, and ascent on unrelated prompts does nearly "
        "the same: a model this small holds no answer so much apart that forgetting one could spare another. The paper's "
        "model has 3B parameters, of which an adapter alone is trained."
    ),
)
