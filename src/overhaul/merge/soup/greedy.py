"""Which models of a soup help, measured on held-out data: soups are written, opened, judged and thrown away again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from overhaul import session, weights
from overhaul.merge._held_out import HeldOut, tried
from overhaul.merge.soup.learned import Shares
from overhaul.method import Outcome, Table
from overhaul.models import Checkpoint


def greedy(tuned: Sequence[Checkpoint], held_out: HeldOut, place: Path, made: Outcome) -> Shares:
    """The best model, and each by its rank with which the soup is no worse.

    Args:
        tuned: the models.
        held_out: what they are measured by.
        place: an existing folder, beside which there is room for one more model.
        made: gets the facts and the table.
    """
    alone = [held_out.value(one) for one in session.progress(tuned, "measuring models", len(tuned))]
    best, *others = sorted(range(len(tuned)), key=lambda n: -held_out.sign * alone[n])
    chosen, reached = [best], alone[best]
    for n in session.progress(others, "measuring soups", len(others)):
        parts = [tuned[m] for m in (*chosen, n)]
        mixed = partial(weights.blend, parts, [1 / len(parts)] * len(parts))
        (value,) = tried(mixed, lambda known: [held_out.value(known)], place)
        if held_out.sign * value >= held_out.sign * reached:
            chosen, reached = [*chosen, n], value
    made.facts |= {"chosen": [tuned[n].source for n in chosen], "best_alone": alone[best], "soup": reached}
    rows = [(one.source, alone[n], n in chosen) for n, one in enumerate(tuned)]
    made.tables[f"{held_out.request.metric} on held-out data"] = Table(
        ("checkpoint", "alone", "in the soup"), tuple(rows)
    )
    return Shares.even(chosen, len(tuned))
