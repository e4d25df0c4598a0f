"""Slerp: go from one model to another on the arc between them, so that weights keep their length on the way.

Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985; for checkpoints as mergekit does it.

    cos omega = <a, b> / (||a|| ||b||)                                of each tensor by itself
    theta     = sin((1 - t) omega) / sin(omega) a  +  sin(t omega) / sin(omega) b,      t = lambda(l)
    theta     = (1 - t) a + t b                                       where |cos omega| > 0.9995

Two passes over the files: one finds the angles, one writes.

How it differs from mergekit:

1. t is a line over depth (`scale` at the first block, scale + `beta` at the last), not a list of points.
2. Angles are summed up in float64; t = 0 and t = 1 give the tensors themselves, bit for bit.
3. A tensor of zeros has no direction. As there, it counts as perpendicular to the other.
4. Vocabularies of different sizes are refused, not cut to the smaller one. Integers are the base's.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from overhaul.merge._ramp import Ramp
from overhaul.merge._words import Words
from overhaul.merge._writing import by_depth, some, written
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint
from overhaul.weights import TensorFacts, cosine

PARALLEL = 0.9995
"""From this cosine on, to either side, the arc is taken for its chord: its ends are too near or too far to tell a plane."""


@method(verb="merge", changes="weights", memory="stream")
def slerp(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    words: Words = Words(),
    ramp: Ramp = Ramp(scale=0.5),
    out: Path | None = None,
) -> Outcome:
    """Interpolate between two models along the arc that joins them, tensor by tensor.

    Args:
        base: the model where the arc begins; config, tokenizer and dtype are taken from it.
        tuned: the model where it ends, with the same tensors.
        words: which words the result knows.
        ramp: how far to go on the arc: 0 is the base, 1 the other model.
        out: folder to write.

    Returns:
        The folder. Facts: number of tensors, how many changed, the angle between the models as one vector each, in degrees,
        how far each is from the base, in what the folders differ. Layers: the coefficient, and the angle between all that
        they have at one depth.

    Raises:
        RequestError: the checkpoints do not correspond, or nothing would change.
        RunError: nothing changed, or a number is not finite.
    """
    some("merge.slerp", base, [tuned])
    ramp.check("merge.slerp")
    assert out is not None
    base, (tuned,) = words.read(base, [tuned])
    found = cosine(base, tuned)

    def combine(tensor: TensorFacts, models: list[Tensor]) -> Tensor:
        (a, b), t, turn = models, ramp(tensor), found.by_tensor[tensor.name]
        if t in (0, 1):
            return b if t else a
        if abs(turn) > PARALLEL:
            return torch.lerp(a, b, t)
        omega = math.acos(turn)
        ours, theirs = math.sin((1 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)
        return (a * ours).add_(b, alpha=theirs)

    facts = written("merge.slerp", base, [tuned], combine, out)
    several = len({stack for stack, _ in found.by_depth}) > 1
    angles: dict[str, dict[int, float]] = {}
    for (stack, depth), turn in found.by_depth.items():
        angles.setdefault(f"angle, {stack}" if several else "angle", {})[depth] = _degrees(turn)
    return Outcome(
        Path(out), facts={**facts, "angle": _degrees(found.total)}, layers={**angles, **by_depth(base, ramp)}
    )


def _degrees(turn: float) -> float:
    return math.degrees(math.acos(max(-1.0, min(1.0, turn))))
