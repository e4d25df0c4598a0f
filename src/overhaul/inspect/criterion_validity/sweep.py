"""Many patterns, each cut, measured, trained and measured again: in several processes, and going on where it stopped.

What is finished is a line in the step's scratch folder (`patterns-DIGEST.jsonl`: the digest is of all that a result depends
on, so neither the engine nor the number of workers), and a run that was killed computes the rest alone. What happens to a
worker that dies is said in `overhaul.workers`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overhaul import session
from overhaul.data.examples import IGNORED, Batch, Examples
from overhaul.errors import writing
from overhaul.fit import fit
from overhaul.fit.regime import Regime
from overhaul.groups import Group, cut_copy
from overhaul.objectives import cross_entropy, cross_entropy_sum, evaluate, units
from overhaul.workers import Engine, spread

Pattern = tuple[tuple[int, ...], ...]
"""For each group, the numbers of the units that go."""

Job = tuple[int, int]
"""The number of a pattern, and of a repeat."""

MEASURED_AT_ONCE = 256


@dataclass(frozen=True)
class Ends:
    """What one pattern came to in one training.

    Attributes:
        pruned: nats per unit of the training data, before training again.
        train: the same afterwards.
        test: nats on the test data.
        accuracy: share of labels there that are the most probable.
    """

    pruned: float
    train: float
    test: float
    accuracy: float


@dataclass(frozen=True)
class Sweep:
    """What is done to every pattern.

    Attributes:
        model: what is cut; it stays as it is.
        groups: whose units go.
        patterns: which.
        train: what is trained on again.
        probe: the part of it on which losses are measured.
        test: what is left is measured on.
        regime: of the training; None for none.
        seed: of the first repeat.
    """

    model: nn.Module
    groups: Sequence[Group]
    patterns: Sequence[Pattern]
    train: Examples
    probe: Examples
    test: Examples
    regime: Regime | None
    seed: int

    def keep(self, pattern: Pattern) -> dict[Group, Tensor]:
        """Which units stay."""
        found: dict[Group, Tensor] = {}
        for group, gone in zip(self.groups, pattern, strict=True):
            found[group] = torch.ones(group.size, dtype=torch.bool)
            found[group][list(gone)] = False
        return found

    def end(self, job: Job) -> Ends:
        """Cut, measure, train, measure."""
        number, repeat = job
        with torch.random.fork_rng(), session.using(scratch=None, report=lambda *_: None):
            torch.manual_seed((self.seed + repeat) % 2**63)
            small = cut_copy(self.model, self.keep(self.patterns[number]), checked=False)
            pruned, _ = measured(small, self.probe)
            if self.regime is not None:
                fit(small, [cross_entropy("train")], {"train": self.train}, **self.regime.fit, name="retraining")
            train, _ = measured(small, self.probe)
            return Ends(pruned, train, *measured(small, self.test))

    def ends(
        self, repeats: int, workers: int, engine: Engine = "joblib", address: str | None = None
    ) -> dict[Job, Ends]:
        """Of every pattern in every repeat."""
        jobs = list(itertools.product(range(len(self.patterns)), range(repeats)))
        done = _Kept(self._digest(jobs))
        found = done.read()
        left = [job for job in jobs if job not in found]
        for job, ends in session.progress(spread(self.end, left, workers, engine, address), "patterns", len(left)):
            found[job] = ends
            done.add(job, ends)
        return found

    def _digest(self, jobs: Sequence[Job]) -> str:
        """Of all that a result depends on but the code."""
        said = hashlib.sha256(self.train.digest().encode() + self.probe.digest().encode() + self.test.digest().encode())
        for tensor in self.model.state_dict().values():
            said.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        regime = asdict(self.regime) if self.regime else None
        said.update(json.dumps([self.patterns, jobs, regime, self.seed], default=str).encode())
        return said.hexdigest()


class _Kept:
    """What is finished, a line each, in the scratch folder if there is one."""

    def __init__(self, digest: str) -> None:
        scratch = session.current().scratch
        self.path: Path | None = scratch / f"patterns-{digest[:16]}.jsonl" if scratch else None

    def read(self) -> dict[Job, Ends]:
        """All but a last line that was cut off."""
        found: dict[Job, Ends] = {}
        text = self.path.read_text(encoding="utf-8") if self.path and self.path.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                number, repeat, *ends = json.loads(line)
                found[number, repeat] = Ends(*ends)
        if self.path and text and not text.endswith("\n"):
            self.path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        return found

    def add(self, job: Job, ends: Ends) -> None:
        """One more."""
        if self.path is not None:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([*job, *asdict(ends).values()]) + "\n")


def measured(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Nats per label, and the share of labels that are the most probable."""
    batches = list(examples.batches(MEASURED_AT_ONCE))
    count = sum(map(units, batches))
    found = evaluate(model, lambda *given: torch.stack([cross_entropy_sum(*given), _right(*given)]), batches)
    nats, right = torch.stack(found).double().sum(0).tolist()
    return nats / count, right / count


def _right(logits: Tensor, batch: Batch) -> Tensor:
    labels = batch["labels"]
    if labels.ndim == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    return (logits.argmax(-1) == labels)[counted].sum().float()


def going(size: int, ratio: float) -> int:
    """How many of so many units go: the nearest whole number, the lower one of two."""
    return math.ceil(size * Fraction(str(ratio)) - Fraction(1, 2))


def patterns(sizes: Sequence[int], ratio: float, most: int, seed: int) -> tuple[list[Pattern], int]:
    """All patterns if there are no more than `most`, else as many different ones; and how many there are."""
    counts = [going(size, ratio) for size in sizes]
    total = math.prod(math.comb(size, count) for size, count in zip(sizes, counts, strict=True))
    if total <= most:
        each = [list(itertools.combinations(range(size), count)) for size, count in zip(sizes, counts, strict=True)]
        return [tuple(one) for one in itertools.product(*each)], total
    draw = random.Random(seed)
    found: dict[Pattern, None] = {}
    while len(found) < most:
        drawn = (draw.sample(range(size), count) for size, count in zip(sizes, counts, strict=True))
        found[tuple(tuple(sorted(one)) for one in drawn)] = None
    return list(found), total


def as_rows(
    groups: Sequence[Group], every: Sequence[Pattern], scores: Mapping[str, Sequence[float]], means: Any
) -> Any:
    """The patterns with their scores and what came of them, one row each."""
    return [
        {
            "gone": [list(gone) for gone in pattern],
            "scores": {name: values[n] for name, values in scores.items()},
            **{name: values[n] for name, values in means.items()},
        }
        for n, pattern in enumerate(every)
    ]
