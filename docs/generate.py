"""Write the generated pages: docs/claims.md from the stored results, docs/methods/ from the methods themselves, and
docs/families.md from what the tests verify.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from overhaul.claims._claim import claims_page
from overhaul.method import Method, methods

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))

from families import FAMILIES, Family  # noqa: E402
from guarantees import GUARANTEES  # noqa: E402


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
        lines.append(f"| `{material.name}` | {material.kind} | {need} | {_cell(material.doc)} |")
    lines += ["", "## Knobs", "", "| knob | type | default | what it does |", "|---|---|---|---|"]
    for knob in method.knobs:
        default = "required" if knob.required else f"`{knob.default!r}`"
        lines.append(f"| `{knob.name}` | {_cell(knob.type)} | {default} | {_cell(knob.doc)} |")
    lines += ["", "## In a recipe", "", "```yaml", "steps:", f"  - {method.name}: {{{_example(method)}}}", "```", ""]
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
        marks = " | ".join("✓" if each.applies(family) else "–" for each in columns)
        fixed = ", ".join(map(str, family.pinned)) or "none"
        lines.append(f"| {name} | `{_class_of(family)}` | `{family.stack}` | {fixed} | {marks} |")
    lines += ["", "A fixed block stays in its place and runs once: something outside of it depends on where it is.", ""]
    lines += [f"- **{each.title}**: {inspect.cleandoc(each.check.__doc__ or '')}" for each in columns]
    return "\n".join([*lines, ""])


def _class_of(family: Family) -> str:
    return family.builder if isinstance(family.builder, str) else family.builder[0]


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _example(method: Method) -> str:
    return ", ".join(f"{knob.name}: {1 if knob.required else knob.default}" for knob in method.knobs[:2])


def pages() -> dict[Path, str]:
    """Every generated page by its place."""
    written = {HERE / "methods" / f"{name}.md": method_page(method) for name, method in methods().items()}
    return {**written, HERE / "claims.md": claims_page(), HERE / "families.md": families_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
