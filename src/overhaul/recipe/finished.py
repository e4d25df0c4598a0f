"""Whether a run is finished: recipe, code, libraries and every file that went in are as they were, by size and time.

OUT/finished.json    written last; a file that was touched since makes it void, and the run is walked through again, whose
                     steps are known by their contents
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overhaul.recipe.spec import Document
from overhaul.versions import package_version

if TYPE_CHECKING:
    from overhaul.recipe.check import Checked

FILE = "finished.json"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "diffusers")
SHOWN = ("report.json", "report.html", "recipe.yaml", "lineage.json")


def found(root: Path, document: Document) -> dict[str, Any] | None:
    """The report of the finished run of exactly this recipe in `root`; None if there is none, or something changed since."""
    path = root / FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        files = kept["files"]
        if kept["recipe"] != document.text or kept["base"] != str(document.base) or kept["code"] != _code():
            return None
        if [_stamp(Path(name)) for name, *_ in files] != files:
            return None
        return json.loads((root / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(root: Path, checked: Checked) -> None:
    """Write down what the finished run in `root` depended on; not where some of it is no file and no code of ours."""
    from overhaul.files import write_json

    if any(not step.method.module.startswith("overhaul.") for step in checked.steps):
        return
    files = [root / name for name in SHOWN] + list(_below(root / "model"))
    for known in [checked.model, *checked.references_read()]:
        files += _below(known.folder)
    for parts in checked.rows.values():
        for spec, _ in parts:
            if spec.from_.startswith("starter:"):
                continue
            place = checked.document.base / Path(spec.from_).expanduser()
            if not place.exists():
                return
            files += _below(place)
    stamps = [_stamp(path.resolve()) for path in dict.fromkeys(files)]
    text, base = checked.document.text, str(checked.document.base)
    write_json(root / FILE, {"recipe": text, "base": base, "code": _code(), "files": stamps})


def _below(place: Path) -> Iterable[Path]:
    return [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())


def _stamp(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _code() -> list[str]:
    return [package_version(), *map(_installed, LIBRARIES)]


def _installed(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
