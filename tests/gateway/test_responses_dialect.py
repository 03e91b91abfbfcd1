"""What Responses requests mean, and how their answers and events are spelled."""

from __future__ import annotations

from typing import Any

import pytest

from leyden.errors import EngineError
from leyden.spans import Completion, Status
from leyden.testing.fakes import END_TOKEN, Answer, FakeEngine
from leyden_plugins.gateway.dialects import Question
from leyden_plugins.gateway.dialects.responses import ResponsesDialect
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal
from tests.gateway.builders import access, asynchronous, events, named, running

PATH = "/v1/responses"
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q":  1}'}}
OTHER = {"id": "c2", "type": "function", "function": {"name": "look", "arguments": "{}"}}
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}
CHAT_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def ask(value: object = "hello", **fields: object) -> dict[str, object]:
    return {"model": "sql", "input": value} | fields


def read(body: dict[str, object]) -> Question:
    return ResponsesDialect().read(body, decode=None, memory=Memory())


def refused(body: dict[str, object]) -> Refusal:
    with pytest.raises(Refusal, match=r"\w") as caught:
        read(body)
    assert caught.value.status == 400
    return caught.value


def call_item(call: Any) -> dict[str, object]:
    return {"type": "function_call", "call_id": call["id"], **call["function"]}


def test_every_sampling_field_reaches_the_request() -> None:
    sampling = read(ask(temperature=0.5, top_p=0.9, max_output_tokens=7)).request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.9, 7)


def test_instructions_stand_first_and_developer_speaks_as_system() -> None:
    items = [{"role": "developer", "content": "rules"}, {"role": "user", "content": "q"}]
    assert read(ask(items, instructions="be brief")).request.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "q"},
    ]


def test_items_become_the_chat_messages_that_they_were_made_of() -> None:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "q"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}], "id": "m"},
        call_item(CALL),
        call_item(OTHER),
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "43"}]},
        call_item(CALL),
    ]
    assert read(ask(items)).request.messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL, OTHER]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "tool", "content": "43", "tool_call_id": "c2"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]


def test_flat_tools_reach_the_model_as_chat_tools_do() -> None:
    request = read(ask(tools=[TOOL], tool_choice={"type": "function", "name": "look"})).request
    assert request.tools == [CHAT_TOOL]
    assert request.tool_choice == {"type": "function", "function": {"name": "look"}}
    assert read(ask(tools=[TOOL], tool_choice="required")).request.tool_choice == "required"
    assert read(ask(tools=[TOOL])).request.tool_choice == "auto"


@pytest.mark.parametrize("kind", ["web_search", "file_search", "mcp", "code_interpreter", "custom", "computer", None])
def test_a_hosted_tool_is_refused_by_name(kind: object) -> None:
    found = refused(ask(tools=[TOOL, {"type": kind}]))
    assert (found.param, repr(kind) in found.message) == ("tools[1].type", True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", None),
        ("input", []),
        ("input", 3),
        ("model", None),
        ("instructions", []),
        ("temperature", 3),
        ("max_output_tokens", 0),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "name": "other"}),
        ("tool_choice", {"type": "web_search"}),
        ("text", "json"),
        ("include", "logprobs"),
        ("include", ["message.output_text.logprobs"]),
        ("top_logprobs", 3),
        ("store", 1),
        ("stream", "yes"),
        ("parallel_tool_calls", 1),
        ("tools", {}),
    ],
)
def test_a_wrong_value_is_refused_with_the_field_named(field: str, value: object) -> None:
    assert refused(ask() | {field: value}).param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("conversation", "conv_1"),
        ("background", True),
        ("truncation", "auto"),
        ("prompt", {"id": "p"}),
        ("context_management", [{"type": "compaction"}]),
        ("seed", 1),
        ("messages", []),
        ("no_such_field", 1),
    ],
)
def test_an_unsupported_field_is_refused_by_name(field: str, value: object) -> None:
    found = refused(ask() | {field: value})
    assert (found.param, repr(field) in found.message) == (field, True)


def test_hints_and_labels_are_accepted() -> None:
    body = ask(
        user="u",
        metadata={"a": "b"},
        client_metadata={"session_id": "s"},
        service_tier="auto",
        truncation="disabled",
        background=False,
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        safety_identifier="s",
        max_tool_calls=3,
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        text={"verbosity": "low", "format": {"type": "text"}},
        include=["reasoning.encrypted_content"],
        stream_options={"include_obfuscation": False},
        top_logprobs=0,
        tools=[],
        conversation=None,
    )
    assert read(body).request == read(ask()).request


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ("hi", "input[0]"),
        ({"role": "tool", "content": "x"}, "input[0].role"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "input[0].content[0]"),
        ({"role": "user", "content": [{"type": "input_text", "text": 3}]}, "input[0].content[0].text"),
        ({"type": "function_call", "name": "x"}, "input[0]"),
        ({"type": "function_call_output", "output": "x"}, "input[0].call_id"),
        ({"type": "function_call_output", "call_id": "c", "output": {}}, "input[0].output"),
        ({"type": "web_search_call", "id": "w"}, "input[0].type"),
        ({"type": ["message"]}, "input[0].type"),
        ({"type": "item_reference", "id": "msg_1"}, "input[0].id"),
        ({"type": "item_reference"}, "input[0].id"),
        ({}, "input[0].id"),
    ],
)
def test_an_item_that_cannot_be_shown_to_the_model_is_refused(item: object, param: str) -> None:
    assert refused(ask([item])).param == param


@asynchronous
async def test_an_answer_has_the_text_then_the_calls_and_is_recorded_exactly() -> None:
    async with running(FakeEngine([Answer(text="I look.", tool_calls=[CALL, OTHER])])) as here:
        token = here.gateway.admit(access())
        body = ask(tools=[TOOL], instructions="i", metadata={"k": "v"}, return_token_ids=True)
        answer = (await here.post(token, body, path=PATH)).json()
        message, first, second = answer["output"]
        assert (answer["object"], answer["status"], answer["error"]) == ("response", "completed", None)
        assert message["content"] == [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]
        assert [(one["call_id"], one["name"], one["arguments"]) for one in (first, second)] == [
            ("c1", "look", '{"q":  1}'),
            ("c2", "look", "{}"),
        ]
        assert len({message["id"], first["id"], second["id"]}) == 3
        assert (answer["instructions"], answer["metadata"], answer["tools"]) == ("i", {"k": "v"}, [TOOL])
        (completion,) = await here.completions()
        assert answer["token_ids"] == completion.choices[0].token_ids == here.engine.log[0].token_ids[0]
        assert answer["prompt_token_ids"] == completion.prompt_token_ids
        usage = answer["usage"]
        assert (usage["input_tokens"], usage["output_tokens"]) == (
            len(completion.prompt_token_ids),
            len(completion.choices[0].token_ids),
        )
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        (span,) = here.spans()
        assert span.attributes["gen_ai.input.messages"] == [
            {"role": "system", "content": "i"},
            {"role": "user", "content": "hello"},
        ]
        assert span.attributes["gen_ai.output.messages"] == [
            {"role": "assistant", "content": "I look.", "tool_calls": [CALL, OTHER]}
        ]


@asynchronous
async def test_token_ids_are_given_only_when_asked_for() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        assert b"token_ids" not in (await here.post(token, ask(), path=PATH)).content
        assert b"token_ids" not in (await here.post(token, ask(stream=True), path=PATH)).content


@asynchronous
async def test_a_cut_answer_is_incomplete_and_says_why() -> None:
    async with running(FakeEngine("abcdef", tokens_per_delta=1)) as here:
        token = here.gateway.admit(access())
        answer = (await here.post(token, ask(max_output_tokens=3), path=PATH)).json()
        assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert (answer["output"][0]["status"], answer["output"][0]["content"][0]["text"]) == ("incomplete", "abc")
        found = events(await here.post(token, ask(max_output_tokens=3, stream=True), path=PATH))
        assert found[-1]["type"] == "response.incomplete"
        assert found[-1]["response"]["status"] == "incomplete"


@asynchronous
async def test_log_probabilities_are_those_of_the_sampled_tokens() -> None:
    async with running(FakeEngine("hi")) as here:
        token = here.gateway.admit(access())
        body = ask(include=["message.output_text.logprobs"])
        answer = (await here.post(token, body, path=PATH)).json()
        found = answer["output"][0]["content"][0]["logprobs"]
        assert [one["token"] for one in found] == ["h", "i", ""]
        assert [one["logprob"] for one in found] == [FakeEngine.logprob(one) for one in [*b"hi", END_TOKEN]]
        streamed = events(await here.post(token, body | {"stream": True}, path=PATH))
        (done,) = [one for one in streamed if one["type"] == "response.output_text.done"]
        assert done["logprobs"] == found


TEXT_EVENTS = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
CALL_EVENTS = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]
BEGIN, END = ["response.created", "response.in_progress"], ["response.completed"]


@pytest.mark.parametrize(
    ("scripted", "expected"),
    [
        ("hello", TEXT_EVENTS),
        (Answer(text="look", tool_calls=[CALL, OTHER]), TEXT_EVENTS + CALL_EVENTS + CALL_EVENTS),
        (Answer(tool_calls=[CALL]), CALL_EVENTS),
        ("", [one for one in TEXT_EVENTS if not one.endswith("delta")]),
    ],
)
def test_a_stream_tells_its_items_in_order_and_ends_with_the_whole(scripted: Any, expected: list[str]) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running(FakeEngine([scripted], tokens_per_delta=100)) as here:
            token = here.gateway.admit(access())
            plain = (await here.post(token, ask(tools=[TOOL]), path=PATH)).json()
            response = await here.post(token, ask(tools=[TOOL], stream=True), path=PATH)
            found = events(response)
            assert [one["type"] for one in found] == BEGIN + expected + END
            assert [one["sequence_number"] for one in found] == list(range(len(found)))
            assert response.text.count("event: ") == len(found)
            check_items(found, plain["output"])

    scenario()


def check_items(found: list[Any], plain: list[Any]) -> None:
    """Put the items together from their events as clients do, and compare with a JSON answer."""
    whole = found[-1]["response"]
    built: list[Any] = []
    for one in found:
        kind = one["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert one["output_index"] == len(built)
            built.append(one["item"] | {"text": ""})
        elif kind in ("output_text.delta", "function_call_arguments.delta"):
            assert one["item_id"] == built[one["output_index"]]["id"]
            built[one["output_index"]]["text"] += one["delta"]
        elif kind == "output_item.done":
            assert one["item"] == whole["output"][one["output_index"]]
    texts = [item["content"][0]["text"] if item["type"] == "message" else item["arguments"] for item in plain]
    assert [item["text"] for item in built] == texts
    assert whole["status"] == "completed"
    assert [item["type"] for item in whole["output"]] == [item["type"] for item in plain]


@asynchronous
async def test_an_engine_that_fails_midway_sends_the_error_and_the_failed_response() -> None:
    engine = FakeEngine([Answer(text="partial", error=EngineError("lost"))], tokens_per_delta=1)
    async with running(engine) as here:
        token = here.gateway.admit(access())
        found = events(await here.post(token, ask(stream=True), named(), path=PATH))
        error, failed = found[-2:]
        assert (error["type"], error["error"]["code"], error["message"]) == ("error", "engine_unavailable", "lost")
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        assert [one["sequence_number"] for one in found] == list(range(len(found)))
        (completion,) = [one for one in await here.completions() if isinstance(one, Completion)]
        assert (completion.status, completion.delivered) == (Status.ERROR, False)


@asynchronous
async def test_a_prompt_is_counted_without_an_answer_or_a_record() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        body = {"input": "hello", "instructions": "i", "tools": [TOOL], "reasoning": {"effort": "low"}}
        response = await here.post(token, body, path=f"{PATH}/input_tokens")
        counted = response.json()
        await here.post(token, ask(instructions="i", tools=[TOOL]), path=PATH)
        (completion,) = await here.completions()
        length = len(completion.prompt_token_ids)
        assert counted == {"object": "response.input_tokens", "input_tokens": length}
