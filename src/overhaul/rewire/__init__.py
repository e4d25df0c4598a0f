"""Rewire: give a trained network another architecture, and train only what is new."""

from overhaul.method import shelve

__all__ = shelve(__name__)  # pyright: ignore[reportUnsupportedDunderAll]
