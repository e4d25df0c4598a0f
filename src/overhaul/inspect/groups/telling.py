"""Tables and facts of groups: accuracies, disparities with intervals and chance, slopes."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from overhaul.inspect.groups.disparity import Hits, max_min
from overhaul.inspect.groups.progress import FAMILIES, Rates, Scale, stretched
from overhaul.intervals import BOOTSTRAPS, limits
from overhaul.method import Outcome, Table
from overhaul.outcome import Cell


def disparity_tables(
    made: Outcome,
    names: Sequence[str],
    right: Hits,
    within: Hits | None,
    top: int,
    pair: Sequence[str] | None,
    units: Sequence[Hashable],
    seed: int,
) -> None:
    """What one model after the other does by group.

    Args:
        made: gets facts and tables.
        names: of the models.
        right: what they get right at first.
        within: what they get right among the first `top`; None where that means nothing.
        top: how many classes that is.
        pair: two groups.
        units: what of the rows is drawn together.
        seed: of the bootstrap.
    """
    made.tables["accuracy by group"] = _map(names, right)
    if within is not None:
        made.tables[f"top-{top} accuracy by group"] = _map(names, within)
    drawn = right.drawn(units, seed, BOOTSTRAPS)
    spread = limits(max_min(drawn))
    worst = right.accuracy.argmin(axis=1)
    listed = list(right.groups)
    adjusted = right.adjusted
    columns = ["model", "average", "worst group", "its accuracy", "max - min", "2.5%", "97.5%", "max - min by chance"]
    series: list[Any] = [
        names, right.average, [listed[n] for n in worst], right.accuracy.min(axis=1), max_min(right.accuracy), *spread,
        right.chance,
    ]  # fmt: skip
    if adjusted is not None:
        columns.append("class-adjusted max - min")
        series.append(max_min(adjusted[0]))
        made.facts["classes_of_all_groups"] = adjusted[1]
    if pair is not None:
        a, b = map(right.of, pair)
        columns += [f"{pair[0]} - {pair[1]}", "2.5% ", "97.5% "]
        series += [right.accuracy[:, a] - right.accuracy[:, b], *limits(drawn[:, :, a] - drawn[:, :, b])]
        if adjusted is not None:
            columns.append(f"class-adjusted {pair[0]} - {pair[1]}")
            series.append(adjusted[0][:, a] - adjusted[0][:, b])
    made.tables["disparity by model"] = Table(tuple(columns), tuple(zip(*map(_plain, series), strict=True)))
    made.tables["groups"] = _groups(names, right, within, top, limits(drawn))
    made.facts |= {
        "average": float(right.average.mean()),
        "worst_group": statistics.mode(listed[n] for n in worst),
        "worst_accuracy": float(right.accuracy.min(axis=1).mean()),
        "max_min": float(max_min(right.accuracy).mean()),
        "max_min_by_chance": float(right.chance.mean()),
    }
    if adjusted is not None:
        made.facts["max_min_class_adjusted"] = float(max_min(adjusted[0]).mean())
    if pair is not None:
        a, b = map(right.of, pair)
        made.facts["pair_gap"] = float((right.accuracy[:, a] - right.accuracy[:, b]).mean())


def _plain(values: Any) -> list[Cell]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _map(names: Sequence[str], hits: Hits) -> Table:
    """Models by groups, the average first."""
    cells = np.column_stack([hits.average, hits.accuracy]).tolist()
    return Table.grid(cells, names, ["average", *hits.groups], along="model", across="group", unit="share")


def _groups(names: Sequence[str], right: Hits, within: Hits | None, top: int, between: np.ndarray) -> Table:
    """Every model and group with its interval."""
    columns = ["model", "group", "rows", "accuracy", "2.5%", "97.5%", *([f"top-{top} accuracy"] if within else [])]
    rows = [
        (
            name,
            group,
            len(places),
            float(right.accuracy[m, g]),
            float(between[0, m, g]),
            float(between[1, m, g]),
            *([float(within.accuracy[m, g])] if within else []),
        )
        for m, name in enumerate(names)
        for g, (group, places) in enumerate(right.groups.items())
    ]
    return Table(tuple(columns), tuple(rows))


def progress_tables(
    made: Outcome,
    names: Sequence[str],
    right: Hits,
    reference: np.ndarray,
    beside: Mapping[str, np.ndarray],
    pair: Sequence[str] | None,
    families: Sequence[Hashable],
    scale: Scale,
    seed: int,
) -> None:
    """How progress on the reference arrives in the data, in each group, and on other benchmarks.

    Args:
        made: gets facts and tables.
        names: of the models.
        right: what they get right of the data.
        reference: what they get right of the reference, [models, n].
        beside: the same of other benchmarks, by name.
        pair: two groups.
        families: of the models.
        scale: besides accuracy itself.
        seed: of the bootstrap over families.
    """
    x = reference.mean(axis=1)
    series = {"data": right.average, **{f"group {g}": right.accuracy[:, n] for n, g in enumerate(right.groups)}}
    series |= {f"benchmark {name}": own.mean(axis=1) for name, own in beside.items()}
    rows = {
        "data": right.right.shape[1],
        **{f"group {g}": size for g, size in zip(right.groups, right.sizes, strict=True)},
    }
    rows |= {f"benchmark {name}": own.shape[1] for name, own in beside.items()}
    other = {name: stretched(values, rows[name], scale) for name, values in series.items()}
    for each in (series, other):
        each["max - min of the groups"] = max_min(np.stack([each[f"group {g}"] for g in right.groups], axis=1))
        if pair is not None:
            each[f"{pair[0]} - {pair[1]}"] = each[f"group {pair[0]}"] - each[f"group {pair[1]}"]
        if beside:
            each["standard"] = np.mean([each[f"benchmark {name}"] for name in beside], axis=0)
    plain = Rates.of(x, series, families, seed)
    bent = Rates.of(stretched(x, reference.shape[1], scale), other, families, seed)
    columns = ("slope on the reference of", "accuracy", "2.5%", "97.5%", scale, "2.5% ", "97.5% ")
    lines = [(name, *plain.row(name), *bent.row(name)) for name in series]
    made.facts |= {"progress_rate": plain.row("data")[0], f"progress_rate_{scale}": bent.row("data")[0]}
    made.facts["max_min_trend"] = plain.row("max - min of the groups")[0]
    if pair is not None:
        made.facts["pair_gap_trend"] = plain.row(f"{pair[0]} - {pair[1]}")[0]
    if beside:
        gap, ratio = plain.gap("standard", "data"), plain.ratio("standard", "data")
        lines += [("progress gap: standard - data", *gap, *bent.gap("standard", "data"))]
        lines += [("progress ratio: standard / data", *ratio, *bent.ratio("standard", "data"))]
        made.facts |= {"progress_gap": gap[0], "progress_gap_low": gap[1], "progress_gap_high": gap[2]}
        made.facts["progress_ratio"] = ratio[0]
    made.facts["families"] = len(set(families))
    if len(set(families)) < FAMILIES:
        made.facts["no_interval_of_slopes"] = f"{len(set(families))} families of models; an interval needs {FAMILIES}"
    made.tables["progress"] = Table(columns, tuple(lines))
    across = "accuracy on the reference"
    dots = [
        (group, float(x[m]), float(right.accuracy[m, g]))
        for g, group in enumerate(right.groups)
        for m in range(len(names))
    ]
    made.tables["accuracy of each group, a dot for each model and their mean, against the reference"] = Table.points(
        dots, x=across, y="accuracy in the group", unit="share"
    )
    gaps = series["max - min of the groups"]
    spread = [(name, float(a), float(b)) for name, a, b in zip(names, x, gaps, strict=True)]
    made.tables["best minus worst group of each model, against the reference"] = Table.points(
        spread, x=across, y="max - min", unit="share"
    )
