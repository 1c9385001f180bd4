"""A browser and two services for all tests of the console: one without keys, one with."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.browser.driver import Browser, browser, missing
from tests.conftest import ROOT
from tests.service.serving import Service, served

SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", ROOT / ".cache" / "screenshots"))
XSS = '<img src=x onerror="window.hacked=1">'
ANSWER = f"""## A river

The *Danube* is a river; see <https://example.org> or [this](https://example.org/a_b).

| country | km |
|---|---:|
| Romania | 1075 |

```python
length = {{"Danube": 2850}}  # kilometres
```

<script>window.hacked = 1</script> {XSS} [bad](javascript:window.hacked=1)
![far](https://example.org/far.png) <svg onload=window.hacked=1> `<b>code</b>`
"""
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}{% endfor %}"
)
THOUGHT = "<think>\nRivers **flow**.\n</think>\n\nThe Rhine."
MODELS = f"""
[models.echo]
model = "echo"
options = {{ images = true }}
[models.slow]
model = "echo"
options = {{ tokens_per_second = 25 }}
[models.story]
model = "echo"
options = {{ text = {json.dumps(ANSWER)} }}
[models.thinker]
model = "echo"
chat_template = {json.dumps(THINKING)}
options = {{ text = {json.dumps(THOUGHT)} }}
[models.lazy]
model = "echo"
preload = false
[models.{json.dumps(XSS)}]
model = "echo"
preload = false
aliases = [{json.dumps(XSS + "2")}]
[telemetry]
trace_content = true
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests, with the reason, where there is no browser."""
    if lacking := missing():
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(f"there is no {lacking} here"))


def _served(folder: Path, environment: dict[str, str]) -> Iterator[Service]:
    file = folder / "headrace.toml"
    file.write_text(MODELS)
    more = {"CONFIG": str(file), "HOME": str(folder / "home")}
    with served(environment=more | environment) as running:
        yield running


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    yield from _served(tmp_path_factory.mktemp("open"), {})


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    keys = {"API_KEYS": "user-key", "ADMIN_KEYS": "admin-key"}
    yield from _served(tmp_path_factory.mktemp("locked"), keys)


@pytest.fixture(scope="session")
def session() -> Iterator[Browser]:
    # Not below pytest's folder: the browser's last processes may still write there.
    profile = Path(tempfile.mkdtemp(prefix="console-"))
    try:
        with browser(profile) as started:
            yield started
    finally:
        shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def page(session: Browser) -> Iterator[Browser]:
    """A page without a past; at its end nothing may be on its console."""
    session.size(1440)
    session.scheme("light")
    session.console()
    session.requests()
    yield session
    assert session.console() == []
    own = ("http://127.0.0.1:", "data:", "blob:", "about:", "chrome:", "chrome-")
    assert [url for url in session.requests() if not url.startswith(own)] == []
