"""The playground in a real browser: answers, tools, pictures, two models, what is kept."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.browser.conftest import XSS
from tests.browser.driver import Browser
from tests.browser.test_console import COMPOSER, ENTER, ESCAPE, answer, ask
from tests.pictures_made import png
from tests.service.serving import Service

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def activity(service: Service) -> list[Any]:
    return httpx.get(f"{service.url}/admin/activity").json()["running"]


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


def copied(page: Browser) -> list[str]:
    """What the buttons curl and Python copy."""
    page.js(
        """window.copied = []; Object.defineProperty(navigator, 'clipboard', { value:
        { writeText: (text) => (window.copied.push(text), Promise.resolve()) } })"""
    )
    for button in ("curl", "Python"):
        page.press(button, ".answer footer")
    return page.wait("window.copied.length === 2 && window.copied")


def fill(page: Browser, label: str, text: str) -> None:
    """Write a text into a field of the settings."""
    page.find(".settings")
    page.js(
        """const field = [...document.querySelectorAll('.settings .field')].find((node) =>
            node.innerText.startsWith(arguments[0])).querySelector('textarea');
        field.value = arguments[1];
        field.dispatchEvent(new Event('input', { bubbles: true }));""",
        label,
        text,
    )


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
    curl, python = copied(page)
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
    fill(page, "Tools", json.dumps([TOOL]))
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


def test_a_picture_is_dropped_in(page: Browser, service: Service, tmp_path: Path) -> None:
    """Issue 16, must show 1: it is sent as it is, and shown in the conversation.

    16.1: what is copied for curl and Python, with tools and a system prompt, gives the same answer.
    """
    page.open(f"{service.url}/#/playground")
    page.choose(".toolbar select", "echo")
    page.find(".composer")
    page.js(
        """const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], 'a.png', { type: 'image/png' }));
        document.querySelector('.composer').dispatchEvent(
            new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }));""",
        base64.b64encode(png(128, 96)).decode(),
    )
    page.find(".attached img")
    fill(page, "System prompt", 'It\'s a test: "$HOME" `id` \\\\ ü')
    fill(page, "Tools", json.dumps([TOOL]))
    page.type(COMPOSER, "What is it?" + ENTER)
    page.wait("document.querySelector('.answer')?.innerText.includes('[png 128x96')")
    assert page.js("return document.querySelector('.turn.user img').naturalWidth") == 128
    page.see("total")
    shown = answer(page)
    curl, python = copied(page)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    outputs = [
        subprocess.run(
            [*program, "-c", text],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for program, text in ((["bash"], curl), ([sys.executable], python))
    ]
    assert json.loads(outputs[0])["choices"][0]["message"]["content"].strip() == shown.strip()
    assert outputs[1].strip() == shown.strip()


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
    page.press("Edit this message", ".lane + .lane")
    page.see("It replaces an earlier message")
    assert page.js(f"return document.querySelector('{COMPOSER}').value") == "For both"
    page.type(COMPOSER, ", again" + ENTER)
    page.wait("document.querySelectorAll('.lane')[0].innerText.includes('For both, again')")
    page.wait("document.querySelectorAll('.figures').length === 2")
    assert page.js("return document.querySelectorAll('.turn.user').length") == 2
    count = page.js("return document.querySelectorAll('.conversation').length")
    page.press("Delete For both, again")
    page.wait("document.querySelectorAll('.conversation').length === arguments[0]", count - 1)


def test_conversations_of_a_file(page: Browser, service: Service) -> None:
    """Issue 16.1: what was exported is read again; what is in it becomes no HTML."""
    page.open(f"{service.url}/#/playground")
    page.find(".conversations")
    turns = [
        {"role": "user", "text": XSS, "images": ["http://127.0.0.1:9/a.png"]},
        {"role": "assistant", "text": XSS, "metrics": {"usage": 1}, "calls": [{}], "thinking": 5},
    ]
    lane = {"model": "echo", "turns": turns}
    for content, shown in (
        ("no JSON", "a.json: It is not JSON."),
        ('{"lanes": [5]}', "a.json: It is not an exported conversation."),
        (json.dumps([{"id": "../x", "title": "From a file", "lanes": [lane]}]), "From a file"),
    ):
        page.js(
            """const data = new DataTransfer();
            data.items.add(new File([arguments[0]], 'a.json'));
            const field = document.querySelector('.conversations input');
            field.files = data.files;
            field.dispatchEvent(new Event('change', { bubbles: true }));""",
            content,
        )
        page.see(shown)
    page.wait("document.querySelectorAll('.turn').length === 2")
    assert page.js("return document.querySelectorAll('.turn img').length") == 0
    page.press("Delete From a file")
    page.wait("document.querySelectorAll('.turn').length === 0")


def test_an_answer_goes_on_while_another_page_is_shown(page: Browser, service: Service) -> None:
    """Issue 16.1: it is whole when the playground is shown again; a long one is in pieces."""
    parts = [f"Part {n}.\n\n" + "some words " * 60 + "\n\n" for n in range(40)]
    parts[20:20] = ["```python\n", "x = 1\n\nprint(x)\n" * 400, "```\n\n"]
    draft = json.dumps({"text": "".join(parts), "images": [], "replaces": None})
    page.open(f"{service.url}/#/playground")
    page.choose(".toolbar select", "steady")
    # As after the page was left with half a message.
    page.js("sessionStorage.setItem('headrace.draft', arguments[0]); location.reload()", draft)
    page.wait(f"document.querySelector('{COMPOSER}')?.value.length > 10000")
    page.type(COMPOSER, ENTER)
    page.wait("document.querySelector('.answer .markdown')")
    page.js("location.hash = '#/now'")
    page.see("Running requests")
    page.js("location.hash = '#/playground'")
    page.wait("document.querySelector('.figures')")
    assert page.js("return document.querySelectorAll('.answer .piece').length") > 3
    assert page.js("return document.querySelectorAll('.answer .code').length") == 1
    text = page.js("return document.querySelector('.answer .markdown').textContent")
    assert [f"Part {n}." in text for n in range(40)] == [True] * 40
    assert text.count("print(x)") == 400


def test_a_page_is_left_in_the_frame_of_a_scroll(page: Browser, service: Service) -> None:
    """Issue 16, must show 1: events and effects that come after the page was left find no fault."""
    ask(page, service, "story", "Tell me")
    page.see("total")
    page.size(1440, 400)
    page.js(
        """const frame = () => new Promise((done) => requestAnimationFrame(() => done()));
        const lane = () => document.querySelector('.lane');
        for (let turn = 0; turn < 20; turn += 1) {
            while (!(lane()?.scrollHeight > lane()?.clientHeight + 20)) await frame();
            await frame();
            lane().scrollTop = turn % 2 ? 0 : 10;
            location.hash = '#/now';
            while (lane()) await new Promise((done) => setTimeout(done));
            location.hash = '#/playground';
        }"""
    )
    page.find(COMPOSER)


def test_a_service_that_cannot_be_reached_for_a_moment(page: Browser, service: Service) -> None:
    """Issue 16.1: the pages stay, what was asked too, and it can be asked again."""
    page.open(f"{service.url}/#/playground")
    page.choose(".toolbar select", "echo")
    page.find(COMPOSER)
    page.offline(True)
    try:
        page.js("location.hash = '#/now'")
        page.js("location.hash = '#/playground'")
        page.type(COMPOSER, "Still here" + ENTER)
        page.see("The service cannot be reached.")
    finally:
        page.offline(False)
    page.press("Regenerate")
    page.see("total")
    assert answer(page) == "Still here"
    page.console()  # the requests that failed
