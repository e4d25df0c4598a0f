"""Conversions by name, and the records of them that config.json holds."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, overload

from torch import nn

from overhaul.errors import RequestError, did_you_mean

Build = Callable[..., None]
"""(model, *, arguments) -> None: changes the model in place. The arguments are what JSON can hold."""
Record = dict[str, Any]


@dataclass(frozen=True)
class Conversion:
    """A way to build modules onto a model.

    Attributes:
        name: of its function.
        module: where it is defined.
        version: raised when the same arguments build something else.
        build: the function.
        inverse: takes it back, with the same arguments; None where there is no way back.
        late: applied after the weights are loaded.
        alone: whether a block can still be run by itself.
    """

    name: str
    module: str
    version: int
    build: Build
    inverse: Build | None
    late: bool
    alone: bool = True

    def record(self, **arguments: Any) -> Record:
        """What config.json holds of it.

        Raises:
            RequestError: an argument is none of its own, is missing, or cannot be written as JSON.
        """
        try:
            inspect.signature(self.build).bind(None, **arguments)
            kept = json.loads(json.dumps(arguments, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"The conversion {self.name} cannot be recorded with these arguments: {error}."
            ) from None
        return {"name": self.name, "module": self.module, "version": self.version, "arguments": kept}


_KNOWN: dict[str, Conversion] = {}


@overload
def conversion(build: Build, /) -> Build: ...
@overload
def conversion(
    *, version: int = 1, inverse: Build | None = None, late: bool = False, alone: bool = True
) -> Callable[[Build], Build]: ...
def conversion(
    build: Build | None = None,
    /,
    *,
    version: int = 1,
    inverse: Build | None = None,
    late: bool = False,
    alone: bool = True,
) -> Any:
    """Make a function that builds modules onto a model known by its name; see `Conversion` for the arguments.

    Raises:
        TypeError: it does not take the model first and keyword-only arguments after it, or another has its name.
    """

    def known(build: Build) -> Build:
        kinds = [parameter.kind for parameter in inspect.signature(build).parameters.values()]
        if not kinds or any(kind is not inspect.Parameter.KEYWORD_ONLY for kind in kinds[1:]):
            raise TypeError(f"the conversion {build.__name__} must take (model, *, arguments)")
        one = Conversion(build.__name__, build.__module__, version, build, inverse, late, alone)
        before = _KNOWN.get(one.name)
        if before is not None and before.module != one.module:
            raise TypeError(f"{before.module} has a conversion {one.name} already")
        _KNOWN[one.name] = one
        return build

    return known if build is None else known(build)


def records(model: nn.Module) -> list[Record]:
    """What was built onto a model, in order."""
    config: Any = getattr(model, "config", None)
    content = config.get("overhaul") if isinstance(config, Mapping) else getattr(config, "overhaul", None)
    return list(content["conversions"]) if isinstance(content, Mapping) else []


def bound_together(name: str) -> bool:
    """Whether a conversion of this name is known after which no block can be run by itself."""
    return name in _KNOWN and not _KNOWN[name].alone


def known_as(name: str) -> Conversion:
    """The conversion of this name.

    Raises:
        RequestError: none that was imported is called so.
    """
    if name not in _KNOWN:
        raise RequestError(
            f"There is no conversion {name!r}; import the module that defines it.{did_you_mean(name, _KNOWN)}"
        )
    return _KNOWN[name]


def recorded_by(record: Mapping[str, Any]) -> Conversion:
    """The conversion that a record names.

    Raises:
        RequestError: the record is damaged, or of a conversion that is not known or of another version.
    """
    try:
        name, module, version, _ = (record[key] for key in ("name", "module", "version", "arguments"))
    except (KeyError, TypeError):
        raise RequestError(f"config.json has a damaged record of a conversion: {record!r}.") from None
    if name not in _KNOWN and str(module).startswith("overhaul."):
        with suppress(ModuleNotFoundError):
            import_module(module)
    if name not in _KNOWN:
        raise RequestError(
            f"The model was converted by {name!r} of {module}, which is not known here. Import {module} first; if it "
            "should be part of Overhaul, another version made this folder."
        )
    if _KNOWN[name].version != version:
        raise RequestError(
            f"The model was converted by version {version} of {name!r}; this is version {_KNOWN[name].version}, which "
            "builds something else. Open it with the Overhaul that saved it."
        )
    return _KNOWN[name]
