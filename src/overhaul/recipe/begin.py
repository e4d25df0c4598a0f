"""`overhaul init`: a folder with a first recipe, commented, and the data that it reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from overhaul.errors import RequestError, writing
from overhaul.files import write_text

PEOPLE = 8
"""Of how many the first recipe's questions are: enough that forgetting one can cost the others something."""


def packaged(name: str) -> Path:
    """A recipe that comes with the package: in the installed package, or beside it in a checkout."""
    here = Path(__file__).parents[1]
    places = [here / "recipes" / f"{name}.yaml", here.parents[1] / "recipes" / f"{name}.yaml"]
    return next((place for place in places if place.exists()), places[0])


def begin(folder: Path) -> list[Path]:
    """Write `recipe.yaml` and `facts.jsonl` into a new or empty folder; their paths.

    Raises:
        RequestError: something lies there already, or the folder cannot be written.
    """
    with writing(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RequestError(f"{folder} is there already and not an empty folder. Name a new one.")
        folder.mkdir(parents=True, exist_ok=True)
        recipe, facts = folder / "recipe.yaml", folder / "facts.jsonl"
        write_text(facts, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _facts()))
        shutil.copyfile(packaged("start"), recipe)
    return [recipe, facts]


def _facts() -> list[dict[str, str]]:
    """Questions about some of the people whom the starter model knows."""
    from overhaul.data.tasks import people

    rows = people("train")
    chosen = list(dict.fromkeys(row["person"] for row in rows))[:PEOPLE]
    return [{key: row[key] for key in ("person", "question", "answer")} for row in rows if row["person"] in chosen]
