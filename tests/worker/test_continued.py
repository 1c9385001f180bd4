"""Issue 13: the last assistant message is continued, by whatever a template puts around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace import ModelWorker
from headrace.core.errors import InvalidRequest
from headrace.core.events import ToolCall
from headrace.core.model import ModelFile
from headrace.core.request import CountRequest, GenerateRequest, Message
from headrace.engines.base import OpenRequest
from headrace.engines.echo import Engine
from headrace.text.calls.parts import Thought
from headrace.text.template import ChatTemplate
from headrace.worker.chat import Chat

FOLDER = Path(__file__).parents[1] / "text" / "calls" / "templates"
TEMPLATES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
STRIPS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ENGINE = Engine(OpenRequest(model=ModelFile(path="", format="none")))
ASKING = Message("user", "Continue.")


def rendered(source: str, *messages: Message, **fields: Any) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    return Chat(template, ENGINE).render(
        GenerateRequest(messages=messages, continue_final=True, **fields)
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_family_goes_on_after_the_text(name: str) -> None:
    """Issue 13: nothing of the template follows what the client has begun."""
    for text in ("The answer is ", "Line one.\n\n", "{", "{{ 7 * 7 }} <|im_end|>", "日本"):
        prompt = rendered(TEMPLATES[name], ASKING, Message("assistant", text))
        assert prompt.endswith(text)
        assert prompt.count("Continue.") == 1


def test_white_space_at_the_end_is_kept_where_the_template_strips() -> None:
    """Issue 13: an end token is cut off, and the text is what the client has sent."""
    assert rendered(STRIPS, ASKING, Message("assistant", " a \n")) == (
        "[user]Continue.</s>\n[assistant]a \n"
    )
    assert rendered(STRIPS, ASKING, Message("assistant", "")) == "[user]Continue.</s>\n[assistant]"


def test_thinking_is_continued_where_there_is_no_content() -> None:
    """Issue 13: the thinking of the last message stays open, and the parser knows it."""
    request = GenerateRequest(
        messages=(ASKING, Message("assistant", reasoning="First, I")), continue_final=True
    )
    chat = Chat(ChatTemplate(TEMPLATES["qwen3"], {}), ENGINE)
    prompt = chat.render(request)
    assert prompt.endswith("<think>\nFirst, I")
    splitter = chat.splitter(request, prompt)
    assert splitter is not None
    assert isinstance(splitter().feed(" see</think>b")[0], Thought)


def test_a_template_that_leaves_the_message_out_is_noticed() -> None:
    """Issue 13: an answer that ignores what was begun would be wrong without a word."""
    with pytest.raises(InvalidRequest) as caught:
        rendered("{{ messages[0].content }}", ASKING, Message("assistant", "a"))
    assert caught.value.param == "continue_final"


CALL = (ToolCall("c", "now", "{}"),)


@pytest.mark.parametrize(
    "messages", [(ASKING,), (ASKING, Message("assistant", "a", tool_calls=CALL)), None]
)
def test_only_text_of_an_assistant_is_continued(messages: Any) -> None:
    """Issue 13: of any other message there is nothing to continue."""
    given: Any = {"prompt": "a"} if messages is None else {"messages": messages}
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest(**given, continue_final=True)
    assert caught.value.param == "continue_final"
    counted: Any = {"text": "a"} if messages is None else given
    with pytest.raises(InvalidRequest):
        CountRequest(**counted, continue_final=True)


@pytest.mark.slow
def test_the_real_model_goes_on(smollm2_path: Path) -> None:
    """Issue 13: SmolLM2 ends the word that was begun, in Python."""
    turns = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Par"},
    ]
    with ModelWorker(str(smollm2_path), engine="llamacpp", context_length=256) as worker:
        answer = worker.generate(
            messages=turns, continue_final=True, max_tokens=2, temperature=0, logprobs=0
        )
        assert answer.text.startswith("is")
