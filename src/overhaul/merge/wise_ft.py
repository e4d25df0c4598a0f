"""WiSE-FT: go part of the way from a model to what fine-tuning made of it, and keep what it could do on other data.

Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv:2109.01903.

    theta = theta_0 + lambda(l) (theta_1 - theta_0)

How it differs from the paper and its code:

1. The paper takes one share for all weights, its alpha: here `scale`. `beta` makes it grow over depth (`merge.lines`, whose
   regime for one model is beta = 1 - scale).
2. Both models are whole. The paper puts a head made of text embeddings on the first one, so that the heads correspond.
3. Differences are taken and added in float32, and rounded once, to the base's dtype. Integers are the base's. Running
   statistics of batch norms are interpolated like weights, which they are not: measure them anew on data.
"""

from __future__ import annotations

from pathlib import Path

from overhaul.merge._ramp import Ramp
from overhaul.merge._words import Words
from overhaul.merge._writing import by_depth, some, written
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.weights import weighted_deltas


@method(verb="merge", paper="2109.01903", changes="weights", memory="stream")
def wise_ft(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    words: Words = Words(),
    ramp: Ramp = Ramp(scale=0.5),
    out: Path | None = None,
) -> Outcome:
    """Interpolate between a model and its fine-tuned self.

    Args:
        base: the model as it was; config, tokenizer and dtype are taken from it.
        tuned: the model after training, with the same tensors.
        words: which words the result knows.
        ramp: how far to go: 0 is the base, 1 the tuned model. The paper recommends 0.5 where nothing can be measured.
        out: folder to write.

    Returns:
        The folder. Facts: number of tensors, how many changed, how far each is from the base, in what the folders differ.
        Layers: the coefficient by depth.

    Raises:
        RequestError: the checkpoints do not correspond, or nothing would change.
        RunError: nothing changed, or a number is not finite.
    """
    some("merge.wise_ft", base, [tuned])
    ramp.check("merge.wise_ft")
    assert out is not None
    base, (tuned,) = words.read(base, [tuned])
    facts = written("merge.wise_ft", base, [tuned], weighted_deltas([ramp]), out)
    return Outcome(Path(out), facts=facts, layers=by_depth(base, ramp))
