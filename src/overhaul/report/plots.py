"""Small charts as inline SVG: lines over steps, bars over depth, and models by two measures.

Colours come from the page's style sheet (classes `s0` to `s4`, `bar`, `axis`, `grid`), so a chart follows the light and
the dark theme. One chart is about as wide as a phone, so its letters keep their size wherever it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from overhaul.report.numbers import finite, number

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 26, 38
POINTS_DRAWN = 240
STYLES = 5
SPANS: Mapping[str, float] = {"share": 0.2, "probability": 0.2}
"""What the axis of a comparison covers at least, so that noise does not look like a difference; of other units, a fifth of
the largest value."""


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The pixel of `value`."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that lie within `low` to `high`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def tick_label(value: float) -> str:
    """A tick in few letters: 0.25, 12k, 2e-05."""
    size = abs(value)
    text = f"{value / 1e6:.6g}M" if size >= 1e6 else f"{value / 1e3:.6g}k" if size >= 1e4 else f"{value:.6g}"
    return text.replace("-", "−") if value < 0 else text


def thin(values: Sequence[float | None], most: int = POINTS_DRAWN) -> tuple[list[tuple[float, float]], int]:
    """(step, value) pairs, means over `bucket` neighbouring steps where there are more than `most`; and the bucket.

    Steps count from 1. What is not a finite number is left out.
    """
    bucket = math.ceil(len(values) / most) or 1
    points = []
    for start in range(0, len(values), bucket):
        known = [(start + i + 1, v) for i, v in enumerate(values[start : start + bucket]) if finite(v)]
        if known:
            points.append((sum(x for x, _ in known) / len(known), sum(v for _, v in known) / len(known)))
    return points, bucket


def lines(title: str, curves: Mapping[str, Sequence[float | None]], y_name: str) -> Markup:
    """A figure with one line per curve over training steps; empty if no curve has a finite value.

    Args:
        title: what the caption says.
        curves: one value per step, by the name that the legend shows.
        y_name: what the values are; written over the vertical axis.
    """
    drawn = {name: thin(values) for name, values in curves.items()}
    drawn = {name: (points, bucket) for name, (points, bucket) in drawn.items() if points}
    if not drawn:
        return Markup("")
    y = _vertical([v for points, _ in drawn.values() for _, v in points])
    x = Scale(1, max(2, *(len(curves[name]) for name in drawn)), LEFT, WIDTH - RIGHT)
    whole = {n: tick_label(n) for n in ticks(0, x.high) if n == int(n) and n >= 1}
    parts = [_frame(y, y_name), _x_axis(whole, x, "step")]
    for i, (points, _) in enumerate(drawn.values()):
        places = [f"{x(step):.1f},{y(value):.1f}" for step, value in points]
        shape = (
            Markup('<polyline class="line s{}" points="{}"/>').format(i % STYLES, " ".join(places))
            if len(places) > 1
            else Markup('<circle class="dot s{}" r="1.5" cx="{}" cy="{}"/>').format(i % STYLES, *places[0].split(","))
        )
        parts.append(shape)
    bucket = max(bucket for _, bucket in drawn.values())
    ends = ((name, number(points[0][1]), number(points[-1][1])) for name, (points, _) in drawn.items())
    said = "; ".join(f"{name} from {first} to {last}" for name, first, last in ends)
    note = f"each point is the mean of {bucket} steps" if bucket > 1 else ""
    return _figure(title, parts, said, note=note, legend=list(drawn))


def bars(title: str, values: Mapping[int, float | None], y_name: str) -> Markup:
    """A figure with one bar per depth; empty if no value is finite. Arguments as for `lines`."""
    known = {depth: float(value) for depth, value in sorted(values.items()) if finite(value)}
    if not known:
        return Markup("")
    y = _vertical([*known.values(), 0.0])
    first, last = min(known), max(known)
    x = Scale(first - 0.5, last + 0.5, LEFT, WIDTH - RIGHT)
    width = min(28.0, 0.72 * (x(1) - x(0)))
    every = math.ceil((last - first + 1) / 12)
    shown: dict[float, str] = {d: "in" if d < 0 else str(d) for d in range(first, last + 1) if d % every == 0 or d < 0}
    parts = [_frame(y, y_name), _x_axis(shown, x, "depth (block)")]
    for depth, value in known.items():
        top, bottom = sorted((y(value), y(0.0)))
        parts.append(
            Markup(
                '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}: {}</title></rect>'
            ).format(x(depth) - width / 2, top, width, bottom - top, f"depth {depth}", number(value))
        )
    largest = max(known, key=lambda depth: abs(known[depth]))
    return _figure(title, parts, f"{len(known)} depths, largest {number(known[largest])} at depth {largest}")


def scatter(
    title: str,
    points: Mapping[str, Sequence[tuple[float | None, float | None]]],
    x_name: str,
    y_name: str,
    spans: Sequence[float | None] | None = None,
) -> Markup:
    """A figure with the points of every model, numbered as in its legend; empty if no point is finite.

    Args:
        title: what the caption says.
        points: (x, y) of every run of a model, by the model's name; the mean of its runs is drawn large.
        x_name: what runs from left to right.
        y_name: what runs upwards.
        spans: what both axes cover at least (None: a fifth of the largest value); as much as the points do, if not given.
    """
    known = {name: [(a, b) for a, b in runs if finite(a) and finite(b)] for name, runs in points.items()}
    drawn = {name: runs for name, runs in known.items() if runs}
    if not drawn:
        return Markup("")
    every = [point for runs in drawn.values() for point in runs]
    least = (
        (0.0, 0.0)
        if spans is None
        else [0.2 * max(abs(point[n]) for point in every) if span is None else span for n, span in enumerate(spans)]
    )
    across = _vertical([a for a, _ in every], least[0])
    x = Scale(across.low, across.high, LEFT, WIDTH - RIGHT - 8)
    y = _vertical([b for _, b in every], least[1])
    parts = [_frame(y, y_name), _x_axis({tick: tick_label(tick) for tick in ticks(x.low, x.high)}, x, x_name)]
    said = []
    tags: list[tuple[float, float]] = []
    for n, (name, runs) in enumerate(drawn.items(), 1):
        for a, b in runs if len(runs) > 1 else []:
            dot = Markup('<circle class="run s{}" r="1.5" cx="{:.1f}" cy="{:.1f}"/>')
            parts.append(dot.format((n - 1) % STYLES, x(a), y(b)))
        a, b = (sum(values) / len(runs) for values in zip(*runs, strict=True))
        tags.append(_free(x(a) + 4, y(b) - 4, tags))
        parts.append(
            Markup(
                '<circle class="dot s{}" r="3" cx="{:.1f}" cy="{:.1f}"><title>{}: {}, {}</title></circle>'
                '<text class="tag" x="{:.1f}" y="{:.1f}">{}</text>'
            ).format((n - 1) % STYLES, x(a), y(b), name, number(a), number(b), *tags[-1], n)
        )
        said.append(f"{name} at {number(a)}, {number(b)}")
    keys = [Markup("<span>{}\u00a0{}</span>").format(n, name) for n, name in enumerate(drawn, 1)]
    note = "" if spans is None else "axes cover 20 points of a share, a fifth of any other value, or more"
    return drawing(title, parts, "; ".join(said), keys, note)


def _free(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The nearest place to the right at which a number of two digits covers no other one."""
    while any(abs(x - a) < 12 and abs(y - b) < 8 for a, b in taken):
        x += 1
    return x, y


def _vertical(values: Sequence[float], span: float = 0.0) -> Scale:
    """The scale that shows all values, and no less than `span` around them; below 0 only where a value is."""
    low, high = min(values), max(values)
    if high - low < span:
        middle = (low + high) / 2
        down = min(middle, span / 2) if low >= 0 else span / 2
        low, high = middle - down, middle - down + span
    if low == high:
        pad = abs(low) / 2 or 1.0
        low, high = (low - pad if low else 0.0), high + pad
    room = 0.06 * (high - low)
    # zero stays on the frame: a bar has to start there
    return Scale(low - room * (low != 0), high + room * (high != 0), HEIGHT - BOTTOM, TOP)


def _frame(y: Scale, name: str) -> Markup:
    """Horizontal grid lines with their numbers, the zero line stronger, and what the values are."""
    parts = [Markup('<text class="name" x="0" y="11">{}</text>').format(clipped(name))]
    for value in ticks(y.low, y.high):
        parts.append(
            Markup(
                '<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                '<text x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format("axis" if value == 0 else "grid", LEFT, WIDTH - RIGHT, y(value), y(value), LEFT - 6, y(value) + 3.5,
                     tick_label(value))
        )  # fmt: skip
    if y.low > 0 or y.high < 0:
        base = HEIGHT - BOTTOM
        parts.append(
            Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, base, base)
        )
    return Markup("").join(parts)


def clipped(name: str, most: int = 56) -> str:
    """A name that is no longer than there is room for."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _x_axis(labels: Mapping[float, str], x: Scale, name: str) -> Markup:
    base = HEIGHT - BOTTOM
    parts = [
        Markup('<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, name
        ),
    ]
    for value, label in labels.items():
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x(value), base + 15, label)
        )
    return Markup("").join(parts)


def _figure(title: str, parts: Sequence[Markup], said: str, note: str = "", legend: Sequence[str] = ()) -> Markup:
    keys = [
        Markup('<span><svg viewBox="0 0 22 8" class="key" aria-hidden="true"><line class="line s{}" x1="0" x2="22" '
               'y1="4" y2="4"/></svg>{}</span>').format(i % STYLES, name)
        for i, name in enumerate(legend) if len(legend) > 1
    ]  # fmt: skip
    return drawing(title, parts, said, keys, note)


def drawing(
    title: str,
    parts: Sequence[Markup],
    said: str,
    keys: Sequence[Markup],
    note: str = "",
    size: tuple[float, float] = (WIDTH, HEIGHT),
    kind: str = "",
) -> Markup:
    """A figure: caption, legend, and the parts on a canvas of this size; `said` is its description for a screen reader."""
    return Markup(
        '<figure{}><figcaption><b>{}</b>{}</figcaption><div class="legend">{}</div>'
        '<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg></figure>'
    ).format(
        Markup(' class="{}"').format(kind) if kind else "", title,
        Markup(" <small>{}</small>").format(note) if note else "", Markup("").join(keys), *size,
        f"{title}: {said}", Markup("").join(parts),
    )  # fmt: skip
