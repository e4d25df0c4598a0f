"""Forget: remove what a model knows about someone or something, and keep the rest."""

from overhaul.method import shelve

_functions = shelve(__name__)
globals().update(_functions)
__all__ = list(_functions)  # pyright: ignore[reportUnsupportedDunderAll]
