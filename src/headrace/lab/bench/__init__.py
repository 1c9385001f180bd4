"""Measures a service with OpenAI's API as a client."""
