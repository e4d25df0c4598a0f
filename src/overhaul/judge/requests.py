"""What a recipe's `judge:` block asks for, checked before any model is opened; whether its limits are kept.

    forgotten: {answer_probability: forget, membership: {members: forget, others: strangers}}
    kept:      {accuracy: [retain, sums], bits_per_byte: text}

The group says what is hoped for: `forgotten` should get worse, `learned` better, `kept` should stay. Where a model that was
trained without the data is known (`retrained`), what is forgotten should become as it is there, no more and no less.

More can be said of a metric in a mapping, with `on:` before the role where it reads one:

    accuracy: {on: retain, at_least: 0.9}             # a limit; by group, it holds for each of them
    accuracy: {on: faces, by: region}                 # also the worst group, and the gap between the best and the worst
    perplexity: {on: text, anchor: base}              # should become as in the model `base` of the materials
    pass_at_k: {on: sums, k: 5, temperature: 0.8}     # a metric's own options

Tasks of lm-evaluation-harness stand where roles would; what is said of all of them may stand beside them:

    kept: {lm_eval: [arc_easy, gsm8k], limit: 100}
    kept: {lm_eval: [{on: arc_easy, num_fewshot: 5, at_least: 0.6}, gsm8k]}
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from overhaul.data.examples import Examples
from overhaul.errors import SEE, RequestError, did_you_mean
from overhaul.judge import harness
from overhaul.judge.evidence import kind_of
from overhaul.judge.measure import Measure
from overhaul.judge.metrics import METRICS

Group = Literal["forgotten", "learned", "kept"]
GROUPS: tuple[Group, ...] = ("forgotten", "learned", "kept")

SETTINGS = ("by", "anchor", "at_least", "at_most")
"""What can be said of every metric, besides its own options."""

RETRAINED = "retrained"
"""The model that was trained without the data, in a recipe's materials: what is forgotten is compared with it."""


@dataclass(frozen=True)
class Request:
    """One metric on one role, or on the two that it compares.

    Attributes:
        roles: which of the metric's roles is which of the recipe's: {"role": "forget"}, or
            {"members": "forget", "others": "strangers"}.
        options: the metric's own, as far as they were given.
        by: the column of the first role whose values are groups.
        anchor: the model that it should become like, if named.
        at_least: the lowest value that is accepted, of each group if there are some.
        at_most: the highest.
        task: what is measured on where the metric brings its own data; there are no roles then.
    """

    group: Group
    metric: str
    roles: Mapping[str, str]
    options: Mapping[str, Any] = field(default_factory=dict)
    by: str | None = None
    anchor: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    task: str = ""

    @property
    def on(self) -> str:
        """The role, or both: "forget", "forget / strangers"; or the task."""
        return self.task or " / ".join(self.roles.values())

    @property
    def name(self) -> str:
        """The metric with its options: "pass_at_k(k=5)"."""
        said = {name: value for name, value in self.options.items() if not self.task or name not in harness.UNSAID}
        options = ", ".join(f"{name}={value}" for name, value in said.items())
        return f"{self.metric}({options})" if options else self.metric

    @property
    def compared_with(self) -> str | None:
        """The model whose value is what is wanted, or what is compared with; it need not be there for what is forgotten."""
        own = self.group == "forgotten" or bool(METRICS[self.metric].anchored)
        return self.anchor or (RETRAINED if own else None)


def check(
    spec: Mapping[str, Mapping[str, Any]],
    roles: Collection[str],
    *,
    anchors: Collection[str] = (),
    base: Path | None = None,
    trust: bool = False,
) -> list[Request]:
    """Read a recipe's `judge:` block.

    Args:
        spec: group -> metric -> a role, a list of roles, a mapping of roles for a metric that compares two, or a mapping
            with options and limits.
        roles: the names of the recipe's materials.
        anchors: the names of the models that can be compared with; "retrained" is one that was trained without the data.
        base: the folder that paths are relative to; the one that the process is in if None.
        trust: whether Python that comes with tasks may run.

    Raises:
        RequestError: a group, metric, role or option is unknown, a role or a model is missing, or one thing is asked for
            twice.
    """
    requests: list[Request] = []
    within = _Within(roles, anchors, base or Path.cwd(), trust)
    for group, metrics in _mapping(spec, "judge").items():
        if group not in GROUPS:
            raise RequestError(f"judge has no group {group!r}.{did_you_mean(str(group), GROUPS)}{SEE}")
        beside = _beside(_mapping(metrics, f"judge.{group}"))
        for name, on in metrics.items():
            if name in beside:
                continue
            if name not in METRICS:
                raise RequestError(
                    f"judge.{group}: there is no metric {name!r}.{did_you_mean(str(name), METRICS)}{SEE}"
                )
            for one in on if isinstance(on, list) and on else [on]:
                requests += _requests(group, name, one, within, beside if METRICS[name].tasks else {})
    seen: dict[tuple[str, str], Request] = {}
    for request in requests:
        first = seen.setdefault((request.name, request.on), request)
        if first is not request:
            where = f"{first.group} and {request.group}" if first.group != request.group else first.group
            raise RequestError(f"judge: {request.name} on {request.on} is named twice ({where}); name it once.")
    return requests


@dataclass(frozen=True)
class _Within:
    """What a request may name: materials and models, where its paths start, and whether Python that it names may run."""

    roles: Collection[str]
    anchors: Collection[str]
    base: Path
    trust: bool


def _beside(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What stands among a group's metrics and is an option of its tasks."""
    options = {
        option for name in metrics if name in METRICS and METRICS[name].tasks for option in METRICS[name].options
    }
    return {name: value for name, value in metrics.items() if name in options and name not in METRICS}


def _requests(group: Group, name: str, given: Any, within: _Within, beside: Mapping[str, Any]) -> list[Request]:
    """What one entry asks for: of a mapping, what is no role is an option; `beside` are those of the whole group."""
    metric, where = METRICS[name], f"judge.{group}.{name}"
    known = [*SETTINGS, *metric.options]
    said = {key: value for key, value in given.items() if key in known} if isinstance(given, Mapping) else {}
    on = {key: value for key, value in given.items() if key not in known} if isinstance(given, Mapping) else given
    if len(metric.roles) < 2 and isinstance(on, Mapping) and "on" in on:
        for key in on:
            if key != "on":
                raise RequestError(f"{where} has no option {key!r}.{did_you_mean(str(key), ['on', *known])}")
        on = on["on"]
    settings = _settings(where, {key: said.pop(key) for key in SETTINGS if key in said})
    anchor = settings.get("anchor")
    if anchor is not None and anchor not in within.anchors:
        raise RequestError(
            f"{where}: the anchor {anchor!r} is no model of the materials.{did_you_mean(str(anchor), within.anchors)}"
        )
    if metric.anchored and (anchor or RETRAINED) not in within.anchors:
        raise RequestError(
            f"{where} compares with a model that was trained without the data. Name it in the materials: "
            "`retrained: {model: FOLDER}`."
        )
    options = metric.check(where, {**beside, **said})
    names = on if isinstance(on, list) else [on]
    if not names:
        raise RequestError(f"{where} is an empty list; name what it is measured on.")
    if metric.tasks:
        if settings.pop("by", None) is not None:
            raise RequestError(f"{where} has no `by`: a task's rows are no material of the recipe.")
        options = harness.check(where, names, options, within.base, within.trust)
        return [Request(group, name, {}, options, **settings, task=str(one)) for one in names]
    return [Request(group, name, _roles(where, name, one, within.roles), options, **settings) for one in names]


def _settings(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What every metric takes, checked."""
    for name in ("by", "anchor"):
        if name in given and not isinstance(given[name], str):
            raise RequestError(f"{where}: `{name}` must be a name, not {given[name]!r}.")
    for name in ("at_least", "at_most"):
        value = given.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RequestError(f"{where}: `{name}` must be a number, not {value!r}.")
    if given.get("at_least", -math.inf) > given.get("at_most", math.inf):
        raise RequestError(f"{where}: nothing is at least {given['at_least']} and at most {given['at_most']}.")
    return dict(given)


def broken_limits(requests: Collection[Request], measures: Collection[Measure]) -> list[str]:
    """A sentence for each limit that a model does not keep: "accuracy on retain is 0.82, below its limit of 0.9".

    Args:
        requests: from `check`.
        measures: what the model was measured to have by them, others among it.
    """
    broken: list[str] = []
    for request in requests:
        if request.at_least is None and request.at_most is None:
            continue
        for what, value in _limited(request, measures):
            if value is None:
                broken.append(f"{what} could not be measured, so its limit is not kept")
            elif request.at_least is not None and value < request.at_least:
                broken.append(f"{what} is {value:.4g}, below its limit of {request.at_least:g}")
            elif request.at_most is not None and value > request.at_most:
                broken.append(f"{what} is {value:.4g}, above its limit of {request.at_most:g}")
    return broken


def _limited(request: Request, measures: Collection[Measure]) -> list[tuple[str, float | None]]:
    """The values that a request's limits hold for, each with what it is."""
    own = [one for one in measures if one.group == request.group]
    if request.task:
        of_it = [one for one in own if one.metric.startswith(f"{request.name}.")]
        found = [one for one in of_it if one.on == request.on or one.on.startswith(f"{request.on} / ")]
        return [(f"{one.metric} on {one.on}", one.value) for one in found]
    (one,) = (one for one in own if (one.metric, one.on) == (request.name, request.on))
    values = {f" where {request.by} is {name}": value for name, value in one.groups.items()} or {"": one.value}
    return [(f"{request.name} on {request.on}{where}", value) for where, value in values.items()]


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
            try:
                kind = kind_of(examples)
            except RequestError as error:
                raise RequestError(f"{where} reads the role {role!r}. {error}") from None
            if kind not in metric.reads:
                fitting = sorted(name for name, other in METRICS.items() if kind in other.reads)
                held = "texts with a class" if kind == "images" and examples.kind == "tokens" else kind
                raise RequestError(
                    f"{where} reads {_either(metric.reads)}, but {role!r} holds {held}. "
                    f"For {held} there are {', '.join(fitting)}."
                )
            for column in metric.columns:
                if not all(column in row for row in examples.rows):
                    raise RequestError(f"{where} needs the column {column!r} in every row of {role!r}.")
        first = next(iter(request.roles.values()), "")
        if request.by is not None and not all(request.by in row for row in data[first].rows):
            known = did_you_mean(request.by, data[first].rows[0])
            raise RequestError(f"{where}: `by: {request.by}` names no column of every row of {first!r}.{known}")


def _either(words: Sequence[str]) -> str:
    return " or ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])
