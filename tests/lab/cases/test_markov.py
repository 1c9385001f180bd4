"""The engine of docs/adding-an-engine.md keeps the contract; spoiled, it is caught."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT
from tests.pictures_made import png
from tests.sounds_made import wav

from headrace import ModelWorker, contract, engines, runtime
from headrace.contract import CASES

PAGE = (ROOT / "docs" / "adding-an-engine.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
SETTINGS = {"context_length": 256, "max_running": 4}
SEEN = {"context_length": 2048, "max_running": 4}


def install(name: str, code: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make code known as an engine, as the package of a stranger would."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[headrace.engines]\n{name} = their_{name}\n")
    (folder / f"their_{name}.py").write_text(code)
    patch.syspath_prepend(str(folder))
    paths = (str(folder), os.environ.get("PYTHONPATH", ""))
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def test_the_example_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W26; issue 4, shown 5: installed by its entry point, as the page says."""
    install("markov", CODE, tmp_path / "site", monkeypatch)
    assert '[project.entry-points."headrace.engines"]\nmarkov = ' in PAGE
    command = [sys.executable, "-m", "headrace", "check-engine", "markov"]
    command += ["--model", "builtin:echo", "--context-length", "256"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HEADRACE_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, summary = done.stdout.splitlines()
    told = f"{len(lines)} cases: {len(lines) - 31} ok, 31 refused, 0 reported, 0 failed"
    assert summary == told
    assert told in PAGE


def test_it_runs_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W26; issue 12.15: from Python, flags and a file, in a process of its own."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "by_path.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path / "home"))
    with ModelWorker("builtin:echo", engine="by_path:Engine", text="abcabc", slots=2) as worker:
        assert worker.metadata.engine == "by_path:Engine"
        assert worker.metadata.max_running == 2
        assert worker.generate("a", max_tokens=4, temperature=0).text == "bcab"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    command = [sys.executable, "-m", "headrace", "run", "--raw", "--no-figures"]
    flags = ["--engine", "by_path:Engine", "-o", "text=abcabc"]
    of_run = ["a", "--max-tokens", "4", "--temperature", "0"]
    (tmp_path / "headrace.toml").write_text(
        "[models.mine]\nmodel = 'echo'\nengine = 'by_path:Engine'\noptions = { text = 'abcabc' }"
    )
    for model, given in (("echo", flags), ("mine", [])):
        done = subprocess.run(
            [*command, model, *of_run, *given],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert (done.returncode, done.stdout) == (0, "bcab\n"), done.stderr


NEXT = """\
            last = self._next(last, request, draw)
            if last in request.sampling.stop_token_ids:
                reason = "stop"
                break
            made += 1
            yield RawDelta(_bytes([last]), (last,))
"""
assert NEXT in CODE


def repeats(shown: str) -> tuple[str, str]:
    """The engine repeats the last message, and shows `shown` of each token."""
    prompt = '[*bytes(request.token_ids).rpartition(b"\\x1e")[2], END][made]'
    after = NEXT.replace("self._next(last, request, draw)", prompt)
    return NEXT, after.replace("_bytes([last])", shown)


CLAIMS_GRAMMARS = (
    "batch_invariant=True",
    'batch_invariant=True, json_schema=True, forms=frozenset({"grammar"})',
)
SPOILED: dict[str, tuple[str, ...]] = {
    "sampling_seed": ("random.Random(request.sampling.seed)", "random.Random()"),
    "sampling_top_k": ("most_common(sampling.top_k or None)", "most_common()"),
    "sampling_max_tokens": ("made < request.max_tokens", "made <= request.max_tokens"),
    "sampling_ignore_eos": ("counts.pop(END, None)", "return END"),
    "sampling_stop_token_ids": ("in request.sampling.stop_token_ids", "in ()"),
    "sampling_min_p": ('"top_k", "seed"', '"top_k", "min_p", "seed"'),
    "sampling_min_tokens": ('"top_k", "seed"', '"top_k", "min_tokens", "seed"'),
    "prompt_logprobs": ("batch_invariant=True", "batch_invariant=True, prompt_logprobs=True"),
    "continued": ("messages[-1].content", "messages[0].content"),
    "sampling_temperature": ("if temperature == 0", "if temperature >= 0"),
    "greedy_repeats": ("return best[0][0]", "return random.choice(list(self._all))"),
    "usage_is_exact": ("completion_tokens=made", "completion_tokens=made + 1"),
    "every_script": ("RawDelta(_bytes([last])", "RawDelta(_bytes([last]).upper()"),
    "text_and_tokens": ("if not all(0 <= token <= END for token in request.token_ids)", "if 0"),
    "figures_are_complete": ("yield Admitted(done=prompt_tokens, total=prompt_tokens)", "pass"),
    "cancelled_in_prefill": ("yield Admitted(done=prompt_tokens, total=prompt_tokens)", "pass"),
    "json_schema": CLAIMS_GRAMMARS,
    "json_schema_fails_closed": CLAIMS_GRAMMARS,
    "tool_calls": repeats('_bytes([last]).replace(b"<", b"")'),
    "tool_calls_required": CLAIMS_GRAMMARS,
    "tool_calls_or_form": CLAIMS_GRAMMARS,
    "tool_calls_parallel": CLAIMS_GRAMMARS,
    "tool_calls_strict": (*CLAIMS_GRAMMARS, *repeats("_bytes([last])")),
    "tool_calls_cut": repeats('_bytes([last]).replace(b"a", b"")'),
    "thinking": ("RawDelta(_bytes([last])", "RawDelta(_bytes([last]).upper()"),
    **{
        form: ("batch_invariant=True", f"batch_invariant=True, forms=frozenset({{{form!r}}})")
        for form in ("regex", "choice", "grammar")
    },
    "forms_fail_closed": (
        "batch_invariant=True",
        "batch_invariant=True, forms=frozenset({'regex', 'grammar'})",
    ),
    "resume": ("batch_invariant=True", "resume=True"),
    "options_describe_themselves": (', description="What it learns from."', ""),
    "alone_and_among_sixteen": (
        "return best[0][0]",
        "return best[-len(asyncio.all_tasks()) % len(best)][0]",
    ),
    "close_gives_everything_back": (
        "self._options = options",
        'random.held = [*getattr(random, "held", ()), bytearray(b"1") * (99 << 20)]\n'
        "        self._options = options",
    ),
}
"""What is replaced in the example, text and new text in turn, by the case that must notice it."""


SEEING = """\
import asyncio
from contextlib import aclosing

import msgspec

from headrace.engines import echo
from headrace.engines.base import About, Admitted, RawDelta

ABOUT = About(formats=("none",), automatic=False)
Options = echo.Options


class Engine(echo.Engine):
    def __init__(self, request):
        super().__init__(msgspec.structs.replace(request, options={"images": True, "audio": True}))
        self._slots = asyncio.Semaphore(1)

    async def generate(self, request):
        await self._slots.acquire()
        try:
            async with aclosing(super().generate(request)) as events:
                async for event in events:
                    yield event
        finally:
            self._slots.release()
"""
"""An engine that takes images and sounds, and has one slot."""

BLIND: dict[str, tuple[tuple[str, str], ...]] = {
    "images": (
        # All images are the same to it; or the last bytes of the prompt are all that it sees.
        ("super().generate(request)", "super().generate(blind(request))"),
        ("yield event\n", "yield uncounted(event)\n"),
    ),
    "audio": (
        ("super().generate(request)", "super().generate(deaf(request))"),
        ("yield event\n", "yield uncounted(event)\n"),
    ),
    "images_damaged": (
        ("super().generate(request)", "super().generate(blind(request))"),
        ("        await self._slots.acquire()\n", "        await decoded(self, request)\n"),
    ),
    "images_cancelled": (
        (
            "        finally:\n            self",
            "        except ZeroDivisionError:\n            self",
        ),
    ),
    "images_fill_the_context": (("yield event\n", "yield untold(event)\n"),),
}
"""What is replaced in it, in several ways, by the case that must notice each."""

BLINDED = """

def blind(request):
    media = (BLACK,) * len(request.media)
    return msgspec.structs.replace(request, media=media)


def deaf(request):
    return msgspec.structs.replace(request, media=(SILENCE,) * len(request.media))


def uncounted(event):
    if isinstance(event, Admitted):
        return msgspec.structs.replace(event, total=7, done=7)
    return event if isinstance(event, RawDelta) else msgspec.structs.replace(event, prompt_tokens=7)


def untold(event):
    return Admitted() if isinstance(event, Admitted) else event


async def decoded(engine, request):
    await engine._slots.acquire()
    for data in request.media:
        try:
            echo.pictures.decoded(data)
        except Exception:
            # The process of the model ends.
            raise RuntimeError("segmentation fault") from None


BLACK = bytes.fromhex(%r)
SILENCE = bytes.fromhex(%r)
"""


@pytest.mark.parametrize("name", [*SPOILED, *BLIND])
async def test_a_fault_is_caught(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """Issue 4: each case fails when what it holds is taken out of an engine."""
    taking = SEEING + BLINDED % (png().hex(), wav(0.2, 8000).hex())
    blind = [(taking, pair) for pair in BLIND.get(name, ())]
    for number, (code, pairs) in enumerate(blind or [(CODE, SPOILED.get(name, ()))]):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(random, "held", [], raising=False)
            await is_caught(name, f"spoiled_{name}_{number}", code, pairs, folder, patch)


async def test_the_engine_that_is_blinded_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """Issue 13: what the cases of images catch is what was taken out."""
    install("seeing", SEEING, tmp_path, monkeypatch)
    settings = runtime.load_settings()
    spec = settings.model_spec("builtin:echo", {"engine": "seeing", **SEEN})
    async with contract.opened("seeing", spec, settings, "worker") as subject:
        for case in (case for case in CASES if case.name in BLIND):
            outcome = await contract.examine(case, subject)
            assert outcome.result == "ok", outcome.why


async def is_caught(
    name: str,
    engine: str,
    code: str,
    pairs: tuple[str, ...],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = next(case for case in CASES if case.name == name)
    for before, after in zip(pairs[::2], pairs[1::2], strict=True):
        assert before in code
        code = code.replace(before, after, 1)
    install(engine, code, folder, monkeypatch)
    assert engines.about(engine).formats == ("none",)
    settings = runtime.load_settings()
    given = {"engine": engine, **(SEEN if name in BLIND else SETTINGS)}
    spec = settings.model_spec("builtin:echo", given)
    async with contract.opened(engine, spec, settings, "worker") as subject:
        # Chance may draw the same text twice where it should not be drawn at all.
        tries, limit_s = (1, 2) if name in BLIND else (3, 300)
        results = [(await contract.examine(case, subject, limit_s)).result for _ in range(tries)]
        assert "failed" in results
