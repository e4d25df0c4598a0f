"""What transformers' Auto classes know of converted models: one config class, and for each Auto class what opens them."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from transformers import PreTrainedConfig

from overhaul.conversions.classes import MODEL_TYPE, class_in, plain_class


class ConvertedConfig(PreTrainedConfig):
    """The config of any converted model, with the entries of its plain class's config."""

    model_type = MODEL_TYPE


class Opener:
    """Opens a converted model for one Auto class, if its plain class is one that this Auto class opens."""

    config_class = ConvertedConfig
    auto: Any

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, config: ConvertedConfig, **kwargs: Any) -> Any:
        """As the converted class's.

        Raises:
            ValueError: the model is of another kind.
        """
        kind, plain = cls._checked(config)
        return kind.from_pretrained(source, *args, config=plain, **kwargs)

    @classmethod
    def _from_config(cls, config: ConvertedConfig, **kwargs: Any) -> Any:
        kind, plain = cls._checked(config)
        return kind._from_config(plain, **kwargs)

    @classmethod
    def _checked(cls, config: ConvertedConfig) -> tuple[Any, Any]:
        kind = class_in(config.to_dict())
        if kind is None:
            raise ValueError("The config has no record of what was built onto its class.")
        plain = kind.plain_config(config)
        known = cls.auto._model_mapping
        opened = known.get(type(plain), ())
        if plain_class(kind) not in (opened if isinstance(opened, list | tuple) else (opened,)):
            raise ValueError(f"{cls.auto.__name__} does not open a converted {plain_class(kind).__name__}.")
        return kind, plain


def register_config(module: Any) -> None:
    """Let `AutoConfig`, in transformers' module of it, read the config of converted models."""
    module.CONFIG_MAPPING.register(MODEL_TYPE, ConvertedConfig, exist_ok=True)


def register_models(module: ModuleType) -> None:
    """Let every Auto class in transformers' module of them open the converted models of its kind."""
    for name, auto in vars(module).items():
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            opener = type("Converted", (Opener,), {"auto": auto})
            auto._model_mapping.register(ConvertedConfig, opener, exist_ok=True)
