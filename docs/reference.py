"""The reference at the end of docs/recipes.md: every field, option, form, metric and verifier, from the code itself."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from overhaul.data.forms import FORMS
from overhaul.data.materials import Source
from overhaul.data.verifiers import VERIFIERS
from overhaul.judge.metrics import METRICS
from overhaul.recipe.spec import Recipe
from overhaul.signatures import argument_docs, type_text

PAGE = Path(__file__).parent / "recipes.md"
MARK = "<!-- from here on written by `make docs` -->"
NEEDS = {"nothing": "", "tokenizer": "the model's tokenizer", "image processor": "its image processor, for files"}


def recipes_page() -> str:
    """The page: what stands above the mark as it is, and all that a recipe may say below."""
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    parts = [
        ("Every field", _options(Recipe)),
        ("Every option of data", _options(Source)),
        ("Every form", _table(("`as:`", "it is", "columns", "needs"), map(_form, FORMS.values()))),
        ("Every metric", _table(("metric", "what it is", "unit", "better", "reads", "options"), _metrics())),
        *((f"Every option of `{one.name}`", _arguments(one)) for one in METRICS.values() if one.tasks),
        ("Every verifier", _table(("`verify:`", "it accepts", "columns"), map(_verifier, VERIFIERS.values()))),
    ]
    return "\n".join([f"{head}{mark or MARK}", *(f"\n## {title}\n\n{text}" for title, text in parts), ""])


def _options(model: type[BaseModel]) -> str:
    """What a mapping may hold, with its default."""
    docs, rows = argument_docs(model.__doc__ or "", "Attributes"), list[tuple[str, ...]]()
    hints = typing.get_type_hints(model, include_extras=True)
    for name, field in model.model_fields.items():
        said = field.alias or name
        needed = field.is_required()
        default = "required" if needed else f"`{field.get_default(call_default_factory=True)!r}`"
        assert field.default is not PydanticUndefined or needed or field.default_factory
        rows.append((f"`{said}`", type_text(hints[name]).replace("Any", "any"), default, docs[name]))
    return _table(("field", "type", "default", "what it says"), rows)


def _form(form: Any) -> tuple[str, ...]:
    columns = ", ".join(f"`{name}`" for name in form.columns)
    return f"`{form.name}`", _first(form.doc), columns, NEEDS.get(form.needs, f"its {form.needs}")


def _metrics() -> Iterable[tuple[str, ...]]:
    for name, one in METRICS.items():
        columns = [f"the column `{column}`" for column in one.columns]
        roles = [] if len(one.roles) < 2 else [f"roles {' and '.join(f'`{role}`' for role in one.roles)}"]
        options = ", ".join(f"`{key}: {default}`" for key, (_, default) in one.options.items())
        reads = "; ".join([", ".join(one.reads), *columns, *roles])
        said = [f"{one.label}: {one.help}", one.unit or "number", one.better, reads, options]
        if one.tasks:
            said[1:] = ["the task's", "the task's", "tasks of its own", "below"]
        yield f"`{name}`", *said


def _arguments(one: Any) -> str:
    """The options of a metric that has many, each with what it says."""
    docs = argument_docs(one.doc, "Args")
    rows = [(f"`{key}`", type_text(hint), f"`{default}`", docs[key]) for key, (hint, default) in one.options.items()]
    return _table(("option", "type", "default", "what it says"), rows)


def _verifier(one: Any) -> tuple[str, ...]:
    return f"`{one.name}`", _first(one.doc), ", ".join(f"`{name}`" for name in one.columns)


def _first(doc: str) -> str:
    """The first paragraph, in one line."""
    return " ".join(doc.partition("\n\n")[0].split())


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
