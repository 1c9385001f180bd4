"""A small client of chromedriver (W3C WebDriver over HTTP), and how the tests get a browser."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from tests.ports import free_port

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--force-color-profile=srgb", "--hide-scrollbars", "--lang=en"),
)
WAIT_S = 60.0
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def missing() -> str:
    """Return what of a browser is not on this machine, or nothing."""
    names = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return " and ".join(names)


class Browser:
    """A session of chromedriver, with one page."""

    def __init__(self, http: httpx.Client, session: str) -> None:
        self._http = http
        self._path = f"/session/{session}"

    def call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """Send a command, and return its value."""
        sent = None if method in ("GET", "DELETE") else (body or {})
        answer = self._http.request(method, self._path + path, json=sent).json()["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError(f"{path}: {answer['error']}: {answer['message']}")
        return answer

    def cdp(self, command: str, **parameters: Any) -> Any:
        """Send a command of Chromium's own protocol."""
        return self.call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url: str) -> None:
        """Load a page; one that differs in the fragment only is loaded too."""
        self.call("/url", {"url": "about:blank"})
        self.call("/url", {"url": url})

    def js(self, script: str, *arguments: Any) -> Any:
        """Run the body of a function in the page, and return its value, awaited."""
        body = f"return (async function () {{ {script} }}).apply(null, arguments)"
        return self.call("/execute/sync", {"script": body, "args": arguments})

    def wait(self, script: str, *arguments: Any, within_s: float = WAIT_S) -> Any:
        """Wait until an expression of the page is true, and return its value."""
        until = time.monotonic() + within_s
        while not (value := self.js(f"return {script}", *arguments)):
            if time.monotonic() > until:
                raise AssertionError(f"this did not become true: {script}\n{self.text()[:3000]}")
            time.sleep(0.03)
        return value

    def text(self) -> str:
        """Return what the page shows."""
        return self.js("return document.body.innerText")

    def see(self, text: str, within_s: float = WAIT_S) -> None:
        """Wait until the page shows a text."""
        script = f"document.body.innerText.includes({json.dumps(text)})"
        self.wait(script, within_s=within_s)

    def find(self, css: str) -> str:
        """Wait for an element that is shown, and return its id."""
        found = f"document.querySelector({json.dumps(css)})?.getClientRects().length > 0"
        self.wait(found)
        return self.call("/element", {"using": "css selector", "value": css})[_ELEMENT]

    def click(self, css: str) -> None:
        """Click on an element."""
        self.call(f"/element/{self.find(css)}/click")

    def press(self, name: str, within: str = "body") -> None:
        """Click on the button or link with this name."""
        script = """const title = (node) => node.getAttribute('aria-label') ?? node.innerText;
            const fits = (node) => title(node).trim() === name && !node.disabled
                && node.getClientRects().length > 0;
            document.querySelectorAll('[data-wanted]').forEach(
                (node) => node.removeAttribute('data-wanted'));
            const node = [...document.querySelector(within).querySelectorAll(
                'button, a, summary')].find(fits);
            node?.setAttribute('data-wanted', ''); return Boolean(node);"""
        self.wait(f"((name, within) => {{ {script} }})(...arguments)", name, within)
        self.click("[data-wanted]")

    def type(self, css: str, text: str) -> None:
        """Type into a field; `\\ue007` is Enter, `\\ue00c` Escape."""
        self.call(f"/element/{self.find(css)}/value", {"text": text})

    def tab(self) -> None:
        """Press the Tab key."""
        keys = [{"type": kind, "value": "\ue004"} for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def choose(self, css: str, value: str) -> None:
        """Choose an option of a select."""
        self.find(css)
        self.js(
            """const field = document.querySelector(arguments[0]); field.value = arguments[1];
            field.dispatchEvent(new Event('change', { bubbles: true }));""",
            css,
            value,
        )

    def size(self, width: int, height: int = 900) -> None:
        """Set the size of the window's content; below 500 it is a phone."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def scheme(self, name: str) -> None:
        """Make the system light or dark."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.cdp("Emulation.setEmulatedMedia", features=features)

    def offline(self, on: bool) -> None:
        """Cut the connection of the page, or restore it."""
        self.cdp("Network.enable")
        self.cdp(
            "Network.emulateNetworkConditions",
            offline=on,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )

    def picture(self, path: Path) -> None:
        """Keep a picture of the window."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("/screenshot", method="GET")))

    def console(self) -> list[str]:
        """Return the warnings and errors of the page since the last call."""
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Return the addresses that were requested since the last call."""
        messages = [json.loads(e["message"]) for e in self.call("/se/log", {"type": "performance"})]
        events = [entry["message"] for entry in messages]
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start chromedriver and Chromium with an empty profile, and end both."""
    port = free_port()
    # Chromium writes below HOME, whatever its profile is.
    environment = {**os.environ, "HOME": str(profile)}
    process = subprocess.Popen(
        ["chromedriver", f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=3 * WAIT_S, trust_env=False)
    try:
        _retried(lambda: http.get("/status").raise_for_status())
        arguments = [*FLAGS, f"--user-data-dir={profile / 'profile'}"]
        wanted = {
            "goog:chromeOptions": {"args": arguments},
            "timeouts": {"script": round(2000 * WAIT_S)},
            "goog:loggingPrefs": {"browser": "WARNING", "performance": "ALL"},
        }
        answer = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()
        session = Browser(http, answer["value"]["sessionId"])
        yield session
        session.call("", method="DELETE")
    finally:
        http.close()
        process.terminate()
        process.wait(10)


def _retried(work: Callable[[], object]) -> None:
    until = time.monotonic() + WAIT_S
    while True:
        try:
            work()
            return
        except httpx.TransportError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
