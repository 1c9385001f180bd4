"""The page of the keys in a real browser: a key is made, used, limited and revoked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.browser.conftest import SCREENSHOTS, XSS
from tests.browser.driver import Browser
from tests.browser.test_console import COMPOSER, ENTER, SIZES, findings
from tests.service.serving import Service, served

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that has no key yet."""
    home = tmp_path_factory.mktemp("keys")
    with served("builtin:echo", environment={"HOME": str(home)}) as running:
        yield running


def create(page: Browser, name: str, **values: str) -> str:
    """Create a key with the form; return what is shown of it once."""
    page.press("Create a key")
    page.type("dialog input[name=name]", name)
    for field, value in values.items():
        page.type(f"dialog input[name={field}]", value)
    page.press("Create", within="dialog")
    page.find(".secret")
    key = page.wait("document.querySelector('.secret')?.innerText")
    page.press("Done", within="dialog")
    page.see(name)
    assert key not in page.text()
    return key


def test_a_key_at_its_limit_and_then_revoked(page: Browser, locked: Service) -> None:
    """Issue 16.1: 429 says when to try again; a revoked key asks for another, nothing is lost."""
    admin = {"authorization": "Bearer admin-key"}
    body = {"name": "a guest", "scope": "inference", "limits": {"requests_per_day": 1}}
    made = httpx.post(f"{locked.url}/admin/keys", json=body, headers=admin).json()
    page.open(f"{locked.url}/#/playground")
    page.type(".key-form input", made["key"] + ENTER)
    page.type(COMPOSER, "Once" + ENTER)
    page.see("total")
    page.type(COMPOSER, "Twice" + ENTER)
    page.see("The limit of this key is reached: 1 request per day. Try again in ")
    page.type(COMPOSER, "Half a mess")
    url = f"{locked.url}/admin/keys/{made['created']['id']}"
    httpx.delete(url, headers=admin).raise_for_status()
    page.press("Regenerate")
    page.see("This service needs a key")
    page.see("not known here")
    page.type(".key-form input", "user-key" + ENTER)
    page.wait(f"document.querySelector('{COMPOSER}')?.value === 'Half a mess'")
    page.press("Regenerate")
    page.wait("document.querySelectorAll('.figures').length === 2")
    page.press("Forget the key")
    page.see("This service needs a key")
    assert "Half a mess" not in page.js("return JSON.stringify(sessionStorage)")
    page.console()  # the refused requests


def status(service: Service, key: str) -> int:
    body: Any = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    headers = {"authorization": f"Bearer {key}"}
    url = f"{service.url}/v1/chat/completions"
    return httpx.post(url, json=body, headers=headers, timeout=60).status_code


def test_a_key_is_made_used_limited_and_revoked(page: Browser, keyless: Service) -> None:
    """Issue 16, must show 1: the first key is an admin's and is used by its tab; limits hold."""
    page.open(f"{keyless.url}/#/speed")
    page.see("headrace tune echo")
    assert findings(page) == []
    page.open(f"{keyless.url}/#/keys")
    page.see("There are no keys")
    admin = create(page, "me")
    assert status(keyless, "none") == 401
    assert status(keyless, admin) == 200
    key = create(page, f"laptop {XSS}", requests_per_day="2")
    page.see("0 of 2")
    assert [status(keyless, key) for _ in range(3)] == [200, 200, 429]
    page.press(f"Change laptop {XSS}")
    page.type("dialog input[name=tokens_per_day]", "5000")
    page.js("document.querySelector('dialog input[name=requests_per_day]').select()")
    page.type("dialog input[name=requests_per_day]", "3")
    page.press("Save", within="dialog")
    page.see("2 of 3")
    assert [status(keyless, key) for _ in range(2)] == [200, 429]
    for width, height in SIZES.items():
        page.size(width, height)
        for scheme in ("light", "dark"):
            page.scheme(scheme)
            page.open(f"{keyless.url}/#/keys")
            page.see("3 of 3")
            page.picture(SCREENSHOTS / f"keys-{scheme}-{width}.png")
            wide = page.js("return document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"it scrolls sideways at {width}"
            assert findings(page) == []
            page.press(f"Change laptop {XSS}")
            page.find("dialog[open]")
            page.picture(SCREENSHOTS / f"keys-form-{scheme}-{width}.png")
            assert findings(page) == []
            page.press("Close", within="dialog")
    page.press(f"Revoke laptop {XSS}")
    page.press("Revoke for good", within="dialog")
    page.wait("document.querySelectorAll('.key-list li').length === 1")
    assert status(keyless, key) == 401
    assert page.js("return window.hacked") is None
