"""LiNeS: scale what training changed by a factor that grows with depth, and get back what the base could do.

Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025,
arXiv:2410.17146.

    tau       = theta_1 - theta_0, or what merges several models (task arithmetic or TIES)
    lambda(l) = alpha + beta l / (L - 1)                for block l = 0 .. L-1
    theta     = theta_0 + lambda(l) tau

    one model:  beta = 1 - alpha, so that the last block keeps its change; alpha is chosen on data, 1 is the tuned model
    several:    alpha = (1/T) ||sum_t tau_t||_1 / ||tau||_1 (1/T for a plain sum); beta is chosen on data
    WiSE-FT:    gamma times both, theta_0 + gamma lambda(l) tau
    soups:      `scale` and `beta` of `merge.soup`; of two rewarded policies, `merge.task_arithmetic` with the supervised
                model as base, weights: [share, 1 - share], scale: alpha and beta

`choice: measured` tries the paper's values on held-out data (`lines/choice.py`).
How it differs from the paper and its code:

1. The paper is silent on what lies outside the blocks; the code scales it by alpha, also the norm and the head after the
   last block: `outside="alpha"`. `outside="by_position"` gives what comes after the blocks alpha + beta. A tied head is one
   tensor with the embedding, which comes before.
2. The norms are of size, as in the code; those of all changes are taken untrimmed for TIES too.
3. A network with several stacks has a ramp over each; one with a single block gets alpha + beta.
4. The code finds a block by the first number in a name, which is wrong for T5 and ResNet; here the stack is asked.
5. On networks without the general early layers of long pre-training the ramp need not beat a constant factor: measure it.
6. Integers are the base's. Running statistics of batch norms are scaled like weights, which they are not: measure them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.merge._ramp import Outside, Ramp
from overhaul.merge._words import Words
from overhaul.merge._writing import by_depth, some, written
from overhaul.merge.lines.choice import ALPHAS, BETAS, NAME, Choice
from overhaul.merge.ties import Election, elect
from overhaul.method import Outcome, Table, method
from overhaul.models import Checkpoint
from overhaul.weights import Combine, TensorFacts, stream, totals, weighted_deltas

ROUNDED = 1e-6
"""How far from 1 rounding may put the last block's factor."""


@method(
    verb="merge",
    paper="2410.17146",
    changes="weights",
    memory={"choice": {"given": "stream", "measured": "forward"}},
)
def lines(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    targets: Sequence[Examples] = (),
    controls: Sequence[Examples] = (),
    *,
    choice: Literal["given", "measured"] = "given",
    alpha: Annotated[float, Ge(0)] | None = None,
    beta: float | None = None,
    merge: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    density: Annotated[float, Gt(0), Le(1)] = 0.2,
    outside: Outside = "alpha",
    metric: str = "accuracy",
    target_weight: Annotated[float, Gt(0)] = 2.0,
    words: Words = Words(),
    out: Path | None = None,
) -> Outcome:
    """Scale the change of one fine-tuned checkpoint, or the merged change of several, linearly over depth.

    Args:
        base: the checkpoint from which all were tuned; config, tokenizer and dtype are taken from it.
        tuned: the fine-tuned checkpoints, with the same tensors.
        targets: for "measured", held-out data of each tuned checkpoint's task, in the order of `tuned`. Several sets are
            materials that the step names, `targets: [chat, code]`; one material that is a list of files is one set.
        controls: for "measured" with one tuned checkpoint, data of what it is not to forget; several are named likewise.
        choice: alpha or beta are "given", or "measured": alpha of one checkpoint, beta of several, the best of the values
            that the paper tries. Each candidate is written, opened and measured.
        alpha: the factor of the first block. For one checkpoint it has to be given (the paper tries 1.0, 0.9 .. 0.0 and
            shows 0.1; smaller forgets less and learns less); for several it comes from the norms if it is not given.
        beta: what the last block's factor is larger by; 1 - alpha for one checkpoint if not given. For several it has to be
            given: the paper tries 0.1 to 1.0 in steps of 0.1, to 1.5 for "ties".
        merge: how several changes become one: their sum, or that of `merge.ties`.
        density: for "ties", the share of each checkpoint's changes that is kept.
        outside: the factor of what lies outside the blocks: "alpha", or alpha before and alpha + beta after them
            ("by_position").
        metric: for "measured", what is measured: any metric that `judge:` knows of one role, of which more is better;
            on text "answer_probability", since no "accuracy" can be had of it.
        target_weight: for "measured" with one checkpoint, what the target counts beside the mean of the controls. The
            paper's code ships 2.
        words: which words the result knows.
        out: folder to write.

    Returns:
        The folder. Facts: alpha, beta, number of tensors, how many changed, how far each is from the base, in what the
        folders differ; for "ties" also its own. Tables: for "measured", what was measured of each candidate. Layers: the
        coefficient by depth.

    Raises:
        RequestError: the checkpoints do not correspond, alpha or beta is missing, candidates cannot be measured, or there is
            data and nothing to measure.
        RunError: nothing changed, or a number is not finite.
    """
    count = some(NAME, base, tuned, alpha=alpha, beta=beta)
    if choice == "given" and (targets or controls):
        raise RequestError(
            f"{NAME}: `{'targets' if targets else 'controls'}` are measured for choice: measured alone, and alpha and beta "
            "are given. Leave the data out, or write choice: measured."
        )
    measured = Choice.of(targets, controls, metric, target_weight, count) if choice == "measured" else None
    check_given(count, alpha, beta, measured is not None, words)
    assert out is not None
    base, tuned = words.read(base, tuned)
    sources = [base, *tuned]
    election = elect(base, tuned, density, "size", "model", "released") if merge == "ties" else None

    def combine(alpha: float, beta: float) -> Combine:
        factor = Ramp(alpha, beta, outside)
        return weighted_deltas([factor] * count) if election is None else partial(_scaled, election, factor)

    if alpha is None and count > 1:
        alpha = (ratio(election, base, tuned) if election else 1.0) / count
    tables: dict[str, Table] = {}
    if measured is not None:

        def write(value: float, folder: Path) -> Path:
            ends = (value, 1.0 - value) if alpha is None else (alpha, value)
            return stream(sources, combine(*ends), folder)

        candidates = ALPHAS if count == 1 else BETAS[merge]
        chosen, table = measured.best(candidates, write, base, tuned, Path(out).parent)
        tables[f"{metric}, as shares of the tuned and the base model's"] = table
        alpha, beta = (chosen, None) if count == 1 else (alpha, chosen)
    assert alpha is not None
    if beta is None:
        beta = 1.0 - alpha
    facts = written(NAME, base, tuned, combine(alpha, beta), out)
    more, layers = (election.facts, election.layers) if election else ({}, {})
    return Outcome(
        Path(out),
        facts={"alpha": alpha, "beta": beta, **facts, **more},
        layers={**layers, **by_depth(base, Ramp(alpha, beta, outside))},
        tables=tables,
    )


def _scaled(election: Election, factor: Ramp, tensor: TensorFacts, models: list[Tensor]) -> Tensor:
    return torch.add(models[0], election.change(tensor, models), alpha=factor(tensor))


def ratio(election: Election, base: Checkpoint, tuned: Sequence[Checkpoint]) -> float:
    """||sum_t tau_t||_1 / ||tau||_1; 0 where nothing is merged."""

    def sums(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        whole = models[1] - models[0]
        for model in models[2:]:
            whole += model - models[0]
        return torch.stack([whole.abs_().sum(), election.change(tensor, models).abs_().sum()])

    whole, merged = totals([base, *tuned], sums).total.tolist()
    return whole / merged if merged else 0.0


def check_given(count: int, alpha: float | None, beta: float | None, measured: bool, words: Words) -> None:
    """Refuse what the formulas leave open, or data do.

    Raises:
        RequestError: alpha is missing for one checkpoint, or too large, or beta for several; or both are 0; or what is to be
            measured is given.
    """
    if alpha == 0 and beta == 0:
        raise RequestError(f"{NAME}: alpha 0 and beta 0 would change nothing: both are factors of the change.")
    if measured:
        if beta is not None or (count == 1 and alpha is not None):
            chosen = "alpha, and beta is 1 - alpha" if count == 1 else "beta"
            raise RequestError(f'{NAME}: choice "measured" chooses {chosen}. Leave that out, or write choice: "given".')
        if words.tokenizer != "same":
            raise RequestError(
                f'{NAME}: choice "measured" measures all models with one tokenizer, so tokenizer has to be the same.'
            )
    elif count == 1 and alpha is None:
        raise RequestError(
            f"{NAME}: with one tuned checkpoint, alpha has to be given: 1 is that checkpoint, 0 keeps the base's first "
            "block. Try 0.1, 0.3 and 0.5 and judge both tasks, or write choice: measured."
        )
    elif count == 1 and alpha is not None and beta is None and abs(alpha + (1.0 - alpha) - 1.0) > ROUNDED:
        raise RequestError(
            f"{NAME}: with alpha {alpha:g}, beta is 1 - alpha, and rounding leaves {alpha + (1.0 - alpha):g} of the 1 that "
            "the last block's factor is to be. Write an alpha between 0 and 1, or beta too."
        )
    elif count > 1 and beta is None:
        raise RequestError(
            f"{NAME}: with {count} tuned checkpoints, beta has to be given: the last block's factor is alpha + beta. "
            "Try 0.3, 0.5 and 0.8 and judge all tasks, or write choice: measured."
        )
