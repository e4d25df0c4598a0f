"""Whether a run is finished: recipe, code, libraries and every file that went in are as they were, by size and time.

OUT/finished.json    written last; a file that was touched since, one that joined a folder and one that is gone make it void,
                     and the run is walked through again, whose steps are known by their contents

Paths are kept as the recipe leads to them: a link that leads elsewhere now makes it void too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overhaul.files import matching, pattern_of
from overhaul.recipe.spec import Document
from overhaul.versions import installed, libraries, package_version

if TYPE_CHECKING:
    from overhaul.recipe.check import Checked

FILE = "finished.json"
SHOWN = ("report.json", "report.html", "recipe.yaml", "lineage.json")


def found(root: Path, document: Document) -> dict[str, Any] | None:
    """The report of the finished run of exactly this recipe in `root`; None if there is none, or something changed since."""
    path = root / FILE
    try:
        if not path.is_file():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        places = [Path(place) for place in kept["places"]]
        if kept["recipe"] != document.text or kept["base"] != str(document.base) or kept["code"] != _code(document):
            return None
        if _stamps(places, root) != kept["files"]:
            return None
        return json.loads((root / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(root: Path, checked: Checked) -> None:
    """Write down what the finished run in `root` depended on; not where some of it is no file and no code of ours."""
    from overhaul.data.chats import is_template
    from overhaul.files import write_json
    from overhaul.judge import harness

    if any(not step.method.module.startswith("overhaul.") for step in checked.steps):
        return
    places = [root / name for name in (*SHOWN, "model")]
    for known in [checked.model, *checked.references_read()]:
        while known is not None:
            places.append(known.folder)
            known = known.base
    places += [Path(one["tensors"]) for one in checked.references.values() if "tensors" in one]
    for parts in checked.rows.values():
        for spec, _ in parts:
            if spec.from_.startswith("starter:"):
                continue
            place = checked.document.base / Path(spec.from_).expanduser()
            if not place.exists():
                place = Path(pattern_of(spec.from_, checked.document.base))
                if not matching(str(place)):  # a data set of the hub
                    return
            places.append(place)
    for value in checked.recipe.materials.values():
        for part in value if isinstance(value, list) else [value]:
            template = part.get("chat_template") if isinstance(part, dict) else None
            if template is not None and not is_template(template):
                places.append(checked.document.base / template)
    for request in checked.requests:
        places += harness.places(request.task, request.options) if request.task else []
    places = [place.absolute() for place in dict.fromkeys(places)]
    text, base = checked.document.text, str(checked.document.base)
    kept = {"recipe": text, "base": base, "code": _code(checked.document), "places": list(map(str, places))}
    write_json(root / FILE, kept | {"files": _stamps(places, root)})


def _stamps(places: Iterable[Path], root: Path) -> list[list[Any]]:
    """All files at these places and below them; of the run's own folder, where it lies inside of one, only what is named."""
    root = root.absolute()
    files = [path for place in places for path in _below(place) if path == place or _counts(path, place, root)]
    return [_stamp(path) for path in dict.fromkeys(files)]


def _counts(path: Path, place: Path, root: Path) -> bool:
    return place.is_relative_to(root) or not Path(os.path.normpath(path)).is_relative_to(root)


def _below(place: Path) -> Iterable[Path]:
    """The file at a place, those in a folder, or those that a pattern names."""
    if place.is_dir():
        return sorted(path for path in place.rglob("*") if path.is_file())
    return [place] if place.is_file() else matching(str(place))


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns, status.st_ino]


def _code(document: Document) -> list[str]:
    used = libraries() | (
        {"lm_eval": installed("lm_eval")} if any(map(_of_tasks, document.recipe.judge.values())) else {}
    )
    return [package_version(), *(f"{name} {number}" for name, number in used.items())]


def _of_tasks(metrics: Any) -> bool:
    return isinstance(metrics, dict) and "lm_eval" in metrics
