"""Claim of arXiv:2506.08164: a retain gradient made orthogonal to the forget gradient lets more be forgotten.

The paper's 1B to 7B models, at the size of a laptop: a Llama of two blocks knows 96 random facts (a key of three tokens, a
value of three) by heart and forgets 24 of them by NPO, beside cross-entropy on the other 72, which share its format.

1. Penalty: d = g_f + lam g_r. BLUR: d = g_f + lam orth(g_r; g_f). Null control: from g_r as much is taken away as BLUR does,
   but along a random direction.
2. Every step reads all 24 forgotten facts, so its forget loss compares with that of the next step.
3. Beside it a quadratic toy whose bi-level optimum is known: L_f = ||A (x - a)||^2 / 2, L_r = ||x - b||^2 / 2, optimum
   b + A^+ A (a - b).
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from overhaul.claims._claim import Check, Claim, Numbers
from overhaul.data.encode import answered
from overhaul.data.examples import Batch, Examples, join
from overhaul.fit import Combine, Combined, Gradients, Training, adamw, fit, sgd
from overhaul.fit.projection import bilevel, penalty, products, share
from overhaul.forget.npo import npo_term
from overhaul.objectives import cross_entropy, evaluate, units
from overhaul.references import reference_nll

LETTERS, ARROW = 60, 61
FACTS, FORGOTTEN = 96, 24
BETA = 0.5
ADAMW_WEIGHTS, SGD_WEIGHTS = (1, 5, 20), (1, 10)
ADAMW_RATE, SGD_RATE = 3e-4, 1e-2
"""That of descent was chosen by the penalty of weight 1 alone: it forgets about half in the given steps."""

ETAS = (1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class Size:
    """How much is trained; the defaults are the experiment, a test takes less."""

    learning_steps: int = 400
    adamw_steps: int = 80
    sgd_steps: int = 150
    toy_steps: tuple[int, int, int] = (600, 6000, 60000)


def run(seed: int) -> Numbers:
    """Learn, forget in every way and judge with one seed, and the quadratic toy."""
    return {**quadratic_toy(seed, Size()), **experiment(seed, Size())}


def experiment(seed: int, size: Size) -> Numbers:
    """Forget and retain accuracy by optimizer, weight and side ("AdamW, weight 5, BLUR, forget"), and rises of the loss."""
    forget, retain = _facts(seed)
    model = _learnt(forget, retain, seed, size)
    found: Numbers = {"before, forget": _accuracy(model, forget), "before, retain": _accuracy(model, retain)}
    rows = [("AdamW", weight) for weight in ADAMW_WEIGHTS] + [("SGD", weight) for weight in SGD_WEIGHTS]
    for optimizer, weight in rows:
        for side, combine in _sides(weight, seed).items():
            after, losses = _forgotten(model, forget, retain, combine, optimizer, seed, size)
            row = f"{optimizer}, weight {weight}, {side}"
            found[f"{row}, forget"] = _accuracy(after, forget)
            found[f"{row}, retain"] = _accuracy(after, retain)
            found[f"{row}, rises"] = sum(b > a for a, b in pairwise(losses)) / max(len(losses) - 1, 1)
    for side in ("penalty", "BLUR", "random"):
        of_rows = [found[f"AdamW, weight {weight}, {side}, forget"] for weight in ADAMW_WEIGHTS]
        found[f"AdamW, mean forget, {side}"] = sum(of_rows) / len(of_rows)
    return found


def _sides(weight: float, seed: int) -> dict[str, Combine]:
    return {
        "penalty": penalty(1.0, weight),
        "BLUR": bilevel(1.0, weight),
        "random": along_a_random_direction(weight, seed),
    }


def along_a_random_direction(alpha: float, seed: int) -> Combine:
    """The null control: what BLUR takes from the retain gradient is taken along a random direction instead."""
    steps = [0]

    def combine(gradients: Gradients) -> Combined:
        known = products(gradients)
        removed = share(known) * math.sqrt(known[0])  # its length, with its sign
        steps[0] += 1

        def noise() -> list[Tensor]:
            draw = torch.Generator().manual_seed(seed * 100_003 + steps[0])
            return [torch.randn(f.shape, generator=draw) for f in gradients.of("forget")]

        random_direction = noise()
        length = math.sqrt(sum(float(u.square().sum()) for u in random_direction))
        sides = zip(gradients.of("forget"), gradients.of("retain"), random_direction, strict=True)
        return Combined((f + alpha * (r - removed / length * u) for f, r, u in sides), {})

    return combine


def _facts(seed: int) -> tuple[Examples, Examples]:
    draw = random.Random(seed)
    keys = draw.sample(range(LETTERS**3), FACTS)
    items = []
    for key in keys:
        spelt = [key // LETTERS**2, key // LETTERS % LETTERS, key % LETTERS]
        items.append(answered([*spelt, ARROW], [draw.randrange(LETTERS) for _ in range(3)], None))
    examples = Examples(items, [{}] * len(items))
    return examples[:FORGOTTEN], examples[FORGOTTEN:]


def _learnt(forget: Examples, retain: Examples, seed: int, size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    data = {"facts": join([forget, retain])}
    fit(model, [cross_entropy("facts")], data, steps=size.learning_steps, batch_size=FACTS, lr=3e-3, warmup=20)
    return model


def _forgotten(
    original: nn.Module,
    forget: Examples,
    retain: Examples,
    combine: Combine,
    optimizer: str,
    seed: int,
    size: Size,
) -> tuple[nn.Module, list[float]]:
    """The model after forgetting, and the forget loss before every step. Nothing is clipped: directions are compared."""
    model = copy.deepcopy(original)
    data = {"forget": forget.with_column("reference_nll", reference_nll(model, forget, FACTS)), "retain": retain}
    terms = [npo_term("forget", BETA), cross_entropy("retain", name="retain")]
    adam = optimizer == "AdamW"
    steps, lr, make = (size.adamw_steps, ADAMW_RATE, adamw()) if adam else (size.sgd_steps, SGD_RATE, sgd())
    torch.manual_seed(seed)
    with Training(model, data, steps=steps, lr=lr, optimizer=make, clip=None) as training:
        for step in training:
            step.take(terms, FORGOTTEN, combine=combine)
    return model, training.ledger.curves["NPO"]


def _accuracy(model: nn.Module, examples: Examples) -> float:
    """The share of answer tokens that are the likeliest, given those before them."""

    def right(logits: Tensor, batch: Batch) -> Tensor:
        return (logits[:, :-1].argmax(dim=-1) == batch["labels"][:, 1:]).sum()

    batches = list(examples.batches(FACTS))
    return float(sum(evaluate(model, right, batches))) / sum(map(units, batches))


def quadratic_toy(seed: int, size: Size, dimension: int = 10, rank: int = 3) -> Numbers:
    """Distances from the bi-level optimum: of BLUR by its rate, and of the penalty by its weight."""
    draw = torch.Generator().manual_seed(seed)
    directions, a, b = (torch.randn(n, dimension, generator=draw, dtype=torch.float64) for n in (rank, 1, 1))
    a, b = a[0], b[0]
    square = directions.T @ directions
    optimum = b + torch.linalg.pinv(directions) @ directions @ (a - b)
    found: Numbers = {}
    x = torch.zeros(dimension, dtype=torch.float64)
    combine = bilevel()
    for eta, steps in zip(ETAS, size.toy_steps, strict=True):
        for _ in range(steps):
            x = x - eta * step_along(combine, square @ (x - a), x - b)
        found[f"toy, BLUR at rate {eta:g}"] = float((x - optimum).norm())
    for weight in (0.01, 0.1, 1.0):
        rest = torch.linalg.solve(square + weight * torch.eye(dimension, dtype=torch.float64), square @ a + weight * b)
        found[f"toy, penalty of weight {weight:g}"] = float((rest - optimum).norm())
    return found


def step_along(combine: Combine, forget: Tensor, retain: Tensor) -> Tensor:
    """The direction that a combiner makes of two vectors."""
    parameter = nn.Parameter(torch.zeros_like(forget))
    optimizer = torch.optim.SGD([parameter])
    gradients = Gradients([parameter], {"forget": [forget], "retain": [retain]}, optimizer, math.inf, sharded=False)
    (direction,) = combine(gradients).direction
    return direction


def _no_more_remembered(optimizer: str, weights: tuple[int, ...]) -> Callable[[Numbers], bool]:
    return lambda found: all(
        found[f"{optimizer}, weight {weight}, BLUR, forget"] <= found[f"{optimizer}, weight {weight}, penalty, forget"]
        for weight in weights
    )


CLAIM = Claim(
    slug="blur",
    paper="2506.08164",
    title="BLUR: A Bi-Level Optimization Approach for LLM Unlearning",
    statement=(
        "A retain gradient that is first made orthogonal to the forget gradient does not undo forgetting: more is forgotten "
        "than with a weighted sum of both, and as much is kept."
    ),
    checks=(
        Check(
            "AdamW: the mean forget accuracy over three weights is at least 0.03 below that of the penalty",
            lambda n: n["AdamW, mean forget, BLUR"] <= n["AdamW, mean forget, penalty"] - 0.03,
        ),
        Check(
            "AdamW: at no weight is more remembered than under the penalty",
            _no_more_remembered("AdamW", ADAMW_WEIGHTS),
        ),
        Check("SGD: at no weight is more remembered than under the penalty", _no_more_remembered("SGD", SGD_WEIGHTS)),
        Check(
            "AdamW: retain accuracy is at least 0.995 at every weight, for BLUR and the penalty",
            lambda n: all(
                n[f"AdamW, weight {weight}, {side}, retain"] >= 0.995
                for weight in ADAMW_WEIGHTS
                for side in ("BLUR", "penalty")
            ),
        ),
        Check(
            "SGD, weight 10: the forget loss rises on no more of the steps than under the penalty",
            lambda n: n["SGD, weight 10, BLUR, rises"] <= n["SGD, weight 10, penalty, rises"],
        ),
        Check(
            "null control, AdamW: taking as much away along a random direction gives less than half of BLUR's gain",
            lambda n: (
                n["AdamW, mean forget, penalty"] - n["AdamW, mean forget, random"]
                < 0.5 * (n["AdamW, mean forget, penalty"] - n["AdamW, mean forget, BLUR"])
            ),
        ),
        Check(
            "toy: BLUR's distance from the bi-level optimum falls at least 5-fold when the rate falls 10-fold, twice",
            lambda n: all(
                n[f"toy, BLUR at rate {small:g}"] <= n[f"toy, BLUR at rate {large:g}"] / 5
                for large, small in pairwise(ETAS)
            ),
        ),
        Check(
            "toy: at its smallest rate BLUR is nearer to the optimum than a penalty of weight 0.01",
            lambda n: n["toy, BLUR at rate 0.0001"] < n["toy, penalty of weight 0.01"],
        ),
    ),
    run=run,
    remarks=(
        "With plain descent the projection does what it promises, most clearly where the retain term is heavy: at weight "
        "10 the penalty forgets nothing and its forget loss rises on 85 to 93% of the steps, BLUR leaves 7 to 8% and "
        "rises on 9 to 11%; a random direction is no help. Under AdamW, which steps along neither gradient, BLUR leaves a "
        "little less at weights 1 and 5 on every seed, but at weight 20 more on two of three (0.54 against 0.19 on seed "
        "2), where the projected gradient is small beside what AdamW makes of it. The toy was run again after a first run "
        "in which its smallest rate had too few steps to arrive; no margin was changed."
    ),
)
