"""Last-layer retraining: refit the classification head alone on curated data; the rest of the network stays bit for bit.

"Does Progress On Object Recognition Benchmarks Improve Real-World Generalization?", Richards, Kirichenko, Bouchacourt and
Ibrahim, arXiv:2307.13136. The choice by the worst group is that of "Last Layer Re-Training is Sufficient for Robustness to
Spurious Correlations" (DFR), Kirichenko, Izmailov and Wilson, arXiv:2204.02937.

    phi(x)   what enters the last linear layer, in eval mode, kept from one pass over the data
    z(x)     (phi(x) - mean) / standard deviation, of each feature over the rows that are fitted; 0 for the
             mean in a layer without a bias
    head     argmin_W,b  sum_i w_i l_i / n + |W|^2 / (2 C n),   l_i = -log sum_{k in S_i} softmax(W z(x_i) + b)_k,
             written into the model as the layer of phi(x) that says the same
    w_i      n / (G n_g) for a row of one of G groups (or classes, or both) with n_g rows
    C        the one of a grid whose head is best on rows held out: in the worst group, or on average; of those that are as
             accurate, the one with the least loss there

How it differs from the paper and its code:

1. The paper says neither how the head is trained nor with what settings; its code, as published, trains none. A penalised
   logistic regression has one minimum, whatever it starts from, and one setting, which is chosen by a grid.
2. A row may list several classes, of which any is right: l_i is the loss of the set. The code keeps one of them.
3. After C is chosen, the head is fitted again on all curated rows, those that were held out among them.
4. A class that no curated row has is never said afterwards: its weights are 0 and its bias is -10,000.
5. Classes stay what they are: another label space is a new head, which this does not make.
6. "cross_entropy" trains all that follows the last block by gradient steps, for heads of several layers (BERT's pooler,
   RoBERTa's dense layer); it has neither C nor a choice.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn

from overhaul.adapt.head.logistic import Linear, Part, fitted
from overhaul.adapt.head.rows import Balance, cells, split, units_of
from overhaul.data.examples import Batch, Examples, groups_of, right_classes
from overhaul.errors import RequestError
from overhaul.fit import Regime, fit
from overhaul.heads import Head, head_of
from overhaul.method import Outcome, Table, method
from overhaul.objectives import Term, sequences, set_nll
from overhaul.selectors import select

GRID = tuple(10.0**power for power in range(-4, 3))
"""Values of C, in rising order."""

WEIGHT = "row_weight"
Scores = tuple[float, list[float]]
"""Accuracy on average, and by group."""


@method(verb="adapt", paper="2307.13136", changes="weights", memory="forward")
def head(
    model: nn.Module,
    curated: Examples,
    held_out: Examples | None = None,
    *,
    by: str | list[str] | None = None,
    balance: Balance = "group",
    solver: Literal["logistic", "cross_entropy"] = "logistic",
    start: Literal["present", "anew"] = "present",
    grid: list[Annotated[float, Gt(0)]] | None = None,
    choose: Literal["worst_group", "average"] = "worst_group",
    share: Annotated[float, Gt(0), Lt(1)] = 0.25,
    apart: str | None = None,
    training: Regime = Regime(steps=300, batch_size=32, lr=1e-3, warmup=0.0),
) -> Outcome:
    """Refit the last layer of a classifier on curated data and leave the rest of the network untouched.

    It takes one pass over the data and a convex problem; n x d features are held in memory.

    Args:
        model: a classifier of images or texts whose logits are one linear layer of its features.
        curated: labelled examples to fit the head on, best with equally many of each group.
        held_out: what C is chosen on; if not given, a share of `curated`.
        by: the column of the rows that names their group, or several columns; all rows are one group if not given.
        balance: what counts alike whatever its number of rows: nothing but rows, each class, each group, or each class of
            each group.
        solver: "logistic" regression on kept features, or "cross_entropy" by gradient steps.
        start: where the fit begins: at the "present" last layer, or "anew" at zeros. With one right class a row, the
            regression ends at the same head.
        grid: values of C, the inverse strength of the penalty, which is meant for standardised features (in scikit-learn,
            `LogisticRegression(C)` behind `StandardScaler`); 1e-4 to 100 by tens if not given.
        choose: which C is taken: of the most accurate "worst_group", or of the highest "average" accuracy. Of several as
            good by it, that of the higher average, then that of the smaller loss on the rows held out, then the smaller.
        share: of the curated rows that is held out to choose C, drawn by the seed within each group.
        apart: a column of what must not be both fitted and held out, such as the household of a photograph.
        training: of "cross_entropy": how long and how fast.

    Returns:
        The model, changed in place. Facts: the layer, its features, C, whether that is an edge of the grid (advice), the
        loss on all curated rows in nats, classes
        without a row; and on what was held out, before and after: average accuracy, that of the worst group, and the
        difference between the best and the worst (after: of the head that had not seen these rows). Tables: accuracy by
        group before and after, and what each C gave. Curves: those of a training.

    Raises:
        RequestError: the model is no classifier or ends in no linear layer, a label is no class of it, a group has one row
            or there is one group, or all rows are of one class.
        RunError: the regression did not converge, or the training diverged.
    """
    for name, examples in (("curated", curated), ("held_out", held_out)):
        if examples is not None and not len(examples):
            raise RequestError(f"adapt.head: the role `{name}` is empty.")
    groups = {} if by is None else groups_of("adapt.head: the role `curated`", curated.rows, by, least=2)
    judged = (
        {} if by is None or held_out is None else groups_of("adapt.head: the role `held_out`", held_out.rows, by, 1)
    )
    units = units_of(curated, apart)
    found = head_of(model, curated)
    whole = Part.of(*_seen(found, curated), groups, cells(curated, groups, balance))
    _check_classes(found, whole)
    test = None if held_out is None else Part.of(*_seen(found, held_out), judged)
    before = _present(found)
    first = before if start == "present" else before.zeros
    made = Outcome(model, facts={"layer": found.name or "the model itself", "features": whole.features.shape[1]})
    made.facts |= {"rows": len(curated), "classes_without_rows": int((~whole.seen).sum())}
    if solver == "cross_entropy":
        made.curves = _trained(found, first, curated, whole.weights, training)
        if held_out is not None and test is not None:
            after = Part.of(*_seen(found, held_out), judged).accuracies(_present(found))
            _compare(made, test, test.accuracies(before), after)
        return made
    fits = whole
    if test is None:
        fits, test = split(whole, cells(curated, groups, "group"), cells(curated, groups, "class"), units, share)
    values = sorted(set(grid or GRID))
    layers = fitted(fits, values, first)
    scores, losses = [test.accuracies(layer) for layer in layers], [test.loss(layer) for layer in layers]
    worst = [min(each) if choose == "worst_group" else 0.0 for _, each in scores]
    best = max(range(len(values)), key=lambda n: (worst[n], scores[n][0], -losses[n], -n))
    (final,) = fitted(whole, [values[best]], layers[best])
    _write(found, final)
    made.facts |= {"c": values[best], "loss": whole.loss(final)}
    if len(values) > 1 and best in (0, len(values) - 1):
        made.facts["advice"] = (
            f"C={values[best]:g}, which was best on the rows held out, is the {'largest' if best else 'smallest'} of the "
            f"grid. A {'larger' if best else 'smaller'} one may be better: add some to `grid`."
        )
    _compare(made, test, test.accuracies(before), scores[best])
    rows = [(c, average, min(each), loss) for c, (average, each), loss in zip(values, scores, losses, strict=True)]
    made.tables["what each C gives on rows held out"] = Table(
        ("C", "average", "worst group", "loss, nats"), tuple(rows)
    )
    return made


def _compare(made: Outcome, test: Part, before: Scores, after: Scores) -> None:
    """What the refit changed on rows held out."""
    for name, (average, each) in (("_before", before), ("", after)):
        made.facts[f"average{name}"] = average
        if len(each) > 1:
            made.facts |= {f"worst_group{name}": min(each), f"max_min{name}": max(each) - min(each)}
    made.facts["rows_held_out"] = len(test.features)
    if len(test.groups) > 1:
        made.facts["smallest_group_held_out"] = min(map(len, test.groups.values()))
        lines = [[average, *each] for average, each in (before, after)]
        made.tables["accuracy on rows held out, by group"] = Table.grid(
            lines, ["before", "after"], ["average", *test.groups], along="last layer", across="group", unit="share"
        )


def _seen(found: Head, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    """What the last layer sees of the examples, and which classes are right."""
    right = [right_classes(batch, len(found.weight)) for batch in examples.batches(1024)]
    return found.features(examples).double().numpy(), torch.cat(right).numpy()


def _check_classes(found: Head, part: Part) -> None:
    if part.seen.sum() < 2:
        raise RequestError("adapt.head: all curated rows are of one class, so there is nothing to tell apart.")
    if found.bias is None and not part.seen.all():
        lacking = ", ".join(str(n) for n in np.flatnonzero(~part.seen)[:5])
        raise RequestError(
            f"adapt.head: no curated row has the class {lacking}, and {found.name} has no bias that could rule it out. Give "
            "rows of every class."
        )


def _present(found: Head) -> Linear:
    """The layer as it is."""
    bias = found.bias
    return Linear(found.weight.double().cpu().numpy(), None if bias is None else bias.double().cpu().numpy())


@torch.no_grad()
def _write(found: Head, layer: Linear) -> None:
    """Put a layer into the model, in its dtype."""
    found.weight.copy_(torch.from_numpy(layer.weight))
    if found.bias is not None and layer.bias is not None:
        found.bias.copy_(torch.from_numpy(layer.bias))


def _trained(
    found: Head, first: Linear, curated: Examples, weights: np.ndarray, training: Regime
) -> dict[str, list[float]]:
    """Train all that follows the last block, by the same loss with the same weights."""
    chosen = select(found.model, "head")
    _write(found, first)
    data = {"curated": curated.with_column(WEIGHT, torch.from_numpy(weights).float())}
    term = Term("curated", _weighted, sequences, name="cross-entropy")
    return fit(found.model, [term], data, trainable=chosen, **training.fit, name="head").curves


def _weighted(logits: Tensor, batch: Batch) -> Tensor:
    return (set_nll(logits, right_classes(batch, logits.shape[1])) * batch[WEIGHT]).sum()
