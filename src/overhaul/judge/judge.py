"""Measure a model by what a recipe's `judge:` block asks for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from overhaul.data.examples import Examples, places_by
from overhaul.errors import RequestError
from overhaul.generation import generates
from overhaul.judge import harness
from overhaul.judge.evidence import Evidence
from overhaul.judge.measure import Measure as Measure
from overhaul.judge.metrics import ANCHOR, METRICS, Value
from overhaul.judge.requests import RETRAINED, check_data
from overhaul.judge.requests import Request as Request
from overhaul.judge.requests import broken_limits as broken_limits
from overhaul.judge.requests import check as check
from overhaul.modes import at_rest
from overhaul.session import progress

LIMIT = 200
SAMPLES = {"answers": 4, "prompts": 4, "text": 2, "images": 0}


@dataclass(frozen=True)
class Anchor:
    """What the model says that others are compared with: numbers, no model.

    Attributes:
        values: by the request's name, with "" or the part that is measured by group, and its roles.
        evidence: by role, as far as metrics read it.
        name: of the model in the recipe.
    """

    values: Mapping[tuple[str, str], float]
    evidence: Mapping[str, Evidence]
    name: str = RETRAINED


@dataclass(frozen=True)
class Judgement:
    """What a model was measured to do.

    Attributes:
        measures: one per request, in their order; three for one by group: overall, of the worst group, and the gap.
        samples: a few generated answers per role: group, on, prompt, expected, output.
    """

    measures: list[Measure]
    samples: list[dict[str, str]]


def anchor_of(
    model: nn.Module,
    requests: Collection[Request],
    data: Mapping[str, Examples],
    *,
    limit: int = LIMIT,
    name: str = RETRAINED,
    tokenizer: Any = None,
) -> Anchor:
    """Measure the model that others are compared with, once, so that it need not be in memory beside another.

    Args:
        model: the retrained model, say, which is not referred to afterwards.
        requests: from `check`.
        data: examples by role, encoded for the models that are compared with it.
        limit: as in `judge`.
        name: of the model in the recipe; only what is compared with it is measured.
        tokenizer: the model's, as in `judge`.

    Raises:
        RequestError: as `judge`; or the data has tokens that the model does not know.
    """
    requests = [request for request in requests if request.compared_with == name]
    check_data(requests, data)
    evidence = _evidence(model, requests, data, limit)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", math.inf)
    for role, one in evidence.items():
        tokens = [item["input_ids"] for item in one.examples.items if "input_ids" in item]
        if any(int(ids.max()) >= vocabulary for ids in tokens):
            raise RequestError(
                f"The role {role!r} has tokens beyond the {vocabulary} of the {name} model; both need one tokenizer."
            )
    with at_rest(model):
        known = Anchor({}, evidence, name)
        values: dict[tuple[str, str], float] = {}
        for request in requests:
            for score in _scores(model, tokenizer, request):
                values[f"{request.name}.{score.name}", score.on] = score.value
            if request.task:
                continue
            # compared with itself, so that everything is read that a comparison will ask for
            for part, (value, _) in _parts(request, evidence, known).items():
                values[request.name + part, request.on] = value
    for one in evidence.values():
        one.let_go()
    return Anchor(values, evidence, name)


def judge(
    model: nn.Module,
    requests: Collection[Request],
    data: Mapping[str, Examples],
    *,
    limit: int = LIMIT,
    anchor: Anchor | Collection[Anchor] | None = None,
    tokenizer: Any = None,
) -> Judgement:
    """Measure what a model can do. The model, its mode and the random state are left as they were.

    Args:
        model: a Hugging Face model, on any device.
        requests: from `check`.
        data: examples by role.
        limit: most examples per role that answers are generated for (accuracy, rouge, repetition); a fixed random
            choice, the same for every model. Likelihoods are taken on all examples.
        anchor: from `anchor_of` with the same requests, data and limit; several, where several models are compared with.
            Given the retrained one, what is forgotten should become as it is there.
        tokenizer: the model's, for metrics that bring their own data (tasks of lm-evaluation-harness).

    Raises:
        RequestError: the data is not what a metric reads, or the model cannot do what a metric asks.
        RunError: the model's outputs are not finite.
    """
    if limit < 1:
        raise RequestError(f"limit={limit} leaves nothing to generate; it must be at least 1.")
    check_data(requests, data)
    known = [anchor] if isinstance(anchor, Anchor) else anchor or []
    anchors = {one.name: one for one in known}
    for request in requests:
        named = request.anchor is not None or METRICS[request.metric].anchored
        if named and request.compared_with not in anchors:
            raise RequestError(
                f"{request.metric} compares with the {request.compared_with} model; give `anchor=anchor_of(...)`."
            )
    evidence = _evidence(model, requests, data, limit)
    measures: list[Measure] = []
    with at_rest(model):
        for request in progress(requests, "judging", len(requests)):
            held_against = anchors.get(request.compared_with or "")
            measures += [_scored(request, score, held_against) for score in _scores(model, tokenizer, request)]
            measures += [] if request.task else _measures(request, evidence, held_against)
        return Judgement(measures, _samples(model, requests, evidence))


def try_out(model: nn.Module, request: Request, data: Mapping[str, Examples]) -> None:
    """Begin to measure one request: what its metric asks of the model is refused before anything is computed.

    Raises:
        RequestError: the model cannot do it.
    """
    if request.roles:
        evidence = {name: Evidence(model, data[role], 1) for name, role in request.roles.items()}
        _value(request, evidence, evidence)


def _evidence(
    model: nn.Module, requests: Collection[Request], data: Mapping[str, Examples], limit: int
) -> dict[str, Evidence]:
    roles = dict.fromkeys(role for request in requests for role in request.roles.values())
    return {role: Evidence(model, data[role], limit) for role in roles}


WORST, GAP = ".worst", ".gap"
"""What is added to a metric's name where it is measured by group."""


def _value(request: Request, evidence: Mapping[str, Evidence], anchored: Mapping[str, Evidence]) -> Value:
    """One number, from the evidence by the metric's own names of the roles."""
    metric = METRICS[request.metric]
    given = {**evidence, **{ANCHOR + name: anchored[name] for name in metric.anchored}}
    return metric.call(**given, **request.options)


def _groups(request: Request, evidence: Mapping[str, Evidence], anchored: Mapping[str, Evidence]) -> dict[str, Value]:
    """The metric on each group of the first role; groups in which nothing was asked are left out."""
    first = next(iter(request.roles))
    found: dict[str, Value] = {}
    for name, places in places_by(evidence[first].examples.rows, request.by or "").items():
        ours, theirs = (
            {role: one.part(places) if role == first else one for role, one in each.items()}
            for each in (evidence, anchored)
        )
        value, n = _value(request, ours, theirs)
        if n:
            found[name] = value, n
    return found


def _parts(request: Request, evidence: Mapping[str, Evidence], anchor: Anchor | None) -> dict[str, Value]:
    """What a request measures, by what is added to its name; the groups themselves under "=" and their names."""
    ours = {name: evidence[role] for name, role in request.roles.items()}
    needed = METRICS[request.metric].anchored
    theirs = {name: anchor.evidence[request.roles[name]] for name in needed} if anchor is not None else {}
    parts = {"": _value(request, ours, theirs)}
    if request.by is None:
        return parts
    groups = _groups(request, ours, theirs)
    values = [value for value, _ in groups.values()]
    best, worst = (max(values), min(values)) if METRICS[request.metric].better == "up" else (min(values), max(values))
    n = sum(n for _, n in groups.values())
    return {
        **parts,
        WORST: (worst, n),
        GAP: (abs(best - worst), n),
        **{f"={name}": one for name, one in groups.items()},
    }


def _measures(request: Request, evidence: Mapping[str, Evidence], anchor: Anchor | None) -> list[Measure]:
    metric = METRICS[request.metric]
    parts = _parts(request, evidence, anchor)
    groups = {name[1:]: value for name, (value, _) in parts.items() if name.startswith("=")}
    said = request.name.removeprefix(request.metric).strip("()")
    label = f"{metric.label} ({said})" if said else metric.label
    labels = {"": label, WORST: f"{label}, worst {request.by}", GAP: f"{label}, gap by {request.by}"}
    measures: list[Measure] = []
    for part in (name for name in labels if name in parts):
        value, n = parts[part]
        made = _measure(
            request,
            anchor,
            request.name + part,
            request.on,
            "down" if part == GAP else metric.better,
            "down" if part == GAP else metric.forgotten,
            label=labels[part],
            unit=metric.unit,
            value=value,
            n=n,
            help=metric.help,
            groups=groups if part == "" else {},
        )
        measures.append(made)
    return measures


def _scores(model: nn.Module, tokenizer: Any, request: Request) -> list[harness.Score]:
    """What the model scores in a task; nothing of a request that reads roles."""
    return METRICS[request.metric].call(model, tokenizer, request.task, **request.options) if request.task else []


def _scored(request: Request, score: harness.Score, anchor: Anchor | None) -> Measure:
    """A score of a task as a measure like any other."""
    return _measure(
        request,
        anchor,
        f"{request.name}.{score.name}",
        score.on,
        score.better,
        "down" if score.better == "up" else "up",
        label=score.name + request.name.removeprefix(request.metric),
        unit=score.unit,
        value=score.value,
        n=score.n,
        help=score.help,
        stderr=score.stderr,
    )


def _measure(
    request: Request, anchor: Anchor | None, name: str, on: str, better: str, forgotten: str, **known: Any
) -> Measure:
    """A number with what is wanted of it.

    Args:
        request: whose group and anchor say so.
        anchor: the model that it is compared with.
        name: of the measure.
        on: its role or task.
        better: which way a model improves.
        forgotten: which way it should go where the role is to be forgotten.
        known: what else is known; a value of NaN is none.
    """
    wanted, target = {"forgotten": forgotten, "learned": better, "kept": "same"}[request.group], None
    if anchor is not None and (request.group == "forgotten" or request.anchor is not None):
        wanted, target = "anchor", anchor.values[name, on]
    known["value"] = None if math.isnan(known["value"]) else known["value"]
    like = anchor.name if anchor is not None and target is not None else ""
    return Measure(request.group, name, on=on, better=better, wanted=wanted, anchor=target, like=like, **known)


def _samples(model: nn.Module, requests: Collection[Request], evidence: Mapping[str, Evidence]) -> list[dict[str, str]]:
    """A few answers per role, under the first group that names it alone; none without `generate` or a tokenizer."""
    if not generates(model):
        return []
    groups: dict[str, str] = {}
    for request in requests:
        if len(request.roles) == 1 and evidence[request.on].examples.processor is not None:
            groups.setdefault(request.on, request.group)
    return [
        {"group": group, "on": role, "prompt": one.prompt, "expected": one.expected, "output": one.text}
        for role, group in groups.items()
        for one in evidence[role].samples(SAMPLES[evidence[role].kind])
    ]
