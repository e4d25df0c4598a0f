"""Which models of a soup help, measured on held-out data: soups are written, opened, judged and thrown away again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from overhaul import processes, session, weights
from overhaul.data.examples import Examples
from overhaul.errors import RequestError, RunError, did_you_mean
from overhaul.judge import judge as judging
from overhaul.judge.metrics import METRICS
from overhaul.merge.soup.learned import Shares
from overhaul.method import Outcome, Table
from overhaul.models import Checkpoint, facts

ROLE = "held_out"


@dataclass(frozen=True)
class HeldOut:
    """A metric on held-out data.

    Attributes:
        examples: the data.
        request: what the judge is asked.
        sign: 1 where more is better, -1 where less is.
    """

    examples: Examples
    request: judging.Request
    sign: int

    @classmethod
    def of(cls, examples: Examples, metric: str) -> HeldOut:
        """A metric by its name.

        Raises:
            RequestError: there is none, or it does not read these examples alone.
        """
        if metric not in METRICS:
            raise RequestError(f"merge.soup: there is no metric {metric!r}.{did_you_mean(metric, METRICS)}")
        known = METRICS[metric]
        if len(known.roles) > 1 or known.anchored:
            alone = [name for name, one in METRICS.items() if len(one.roles) == 1 and not one.anchored]
            raise RequestError(
                f"merge.soup: {metric} compares with other data or another model. Take one that reads the held-out data "
                f"alone: {', '.join(sorted(alone))}."
            )
        (request,) = judging.check({"learned": {metric: ROLE}}, {ROLE})
        judging.check_data([request], {ROLE: examples})
        return cls(examples, request, 1 if known.better == "up" else -1)

    def value(self, known: Checkpoint) -> float:
        """What a checkpoint is worth."""
        model = known.open().to(processes.device())
        value = judging.judge(model, [self.request], {ROLE: self.examples}).measures[0].value
        if value is None:
            raise RunError(f"merge.soup: {known.source} has no {self.request.metric} on the held-out data.")
        return value


def greedy(tuned: Sequence[Checkpoint], held_out: HeldOut, place: Path, made: Outcome) -> Shares:
    """The best model, and each by its rank with which the soup is no worse.

    Args:
        tuned: the models.
        held_out: what they are measured by.
        place: an existing folder, beside which there is room for one more model.
        made: gets the facts and the table.
    """
    alone = [held_out.value(one) for one in session.progress(tuned, "measuring models", len(tuned))]
    best, *others = sorted(range(len(tuned)), key=lambda n: -held_out.sign * alone[n])
    chosen, reached = [best], alone[best]
    for n in session.progress(others, "measuring soups", len(others)):
        with tempfile.TemporaryDirectory(dir=place, prefix=".soup-") as folder:
            parts = [tuned[m] for m in (*chosen, n)]
            mixed = weights.blend(parts, [1 / len(parts)] * len(parts), Path(folder) / "soup")
            value = held_out.value(facts(mixed))
        if held_out.sign * value >= held_out.sign * reached:
            chosen, reached = [*chosen, n], value
    made.facts |= {"chosen": [tuned[n].source for n in chosen], "best_alone": alone[best], "soup": reached}
    rows = [(one.source, alone[n], n in chosen) for n, one in enumerate(tuned)]
    made.tables[f"{held_out.request.metric} on held-out data"] = Table(
        ("checkpoint", "alone", "in the soup"), tuple(rows)
    )
    return Shares.even(chosen, len(tuned))
