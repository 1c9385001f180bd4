"""The API of a worker of a DB-GPT cluster: the table of its routes."""

from __future__ import annotations

from headrace.api.dbgpt.cluster import Cluster
from headrace.api.dbgpt.generate import generate, generate_stream
from headrace.api.dbgpt.inputs import count_token, embeddings
from headrace.api.dbgpt.models import ModelRoutes
from headrace.api.exchange import Route

_PREFIX = "/api/worker"


def dbgpt_routes(cluster: Cluster) -> tuple[Route, ...]:
    """Return the routes of a worker of this cluster; they have no keys of their own."""
    models = ModelRoutes(cluster)
    table = (
        ("POST", "/generate_stream", generate_stream),
        ("POST", "/generate", generate),
        ("POST", "/count_token", count_token),
        ("POST", "/embeddings", embeddings),
        ("POST", "/model_metadata", models.metadata),
        ("GET", "/parameter/descriptions", models.descriptions),
        ("GET", "/models/supports", models.supports),
        ("POST", "/apply", models.apply),
        ("POST", "/models/startup", models.startup),
        ("POST", "/models/shutdown", models.shutdown),
    )
    return tuple(Route(method, _PREFIX + path, handler, None) for method, path, handler in table)
