"""Measures a service that speaks the protocol of OpenAI, as its clients see it."""
