"""FairSISA: give a SISA ensemble of classifiers a decision rule that treats groups alike at the least cost in errors.

arXiv:2312.07420. Exact forgetting leaves small shards, in which rare groups are learnt badly; this repairs the decisions and
touches no weight. With V the members' votes (v_1 ... v_S) and A the group:

    P(decide 1 | V = v, A = a) = p_{v,a}     p: fewest errors on a calibration sample subject to equal rates in all groups

How it differs from the paper (the programs are in `overhaul.forget.fair_sisa.fairness`):

1. The ensemble's forward stays what it was: no protected attribute enters it. The fair decision is `Ensemble.decide`, which
   asks for the group.
2. The rule is fair on the calibration sample; on others up to sampling error, about 1/sqrt(examples of a group and label).
3. A calibration example that was learnt or forgotten is refused: votes on learnt examples are better than on others, and
   a forgotten one would come back through the counts.
4. `forget.sisa` on this ensemble drops the rule: it belongs to the members that were. Run this again afterwards.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import nn

from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.forget.fair_sisa.fairness import check, error, fair_table, gap, majority
from overhaul.forget.sisa import example_ids
from overhaul.forget.sisa.ensemble import Ensemble
from overhaul.forget.sisa.shards import ShardMap
from overhaul.method import Outcome, method
from overhaul.objectives import check_labelled
from overhaul.session import begins, progress

GROUP = "group"


@method(verb="forget", paper="2312.07420", changes="architecture", memory="forward", makes={"table": "json"})
def fair_sisa(
    model: nn.Module,
    calibration: Examples,
    *,
    constraint: Literal["equalised_odds", "demographic_parity"] = "equalised_odds",
    processor: Literal["ensemble", "count", "aggregate_first", "post_first"] = "ensemble",
    batch_size: Annotated[int, Ge(1)] = 64,
    seed: Annotated[int, Ge(0)] = 0,
) -> Outcome:
    """Attach a table of fair decisions to an ensemble that `forget.sisa` made; no weight changes.

    Args:
        model: an ensemble of two-class classifiers.
        calibration: labelled examples that no member has seen, each row with the protected attribute as `group`.
        constraint: what the groups get alike: both error rates ("equalised_odds"), or the share of decisions for 1.
        processor: what is read of the votes: their whole pattern ("ensemble", optimal), how many are 1 ("count", for more
            than 12 members), what most say ("aggregate_first"), or one program for each member and then the majority
            ("post_first", the paper's comparison, which is not fair in general).
        batch_size: examples in one forward; does not change the result.
        seed: of the draws where a chance is neither 0 nor 1; an example's draw depends on it and on its id alone.

    Returns:
        The ensemble, whose `decide` now works and which is saved with its table. Facts, on the calibration examples: gap
        and share of errors of the majority (`gap_before`, `error_before`) and of the table, cells without examples, and
        chances that are neither 0 nor 1. `made["table"]` is the `DecisionTable` as JSON.

    Raises:
        RequestError: the model is no ensemble of two-class classifiers, a row has no `group`, an example was learnt or
            forgotten by the ensemble, there is one group, or a group lacks a label.
    """
    ensemble, labels, groups = _checked(model, calibration)
    check(groups, labels, len(ensemble.members), constraint, processor)
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in calibration.batches(batch_size)]
    begins(lambda: ensemble)
    device = next(ensemble.parameters()).device
    votes: list[np.ndarray] = []
    with torch.no_grad():
        for batch in progress(batches, "votes", len(batches)):
            inputs = {name: value.to(device) for name, value in batch.items()}
            votes.append(ensemble.votes(**inputs).cpu().numpy())
    cast = np.concatenate(votes)
    table = fair_table(cast, groups, labels, constraint=constraint, processor=processor, seed=seed)
    ensemble.config.decision = table.to_json()
    plain, chances = majority(cast), table.chance(cast, groups)
    facts: dict[str, float | int | str | list[int]] = {
        "gap_before": gap(plain, groups, labels, constraint),
        "gap": gap(chances, groups, labels, constraint),
        "error_before": error(plain, labels),
        "error": error(chances, labels),
        "empty_cells": table.empty,
        "random_cells": int(((table.chances > 0) & (table.chances < 1)).sum()),
    }
    return Outcome(model, facts=facts, made={"table": table.to_json()})


def _checked(model: nn.Module, calibration: Examples) -> tuple[Ensemble, np.ndarray, list[Any]]:
    """The ensemble, the labels [n] and the groups, if they are what they must be."""
    if not isinstance(model, Ensemble):
        raise RequestError(
            f"forget.fair_sisa reads the votes of an ensemble; {type(model).__name__} is none. Train one with forget.sisa."
        )
    if not len(calibration):
        raise RequestError("forget.fair_sisa: the role `calibration` has no examples.")
    check_labelled("calibration", calibration)
    config: Any = model.config
    base: Any = model.base.config
    labels = [item["labels"] for item in calibration.items]
    if any(label.ndim for label in labels) or config.inner_class.endswith("ForCausalLM"):
        raise RequestError(
            "forget.fair_sisa decides between two classes, so it needs a classifier and one label an example; these are the "
            "answers of a language model."
        )
    if base.num_labels != 2:
        raise RequestError(
            f"forget.fair_sisa decides between two classes, and this ensemble tells {base.num_labels} apart."
        )
    without = [place for place, row in enumerate(calibration.rows) if row.get(GROUP) is None]
    if without:
        raise RequestError(
            f"forget.fair_sisa: {len(without)} of {len(calibration)} rows of `calibration` have no `{GROUP}`, first row "
            f"{without[0]}. Each needs the protected attribute in that column."
        )
    places = ShardMap.from_json(config.shard_map)
    ids = set(example_ids(calibration))
    learnt = {one for shard in range(len(places.slices)) for one in places.ids(shard)}
    for known, what in ((set(places.forgotten), "forgotten"), (learnt, "learnt")):
        if ids & known:
            raise RequestError(
                f"forget.fair_sisa: {len(ids & known)} examples of `calibration` were {what} by this ensemble. Leave them "
                "out: calibrate on examples that no member has seen."
            )
    return model, np.array([int(label) for label in labels]), [row[GROUP] for row in calibration.rows]
