"""Shrink: make a model smaller, and bring back what the cut cost."""

from overhaul.method import shelve

_functions = shelve(__name__)
globals().update(_functions)
__all__ = list(_functions)  # pyright: ignore[reportUnsupportedDunderAll]
