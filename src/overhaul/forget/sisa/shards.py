"""SISA's bookkeeping: which example went into which member, and which members are trained again when it leaves.

Bourtoule et al., "Machine Unlearning", IEEE S&P 2021, arXiv:1912.03817.

    M_s,0 = init(seed, s)      M_s,r = train(M_s,r-1 on D_s,1 + ... + D_s,r)      each for 2 e / (R + 1) epochs

Shard s of S is cut into R slices; member s is M_s,R. To forget an example of slice r, M_s,r-1 is taken up again and the
slices from r on are trained without it. This file knows ids only; a `Trainer` turns ids into a trained member.

How it differs from the paper and the released code:

1. A checkpoint is looked up by a digest of all that went into it: the trainer, the seed and every id seen so far. Forgetting
   is then the same as training on the smaller map; a checkpoint that saw a removed example has another name and cannot
   be taken by mistake, and a training that was interrupted goes on.
2. The state of the optimizer is not kept: optimizer and schedule begin anew with every slice, in training and retraining
   alike, because the schedule must (the first slices are short).
3. A shard that lost all its examples has no member; the ensemble goes on with the others.
4. The record holds the ids that were removed, so that a second request can be told from an unknown id. Whoever holds a
   row can compute its id and see that it was removed: delete the record where that must not be known.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from jaxtyping import Float

from overhaul.errors import RequestError
from overhaul.fit import Draw

State = TypeVar("State")


@dataclass(frozen=True)
class ShardMap:
    """Where every id went, drawn once and kept.

    Attributes:
        seed: of the draw, and of every training.
        slices: ids by shard and slice: `slices[s][r]`.
        forgotten: ids that were there once.
    """

    seed: int
    slices: tuple[tuple[tuple[str, ...], ...], ...]
    forgotten: tuple[str, ...] = ()

    @classmethod
    def draw(cls, ids: Iterable[str], shards: int, slices: int, seed: int) -> ShardMap:
        """Spread ids evenly and at random; the result depends on the set of ids, not on their order.

        Raises:
            RequestError: there are fewer ids than slices in all.
        """
        order = sorted(set(ids))
        if len(order) < shards * slices:
            raise RequestError(
                f"{len(order)} different examples cannot fill {shards} shards of {slices} slices: each slice needs one. "
                "Write fewer shards or slices."
            )
        random.Random(seed).shuffle(order)
        return cls(seed, tuple(tuple(tuple(order[s::shards][r::slices]) for r in range(slices)) for s in range(shards)))

    def ids(self, shard: int) -> list[str]:
        """All ids of a shard, slice after slice."""
        return [one for part in self.slices[shard] for one in part]

    def touched(self, ids: Iterable[str]) -> list[int]:
        """The shards that hold any of these ids."""
        wanted = set(ids)
        return [shard for shard in range(len(self.slices)) if not wanted.isdisjoint(self.ids(shard))]

    def without(self, ids: Iterable[str]) -> ShardMap:
        """The map with these ids moved to `forgotten`.

        Raises:
            RequestError: an id is unknown or was forgotten before, or nothing would be left.
        """
        removed = set(ids)
        known = {one for shard in range(len(self.slices)) for one in self.ids(shard)}
        if again := sorted(removed & set(self.forgotten)):
            raise RequestError(
                f"{len(again)} of the examples were forgotten before, such as {again[0]}; leave them out."
            )
        if unknown := sorted(removed - known):
            raise RequestError(
                f"{len(unknown)} of {len(removed)} examples to forget were never in a shard, such as {unknown[0]}. An "
                "example is known by its content: it must be encoded exactly as in training."
            )
        if removed == known:
            raise RequestError("Nothing would be left to train on: these are all examples. Delete the model instead.")
        left = tuple(tuple(tuple(one for one in part if one not in removed) for part in s) for s in self.slices)
        return replace(self, slices=left, forgotten=(*self.forgotten, *sorted(removed)))

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "seed": self.seed,
            "slices": [[list(p) for p in s] for s in self.slices],
            "forgotten": [*self.forgotten],
        }

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> ShardMap:
        """What `to_json` wrote."""
        slices = tuple(tuple(tuple(part) for part in shard) for shard in kept["slices"])
        return cls(kept["seed"], slices, tuple(kept["forgotten"]))


class Trainer(Protocol[State]):
    """Turns ids into a trained member. What it does may depend on its arguments and its identity alone."""

    @property
    def identity(self) -> str:
        """A digest of all settings and of what a member begins from."""
        ...

    def visits(self, ids: Sequence[str]) -> int:
        """How many samples one training on these ids reads, repeats included."""
        ...

    def begin(self, seed: int) -> State:
        """A member that has seen nothing."""
        ...

    def train(self, state: State, ids: Sequence[str], seed: int, name: str) -> State:
        """`state` trained on these ids; `state` itself stays as it is."""
        ...


@dataclass(frozen=True)
class Retrained:
    """What was done to one member: `first_slice` (from 0) was the first that was trained, `examples` ids are left."""

    shard: int
    first_slice: int
    examples: int
    visits: int


@dataclass(frozen=True)
class Request:
    """One entry of the record.

    Attributes:
        forgotten: the ids that were removed; none for the first training.
        retrained: the members that were trained, and from where.
        visits: samples that were read for it.
        from_scratch: samples that training every member again without the ids reads.
    """

    forgotten: tuple[str, ...]
    retrained: tuple[Retrained, ...]
    visits: int
    from_scratch: int

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


class Sisa(Generic[State]):
    """Members trained on disjoint shards.

    Args:
        places: the map; `forget` replaces it.
        trainer: how a member is trained.
        checkpoints: where a state is kept after each slice, by a name that says what it saw; without it, a member is
            always trained again from its first slice.
        members: the trained members by shard, where they exist already.
    """

    def __init__(
        self,
        places: ShardMap,
        trainer: Trainer[State],
        checkpoints: MutableMapping[str, State] | None = None,
        members: Mapping[int, State] | None = None,
    ) -> None:
        self.places, self.trainer, self.checkpoints = places, trainer, checkpoints
        self.members: dict[int, State] = dict(members or {})

    def train(self) -> Request:
        """Train every member."""
        return self._replace(self.places, range(len(self.places.slices)), ())

    def forget(self, ids: Iterable[str]) -> Request:
        """Remove ids: each touched member is trained again from the last checkpoint that saw none of them.

        The result is what `train` gives on the smaller map, bit for bit where the trainer is deterministic. Several
        ids in one call cost less than one after the other. Checkpoints that saw them are deleted at the end.

        Raises:
            RequestError: an id is unknown or was forgotten before, or nothing would be left.
        """
        removed = sorted(set(ids))
        before, after = self.places, self.places.without(removed)
        touched = before.touched(removed)
        request = self._replace(after, touched, tuple(removed))
        if self.checkpoints is not None:
            for shard in touched:
                for stale in set(self._names(before, shard)) - set(self._names(after, shard)):
                    self.checkpoints.pop(stale, None)
        return request

    def _replace(self, places: ShardMap, shards: Iterable[int], removed: tuple[str, ...]) -> Request:
        done = {shard: self._train(places, shard) for shard in shards}
        for shard, (_, state) in done.items():
            self.members.pop(shard, None)
            if state is not None:
                self.members[shard] = state
        self.members = dict(sorted(self.members.items()))
        self.places = places
        retrained = tuple(record for record, _ in done.values())
        everything = sum(self._visits(places, shard, 0) for shard in range(len(places.slices)))
        return Request(removed, retrained, sum(one.visits for one in retrained), everything)

    def _train(self, places: ShardMap, shard: int) -> tuple[Retrained, State | None]:
        kept: MutableMapping[str, State] = {} if self.checkpoints is None else self.checkpoints
        names, left = self._names(places, shard), len(places.ids(shard))
        if not left:
            return Retrained(shard, len(names), 0, 0), None
        first = next((stage + 1 for stage in reversed(range(len(names))) if names[stage] in kept), 0)
        state = kept[names[first - 1]] if first else self.trainer.begin(stage_seed(places.seed, shard, -1))
        for stage in range(first, len(names)):
            seen = _seen(places, shard, stage)
            if seen:
                seed = stage_seed(places.seed, shard, stage)
                state = self.trainer.train(state, seen, seed, f"shard {shard}, slice {stage}")
            if self.checkpoints is not None:
                self.checkpoints[names[stage]] = state
        return Retrained(shard, first, left, self._visits(places, shard, first)), state

    def _visits(self, places: ShardMap, shard: int, first: int) -> int:
        stages = [_seen(places, shard, stage) for stage in range(first, len(places.slices[shard]))]
        return sum(self.trainer.visits(seen) for seen in stages if seen)

    def _names(self, places: ShardMap, shard: int) -> list[str]:
        """The names of a shard's checkpoints, one a slice: each a digest of all that the state has seen."""
        digest = hashlib.sha256(f"{self.trainer.identity} {places.seed} {shard} {len(places.slices[shard])}".encode())
        names: list[str] = []
        for stage, part in enumerate(places.slices[shard]):
            digest.update(f"|{' '.join(part)}".encode())
            names.append(f"shard-{shard}-slice-{stage}-{digest.hexdigest()[:32]}")
        return names


def _seen(places: ShardMap, shard: int, stage: int) -> list[str]:
    return [one for part in places.slices[shard][: stage + 1] for one in part]


def stage_seed(seed: int, shard: int, stage: int) -> int:
    """The seed of one training: no shard can learn from another through a shared random stream."""
    return int.from_bytes(hashlib.sha256(f"{seed} {shard} {stage}".encode()).digest()[:6])


def epochs_per_slice(epochs: float, slices: int) -> float:
    """e_r: passes over all slices so far that cost together what `epochs` passes over the whole shard cost."""
    return 2 * epochs / (slices + 1)


def one_request(slices: int) -> float:
    """Share of a member's training that one request in a random slice takes: 2/3 + 1/(3R)."""
    return (2 * slices + 1) / (3 * slices)


def sequential_requests(samples: int, shards: int, requests: int) -> float:
    """Samples that K requests one after the other retrain, each pass counted once, without slices."""
    return (samples / shards + 1 / (2 * shards) - 1) * requests - requests**2 / (2 * shards)


def batched_requests(samples: int, shards: int, requests: int) -> float:
    """Samples that K requests at once retrain, each pass counted once, without slices."""
    return samples * (1 - (1 - 1 / shards) ** requests) - requests


class EstimatorTrainer:
    """scikit-learn classifiers as members, held in memory.

    One with `partial_fit` goes on from its last slice; any other is fitted again on its whole shard, so it takes one slice
    only. No file is written: there is no format for a fitted estimator that is not a pickle.

    Args:
        estimator: an unfitted classifier with `predict_proba`; cloned for each member, `random_state` set from the seed.
        x: features, [n, d].
        y: labels, [n].
        ids: of the rows, all different.
        classes: every label there is, so that members agree on columns; decide it without looking at rows that may go.
        slices: how many slices the map has.
        epochs: passes over a shard, for one with `partial_fit`.

    Raises:
        RequestError: several slices for an estimator that cannot go on from one.
    """

    def __init__(
        self,
        estimator: Any,
        x: np.ndarray,
        y: np.ndarray,
        ids: Sequence[str],
        classes: Sequence[Any],
        *,
        slices: int = 1,
        epochs: float = 1.0,
    ) -> None:
        self.goes_on = hasattr(estimator, "partial_fit")
        if slices > 1 and not self.goes_on:
            raise RequestError(
                f"{type(estimator).__name__} has no `partial_fit`, so it cannot go on from a slice and slices save nothing. "
                "Write slices=1, or take an estimator with `partial_fit`."
            )
        self.estimator, self.x, self.y, self.classes = estimator, x, y, np.unique(classes)
        self.rows = {one: row for row, one in enumerate(ids)}
        self.epochs = epochs_per_slice(epochs, slices)

    @property
    def identity(self) -> str:
        """The estimator's kind and parameters; its data is known by its ids."""
        return f"{type(self.estimator).__name__} {sorted(self.estimator.get_params().items())} {self.epochs}"

    def visits(self, ids: Sequence[str]) -> int:
        """Rows given to `partial_fit`, or to the one `fit`."""
        return max(1, round(self.epochs * len(ids))) if self.goes_on else len(ids)

    def begin(self, seed: int) -> Any:
        """An unfitted clone."""
        from sklearn.base import clone

        fresh: Any = clone(self.estimator)
        return fresh.set_params(random_state=seed % 2**32) if "random_state" in fresh.get_params() else fresh

    def train(self, state: Any, ids: Sequence[str], seed: int, name: str) -> Any:
        """A copy, fitted further."""
        rows = np.array([self.rows[one] for one in ids])
        trained = copy.deepcopy(state)
        if not self.goes_on:
            return trained.fit(self.x[rows], self.y[rows])
        drawn = rows[Draw(name, len(rows), seed).indices(0, self.visits(ids))]
        return trained.partial_fit(self.x[drawn], self.y[drawn], classes=self.classes)

    def probabilities(self, state: Any, x: np.ndarray) -> Float[np.ndarray, "n classes"]:
        """A member's class probabilities; zero for a class that its shard did not hold."""
        found = np.zeros((len(x), len(self.classes)))
        found[:, np.searchsorted(self.classes, state.classes_)] = state.predict_proba(x)
        return found
