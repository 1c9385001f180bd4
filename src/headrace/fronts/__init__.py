"""Fronts of one service: processes that have its connections, before the one with its models."""
