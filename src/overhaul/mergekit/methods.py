"""mergekit's merge methods: what each reads, with mergekit's defaults (0.1.5), and its formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from overhaul.merge._writing import LARGEST
from overhaul.mergekit import formulas
from overhaul.mergekit.formulas import Changes, Combine, Keeping, Part
from overhaul.weights import Whole

NUMBER = TypeAdapter[float](Annotated[float, Field(ge=-LARGEST, le=LARGEST)])
SHARE = TypeAdapter[float](Annotated[float, Field(ge=0, le=1)])
FLAG = TypeAdapter[bool](bool)
REQUIRED = object()


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method.

    Attributes:
        kind: a number, or yes and no.
        default: where the file does not say; REQUIRED if it has to.
        of: "all" for one that all models share, else one for each model, or for each but the base.
        refused: what is not supported: when, and what is said then.
    """

    kind: TypeAdapter[Any]
    default: Any = REQUIRED
    of: Literal["all", "each", "each but the base"] = "all"
    refused: tuple[Callable[[Any], bool], str] | None = None


@dataclass(frozen=True)
class Kind:
    """A method.

    Attributes:
        parameters: by name.
        combine: makes a piece of a tensor.
        base: whether it has one; where it is "ignored", `base_model` is a model like the others.
        least: how many models it needs, the base counted.
        most: how many it takes.
        sums: what has to be measured of a tensor before; None for nothing.
        changes: the rest of a formula of changes.
        whole: what a piece must not cut.
        idle: with which numbers a tensor stays the first model's, and what to write instead.
    """

    parameters: Mapping[str, Parameter]
    combine: Combine
    base: Literal["ignored", "required", "optional"] = "required"
    least: int = 1
    most: int | None = None
    sums: Combine | None = None
    changes: Changes | None = None
    whole: Whole = False
    idle: tuple[Callable[[Part], bool], str] | None = None

    def measured(self, part: Part) -> bool:
        """Whether `sums` are needed of a tensor."""
        return self.sums is not None and (
            self.changes is None or (len(part.inputs) > 1 and self.changes.measured(part))
        )


def _of_changes(keeping: Keeping, elect: bool, *, normalize: bool = False, rescale: bool = False) -> Kind:
    changes = Changes(keeping, elect)
    parameters = {
        "weight": Parameter(NUMBER, of="each but the base"),
        "density": Parameter(SHARE, 1.0, "each but the base"),
        "normalize": Parameter(FLAG, normalize),
        "rescale": Parameter(FLAG, rescale),
        "lambda": Parameter(NUMBER, 1.0),
        "int8_mask": Parameter(FLAG, False),
    }
    if keeping == "middling":
        parameters["gamma"] = Parameter(SHARE, 0.01, "each but the base")
    if keeping == "drawn by size":
        parameters["epsilon"] = Parameter(SHARE, 0.15, "each but the base")
    whole: Whole = "rows" if keeping == "drawn by size" else False
    idle = _no_change, "Give `lambda`, and the `weight` and `density` of a model, values that are not 0."
    return Kind(parameters, changes.combine, sums=changes.sums, changes=changes, whole=whole, idle=idle)


def _no_change(part: Part) -> bool:
    added = zip(part.own["weight"], part.own["density"], strict=True)
    return part.shared["lambda"] == 0 or all(weight == 0 or density == 0 for weight, density in added)


def _first_alone(part: Part) -> bool:
    first, *others = part.own["weight"]
    return not any(others) and (part.shared["normalize"] or first == 1)


def _only(value: bool) -> Callable[[Any], bool]:
    return lambda setting: setting is not value and str(setting).lower() != str(value).lower()


METHODS: Mapping[str, Kind] = {
    "linear": Kind(
        {"weight": Parameter(NUMBER, of="each"), "normalize": Parameter(FLAG, True)}, formulas.linear, "ignored",
        idle=(
            _first_alone,
            "Give a second model, with a weight that is not 0; to copy or cast one, write `merge_method: passthrough`.",
        ),
    ),
    "slerp": Kind(
        {"t": Parameter(NUMBER)}, formulas.slerp, "required", 2, 2, formulas.products,
        idle=(lambda part: part.shared["t"] == 0, "Give a `t` that is not 0."),
    ),
    "nuslerp": Kind(
        {
            "weight": Parameter(NUMBER, of="each but the base"),
            "nuslerp_flatten": Parameter(
                FLAG, True, refused=(_only(True), "angles of single rows are not supported: leave it out, or write true.")
            ),
            "nuslerp_row_wise": Parameter(
                FLAG, False, refused=(_only(False), "angles of single rows are not supported: leave it out.")
            ),
        },
        formulas.nuslerp, "optional", 2, 3, formulas.products,
        idle=(
            lambda part: not part.has_base and part.own["weight"][0] != 0 == part.own["weight"][1],
            "Give the second model a `weight` that is not 0.",
        ),
    ),
    "model_stock": Kind(
        {
            "filter_wise": Parameter(
                FLAG, False, refused=(_only(False), "angles of single rows are not supported: leave it out.")
            )
        },
        formulas.model_stock, "required", 3, None, formulas.pairs,
    ),
    "passthrough": Kind({"scale": Parameter(NUMBER, None, "each")}, formulas.passthrough, "ignored", most=1),
    "task_arithmetic": _of_changes("all", False),
    "ties": _of_changes("largest", True, normalize=True),
    "dare_linear": _of_changes("drawn", False, rescale=True),
    "dare_ties": _of_changes("drawn", True, rescale=True),
    "breadcrumbs": _of_changes("middling", False),
    "breadcrumbs_ties": _of_changes("middling", True),
    "della": _of_changes("drawn by size", True, normalize=True, rescale=True),
    "della_linear": _of_changes("drawn by size", False, rescale=True),
}  # fmt: skip
OF_MERGEKIT = frozenset({"multislerp", "karcher", "sce", "nearswap", "arcee_fusion", "ram", "ramplus_tl"})
"""Methods of mergekit that are not among these."""
