"""Many models behind one Backend."""
