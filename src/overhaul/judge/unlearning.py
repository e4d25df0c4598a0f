"""One call, one table: what unlearned models forgot, kept, betray and give back, each beside the original and the retrained.

The standards of TOFU (Maini et al., arXiv:2401.06121), MUSE (Shi et al., arXiv:2407.06460) and Open-Unlearning (Dorna et
al., arXiv:2506.12618) in four blocks: forgetting, utility, privacy, robustness; and a fifth, representation: what the
logit lens still reads in the layer that knows most. How it differs from their code:

1. What is to be forgotten should come to the value of the retrained model (→), not to zero: an answer much less likely
   than a model gives that never saw it is a mark that an attacker can read. Without a retrained model such columns point
   down, and forget quality and privacy leakage are left out, never computed against a made-up 0.5.
2. Nothing is trained here but by attacks: null controls are models like the others, made by who asks.
3. Model utility is the harmonic mean of probability, ROUGE-L and max(0, 1 - R) on `retain`; join other sets of questions
   to it to have them counted.
4. Values are kept per example, and intervals are drawn over `by` (people), not over questions.
5. Every attack on membership sees the same pass; Min-K takes 40% of an answer's tokens, as TOFU and MUSE set it.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from overhaul import session
from overhaul.data.examples import Examples, join
from overhaul.errors import RequestError, did_you_mean
from overhaul.judge._rows import SHARE, Judged, Measured, against
from overhaul.judge.evidence import Evidence
from overhaul.judge.generation import rouge_l_f1
from overhaul.judge.judge import LIMIT
from overhaul.judge.likelihood import auc
from overhaul.judge.metrics.membership import by_min_k
from overhaul.judge.robustness import Attacks, apart
from overhaul.judge.standards import privacy_leakage
from overhaul.modes import at_rest
from overhaul.outcome import Outcome
from overhaul.report.comparison import Comparison, Kind, Row

Source = nn.Module | Callable[[], nn.Module]
"""A model, or what opens it: then no two are in memory at once."""

MEASURES: Mapping[str, tuple[str, str, str, str]] = {
    "forgetting.prob": ("answer probability", "probability", "up", "anchor"),
    "forgetting.rouge": ("ROUGE-L recall", "share", "up", "anchor"),
    "forgetting.ES": ("extraction strength", "share", "up", "anchor"),
    "forgetting.EM": ("exact memorisation", "share", "up", "anchor"),
    "forgetting.truth_ratio": ("truth ratio", "share", "down", "anchor"),
    "forgetting.fq_p": ("forget quality (log10 p)", "log10 p", "up", "anchor"),
    "utility.prob": ("answer probability", "probability", "up", "same"),
    "utility.rouge": ("ROUGE-L recall", "share", "up", "same"),
    "utility.truth_ratio": ("max(0, 1 - truth ratio)", "share", "up", "same"),
    "utility.hmean": ("model utility", "share", "up", "same"),
    "privacy.loss.auc": ("AUC (loss)", "", "up", "anchor"),
    "privacy.zlib.auc": ("AUC (zlib)", "", "up", "anchor"),
    "privacy.min_k.auc": ("AUC (Min-40%)", "", "up", "anchor"),
    "privacy.min_k_plus_plus.auc": ("AUC (Min-40%++)", "", "up", "anchor"),
    "privacy.min_k.tpr@fpr=1e-3": ("TPR at 0.1% FPR (Min-40%)", "share", "up", "anchor"),
    "privacy.min_k.tpr@fpr=1e-2": ("TPR at 1% FPR (Min-40%)", "share", "up", "anchor"),
    "privacy.leakage": ("PrivLeak (%)", "", "up", "anchor"),
    "robustness.8bit": ("rounded to 8 bits", "probability", "up", "anchor"),
    "robustness.4bit": ("rounded to 4 bits", "probability", "up", "anchor"),
    "robustness.paraphrase": ("paraphrased", "probability", "up", "anchor"),
    "robustness.translated": ("translated", "probability", "up", "anchor"),
    "robustness.prefix": ("prefix", "probability", "up", "anchor"),
    "robustness.few_shot": ("few shots", "probability", "up", "anchor"),
    "robustness.best_of_k": ("best of k (ROUGE-L)", "share", "up", "anchor"),
    "robustness.relearnt": ("relearnt", "probability", "up", "anchor"),
    "robustness.recovered": ("share recovered by relearning", "share", "up", "anchor"),
    "robustness.unrelated": ("after other training", "probability", "up", "anchor"),
    "representation.lens": ("answer probability, best layer", "probability", "up", "anchor"),
}
"""What is measured, by block: the field's name, unit, which way knowing more goes, and where it should go. What is measured
besides stands behind it in the JSON file."""


@dataclass(frozen=True)
class About:
    """What is known of a row and cannot be measured on its model.

    Attributes:
        guarantee: what its maker proves; "none" for a method that is judged by attacks alone.
        seeds: that went into it.
        seconds: that it took.
        passes: over the data that it took.
    """

    guarantee: str = "none"
    seeds: tuple[int, ...] = ()
    seconds: float | None = None
    passes: float | None = None


def unlearning_table(
    models: Mapping[str, Source],
    *,
    forget: Examples,
    retain: Examples,
    holdout: Examples,
    original: str = "original",
    retrained: str | None = "retrained",
    null: str | None = None,
    attacks: Attacks | None = None,
    by: str | None = None,
    about: Mapping[str, About] | None = None,
    limit: int = LIMIT,
) -> Comparison:
    """Judge all models by the field's standards, one after the other.

    Args:
        models: by the name of their row; given as what opens them, one is in memory at a time.
        forget: what was to be forgotten: questions with answers (with `wrong`, `paraphrase` and `translation` for all
            columns), or texts.
        retain: what was to stay.
        holdout: of the same kind as `forget`, and seen by no model.
        original: which of the models is the one before unlearning.
        retrained: which was trained without `forget`; None where there is none, and some columns with it.
        null: which is the null control, such as the original trained on `retain` alone (`overhaul.retain_only`).
        attacks: how hard robustness is tried, and with which `shots`; `Attacks(by=by)` if not given.
        by: the row column whose values (people) are independent of one another; examples if None.
        about: what a report should say of a row besides.
        limit: most examples of a role that answers are generated for.

    Returns:
        The original, the retrained, the null control, then the methods in the order in which they were given. Each row
        keeps its values per example, intervals of the AUCs and curves of relearning.

    Raises:
        RequestError: a named row is missing, or the data is not what the measures read.
    """
    named = {"before": original, "retrained": retrained, "null control": null}
    for name in (*filter(None, named.values()), *(about or {})):
        if name not in models:
            raise RequestError(f"No model is called {name!r}.{did_you_mean(name, models)}")
    data = {"forget": forget, "retain": retain, "holdout": holdout}
    judged = Judged(data, attacks or Attacks(by=by), by, limit)
    apart(
        forget, judged.attacks.share, judged.attacks.by
    )  # what relearning refuses is refused before anything is judged
    kinds: dict[str, Kind] = {name: kind for kind, name in named.items() if name is not None}  # pyright: ignore[reportAssignmentType]
    order = [*kinds, *(name for name in models if name not in kinds)]
    found = {name: judged.measure(opened(models[name])) for name in session.progress(order, "judging", len(order))}
    anchors = found[original], None if retrained is None else found[retrained]
    found = {name: against(one, *anchors) for name, one in found.items()}
    known = {name for one in found.values() for name in one.values}
    names = [*(name for name in MEASURES if name in known), *sorted(known - set(MEASURES))]
    rows = [
        _row(name, kinds.get(name, "method"), one, names, (about or {}).get(name, About()))
        for name, one in found.items()
    ]
    facts = {
        "data": {f"{role}_n": len(part) for role, part in data.items()},
        "materials_sha256": {role: part.digest() for role, part in data.items()},
        "note": "towards the retrained model" if retrained else "no retrained model: the target is not known",
    }
    counts = {name: max(len(one.samples.get(name, ())) for one in found.values()) or None for name in names}
    measures = [_measure(name, retrained is not None, counts[name]) for name in names]
    return Comparison("Unlearning", measures, rows, facts)


def _measure(name: str, anchored: bool, n: int | None) -> dict[str, Any]:
    label, unit, better, wanted = MEASURES.get(name, (name.partition(".")[2], "", "up", "anchor"))
    if wanted == "anchor" and not anchored:
        # of an AUC the target is known: below 0.5 what was forgotten is as visible as above it
        wanted = "chance" if name.endswith(".auc") else "down" if better == "up" else "up"
    block = name.partition(".")[0]
    said = {"group": block, "metric": name, "label": label, "help": "", "on": "", "unit": unit, "n": n}
    return {**said, "better": better, "wanted": wanted, "like": "retrained", "aside": name not in MEASURES}


def _row(label: str, kind: Kind, one: Measured, names: Sequence[str], about: About) -> Row:
    facts = {
        "digest": one.digest,
        "about": asdict(about),
        "intervals": {name: list(ends) for name, ends in one.intervals.items()},
        "curves": {name: asdict(curve) for name, curve in one.relearnt.items()},
    }
    known = {name: value for name, value in one.values.items() if math.isfinite(value)}
    values: list[list[float | None]] = [[known.get(name)] for name in names]
    samples: dict[str, list[float | None]] = {name: list(each) for name, each in one.samples.items()}
    return Row(label, kind, values, about.seconds, None, facts, samples)


def opened(source: Source) -> nn.Module:
    """The model, opened if need be."""
    return source if isinstance(source, nn.Module) else source()


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
