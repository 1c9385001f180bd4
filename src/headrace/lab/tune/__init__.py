"""Measures which engine and options are the best for a model on this machine."""
