"""One loaded model: in this process, or in one of its own."""
