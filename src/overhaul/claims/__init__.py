"""Experiments, one a paper, that show its claim or show that it does not hold here."""
