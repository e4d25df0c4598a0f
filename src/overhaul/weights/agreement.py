"""What two checkpoint folders say differently beside their weights."""

from __future__ import annotations

from collections.abc import Sequence

from overhaul.weights.index import Source, indexed


def differences(sources: Sequence[Source]) -> list[str]:
    """Sentences."""
    indexed(sources)
    return []
