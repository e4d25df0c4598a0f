"""Forget: remove what a model knows about someone or something, and keep the rest."""

from overhaul.method import shelve

__all__ = shelve(__name__)  # pyright: ignore[reportUnsupportedDunderAll]
