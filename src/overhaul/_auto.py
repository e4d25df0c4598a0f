"""Let transformers' Auto classes open converted models once they are imported, without importing transformers for it.

import overhaul
AutoModelForCausalLM.from_pretrained(folder)       # a folder that `overhaul.save` wrote of a converted model
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGS, _MODELS = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register with what is imported already, and with the rest when it is."""
    waiting = {_CONFIGS, _MODELS}
    for name in sorted(waiting & sys.modules.keys()):
        waiting.remove(name)
        _register_in(sys.modules[name])
    if waiting:
        sys.meta_path.insert(0, _Watch(waiting))


def _register_in(module: ModuleType) -> None:
    from overhaul.conversions import auto

    if module.__name__ == _CONFIGS:
        auto.register_config(module)
    else:
        auto.register_models(module)


class _Watch(MetaPathFinder):
    """Finds nothing itself, but has these modules registered in right after they ran."""

    def __init__(self, waiting: set[str]) -> None:
        self.waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with a loader that registers after it."""
        if fullname not in self.waiting:
            return None
        self.waiting.remove(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AndRegister(spec.loader)
        return spec


class _AndRegister(Loader):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register_in(module)
