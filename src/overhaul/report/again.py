"""`overhaul report`: what a finished run or comparison found, from its numbers alone: its table again, its page anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from overhaul.errors import OverhaulError, RequestError
from overhaul.files import read_json, write_text
from overhaul.report.comparison import Comparison
from overhaul.report.html import write_html
from overhaul.report.terminal import print_table

HOLDS = {
    "report.json": ("title", "stages", "measures", "steps", "samples", "warnings"),
    "comparison.json": ("title", "measures", "rows"),
}


def again(folder: Path, console: Console) -> Path:
    """Print the table, then write the page, which a folder that cannot be written does not get; the page's place.

    Raises:
        RequestError: the folder holds neither, or its numbers are damaged or somebody else's.
        RunError: the page cannot be written.
    """
    source = next((folder / name for name in HOLDS if (folder / name).exists()), None)
    if source is None:
        raise RequestError(f"{folder} holds no {' and no '.join(HOLDS)}: it is not the folder of a finished run.")
    content = read_json(source, holds=HOLDS[source.name])
    page = source.with_suffix(".html")
    try:
        if content is not None:
            _show(content, page, console)
            return page
    except OverhaulError:
        raise
    except Exception as error:  # whatever values of a wrong kind lead to, in a table or in a template
        said = f" ({type(error).__name__}: {error})"
    else:
        said = ""
    raise RequestError(
        f"{source} is damaged, or not of this version of Overhaul{said}. The command that made the run writes it again, and "
        "does nothing else."
    )


def _show(content: dict[str, Any], page: Path, console: Console) -> None:
    if page.stem == "report":
        print_table(content, console)
        write_html(content, page)
    else:
        comparison = Comparison.from_json(content)
        comparison.print(console)
        write_text(page, comparison.to_html())
