"""Pretrain: go on with pretraining, or start it better."""

from overhaul.method import shelve

__all__ = shelve(__name__)  # pyright: ignore[reportUnsupportedDunderAll]
