"""Inspect: measure what a network's layers do, and what was done to them; nothing is changed."""

from overhaul.method import shelve

__all__ = shelve(__name__)  # pyright: ignore[reportUnsupportedDunderAll]
