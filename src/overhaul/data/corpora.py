"""Real data that is on every machine: Python's reference prose, its standard library's source, handwritten digits.

Held-out parts are chosen by hash, so they stay the same when other parts change. Prose repeats itself across topics:
paragraphs are taken once, wherever they stand first, and split by their own content. Code is split by file.
"""

from __future__ import annotations

import importlib
import sysconfig
from pathlib import Path
from typing import Any

from overhaul.data.tasks import Row, Split, in_held_out
from overhaul.errors import RunError

PASSAGE = 1500
"""Characters of consecutive paragraphs that are kept together and fall into one split."""

TABLES = set(
    """__pycache__ dist-packages distutils encodings ensurepip idle_test idlelib lib2to3 pydoc_data site-packages
    test tests turtledemo""".split()
)
"""Folders of the standard library that are data tables, demos, tests, or not the standard library."""


def docs(split: Split = "train") -> list[Row]:
    """Python's language reference (`pydoc_data.topics`) in passages of about 1500 characters, about 370 kB in all."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise RunError(
            "This Python has no `pydoc_data.topics`, which starter:docs reads. Debian and Ubuntu ship it in the package "
            "libpython3-stdlib; python.org builds and conda always have it."
        ) from error
    seen: set[str] = set()
    rows: list[Row] = []
    for topic in sorted(topics):
        passage: list[str] = []
        for paragraph in [*topics[topic].split("\n\n"), ""]:
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                passage.append(paragraph)
            if passage and (not key or sum(map(len, passage)) > PASSAGE):
                rows.append({"title": topic, "text": "\n\n".join(passage)})
                passage = []
    return [row for row in rows if in_held_out(row["text"]) == (split == "validation")]


def code(split: Split = "train") -> list[Row]:
    """The standard library's own modules, one row a file, without tests, demos and data tables, about 8 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rows: list[Row] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if TABLES.intersection(name.parts) or name.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        held_out = in_held_out(name.as_posix(), share=50)
        if held_out == (split == "validation"):
            rows.append({"title": name.as_posix(), "text": path.read_text(encoding="utf-8", errors="replace")})
    return rows


def digits(split: Split = "train", enlarge: int = 1) -> list[Row]:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey values scaled to [-1, 1]; every fifth is held out.

    Each pixel becomes a square of `enlarge` by `enlarge`: networks that halve their input several times need room.
    """
    import numpy
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    square = numpy.ones((enlarge, enlarge), dtype="float32")
    return [
        {"image": numpy.kron(data.images[i].astype("float32") / 8.0 - 1.0, square), "label": int(data.target[i])}
        for i in range(len(data.target))
        if (i % 5 == 0) == (split == "validation")
    ]
