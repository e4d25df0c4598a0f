"""Adapt: let a model learn something new at little cost, and keep what it can do."""

from overhaul.method import shelve

__all__ = shelve(__name__)  # pyright: ignore[reportUnsupportedDunderAll]
