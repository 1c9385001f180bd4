"""The page of the API in a real browser: a form for each route, and its command for curl."""

from __future__ import annotations

import shlex

import httpx
import pytest
from tests.browser.driver import Browser
from tests.browser.test_console import ENTER
from tests.service.serving import Service

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def test_the_api_page_tries_a_route(page: Browser, service: Service) -> None:
    """Issue 16.2: an index, the fields of a route, and a form that sends it."""
    page.open(f"{service.url}/docs")
    page.type(".index input", "chat/completions")
    page.wait("document.querySelectorAll('.route').length === 1")
    page.press("Body", ".route")
    page.see("max_completion_tokens")
    page.press("Try it", ".route")
    page.press("Send", ".route")
    page.wait("document.querySelector('.result')?.innerText.includes('Name three rivers.')")
    assert "200" in page.js("return document.querySelector('.result p').innerText")
    spec = httpx.get(f"{service.url}/openapi.json").json()
    page.js("const f = document.querySelector('.index input'); f.value = ''; "
            "f.dispatchEvent(new Event('input', { bubbles: true }))")  # fmt: skip
    routes = sum(map(len, spec["paths"].values()))
    page.wait("document.querySelectorAll('.route').length === arguments[0]", routes)


CANNOT = (
    *("is not offered by Headrace", "generates text: use", "cannot fill in the middle"),
    *("There is no", "No file of requests", "No trace of", "with adapters", "has no adapter"),
)
"""What this service answers to examples: without an embedder, and to ids in capitals."""


def send(command: str, key: str) -> tuple[int, str]:
    """Send what a command for curl would send; of a stream, the status alone."""
    command = command.replace("\\\n", "").replace("$HEADRACE_API_KEY", key)
    words = iter(shlex.split(command)[1:])
    method, url, headers, content, form = "GET", "", dict[str, str](), None, dict[str, str]()
    for word in words:
        if word == "-X":
            method = next(words)
        elif word == "-H":
            name, _, value = next(words).partition(": ")
            headers[name] = value
        elif word == "-d":
            content = next(words)
        elif word == "-F":
            name, _, value = next(words).partition("=")
            form[name] = value
        else:
            url = word
    files = {"file": ("a.jsonl", b"{}")} if form.pop("file", None) else None
    with httpx.stream(
        method, url, headers=headers, content=content, data=form or None, files=files, timeout=60
    ) as reply:
        if reply.status_code < 400:
            return reply.status_code, ""
        return reply.status_code, reply.read().decode()


def test_the_curl_of_each_route_is_right(page: Browser, locked: Service) -> None:
    """Issue 16.2: as it is copied, with a key; it is refused only for what is not here."""
    page.open(f"{locked.url}/docs")
    page.type(".key-form input", "admin-key" + ENTER)
    page.find(".route")
    page.js(
        """window.copied = []; Object.defineProperty(navigator, 'clipboard', { value:
        { writeText: (text) => (window.copied.push(text), Promise.resolve()) } });
        document.querySelectorAll('.route > header button').forEach((button) => button.click());"""
    )
    copied = page.wait("window.copied.length === document.querySelectorAll('.route').length && "
                       "window.copied")  # fmt: skip
    failures: list[str] = []
    for command in copied:
        status, text = send(command, "admin-key")
        if status >= 400 and not any(reason in text for reason in CANNOT):
            failures.append(f"{command}\n{status} {text[:300]}")
    page.press("Forget the key")
    page.see("This service needs a key")
    page.console()
    assert len(copied) > 60
    assert failures == []
