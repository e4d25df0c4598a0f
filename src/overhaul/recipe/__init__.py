"""Recipes: read, check, plan, run, resume, and leave a lineage behind."""
