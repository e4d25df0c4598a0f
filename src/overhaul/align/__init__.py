"""Align: teach a model what is wanted, from demonstrations, preferences and verified answers."""

from overhaul.method import shelve

__all__ = shelve(__name__)  # pyright: ignore[reportUnsupportedDunderAll]
