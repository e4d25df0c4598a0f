"""What only a verb knows of a recipe: the core asks its shelf, `overhaul.VERB._recipe`, and knows no verb itself.

    check(step, rows) -> warnings                      what its steps must be to their data; refuses by RequestError
    check_history(step, digests, history) -> warnings  what was done to the model before, by its lineage.json

A shelf has either, both or none.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from overhaul.method import Step


def ask(question: Literal["check", "check_history"], step: Step, *given: Any) -> list[str]:
    """The warnings of the step's own verb."""
    place = f"overhaul.{step.method.verb}._recipe"
    if importlib.util.find_spec(place) is None:
        return []
    answer = getattr(importlib.import_module(place), question, None)
    return answer(step, *given) if answer is not None else []
