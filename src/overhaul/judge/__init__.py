"""What a model can do, measured: quality by role, privacy, size and speed."""
