"""Published chat templates: what exact continuation adds is what rendering the whole conversation would add."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from leyden_plugins.chat.templates import PROBE_ANSWER, Chat
from leyden_plugins.chat.text import Codec

MARKS = re.compile(r"<[|｜][^<>|｜'\"{}]+[|｜]>|<(?:start|end)_of_turn>")

ENDS = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "phi3": "<|end|>",
    "gemma": "<end_of_turn>",
    "lfm2": "<|im_end|>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
}
"""Template -> the token with which its models end an answer."""

REWRITING = ("qwen3", "deepseekv3")
"""They ask for an answer with words that they leave out once it is there."""

ASKED: Sequence[Mapping[str, object]] = [{"role": "user", "content": "How many cities?"}]
AGAIN: Sequence[Mapping[str, object]] = [{"role": "user", "content": "Are you sure?"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def published(name: str) -> tuple[Chat, int]:
    """Return a template with a byte-level tokenizer that has its special tokens, and its end token."""
    template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    special = sorted({*MARKS.findall(template), ENDS[name], "<bos>"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*special, *alphabet])}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<bos>", eos_token=ENDS[name], extra_special_tokens=special
    )
    tokenizer.chat_template = template
    chat = Chat(Codec(tokenizer))
    (end,) = chat.codec.encode(ENDS[name])
    return chat, end


def spliced(
    chat: Chat,
    end: int,
    messages: Sequence[Mapping[str, object]],
    said: str,
    *,
    tools: Sequence[Mapping[str, object]] = (),
) -> list[int]:
    """Return the prompt that goes on exactly after the second message, which was sampled as `said`."""
    answer = [*chat.codec.encode(said), end]
    added = chat.continuation(messages, 1, answer, tools=tools, ends=frozenset({end}))
    assert added is not None
    return [*chat.prompt(messages[:1], tools), *answer, *added]


def text_of(chat: Chat, tokens: Sequence[int]) -> str:
    return chat.codec.decode(tokens, chat.codec.special)


@pytest.mark.parametrize("name", [name for name in ENDS if name not in REWRITING])
def test_a_conversation_that_the_template_does_not_rewrite_gets_the_same_prompt_token_by_token(name: str) -> None:
    chat, end = published(name)
    messages = [*ASKED, {"role": "assistant", "content": "There are 4, é."}, *AGAIN]
    assert spliced(chat, end, messages, "There are 4, é.") == list(chat.prompt(messages, ()))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "lfm2"])
def test_a_sampled_end_is_not_repeated_and_a_missing_one_is_added(name: str) -> None:
    chat, end = published(name)
    messages = [*ASKED, {"role": "assistant", "content": "half"}, *AGAIN]
    ended = chat.continuation(messages, 1, [*chat.codec.encode("half"), end], tools=(), ends=frozenset({end}))
    cut = chat.continuation(messages, 1, chat.codec.encode("half"), tools=(), ends=frozenset({end}))
    assert ended is not None and cut == (end, *ended)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma"])
def test_words_that_stand_for_the_answer_may_be_in_a_message_or_a_tool(name: str) -> None:
    chat, end = published(name)
    words = f"What is {PROBE_ANSWER}, and {PROBE_ANSWER}_0?"
    tools = [{"type": "function", "function": {"name": f"{PROBE_ANSWER}_1", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": words}]},
        {"role": "assistant", "content": "There are 4."},
        {"role": "user", "content": [{"type": "text", "text": words[:20]}, {"type": "text", "text": words[20:]}]},
    ]
    for given in ((), tools):
        assert spliced(chat, end, messages, "There are 4.", tools=given) == list(chat.prompt(messages, given))


def test_a_template_that_shows_the_answer_twice_is_not_continued() -> None:
    chat, end = published("qwen2_5")
    chat.codec.tokenizer.chat_template += "{{ messages[1].content if messages | length > 1 }}"
    messages = [*ASKED, {"role": "assistant", "content": "half"}, *AGAIN]
    assert chat.continuation(messages, 1, chat.codec.encode("half"), tools=(), ends=frozenset({end})) is None


def test_qwen3_keeps_the_reasoning_that_its_template_drops() -> None:
    chat, end = published("qwen3")
    said = "<think>\nI count.\n</think>\n\nThere are 4."
    messages = [*ASKED, {"role": "assistant", "content": said}, *AGAIN]
    assert text_of(chat, spliced(chat, end, messages, said)) == (
        "<|im_start|>user\nHow many cities?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nI count.\n</think>\n\nThere are 4.<|im_end|>\n"
        "<|im_start|>user\nAre you sure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "I count." not in text_of(chat, chat.prompt(messages, ()))


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_a_tool_call_keeps_its_spelling_and_its_result_follows_as_rendered(name: str) -> None:
    chat, end = published(name)
    said = '<tool_call>\n{"name":"look","arguments":{"q":1}}\n</tool_call>'
    (call,) = chat.parse(said).calls
    messages = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "42"}]
    whole = text_of(chat, spliced(chat, end, messages, said, tools=[TOOL]))
    rendered = text_of(chat, chat.prompt(messages, [TOOL]))
    after = "<|im_end|>\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert whole == text_of(chat, chat.prompt(ASKED, [TOOL])) + said + after
    assert rendered.endswith(after) and said not in rendered
