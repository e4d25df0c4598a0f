"""One call, one table: what unlearned models forgot, kept, betray and give back, each beside the original and the retrained.

The standards of TOFU (Maini et al., arXiv:2401.06121), MUSE (Shi et al., arXiv:2407.06460) and Open-Unlearning (Dorna et
al., arXiv:2506.12618) in four blocks: forgetting, utility, privacy, robustness; and a fifth, representation: what the
logit lens still reads in the layer that knows most. How it differs from their code:

1. What is to be forgotten should come to the value of the retrained model (→), not to zero: an answer much less likely
   than a model gives that never saw it is a mark that an attacker can read. Without a retrained model such columns point
   down, and forget quality and privacy leakage are left out, never computed against a made-up 0.5.
2. The null control is a copy of the original, trained on `retain` alone: it shares data, optimizer and cost with the
   methods that train and lacks the one thing on trial, the signal to forget. What it seems to forget is plain drift.
3. Model utility is the harmonic mean of probability, ROUGE-L and max(0, 1 - R) on `retain`; join other sets of questions
   to it to have them counted.
4. Values are kept per example, and intervals are drawn over `by` (people), not over questions.
5. Every attack on membership sees the same pass; Min-K takes 40% of an answer's tokens, as TOFU and MUSE set it.
"""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from overhaul import session
from overhaul.data.examples import Examples, join
from overhaul.errors import RequestError, did_you_mean, writing
from overhaul.fit import fit
from overhaul.judge._rows import BLOCKS, SHARE, About, Judged, Row, against, finite
from overhaul.judge.evidence import Evidence
from overhaul.judge.generation import rouge_l_f1
from overhaul.judge.likelihood import auc
from overhaul.judge.metrics.membership import by_min_k
from overhaul.judge.robustness import Attacks
from overhaul.judge.standards import privacy_leakage
from overhaul.method import Outcome
from overhaul.modes import at_rest
from overhaul.objectives import cross_entropy

Source = nn.Module | Callable[[], nn.Module]
"""A model, or what opens it: then no two are in memory at once."""

Direction = Literal["up", "down", "anchor", "zero"]
ARROWS: Mapping[str, str] = {"up": "↑", "down": "↓", "anchor": "→", "zero": "→0"}

LIMIT = 200
NULL = "fine-tuned on retain"
MISSING = "–"

LABELS: Mapping[str, tuple[str, Direction]] = {
    "forgetting.prob": ("P(answer)", "anchor"),
    "forgetting.rouge": ("ROUGE-L", "anchor"),
    "forgetting.ES": ("extraction strength", "anchor"),
    "forgetting.EM": ("exact memorisation", "anchor"),
    "forgetting.truth_ratio": ("truth ratio", "anchor"),
    "forgetting.fq_p": ("forget quality (log10 p)", "up"),
    "utility.prob": ("P(answer)", "up"),
    "utility.rouge": ("ROUGE-L", "up"),
    "utility.truth_ratio": ("max(0, 1 - R)", "up"),
    "utility.hmean": ("model utility", "up"),
    "privacy.loss.auc": ("AUC loss", "anchor"),
    "privacy.zlib.auc": ("AUC zlib", "anchor"),
    "privacy.min_k.auc": ("AUC Min-K", "anchor"),
    "privacy.min_k_plus_plus.auc": ("AUC Min-K++", "anchor"),
    "privacy.min_k.tpr@fpr=1e-3": ("TPR at 0.1%", "anchor"),
    "privacy.min_k.tpr@fpr=1e-2": ("TPR at 1%", "anchor"),
    "privacy.leakage": ("privacy leakage", "zero"),
    "robustness.8bit": ("8 bit", "anchor"),
    "robustness.4bit": ("4 bit", "anchor"),
    "robustness.paraphrase": ("paraphrase", "anchor"),
    "robustness.translated": ("translated", "anchor"),
    "robustness.prefix": ("prefix", "anchor"),
    "robustness.few_shot": ("few shots", "anchor"),
    "robustness.best_of_k": ("best of k", "anchor"),
    "robustness.relearnt": ("relearnt", "anchor"),
    "robustness.recovered": ("recovered", "anchor"),
    "robustness.unrelated": ("other training", "anchor"),
    "representation.lens": ("P(answer), best layer", "anchor"),
}
"""What the printed table shows, under which name, and where it should go."""


@dataclass(frozen=True)
class RetainOnly:
    """The null control's training: as long and at such a rate as the methods it stands beside."""

    steps: int = 60
    lr: float = 1e-4
    batch_size: int = 16


@dataclass(frozen=True)
class Table:
    """All rows: the original, the retrained, the null control, then the methods in the order in which they were given.

    Attributes:
        rows: one per model.
        original: the name of the row that knows.
        retrained: the name of the row that never knew, or None.
        data: sizes and hashes of the roles.
    """

    rows: list[Row]
    original: str
    retrained: str | None
    data: dict[str, Any]

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def direction(self, column: str) -> Direction:
        """Where a column should go; to the anchor only where there is one."""
        wanted = LABELS[column][1] if column in LABELS else "anchor"
        return "down" if wanted == "anchor" and self.retrained is None else wanted

    def ranked(self, column: str) -> list[str]:
        """The methods from best to worst in one column; the anchors are left out, and what was not measured comes last."""
        wanted = self.direction(column)
        aim = self[self.retrained].values.get(column, math.nan) if self.retrained and wanted == "anchor" else 0.0

        def badness(row: Row) -> float:
            value = row.values.get(column, math.nan)
            off = {"up": -value, "down": value}.get(wanted, abs(value - aim))
            return math.inf if math.isnan(off) else off

        others = [row for row in self.rows if row.name not in (self.original, self.retrained)]
        return [row.name for row in sorted(others, key=badness)]

    def to_markdown(self) -> str:
        """One table for each block that was measured, with an arrow at each column."""
        parts: list[str] = []
        for block in BLOCKS:
            columns = [c for c in LABELS if c.startswith(f"{block}.") and any(c in row.values for row in self.rows)]
            if not columns:
                continue
            heads = [f"{LABELS[c][0]} {ARROWS[self.direction(c)]}" for c in columns]
            lines = [f"| {block} | {' | '.join(heads)} |", f"|---|{'---:|' * len(columns)}"]
            for row in self.rows:
                cells = [_cell(row.values.get(c, math.nan)) for c in columns]
                lines.append(f"| {row.name.replace('|', chr(92) + '|')} | {' | '.join(cells)} |")
            parts.append("\n".join(lines))
        anchor = "→ towards the retrained model" if self.retrained else "no retrained model: the target is not known"
        return "\n\n".join([*parts, f"↑ higher is better, ↓ lower is better, {anchor}."]) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Directions by column, and one report per row; a number that is missing or not finite is null."""
        base = self[self.original]
        anchor = self[self.retrained] if self.retrained else None
        blocks = {row.name: row.blocks() for row in self.rows}
        anchors = {"original": blocks[base.name], "retrain": blocks[anchor.name] if anchor else None}
        names = {name for row in self.rows for name in row.values}
        reports = [
            {
                "model_hash": row.digest,
                "base_hash": base.digest,
                "retrain_hash": anchor.digest if anchor else None,
                "method": row.name,
                "guarantee_level": row.about.guarantee,
                "seeds": list(row.about.seeds),
                "data": self.data,
                **blocks[row.name],
                "anchors": anchors,
                "per_sample": f"per-sample-{place}.json",
                "cost": {"seconds": row.about.seconds, "passes": row.about.passes},
            }
            for place, row in enumerate(self.rows)
        ]
        return {"directions": {name: self.direction(name) for name in sorted(names)}, "rows": reports}

    def write(self, folder: str | Path) -> Path:
        """Write `unlearning.md`, `unlearning.json` and the values per example that it names, each renamed when complete."""
        folder = Path(folder)
        files = {"unlearning.md": self.to_markdown(), "unlearning.json": json.dumps(self.to_json(), indent=1) + "\n"}
        for place, row in enumerate(self.rows):
            values = {name: [finite(value) for value in each] for name, each in row.samples.items()}
            files[f"per-sample-{place}.json"] = json.dumps({"method": row.name, "values": values}) + "\n"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                partial = folder / f".{name}.partial"
                partial.write_text(text, encoding="utf-8")
                os.replace(partial, folder / name)
        return folder


def unlearning_table(
    models: Mapping[str, Source],
    *,
    forget: Examples,
    retain: Examples,
    holdout: Examples,
    original: str = "original",
    retrained: str | None = "retrained",
    null: RetainOnly | None = RetainOnly(),
    attacks: Attacks | None = None,
    by: str | None = None,
    about: Mapping[str, About] | None = None,
    limit: int = LIMIT,
) -> Table:
    """Judge all models by the field's standards, one after the other.

    Args:
        models: by the name of their row; given as what opens them, one is in memory at a time.
        forget: what was to be forgotten: questions with answers (with `wrong`, `paraphrase` and `translation` for all
            columns), or texts.
        retain: what was to stay.
        holdout: of the same kind as `forget`, and seen by no model.
        original: which of the models is the one before unlearning.
        retrained: which was trained without `forget`; None where there is none, and some columns with it.
        null: how the null control is trained, or None for none.
        attacks: how hard robustness is tried, and with which `shots`; `Attacks(by=by)` if not given.
        by: the row column whose values (people) are independent of one another; examples if None.
        about: what a report should say of a row besides.
        limit: most examples of a role that answers are generated for.

    Raises:
        RequestError: a named row is missing, or the data is not what the measures read.
    """
    for name in (original, *([] if retrained is None else [retrained]), *(about or {})):
        if name not in models:
            raise RequestError(f"No model is called {name!r}.{did_you_mean(name, models)}")
    if null is not None and NULL in models:
        raise RequestError(f"{NULL!r} is the null control's row; give that model another name, or null=None.")
    data = {"forget": forget, "retain": retain, "holdout": holdout}
    judged = Judged(data, attacks or Attacks(by=by), by, limit)
    sources = {name: models[name] for name in (original, *([] if retrained is None else [retrained]))}
    if null is not None:
        sources[NULL] = lambda: retain_only(models[original], retain, null)
    sources |= models
    rows = [
        judged.row(name, opened(source)) for name, source in session.progress(sources.items(), "judging", len(sources))
    ]
    first, second = rows[0], None if retrained is None else rows[1]
    rows = [replace(against(row, first, second), about=(about or {}).get(row.name, About())) for row in rows]
    sizes: dict[str, Any] = {f"{role}_n": len(part) for role, part in data.items()}
    hashes = {role: part.digest() for role, part in data.items()}
    return Table(rows, original, retrained, {**sizes, "hashes": hashes})


def _cell(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.3g}"


def opened(source: Source) -> nn.Module:
    """The model, opened if need be."""
    return source if isinstance(source, nn.Module) else source()


def retain_only(original: Source, retain: Examples, how: RetainOnly) -> nn.Module:
    """The null control: the original, trained on what is to stay and never told what to forget."""
    model = fresh(original)
    with session.using(scratch=None):
        data = {"retain": retain}
        fit(model, [cross_entropy("retain")], data, steps=how.steps, lr=how.lr, batch_size=how.batch_size, name=NULL)
    return model


def fresh(source: Source) -> nn.Module:
    """A model that may be changed: a copy of one that is held, or one opened anew."""
    return copy.deepcopy(source) if isinstance(source, nn.Module) else source()


Unlearn = Callable[[nn.Module, Examples], nn.Module | Outcome]
"""(model, what to forget) -> the model without it: a method with all else filled in. It may change its argument."""

Criteria = Callable[[nn.Module, Examples], Mapping[str, float]]
"""(model, all that was to be forgotten so far) -> numbers: MUSE's first four criteria, say."""


def criteria(
    model: nn.Module,
    forget: Examples,
    *,
    retain: Examples,
    holdout: Examples,
    retrained_auc: float,
    text: Examples | None = None,
    limit: int = LIMIT,
) -> dict[str, float]:
    """MUSE's first four criteria: verbatim (with `text` only), knowledge, leakage, utility.

    Args:
        model: the model to be judged.
        forget: questions about what was to be forgotten.
        retain: questions about what was to stay.
        holdout: questions that no model has seen, like those of `forget`.
        retrained_auc: Min-K's AUC of the retrained model (`privacy.min_k.auc` of its row).
        text: the forgotten text itself, to be continued word for word.
        limit: most answers and continuations that are generated for each.

    Returns:
        Mean ROUGE-L F1 of continuations and of answers (should fall), privacy leakage in per cent (should be 0), and mean
        ROUGE-L F1 of answers to `retain` (should stay).
    """

    def f1(examples: Examples) -> float:
        answers = Evidence(model, examples, limit).answered
        return statistics.fmean(rouge_l_f1(one.expected, one.text) for one in answers)

    with at_rest(model):
        said = {"verbatim": f1(text)} if text is not None else {}
        members, others = (by_min_k(Evidence(model, part, limit), SHARE) for part in (forget, holdout))
        leakage = privacy_leakage(auc(members, others), retrained_auc)
        return {**said, "knowledge": f1(forget), "leakage": leakage, "utility": f1(retain)}


def scalability(
    original: Source, unlearn: Unlearn, folds: Sequence[Examples], judge: Criteria
) -> list[dict[str, float]]:
    """MUSE's fifth criterion: one request that grows. The original forgets the first fold, the first two, and so on.

    Args:
        original: the model before unlearning; each request starts from it anew.
        unlearn: the method.
        folds: parts of the forget set.
        judge: measures a model after its request.

    Returns:
        What `judge` measured, for each number of folds.
    """
    requests = [join(folds[: count + 1]) for count in range(len(folds))]
    return [
        dict(judge(_unlearnt(unlearn, fresh(original), request), request))
        for request in session.progress(requests, "growing requests", len(requests))
    ]


def sustainability(
    original: Source, unlearn: Unlearn, requests: Sequence[Examples], judge: Criteria
) -> list[dict[str, float]]:
    """MUSE's sixth criterion: requests that follow one another, each on the model that the one before left.

    Args:
        original: the model before any request; not changed.
        unlearn: the method.
        requests: what is to be forgotten, in the order in which it is asked for.
        judge: measures the model after each request, on all that was asked for by then.

    Returns:
        What `judge` measured after each request.
    """
    model = fresh(original)
    found: list[dict[str, float]] = []
    for count, request in enumerate(session.progress(requests, "successive requests", len(requests)), 1):
        model = _unlearnt(unlearn, model, request)
        found.append(dict(judge(model, join(requests[:count]))))
    return found


def _unlearnt(unlearn: Unlearn, model: nn.Module, request: Examples) -> nn.Module:
    done = unlearn(model, request)
    return done.model if isinstance(done, Outcome) else done
