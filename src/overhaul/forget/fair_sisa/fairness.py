"""Fair decisions of an ensemble of two-class members: a linear program over what the members voted, for each group.

FairSISA, arXiv:2312.07420, after Hardt, Price and Srebro, arXiv:1610.02413. With f what is read of the votes, a the group:

    min over p in [0, 1]   sum_{f,a} p_{f,a} ( P(f, a, Y=0) - P(f, a, Y=1) )
    equalised odds         sum_f p_{f,a} P(f | a, y)   is the same in every group a, for y = 0 and y = 1
    demographic parity     sum_f p_{f,a} P(f | a)      is the same in every group a

    "ensemble"         f = the pattern of votes, 2^S of them: no function of votes and group is fair with fewer errors
    "count"            f = how many members voted 1
    "aggregate_first"  f = what most members voted
    "post_first"       one program for each member's vote; of the members' fair decisions the most frequent one counts

P is the share in a calibration sample. The functions know numpy arrays alone, so members may be of any kind.

How it differs from the paper:

1. A cell (f, a) that the sample lacks takes the value of the coarser program: patterns that of their count, counts that
   of their majority. The program itself leaves it open.
2. A tie (of an even number of members) is no majority for 1.
3. "post_first" becomes a table of patterns too: the chance that most of the members' independent draws are 1.
4. A draw depends on the seed and the example's id alone, so an example is always decided alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linprog
from scipy.sparse import csr_array

from overhaul.errors import RequestError, RunError

Processor = Literal["ensemble", "count", "aggregate_first", "post_first"]
Constraint = Literal["equalised_odds", "demographic_parity"]

MOST_MEMBERS = 12
"""How many members may vote in patterns: 4096 of them."""

_COARSER: Mapping[str, Processor] = {"ensemble": "count", "count": "aggregate_first"}

Array = np.ndarray
Groups = Sequence[Any] | np.ndarray
"""The protected attribute of n examples; compared as text."""


@dataclass(frozen=True)
class DecisionTable:
    """The chance of deciding 1, by group and by what is read of the votes.

    Attributes:
        processor: what is read.
        constraint: what the groups have in common.
        members: how many members vote.
        groups: the protected attribute's values, as text.
        chances: [groups, features]; a pattern's place is its votes read as a binary number, first member lowest.
        empty: how many cells the calibration sample lacked.
        seed: of the draws.
    """

    processor: Processor
    constraint: Constraint
    members: int
    groups: tuple[str, ...]
    chances: Float[Array, "groups features"]
    empty: int
    seed: int

    def chance(self, votes: Int[Array, "n s"], groups: Groups) -> Float[Array, " n"]:
        """The chance of deciding 1 for each example.

        Raises:
            RequestError: another number of members, or a group that the calibration sample did not have.
        """
        votes = np.asarray(votes)
        if votes.ndim != 2 or votes.shape[1] != self.members:
            raise RequestError(f"The table reads the votes of {self.members} members, not an array of {votes.shape}.")
        place = {group: n for n, group in enumerate(self.groups)}
        names = [str(group) for group in groups]
        if unknown := sorted(set(names) - set(self.groups)):
            raise RequestError(f"The table has no group {unknown[0]!r}; it knows {', '.join(self.groups)}.")
        return self.chances[[place[name] for name in names], _feature(votes, self.processor)]

    def decide(self, votes: Int[Array, "n s"], groups: Groups, ids: Sequence[str]) -> Int[Array, " n"]:
        """0 or 1 for each example: a draw that depends on the seed and its id; errors as in `chance`."""
        drawn = np.array([_uniform(self.seed, one) for one in ids])
        return (drawn < self.chance(votes, groups)).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {**vars(self), "groups": list(self.groups), "chances": self.chances.tolist()}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> DecisionTable:
        """What `to_json` wrote."""
        return cls(**{**kept, "groups": tuple(kept["groups"]), "chances": np.array(kept["chances"])})


def fair_table(
    votes: Int[Array, "n s"],
    groups: Groups,
    labels: Int[Array, " n"],
    *,
    constraint: Constraint = "equalised_odds",
    processor: Processor = "ensemble",
    seed: int = 0,
) -> DecisionTable:
    """The table with the fewest errors on a calibration sample among those that treat the groups alike there.

    Args:
        votes: what each member says of each example, 0 or 1.
        groups: the protected attribute, n values of any type.
        labels: the truth, 0 or 1.
        constraint: what the groups must have in common.
        processor: what is read of the votes. The table of "post_first" is in general not fair, not even on the sample.
        seed: of later draws.

    Raises:
        RequestError: the arrays do not fit together, there is one group only, a group lacks a label, or there are too
            many members for patterns.
    """
    votes, labels = np.asarray(votes), np.asarray(labels)
    names, group = np.unique(np.array([str(one) for one in groups]), return_inverse=True)
    if votes.ndim != 2 or not len(votes) == len(group) == len(labels):
        raise RequestError(
            f"votes must be [n, members] beside n groups and n labels; they are {votes.shape}, {len(group)}, {len(labels)}."
        )
    if not np.isin(votes, (0, 1)).all():
        raise RequestError(f"{TWO}: every vote must be 0 or 1.")
    check(groups, labels, votes.shape[1], constraint, processor)
    if processor == "post_first":
        chances, empty = _most_of(_member_tables(votes, group, labels, constraint)), 0
    else:
        chances, empty = _filled(votes, group, labels, constraint, processor)
    return DecisionTable(processor, constraint, votes.shape[1], tuple(map(str, names)), chances, empty, seed)


TWO = "Fair decisions are between two classes"


def check(groups: Groups, labels: Array, members: int, constraint: str, processor: str) -> None:
    """Whether a table can be had from these examples, whatever the members vote.

    Raises:
        RequestError: as in `fair_table`.
    """
    names, group = np.unique(np.array([str(one) for one in groups]), return_inverse=True)
    if not np.isin(labels, (0, 1)).all():
        raise RequestError(f"{TWO}: every label must be 0 or 1.")
    if len(names) < 2:
        raise RequestError(f"Fairness compares groups, and there are {len(names)}; check the column of groups.")
    if processor in ("ensemble", "post_first") and members > MOST_MEMBERS:
        raise RequestError(f"{members} members have too many patterns of votes; write processor: count.")
    for n, name in enumerate(names):
        for label in (0, 1):
            if constraint == "equalised_odds" and not np.any((group == n) & (labels == label)):
                raise RequestError(
                    f"The group {name!s} has no example of label {label}, so its rate there is unknown. Give more "
                    "calibration examples, or write constraint: demographic_parity."
                )


def _majority(positive: Array, members: int) -> Array:
    return (2 * positive > members).astype(np.int64)


def _feature(votes: Array, processor: Processor) -> Int[Array, " n"]:
    """What a processor reads of the votes, as a number from 0."""
    if processor in ("ensemble", "post_first"):
        return votes @ (1 << np.arange(votes.shape[1]))
    counts = votes.sum(axis=1)
    return counts if processor == "count" else _majority(counts, votes.shape[1])


def _patterns(members: int) -> Int[Array, "patterns s"]:
    """All patterns of votes, in the order of their places in a table."""
    return (np.arange(1 << members)[:, None] >> np.arange(members)) & 1


def _filled(
    votes: Array, group: Array, labels: Array, constraint: Constraint, processor: Processor
) -> tuple[Float[Array, "groups features"], int]:
    """The program's solution with values for cells that the sample lacks, and their number."""
    members = votes.shape[1]
    size = {"ensemble": 1 << members, "count": members + 1, "aggregate_first": 2}[processor]
    found = solve(joint(_feature(votes, processor), group, labels, size), constraint)
    open_cells = np.isnan(found)
    if not open_cells.any():
        return found, 0
    if processor == "aggregate_first":
        coarse = np.broadcast_to(np.arange(2.0), found.shape)
    else:
        known, _ = _filled(votes, group, labels, constraint, _COARSER[processor])
        reads = _patterns(members).sum(axis=1) if processor == "ensemble" else _majority(np.arange(size), members)
        coarse = known[:, reads]
    return np.where(open_cells, coarse, found), int(open_cells.sum())


def _member_tables(votes: Array, group: Array, labels: Array, constraint: Constraint) -> Float[Array, "s groups 2"]:
    """One program for each member; a vote that a group never got is believed."""
    tables = [solve(joint(vote, group, labels, 2), constraint) for vote in votes.T]
    return np.stack([np.where(np.isnan(table), np.arange(2.0), table) for table in tables])


def _most_of(tables: Float[Array, "s groups 2"]) -> Float[Array, "groups patterns"]:
    """The chance that more than half of the members' draws are 1, by group and pattern of votes."""
    members, groups = tables.shape[:2]
    patterns = _patterns(members)
    counts = np.zeros((groups, len(patterns), members + 1))
    counts[:, :, 0] = 1.0
    for table, vote in zip(tables, patterns.T, strict=True):
        one = table[:, vote][:, :, None]
        counts = counts * (1 - one) + np.concatenate([np.zeros_like(one), counts[:, :, :-1]], axis=2) * one
    return counts[:, :, _majority(np.arange(members + 1), members) == 1].sum(axis=2)


def joint(feature: Array, group: Array, labels: Array, features: int) -> Float[Array, "groups 2 features"]:
    """Shares of the sample by group, label and feature."""
    shares = np.zeros((int(group.max()) + 1, 2, features))
    np.add.at(shares, (group, labels, feature), 1.0 / len(labels))
    return shares


def solve(shares: Float[Array, "groups 2 features"], constraint: Constraint) -> Float[Array, "groups features"]:
    """The program itself: chances of deciding 1, NaN in cells that have no share.

    Raises:
        RunError: the solver failed.
    """
    groups, _, features = shares.shape
    cost = (shares[:, 0] - shares[:, 1]).ravel()
    kinds = [shares[:, 0], shares[:, 1]] if constraint == "equalised_odds" else [shares.sum(axis=1)]
    rows: list[Array] = []
    for kind in kinds:
        rate = kind / kind.sum(axis=1, keepdims=True)
        for other in range(1, groups):
            row = np.zeros((groups, features))
            row[0], row[other] = rate[0], -rate[other]
            rows.append(row.ravel())
    present = (shares.sum(axis=1) > 0).ravel()
    equal = csr_array(np.stack(rows)[:, present])
    # the dual simplex ends at a vertex: all but a few chances are 0 or 1
    result: Any = linprog(cost[present], A_eq=equal, b_eq=np.zeros(len(rows)), bounds=(0, 1), method="highs-ds")
    if result.status != 0:
        raise RunError(f"The program for fair decisions was not solved: {result.message}")
    chances = np.full(groups * features, np.nan)
    chances[present] = np.clip(result.x, 0.0, 1.0)
    return chances.reshape(groups, features)


def rates(chances: Array, groups: Groups, labels: Array) -> dict[str, tuple[float, float]]:
    """P(decision 1 | group, label) for labels 0 and 1, by group; `chances` may be decisions or chances of 1, [n]."""
    names = np.array([str(one) for one in groups])
    return {
        str(name): (
            float(chances[(names == name) & (labels == 0)].mean()),
            float(chances[(names == name) & (labels == 1)].mean()),
        )
        for name in np.unique(names)
    }


def gap(chances: Array, groups: Groups, labels: Array, constraint: Constraint = "equalised_odds") -> float:
    """How differently groups are treated: the largest difference of a rate between two groups.

    For equalised odds the larger one of both labels' differences (not their mean). `chances` as in `rates`.
    """
    if constraint == "demographic_parity":
        names = np.array([str(one) for one in groups])
        means = [float(chances[names == name].mean()) for name in np.unique(names)]
        return max(means) - min(means)
    by_label = zip(*rates(chances, groups, labels).values(), strict=True)
    return max(max(values) - min(values) for values in by_label)


def error(chances: Array, labels: Array) -> float:
    """Expected share of wrong decisions; `chances` as in `rates`."""
    return float(np.mean(np.where(labels == 1, 1.0 - chances, chances)))


def majority(votes: Int[Array, "n s"]) -> Int[Array, " n"]:
    """What most members voted; 0 where as many voted 0 as 1."""
    return _majority(votes.sum(axis=1), votes.shape[1])


def _uniform(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]) / 2**56
