"""How the report writes a number, and what it says about a change: one place for the page and the terminal.

A verdict looks at the first and the last stage only. What counts as moved:

1. A share (accuracy, extraction, ROUGE-L, area under a curve): more than 3 points.
2. Any other number: more than 5% of what it was before; a latency, which no machine measures the same twice, 10%.
3. Chance is one half, and reached within 10 points: with a hundred examples a side, an attack that guesses still
   scores anywhere between 42% and 58%.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Measure = Mapping[str, Any]
"""One entry of the report's `measures`."""

POINTS = 0.03
RELATIVE: Mapping[str, float] = {"ms": 0.10}
RELATIVE_ELSE = 0.05
CHANCE, NEAR_CHANCE = 0.5, 0.10

TOLERANCE = (
    "A share has moved if it differs by more than 3 points, a latency by more than 10%, any other number by more than "
    "5%. Chance is 50%, reached within 10 points."
)

MISSING = "–"
GROUPS: Mapping[str, str] = {
    "forgotten": "To be forgotten",
    "learned": "To be learned",
    "kept": "To be kept",
    "cost": "Cost",
}
WANTED: Mapping[str, str] = {"up": "should rise", "down": "should fall", "same": "should stay", "chance": "to chance"}

_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SHORT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_PAPER = re.compile(r"(?:arXiv:)?(\d{4}\.\d{4,5}(?:v\d+)?|[a-z-]+(?:\.[A-Z]{2})?/\d{7})")


def _usable(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def number(value: float) -> str:
    """Four significant digits: 1.634, 12,480, 3.1e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        text = f"{value:.1e}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−") if value < 0 else text


def _scaled(value: float, steps: Sequence[tuple[float, str]]) -> str:
    """Three digits and a prefix: "2.10 M", "512 "."""
    for size, prefix in steps:
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)} {prefix}"
    return f"{value:.4g} "


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _share(value: float) -> str:
    points = 100 * value
    if points in (0, 100):
        return f"{points:.0f}%"
    # 99.97% must not read as all of them, nor 0.03% as none
    digits = ".2g" if points < 0.1 else ".2f" if points > 99.9 else ".1f"
    return f"{points:{digits}}%"


def humanise(value: float | None, unit: str) -> str:
    """A value as a reader wants it.

    Args:
        value: in the plain unit (shares from 0 to 1, bytes, operations); None becomes a dash.
        unit: "share", "probability", "bytes", "parameters", "FLOPs", "ms" or "s". Any other ("bits/byte", "") is not
            written after the number, nor is FLOPs, because the row's heading says it.
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not finite"
    match unit:
        case "share":
            return _share(value)
        case "probability":
            return f"{value:.3g}" if value >= 1e-3 or value == 0 else f"{value:.1e}"
        case "bytes":
            return f"{_scaled(value, _DECIMAL)}B"
        case "parameters":
            return _scaled(value, _SHORT).strip()
        case "FLOPs":
            return _scaled(value, _DECIMAL).strip()
        case "ms":
            return f"{_three_digits(value)} ms" if value < 999.5 else f"{_three_digits(value / 1000)} s"
        case "s":
            return duration(value)
        case _:
            return number(value)


def duration(seconds: float) -> str:
    """0.84 s, 12.3 s, 2 min 5 s, 1 h 4 min."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plain(value: Any) -> str:
    """A knob or fact of any type: numbers shortened, lists joined, text as it is."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−") if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {plain(item)}" for name, item in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(plain(item) for item in value) or "none"
    return str(value)


def paper_address(paper: str | None) -> str | None:
    """Where an arXiv number is read ("2308.07707" or "arXiv:2308.07707"); None for anything else."""
    match = _PAPER.fullmatch(paper or "")
    return f"https://arxiv.org/abs/{match[1]}" if match else None


def subject(measure: Measure) -> str:
    """What was measured, on what: "answer probability (forget)"."""
    return f"{measure['label']} ({measure['on']})" if measure.get("on") else str(measure["label"])


def aim(measure: Measure) -> str:
    """What was wanted of a measure; of a cost, which way is better."""
    if measure["group"] == "cost":
        return "less is better" if measure["better"] == "down" else "more is better"
    return WANTED[measure["wanted"]]


def count(n: int | None) -> str:
    """A number of examples."""
    return MISSING if n is None else f"{n:,}"


def direction(before: float, after: float, unit: str) -> int:
    """-1, 0 or 1: fallen, hardly moved, risen."""
    step = after - before
    allowed = POINTS if unit == "share" else RELATIVE.get(unit, RELATIVE_ELSE) * abs(before)
    # the margin itself still counts as unmoved, also after rounding in binary
    return 0 if abs(step) <= allowed * (1 + 1e-9) else (1 if step > 0 else -1)


def change(measure: Measure) -> str:
    """From the first stage to the last: "−92.1 points", "30,000× lower", "+4.2%"."""
    before, after = measure["values"][0], measure["values"][-1]
    if len(measure["values"]) < 2 or not (_usable(before) and _usable(after)):
        return MISSING
    if after == before:
        return "no change"
    if measure["unit"] == "share":
        return _signed(100 * (after - before), " points")
    if before <= 0 or after <= 0:
        return _signed(after - before, "") if after else "down to 0"
    ratio = max(after / before, before / after)
    if ratio >= 10 or (after > before and ratio >= 2):
        times = f"{ratio:.1f}" if ratio < 10 else f"{float(f'{ratio:.2g}'):,.0f}" if ratio < 1e6 else "over 1,000,000"
        return f"{times}× {'higher' if after > before else 'lower'}"
    return _signed(100 * (after / before - 1), "%")


def _signed(value: float, unit: str) -> str:
    text = f"{abs(value):.1f}" if unit else number(abs(value))
    if float(text.replace(",", "")) == 0:
        return "no visible change"
    return f"{'+' if value > 0 else '−'}{text}{unit}"


@dataclass(frozen=True)
class Verdict:
    """A judgement in words.

    Attributes:
        word: "as wanted", "stayed", "got worse", ...
        good: whether this is what was wanted; None where there is nothing to judge or it is neither.
    """

    word: str
    good: bool | None

    @property
    def sign(self) -> str:
        """A mark that reads without colour."""
        return {True: "✓", False: "✗", None: "~"}[self.good]


def verdict(measure: Measure) -> Verdict:
    """What became of one measure between the first stage and the last, given what was wanted of it."""
    before, after, unit = measure["values"][0], measure["values"][-1], measure["unit"]
    if len(measure["values"]) < 2:
        return Verdict("measured once", None)
    if after is not None and not math.isfinite(after):
        return Verdict("broke", False)
    if not (_usable(before) and _usable(after)):
        return Verdict("not compared", None)
    if measure["wanted"] == "chance":
        return _against_chance(before, after)
    moved = direction(before, after, unit)
    gain = moved if measure["better"] == "up" else -moved
    if measure["group"] == "cost":
        return Verdict({-1: "less", 0: "as before", 1: "more"}[moved], {-1: False, 0: None, 1: True}[gain])
    if measure["wanted"] == "same":
        return Verdict({-1: "got worse", 0: "stayed", 1: "improved"}[gain], gain >= 0)
    if moved == 0:
        return Verdict("hardly changed", False)
    as_wanted = moved == (1 if measure["wanted"] == "up" else -1)
    return Verdict("as wanted" if as_wanted else "wrong way", as_wanted)


def _against_chance(before: float, after: float) -> Verdict:
    was, now = before - CHANCE, after - CHANCE
    if abs(now) <= NEAR_CHANCE * (1 + 1e-9):
        return Verdict("at chance", True)
    if was * now < 0:
        # below chance is as visible to an attacker as above it
        return Verdict("overshot chance", False)
    if abs(was) - abs(now) > POINTS:
        return Verdict("nearer chance", None)
    return Verdict("not nearer", False)


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


def by_group(measures: Sequence[Measure]) -> dict[str, list[Measure]]:
    """Measures in the order the report shows them: forgotten, learned, kept, cost, then any other group."""
    found: dict[str, list[Measure]] = {group: [] for group in GROUPS}
    for measure in measures:
        found.setdefault(measure["group"], []).append(measure)
    return {group: rows for group, rows in found.items() if rows}


def heading(group: str) -> str:
    """The group's name for a reader."""
    return GROUPS.get(group, group.replace("_", " ").capitalize())


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
    if all(seen.good is False for seen in verdicts):
        count = "" if len(rows) == 1 else f"none of {len(rows)} measures {done}: "
        return f"No: {count}{'; '.join(short)}.", Verdict("no", False)
    reached = f"{len(rows) - len(short)} of {len(rows)} measures {done}"
    return f"In part: {reached}; the rest: {'; '.join(short)}.", Verdict("in part", None)


def _say_cost(rows: Sequence[Measure]) -> tuple[str, Verdict]:
    parts = []
    for row in rows:
        moved = change(row)
        now = f"{row['label']} {humanise(row['values'][-1], row['unit'])}"
        parts.append(now if moved in (MISSING, "no change") else f"{now} ({moved})")
    goods = {verdict(row).good for row in rows} - {None}
    overall = Verdict("less", True) if goods == {True} else Verdict("more", False) if goods == {False} else None
    return f"Now: {'; '.join(parts)}.", overall or Verdict("as before" if not goods else "mixed", None)
