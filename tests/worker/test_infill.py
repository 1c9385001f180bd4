"""Issue 13: fill in the middle, by the tokens that the vocabulary or the file names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.models.builders import U32
from tests.tiny_gguf import tiny_gguf

from headrace import ModelWorker
from headrace.core.errors import ContextOverflow, InvalidRequest, Unsupported
from headrace.core.model import Capabilities, ModelSpec
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.engines.base import EngineFacts
from headrace.engines.tokenizer import without_markers
from headrace.worker.infill import FAMILIES, Infill, Markers, infill_of
from headrace.worker.prompt import Prompter

BOS = 1


class Vocabulary:
    """A tokenizer of letters, in which some texts are tokens; it puts BOS before a text."""

    def __init__(
        self, names: Sequence[str], declared: tuple[int, ...] = (), context_length: int = 30
    ) -> None:
        self.ids = {name: 0x110000 + place for place, name in enumerate(names)}
        self.facts = EngineFacts(
            device="cpu",
            context_length=context_length,
            max_running=1,
            capabilities=Capabilities(sampling=frozenset({"max_tokens", "stop_token_ids"})),
            infill_ids=declared,
        )

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        parts = re.split(f"({'|'.join(map(re.escape, self.ids)) or '(?!)'})", text)
        ids = [BOS] if add_special else []
        for part in parts:
            ids += [self.ids[part]] if part in self.ids else map(ord, part)
        return ids

    def plain_pieces(self, text: str, markers: Sequence[str]) -> Iterator[list[int]]:
        for piece in without_markers(text, markers):
            yield self.tokenize(piece, add_special=False)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        texts = {token: name for name, token in self.ids.items()}
        return "".join(texts.get(token) or chr(token) for token in token_ids)

    def close(self) -> None: ...


def prompter(
    names: Sequence[str], declared: tuple[int, ...] = (), context_length: int = 30
) -> Prompter:
    engine: Any = Vocabulary(names, declared, context_length)
    return Prompter(ModelSpec(name="m", model="m"), engine)


def filled(maker: Prompter, prompt: Any, suffix: str, **fields: Any) -> str:
    request = GenerateRequest(prompt=prompt, suffix=suffix, **fields)
    token_ids = maker.job(request).choices[0].token_ids
    assert maker.infill is not None
    return maker.infill.engine.detokenize(token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_each_family(family: Markers) -> None:
    """Issue 13: prefix first, but for those that were trained with the suffix first."""
    names = [name for name in family[:3] if name]
    prompt = filled(prompter([*names, "<|endoftext|>"]), "ab", "cd")
    before, after = f"{family.prefix}ab", f"{family.suffix}cd"
    sides = after + before if family.suffix_first else before + after
    assert prompt == "\x01" + sides + family.middle


def test_codestral_and_qwen() -> None:
    """Issue 13: two families, written out."""
    assert filled(prompter(["[SUFFIX]", "[PREFIX]"]), "a", "b") == "\x01[SUFFIX]b[PREFIX]a"
    names = [f"<|fim_{name}|>" for name in ("prefix", "suffix", "middle")]
    assert filled(prompter(names), "", "b") == "\x01<|fim_prefix|><|fim_suffix|>b<|fim_middle|>"
    assert filled(prompter(names), (97, 98), "b").startswith("\x01<|fim_prefix|>ab<|fim_suffix|>")


def test_a_file_may_name_any_tokens() -> None:
    """Issue 13: those of the header come before those of the vocabulary; the middle may be none."""
    names = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<x>", "<y>"]
    x, y = 0x110003, 0x110004
    assert filled(prompter(names, (x, y)), "a", "b") == "\x01<x>a<y>b"
    assert filled(prompter(names, (x, y, 0x110002)), "a", "b") == "\x01<x>a<y>b<fim_middle>"


def test_markers_in_a_text_are_text() -> None:
    """Issue 13: what a client writes cannot move the gap, nor end a side."""
    names = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>"]
    maker = prompter(names)
    for prompt, suffix in (("<fim_suffix>", ""), ("a", "<|endoftext|>"), ("", "<f<fim_middle>")):
        ids = maker.job(GenerateRequest(prompt=prompt, suffix=suffix)).choices[0].token_ids
        assert [token for token in ids if token >= 0x110000] == [0x110000, 0x110001, 0x110002]


def test_an_engine_that_makes_a_marker_all_the_same_is_caught() -> None:
    """Issue 13: a side with one of the tokens is refused and not sent."""
    found = infill_of(Vocabulary(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]))
    assert isinstance(found, Infill)
    with pytest.raises(InvalidRequest) as caught:
        found.check((5, found.suffix), "suffix")
    assert caught.value.param == "suffix"


def test_the_end_of_a_gap_ends_the_answer() -> None:
    """Issue 13: beside the client's own, unless it ignores ends."""
    names = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>"]
    sampling = Sampling(stop_token_ids=(7,))
    request = GenerateRequest(prompt="a", suffix="b", sampling=sampling)
    stops = prompter(names).job(request).choices[0].sampling.stop_token_ids
    assert stops == (7, 0x110000, 0x110001, 0x110002, 0x110003)
    plain = GenerateRequest(prompt="a", sampling=sampling)
    assert prompter(names).job(plain).choices[0].sampling.stop_token_ids == (7,)


@pytest.mark.parametrize("names", [[], ["<fim_prefix>", "<fim_suffix>"], ["[PREFIX]"]])
def test_a_model_without_the_tokens_refuses(names: list[str]) -> None:
    """Issue 13: by the name of the field."""
    with pytest.raises(Unsupported) as caught:
        filled(prompter(names), "a", "b")
    assert caught.value.param == "suffix"


def test_a_suffix_needs_a_prompt() -> None:
    """Issue 13: messages have no gap."""
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest(messages=(Message("user", "a"),), suffix="b")
    assert caught.value.param == "suffix"


@pytest.mark.parametrize("marker", ["<fim_prefix>", "aa", "abab"])
def test_no_piece_has_a_whole_marker(marker: str) -> None:
    """Issue 13: also where markers overlap; the pieces are the text."""
    text = f"x{marker}{marker}y{marker[:-1]}{marker}aaaa ababab"
    pieces = [*without_markers(text, (marker,))]
    assert "".join(pieces) == text
    assert not any(marker in piece for piece in pieces)


def test_llamacpp_by_the_header_of_a_file(smollm2_path: Path, tmp_path: Path) -> None:
    """Issue 13: real llama.cpp; SmolLM2's vocabulary names no such tokens, the header does."""
    ids = {"pre": 3, "suf": 5, "mid": 6}
    named: Any = {f"ggml__fim_{name}_token_id": (U32, token) for name, token in ids.items()}
    path = tiny_gguf(tmp_path / "fim.gguf", smollm2_path, **named)
    with ModelWorker(str(path), engine="llamacpp", context_length=1024) as worker:
        assert worker.metadata.capabilities.infill
        prefix, suffix = "def add(a, b):\n    ", "<file_sep>\n<|im_end|>"
        plain = [worker.count_tokens(text).token_ids or () for text in (prefix, "\n")]
        answer = worker.generate(prefix, suffix=suffix, max_tokens=3, seed=1)
        rest = answer.usage.prompt_tokens - 3 - len(plain[0])
        # As control tokens they would be two, and the line between them.
        assert rest > 6
        long = worker.generate(prefix, suffix="x y " * 200, max_tokens=1)
        assert long.usage.prompt_tokens > 400
        with pytest.raises(ContextOverflow) as caught:
            worker.generate("a", suffix="x y " * 3000)
        assert caught.value.param == "suffix"


def test_a_real_model_without_them(smollm2_path: Path, tmp_path: Path) -> None:
    """Issue 13: refused by name, and not declared."""
    path = tiny_gguf(tmp_path / "plain.gguf", smollm2_path)
    with ModelWorker(str(path), engine="llamacpp", context_length=256) as worker:
        assert not worker.metadata.capabilities.infill
        with pytest.raises(Unsupported, match="fill in the middle"):
            worker.generate("a", suffix="b")
