"""What makes text of what an engine says, and prompts of conversations; no I/O."""
