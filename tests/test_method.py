"""The method contract: everything a recipe needs is derived from a plain function."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt
from torch import nn

import overhaul as oh
from overhaul.data.examples import Examples
from overhaul.errors import RequestError
from overhaul.method import Method, Outcome, find, method, methods


@method(verb="shrink", paper="0000.00000", changes="weights")
def example(
    model: nn.Module,
    forget: Examples,
    teacher: nn.Module | None = None,
    *,
    alpha: Annotated[float, Gt(0)] = 10.0,
    kind: Literal["batch", "sample"] = "batch",
    lam: Annotated[float, Ge(0)] | None = None,
) -> Outcome:
    """Do nothing, in one line.

    Args:
        model: it stays.
        forget: not read.
        teacher: not read
            either.
        alpha: a bound.
        kind, lam: two more.
    """
    return Outcome(model, facts={"alpha": alpha, "kind": kind})


def described() -> Method:
    return example.method  # pyright: ignore[reportFunctionMemberAccess]


def test_materials_and_knobs_come_from_the_signature() -> None:
    found = described()
    assert found.name == "shrink.example"
    assert [(m.name, m.kind, m.required) for m in found.materials] == [
        ("model", "model", True),
        ("forget", "examples", True),
        ("teacher", "model", False),
    ]
    assert [(k.name, k.type, k.default) for k in found.knobs] == [
        ("alpha", "float > 0", 10.0),
        ("kind", "'batch' | 'sample'", "batch"),
        ("lam", "float >= 0 | None", None),
    ]
    assert found.materials[2].doc == "not read either."
    assert found.knobs[2].doc == "two more."
    assert found.summary == "Do nothing, in one line."


def test_a_method_stays_an_ordinary_function_with_its_defaults() -> None:
    model = nn.Linear(1, 1)
    outcome = example(model, Examples([], []))
    assert outcome.model is model
    assert outcome.facts == {"alpha": 10.0, "kind": "batch"}
    assert example(model, forget=Examples([], []), alpha=2).facts["alpha"] == 2.0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"alhpa": 1.0}, r"no knob 'alhpa'. Did you mean 'alpha'\?"),
        ({"alpha": 0.0}, r"alpha=0.0 is not possible.*greater than 0.*float > 0"),
        ({"alpha": "much"}, r"alpha='much' is not possible"),
        ({"kind": "both"}, r"kind='both' is not possible.*'batch' \| 'sample'"),
    ],
)
def test_a_wrong_knob_is_refused_in_words(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        described().check(knobs)
    with pytest.raises(RequestError, match=message):
        example(nn.Linear(1, 1), Examples([], []), **knobs)  # pyright: ignore[reportArgumentType]


def test_an_undocumented_argument_is_refused_when_the_method_is_defined() -> None:
    with pytest.raises(TypeError, match="does not mention 'count'"):

        @method(verb="shrink", changes="weights")
        def undocumented(model: nn.Module, *, count: int = 1) -> Outcome:
            """Nothing is said.

            Args:
                model: it stays.
            """
            return Outcome(model)


def test_every_method_file_is_found_and_callable_by_its_verb() -> None:
    known = methods()
    assert {"forget.ssd", "forget.npo", "shrink.drop_layers", "shrink.heal"} <= set(known)
    assert callable(oh.forget.ssd) and oh.forget.ssd.method is known["forget.ssd"]  # pyright: ignore
    for found in known.values():
        assert found.summary and all(knob.doc for knob in found.knobs), found.name
        assert all(material.doc for material in found.materials), found.name
        needed = {knob.name for knob in found.knobs if knob.required}
        assert needed or found.check({})
        assert not any(isinstance(v, float) and math.isnan(v) for v in found.listing().values())


def test_a_misspelt_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"Did you mean 'forget.ssd'\?"):
        find("forget.sdd")
    assert find("ssd").name == "forget.ssd"


def test_a_name_on_two_shelves_needs_its_verb() -> None:
    with pytest.raises(RequestError, match=r"'dpo' may be forget.dpo or align.dpo; write the verb with it"):
        find("dpo")
