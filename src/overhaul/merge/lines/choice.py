"""The one number of LiNeS that data choose: candidates are merged, measured, and the best is kept.

    one model : w a_t(theta) / a_t(theta_1) + mean over controls c of a_c(theta) / a_c(theta_0),   alpha = 1.0, 0.9 .. 0.0
    several   : mean over tasks t of a_t(theta) / a_t(theta_t),            beta = 0.1, 0.2 .. 1.0, to 1.5 for TIES

a is what a metric says: of a task's data, or of data that no training was on (a control). What the tuned model reaches on
its task and the base on a control count as 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from overhaul import session
from overhaul.data.examples import Examples
from overhaul.errors import RequestError, RunError
from overhaul.merge._held_out import HeldOut, tried
from overhaul.method import Table
from overhaul.models import Checkpoint

NAME = "merge.lines"
ALPHAS = tuple(n / 10 for n in range(10, -1, -1))
BETAS = {"task_arithmetic": tuple(n / 10 for n in range(1, 11)), "ties": tuple(n / 10 for n in range(1, 16))}


@dataclass(frozen=True)
class Choice:
    """What candidates are measured by. Create it with `of`.

    Attributes:
        what: the number that is chosen, "alpha" or "beta".
        targets: of each tuned model its task.
        controls: for one tuned model, what it is not to forget.
        weight: what the target counts beside the mean of the controls.
    """

    what: str
    targets: Sequence[HeldOut]
    controls: Sequence[HeldOut]
    weight: float

    @classmethod
    def of(
        cls, targets: Sequence[Examples], controls: Sequence[Examples], metric: str, weight: float, count: int
    ) -> Choice:
        """For `count` tuned models.

        Raises:
            RequestError: there is not one target for each, or controls are missing or of no use; or the metric cannot be
                divided by.
        """
        if len(targets) != count:
            raise RequestError(
                f'{NAME}: choice "measured" needs data of each tuned checkpoint\'s task: {count} `targets`, not '
                f"{len(targets)}."
            )
        if (count == 1) != bool(controls):
            raise RequestError(
                f'{NAME}: choice "measured" with one tuned checkpoint needs `controls`, data that it is not to forget: '
                "without them alpha 1 is best."
                if count == 1
                else f"{NAME}: with {count} tuned checkpoints, their `targets` alone are measured. Leave `controls` out."
            )
        tasks = [HeldOut.of(NAME, "targets", examples, metric) for examples in targets]
        kept = [HeldOut.of(NAME, "controls", examples, metric) for examples in controls]
        if tasks[0].sign < 0:
            raise RequestError(
                f"{NAME}: {metric} is better the smaller it is, and shares of it would be best where it is worst. Take one "
                "of which more is better: accuracy, answer_probability."
            )
        return cls("alpha" if count == 1 else "beta", tasks, kept, weight)

    def best(
        self,
        candidates: Sequence[float],
        write: Callable[[float, Path], Path],
        base: Checkpoint,
        tuned: Sequence[Checkpoint],
        place: Path,
    ) -> tuple[float, Table]:
        """The candidate with the highest score, the first of several; and what was measured of all.

        Args:
            candidates: of the number that is chosen.
            write: makes a candidate in a folder.
            base: what controls are compared with.
            tuned: what targets are compared with.
            place: an existing folder with room for one more model.
        """
        session.begins()
        ends = [self._end(data, one) for data, one in zip(self.targets, tuned, strict=True)]
        ends += [self._end(data, base) for data in self.controls]
        rows: list[tuple[float, ...]] = []
        for value in session.progress(candidates, f"measuring {self.what}", len(candidates)):
            found = tried(lambda folder, value=value: write(value, folder), self._values, place)
            shares = [one / end for one, end in zip(found, ends, strict=True)]
            rows.append((value, self.score(shares), *shares))
        names = [f"target {n + 1}" for n in range(len(self.targets))]
        names += [f"control {n + 1}" for n in range(len(self.controls))]
        return max(rows, key=lambda row: row[1])[0], Table((self.what, "score", *names), tuple(rows))

    def score(self, shares: Sequence[float]) -> float:
        """Of the shares that are reached on each target, then on each control."""
        targets, controls = shares[: len(self.targets)], shares[len(self.targets) :]
        mean = sum(targets) / len(targets)
        return self.weight * mean + sum(controls) / len(controls) if controls else mean

    def _values(self, known: Checkpoint) -> list[float]:
        return [data.value(known) for data in (*self.targets, *self.controls)]

    def _end(self, data: HeldOut, known: Checkpoint) -> float:
        if (value := data.value(known)) <= 0:
            raise RunError(
                f"{NAME}: {known.source} has {data.request.metric} {value:g} on `{data.role}`, so no share of it can be "
                "told. Take other data or another metric."
            )
        return value
