"""What recipes know of forgetting alone: something must stay, the two must not overlap, and nothing is forgotten twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from overhaul.data.duplicates import identity, near_duplicates, said
from overhaul.data.materials import Row, Source
from overhaul.errors import RequestError
from overhaul.method import Step

EITHER: Mapping[str, tuple[str, ...]] = {"forget.ssd": ("full", "retain")}
"""Methods whose roles are optional one by one, and of which one must be there."""

Rows = Mapping[str, Sequence[tuple[Source, Sequence[Row]]]]


def check(step: Step, rows: Rows) -> list[str]:
    """Compare what is to be forgotten with what is to stay.

    Args:
        step: of this verb, with its roles.
        rows: all materials that are data.

    Returns:
        Warnings: what may be meant, but seldom is.

    Raises:
        RequestError: the forget set is most of the training data, or an example is to be forgotten and to be kept.
    """
    where = f"Step {step.number}, {step.name}"
    reads = {role: name for role, name in step.reads.items() if isinstance(name, str) and name in rows}
    if step.name in EITHER and not reads.keys() & set(EITHER[step.name]):
        roles = " or ".join(map(repr, EITHER[step.name]))
        raise RequestError(
            f"{where}, needs the material {roles}: something that what is to be forgotten is held against."
        )
    if "forget" not in reads:
        return []
    forget = _rows(rows, reads["forget"])
    known = {identity(row) for row in forget}
    if "full" in reads:
        _check_share(where, step.method.changes, known, {identity(row) for row in _rows(rows, reads["full"])})
    if "retain" not in reads:
        return []
    retain = _rows(rows, reads["retain"])
    both = known & {identity(row) for row in retain}
    if both:
        raise RequestError(
            f"{where}: {len(both)} examples are in `forget` and in `retain`, which pull in opposite directions. Give "
            "`retain` an `unless:` with the same condition as `forget`'s `where:`."
        )
    near = near_duplicates(forget, retain)
    if not near:
        return []
    ours, theirs = near[0]
    return [
        f"{where}: {len(near)} examples of `forget` are nearly in `retain` too, which teaches them again, such as "
        f"{_shown(forget[ours])} beside {_shown(retain[theirs])}."
    ]


def check_history(step: Step, digests: Mapping[str, str], history: Mapping[str, Any]) -> list[str]:
    """Warn where the model that the run starts from was told to forget these very examples before.

    Args:
        step: of this verb.
        digests: of every material.
        history: the content of the model's lineage.json.
    """
    digest = digests.get(str(step.reads.get("forget")))
    hashes = history["materials_sha256"]
    told = ((before["name"], hashes.get(str(before["reads"].get("forget")))) for before in history["steps"])
    earlier = [name for name, hashed in told if hashed is not None and hashed == digest]
    return [
        f"Step {step.number}, {step.name}: {name} made this model forget the same examples before. What is forgotten twice "
        "ends up less likely than what was never seen, and an attacker can tell."
        for name in earlier[:1]
    ]


def _rows(rows: Rows, role: str) -> list[Row]:
    return [row for _, part in rows[role] for row in part]


def _check_share(where: str, changes: str, forget: set[str], full: set[str]) -> None:
    if full <= forget:
        raise RequestError(
            f"{where}: the forget set contains the whole training set ({len(forget)} examples), so nothing would be left to "
            "keep. Narrow `forget` with `where:`, or widen `full`."
        )
    if changes == "weights" and len(forget & full) > len(full) / 2:
        raise RequestError(
            f"{where}: {len(forget & full)} of the {len(full)} examples in `full` are to be forgotten. When more than half "
            "goes, training on the rest is cheaper than unlearning, and exact. Narrow `forget` with `where:`, or widen "
            "`full`."
        )


def _shown(row: Row, most: int = 80) -> str:
    text = said(row)
    return repr(text if len(text) <= most else f"{text[: most - 1]}…")
