"""Task arithmetic: add what several trainings changed to the model from which they all began.

Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089.

    tau_t = theta_t - theta_0                      (a task vector: what training changed)
    theta = theta_0 + lambda(l) sum_t w_t tau_t

lambda is `scale` in every block, unless `beta` makes it grow over depth. `scale` 1/T with equal weights is the mean of the
models. A negative scale with one model takes a task away.

How it differs from the paper's code:

1. Task vectors are taken and added in float32 whatever the files hold, and rounded once, to the base's dtype. In bfloat16
   a small change would be rounded away before it is scaled.
2. Weights are used as they are. mergekit's `task_arithmetic` with `normalize: true` divides by their sum.
3. Integers are the base's. Running statistics of batch norms are added like weights, which they are not: measure them
   anew on data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from overhaul.errors import RequestError
from overhaul.merge._ramp import Ramp
from overhaul.merge._words import Words
from overhaul.merge._writing import by_depth, some, written
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.weights import TensorFacts, weighted_deltas


@method(verb="merge", paper="2212.04089", changes="weights", memory="stream")
def task_arithmetic(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    weights: list[float] | None = None,
    words: Words = Words(),
    ramp: Ramp = Ramp(scale=0.4),
    out: Path | None = None,
) -> Outcome:
    """Add the changes of several fine-tuned checkpoints to their base.

    Args:
        base: the checkpoint from which all were tuned; config, tokenizer and dtype are taken from it.
        tuned: the fine-tuned checkpoints, with the same tensors.
        weights: of each tuned checkpoint; 1 each if not given.
        words: which words the result knows.
        ramp: how much of the sum of all changes is added. The paper tries 0.0 to 1.0 on held-out data and finds 0.3 to 0.5
            good for several tasks; 1 with one checkpoint is that checkpoint.
        out: folder to write.

    Returns:
        The folder. Facts: number of tensors, how many changed, how far each is from the base, in what the folders differ.
        Layers: the coefficient of each change by depth; one line where all changes have one.

    Raises:
        RequestError: the checkpoints do not correspond, or the numbers of weights and checkpoints differ.
        RunError: nothing changed, or a number is not finite.
    """
    name = "merge.task_arithmetic"
    count = some(name, base, tuned)
    factors = [1.0] * count if weights is None else weights
    if len(factors) != count:
        raise RequestError(
            f"{name}: there are {count} tuned checkpoints and {len(factors)} weights. Give one for each."
        )
    ramp.check(name)
    if not any(factors) or not all(map(math.isfinite, factors)):
        raise RequestError(f"{name}: the weights {factors} would change nothing, or are not finite numbers.")
    assert out is not None
    base, tuned = words.read(base, tuned)
    coefficients = [partial(_coefficient, ramp, factor) for factor in factors]
    facts = written(name, base, tuned, weighted_deltas(coefficients), out)
    layers = {}
    for place, coefficient in enumerate(coefficients) if len(set(factors)) > 1 else [(None, coefficients[0])]:
        lines = by_depth(base, coefficient)
        layers |= {name if place is None else f"{name} of change {place + 1}": line for name, line in lines.items()}
    return Outcome(Path(out), facts=facts, layers=layers)


def _coefficient(ramp: Ramp, factor: float, tensor: TensorFacts) -> float:
    """lambda(l) w_t of a tensor."""
    return ramp(tensor) * factor
