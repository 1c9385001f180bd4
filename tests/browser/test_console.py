"""The console in a real browser: every page, and what can and cannot be done there."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import httpx
import pytest
from tests.browser.conftest import SCREENSHOTS, XSS
from tests.browser.driver import Browser
from tests.conftest import ROOT
from tests.pictures_made import png
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


def activity(service: Service) -> list[Any]:
    return httpx.get(f"{service.url}/admin/activity").json()["running"]


@pytest.mark.parametrize("name", PAGES)
def test_every_page_in_both_themes_and_both_widths(
    page: Browser, service: Service, name: str
) -> None:
    """Issue 16, must show 1: nothing on the console, no sideways scrolling, no finding of axe."""
    chat = {"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}
    httpx.post(f"{service.url}/v1/chat/completions", json=chat).raise_for_status()
    path, css = PAGES[name]
    for width, height in SIZES.items():
        page.size(width, height)
        for scheme in ("light", "dark"):
            page.scheme(scheme)
            page.open(service.url + path)
            page.find(css)
            page.picture(SCREENSHOTS / f"{name}-{scheme}-{width}.png")
            wide = page.js("return document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, f"{name} scrolls sideways at {width}"
            assert findings(page) == []


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


def test_a_streamed_answer_is_stopped_in_the_middle(page: Browser, service: Service) -> None:
    """Issue 16, must show 1: what has come stays, and the service is free."""
    text = "word " * 200
    ask(page, service, "slow", text)
    page.wait("document.querySelector('.answer .markdown')?.innerText.length > 10")
    page.wait("document.querySelector('.answer').getAttribute('aria-busy') === 'true'")
    page.press("Stop")
    page.see("Stopped.")
    assert 10 < len(answer(page)) < len(text) / 2
    page.wait("/first token .* out.*total/s.test(document.querySelector('.figures').innerText)")
    assert "figures are those of this browser" not in page.text()
    until = time.monotonic() + 20
    while activity(service):
        assert time.monotonic() < until
        time.sleep(0.05)
    page.press("Regenerate")
    page.wait("document.querySelector('.answer').getAttribute('aria-busy') === 'true'")
    page.type(COMPOSER, ESCAPE)
    page.see("Stopped.")


def test_markdown_code_and_figures(page: Browser, service: Service) -> None:
    """Issue 16.1: Markdown, code that can be copied, a timeline, the request for other programs."""
    ask(page, service, "story", "Tell me")
    page.see("total")
    page.wait("document.querySelector('.answer h4, .answer h3')?.innerText === 'A river'")
    assert page.js("return document.querySelector('.answer em').innerText") == "Danube"
    assert page.js("return document.querySelector('.answer td.to-right').innerText") == "1075"
    code = page.js("return document.querySelector('.answer pre code').innerText")
    assert code == 'length = {"Danube": 2850}  # kilometres'
    assert page.js("return document.querySelectorAll('.t-comment').length") == 1
    label = page.js("return document.querySelector('.figures .bar').getAttribute('aria-label')")
    assert all(part in label for part in ("queue", "load", "prefill", "decode"))
    page.js(
        """window.copied = []; Object.defineProperty(navigator, 'clipboard', { value:
        { writeText: (text) => (window.copied.push(text), Promise.resolve()) } })"""
    )
    for button in ("curl", "Python"):
        page.press(button, ".answer footer")
    curl, python = page.wait("window.copied.length === 2 && window.copied")
    assert curl.startswith(f"curl {service.url}/v1/chat/completions")
    assert '"content": "Tell me"' in curl
    compile(python, "copied", "exec")
    assert f'base_url="{service.url}/v1"' in python


def test_thinking_is_folded(page: Browser, service: Service) -> None:
    """Issue 16.1: the thinking is beside the answer, closed."""
    ask(page, service, "thinker", "Think")
    page.see("The Rhine.")
    page.see("total")
    details = "document.querySelector('details.thinking')"
    assert page.js(f"return {details}.open") is False
    assert "flow" not in page.text()
    page.click("details.thinking summary")
    assert page.wait(f"{details}.querySelector('strong').innerText") == "flow"


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def test_a_tool_call_and_its_result(page: Browser, service: Service) -> None:
    """Issue 16, must show 1: the call is shown, its result is sent back."""
    page.open(f"{service.url}/#/playground")
    page.choose(".toolbar select", "echo")
    page.find(".settings")
    page.js(
        """const field = [...document.querySelectorAll('.settings .field')].find((node) =>
            node.innerText.startsWith('Tools')).querySelector('textarea');
        field.value = arguments[0];
        field.dispatchEvent(new Event('input', { bubbles: true }));""",
        json.dumps([TOOL]),
    )
    call = '<tool_call>{"name": "weather", "arguments": {"city": "<b>Ulm</b>"}}</tool_call>'
    page.type(COMPOSER, call + ENTER)
    page.see("Send the result")
    assert page.js("return document.querySelector('.call strong').innerText") == "weather"
    assert json.loads(page.js("return document.querySelector('.call code').innerText")) == {
        "city": "<b>Ulm</b>"
    }
    page.type(".results textarea", "12 degrees")
    page.press("Send the result")
    page.see("Result of weather")
    page.wait("document.querySelectorAll('.answer')[1]?.innerText.includes('12 degrees')")
    page.see("total")


def test_a_picture_is_dropped_in(page: Browser, service: Service) -> None:
    """Issue 16, must show 1: it is sent as it is, and shown in the conversation."""
    page.open(f"{service.url}/#/playground")
    page.choose(".toolbar select", "echo")
    page.find(".composer")
    page.js(
        """const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], 'a.png', { type: 'image/png' }));
        document.querySelector('.composer').dispatchEvent(
            new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }));""",
        base64.b64encode(png(64, 48)).decode(),
    )
    page.find(".attached img")
    page.type(COMPOSER, "What is it?" + ENTER)
    page.wait("document.querySelector('.answer')?.innerText.includes('[png 64x48')")
    assert page.js("return document.querySelector('.turn.user img').naturalWidth") == 64
    page.see("total")


def test_two_models_side_by_side_and_kept_conversations(page: Browser, service: Service) -> None:
    """Issue 16.1: one question to both; conversations are in this browser, and can be deleted."""
    page.open(f"{service.url}/#/playground")
    page.choose(".toolbar select", "echo")
    page.press("Compare")
    page.choose(".toolbar select:nth-of-type(2)", "thinker")
    page.type(COMPOSER, "For both" + ENTER)
    page.wait("document.querySelectorAll('.figures').length === 2")
    assert page.js("return document.querySelectorAll('.lane')[0].innerText").count("For both") == 2
    assert "The Rhine." in page.js("return document.querySelectorAll('.lane')[1].innerText")
    page.open(f"{service.url}/#/playground")
    page.click(".conversation")
    page.wait("document.querySelectorAll('.figures').length === 2")
    count = page.js("return document.querySelectorAll('.conversation').length")
    page.press("Delete For both")
    page.wait("document.querySelectorAll('.conversation').length === arguments[0]", count - 1)


def test_a_model_is_loaded_pinned_and_unloaded(page: Browser, service: Service) -> None:
    """Issue 16, must show 1; 16.1: a plan with its reasons, load, pin, unload."""
    state = """[...document.querySelectorAll('table.models tbody tr')].find((row) =>
        row.querySelector('.model-name').innerText === 'lazy')?.querySelector('.badge').innerText"""
    page.open(f"{service.url}/#/now")
    page.wait(f"{state} === 'not loaded'")
    page.press("What loading lazy needs")
    page.see("It fits")
    page.press("Close")
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
        """Object.defineProperty(document, 'hidden', { value: true, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));"""
    )
    page.requests()
    time.sleep(5)  # two and a half polls
    assert [url for url in page.requests() if "/admin/" in url] == []
    page.js(
        """Object.defineProperty(document, 'hidden', { value: false, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));"""
    )
    until = time.monotonic() + 20
    while not [url for url in page.requests() if "/admin/overview" in url]:
        assert time.monotonic() < until
        time.sleep(0.1)
