"""What the roles of a step must be to each other: forgetting needs something that stays, and the two must not overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from overhaul.data.duplicates import identity, near_duplicates
from overhaul.data.materials import Row, Source
from overhaul.errors import RequestError

Rows = Mapping[str, Sequence[tuple[Source, Sequence[Row]]]]


def check_roles(where: str, reads: Mapping[str, str], changes: str, rows: Rows) -> list[str]:
    """Compare what is to be forgotten with what is to stay.

    Args:
        where: the step, for messages.
        reads: which material each of its roles reads.
        changes: what its method changes.
        rows: all materials.

    Returns:
        Warnings: what may be meant, but seldom is.

    Raises:
        RequestError: the forget set is most of the training data, or an example is to be forgotten and to be kept.
    """
    if "forget" not in reads:
        return []
    forget = _rows(rows, reads["forget"])
    known = {identity(row) for row in forget}
    if "full" in reads:
        _check_share(where, changes, known, {identity(row) for row in _rows(rows, reads["full"])})
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
    text = " ".join(str(row[name]) for name in ("text", "question", "answer") if name in row) or str(row)
    return repr(text if len(text) <= most else f"{text[: most - 1]}…")
