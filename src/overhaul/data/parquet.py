"""Rows from Parquet files, and what the hub's say of their columns.

1. A fraction of 16 or 32 bits is the shortest one that is stored so: 0.1, not the nearest one of 64 bits.
2. Where the file names the classes that a column numbers, as the hub's do, the names stand in the rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from overhaul.data.values import FileRow
from overhaul.errors import RequestError

Row = dict[str, Any]


def parquet_rows(path: Path, content: bytes | Path, encoding: str) -> list[Row]:
    """The rows of a Parquet file, which may be in memory; the `encoding` of its text is its own.

    Raises:
        RequestError: it is damaged, or two columns have one name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    source: Any = io.BytesIO(content) if isinstance(content, bytes) else str(content)
    try:
        table = pq.ParquetFile(source, page_checksum_verification=True).read()
        found = table.to_pylist()
    except Exception as error:  # the library's own kinds, and Python's
        raise RequestError(f"{path} is no Parquet file that can be read: {_short(error)}.") from None
    names = table.column_names
    if len(set(names)) < len(names):
        raise RequestError(f"{path}: two columns have one name, of {', '.join(names)}.")
    name_classes(found, _class_names(table.schema))
    short = {pa.float16(): np.float16, pa.float32(): np.float32}
    for column in (each for each in table.schema if each.type in short):
        for row in found:  # the fraction that was written: 0.1, not the nearest one of 64 bits
            value = row[column.name]
            row[column.name] = None if value is None else float(str(short[column.type](value)))
    return [FileRow(f"{path}, row {number}", row) for number, row in enumerate(found, 1)]


def class_names(path: Path) -> dict[str, list[str]]:
    """The names of classes that a Parquet file of the hub gives to the numbers in its columns."""
    if path.suffix.lower() != ".parquet":
        return {}
    import pyarrow.parquet as pq

    return _class_names(pq.read_schema(path))


def _class_names(schema: Any) -> dict[str, list[str]]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {name: each["names"] for name, each in features.items() if each.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):  # of another maker, or of none
        return {}
    return {name: list(map(str, names)) for name, names in named.items() if isinstance(names, list)}


def name_classes(rows: Sequence[Row], named: Mapping[str, Sequence[str]]) -> None:
    """Put the names of classes in the place of their numbers, which only the data set knows; what is unknown stays."""
    for column, names in named.items():
        for row in rows:
            number = row.get(column)
            if isinstance(number, int) and 0 <= number < len(names):
                row[column] = names[number]
                if column == "label":
                    row["class"] = names[number]


def _short(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200].rstrip(".")
