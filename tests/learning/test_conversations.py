"""Recorded requests of four protocols become the same chat messages and tools."""

from __future__ import annotations

import pytest

from leyden.conversations import asked_messages, chat_messages, function_tools, same_calls
from leyden.errors import DatasetError
from leyden.wire.protocols import told_beside

CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
TOOL = {"type": "function", "function": {"name": "look"}}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "tool_call_id": "c1"},
]
CHAT = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL], "refusal": None, "annotations": []},
    {"role": "tool", "content": "4", "tool_call_id": "c1"},
]
RESPONSES = [
    {"role": "system", "content": "Be brief."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Why?"}]},
    {"type": "reasoning", "summary": []},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
    {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": 1}'},
    {"type": "function_call_output", "call_id": "c1", "output": "4"},
]
ANTHROPIC = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "..."},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": 1}},
        ],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "4"}]},
]
GENAI = [
    {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]},
    {"role": "user", "parts": [{"type": "text", "content": "Why?"}]},
    {
        "role": "assistant",
        "parts": [
            {"type": "text", "content": "I look."},
            {"type": "tool_call", "id": "c1", "name": "look", "arguments": {"at": 1}},
        ],
    },
    {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "4"}]},
]


@pytest.mark.parametrize(
    "recorded", [CHAT, RESPONSES, ANTHROPIC, GENAI], ids=["chat", "responses", "messages", "genai"]
)
def test_every_protocol_gives_the_same_messages(recorded: list[object]) -> None:
    assert chat_messages(recorded) == CONVERSATION


def test_langchains_calls_are_not_counted_twice_beside_the_blocks_they_were_read_from() -> None:
    item = {"type": "function_call", "call_id": "c1", "id": "fc_1", "name": "look", "arguments": '{"at": 1}'}
    for content in (ANTHROPIC[2]["content"], [{"type": "text", "text": "I look."}, item]):
        message = {"role": "assistant", "content": content}
        assert chat_messages([message]) == chat_messages([{**message, "tool_calls": [CALL]}]) == [CONVERSATION[2]]


def test_a_bare_prompt_is_what_a_user_said_and_a_refusal_is_content() -> None:
    assert chat_messages("Why?") == [{"role": "user", "content": "Why?"}]
    assert chat_messages([{"role": "assistant", "content": None, "refusal": "No."}])[0]["content"] == "No."


def test_instructions_that_stand_apart_come_first() -> None:
    apart = {
        "gen_ai.input.messages": GENAI[1:],
        "gen_ai.system_instructions": [{"type": "text", "content": "Be brief."}],
    }
    assert asked_messages(apart) == asked_messages({**apart, "gen_ai.input.messages": GENAI}) == CONVERSATION
    assert asked_messages({"gen_ai.input.messages": GENAI[1:]}) == CONVERSATION[1:]


def test_a_failed_tool_says_so_and_text_beside_results_stays() -> None:
    parts = [
        {
            "type": "tool_result",
            "tool_use_id": "c1",
            "content": [{"type": "text", "text": "no file"}],
            "is_error": True,
        },
        {"type": "text", "text": "Go on."},
    ]
    assert chat_messages([{"role": "user", "content": parts}]) == [
        {"role": "tool", "content": "Error: no file", "tool_call_id": "c1"},
        {"role": "user", "content": "Go on."},
    ]


@pytest.mark.parametrize(
    ("recorded", "match"),
    [
        (None, "without its messages"),
        ([], "without its messages"),
        (["x"], "a message is 'str'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "part of type 'image_url'"),
        ([{"type": "web_search_call"}], "item of type 'web_search_call'"),
        ([{"role": "function", "content": "4"}], "role 'function'"),
        ([{"role": "assistant", "content": 4}], "neither text nor parts"),
        ([{"role": "assistant", "tool_calls": [{"type": "custom"}]}], "has no name"),
    ],
)
def test_what_is_no_text_is_refused(recorded: object, match: str) -> None:
    with pytest.raises(DatasetError, match=match):
        chat_messages(recorded)


def test_tools_of_every_protocol_become_the_same_functions() -> None:
    schema = {"type": "object"}
    wanted = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": schema}}
    described = {"name": "look", "description": "Looks."}
    chat = {"type": "function", "function": {**described, "parameters": schema, "strict": True}}
    flat = {"type": "function", **described, "parameters": schema}
    anthropic = {**described, "input_schema": schema}
    assert function_tools([chat, flat, anthropic]) == [wanted] * 3
    assert function_tools(None) == []
    for hosted in ({"type": "web_search"}, {"type": "custom", "name": "shell"}):
        with pytest.raises(DatasetError, match="is no function"):
            function_tools([hosted])


def test_calls_are_the_same_whatever_the_spelling_of_their_arguments() -> None:
    spaced = {"id": "other", "function": {"name": "look", "arguments": '{ "at" : 1 }'}}
    assert same_calls([CALL], [spaced])
    assert not same_calls([CALL], [{"function": {"name": "look", "arguments": '{"at": 2}'}}])
    assert not same_calls([CALL], [])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"tools": [TOOL]}, {"gen_ai.tool.definitions": [TOOL]}),
        ({"tools": [TOOL], "tool_choice": "none"}, {}),
        ({"tools": [TOOL], "tool_choice": {"type": "none"}}, {}),
        ({"tools": [TOOL], "tool_choice": {"type": "auto"}}, {"gen_ai.tool.definitions": [TOOL]}),
        ({"previous_response_id": "resp_1"}, {"leyden.previous_response": "resp_1"}),
        ({"conversation": {"id": "conv_1"}}, {"leyden.previous_response": {"id": "conv_1"}}),
        ({"tools": []}, {}),
    ],
)
def test_spans_say_what_a_model_is_told_beside_its_messages(body: dict[str, object], told: dict[str, object]) -> None:
    assert told_beside(body) == told
