"""Shrink: make a model smaller, and bring back what the cut cost."""

from overhaul.method import shelve

__all__ = shelve(__name__)  # pyright: ignore[reportUnsupportedDunderAll]
