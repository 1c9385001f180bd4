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
from tests.models.fake_hub import FakeHub
from tests.models.test_library import TINY
from tests.service.serving import Service, served
from tests.tiny_gguf import tiny_gguf

from headrace import measurements
from headrace.core.measurement import Curve, Point
from headrace.core.model import ModelFile
from headrace.engines import measured
from headrace.engines.measured import Figures, Record, Trial
from headrace.models import library

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
[models.steady]
model = "echo"
preload = false
options = {{ tokens_per_second = 10000, speculation = "ngram" }}
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


def _measurements(home: Path) -> None:
    """Keep two runs of `bench` and one of `tune`, as the commands do."""
    for day, factor in (("26", 1.0), ("27", 1.6)):
        points = tuple(
            Point(
                load=f"{clients} clients",
                tokens_per_s=factor * 40 * clients**0.8,
                first_token_p50_ms=60 + 35 * clients / factor,
                first_token_p99_ms=90 + 60 * clients / factor,
                between_p50_ms=20 + 4 * clients / factor,
                between_p99_ms=30 + 7 * clients / factor,
            )
            for clients in (2, 4, 8, 16)
        )
        time = f"2026-11-{day}T10:00:00Z"
        run = Curve(kind="bench", model="echo", title=f"a server {XSS}", time=time, points=points)
        measurements.keep(home, run)
    trials = [
        Trial(engine=engine, version="1", figures=tuple(
            Figures(streams=streams, tokens_per_s=rate * streams**0.7, spread=(1, 2),
                    first_token_ms_p50=50.0 * streams, first_token_ms_p99=80.0 * streams)
            for streams in (1, 8, 32)
        ), memory={"cpu": 300_000_000}, fault=fault)
        for engine, rate, fault in (("llamacpp", 60, None), ("openvino", 70, None),
                                    ("transformers", 30, "only 90% of its tokens are the same"))
    ]  # fmt: skip
    record = Record(
        model="smollm2",
        source="s",
        day="2026-11-25",
        machine="a test",
        streams=(1, 8, 32),
        trials=tuple(trials),
    )
    measured.save(home, ModelFile(path="/smollm2.gguf", format="gguf"), record)


def _served(folder: Path, environment: dict[str, str]) -> Iterator[Service]:
    file = folder / "headrace.toml"
    file.write_text(MODELS)
    more = {"CONFIG": str(file), "HOME": str(folder / "home")}
    _measurements(folder / "home")
    own = Path(library.__file__).with_name(library.FILE_NAME).read_bytes()
    (folder / "home" / library.FILE_NAME).write_bytes(own + TINY)
    with served(environment=more | environment) as running:
        yield running


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Service]:
    """A service whose hub has the smallest model of the library."""
    folder = tmp_path_factory.mktemp("open")
    model = tiny_gguf(folder / "tiny.gguf", smollm2_path).read_bytes()
    with FakeHub({"tiny-Q8_0.gguf": model}).running() as hub, pytest.MonkeyPatch.context() as patch:
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
        for name, value in own.items():
            patch.setenv(name, value)
        yield from _served(folder, {})


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
