"""/docs: openapi.json as a page of its own, without scripts and without anybody's CDN."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import msgspec

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem }
code, pre { font: 14px/1.4 ui-monospace, monospace } pre { overflow-x: auto }
table { border-collapse: collapse } td, th { text-align: left; padding: .2rem 1rem .2rem 0;
vertical-align: top } summary { cursor: pointer }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd } a { color: #8bf } }
"""


def page(document: dict[str, Any]) -> str:
    """Return the document as HTML."""
    body = "".join([*_operations(document), *_schemas(document["components"]["schemas"])])
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Headrace</title>'
        f"<style>{_STYLE}</style><h1>Headrace</h1>"
        f'<p>What this server answers. Also as <a href="/openapi.json">openapi.json</a>.</p>{body}'
    )


def _operations(document: dict[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"<h2>{method.upper()} <code>{escape(path)}</code></h2>"
            yield f"<p>{escape(operation['summary'])}</p><ul>"
            if "requestBody" in operation:
                yield f"<li>takes {_links(operation['requestBody']['content'])}</li>"
            for status, answer in operation["responses"].items():
                text, links = escape(answer["description"]), _links(answer["content"])
                yield f"<li>{status}: {text} {links}</li>"
            yield "</ul>"


def _links(content: dict[str, Any]) -> str:
    return ", ".join(
        _link(media["schema"]) if "schema" in media else f"<code>{escape(kind)}</code>"
        for kind, media in content.items()
    )


def _link(schema: dict[str, Any]) -> str:
    name = escape(schema["$ref"].rpartition("/")[2])
    return f'<a href="#{name}">{name}</a>'


def _schemas(schemas: dict[str, Any]) -> Iterator[str]:
    yield "<h2>Types</h2>"
    for name, schema in schemas.items():
        yield f'<details id="{escape(name)}" open><summary><b>{escape(name)}</b></summary><table>'
        for field, kind in schema.get("properties", {}).items():
            told = msgspec.json.format(msgspec.json.encode(kind), indent=0).decode()
            yield f"<tr><td><code>{escape(field)}</code><td><code>{escape(told)}</code>"
        yield "</table></details>"
