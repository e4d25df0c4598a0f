"""Sums."""

from __future__ import annotations

import re

from overhaul.data.verifiers import Row, verifier


@verifier("question")
def addition(row: Row, text: str) -> float:
    """The sum of all whole numbers in the row's `question`, and nothing else."""
    return float(text.strip() == str(sum(map(int, re.findall(r"\d+", str(row["question"]))))))
