"""Answers of others in a model's own tokens: they follow the prompt, end once, and read as the same message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from leyden.conversations import same_calls
from leyden.interfaces import GenerationRequest, Tokenises
from leyden_plugins.chat.prompts import Prompts
from leyden_plugins.chat.templates import Chat
from leyden_plugins.chat.text import Codec
from leyden_plugins.engines.openai_compatible import OpenAICompatibleEngine
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.engines.vllm import VLLMEngine
from tests.gateway.test_real_templates import ENDS, published
from tests.tiny import END, HERMES_TEMPLATE, PLAIN_TEMPLATE, VOCABULARY, tiny_tokenizer

ASKED: Sequence[Mapping[str, object]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "é", "n": 2}'}}


def tiny(template: str = PLAIN_TEMPLATE) -> Prompts:
    return Prompts(chat=Chat(Codec(tiny_tokenizer(template))), vocabulary=VOCABULARY, eos=frozenset({END}))


def real(name: str) -> Prompts:
    chat, end = published(name)
    return Prompts(chat=chat, vocabulary=1000, eos=frozenset({end}))


def request(messages: Sequence[Mapping[str, object]] = ASKED, tools: Sequence[object] = ()) -> GenerationRequest:
    return GenerationRequest(model="sql", messages=messages, tools=tools)  # type: ignore[arg-type]


def said(text: str, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}


def spelled(prompts: Prompts, found: tuple[Sequence[int], Sequence[int]] | None) -> str:
    assert found is not None
    return prompts.decode(found[1])


def test_the_prompt_is_what_an_engine_would_ask_and_the_answer_is_its_text_and_one_end() -> None:
    prompts = tiny()
    found = prompts.tokenised(request(), said("Because é."))
    assert found is not None
    assert found[0] == prompts.prompt(request())
    assert list(found[1]) == [*prompts.encode("Because é."), END]


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, HERMES_TEMPLATE])
def test_tool_calls_come_back_as_the_same_calls(template: str) -> None:
    prompts = tiny(template)
    found = prompts.tokenised(request(tools=[TOOL]), said("I look.", tool_calls=[CALL]))
    assert found is not None
    parsed = prompts.chat.parse(prompts.chat.codec.decode(found[1][:-1], prompts.chat.shown))
    assert parsed.text == "I look."
    assert same_calls(parsed.calls, [CALL])


@pytest.mark.parametrize("engine", [TransformersEngine, VLLMEngine, OpenAICompatibleEngine])
def test_every_engine_tokenises(engine: type) -> None:
    assert issubclass(engine, Tokenises)


def test_a_later_turn_begins_with_the_whole_conversation() -> None:
    prompts = tiny()
    messages = [*ASKED, said("", tool_calls=[CALL]), {"role": "tool", "content": "4", "tool_call_id": "call_1"}]
    found = prompts.tokenised(request(messages, [TOOL]), said("Four."))
    assert (
        found is not None
        and "look" in prompts.decode(found[0])
        and found[0] == prompts.prompt(request(messages, [TOOL]))
    )


@pytest.mark.parametrize(
    "answer",
    [
        said("half<|end|>other half"),
        said("<|call|>look {}"),
        said("I call it.", tool_calls=[{**CALL, "function": {"name": "look", "arguments": "no json"}}]),
    ],
    ids=["an end within", "text that reads as a call", "a call that no engine would read"],
)
def test_an_answer_that_would_be_read_as_another_is_none(answer: dict[str, object]) -> None:
    assert tiny().tokenised(request(tools=[TOOL]), answer) is None


def test_an_answer_without_an_end_is_none() -> None:
    prompts = tiny("{% for message in messages %}{{ message.content }}{% endfor %}")
    assert prompts.tokenised(request(), said("Because.")) is None


def test_a_prompt_that_the_answer_takes_words_from_is_none() -> None:
    template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>Let me think: {% endif %}"
    )
    assert tiny(template).tokenised(request(), said("Because.")) is None


def test_a_template_that_leaves_calls_out_is_none() -> None:
    prompts = tiny(
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert prompts.tokenised(request(), said("I look.")) is not None
    assert prompts.tokenised(request(tools=[TOOL]), said("I look.", tool_calls=[CALL])) is None


def test_an_answer_that_grows_together_with_the_prompt_is_none() -> None:
    """A tokenizer that joins the prompt's last letter with the answer's first: no sampled answer looks like that."""
    bare = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "!": 3}, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="!")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}!{% else %}a{% endif %}"
        "{% endfor %}"
    )
    prompts = Prompts(chat=Chat(Codec(tokenizer)), vocabulary=4, eos=frozenset({3}))
    asked = request([{"role": "user", "content": "b"}])
    assert prompts.tokenised(asked, said("a")) == ((1, 0), (0, 3))
    assert prompts.tokenised(asked, said("b")) is None


def test_special_tokens_in_front_of_every_answer_are_the_models_to_say() -> None:
    template = (
        "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}<|tool|>{% endif %}"
        "{{ message.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    prompts = tiny(template)
    assert spelled(prompts, prompts.tokenised(request(), said("Because."))) == "<|tool|>Because.<|end|>"


WITHOUT_SYSTEM = ("gemma",)
TRIMMED_PROMPT = ("deepseekv3",)
"""Its prompt opens a thought which a rendered answer does not have."""


@pytest.mark.parametrize("name", [name for name in ENDS if name not in TRIMMED_PROMPT])
def test_published_templates_give_the_text_and_the_end_token_and_nothing_else(name: str) -> None:
    prompts = real(name)
    messages = ASKED[1:] if name in WITHOUT_SYSTEM else ASKED
    found = prompts.tokenised(request(messages), said("There are 4, é."))
    text = spelled(prompts, found)
    assert text.strip() == f"There are 4, é.{ENDS[name]}"
    assert found is not None and found[0] == prompts.prompt(request(messages))


@pytest.mark.parametrize("name", TRIMMED_PROMPT)
def test_published_templates_that_open_a_thought_in_the_prompt_are_none(name: str) -> None:
    assert real(name).tokenised(request(), said("There are 4.")) is None


def test_a_thought_is_written_where_the_template_writes_one() -> None:
    prompts = real("qwen3")
    text = spelled(prompts, prompts.tokenised(request(), said("Four.", reasoning_content="I count them.")))
    assert text == "<think>\nI count them.\n</think>\n\nFour.<|im_end|>"
    plain = tiny()
    assert (
        spelled(plain, plain.tokenised(request(), said("Four.", reasoning_content="I count them."))) == "Four.<|end|>"
    )


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507"])
def test_published_tool_templates_write_calls_that_are_read_back(name: str) -> None:
    prompts = real(name)
    found = prompts.tokenised(request(tools=[TOOL]), said("", tool_calls=[CALL]))
    text = spelled(prompts, found)
    assert text.startswith("<tool_call>") and text.endswith("</tool_call><|im_end|>")
