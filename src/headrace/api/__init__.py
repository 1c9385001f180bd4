"""The HTTP surface: OpenAI's routes over any Backend."""
