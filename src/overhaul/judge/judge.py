"""Check a recipe's `judge:` block, and measure a model by it.

    forgotten: {answer_probability: forget, membership: {members: forget, others: strangers}}
    kept:      {accuracy: [retain, sums], bits_per_byte: text}

The group says what is hoped for: `forgotten` should get worse, `learned` better, `kept` should stay. Where a model that was
trained without the data is known (`retrained`), what is forgotten should become as it is there, no more and no less.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from overhaul.data.examples import Examples
from overhaul.errors import RequestError, did_you_mean
from overhaul.judge.cost import cost as cost
from overhaul.judge.evidence import Evidence, kind_of
from overhaul.judge.generation import generates
from overhaul.judge.measure import Measure as Measure
from overhaul.judge.metrics import METRICS, RETRAINED, Value
from overhaul.modes import at_rest
from overhaul.session import progress

Group = Literal["forgotten", "learned", "kept"]
GROUPS: tuple[Group, ...] = ("forgotten", "learned", "kept")

LIMIT = 200
SAMPLES = {"answers": 4, "text": 2, "images": 0}


@dataclass(frozen=True)
class Request:
    """One metric on one role, or on the two that it compares.

    Attributes:
        roles: which of the metric's roles is which of the recipe's: {"role": "forget"}, or
            {"members": "forget", "others": "strangers"}.
    """

    group: Group
    metric: str
    roles: Mapping[str, str]

    @property
    def on(self) -> str:
        """The role, or both: "forget", "forget / strangers"."""
        return " / ".join(self.roles.values())

    @property
    def against_retrained(self) -> bool:
        """Whether the retrained model's value is what is wanted, or what is compared with."""
        return self.group == "forgotten" or bool(METRICS[self.metric].anchored)


@dataclass(frozen=True)
class Anchor:
    """What a model that was trained without the data says: numbers, no model.

    Attributes:
        values: by metric and role.
        evidence: by role, as far as metrics read it.
    """

    values: Mapping[tuple[str, str], float]
    evidence: Mapping[str, Evidence]


@dataclass(frozen=True)
class Judgement:
    """What a model was measured to do.

    Attributes:
        measures: one per request, in their order.
        samples: a few generated answers per role: group, on, prompt, expected, output.
    """

    measures: list[Measure]
    samples: list[dict[str, str]]


def check(spec: Mapping[str, Mapping[str, Any]], roles: Collection[str], *, retrained: bool = False) -> list[Request]:
    """Read a recipe's `judge:` block.

    Args:
        spec: group -> metric -> a role, a list of roles, or a mapping of roles for a metric that compares two.
        roles: the names of the recipe's materials.
        retrained: whether there is a model that was trained without the data.

    Raises:
        RequestError: a group, metric or role is unknown, a role or the retrained model is missing, or one thing is asked
            for twice.
    """
    requests: list[Request] = []
    for group, metrics in _mapping(spec, "judge").items():
        if group not in GROUPS:
            raise RequestError(f"judge has no group {group!r}.{did_you_mean(str(group), GROUPS)}")
        for name, on in _mapping(metrics, f"judge.{group}").items():
            if name not in METRICS:
                raise RequestError(f"judge.{group}: there is no metric {name!r}.{did_you_mean(str(name), METRICS)}")
            if METRICS[name].anchored and not retrained:
                raise RequestError(
                    f"judge.{group}.{name} compares with a model that was trained without the data. Name it in the "
                    "materials: `retrained: {model: FOLDER}`."
                )
            for one in on if isinstance(on, list) else [on]:
                requests.append(Request(group, name, _roles(f"judge.{group}.{name}", name, one, roles)))
    seen: dict[tuple[str, str], Request] = {}
    for request in requests:
        first = seen.setdefault((request.metric, request.on), request)
        if first is not request:
            where = f"{first.group} and {request.group}" if first.group != request.group else first.group
            raise RequestError(f"judge: {request.metric} on {request.on} is named twice ({where}); name it once.")
    return requests


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} must be a mapping, not {value!r}; write {where}: {{name: ...}}.")
    return value


def _roles(where: str, name: str, on: Any, known: Collection[str]) -> dict[str, str]:
    """The roles of one request, checked."""
    wanted = METRICS[name].roles
    if len(wanted) == 1:
        if not isinstance(on, str):
            raise RequestError(f"{where} is measured on a role or a list of roles, not on {on!r}; write {name}: ROLE.")
        given = {wanted[0]: on}
    else:
        example = f"{name}: {{{', '.join(f'{role}: ROLE' for role in wanted)}}}"
        if not isinstance(on, Mapping):
            raise RequestError(f"{where} compares {' with '.join(wanted)}; {on!r} names one role. Write {example}.")
        if set(on) != set(wanted):
            wrong = [role for role in on if role not in wanted] or [role for role in wanted if role not in on]
            verb = "has no role" if wrong[0] in on else "needs a role"
            raise RequestError(f"{where} {verb} {wrong[0]!r}. Write {example}.")
        given = {role: on[role] for role in wanted}
    for role in given.values():
        if not isinstance(role, str) or role not in known:
            raise RequestError(f"{where} reads {role!r}, which is no material.{did_you_mean(str(role), known)}")
    if len(set(given.values())) < len(given):
        raise RequestError(f"{where} compares {given[wanted[0]]!r} with itself; name two different roles.")
    return given


def check_data(requests: Collection[Request], data: Mapping[str, Examples]) -> None:
    """Whether every role's data is what its metrics read. Needs no model.

    Raises:
        RequestError: a role is missing or empty, of another kind, or lacks a column.
    """
    for request in requests:
        metric, where = METRICS[request.metric], f"judge.{request.group}.{request.metric}"
        for role in request.roles.values():
            examples = data.get(role)
            if not examples:
                raise RequestError(f"{where} reads the role {role!r}, which is missing or has no examples.")
            kind = kind_of(examples)
            if kind not in metric.reads:
                fitting = sorted(name for name, other in METRICS.items() if kind in other.reads)
                raise RequestError(
                    f"{where} reads {' or '.join(metric.reads)}, but {role!r} holds {kind}. "
                    f"For {kind} there are {', '.join(fitting)}."
                )
            for column in metric.columns:
                if not all(column in row for row in examples.rows):
                    raise RequestError(f"{where} needs the column {column!r} in every row of {role!r}.")


def anchor_of(
    model: nn.Module, requests: Collection[Request], data: Mapping[str, Examples], *, limit: int = LIMIT
) -> Anchor:
    """Measure the model that was trained without the data, once, so that it need not be in memory beside another.

    Args:
        model: the retrained model, which is not referred to afterwards.
        requests: from `check`.
        data: examples by role, encoded for the models that are compared with it.
        limit: as in `judge`.

    Raises:
        RequestError: as `judge`; or the data has tokens that the model does not know.
    """
    requests = [request for request in requests if request.against_retrained]
    check_data(requests, data)
    evidence = _evidence(model, requests, data, limit)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", math.inf)
    for role, one in evidence.items():
        if not one.examples.is_image and any(int(item["input_ids"].max()) >= vocabulary for item in one.examples.items):
            raise RequestError(
                f"The role {role!r} has tokens beyond the {vocabulary} of the retrained model; both need one tokenizer."
            )
    with at_rest(model):
        known = Anchor({}, evidence)
        # compared with itself, so that everything is read that a comparison will ask for
        values = {(request.metric, request.on): _value(request, evidence, known)[0] for request in requests}
    for one in evidence.values():
        one.let_go()
    return Anchor(values, evidence)


def judge(
    model: nn.Module,
    requests: Collection[Request],
    data: Mapping[str, Examples],
    *,
    limit: int = LIMIT,
    anchor: Anchor | None = None,
) -> Judgement:
    """Measure what a model can do. The model, its mode and the random state are left as they were.

    Args:
        model: a Hugging Face model, on any device.
        requests: from `check`.
        data: examples by role.
        limit: most examples per role that answers are generated for (accuracy, rouge, repetition); a fixed random
            choice, the same for every model. Likelihoods are taken on all examples.
        anchor: from `anchor_of` with the same requests, data and limit. Given one, what is forgotten should become as
            it is there.

    Raises:
        RequestError: the data is not what a metric reads, or the model cannot do what a metric asks.
        RunError: the model's outputs are not finite.
    """
    if limit < 1:
        raise RequestError(f"limit={limit} leaves nothing to generate; it must be at least 1.")
    check_data(requests, data)
    for request in requests:
        if METRICS[request.metric].anchored and anchor is None:
            raise RequestError(f"{request.metric} compares with a retrained model; give `anchor=anchor_of(...)`.")
    evidence = _evidence(model, requests, data, limit)
    with at_rest(model):
        measures = [_measure(request, evidence, anchor) for request in progress(requests, "judging", len(requests))]
        return Judgement(measures, _samples(model, requests, evidence))


def _evidence(
    model: nn.Module, requests: Collection[Request], data: Mapping[str, Examples], limit: int
) -> dict[str, Evidence]:
    roles = dict.fromkeys(role for request in requests for role in request.roles.values())
    return {role: Evidence(model, data[role], limit) for role in roles}


def _value(request: Request, evidence: Mapping[str, Evidence], anchor: Anchor | None) -> Value:
    metric = METRICS[request.metric]
    given = {argument: evidence[role] for argument, role in request.roles.items()}
    if anchor is not None:
        given |= {RETRAINED + argument: anchor.evidence[request.roles[argument]] for argument in metric.anchored}
    return metric.call(**given)


def _measure(request: Request, evidence: Mapping[str, Evidence], anchor: Anchor | None) -> Measure:
    metric = METRICS[request.metric]
    value, n = _value(request, evidence, anchor)
    wanted = {"forgotten": metric.forgotten, "learned": metric.better, "kept": "same"}[request.group]
    target = None
    if anchor is not None and request.group == "forgotten":
        wanted, target = "anchor", anchor.values[request.metric, request.on]
    return Measure(
        group=request.group,
        metric=metric.name,
        label=metric.label,
        on=request.on,
        unit=metric.unit,
        better=metric.better,
        wanted=wanted,
        value=value,
        n=n,
        anchor=target,
        help=metric.help,
    )


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
