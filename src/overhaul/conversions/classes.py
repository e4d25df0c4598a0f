"""The classes of converted models: each is derived from a plain class, builds as that one does and replays the records."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from overhaul.checkpoints import CONVERTED
from overhaul.conversions.records import Record, recorded_by, records
from overhaul.errors import RequestError

MODEL_TYPE = "overhaul_converted"
_PREFIX = "Converted"


def mark(model: Any, kept: Sequence[Record]) -> None:
    """Let a model be what its records say: of a derived class, or of its plain class where there are none."""
    if isinstance(getattr(model.config, "overhaul", None), str):
        raise RequestError(
            f"A {type(model).__name__} cannot be converted or saved along a path; do so with what is inside."
        )
    plain = plain_class(type(model))
    content: dict[str, Any] | None = {"class": plain.__name__, "conversions": list(kept)} if kept else None
    if isinstance(model.config, Mapping):  # diffusers
        model._internal_dict = _without_record(model.config)
        if content:
            model.register_to_config(overhaul=content)
    elif content:
        model.config.overhaul = content | {"model_type": model.config.model_type}
    else:
        vars(model.config).pop("overhaul", None)
    model.__class__ = converted_class(plain) if kept else plain


def _without_record(config: Any) -> Any:
    return type(config)({name: value for name, value in config.items() if name != "overhaul"})


@contextmanager
def marked_with(model: nn.Module, more: Sequence[Record]) -> Iterator[None]:
    """Inside the `with`, the model has these records too: what is in force and not built, for the time of saving."""
    before = records(model)
    if more:
        mark(model, [*before, *more])
    try:
        yield
    finally:
        if more:
            mark(model, before)


def plain_class(kind: type) -> Any:
    """The class that a converted model's class is derived from; another class as it is."""
    return vars(kind).get("plain", kind)


@functools.cache
def converted_class(plain: type) -> Any:
    """The class of converted models of a class, which builds as that one does and replays the records."""
    base = _OfTransformers if hasattr(plain, "config_class") else _OfDiffusers
    # the library looks for the source of a class in its module
    return type(f"{_PREFIX}{plain.__name__}", (base, plain), {"plain": plain, "__module__": plain.__module__})


def class_in(config: Mapping[str, Any]) -> Any:
    """The class of the converted model that a config describes, or None where it describes no converted model.

    Raises:
        RequestError: the config names a class that is not installed.
    """
    content = config.get("overhaul")
    if not isinstance(content, Mapping) or "conversions" not in content:
        return None
    library = "diffusers" if "_class_name" in config else "transformers"
    plain = getattr(import_module(library), str(content.get("class")), None)
    base = getattr(import_module(library), "ModelMixin" if library == "diffusers" else "PreTrainedModel")
    if not (isinstance(plain, type) and issubclass(plain, base)):
        raise RequestError(f"The {library} that is installed has no class {content.get('class')!r} to convert.")
    return converted_class(plain)


class _OfTransformers:
    """How a converted class of transformers builds, loads and saves."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        found: Any = super()
        found.__init__(config, *args, **kwargs)
        _replay(self)

    @classmethod
    def plain_config(cls, source: Any) -> Any:
        """The plain class's config in a folder, of a hub name, or of a `ConvertedConfig`; records and all."""
        from transformers import PreTrainedConfig

        if isinstance(source, PreTrainedConfig):
            if source.model_type != MODEL_TYPE:
                return source
            content, attention = source.to_dict(), source._attn_implementation
        else:
            content, attention = PreTrainedConfig.get_config_dict(source)[0], None
        kind: Any = cls
        content = {**content, "model_type": content["overhaul"]["model_type"]}
        return kind.config_class.from_dict(content, **{"attn_implementation": attention} if attention else {})

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As the plain class's, with everything that was built onto it."""
        kwargs.setdefault("variant", _variant(source))
        found: Any = super()  # pyright: ignore[reportUnknownVariableType]
        loaded = found.from_pretrained(source, *args, config=cls.plain_config(config or source), **kwargs)
        apply_late(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As the plain class's, under names that only a converted class reads."""
        found: Any = super()
        found.save_pretrained(save_directory, **{"variant": CONVERTED, **kwargs})
        path = Path(save_directory) / "config.json"
        content = json.loads(path.read_text(encoding="utf-8")) | {"model_type": MODEL_TYPE}
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _OfDiffusers:
    """How a converted class of diffusers builds, loads and saves."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As the plain class's, with the records replayed."""
        found: Any = super()
        known = {name: value for name, value in config.items() if name != "overhaul"}
        model, unused = found.from_config(known, return_unused_kwargs=True, **kwargs)
        mark(model, config["overhaul"]["conversions"])
        _replay(model)
        return (model, unused) if return_unused_kwargs else model

    @classmethod
    def from_pretrained(cls, source: Any, **kwargs: Any) -> Any:
        """As the plain class's, with everything that was built onto it."""
        kwargs.setdefault("variant", _variant(source))
        found: Any = super()
        loaded = found.from_pretrained(source, **kwargs)
        apply_late(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As the plain class's, under names that only a converted class reads."""
        found: Any = super()
        found.save_pretrained(save_directory, **{"variant": CONVERTED, **kwargs})


def _variant(source: Any) -> str | None:
    """The variant of the weight files: of a folder that other tools wrote, the plain one."""
    folder = Path(source)
    return CONVERTED if not folder.is_dir() or any(folder.glob(f"*.{CONVERTED}*")) else None


def _replay(model: Any) -> None:
    """Build what the records say, without memory where the model was built without."""
    for record in records(model):
        if not (one := recorded_by(record)).late:
            one.build(model, **record["arguments"])


def apply_late(model: Any) -> None:
    """Put in force what is not built: it is then what is in force, and no record."""
    kept = records(model)
    early = [record for record in kept if not recorded_by(record).late]
    if len(early) == len(kept):
        return
    mark(model, early)
    for record in kept:
        if (one := recorded_by(record)).late:
            one.build(model, **record["arguments"])
