"""What a folder made of others says of its making: lineage.json for machines, README.md for people.

Nothing is hashed: that would read every file once more. Sources are named with their sizes, and with what they say of their
own making.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from overhaul import __version__
from overhaul.checkpoints import LINEAGE, MADE_OF
from overhaul.quoting import block, code, escaped
from overhaul.weights.agreement import differences
from overhaul.weights.index import Source, facts_of

KEPT = ("license", "license_name", "license_link", "language")
"""What the first model's card says at its head that holds for what is made of it too."""


def describe(folder: Path, sources: Sequence[Source], name: str, knobs: Mapping[str, Any]) -> None:
    """Write both files.

    Args:
        folder: the new one.
        sources: what it was made of; config and tokenizer are the first one's.
        name: the function or method that made it.
        knobs: what it was given beside the sources.
    """
    known = [facts_of(source) for source in sources]
    told = {key: _plain(value) for key, value in knobs.items() if value is not None}
    lineage = {
        "overhaul": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": known[0].source,
        "materials_sha256": {},
        MADE_OF: [{"source": one.source, "bytes": one.bytes, "lineage": _read(one.folder)} for one in known],
        "steps": [{"name": name, "knobs": told, "reads": {}}],
    }
    (folder / LINEAGE).write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")
    front: dict[str, Any] = {"library_name": known[0].library, "tags": ["overhaul", "merge"]}
    front["base_model"] = [one.source for one in known]
    front |= {key: value for key, value in _front(known[0].folder).items() if key in KEPT}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# Made by {code(name)}", ""]
    lines += [f"Made from {len(known)} checkpoints of {known[0].architecture} by Overhaul {__version__}:", ""]
    lines += [f"{n}. {code(one.source)}" for n, one in enumerate(known, 1)]
    lines += [
        "",
        "Config and tokenizer are the first one's, where nothing else is said. It loads with `from_pretrained`; nothing "
        "else is needed.",
        "",
    ]
    long = {key: value for key, value in told.items() if "\n" in str(value)}
    lines += [f"- {code(key)}: {code(value)}" for key, value in told.items() if key not in long]
    for key, value in long.items():
        lines += ["", f"{code(key)}:", "", block(value)]
    if said := differences(known):
        lines += ["", "What the configs say differently:", "", *(f"- {escaped(one)}" for one in said)]
    (folder / "README.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _plain(value: Any) -> Any:
    """A number, text or list as JSON holds it; a function by its name."""
    if isinstance(value, Callable):
        return f"a function of the tensor ({getattr(value, '__qualname__', type(value).__qualname__)})"
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return value if isinstance(value, int | float | str | bool) else str(value)


def _read(folder: Path) -> Any:
    """A folder's own lineage; None where it has none that can be read."""
    try:
        return json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _front(folder: Path) -> Mapping[str, Any]:
    """The head of a folder's model card."""
    try:
        parts = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}
