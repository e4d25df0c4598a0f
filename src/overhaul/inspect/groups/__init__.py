"""Group disparity and progress: what an average accuracy hides, in one model and across a family of models.

"Does Progress On Object Recognition Benchmarks Improve Real-World Generalization?", Richards, Kirichenko, Bouchacourt and
Ibrahim, arXiv:2307.13136.

    acc(m, g)       share of the rows of group g that model m gets right; a row that lists several classes is right if the
                    first (or one of the first five) is among them
    pair gap        acc(m, first) - acc(m, second), signed;    max - min: the best group minus the worst
    by chance       E[max - min] if all groups shared the model's average: a maximum over noisy numbers is no 0
    class-adjusted  the same of accuracies in which every class counts alike: groups differ in their classes (Simpson)
    progress rate   beta: least-squares slope over models of acc(m, benchmark) on acc(m, reference)
    progress gap    beta_standard - beta_data, and the ratio of the two
    trend           slope of the pair gap on the reference, which is beta_first - beta_second exactly

How it differs from the paper and its code:

1. The code reports accuracies by group alone; disparity, slopes and gap follow the paper's words. Its top 5 by income
   overwrites its top 1; here they are two tables.
2. Intervals are percentile bootstraps: over the rows of each group (or what belongs together, such as a household) for
   accuracies, over families of models for slopes, since near copies are no independent models.
3. Accuracies saturate, so every slope also stands on the probit (or logit) scale. The two may order benchmarks differently.
4. max - min is biased upward by noise, in its interval too. What chance does is beside it, computed exactly.
5. The class-adjusted max - min is that of the adjusted accuracies. The mean of the spreads within each class, over few rows
   each, would be noise. Classes that not all groups have are left out of it, and their number is said.
6. A gap mixes the shift with how hard labels are to map; give `standard` the same classes as `data` for a fair one.
7. Of language models answers are counted, by the verifiers that the judge uses. They have no top 5 and no classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge

from overhaul.data.examples import Examples, groups_of, places_by
from overhaul.errors import RequestError, did_you_mean
from overhaul.inspect.groups.disparity import Hits
from overhaul.inspect.groups.measuring import check_classes, check_kind, check_read_alike, hits, names_of
from overhaul.inspect.groups.progress import Scale
from overhaul.inspect.groups.telling import disparity_tables, progress_tables
from overhaul.method import Outcome, method
from overhaul.models import Checkpoint


@method(verb="inspect", paper="2307.13136", changes="nothing", memory="forward")
def groups(
    models: Sequence[Checkpoint],
    data: Examples,
    reference: Examples | None = None,
    standard: Examples | None = None,
    *,
    by: str | list[str],
    pair: list[str] | None = None,
    top: Annotated[int, Ge(2)] = 5,
    least: Annotated[int, Ge(2)] = 10,
    apart: str | None = None,
    benchmark: str | None = None,
    families: list[str] | None = None,
    scale: Scale = "probit",
) -> Outcome:
    """Measure models by groups of rows, and how progress on a reference benchmark reaches each group.

    Models are opened one after the other. One is enough for disparities; slopes need `reference` and two models or more.

    Args:
        models: classifiers of one label space, of images or texts; or language models that answer questions.
        data: labelled rows with a column that names their group.
        reference: the benchmark that progress is measured on (ImageNet, say).
        standard: other benchmarks of robustness, whose slopes the data's is compared with.
        by: the column of `data` whose values are the groups, or several columns, whose combinations are.
        pair: two groups: the gap of the first over the second is reported besides the best over the worst.
        top: how many of the most probable classes count for the second table of accuracies; left out where all is right.
        least: rows that a group needs; a smaller one is refused, with its number.
        apart: a column of `data` whose rows are drawn together for intervals, such as the household of a photograph.
        benchmark: a column of `standard` that tells several benchmarks apart; one if not given.
        families: the family of each model, in their order, for intervals of slopes; each is one by itself if not given.
        scale: on which slopes are taken besides accuracy itself.

    Returns:
        No model. Facts: rows, groups, and means over the models of average accuracy, worst group (and which is it most
        often), max - min with what chance makes of it and class-adjusted, pair gap; with a reference the progress rate, the
        slope of max - min (and of the pair gap), and with `standard` the progress gap and ratio. Tables: accuracy by model
        and group as heat maps, disparities by model with intervals, groups with intervals, slopes, and groups and
        disparities against the reference.

    Raises:
        RequestError: the models differ in their classes or in how they read data, the column is missing or has one value, a
            group is too small or all of it is drawn together, a label is no class, or slopes are asked for with one model.
    """
    if not models:
        raise RequestError("inspect.groups: the role `models` is empty; name at least one model.")
    roles = {"data": data, "reference": reference, "standard": standard}
    given = {role: examples for role, examples in roles.items() if examples is not None}
    (classified, *others) = (check_kind(role, examples) for role, examples in given.items())
    if any(other != classified for other in others):
        raise RequestError(
            "inspect.groups: of `data`, `reference` and `standard` some have classes and some have answers."
        )
    names = names_of(models)
    places = groups_of("inspect.groups: the role `data`", data.rows, by, least)
    _check_knobs(models, given, places, pair, apart, benchmark, families)
    if classified:
        check_classes(models, names, given)
    check_read_alike(models, names, given)
    measured = hits(models, given, classified, top)
    inside = {name: np.array(each) for name, each in places.items()}
    labels = np.array([int(item["labels"]) for item in data.items]) if classified else None
    first, more = measured["data"]
    right = Hits(first, inside, labels)
    within = Hits(more, inside, labels) if more is not None and not more.all() else None
    units = range(len(data)) if apart is None else [str(row[apart]) for row in data.rows]
    seed = torch.initial_seed() % 2**63
    made = Outcome(facts={"models": len(models), "rows": len(data), "groups": len(places)})
    disparity_tables(made, names, right, within, top, pair, units, seed)
    if reference is not None:
        sets = _sets(standard, benchmark)
        beside = {name: measured["standard"][0][:, each] for name, each in sets.items()}
        kin = families or names
        progress_tables(made, names, right, measured["reference"][0], beside, pair, kin, scale, seed)
    return made


def _sets(standard: Examples | None, benchmark: str | None) -> dict[str, list[int]]:
    """The places of each standard benchmark, by its name."""
    if standard is None:
        return {}
    return {"standard": list(range(len(standard)))} if benchmark is None else places_by(standard.rows, benchmark)


def _check_knobs(
    models: Sequence[Checkpoint],
    given: dict[str, Examples],
    places: dict[str, list[int]],
    pair: list[str] | None,
    apart: str | None,
    benchmark: str | None,
    families: list[str] | None,
) -> None:
    """Whether what the knobs name is there.

    Raises:
        RequestError: it is not.
    """
    for name in pair or ():
        if name not in places:
            raise RequestError(f"inspect.groups: `pair` names {name!r}, which is no group.{did_you_mean(name, places)}")
    if pair is not None and len(set(pair)) != 2:
        raise RequestError(f"inspect.groups: `pair` is two different groups, not {pair}.")
    for knob, column, role in (("apart", apart, "data"), ("benchmark", benchmark, "standard")):
        rows: Any = given[role].rows if role in given else []
        if column is not None and not (rows and all(column in row for row in rows)):
            hint = did_you_mean(column, rows[0]) if rows else " There is no such role."
            raise RequestError(f"inspect.groups: `{knob}: {column}` names no column of every row of `{role}`.{hint}")
    if apart is not None:
        _check_units([str(row[apart]) for row in given["data"].rows], places, apart)
    if families is not None and len(families) != len(models):
        raise RequestError(
            f"inspect.groups: `families` has {len(families)} names for {len(models)} models; write one for each."
        )
    if "standard" in given and "reference" not in given:
        raise RequestError("inspect.groups: `standard` is compared by its slope on `reference`, which is not given.")
    if "reference" in given and len(models) < 2:
        raise RequestError(
            "inspect.groups: a slope on `reference` needs at least two models. Name more, or leave the reference out."
        )


def _check_units(units: Sequence[str], places: dict[str, list[int]], apart: str) -> None:
    """Whether every group has what can be drawn anew.

    Raises:
        RequestError: one is a single unit, whose interval would have no width.
    """
    for name, each in places.items():
        if len({units[place] for place in each}) < 2:
            raise RequestError(
                f"inspect.groups: the {len(each)} rows of the group {name!r} have 1 value of `apart: {apart}`, "
                f"{units[each[0]]!r}, and an interval needs at least two. Leave `apart` out, or give rows of others."
            )
