"""Write the generated pages: docs/claims.md and docs/forgetting.md from stored results, docs/methods/ from the methods
themselves, docs/families.md from what the tests verify, and the reference in docs/recipes.md.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import yaml

from overhaul.claims._claim import claims_page
from overhaul.method import Method, methods
from overhaul.report.comparison import Comparison, read

HERE = Path(__file__).parent

FORGETTING = """
Every forget method from the same start, on three seeds: `make comparisons` runs it again. Each seed trains its own original,
and a retrained model that never saw what is to be forgotten. Values are means ± their standard deviation.

Read a row against *retrained*, not against zero: an answer far less likely than in a model that never met it is as telling
as one that is still known. The *null control* is noise on every weight, as large as what the first method changed. Methods
marked *from the start* cannot be used on a model that has learnt already: they train their own.

Every other method was first tried at three to eight settings on a fourth seed, which is not shown. Of those that forgot as
much as the retrained model (the first column, to 0.05), the one that kept most of the rest was taken; where none did, the
one that forgot most. So a row shows a method near its best, not at somebody's rate. `docs/compare.py` has all settings.
""".strip()
sys.path += [str(HERE), str(HERE.parent / "tests")]

from reference import recipes_page  # noqa: E402

from families import FAMILIES, Family  # noqa: E402
from guarantees import GUARANTEES, Guarantee, a_shorter_model_is_plain  # noqa: E402
from more_families import MORE  # noqa: E402


def method_page(method: Method) -> str:
    """One method's page: the same headings everywhere."""
    module, _, rest = method.doc.partition("\n\n")
    body, _, _ = rest.partition("\nArgs:")
    lines = [f"# {method.name}", "", module, ""]
    if method.paper:
        lines += [f"Paper: [arXiv:{method.paper}](https://arxiv.org/abs/{method.paper}).", ""]
    lines += [body.strip(), "", "## Reads", "", "| material | kind | | what it is |", "|---|---|---|---|"]
    for material in method.materials:
        need = "required" if material.required else "optional"
        kind = f"{material.kind.removesuffix('s')}s, several" if material.many else material.kind
        lines.append(f"| `{material.name}` | {kind} | {need} | {_cell(material.doc)} |")
    if returned := re.search(r"^Returns:\n(.*?)(?=^\S|\Z)", method.doc, re.M | re.S):
        lines += ["", "## Returns", "", textwrap.dedent(returned[1]).strip()]
    if method.makes:
        lines += ["", "## Makes", "", "Beside the model, for later steps:", ""]
        lines += [f"- `{name}` ({kind})" for name, kind in method.makes.items()]
    lines += ["", "## Knobs", "", "| knob | type | default | what it does |", "|---|---|---|---|"]
    for knob in method.knobs:
        default = "required" if knob.required else f"`{knob.default!r}`"
        lines.append(f"| `{knob.name}` | {_cell(knob.type)} | {default} | {_cell(knob.doc)} |")
    lines += ["", "## In a recipe", "", "```yaml", recipe(method), "```", ""]
    return "\n".join(lines)


def families_page() -> str:
    """Which guarantee is verified on which family."""
    columns = list(GUARANTEES.values())
    lines = [
        "# Families",
        "",
        "Stacks of blocks are found by structure, not by a table of names. Each ✓ is a test on a tiny random model of the",
        "family (`tests/stack/test_families.py`); – marks what has no meaning there. A family joins by one entry in",
        "`tests/families.py`; a model of your own by being a list of blocks.",
        "",
        f"| family | class | stack | fixed blocks | {' | '.join(each.title for each in columns)} |",
        "|---|---|---|---|" + ":-:|" * len(columns),
    ]
    for name, family in FAMILIES.items():
        marks = " | ".join(_mark(each.applies(family) and not _refused(each, family)) for each in columns)
        fixed = ", ".join(map(str, family.pinned)) or "none"
        lines.append(f"| {name} | `{_class_of(family)}` | `{family.stack}` | {fixed} | {marks} |")
    lines += ["", "A fixed block stays in its place and runs once: something outside of it depends on where it is.", ""]
    lines += [f"- **{each.title}**: {inspect.cleandoc(each.check.__doc__ or '')}" for each in columns]
    return "\n".join([*lines, "", *_more_families(), ""])


def _more_families() -> list[str]:
    """The families of which shortening alone is verified."""
    lines = [
        f"## {len(MORE)} more stacks",
        "",
        "Of these, too, each ✓ is a test on a tiny random model (`tests/more_families.py`): without the blocks named here",
        "the model says what it says when they are skipped; saved, its library alone opens it and it says the same; and",
        "where it generates, its numbers are the same with the cache and without. *main*: found by itself; else a recipe",
        "names it (`stack: PATH`). Of a model that sees or hears and says text, the main stack is its language model's.",
        "",
        "| family | class | stack | main | without | saved and opened | cache |",
        "|---|---|---|:-:|---|:-:|:-:|",
    ]
    for name, family in MORE.items():
        without = f"refused: {family.drop}" if isinstance(family.drop, str) else ", ".join(map(str, family.drop))
        shorter = not isinstance(family.drop, str)
        marks = f"{_mark(shorter)} | {_mark(shorter and family.decodes)}"
        lines.append(
            f"| {name} | `{_class_of(family)}` | `{family.stack}` | {_mark(family.alone)} | {without} | {marks} |"
        )
    return lines


def _refused(guarantee: Guarantee, family: Family) -> bool:
    return guarantee.check is a_shorter_model_is_plain and isinstance(family.drop, str)


def _mark(verified: bool) -> str:
    return "✓" if verified else "–"


def forgetting_page() -> str:
    """All forget methods side by side, from the comparisons that `make comparisons` stored."""
    lines = ["# Forgetting, side by side", "", FORGETTING, ""]
    for path in sorted((HERE / "comparisons").glob("*.json"), reverse=True):
        found = read(path)
        its, model = found.facts["machine"], found.facts["model"]
        lines += [
            f"## {found.title}",
            "",
            f"{model['class']}, {model['parameters']:,} parameters.",
            "",
        ]
        lines += [found.to_markdown(), f"Settings: {_settings(found)}.", ""]
        lines += [f"{found.facts['created'][:10]}, {its['cpu']}, torch {its['torch']}.", ""]
        lines += [(HERE / "comparisons" / f"{path.stem}.md").read_text(encoding="utf-8")]
    return "\n".join(lines)


def _settings(found: Comparison) -> str:
    """What was set for each method; all else is its default."""
    steps = [step for row in found.rows if (step := row.facts["step"])]
    said = {name: ", ".join(f"{k}: {v}" for k, v in knobs.items()) for step in steps for name, knobs in step.items()}
    return "; ".join(f"`{name}: {{{knobs}}}`" for name, knobs in said.items())


def _class_of(family: Family) -> str:
    return family.builder if isinstance(family.builder, str) else family.builder[0]


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


NEEDED: dict[str, dict[str, Any]] = {
    "adapt.head": {"by": "region"},
    "inspect.groups": {"by": "region"},
    "merge.lines": {"beta": 0.5},
    "merge.stack": {"slices": [{"model": 0, "blocks": "0-5"}, {"model": 0, "blocks": "2-7"}]},
}
"""Knobs that have no default but are needed, always or with some materials."""


def recipe(method: Method) -> str:
    """What a method must be given, and a step with its first two knobs that are set, as a recipe has it."""
    shown = {knob.name: 1 if knob.required else knob.default for knob in method.knobs}
    usual = [(name, value) for name, value in shown.items() if isinstance(value, str | int | float)][:2]
    chosen = NEEDED.get(method.name, dict(usual))
    knobs = yaml.safe_dump(chosen, default_flow_style=True, sort_keys=False, width=200).strip()
    needed = [one for one in method.materials if one.required]
    begins = bool(needed) and needed[0].is_model and not needed[0].many
    lines, others = (["model: FOLDER"], needed[1:]) if begins else ([], needed)
    lines += ["materials:"] if others else []
    for one in others:
        text = "{model: FOLDER}" if one.is_model else "{from: FILE}"
        lines.append(f"  {one.name}: {f'[{text}, {text}]' if one.many else text}")
    return "\n".join([*lines, "steps:", f"  - {method.name}: {knobs}"])


def pages() -> dict[Path, str]:
    """Every generated page by its place."""
    written = {HERE / "methods" / f"{name}.md": method_page(method) for name, method in methods().items()}
    pages = {"claims": claims_page(), "families": families_page(), "forgetting": forgetting_page()}
    pages["recipes"] = recipes_page()
    return written | {HERE / f"{name}.md": page for name, page in pages.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
