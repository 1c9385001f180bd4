"""The vocabulary: requests, events, models, figures, errors. Standard library and msgspec."""
