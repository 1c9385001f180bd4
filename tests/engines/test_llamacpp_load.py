"""Loads of llama.cpp: templates that it never sees, and the reasons of those that fail."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from tests.models.builders import ARRAY, F32, STRING, U32
from tests.tiny_gguf import tiny_gguf

from headrace import ModelWorker
from headrace.core.errors import (
    ContextOverflow,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    LoadFailed,
)
from headrace.core.model import ModelSpec
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.engines.base import OpenRequest
from headrace.engines.llamacpp import link
from headrace.engines.llamacpp.engine import Engine
from headrace.models.inspect import inspect
from headrace.worker.prompt import Prompter

pytestmark = pytest.mark.usefixtures("light_collections")

Make = Callable[..., Path]
I32 = 5
HI = (Message("user", "hi"),)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
IDS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "unknown", "padding"))
LETTERS = [chr(code) for code in range(33, 127)]


@pytest.fixture
def make(smollm2_path: Path, tmp_path: Path) -> Make:
    """Writes a small GGUF with SmolLM2's vocabulary."""
    return lambda **changed: tiny_gguf(tmp_path / "tiny.gguf", smollm2_path, **changed)


@pytest.fixture
def load() -> Iterator[Callable[..., Engine]]:
    """Opens engines, which are closed in the end."""
    engines: list[Engine] = []

    def open_it(path: Path, **fields: Any) -> Engine:
        fields = {"context_length": 256, "options": {"slots": 1, "threads": 1}} | fields
        engines.append(Engine(OpenRequest(model=inspect(path), **fields)))
        return engines[-1]

    yield open_it
    for engine in engines:
        engine.close()


def prompt(engine: Engine, **spec: Any) -> str:
    """What the model sees of HI."""
    prompter = Prompter(ModelSpec(name="m", model="m", **spec), engine)
    return engine.detokenize(prompter.job(GenerateRequest(messages=HI)).choices[0].token_ids)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% with x=1 %}{{ x }}{% endwith %}{{ messages[0].content }}", "1hi"),
        ("{% raw %}{{ a }}{% endraw %}{{ messages[0].content }}", "{{ a }}hi"),
        ("{% set a = [] %}{% do a %}{{ messages[0].content }}", "hi"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hi"),
    ],
)
def test_a_template_that_only_jinja_knows_is_rendered(
    make: Make, load: Callable[..., Engine], template: str, text: str
) -> None:
    """Issue 12.7: the library would refuse to load it."""
    assert prompt(load(make(chat_template=template))) == text


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{% endif %}",
        "{{ messages | nosuchfilter }}",
        "{{ " + "(" * 5000,
        "vicuna_v1.1",
        "x" * (2 << 20),
        "",
        b"{{ \xff\xfe }}{% if %}",
    ],
    ids=["endif", "filter", "depth", "name", "long", "empty", "bytes"],
)
def test_a_template_that_is_none_leaves_completions_and_another_template(
    make: Make, load: Callable[..., Engine], template: str | bytes
) -> None:
    """Issue 12.7, 12.14: and says why there is no chat."""
    engine = load(make(chat_template=template))
    prompter = Prompter(ModelSpec(name="m", model="m"), engine)
    assert prompter.template is None
    assert prompter.job(GenerateRequest(prompt="hi")).choices[0].token_ids
    if isinstance(template, str) and 0 < len(template) < 1 << 20:
        assert "no chat: The chat template" in (prompter.note or "")
    assert prompt(engine, chat_template="{{ messages[0].content }}!") == "hi!"


def test_a_template_that_refuses_refuses_requests_and_not_the_load(
    make: Make, load: Callable[..., Engine]
) -> None:
    """Issue 12.7: its own words reach the client, and its option helps."""
    need = "{% if lang is not defined %}{{ raise_exception('need lang') }}{% endif %}{{ lang }}"
    prompter = Prompter(ModelSpec(name="m", model="m"), load(make(chat_template=need)))
    with pytest.raises(InvalidRequest, match="need lang"):
        prompter.job(GenerateRequest(messages=HI))
    request = GenerateRequest(messages=HI, template_options={"lang": "en"})
    assert prompter.job(request).choices[0].token_ids


@pytest.mark.slow
def test_a_template_without_an_end_does_not_hold_up_the_load(make: Make) -> None:
    """Issue 11.10: in a process, with the request that it fails and others beside it."""
    began = time.monotonic()
    path = str(make(chat_template=ENDLESS))
    with ModelWorker(path, engine="llamacpp", context_length=256, threads=1) as worker:
        assert worker.generate("hi", max_tokens=1).usage.completion_tokens == 1
        with pytest.raises(HeadraceError, match="limits"):
            worker.generate(messages=HI, max_tokens=1)
        assert worker.generate("hi", max_tokens=1).usage.completion_tokens == 1
    assert time.monotonic() - began < 30


def test_a_file_names_its_special_tokens(make: Make, load: Callable[..., Engine]) -> None:
    """Issue 12.10: what it does not name is empty, and not the library's default."""
    names = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ sep_token }}"
    whole = load(make(chat_template=names))
    assert prompt(whole) == "<|im_start|>|<|im_end|>|<|endoftext|>|<|im_end|>|"
    none = load(make(chat_template=names, without=IDS))
    assert prompt(none) == "||||"
    odd = load(make(chat_template=names, without=IDS[2:], ggml__bos_token_id=(U32, 0xFFFFFFFF)))
    assert prompt(odd) == "|<|im_end|>|||"


@pytest.mark.parametrize(
    ("changed", "fields", "reason"),
    [
        ({"ggml__pre": "nonsense"}, {}, "unknown pre-tokenizer type: 'nonsense'"),
        ({"ggml__model": "nonsense"}, {}, "unknown tokenizer: 'nonsense'"),
        ({}, {"options": {"kv_type": "q4_0", "flash_attention": "off"}}, "quantized V cache"),
        ({}, {"context_length": 100_000_000}, "context_length 100000000 is more than the model's"),
    ],
    ids=["pre-tokenizer", "tokenizer", "options", "context"],
)
def test_a_failed_load_has_its_reason(
    make: Make,
    load: Callable[..., Engine],
    changed: Any,
    fields: Any,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 12.8: of the library's log, or of a check before; nothing is left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(LoadFailed) as caught:
        load(make(**changed), **fields)
    assert reason in caught.value.message
    assert "Failed to init" not in caught.value.message
    assert not [*tmp_path.glob("llamacpp-*")]


def test_a_context_that_no_memory_holds_is_refused_before(
    make: Make, load: Callable[..., Engine]
) -> None:
    """Issue 12.8: also if the file's header allows it."""
    path = make(context=1 << 40)
    with pytest.raises(LoadFailed, match=r"GB of KV cache, and this machine has .* GB"):
        load(path, context_length=1 << 40)


def test_a_long_path_for_temporary_files_is_no_obstacle(make: Make, tmp_path: Path) -> None:
    """Issue 12.8: the address of a socket has 107 bytes at most."""
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    program = """
import sys
from headrace import ModelWorker
with ModelWorker(sys.argv[1], engine="llamacpp", context_length=256, threads=1) as worker:
    print(worker.generate("hi", max_tokens=1).usage.completion_tokens)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(make())],
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "1\n", ended.stderr
    assert not [*folder.rglob("s.sock")]


def test_where_no_address_is_short_enough_the_error_says_so(
    make: Make, load: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Issue 12.8: on systems without /proc."""
    folder = tmp_path / ("d" * 100)
    folder.mkdir()
    monkeypatch.setattr(link.sys, "platform", "darwin")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(LoadFailed, match="Set TMPDIR to a shorter one"):
        load(make())
    assert not [*folder.iterdir()]


def vocabulary(kind: str, texts: list[str], types: list[int], merges: bool = False) -> Any:
    """The changed pairs of a GGUF with another vocabulary."""
    scores = [-float(place % 7 + 1) for place in range(len(texts))]
    return {
        "words": len(texts),
        "without": (*IDS, "tokenizer.ggml.merges"),
        "ggml__model": kind,
        "ggml__pre": "default",
        "ggml__tokens": (ARRAY, (STRING, texts)),
        "ggml__token_type": (ARRAY, (I32, types)),
        "ggml__scores": (ARRAY, (F32, scores)),
    }


_WORDS = [*("\u2581" + letter for letter in LETTERS), *LETTERS]
VOCABULARIES: dict[str, Any] = {
    "bpe": {},
    "wpm": vocabulary(
        "bert",
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS],
        [3, 2, 3, 3, 3, *[1] * len(_WORDS)],
    ),
    "unigram": vocabulary(
        "t5",
        ["<pad>", "</s>", "<unk>", "\u2581", *_WORDS, "<extra_0>"],
        [3, 3, 2, 1, *[1] * len(_WORDS), 4],
    ),
    "sentencepiece": vocabulary(
        "llama",
        [
            *("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"),
            *(*_WORDS, "<|im_start|>", "aa", "aaaa"),
        ],
        [2, 3, 3, *[6] * 256, 1, *[1] * len(_WORDS), 4, 1, 1],
    ),
}
PARTS = [
    *("<|im_start|>", "<|im_end|>", " ", "  ", "\n", "\n\n", "hello", " world", "😀", "中", "é"),
    *("\x01", "[SEP]", "[CLS]", "<s>", "</s>", "<unk>", "<extra_0>", "aa", "a", "!?", "1", "<|im"),
]


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_long_texts_have_the_same_tokens_in_pieces(
    make: Make, load: Callable[..., Engine], kind: str
) -> None:
    """Issue 11.7: whatever the tokenizer, and with its tokens before and after."""
    engine, chance = load(make(**VOCABULARIES[kind])), random.Random(1)
    for _ in range(12):
        parts = chance.sample(PARTS, chance.randrange(2, 9))
        text = "".join(chance.choice(parts) for _ in range(9000))
        for add_special in (True, False):
            whole = engine._tokens(text, add_special=add_special)
            assert tuple(engine.tokenize(text, add_special=add_special)) == whole


@pytest.mark.parametrize(
    ("kind", "marker"),
    [
        ("bpe", "<|im_start|>"),
        ("bpe", "<|im_end|>\n"),
        ("wpm", "[SEP]"),
        ("sentencepiece", "<|im_start|>"),
        ("sentencepiece", "\n"),
        ("sentencepiece", "😀"),
    ],
)
def test_a_text_that_cannot_fit_is_refused_soon(
    make: Make, load: Callable[..., Engine], kind: str, marker: str
) -> None:
    """Issue 11.7: 3.6 MB of markers took more than 60 s."""
    prompter = Prompter(ModelSpec(name="m", model="m"), load(make(**VOCABULARIES[kind])))
    text = marker * (3_600_000 // len(marker.encode()))
    began = time.monotonic()
    with pytest.raises(ContextOverflow, match="context length"):
        prompter.job(GenerateRequest(prompt=text))
    assert time.monotonic() - began < 5


def test_markers_are_counted_in_time_that_grows_with_them(
    make: Make, load: Callable[..., Engine]
) -> None:
    """Issue 11.7: where nothing limits a text, as for a count."""
    prompter = Prompter(ModelSpec(name="m", model="m"), load(make()))
    began = time.monotonic()
    assert len(prompter.count(CountRequest(text="<|im_start|>" * 300_000))) == 300_000
    assert time.monotonic() - began < 20


def test_words_of_a_real_vocabulary_are_cut_apart(
    load: Callable[..., Engine], smollm2_path: Path
) -> None:
    """Issue 11.7: BPE has places for cuts too, so that a long text can be given up."""
    engine, chance = load(smollm2_path), random.Random(1)
    parts = ["water ", "is wet", ". ", "\n\n", "don't ", "x = 1;", "  ", "Größe ", "100 ", "水 "]
    text = "".join(chance.choice(parts) for _ in range(12_000))
    pieces = [*engine.tokenize_pieces(text, add_special=False)]
    assert len(pieces) > 5
    assert tuple(chain.from_iterable(pieces)) == engine._tokens(text)


@pytest.mark.parametrize(("kind", "sign"), [("bpe", " "), ("sentencepiece", "a")])
def test_what_cannot_be_cut_is_refused_before_it_is_counted(
    make: Make, load: Callable[..., Engine], kind: str, sign: str
) -> None:
    """Issue 11.7: a count of 7 MB of spaces took a core for a minute."""
    prompter = Prompter(ModelSpec(name="m", model="m"), load(make(**VOCABULARIES[kind])))
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match="More than 1048576 bytes"):
        prompter.count(CountRequest(text=sign * 7_000_000))
    assert time.monotonic() - began < 10
    assert len(prompter.count(CountRequest(text="hello world, " * 50_000))) > 100_000


def test_a_server_that_does_not_answer_is_an_error_of_the_engine(
    make: Make, load: Callable[..., Engine]
) -> None:
    """Issue 11.7: and no bug."""
    engine = load(make())
    assert engine._link is not None
    (engine._link.folder / "s.sock").unlink()
    with pytest.raises(GenerationFailed, match="does not answer"):
        engine.tokenize("a", add_special=False)
