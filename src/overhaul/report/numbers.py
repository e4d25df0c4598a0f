"""How the report writes a number, and what it says about a change: one place for the page and the terminal.

A verdict looks at the first and the last stage only. What counts as moved:

1. A share (accuracy, extraction, ROUGE-L, area under a curve): more than 3 points.
2. Any other number: more than 5% of what it was before. A time: only outside its own noise, that is if the fastest run of
   the slower model takes 1.25 times the median run of the faster one. Models take turns where they fit into memory beside
   each other; else a busy machine alone may slow one of them. Nothing is said of a time whose runs are not known, nor
   where the network does the same work (equal parameters, bytes and FLOPs): no change of it could explain a difference.
3. A change that was wanted is one only if it is large: a share or a probability must at least halve to have fallen, and
   gain 20 points or half of what was missing to have risen; any other number must move by more than 10%. What moved
   less moved "a little".
4. Chance is 0.5, and reached within 0.1: with a hundred examples a side, an attack that guesses still scores anywhere
   between 0.42 and 0.58.
5. The value of a model that was trained without the data is reached within a tenth of the distance there was to it, or
   within what counts as unmoved. Probabilities are compared by their logarithms, and reached within a factor of two: one
   far below that of the retrained model is as telling as one far above. Forget quality, a logarithm of a p-value,
   reaches it above p = 0.05.
6. A number whose standard error is known differs only by more than two standard errors of the difference.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

Measure = Mapping[str, Any]
"""One entry of the report's `measures`."""

POINTS = 0.03
RELATIVE = 0.05
TIMES_APART = 1.25
ERRORS_APART = 2
LARGE_POINTS, LARGE_RELATIVE = 0.20, 0.10
CHANCE, NEAR_CHANCE = 0.5, 0.10
NEAR_ANCHOR = 0.10
LEAST, LEAST_LOG10_P = 1e-30, math.log10(0.05)

TOLERANCE = (
    "A share has moved if it differs by more than 3 points, a time if the fastest run of the slower model takes 1.25 times "
    "the median run of the faster one (and not at all where parameters, bytes and FLOPs are equal), any other number if it "
    "differs by more than 5%; none of them within two standard errors of the difference, where those are known. A change is "
    "as wanted if it is "
    "large: a share or probability halved, or gained 20 points or half of what was missing; any other number moved by more "
    "than 10%. Chance is 0.5, reached within 0.1. The value of an anchor is reached within a tenth of the distance "
    "there was to it, a probability within a factor of two."
)

MISSING = "–"
UNKNOWN = "not compared"
NOTHING = "nothing to keep"
GROUPS: Mapping[str, str] = {
    "forgotten": "To be forgotten",
    "learned": "To be learned",
    "kept": "To be kept",
    "cost": "Cost",
}
WANTED: Mapping[str, str] = {
    "up": "should rise",
    "down": "should fall",
    "same": "should stay",
    "chance": "to chance",
    "anchor": "as another model",
}

_DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SHORT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_PAPER = re.compile(r"(?:arXiv:)?(\d{4}\.\d{4,5}(?:v\d+)?|[a-z-]+(?:\.[A-Z]{2})?/\d{7})")


def finite(value: float | None) -> TypeGuard[float]:
    """Whether there is a value, and one that can be compared and drawn."""
    return value is not None and math.isfinite(value)


def number(value: float) -> str:
    """Four significant digits: 1.634, 12,480, 3.1e-05."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e15:
        text = f"{value:.2g}"
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
        unit: "share", "probability", "bytes", "FLOPs", "ms", each perhaps per something ("ms/token"). Any other
            ("bits/byte", "") is not written after the number, because the row's heading says it.
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not finite"
    match _base(unit):
        case "share":
            return _share(value)
        case "probability":
            return f"{value:.3g}" if value >= 1e-3 else f"{value:.2g}"
        case "bytes":
            return f"{_scaled(value, _DECIMAL)}B"
        case "FLOPs":
            return f"{_scaled(value, _DECIMAL)}FLOPs"
        case "ms":
            return f"{_three_digits(value)} ms" if value < 999.5 else f"{_three_digits(value / 1000)} s"
        case _:
            return _scaled(value, _SHORT).strip() if 1e5 <= value < 1e15 else number(value)


def _base(unit: str) -> str:
    return unit.partition("/")[0]


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
    """What was measured, on what: "accuracy on retain"."""
    said = str(measure["label"])
    return said if measure["group"] == "cost" or not measure["on"] else f"{said} on {measure['on']}"


def aim(measure: Measure) -> str:
    """What was wanted of a measure; of a cost, which way is better."""
    if measure["group"] == "cost":
        return "less is better" if measure["better"] == "down" else "more is better"
    if measure["wanted"] != "anchor":
        return WANTED[measure["wanted"]]
    anchor = measure.get("anchor")
    return f"as {like(measure)}" + ("" if anchor is None else f": {humanise(anchor, measure['unit'])}")


def like(measure: Measure) -> str:
    """The model that a measure should become like."""
    return measure.get("like") or "the anchor"


def small_print(measure: Measure, counted: bool = True) -> str:
    """What stands under a measure's name: "n = 20 · should fall", "one forward · fastest of 9 · less is better"."""
    n, plainly = count(measure) if counted else "", measure.get("help", "")
    counts = f"fastest of {n}" if measure["group"] == "cost" else f"n\u00a0=\u00a0{n}"
    return " · ".join(part for part in (plainly, counts if n not in ("", MISSING) else "", aim(measure)) if part)


def count(measure: Measure) -> str:
    """Number of examples or of timed runs; nothing for a cost that is counted once."""
    n = measure["n"]
    if measure["group"] == "cost" and n in (None, 1):
        return ""
    return MISSING if n is None else f"{n:,}"


def direction(before: float, after: float, unit: str) -> int:
    """-1, 0 or 1: fallen, hardly moved, risen."""
    step = after - before
    allowed = POINTS if unit == "share" else RELATIVE * abs(before)
    # the margin itself still counts as unmoved, also after rounding in binary
    return 0 if abs(step) <= allowed * (1 + 1e-9) else (1 if step > 0 else -1)


def time_direction(measure: Measure) -> int | None:
    """As `direction`, of a time: None where it is within its noise, or the runs are not known."""
    runs = measure.get("runs") or [()]
    first, last = runs[0], runs[-1]
    if not (first and last):
        return None
    if min(last) >= TIMES_APART * statistics.median(first):
        return 1
    return -1 if min(first) >= TIMES_APART * statistics.median(last) else None


def spread(measure: Measure, place: int) -> str:
    """The standard error of a value, "± 1.2%"; nothing where it is not known."""
    error = (measure.get("stderrs") or {place: None})[place]
    return f"± {humanise(error, measure['unit'])}" if finite(error) else ""


def within_error(measure: Measure) -> bool:
    """Whether the first and the last value are as near as chance may bring two equal ones; unknown is no."""
    errors = measure.get("stderrs") or [None]
    first, last = errors[0], errors[-1]
    if not (finite(first) and finite(last)):
        return False
    return abs(measure["values"][-1] - measure["values"][0]) <= ERRORS_APART * math.hypot(first, last)


def change(measure: Measure) -> str:
    """From the first stage to the last: "−92.1 points", "30,000× lower", "+4.2%"."""
    before, after = measure["values"][0], measure["values"][-1]
    if len(measure["values"]) < 2 or not (finite(before) and finite(after)):
        return MISSING
    if after == before:
        return "no change"
    if measure["unit"] == "share":
        return _signed(100 * (after - before), " points")
    if measure["wanted"] == "chance":
        return f"{'+' if after > before else '−'}{number(abs(after - before))}"
    if before <= 0 or after <= 0:
        return f"{'+' if after > before else '−'}{humanise(abs(after - before), measure['unit'])}"
    ratio = max(after / before, before / after)
    if ratio >= 10 or (after > before and ratio >= 2):
        times = f"{ratio:.1f}" if ratio < 10 else f"{float(f'{ratio:.2g}'):,.0f}" if ratio < 1e6 else "over 1,000,000"
        return f"{times}× {'higher' if after > before else 'lower'}"
    return _signed(100 * (after / before - 1), "%")


def _signed(value: float, unit: str) -> str:
    text = f"{abs(value):.1f}"
    return "no visible change" if text == "0.0" else f"{'+' if value > 0 else '−'}{text}{unit}"


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
        return {True: "✓", False: "✗", None: "○"}[self.good]


def verdict(measure: Measure) -> Verdict:
    """What became of one measure between the first stage and the last, given what was wanted of it."""
    before, after, unit = measure["values"][0], measure["values"][-1], measure["unit"]
    if len(measure["values"]) < 2:
        return Verdict("measured once", None)
    if after is not None and not math.isfinite(after):
        return Verdict("broke", False)
    if not (finite(before) and finite(after)):
        return Verdict(UNKNOWN, None)
    if measure["wanted"] == "chance":
        return _against_chance(before, after)
    if measure["wanted"] == "anchor":
        return _against_anchor(before, after, measure["anchor"], unit, like(measure))
    if is_time(measure):
        if measure.get("same_work"):
            return Verdict("same work", None)
        if time_direction(measure) is None:
            return Verdict("as before", None) if after == before else Verdict("within noise", None)
    moved = direction(before, after, unit)
    if moved and within_error(measure):
        return Verdict("within noise", None)
    gain = moved if measure["better"] == "up" else -moved
    if measure["group"] == "cost":
        return Verdict({-1: "less", 0: "as before", 1: "more"}[moved], {-1: False, 0: None, 1: True}[gain])
    if measure["wanted"] == "same" and unit == "share" and measure["better"] == "up" and before == after == 0:
        return Verdict(NOTHING, None)
    if measure["wanted"] == "same":
        return Verdict({-1: "got worse", 0: "stayed", 1: "improved"}[gain], gain >= 0)
    if moved == 0:
        return Verdict("hardly changed", False)
    if moved != (1 if measure["wanted"] == "up" else -1):
        return Verdict("wrong way", False)
    return Verdict("as wanted", True) if _large(before, after, unit) else Verdict("a little", None)


def _large(before: float, after: float, unit: str) -> bool:
    if unit not in ("share", "probability"):
        return abs(after - before) > LARGE_RELATIVE * abs(before)
    if after < before:
        return after <= before / 2
    return after - before >= LARGE_POINTS or 1 - after <= (1 - before) / 2


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


def _against_anchor(before: float, after: float, anchor: float, unit: str, name: str) -> Verdict:
    if unit == "probability":
        was, now = (math.log(max(value, LEAST) / max(anchor, LEAST)) for value in (before, after))
        unmoved = abs(now) <= math.log(2)
    else:
        was, now = before - anchor, after - anchor
        unmoved = direction(anchor, after, unit) == 0
    if after >= LEAST_LOG10_P if unit == "log10 p" else unmoved or abs(now) <= NEAR_ANCHOR * abs(was):
        return Verdict(f"as {name}", True)
    if was * now < 0:
        # what is less likely than in a model that never saw it shows an attacker that something was removed
        return Verdict("overshot", False)
    return Verdict("nearer", None) if abs(now) < (1 - NEAR_ANCHOR) * abs(was) else Verdict("not nearer", False)


def is_time(measure: Measure) -> bool:
    """Whether it is how long something takes."""
    return measure["group"] == "cost" and _base(measure["unit"]) == "ms"


def with_work(measures: Sequence[Measure]) -> list[Measure]:
    """The same measures; times say whether the network does the same work at the end: equal FLOPs on equal bytes."""
    counted = [one["values"] for one in measures if one["group"] == "cost" and not is_time(one)]
    same = bool(counted) and all(values[0] is not None and values[0] == values[-1] for values in counted)
    return [{**one, "same_work": same} if is_time(one) else one for one in measures]


def by_group(measures: Sequence[Measure]) -> dict[str, list[Measure]]:
    """Measures in the order the report shows them: forgotten, learned, kept, cost, then any other group."""
    found: dict[str, list[Measure]] = {group: [] for group in GROUPS}
    for measure in with_work(measures):
        found.setdefault(measure["group"], []).append(measure)
    return {group: rows for group, rows in found.items() if rows}


def heading(group: str) -> str:
    """The group's name for a reader."""
    return GROUPS.get(group, group.replace("_", " ").capitalize())
