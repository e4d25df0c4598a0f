"""Task arithmetic: add what several trainings changed to the model from which they all began.

Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089.

    tau_t = theta_t - theta_0                      (a task vector: what training changed)
    theta = theta_0 + scale * sum_t w_t tau_t

`scale` 1/T with equal weights is the mean of the models. A negative scale with one model takes a task away.

How it differs from the paper's code:

1. Task vectors are taken and added in float32 whatever the files hold, and rounded once, to the base's dtype. In bfloat16
   a small change would be rounded away before it is scaled.
2. Weights are used as they are. mergekit's `task_arithmetic` with `normalize: true` divides by their sum.
3. Integers are the base's. Running statistics of batch norms are added like weights, which they are not: measure them
   anew on data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from overhaul.errors import RequestError
from overhaul.merge._writing import LARGEST, by_depth, some, written
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.weights import weighted_deltas


@method(verb="merge", paper="2212.04089", changes="weights", memory="stream")
def task_arithmetic(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    scale: float = 0.4,
    weights: list[float] | None = None,
    out: Path | None = None,
) -> Outcome:
    """Add the changes of several fine-tuned checkpoints to their base.

    Args:
        base: the checkpoint from which all were tuned; config, tokenizer and dtype are taken from it.
        tuned: the fine-tuned checkpoints, with the same tensors.
        scale: of the sum of all changes. The paper tries 0.0 to 1.0 on held-out data and finds 0.3 to 0.5 good for several
            tasks; 1 with one checkpoint is that checkpoint.
        weights: of each tuned checkpoint; 1 each if not given.
        out: folder to write.

    Returns:
        The folder. Facts: number of tensors, how many changed, in what the folders differ. Layers: the coefficient of
        each change by depth, which is the same at all; one line where all changes have one.

    Raises:
        RequestError: the checkpoints do not correspond, or the numbers of weights and checkpoints differ.
        RunError: nothing changed, or a number is not finite.
    """
    name = "merge.task_arithmetic"
    count = some(name, base, tuned, scale=scale)
    factors = [1.0] * count if weights is None else weights
    if len(factors) != count:
        raise RequestError(
            f"{name}: there are {count} tuned checkpoints and {len(factors)} weights. Give one for each."
        )
    coefficients = [scale * factor for factor in factors]
    if not any(coefficients) or not all(abs(one) <= LARGEST for one in coefficients):
        raise RequestError(
            f"{name}: scale {scale} and weights {factors} would change nothing, or are larger than a weight can be."
        )
    assert out is not None
    facts = written(name, base, tuned, weighted_deltas(coefficients), out)
    layers = {}
    for place, coefficient in enumerate(coefficients) if len(set(coefficients)) > 1 else [(None, coefficients[0])]:
        lines = by_depth(base, lambda _, value=coefficient: value)
        layers |= {name if place is None else f"{name} of change {place + 1}": line for name, line in lines.items()}
    return Outcome(Path(out), facts=facts, layers=layers)
