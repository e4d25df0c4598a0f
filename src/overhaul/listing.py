"""All methods as plain data, so that a list of them needs no import of what they stand on.

Kept beside the package's compiled files under the hash of its source, else in the user's cache; made anew for other source.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

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
