"""Models: where they come from, how they are stored, and their headers."""
