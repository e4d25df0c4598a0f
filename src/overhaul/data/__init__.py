"""Data by role: encoded examples, where they come from, and generated tasks whose answers can be verified."""
