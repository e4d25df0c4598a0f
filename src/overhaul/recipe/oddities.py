"""What is odd about a request and no reason to refuse it: a plan, a run and its report say it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from overhaul.data.examples import Examples
from overhaul.data.forms import find_form
from overhaul.data.materials import Row, Source, encode, form_of
from overhaul.data.notes import LOOKED_AT, notes
from overhaul.errors import MaterialWarning
from overhaul.judge import judge as judging
from overhaul.method import Step
from overhaul.recipe.encoded import affordable, encoded
from overhaul.recipe.spec import Recipe

if TYPE_CHECKING:
    from overhaul.recipe.check import Checked


def unread(recipe: Recipe, steps: Sequence[Step], requests: Sequence[judging.Request]) -> list[str]:
    """The materials that nothing needs; of a comparison it is not known here."""
    if recipe.compare:
        return []
    read = {name for step in steps for name in step.materials}
    read |= {role for one in requests for role in one.roles.values()} | {one.compared_with for one in requests}
    read |= {name.partition("[")[0] for name in read if name}
    for name, value in reversed(recipe.materials.items()):  # those that another one includes stand above it
        parts = [part for part in value if isinstance(part, str)] if isinstance(value, list) else []
        if name in read or (parts and read & set(parts)):
            read |= {name, *parts}
    return [name for name in recipe.materials if name not in read]


def of_data(checked: Checked) -> list[str]:
    """What is odd about the data that is read; a material is looked at once.

    Raises:
        RequestError: one of its first rows cannot be encoded.
    """
    specs = [spec for parts in checked.rows.values() for spec, _ in parts]
    used = {column for spec in specs for column in (*spec.where, *spec.unless)}
    used |= {request.by for request in checked.requests if request.by is not None}
    said: dict[int, list[str]] = checked.loaded.setdefault("notes", {})
    parts = [(role, *part) for role in checked.used for part in checked.rows[role]]
    parts = [part for part in parts if find_form(form_of(*part[1:])).kind in ("tokens", "pairs")]
    for role, spec, rows in parts:
        if id(rows) not in said:
            with warnings.catch_warnings(record=True) as odd:
                warnings.simplefilter("always", MaterialWarning)
                found = notes(rows, spec, _looked_at(checked, role, spec, rows), used)
            heard = [str(one.message) for one in odd if issubclass(one.category, MaterialWarning)]
            said[id(rows)] = [*found, *(f"{spec.from_}: {one}" for one in heard)]
    return list(dict.fromkeys(note for _, _, rows in parts for note in said[id(rows)]))


def _looked_at(checked: Checked, role: str, spec: Source, rows: Sequence[Row]) -> Examples:
    """What becomes of a source's rows, or of the first of many; nothing of texts, which may be long."""
    if form_of(spec, rows) == "text":
        return Examples([], [])
    if affordable(rows):
        return encoded(role, [(spec, rows)], checked.examples)
    first = [*itertools.islice(rows, LOOKED_AT)]
    return encoded(role, [(spec, first)], lambda rows, spec: encode(rows, spec, checked.processor))
