"""DARE: drop most of what training changed, at random, and grow the rest, so that several changes rarely meet.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", ICML 2024,
arXiv:2311.03099.

    tau_t = theta_t - theta_0
    keep  : each entry of tau_t with probability `density` (the paper's 1 - p), divided by it; the others become 0
    theta = theta_0 + lambda(l) tau,    tau the kept changes as one: their sum, or that of those that agree (`_mixing`)

What is kept is tau_t in expectation. Whether an entry is kept depends on the seed, the tensor's name and the place alone, so
memory is that of a few pieces of a tensor and the result is the same on every machine.

How it differs from the paper and its code:

1. Differences are taken in float32 whatever the files hold, and the result is rounded once. In bfloat16 a change that is
   small beside its weight would be lost before it is grown.
2. `rescale="norm"` grows what is kept of each tensor to the L1 norm of the whole change, as mergekit's `rescale` does:
   nearly the same in expectation, another number in every draw.
3. `merge: ties` with `normalize: false` is mergekit's `dare_ties`. Nothing is trimmed by size, as `merge.ties` does.
4. Buffers that are numbers are changed like weights; integers are the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy
import torch
from annotated_types import Gt, Le
from torch import Tensor

from overhaul.merge._mixing import Mixing, Mixture
from overhaul.merge._ramp import Ramp
from overhaul.merge._words import Words
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.weights import TensorFacts, chosen


@method(verb="merge", paper="2311.03099", changes="weights", memory="stream")
def dare(
    base: Checkpoint,
    tuned: Sequence[Checkpoint],
    *,
    density: Annotated[float, Gt(0), Le(1)] = 0.1,
    rescale: Literal["density", "norm"] = "density",
    mixing: Mixing = Mixing(),
    words: Words = Words(),
    ramp: Ramp = Ramp(),
    out: Path | None = None,
) -> Outcome:
    """Merge fine-tuned checkpoints of whose changes only a random part is kept, and grown.

    Args:
        base: the checkpoint from which all were tuned; config, tokenizer and dtype are taken from it.
        tuned: the fine-tuned checkpoints, with the same tensors.
        density: the chance of each entry of a change to be kept. The paper keeps 0.1 of large models without loss; 1 keeps
            all.
        rescale: what is kept is divided by its chance ("density"), or grown to the L1 norm of the tensor's change ("norm").
        mixing: how several changes become one.
        words: which words the result knows.
        ramp: how much of that is added.
        out: folder to write.

    Returns:
        The folder. Facts: the seed, the share of entries that were kept of each change, number of tensors, how many changed,
        how far each is from the base, in what the folders differ. Layers: the coefficient by depth.

    Raises:
        RequestError: the checkpoints do not correspond, or nothing would change.
        RunError: nothing changed, or a number is not finite.
    """
    seed = torch.initial_seed()
    mixture = Mixture.of("merge.dare", base, tuned, words, mixing, ramp)
    grown = 1 / density if rescale == "density" else 1.0

    def keep(tensor: TensorFacts, n: int, change: Tensor) -> Tensor:
        kept = chosen(seed, n, tensor, change, density).numpy()
        numpy.multiply(change.numpy(), kept, out=change.numpy())  # a third of torch's time for numbers by truths
        return change.mul_(grown)

    outcome = mixture.write(keep if rescale == "density" else mixture.as_large(keep), out)
    outcome.facts["seed"] = seed
    return outcome
