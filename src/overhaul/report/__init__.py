"""Before and after, side by side: one HTML file, one JSON file, one table for the terminal."""
