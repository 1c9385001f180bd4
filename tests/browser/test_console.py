"""The console in a real browser: every page, and what can and cannot be done there."""

from __future__ import annotations

import time

import httpx
import pytest
from tests.browser.conftest import SCREENSHOTS, XSS
from tests.browser.driver import Browser
from tests.conftest import ROOT
from tests.service.serving import Service

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

AXE = ROOT / "console" / "node_modules" / "axe-core" / "axe.min.js"
PAGES = {
    "now": ("/#/now", ".plot canvas"),
    "playground": ("/#/playground", ".composer textarea"),
    "requests": ("/#/requests", ".grid tbody tr"),
    "usage": ("/#/usage", ".plain-grid"),
    "speed": ("/#/speed", ".xy polyline"),
    "models": ("/#/models", ".library .buttons"),
    "docs": ("/docs", ".route"),
}
SIZES = {1440: 900, 390: 844}
SCHEMES = ("light", "dark")
ENTER, ESCAPE = "\ue007", "\ue00c"
COMPOSER = ".composer textarea"


def ask(page: Browser, service: Service, model: str, text: str) -> None:
    page.open(f"{service.url}/#/playground")
    page.choose(".toolbar select", model)
    page.type(COMPOSER, text + ENTER)


def answer(page: Browser, number: int = -1) -> str:
    """The text of an answer, without its figures and buttons."""
    script = (
        "[...document.querySelectorAll('.answer')].at(arguments[0])?.querySelector('.markdown')"
    )
    return page.js(f"return {script}?.innerText ?? ''", number)


@pytest.mark.parametrize("also", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_in_both_themes_and_both_widths(
    page: Browser, service: Service, name: str, also: bool
) -> None:
    """Issue 16, must show 1: nothing on the console, no sideways scrolling, no finding of axe."""
    chat = {"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}
    httpx.post(f"{service.url}/v1/chat/completions", json=chat).raise_for_status()
    if name == "usage":
        counted(service)
    path, css = PAGES[name]
    # Each theme and each width; the other two pairs are slow.
    for (width, height), scheme in zip(SIZES.items(), SCHEMES[:: -1 if also else 1], strict=True):
        page.size(width, height)
        page.scheme(scheme)
        page.open(service.url + path)
        page.find(css)
        page.picture(SCREENSHOTS / f"{name}-{scheme}-{width}.png")
        wide = page.js("return document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{name} scrolls sideways at {width}"
        assert findings(page) == []


def counted(service: Service) -> None:
    """Wait until usage has rows, which it has within some seconds of the first request."""
    until = time.monotonic() + 60
    while not httpx.get(f"{service.url}/admin/usage").json()["rows"]:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_usage_by_priority(page: Browser, service: Service) -> None:
    """Issue 16.1: usage by day, key, model; and by priority."""
    chat = {"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}
    httpx.post(f"{service.url}/v1/chat/completions", json=chat).raise_for_status()
    counted(service)
    page.open(f"{service.url}/#/usage")
    page.find(".plain-grid")
    page.click(".choices label:last-child input")
    page.wait("document.querySelector('.plain-grid tbody').innerText.includes('live')")
    page.requests()
    page.press("Refresh")
    until = time.monotonic() + 20
    while not [url for url in page.requests() if "/admin/usage" in url]:
        assert time.monotonic() < until
        time.sleep(0.05)


def findings(page: Browser) -> list[str]:
    """The serious findings of axe-core on the page."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed; `npm ci` in console/ does it")
    # As a program of the browser's own tools: the policy of the page forbids it otherwise.
    page.cdp("Runtime.evaluate", expression=AXE.read_text(encoding="utf-8"))
    found = page.js("return (await axe.run({ resultTypes: ['violations'] })).violations")
    return [
        f"{one['impact']} {one['id']}: {node['html'][:200]} {node.get('failureSummary', '')[:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"][:3]
    ]


def test_the_theme_can_be_set(page: Browser, service: Service) -> None:
    """Issue 16.1: light and dark, as the system or as chosen, which is kept."""
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    page.open(service.url)
    light = page.wait(ground)
    page.press("Theme: system")
    page.press("Theme: light")
    dark = page.wait(f"{ground} !== arguments[0] && {ground}", light)
    page.open(service.url)
    assert page.wait(ground) == dark
    page.press("Theme: dark")
    page.wait(f"{ground} === arguments[0]", light)


def test_a_model_is_loaded_pinned_and_unloaded(page: Browser, service: Service) -> None:
    """Issue 16, must show 1; 16.1: a plan with its reasons, load, pin, unload."""
    state = """[...document.querySelectorAll('table.models tbody tr')].find((row) =>
        row.querySelector('.model-name').innerText === 'lazy')?.querySelector('.badge').innerText"""
    page.open(f"{service.url}/#/now")
    page.wait(f"{state} === 'not loaded'")
    page.press("What loading lazy needs")
    page.see("It fits")
    page.press("Close")
    focus = "document.activeElement.getAttribute('aria-label')"
    page.wait(f"{focus} === 'What loading lazy needs'")
    page.press("Load lazy")
    page.wait(f"{state} === 'ready'", within_s=60)
    page.press("Pin lazy, so that it is never evicted")
    page.see("pinned")
    page.press("Unpin lazy")
    page.wait("!document.body.innerText.includes('pinned')")
    page.press("Unload lazy")
    page.wait(f"{state} === 'not loaded'", within_s=60)


def test_a_model_of_the_library_is_found_and_downloaded(page: Browser, service: Service) -> None:
    """Issue 16.1, 16.3: search, what fits, a guess that is marked, a pull by name, the disk."""
    rows = "[...document.querySelectorAll('.library tbody tr')]"
    page.open(f"{service.url}/#/models")
    page.type("[type=search]", "of a test")
    page.wait(f"{rows}.length === 1")
    text = page.js(f"return {rows}[0].innerText")
    assert "tiny:1m" in text
    assert "fits" in text
    assert "~" in text
    assert "(guess)" in page.js("return document.querySelector('.library thead').innerText")
    page.press("What loading tiny:1m needs")
    page.see("It fits")
    page.press("Close")
    page.press("Download and load tiny:1m")
    page.wait(f"{rows}[0].innerText.includes('on the disk')", within_s=60)
    page.wait("document.querySelector('.cards').innerText.includes('tiny:1m')")
    page.see("hub:org/model:Q8_0")


def test_the_plots_of_bench_and_tune(page: Browser, service: Service) -> None:
    """Issue 16.1: both as plots with their figures; runs are chosen."""
    lines = "document.querySelectorAll('[aria-label=Bench] .xy:first-child g.line').length"
    page.open(f"{service.url}/#/speed")
    page.wait(f"{lines} === 2")
    page.see("openvino")
    page.see("only 90% of its tokens are the same")
    page.click("[aria-label=Bench] input")
    page.wait(f"{lines} === 1")


def test_requests_are_listed_shown_compared_and_replayed(page: Browser, service: Service) -> None:
    """Issue 16.1: filters, a waterfall of one request, two beside each other, replay."""
    for text in ("Once", "Twice"):
        body = {"model": "echo", "messages": [{"role": "user", "content": text}], "seed": 7}
        httpx.post(f"{service.url}/v1/chat/completions", json=body).raise_for_status()
    body = {"model": "none", "messages": [{"role": "user", "content": "x"}]}
    httpx.post(f"{service.url}/v1/chat/completions", json=body)
    rows = "document.querySelectorAll('tbody tr').length"
    traces = f"{service.url}/admin/traces?outcome=refused"
    until = time.monotonic() + 20
    while not httpx.get(traces).json()["data"]:
        assert time.monotonic() < until
        time.sleep(0.05)
    page.open(f"{service.url}/#/requests")
    page.wait(f"{rows} > 2")
    page.choose(".filters label:nth-of-type(2) select", "refused")
    page.wait("[...document.querySelectorAll('td .badge')].every((b) => b.innerText === 'refused')")
    page.see("UnknownModel")
    page.choose(".filters label:nth-of-type(2) select", "ok")
    page.wait("[...document.querySelectorAll('td .badge')].every((b) => b.innerText === 'ok')")
    page.js(
        """[...document.querySelectorAll('.choice input')].slice(0, 2).forEach(
            (box) => box.click())"""
    )
    page.press("Compare")
    page.see("Difference")
    page.wait("document.querySelectorAll('.waterfall').length === 2")
    page.click("thead a")
    page.see("Steps")
    page.wait("document.querySelectorAll('.waterfall li').length > 3")
    page.press("Replay")
    page.see("Twice")
    seed = """[...document.querySelectorAll('.settings .field')].find((node) =>
        node.innerText.startsWith('Seed'))?.querySelector('input').value"""
    assert page.wait(seed) == "7"


def test_a_key_is_asked_for_and_kept_in_the_tab(page: Browser, locked: Service) -> None:
    """Issue 16.1: a wrong key is refused; a client's chats; an admin's manages; it is forgotten."""
    page.open(locked.url)
    page.see("This service needs a key")
    page.picture(SCREENSHOTS / "key.png")
    page.console()  # the refused request is an error of the network
    page.type(".key-form input", "wrong" + ENTER)
    page.see("not known here")
    page.console()
    page.type(".key-form input", "schlüssel" + ENTER)
    page.see("no characters beyond ASCII")
    page.type(".key-form input", "\ue009a\ue000\ue003")
    page.type(".key-form input", "user-key" + ENTER)
    page.see("This page needs an admin key")
    page.console()
    assert page.js("return [sessionStorage.length, JSON.stringify(localStorage)]") == [
        1,
        page.js("return JSON.stringify(localStorage)"),
    ]
    assert "user-key" not in page.js("return JSON.stringify(localStorage) + document.cookie")
    page.js("location.hash = '#/playground'")
    page.choose(".toolbar select", "echo")
    page.type(COMPOSER, "With a key" + ENTER)
    page.see("total")
    page.press("Forget the key")
    page.see("This service needs a key")
    assert page.js("return sessionStorage.length") == 0
    page.type(".key-form input", "admin-key" + ENTER)
    page.js("location.hash = '#/now'")
    page.see("Running requests")
    page.open(f"{locked.url}/docs")
    page.see("/v1/chat/completions")
    page.press("Forget the key")
    page.see("This service needs a key")
    page.console()


def test_nothing_that_is_sent_becomes_html(page: Browser, service: Service) -> None:
    """Issue 16, must show 1: model names, answers and Markdown stay text."""
    ask(page, service, "story", XSS)
    page.see("total")
    shown = answer(page)
    for text in ("<script>window.hacked = 1</script>", XSS, "<svg onload=window.hacked=1>"):
        assert text in shown
    assert "[bad](javascript:" in shown
    assert "<b>code</b>" in shown
    for path, text in (("now", XSS), ("models", XSS), ("requests", "story"), ("usage", "Usage")):
        page.open(f"{service.url}/#/{path}")
        page.see(text)
    page.open(f"{service.url}/#/playground")
    page.click(".conversation")
    page.see("total")
    made = """return [window.hacked ?? null, document.querySelectorAll(
        'img[src="x"], a[href^="javascript"], main script, [onerror], [onload]').length]"""
    assert page.js(made) == [None, 0]
    links = page.js("return [...document.querySelectorAll('.answer a')].map((a) => a.rel)")
    assert links
    assert all("noopener" in link and "noreferrer" in link for link in links)


def test_the_policy_holds(page: Browser, service: Service) -> None:
    """Issue 16, must show 1: inline scripts, strings as HTML and other hosts are refused."""
    page.open(service.url)
    page.see("Running requests")
    tried = page.js(
        """const results = {};
        const attempt = (name, work) => { try { work(); results[name] = 'done'; }
            catch (error) { results[name] = error.name; } };
        attempt('script', () => {
            const node = document.createElement('script'); node.textContent = 'window.hacked = 1';
            document.body.append(node); });
        attempt('html', () => { document.createElement('div').innerHTML = '<b>x</b>'; });
        attempt('handler', () => {
            document.body.setAttribute('onclick', 'window.hacked = 1'); document.body.click(); });
        results.fetch = await fetch('http://127.0.0.1:9/').then(() => 'done', (e) => e.name);
        results.picture = await new Promise((done) => {
            const image = new Image(); image.onload = () => done('done');
            image.onerror = () => done('error'); image.src = 'http://127.0.0.1:9/a.png'; });
        results.hacked = window.hacked ?? null;
        return results;"""
    )
    assert tried["hacked"] is None
    assert tried["html"] == tried["script"] == "TypeError"
    assert (tried["fetch"], tried["picture"]) == ("TypeError", "error")
    assert any("Content Security Policy" in line for line in page.console())


def test_the_keyboard_alone_is_enough(page: Browser, service: Service) -> None:
    """Issue 16.1: every control is reached by Tab, and shows that it has the focus."""
    page.open(f"{service.url}/#/now")
    page.see("Running requests")
    reached: list[str] = []
    for _ in range(24):
        page.tab()
        focus = page.js(
            """const node = document.activeElement; const style = getComputedStyle(node);
            return [node.getAttribute('aria-label') ?? node.innerText.trim(),
                node === document.body ? 'body' : style.outlineStyle]"""
        )
        assert focus[1] in ("solid", "body"), f"{focus[0]} shows no focus"
        reached.append(focus[0])
    names = ["Skip to the content", "Headrace", "Now", "Playground", "Requests", "Usage"]
    assert reached[: len(names)] == names
    assert "Unload echo" in reached


def test_a_hidden_tab_asks_for_nothing(page: Browser, service: Service) -> None:
    """Issue 16, must show 2: polling stops while the tab is hidden, and begins again."""
    page.open(f"{service.url}/#/now")
    page.see("Running requests")
    page.js(
        """window.timers = new Set(); const [start, end] = [setTimeout, clearTimeout];
        window.setTimeout = (work, ms) => {
            const id = start(() => { timers.delete(id); work(); }, ms);
            timers.add(id); return id; };
        window.clearTimeout = (id) => { timers.delete(id); end(id); };"""
    )
    page.wait("timers.size > 0")  # the next poll
    page.js(
        """Object.defineProperty(document, 'hidden', { value: true, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));"""
    )
    page.requests()
    # Nothing is left that could ask, now or later.
    page.wait("timers.size === 0")
    assert [url for url in page.requests() if "/admin/" in url] == []
    page.js(
        """Object.defineProperty(document, 'hidden', { value: false, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));"""
    )
    until = time.monotonic() + 20
    while not [url for url in page.requests() if "/admin/overview" in url]:
        assert time.monotonic() < until
        time.sleep(0.1)
