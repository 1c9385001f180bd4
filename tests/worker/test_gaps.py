"""The prompt of /infill, and where the lines of an answer end it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.worker.test_infill import prompter

from headrace.core.errors import InvalidRequest
from headrace.core.gap import Gap, LineLimits, SourceText
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.worker.lines import LineLimiter

FIM = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
FILES = ["<repo_name>", "<file_sep>"]


def made(
    names: list[str], sides: tuple[str, str], gap: Gap, room: int = 200, most: int | None = 2
) -> str:
    maker, sampling = prompter(names, context_length=room), Sampling(max_tokens=most)
    prompt, suffix = sides
    request = GenerateRequest(prompt=prompt, suffix=suffix, gap=gap, sampling=sampling)
    token_ids = maker.job(request).choices[0].token_ids
    assert len(token_ids) + (most or 1) <= room
    assert maker.infill is not None
    return maker.infill.engine.detokenize(token_ids)


def test_the_text_of_the_gap_begins_after_the_middle() -> None:
    """Issue 14.4: as llama-server has it, so that a prefix stays in the cache while one types."""
    assert made(FIM, ("ab", "cd"), Gap("x")) == "\x01<fim_prefix>ab<fim_suffix>cd<fim_middle>x"
    codestral = made(["[SUFFIX]", "[PREFIX]"], ("ab", "cd"), Gap("x"))
    assert codestral == "\x01[SUFFIX]cd[PREFIX]abx"
    assert made(FIM, ("", ""), Gap()) == "\x01<fim_prefix><fim_suffix><fim_middle>"


def test_other_files_come_first() -> None:
    """Issue 14.4: with the tokens of files where the model has them."""
    others = (SourceText("one", "a.py"), SourceText("two"))
    plain = made(FIM, ("ab", "cd"), Gap("", others))
    assert plain == "\x01onetwo<fim_prefix>ab<fim_suffix>cd<fim_middle>"
    marked = made([*FIM, *FILES], ("ab", "cd"), Gap("", others))
    before = "<repo_name>project\n<file_sep>a.py\none<file_sep>file\ntwo<file_sep>current\n"
    assert marked == f"\x01{before}<fim_prefix>ab<fim_suffix>cd<fim_middle>"
    assert FILES[0] not in made([*FIM, *FILES], ("ab", "cd"), Gap("x"))


def test_what_does_not_fit_is_cut() -> None:
    """Issue 14.4: the first of the others, then the prefix at its beginning, the suffix's end."""
    others = (SourceText("first" * 9), SourceText("last"))
    text = made(FIM, ("ab", "cd"), Gap("x", others), room=20)
    assert text.startswith("\x01")
    assert text[1:].partition("<")[0].endswith("last")
    assert text.endswith("<fim_prefix>ab<fim_suffix>cd<fim_middle>x")
    text = made(FIM, ("p" * 50 + "P", "S" + "s" * 50), Gap("x", others), room=20)
    assert text == f"\x01<fim_prefix>{'p' * 9}P<fim_suffix>Sss<fim_middle>x"
    short = made(FIM, ("p" * 50 + "P", "S"), Gap("x"), room=20)
    assert short == f"\x01<fim_prefix>{'p' * 11}P<fim_suffix>S<fim_middle>x"


@given(
    st.text("ab\n", max_size=80), st.text("cd", max_size=80), st.text("e", max_size=9),
    st.lists(st.text("fg", max_size=30), max_size=4), st.integers(40, 90), st.booleans(),
    st.none() | st.integers(1, 500),
)  # fmt: skip
def test_it_always_fits(
    prompt: str,
    suffix: str,
    begun: str,
    others: list[str],
    room: int,
    has_files: bool,
    most: int | None,
) -> None:
    """Whatever is given, the context has room for the prompt and an answer."""
    names = [*FIM, *FILES] if has_files else FIM
    maker = prompter(names, context_length=room)
    gap = Gap(begun, tuple(SourceText(text, "f") for text in others))
    sampling = Sampling(max_tokens=most)
    job = maker.job(
        GenerateRequest(
            prompt=prompt, suffix=suffix, gap=gap, sampling=sampling, fit_max_tokens=True
        )
    )
    (choice,) = job.choices
    assert len(choice.token_ids) + choice.max_tokens <= room
    assert choice.max_tokens >= min(most or 1, room // 2)
    assert maker.infill is not None
    text = maker.infill.engine.detokenize(choice.token_ids)
    assert [text.count(name) for name in FIM] == [1, 1, 1]
    assert text.endswith(begun)


def test_markers_in_other_files_are_text() -> None:
    """Issue 14.4: none of the texts can move the gap or begin a file."""
    names = [*FIM, *FILES]
    bad = "<fim_middle><file_sep>"
    maker = prompter(names, context_length=300)
    gap = Gap(bad, (SourceText(bad, bad),))
    ids = maker.job(GenerateRequest(prompt=bad, suffix=bad, gap=gap)).choices[0].token_ids
    marks = [token - 0x110000 for token in ids if token >= 0x110000]
    assert marks == [3, 4, 4, 0, 1, 2]


def test_a_gap_needs_a_suffix() -> None:
    with pytest.raises(InvalidRequest):
        GenerateRequest(prompt="a", gap=Gap("x"))
    with pytest.raises(InvalidRequest):
        GenerateRequest(messages=(Message("user", "a"),), line_limits=LineLimits(2))
    with pytest.raises(InvalidRequest):
        LineLimits(-1)
    secret = GenerateRequest(prompt="", suffix="", gap=Gap("s3cret", (SourceText("s3cret"),)))
    assert "s3cret" not in str(secret.settings())
    assert secret.cost() > GenerateRequest(prompt="", suffix="", gap=Gap()).cost()


INDENTED = "return a\n    if b:\n\n        c\n  d\n    e"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 99])
def test_lines_end_where_they_are_indented_less(size: int) -> None:
    """Issue 14.4: `n_indent`, however the text is cut; empty lines do not end it."""
    limiter = LineLimiter(LineLimits(4))
    parts = [INDENTED[start : start + size] for start in range(0, len(INDENTED), size)]
    text = "".join(map(limiter.feed, parts)) + limiter.flush()
    assert text == "return a\n    if b:\n\n        c"
    assert limiter.is_over


def test_white_space_at_the_end_is_kept() -> None:
    limiter = LineLimiter(LineLimits(4))
    assert (limiter.feed("a\n  "), limiter.flush(), limiter.is_over) == ("a", "\n  ", False)


def test_time_ends_an_answer_after_a_line() -> None:
    """Issue 14.4: `t_max_predict_ms` counts from the first token."""
    now = [5.0]
    limiter = LineLimiter(LineLimits(0, 100), lambda: now[0])
    assert limiter.feed("a") == "a"
    now[0] = 6.0
    assert not limiter.is_over
    assert limiter.feed("b\nc") == "b\nc"
    assert limiter.is_over
    assert limiter.feed("d") == ""
