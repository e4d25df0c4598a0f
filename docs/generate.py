"""Write the generated pages: docs/claims.md from the stored results, docs/methods/ from the methods themselves."""

from __future__ import annotations

from pathlib import Path

from overhaul.claims._claim import claims_page
from overhaul.method import Method, methods

HERE = Path(__file__).parent


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


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _example(method: Method) -> str:
    return ", ".join(f"{knob.name}: {1 if knob.required else knob.default}" for knob in method.knobs[:2])


def pages() -> dict[Path, str]:
    """Every generated page by its place."""
    written = {HERE / "methods" / f"{name}.md": method_page(method) for name, method in methods().items()}
    return {**written, HERE / "claims.md": claims_page()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
