"""What the unlearning table measures on one model, and what is computed against the anchors."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.generation import generates
from overhaul.intervals import interval
from overhaul.judge.evidence import Evidence, truth_ratios
from overhaul.judge.generation import rouge_l
from overhaul.judge.likelihood import auc, exact_memorisation, extraction_strength, tpr_at_fpr
from overhaul.judge.metrics.membership import by_loss, by_min_k, by_min_k_plus_plus, by_zlib
from overhaul.judge.representation import lens
from overhaul.judge.robustness import Attacks, Relearnt, attack
from overhaul.judge.standards import forget_quality, model_utility, privacy_leakage
from overhaul.modes import at_rest

SHARE = 0.4
"""Of an answer's tokens that Min-K and Min-K++ read."""

RATES: Mapping[float, str] = {0.001: "tpr@fpr=1e-3", 0.01: "tpr@fpr=1e-2"}
"""False-positive rates at which the share of members found is reported, and under which name."""

ATTACKS: Mapping[str, Callable[[Evidence], list[float]]] = {
    "loss": by_loss,
    "zlib": by_zlib,
    "min_k": lambda evidence: by_min_k(evidence, SHARE),
    "min_k_plus_plus": lambda evidence: by_min_k_plus_plus(evidence, SHARE),
}
LEAKAGE = "min_k"
"""The attack behind privacy leakage (MUSE)."""


@dataclass(frozen=True)
class Measured:
    """One model's numbers.

    Attributes:
        digest: SHA-256 of its weights.
        values: "block.measure" -> number; what cannot be measured on this data is not there.
        samples: the same names -> one value per example: per distinct question for truth ratios (raw R), paraphrases
            and translations, for members ("privacy.loss.forget") and others ("privacy.loss.holdout") alone.
        intervals: of the AUCs, 95%, drawn over people.
        relearnt: "relearnt", and "unrelated" where that was tried -> the curve.
    """

    digest: str
    values: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    relearnt: dict[str, Relearnt] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """What every model of a table is judged on.

    Attributes:
        data: the roles forget, retain and holdout.
        attacks: how hard robustness is tried.
        by: the row column whose values are independent of one another; examples if None.
        limit: most examples of a role that answers are generated for.
    """

    data: Mapping[str, Examples]
    attacks: Attacks
    by: str | None
    limit: int

    def measure(self, model: nn.Module) -> Measured:
        """Measure one model, which is left as it was."""
        row = Measured(digest(model))
        with at_rest(model):
            evidence = {role: Evidence(model, part, self.limit) for role, part in self.data.items()}
            _forgetting(row, evidence["forget"])
            _utility(row, evidence["retain"])
            self._privacy(row, evidence["forget"], evidence["holdout"])
            _representation(row, evidence["forget"])
        attacked = attack(model, self.data["forget"], self.attacks)
        for name, values in attacked.values.items():
            _note(row, f"robustness.{name}", values)
        row.relearnt.update(attacked.curves)
        row.values.update({f"robustness.{name}": curve.values[-1] for name, curve in attacked.curves.items()})
        return row

    def _privacy(self, row: Measured, members: Evidence, others: Evidence) -> None:
        people = [self._people(evidence.examples) for evidence in (members, others)]
        for name, scoring in ATTACKS.items():
            if name == "zlib" and (members.kind == "images" or members.examples.processor is None):
                continue
            scores = [scoring(evidence) for evidence in (members, others)]
            row.samples[f"privacy.{name}.forget"], row.samples[f"privacy.{name}.holdout"] = scores
            row.values[f"privacy.{name}.auc"] = auc(scores[0], scores[1])
            for rate, label in RATES.items():
                row.values[f"privacy.{name}.{label}"] = tpr_at_fpr(scores[0], scores[1], rate)
            if min(len(set(labels)) for labels in people) > 1:
                row.intervals[f"privacy.{name}.auc"] = interval(auc, (scores[0], people[0]), (scores[1], people[1]))

    def _people(self, examples: Examples) -> list[Hashable]:
        return list(range(len(examples))) if self.by is None else [row[self.by] for row in examples.rows]


def _forgetting(row: Measured, evidence: Evidence) -> None:
    answers = [one.without(evidence.eos) for one in evidence.scored]
    _note(row, "forgetting.ES", [extraction_strength(one.hits) for one in answers])
    _note(row, "forgetting.EM", [exact_memorisation(one.hits) for one in answers])
    _told(row, "forgetting", evidence, lambda ratio: min(ratio, 1 / ratio))


def _utility(row: Measured, evidence: Evidence) -> None:
    _told(row, "utility", evidence, lambda ratio: max(0.0, 1 - ratio))
    row.values["utility.hmean"] = model_utility([v for name, v in row.values.items() if name.startswith("utility.")])


def _told(row: Measured, block: str, evidence: Evidence, closeness: Callable[[float], float]) -> None:
    """What both blocks have: probability, generated words, truth ratios."""
    _note(row, f"{block}.prob", [one.probability for one in evidence.scored])
    asked = evidence.examples
    if evidence.kind == "images" or asked.processor is None:
        return
    if generates(evidence.model):
        _note(row, f"{block}.rouge", [rouge_l(one.expected, one.text) for one in evidence.answered])
    if evidence.kind == "answers" and all("wrong" in each for each in asked.rows):
        ratios = truth_ratios(evidence)
        row.samples[f"{block}.truth_ratio"] = ratios
        row.values[f"{block}.truth_ratio"] = statistics.fmean(map(closeness, ratios))


def _representation(row: Measured, evidence: Evidence) -> None:
    """How probable answers are at the layer that knows them best; the last one is the model's own."""
    if evidence.kind == "images":
        return
    try:
        seen = lens(evidence.model, evidence.examples)
    except RequestError:  # an ensemble has no stack of its own, and some blocks cannot be run by hand
        return
    _note(row, "representation.lens", list(map(math.exp, seen.logp[seen.best])))


def _note(row: Measured, name: str, values: list[float]) -> None:
    row.samples[name] = values
    row.values[name] = statistics.fmean(values)


def against(row: Measured, original: Measured, retrained: Measured | None) -> Measured:
    """The row with what only its anchors can give: forget quality, privacy leakage, the share recovered by relearning."""
    values = dict(row.values)
    ratios = "forgetting.truth_ratio"
    if retrained is not None:
        if ratios in row.samples:
            values["forgetting.fq_p"] = forget_quality(row.samples[ratios], retrained.samples[ratios])
        area = f"privacy.{LEAKAGE}.auc"
        values["privacy.leakage"] = privacy_leakage(row.values[area], retrained.values[area])
    curve = row.relearnt["relearnt"]
    if row is not original:
        values["robustness.recovered"] = curve.recovered(original.relearnt["relearnt"].values[0])[-1]
    return replace(row, values=values)


def digest(model: nn.Module) -> str:
    """SHA-256 over names and values of every weight and buffer that is saved."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
