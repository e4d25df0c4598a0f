"""A metric on held-out data, by which a merge chooses among candidates: each is written, opened, judged and thrown away."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from overhaul import processes
from overhaul.data.examples import Examples
from overhaul.errors import RequestError, RunError, did_you_mean
from overhaul.judge import judge as judging
from overhaul.judge.evidence import kind_of
from overhaul.judge.metrics import METRICS
from overhaul.models import Checkpoint, facts


@dataclass(frozen=True)
class HeldOut:
    """A metric on held-out data. Create it with `of`.

    Attributes:
        method: for messages.
        role: what the method calls the data.
        examples: the data.
        request: what the judge is asked.
        sign: 1 where more is better, -1 where less is.
    """

    method: str
    role: str
    examples: Examples
    request: judging.Request
    sign: int

    @classmethod
    def of(cls, method: str, role: str, examples: Examples, metric: str) -> HeldOut:
        """A metric by its name.

        Raises:
            RequestError: there is none, or it does not read these examples alone.
        """
        if metric not in METRICS:
            raise RequestError(f"{method}: there is no metric {metric!r}.{did_you_mean(metric, METRICS)}")
        known = METRICS[metric]
        if len(known.roles) > 1 or known.anchored:
            alone = [name for name, one in METRICS.items() if len(one.roles) == 1 and not one.anchored]
            raise RequestError(
                f"{method}: {metric} compares with other data or another model. Take one that reads the held-out data "
                f"alone: {', '.join(sorted(alone))}."
            )
        kind = kind_of(examples) if len(examples) else None
        if kind is not None and kind not in known.reads:
            fits = "accuracy" if kind in METRICS["accuracy"].reads else "answer_probability"
            held = "texts with a class" if kind == "images" and examples.kind == "tokens" else kind
            raise RequestError(
                f"{method}: `metric: {metric}` does not fit {held}, which `{role}` holds. Write `metric: {fits}`."
            )
        (request,) = judging.check({"learned": {metric: role}}, {role})
        judging.check_data([request], {role: examples})
        return cls(method, role, examples, request, 1 if known.better == "up" else -1)

    def value(self, known: Checkpoint) -> float:
        """What a checkpoint is worth."""
        model = known.open().to(processes.device())
        value = judging.judge(model, [self.request], {self.role: self.examples}).measures[0].value
        if value is None:
            raise RunError(f"{self.method}: {known.source} has no {self.request.metric} on the held-out data.")
        return value


def tried(write: Callable[[Path], Path], measure: Callable[[Checkpoint], list[float]], place: Path) -> list[float]:
    """What is measured of a candidate, which is written for it and removed.

    Args:
        write: makes the candidate in a folder that does not exist yet.
        measure: what it is worth.
        place: an existing folder, in which there is room for one more model.
    """
    with tempfile.TemporaryDirectory(dir=place, prefix=".candidate-") as folder:
        return measure(facts(write(Path(folder) / "model")))
