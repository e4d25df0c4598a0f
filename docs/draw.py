"""Draw docs/architecture.svg from the code, the rooms of `overhaul` and what each imports, and list them in architecture.md.

1. A room is what lies directly in src/overhaul: a package, or a file. Its length in lines is rounded, so that the drawing
   does not change with every edit.
2. An arrow is an import, inside functions too, from a room to another; it is as thick as files of one import files of the
   other. The top package's own file only names others: no arrow leaves or enters it. Nor are imports of the ground drawn,
   on which all stand; they are counted instead.
3. An arrow down that a longer way down says as well (forget, fit, data beside forget, data) is only hinted at.
4. Layers are declared below, nothing else is. A room without a layer is an error, and an arrow that goes up is red and said.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
ROOT = HERE.parent / "src" / "overhaul"

LAYERS: Mapping[str, tuple[str, ...]] = {
    "door": ("__main__ cli __init__",),
    "runs": ("claims recipe starters mergekit",),
    "verbs": ("inspect forget shrink merge rewire adapt pretrain align",),
    "method": ("listing method signatures",),
    "judge": ("judge report",),
    "bench": (
        "blockwise prefix fit masked reconstruction importance influence adapters rollouts generation sae",
        "parties weights trace objectives references heads selectors groups parts intervals pairs value_vectors _batching",
    ),
    "data": ("data",),
    "models": (
        "_auto checkpoints models processor conversions stack forward modes outcome",
        "weight_files architectures adapter_folders quantised companions recomputed positions finite",
    ),
    "ground": ("errors session processes workers files quoting versions",),
}
"""The layers from the door to the ground, each of one row of rooms or several. A verb without methods has no room yet."""

LAYER_OF = {room: layer for layer, rows in LAYERS.items() for names in rows for room in names.split()}

MARKS = "<!-- rooms, by docs/draw.py -->", "<!-- end of rooms -->"
NAMES = {"__init__": "import overhaul", "__main__": "python -m"}

WIDTH, MARGIN, TOP = 1000, 92, 18
HIGH, APART, BETWEEN = 46, 56, 12
LINES_PER_PIXEL = 12.5
LETTER = 7.6


@dataclass(frozen=True)
class House:
    """What the code says.

    Attributes:
        lines: of every room.
        docs: what every room says of itself, in one sentence.
        imports: the files of a room that import from another, once for every file that they import.
    """

    lines: Mapping[str, int]
    docs: Mapping[str, str]
    imports: Mapping[tuple[str, str], Sequence[str]]

    @classmethod
    def of(cls, root: Path) -> House:
        """Read every file of the package."""
        files = {_module(path, root): path for path in sorted(root.rglob("*.py"))}
        lines: Counter[str] = Counter()
        docs: dict[str, str] = {}
        found: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
        for module, path in files.items():
            text = path.read_text(encoding="utf-8")
            lines[_room(module)] += len(text.splitlines())
            tree = ast.parse(text)
            if "." not in module:
                docs[_room(module)] = (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")
            for target in _imported(tree, files):
                pair = _room(module), _room(target)
                if module and target and pair[0] != pair[1]:
                    found.setdefault(pair, {}).setdefault((module, target), path.relative_to(root).as_posix())
        lost = sorted(lines.keys() - LAYER_OF.keys())
        if lost:
            raise SystemExit(f"{', '.join(lost)} has no layer: say in docs/draw.py where it stands.")
        rounded = {room: _rounded(count) for room, count in lines.items()}
        return cls(rounded, docs, {pair: sorted(places.values()) for pair, places in sorted(found.items())})

    def upward(self) -> dict[tuple[str, str], Sequence[str]]:
        """The arrows that go against the layers, and where they are written."""
        height = {name: n for n, name in enumerate(LAYERS)}
        return {
            (one, other): places
            for (one, other), places in self.imports.items()
            if height[LAYER_OF[other]] < height[LAYER_OF[one]]
        }

    def plain(self, rows: Mapping[str, int]) -> set[tuple[str, str]]:
        """The arrows that no longer way down says, and all that go sideways or up."""
        down: dict[str, set[str]] = {}
        for one, other in self.imports:
            if rows[one] < rows[other]:
                down.setdefault(one, set()).add(other)

        @cache
        def below(room: str) -> set[str]:
            return {room}.union(*(below(each) for each in down.get(room, ())))

        implied = {
            (one, other)
            for one, others in down.items()
            for other in others
            if any(other in below(each) for each in others - {other})
        }
        return self.imports.keys() - implied


def _module(path: Path, root: Path) -> str:
    """A file's name below `overhaul`, with dots; that of the package itself is empty."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _rounded(lines: int) -> int:
    step = 10 if lines < 100 else 50 if lines < 1000 else 100
    return max(step, round(lines / step) * step)


def _room(module: str) -> str:
    return module.partition(".")[0] or "__init__"


def _imported(tree: ast.AST, files: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a file imports from the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and _room(node.module) == "overhaul":
            package = node.module.partition(".")[2]
            for alias in node.names:
                inside = f"{package}.{alias.name}".strip(".")
                yield inside if inside in files else package
        elif isinstance(node, ast.Import):
            yield from (n.name.partition(".")[2] for n in node.names if _room(n.name) == "overhaul")


@dataclass(frozen=True)
class Box:
    """A room in the drawing."""

    room: str
    layer: str
    row: int
    x: float
    y: float
    width: float

    @property
    def middle(self) -> float:
        """Where it is, from left to right."""
        return self.x + self.width / 2


def placed(house: House) -> dict[str, Box]:
    """Rooms side by side in rows, each row in the middle."""
    boxes: dict[str, Box] = {}
    row = 0
    for layer, rows in LAYERS.items():
        for names in rows:
            rooms = [room for room in names.split() if room in house.lines]
            widths = [max(len(_name(room)) * LETTER + 22, house.lines[room] / LINES_PER_PIXEL + 16) for room in rooms]
            space = WIDTH - MARGIN - 10
            gap = min(44, (space - sum(widths)) / max(1, len(rooms) - 1))
            x = MARGIN + (space - sum(widths) - gap * (len(rooms) - 1)) / 2
            for room, width in zip(rooms, widths, strict=True):
                boxes[room] = Box(room, layer, row, x, TOP + row * (HIGH + APART), width)
                x += width + gap
            row += 1
    return boxes


def _name(room: str) -> str:
    return NAMES.get(room, room)


def arrows(house: House, boxes: Mapping[str, Box]) -> list[str]:
    """Every arrow as a curve that leaves below (above, if it goes up), the thin ones first."""
    pairs = [pair for pair in house.imports if LAYER_OF[pair[1]] != "ground"]
    upward, plain = house.upward(), house.plain({room: box.row for room, box in boxes.items()})
    leaving = _ports(pairs, boxes, 0)
    entering = _ports(pairs, boxes, 1)
    drawn = []
    for pair in sorted(pairs, key=lambda pair: (pair in upward, pair in plain, len(house.imports[pair]), pair)):
        one, other = (boxes[room] for room in pair)
        x, to = leaving[pair], entering[pair]
        thick = min(0.7 + 0.32 * len(house.imports[pair]) ** 0.75, 5.0)
        if one.row == other.row:
            y = one.y + HIGH
            curve = f"M{x:.1f},{y} C{x:.1f},{y + 30} {to:.1f},{y + 30} {to:.1f},{y + 3}"
        else:
            down = one.row < other.row
            start, end = (one.y + HIGH, other.y - 3) if down else (one.y, other.y + HIGH + 3)
            bend = 0.5 * (end - start)
            curve = f"M{x:.1f},{start} C{x:.1f},{start + bend:.1f} {to:.1f},{end - bend:.1f} {to:.1f},{end}"
        kind = "up" if pair in upward else f"of-{one.layer}{'' if pair in plain else ' implied'}"
        said = f"{pair[0]} imports {pair[1]}: {len(house.imports[pair])}"
        drawn.append(f'<path class="arrow {kind}" d="{curve}" stroke-width="{thick:.2f}"><title>{said}</title></path>')
        if pair in plain:
            turn = 1 if one.row < other.row else -1
            tip = other.y if turn > 0 else other.y + HIGH
            drawn.append(f'<path class="tip {kind}" d="M{to - 3.5:.1f},{tip - 7 * turn} h7 l-3.5,{6 * turn} z"/>')
    return drawn


def _ports(pairs: Sequence[tuple[str, str]], boxes: Mapping[str, Box], end: int) -> dict[tuple[str, str], float]:
    """Where arrows touch a room: spread over its edge in the order of their other ends."""
    ports: dict[tuple[str, str], float] = {}
    for room, box in boxes.items():
        mine = sorted((pair for pair in pairs if pair[end] == room), key=lambda pair: boxes[pair[1 - end]].middle)
        for n, pair in enumerate(mine):
            ports[pair] = box.x + 8 + (box.width - 16) * (n + 1) / (len(mine) + 1)
    return ports


STYLE = """
  text { font: 600 12.5px ui-sans-serif, system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
  .layer, .size, .note { font-weight: 400 } .size { font-size: 10px } .note { font-size: 12px }
  .floor { stroke-dasharray: 1 5; stroke-linecap: round } .room { stroke-width: 1.2 } .earth { stroke-width: 3 }
  .arrow { fill: none; opacity: .75 }
"""

SHADES = (
    """
  text { fill: #1d2430 } .layer, .size, .note { fill: #6a7484 } .page { fill: #fdfdfc } .floor { stroke: #dfe3e8 }
  .room { fill: #ffffff } .earth { stroke: #8a6d4b } .implied { opacity: .13 }
  .arrow.up { stroke: #d02b3c; opacity: 1 } .tip.up, .upward { fill: #d02b3c }
""",
    """
  text { fill: #e8ebf0 } .layer, .size, .note { fill: #98a2b3 } .page { fill: #14181f } .floor { stroke: #2b323d }
  .room { fill: #1c222b } .earth { stroke: #a98b66 } .implied { opacity: .17 }
  .arrow.up { stroke: #ff6b78 } .tip.up, .upward { fill: #ff6b78 }
""",
)
"""On a light and on a dark page."""

COLOURS: Mapping[str, tuple[str, str]] = {
    "door": ("#475569", "#94a3b8"),
    "runs": ("#4f46e5", "#8b93ff"),
    "verbs": ("#c2410c", "#fb923c"),
    "method": ("#a16207", "#facc15"),
    "judge": ("#a21caf", "#e879f9"),
    "bench": ("#0369a1", "#38bdf8"),
    "data": ("#15803d", "#4ade80"),
    "models": ("#0f766e", "#2dd4bf"),
    "ground": ("#8a6d4b", "#c9a77c"),
}
"""Of each layer, on light and on dark."""


def style() -> str:
    """The style sheet, for light and dark pages."""
    light, dark = (
        shade
        + "".join(
            f"  .of-{layer}.arrow, .in-{layer}.room {{ stroke: {colours[n]} }}"
            f" .of-{layer}.tip, .in-{layer}.bar {{ fill: {colours[n]} }}\n"
            for layer, colours in COLOURS.items()
        )
        for n, shade in enumerate(SHADES)
    )
    return f"{STYLE}{light}  @media (prefers-color-scheme: dark) {{{dark}  }}\n"


def svg(house: House) -> str:
    """The drawing."""
    boxes = placed(house)
    ground = max(box.y for box in boxes.values()) + HIGH
    said = notes(house)
    height = ground + 34 + 18 * len(said)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        "<title>The rooms of overhaul, what each imports, and how long it is</title>",
        f"<style>{style()}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>',
    ]
    for layer in dict.fromkeys(box.layer for box in boxes.values()):
        rows = sorted({box.y for box in boxes.values() if box.layer == layer})
        lines += [f'<path class="floor" d="M{MARGIN},{y + HIGH / 2} H{WIDTH - 10}"/>' for y in rows]
        lines.append(f'<text class="layer" x="16" y="{sum(rows) / len(rows) + HIGH / 2 + 4:.1f}">{layer}</text>')
    lines += arrows(house, boxes)
    lines += [part for box in boxes.values() for part in _drawn(box, house.lines[box.room])]
    lines.append(f'<path class="earth" d="M{MARGIN},{ground + 7} H{WIDTH - 10}"/>')
    for n, (kind, text) in enumerate(said):
        lines.append(f'<text class="{kind}" x="{MARGIN}" y="{ground + 30 + 18 * n}">{escape(text)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _drawn(box: Box, size: int) -> list[str]:
    """One room: its name, its lines, and a bar as long as they are many."""
    kind, bar = f"in-{box.layer}", size / LINES_PER_PIXEL
    return [
        f'<rect class="room {kind}" x="{box.x:.1f}" y="{box.y}" width="{box.width:.1f}" height="{HIGH}" rx="5"/>',
        f'<text x="{box.x + 9:.1f}" y="{box.y + 19}">{escape(_name(box.room))}</text>',
        f'<text class="size" x="{box.x + 9:.1f}" y="{box.y + 33}">{size:,}</text>',
        f'<rect class="bar {kind}" x="{box.x + 8:.1f}" y="{box.y + 38}" width="{bar:.1f}" height="3.5" rx="1"/>',
    ]


def notes(house: House) -> list[tuple[str, str]]:
    """What stands below the drawing: its scale, what is not drawn, and which arrows go up."""
    stands = [len(places) for (_, room), places in house.imports.items() if LAYER_OF[room] == "ground"]
    drawn = len(house.imports) - len(stands)
    found = [
        (
            "note",
            "A room's number and its bar are its length in lines. An arrow is an import, as thick as there are many.",
        ),
        (
            "note",
            f"Of {drawn} arrows those are faint that a longer way says too. {sum(stands)} to the ground are not drawn.",
        ),
    ]
    upward = [
        f"{one} imports {other} ({', '.join(sorted(set(places)))})" for (one, other), places in house.upward().items()
    ]
    if upward:
        found.append(("upward", f"{len(upward)} arrows go up, against the layers:"))
    return found + [("note", text) for text in upward]


def listed(house: House) -> str:
    """Every room in one line, layer by layer."""
    lines = ["| layer | room | what it is for |", "|---|---|---|"]
    for layer, rows in LAYERS.items():
        rooms = [room for names in rows for room in names.split() if room in house.lines]
        for n, room in enumerate(rooms):
            said = house.docs[room].removeprefix(f"{room.capitalize()}: ")
            where = f"`{room}`" if room not in NAMES else f"`{room}.py`"
            lines.append(f"| {'' if n else layer} | {where} | {said[:1].upper()}{said[1:]} |")
    return "\n".join(lines)


def page(text: str, house: House) -> str:
    """architecture.md with the list of rooms between its marks."""
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{listed(house)}\n\n{MARKS[1]}{after}"


def pages() -> dict[Path, str]:
    """What is drawn and listed, by its place."""
    house = House.of(ROOT)
    written = HERE / "architecture.md"
    return {HERE / "architecture.svg": svg(house), written: page(written.read_text(encoding="utf-8"), house)}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    for (one, other), places in House.of(ROOT).upward().items():
        print(f"upward: {one} imports {other} in {', '.join(sorted(set(places)))}")
