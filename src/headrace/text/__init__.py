"""Text without I/O: the bytes of tokens, stop strings and chat templates."""
