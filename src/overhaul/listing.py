"""All methods as plain data, so that a list of them needs no import of what they stand on.

Kept beside the package's compiled files under the hash of its source, else in the user's cache; made anew for other source.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from overhaul.errors import RequestError, did_you_mean
from overhaul.versions import ROOT, package_version

Entry = dict[str, Any]
"""What `Method.listing` gives, with the docstring (`doc`) and each knob's default as it is written in Python (`shown`)."""


def entries() -> list[Entry]:
    """Every method, by verb and name."""
    name = f"methods-{package_version()}.json"
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError):
            return json.loads((folder / name).read_text(encoding="utf-8"))
    made = json.loads(json.dumps(_described(), default=str))
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f".{name}.{os.getpid()}"
            partial.write_text(json.dumps(made), encoding="utf-8")
            for old in folder.glob("methods-*.json"):
                old.unlink(missing_ok=True)
            os.replace(partial, folder / name)
            break
    return made


def entry(name: str) -> Entry:
    """The method called `name` ("forget.ssd", or "ssd" where that is unambiguous).

    Raises:
        RequestError: there is none, or more than one.
    """
    known = entries()
    found = [one for one in known if one["name"] == name] or [
        one for one in known if one["name"].partition(".")[2] == name
    ]
    if len(found) == 1:
        return found[0]
    if found:
        listed = " or ".join(one["name"] for one in found)
        raise RequestError(f"{name!r} may be {listed}; write the verb with it.")
    names = [one["name"] for one in known]
    raise RequestError(f"There is no method {name!r}.{did_you_mean(name, [*names, *(n.split('.')[1] for n in names)])}")


def print_all(methods: Sequence[Entry], console: Console) -> None:
    """A line for each method."""
    table = Table("method", "changes", "paper", "what it does", box=None, pad_edge=False)
    for one in methods:
        table.add_row(one["name"], one["changes"], one["paper"] or "", one["summary"])
    console.print(table)


def print_one(one: Entry, console: Console) -> None:
    """A method in full: what it says of itself, what it reads, its knobs."""
    console.print(f"[bold]{one['name']}[/]  {one['paper'] or ''}\n", highlight=False)
    for indent, text in paragraphs(one["doc"]):
        part = Padding(text, (0, 0, 0, indent), expand=False) if text else ""
        console.print(part, markup=False, highlight=False)
    console.print()
    table = Table("reads", "kind", "", box=None, pad_edge=False)
    for material in one["materials"]:
        kind = f"several: {material['kind']}" if material["many"] else material["kind"]
        table.add_row(material["name"], kind, "required" if material["required"] else "optional")
    console.print(table)
    knobs = Table("knob", "type", "default", "what it does", box=None, pad_edge=False)
    for knob in one["knobs"]:
        default = "required" if knob["required"] else knob["shown"]
        knobs.add_row(knob["name"], escape(knob["type"]), escape(default), escape(knob["doc"]))
    console.print(knobs)


def paragraphs(doc: str) -> Iterator[tuple[int, str]]:
    """The parts of a docstring as they are to be wrapped: how far each is indented, and its text in one line.

    What is set off by four spaces after an empty line is a formula, and stays in its lines.
    """
    held: list[str] = []
    for line in [*doc.splitlines(), ""]:
        indent, text = len(line) - len(line.lstrip()), line.strip()
        begins, header = bool(re.match(r"(\d+\.|-|[\w, ]+:) ", text)), bool(re.fullmatch(r"\w+:", text))
        formula = indent >= 4 and not held and not begins
        deeper = bool(held) and indent > len(held[0]) - len(held[0].lstrip())
        if held and (not text or formula or header or (begins and not deeper)):
            yield len(held[0]) - len(held[0].lstrip()), " ".join(part.strip() for part in held)
            held = []
        if not text or formula or header:
            yield indent, text
        else:
            held.append(line)


def _folders() -> list[Path]:
    from platformdirs import user_cache_path

    return [ROOT / "__pycache__", user_cache_path("overhaul")]


def _described() -> list[Entry]:
    from overhaul.method import methods

    found = []
    for method in methods().values():
        listed = method.listing()
        shown = [{**knob, "shown": repr(knob["default"])} for knob in listed["knobs"]]
        found.append({**listed, "knobs": shown, "doc": method.doc})
    return found
