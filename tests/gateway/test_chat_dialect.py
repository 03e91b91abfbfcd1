"""What chat requests mean, and how their answers are spelled. No server: the dialect alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from leyden.interfaces import Delta, SamplingParameters
from leyden_plugins.gateway.dialects import Answer, ChoiceSoFar, Question
from leyden_plugins.gateway.dialects.chat import ChatDialect
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal
from tests.gateway.builders import ask, events

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def read(body: dict[str, object], decode: Any = None) -> Question:
    return ChatDialect().read(body, decode=decode, memory=Memory())


def refusal(body: dict[str, object]) -> Refusal:
    with pytest.raises(Refusal, match=r"\w") as caught:
        read(body)
    assert caught.value.status == 400
    return caught.value


def answered(*deltas: Delta, n: int = 1) -> Answer:
    answer = Answer(
        answer_id="a", created_seconds=1, prompt_token_ids=[7, 8], choices=[ChoiceSoFar() for _ in range(n)]
    )
    for delta in deltas:
        answer.choices[delta.index].take(delta)
    return answer


def streamed(question: Question, *deltas: Delta, n: int = 1) -> list[Any]:
    answer = answered(n=n)
    raw = question.first(answer)
    for delta in deltas:
        answer.choices[delta.index].take(delta)
        raw += question.chunk(answer, delta)
    return events(raw + question.last(answer))


def test_every_sampling_field_reaches_the_request() -> None:
    asked = read(
        ask(
            temperature=0.5,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            frequency_penalty=1,
            presence_penalty=-1,
            seed=3,
            stop=["a", "b"],
            max_completion_tokens=9,
            max_tokens=4,
            n=2,
        )
    )
    assert asked.request.sampling == SamplingParameters(
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        frequency_penalty=1.0,
        presence_penalty=-1.0,
        seed=3,
        stop=("a", "b"),
        max_tokens=9,
        n=2,
    )


def test_null_fields_mean_the_same_as_absent_ones() -> None:
    fields = ["temperature", "top_p", "seed", "stop", "n", "tools", "tool_choice", "stream", "logit_bias", "functions"]
    assert read(ask() | dict.fromkeys(fields)).request == read(ask()).request


def test_a_single_stop_string_and_vllms_minus_one_top_k_are_understood() -> None:
    sampling = read(ask(stop="x", top_k=-1)).request.sampling
    assert (sampling.stop, sampling.top_k) == (("x",), 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 1.5),
        ("top_k", -2),
        ("n", 0),
        ("n", 129),
        ("n", 10**30),
        ("max_tokens", 0),
        ("max_completion_tokens", -1),
        ("seed", "1"),
        ("stop", ""),
        ("stop", [1]),
        ("stop", ["x"] * 17),
        ("stream", 1),
        ("stream_options", []),
        ("logprobs", 1),
        ("top_logprobs", 2),
        ("tools", {}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "look"}}),
        ("tool_choice", "sometimes"),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {}, "name": 3}}),
        ("response_format", {"type": "grammar"}),
        ("response_format", "json"),
        ("messages", []),
        ("messages", "hello"),
        ("model", None),
    ],
)
def test_a_wrong_value_is_refused_with_the_field_named(field: str, value: object) -> None:
    assert refusal(ask() | {field: value}).param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"1": 2}),
        ("audio", {}),
        ("modalities", ["text", "audio"]),
        ("functions", [{}]),
        ("function_call", "auto"),
        ("repetition_penalty", 1.1),
        ("best_of", 2),
        ("no_such_field", 1),
    ],
)
def test_an_unsupported_field_that_changes_the_answer_is_refused_by_name(field: str, value: object) -> None:
    found = refusal(ask() | {field: value})
    assert found.param == field
    assert repr(field) in found.message


def test_fields_without_meaning_for_sampling_are_accepted() -> None:
    body = ask(
        user="u",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        parallel_tool_calls=False,
        safety_identifier="s",
        prompt_cache_key="k",
        response_format={"type": "text"},
        logit_bias={},
        modalities=["text"],
        repetition_penalty=1.0,
        top_logprobs=0,
        reasoning_effort="low",
        verbosity="low",
        prediction={"type": "content", "content": "x"},
        prompt_cache_options={"mode": "implicit"},
        tools=[],
        functions=[],
        function_call=None,
        stream_options=None,
    )
    assert read(body).request == read(ask()).request


def test_developer_speaks_as_system_and_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "rules"}, {"role": "user", "content": parts, "name": "ann"}]
    assert read(ask() | {"messages": messages}).request.messages == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "a\nb", "name": "ann"},
    ]


def test_an_assistant_message_as_clients_send_it_back_is_understood() -> None:
    message = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [CALL | {"index": 0}],
    }
    result = {"role": "tool", "content": "42", "tool_call_id": "c1"}
    assert read(ask() | {"messages": [message, result]}).request.messages == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        result,
    ]


def test_a_refusal_of_the_assistant_is_what_it_said() -> None:
    said = [
        {"role": "assistant", "content": None, "refusal": "I will not."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "Nor will I."}]},
    ]
    assert read(ask() | {"messages": said}).request.messages == [
        {"role": "assistant", "content": "I will not."},
        {"role": "assistant", "content": "Nor will I."},
    ]


def test_hints_of_other_protocols_in_a_message_are_passed_over() -> None:
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    message = {"role": "user", "content": [part], "cache_control": {"type": "ephemeral"}}
    message |= {"provider_specific_fields": {"refusal": None}}  # LiteLLM sends an answer back with them
    assert read(ask() | {"messages": [message]}).request.messages == [{"role": "user", "content": "x"}]


def test_instructions_to_the_server_are_no_part_of_what_the_model_reads() -> None:
    function = {"strict": True, "parameters": {"type": "object"}, "description": "d", "name": "look", "x": 1}
    (tool,) = read(ask(tools=[{"type": "function", "function": function, "cache_control": {}}])).request.tools
    shown = {"name": "look", "description": "d", "parameters": {"type": "object"}}
    assert tool == {"type": "function", "function": shown}
    assert list(tool["function"]) == list(shown)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[0]"),
        ({"role": "function", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": "x", "function_call": {"name": "x"}}, "messages[0].function_call"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "x"}}]}, "messages[0].tool_calls[0]"),
        ({"role": "assistant", "content": "", "audio": {"id": "x"}}, "messages[0].audio"),
        ({"role": "tool", "content": "x", "tool_call_id": 3}, "messages[0].tool_call_id"),
    ],
)
def test_a_message_that_cannot_be_shown_to_the_model_is_refused(message: object, param: str) -> None:
    assert refusal(ask() | {"messages": [message]}).param == param


def test_tools_and_their_choice_reach_the_request() -> None:
    named: dict[str, object] = {"type": "function", "function": {"name": "look"}}
    assert read(ask(tools=[TOOL])).request.tools == [TOOL]
    assert read(ask(tools=[TOOL])).request.tool_choice == "auto"
    assert read(ask(tools=[TOOL], tool_choice="none")).request.tool_choice == "none"
    assert read(ask(tools=[TOOL], tool_choice="required")).request.tool_choice == "required"
    assert read(ask(tools=[TOOL], tool_choice=named)).request.tool_choice == named


@pytest.mark.parametrize(
    "tool",
    [
        "x",
        {"type": "web_search"},
        {"type": "function", "function": {}},
        {"type": "function", "function": {"name": ""}},
        {"type": "function", "function": {"name": "x", "description": 3}},
        {"type": "function", "function": {"name": "x", "parameters": []}},
    ],
)
def test_a_tool_that_is_no_named_function_is_refused(tool: object) -> None:
    assert str(refusal(ask(tools=[tool])).param).startswith("tools[0]")


def test_log_probabilities_need_an_engine_that_spells_tokens() -> None:
    assert refusal(ask(logprobs=True)).param == "logprobs"


def test_an_answer_holds_only_what_was_asked_for() -> None:
    piece = Delta(index=0, text="hi", token_ids=[1, 2], logprobs=[-1.0, -2.0], finish_reason="stop")
    plain = msgspec.json.decode(read(ask()).answer(answered(piece)))
    assert plain["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hi", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert plain["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert "prompt_token_ids" not in plain


def test_asked_token_ids_and_log_probabilities_are_given() -> None:
    piece = Delta(index=0, text="hi", token_ids=[1, 2], logprobs=[-1.0, -2.0], finish_reason="stop")
    question = read(ask(return_token_ids=True, logprobs=True), decode=lambda ids: "é" if ids == [1] else "")
    answer = msgspec.json.decode(question.answer(answered(piece)))
    assert answer["prompt_token_ids"] == [7, 8]
    assert answer["choices"][0]["token_ids"] == [1, 2]
    assert answer["choices"][0]["logprobs"]["content"] == [
        {"token": "é", "logprob": -1.0, "bytes": [195, 169], "top_logprobs": []},
        {"token": "", "logprob": -2.0, "bytes": [], "top_logprobs": []},
    ]


def test_an_answer_with_tool_calls_has_no_empty_content() -> None:
    piece = Delta(index=0, token_ids=[1], logprobs=[-1.0], tool_calls=[CALL], finish_reason="tool_calls")
    message = msgspec.json.decode(read(ask()).answer(answered(piece)))["choices"][0]["message"]
    assert message["tool_calls"] == [CALL]
    assert message["content"] is None


def test_a_stream_names_the_speaker_then_gives_pieces_reason_usage_and_the_end() -> None:
    question = read(ask(stream=True, stream_options={"include_usage": True}))
    found = streamed(
        question,
        Delta(index=0, text="h", token_ids=[1], logprobs=[-1.0]),
        Delta(index=0, text="", token_ids=[2], logprobs=[-1.0]),
        Delta(index=0, text="i", token_ids=[3], logprobs=[-1.0], finish_reason="stop"),
    )
    assert found[-1] == "[DONE]"
    assert found[-2]["choices"] == [] and found[-2]["usage"]["completion_tokens"] == 3
    deltas = [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in found[:-2]]
    # The second piece has nothing for this client to hear.
    assert deltas == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "h"}, None),
        ({"content": "i"}, None),
        ({}, "stop"),
    ]
    assert not any("usage" in chunk for chunk in found[:-2])
    assert not any("token_ids" in name for chunk in found[:-1] for name in [*chunk, *(chunk["choices"] or [{}])[0]])


def test_streamed_token_ids_joined_are_the_sampled_ones() -> None:
    found = streamed(
        read(ask(stream=True, return_token_ids=True)),
        Delta(index=0, text="h", token_ids=[1, 2], logprobs=[-1.0, -1.0]),
        Delta(index=0, text="", token_ids=[3], logprobs=[-1.0], finish_reason="length"),
    )
    assert found[0]["prompt_token_ids"] == [7, 8]
    assert [token for chunk in found[:-1] for token in chunk["choices"][0].get("token_ids", [])] == [1, 2, 3]


def test_a_stream_numbers_the_tool_calls_of_each_choice() -> None:
    other = CALL | {"id": "c2"}
    found = streamed(
        read(ask(stream=True, n=2)),
        Delta(index=1, tool_calls=[CALL]),
        Delta(index=1, tool_calls=[other], finish_reason="tool_calls"),
        Delta(index=0, text="x", finish_reason="stop"),
        n=2,
    )
    calls = [
        (chunk["choices"][0]["index"], call["index"], call["id"])
        for chunk in found[:-1]
        for call in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert calls == [(1, 0, "c1"), (1, 1, "c2")]
