"""Overhaul: change a trained network, layer by layer, without training it again, and prove what the change did."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from overhaul import _auto

__version__ = "0.1.0"

if TYPE_CHECKING:
    from overhaul import adapt as adapt
    from overhaul import align as align
    from overhaul import forget as forget
    from overhaul import groups as groups
    from overhaul import inspect as inspect
    from overhaul import merge as merge
    from overhaul import models as _models
    from overhaul import rewire as rewire
    from overhaul import shrink as shrink
    from overhaul import trace as trace
    from overhaul import weights as weights
    from overhaul.data.examples import Examples as Examples
    from overhaul.data.materials import examples as examples
    from overhaul.errors import OverhaulError as OverhaulError
    from overhaul.forget._null import retain_only as retain_only
    from overhaul.judge.robustness import Attacks as Attacks
    from overhaul.judge.unlearning import unlearning_table as unlearning_table
    from overhaul.mergekit.run import merge_config as merge_config
    from overhaul.mergekit.run import plan_config as plan_config
    from overhaul.models import Checkpoint as Checkpoint
    from overhaul.models import save as save
    from overhaul.outcome import Outcome as Outcome
    from overhaul.outcome import Table as Table
    from overhaul.recipe import plan as _plan
    from overhaul.recipe.compare import compare as compare
    from overhaul.recipe.run import run as run
    from overhaul.stack import LayerStack as LayerStack

    open = _models.open_model
    plan = _plan.planned

_PUBLIC = {
    "Attacks": "overhaul.judge.robustness:Attacks",
    "Checkpoint": "overhaul.models:Checkpoint",
    "Examples": "overhaul.data.examples:Examples",
    "LayerStack": "overhaul.stack:LayerStack",
    "Outcome": "overhaul.outcome:Outcome",
    "OverhaulError": "overhaul.errors:OverhaulError",
    "Table": "overhaul.outcome:Table",
    "compare": "overhaul.recipe.compare:compare",
    "groups": "overhaul.groups:",
    "examples": "overhaul.data.materials:examples",
    "merge_config": "overhaul.mergekit.run:merge_config",
    "open": "overhaul.models:open_model",
    "plan": "overhaul.recipe.plan:planned",
    "plan_config": "overhaul.mergekit.run:plan_config",
    "retain_only": "overhaul.forget._null:retain_only",
    "run": "overhaul.recipe.run:run",
    "save": "overhaul.models:save",
    "trace": "overhaul.trace:",
    "unlearning_table": "overhaul.judge.unlearning:unlearning_table",
    "weights": "overhaul.weights:",
}
"""Public names and where they live: imported when first used, so that `overhaul --help` answers at once."""

_VERBS = ("inspect", "forget", "shrink", "merge", "rewire", "adapt", "pretrain", "align")

__all__ = [*_PUBLIC, *_VERBS, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _VERBS and importlib.util.find_spec(f"overhaul.{name}"):
        return importlib.import_module(f"overhaul.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'overhaul' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = importlib.import_module(module)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(name for name in __all__ if name not in _VERBS or importlib.util.find_spec(f"overhaul.{name}"))


_auto.register()
