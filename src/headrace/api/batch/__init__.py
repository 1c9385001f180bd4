"""Batches: /v1/files and /v1/batches, and the parts that `headrace batch` shares with them."""
