"""The console and /docs: who gets them, with which headers, and that they are what was built."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from console.build import RECORD, files, sources
from tests.api.fakes import FakeAdmin, client

from headrace.api.pages import FOLDER, assets
from headrace.config import hash_key

HTML = {"accept": "text/html,*/*;q=0.8"}
FIRST_LOAD = 200_000


async def test_a_browser_gets_the_console_and_ollamas_clients_their_text() -> None:
    """Issue 16.1: `GET /` is the console; what clients of Ollama look for stays."""
    async with client() as http:
        page = await http.get("/", headers=HTML)
        text = await http.get("/")
        head = await http.head("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert '<div id="app">' in page.text
    assert text.text == "Ollama is running"
    assert (head.status_code, head.text) == (200, "")
    assert "accept" in page.headers["vary"]


async def test_one_setting_switches_it_off() -> None:
    """Issue 16.1: `server.console = false` leaves no page and no file of one."""
    async with client(console=False) as http:
        assert (await http.get("/", headers=HTML)).text == "Ollama is running"
        for path in ("/docs", "/console/console.js", "/console/index.html"):
            answer = await http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
        assert (await http.get("/openapi.json")).status_code == 200


async def test_pages_need_no_key_and_data_does() -> None:
    """Issue 16.1: with keys the page asks for one; it holds nothing itself."""
    async with client(admin=FakeAdmin(), admin_keys=(hash_key("root"),)) as http:
        for path in ("/", "/docs", "/console/console.js"):
            assert (await http.get(path, headers=HTML)).status_code == 200
        for path in ("/openapi.json", "/admin/overview", "/v1/models"):
            assert (await http.get(path, headers=HTML)).status_code == 401


@pytest.mark.parametrize("path", ["/", "/docs", "/console/console.js", "/console/console.css"])
async def test_the_policy_allows_this_service_only(path: str) -> None:
    """Issue 16.1: no inline script or style, no eval, nothing from elsewhere, no frame."""
    async with client() as http:
        headers = (await http.get(path, headers=HTML)).headers
    policy = dict(
        part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


async def test_files_are_compressed_and_revalidated() -> None:
    """Issue 16.1: once loaded, a page costs a 304 for each file."""
    async with client() as http:
        packed = await http.get("/console/console.js", headers={"accept-encoding": "gzip"})
        plain = await http.get("/console/console.js", headers={"accept-encoding": "identity"})
        tag = {"if-none-match": packed.headers["etag"]}
        again = await http.get("/console/console.js", headers=tag)
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == plain.content == (FOLDER / "console.js").read_bytes()
    assert int(packed.headers["content-length"]) < len(plain.content) / 2
    assert "accept-encoding" in packed.headers["vary"]
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "name",
    ["build.json", "..%2f__init__.py", "../py.typed", "none.js", "%00", ".", "console.js%00"],
)
async def test_nothing_else_is_served(name: str) -> None:
    """Issue 16.1: names are looked up among the built files; no path is made of them."""
    async with client() as http:
        assert (await http.get(f"/console/{name}")).status_code == 404


def test_the_first_load_is_small() -> None:
    """Issue 16.1: under 200 kB compressed."""
    sizes = {name: len(asset.packed) for name, asset in assets().items()}
    assert set(sizes) == {"console.css", "console.js", "icon.svg", "index.html"}
    assert sum(sizes.values()) < FIRST_LOAD
    assert gzip.decompress(assets()["console.js"].packed) == assets()["console.js"].body


def test_the_files_are_those_of_the_sources() -> None:
    """Issue 16.1: scripts/console has built them; its --check builds again and compares."""
    built = json.loads((FOLDER / RECORD).read_text())
    assert built["files"] == files(FOLDER), "a built file was changed by hand"
    assert built["sources"] == sources(), "console/ has changed: run scripts/console"


def test_the_files_name_no_other_host() -> None:
    """Issue 16.1: it works offline; the names are of XML and in an error of the Markdown parser."""
    text = b"".join(asset.body for asset in assets().values()).decode()
    hosts = set(re.findall(r"https?://([a-z0-9.-]+)", text))
    assert hosts <= {"www.w3.org", "github.com"}
    assert "eval(" not in text
    assert "new Function" not in text
