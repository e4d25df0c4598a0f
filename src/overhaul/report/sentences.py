"""What a report says in short: a sentence on each group of measures, and how far chance alone moves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overhaul.report.numbers import (
    MISSING,
    NOTHING,
    UNKNOWN,
    Measure,
    Verdict,
    by_group,
    change,
    heading,
    humanise,
    subject,
    verdict,
)


@dataclass(frozen=True)
class GroupVerdict:
    """One sentence about one group of measures; `overall` carries the sign of the whole."""

    group: str
    heading: str
    sentence: str
    overall: Verdict


def uncertainty(measures: Sequence[Measure]) -> str:
    """How far chance alone moves a share, by the fewest examples one was measured on; "" where there is no share."""
    counts = [measure["n"] for measure in measures if measure["unit"] == "share" and measure["n"]]
    if not counts:
        return ""
    # 1.96 standard errors of a proportion of one half, the widest there is
    return (
        f"A share measured on n = {min(counts):,} is itself uncertain by up to ±{98 / min(counts) ** 0.5:.1f} points."
    )


def group_verdicts(measures: Sequence[Measure]) -> list[GroupVerdict]:
    """One sentence per group: what was to change, did it; what was to stay, did it; what the model costs now."""
    sentences = []
    for group, rows in by_group(measures).items():
        say = _say_cost if group == "cost" else _say_judged
        sentence, overall = say(rows)
        sentences.append(GroupVerdict(group, heading(group), sentence, overall))
    return sentences


def _journey(measure: Measure, said: str) -> str:
    first, last = (humanise(measure["values"][i], measure["unit"]) for i in (0, -1))
    return f"{subject(measure)} {first} → {last} ({said})"


def _say_judged(rows: Sequence[Measure]) -> tuple[str, Verdict]:
    if all(len(row["values"]) < 2 for row in rows):
        return "Measured once, so there is nothing to compare it with yet.", Verdict("measured once", None)
    verdicts = [verdict(row) for row in rows]
    done = "stayed" if all(row["wanted"] == "same" for row in rows) else "came out as wanted"
    short = [_journey(row, seen.word) for row, seen in zip(rows, verdicts, strict=True) if not seen.good]
    if not short:
        count = "" if len(rows) == 1 else f"all {len(rows)} measures {done}, such as "
        return f"Yes: {count}{_journey(rows[0], change(rows[0]))}.", Verdict("yes", True)
    reached, rest = len(rows) - len(short), "; ".join(short)
    if reached:
        return f"In part: {reached} of {len(rows)} measures {done}; the rest: {rest}.", Verdict("in part", None)
    failed = any(seen.good is False for seen in verdicts)
    partly = any(seen.good is None and seen.word not in (UNKNOWN, NOTHING) for seen in verdicts)
    overall = Verdict("in part", None) if partly else Verdict("no", False) if failed else Verdict(UNKNOWN, None)
    count = "" if len(rows) == 1 else f"none of {len(rows)} measures {'quite ' if partly else ''}{done}: "
    return f"{overall.word.capitalize()}: {count}{rest}.", overall


def _say_cost(rows: Sequence[Measure]) -> tuple[str, Verdict]:
    parts = []
    for row in rows:
        moved = change(row)
        now = f"{row['label']} {humanise(row['values'][-1], row['unit'])}"
        seen = verdict(row).word
        noise = seen if seen in ("within noise", "same work") else ""
        parts.append(now if moved in (MISSING, "no change") else f"{now} ({noise or moved})")
    goods = {verdict(row).good for row in rows} - {None}
    overall = Verdict("less", True) if goods == {True} else Verdict("more", False) if goods == {False} else None
    if len(rows[0]["values"]) < 2:
        return f"As it is: {'; '.join(parts)}.", Verdict("measured once", None)
    lead = "Now" if goods else "As before"
    return f"{lead}: {'; '.join(parts)}.", overall or Verdict("as before" if not goods else "mixed", None)
