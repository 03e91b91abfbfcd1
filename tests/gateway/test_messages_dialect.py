"""What Anthropic's requests mean, and how their answers, events and errors are spelled."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from leyden.errors import EngineError
from leyden.spans import Completion, Status
from leyden.testing.fakes import Answer, FakeEngine
from leyden_plugins.gateway.dialects import Question
from leyden_plugins.gateway.dialects.messages import MessagesDialect
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal
from tests.gateway.builders import access, asynchronous, events, named, running

PATH = "/v1/messages"
SPELLED = '{"q":  1, "r": "é"}'
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": SPELLED}}
TOOL = {"name": "look", "description": "d", "input_schema": {"type": "object"}}
CHAT_TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": {"type": "object"}}}
USE = {"type": "tool_use", "id": "c1", "name": "look", "input": {"q": 1, "r": "é"}}


def ask(content: object = "hello", **fields: object) -> dict[str, object]:
    return {"model": "sql", "max_tokens": 500, "messages": [{"role": "user", "content": content}]} | fields


def read(body: dict[str, object]) -> Question:
    return MessagesDialect().read(body, decode=None, memory=Memory())


def refused(body: dict[str, object]) -> Refusal:
    with pytest.raises(Refusal, match=r"\w") as caught:
        read(body)
    assert caught.value.status == 400
    return caught.value


def test_every_sampling_field_reaches_the_request() -> None:
    sampling = read(ask(temperature=0.5, top_p=0.9, top_k=4, stop_sequences=["a", "b"])).request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 4)
    assert (sampling.stop, sampling.max_tokens) == (("a", "b"), 500)


@pytest.mark.parametrize("system", ["rules", [{"type": "text", "text": "rules", "cache_control": {"type": "x"}}]])
def test_the_system_prompt_stands_first(system: object) -> None:
    assert read(ask(system=system)).request.messages == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "hello"},
    ]


def test_blocks_become_chat_messages_in_their_order() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "I look."},
                USE,
                USE | {"id": "c2", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "42"}]},
                {"type": "tool_result", "tool_use_id": "c2", "content": "no such row", "is_error": True},
                {"type": "text", "text": "go on"},
            ],
        },
    ]
    call = CALL | {"function": {"name": "look", "arguments": '{"q": 1, "r": "é"}'}}
    assert read(ask() | {"messages": messages}).request.messages == [
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [call, call | {"id": "c2", "function": {"name": "look", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "tool", "content": "Error: no such row", "tool_call_id": "c2"},
        {"role": "user", "content": "go on"},
    ]


def test_tools_and_their_choice_reach_the_request_in_openais_words() -> None:
    assert read(ask(tools=[TOOL | {"type": "custom", "cache_control": {}}])).request.tools == [CHAT_TOOL]
    named_tool = {"type": "function", "function": {"name": "look"}}
    for asked, expected in (
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "look"}, named_tool),
    ):
        assert read(ask(tools=[TOOL], tool_choice=asked)).request.tool_choice == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", None),
        ("max_tokens", 0),
        ("model", 3),
        ("messages", []),
        ("messages", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is"}]),
        ("system", 3),
        ("temperature", "1"),
        ("top_k", -2),
        ("stop_sequences", [""]),
        ("tools", {}),
        ("tool_choice", {"type": "any"}),
        ("tool_choice", {"type": "tool", "name": "other"}),
        ("tool_choice", "auto"),
        ("stream", 1),
        ("output_config", []),
    ],
)
def test_a_wrong_value_is_refused_with_the_field_named(field: str, value: object) -> None:
    assert refused(ask() | {field: value}).param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("container", "c"),
        ("mcp_servers", [{"url": "x"}]),
        ("context_management", {"edits": [{"type": "clear_tool_uses_20250919"}]}),
        ("n", 2),
        ("seed", 1),
        ("no_such_field", 1),
    ],
)
def test_an_unsupported_field_is_refused_by_name(field: str, value: object) -> None:
    found = refused(ask() | {field: value})
    assert (found.param, repr(field) in found.message) == (field, True)


@pytest.mark.parametrize("kind", ["web_search_20250305", "bash_20250124", "code_execution_20250825", 3])
def test_a_tool_that_anthropic_runs_is_refused_by_name(kind: object) -> None:
    found = refused(ask(tools=[TOOL, {"type": kind, "name": "x"}]))
    assert (found.param, repr(kind) in found.message) == ("tools[1].type", True)


def test_hints_and_labels_are_accepted() -> None:
    body = ask(
        metadata={"user_id": "u"},
        service_tier="auto",
        thinking={"type": "disabled"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        cache_control={"type": "ephemeral"},
        output_config={"effort": "low"},
        mcp_servers=[],
        tools=[],
        tool_choice=None,
        container=None,
    )
    assert read(body).request == read(ask()).request


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image", "source": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "tool_result"}]}, "messages[0].content[0].tool_use_id"),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}, "messages[0].content[0]"),
        ({"role": "assistant", "content": [{"type": "server_tool_use"}]}, "messages[0].content[0].type"),
        ({"role": "assistant", "content": [{"type": ["text"]}]}, "messages[0].content[0].type"),
        ({"role": "assistant", "content": [USE | {"input": "{}"}]}, "messages[0].content[0]"),
    ],
)
def test_a_message_that_cannot_be_shown_to_the_model_is_refused(message: object, param: str) -> None:
    assert refused(ask() | {"messages": [message, {"role": "user", "content": "x"}]}).param == param


@asynchronous
async def test_an_answer_has_blocks_a_reason_and_counts_and_is_recorded_exactly() -> None:
    async with running(FakeEngine([Answer(text="I look.", tool_calls=[CALL])])) as here:
        token = here.gateway.admit(access())
        answer = (await here.post(token, ask(tools=[TOOL], system="s"), path=PATH)).json()
        assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "sql")
        assert answer["content"] == [{"type": "text", "text": "I look."}, USE]
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)
        (completion,) = await here.completions()
        assert completion.choices[0].token_ids == here.engine.log[0].token_ids[0]
        assert answer["usage"]["input_tokens"] == len(completion.prompt_token_ids)
        assert answer["usage"]["output_tokens"] == len(completion.choices[0].token_ids)
        (span,) = here.spans()
        assert span.attributes["gen_ai.input.messages"] == [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "hello"},
        ]
        said = {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}
        assert span.attributes["gen_ai.output.messages"] == [said]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("end_turn", None)),
        ({"max_tokens": 3}, ("max_tokens", None)),
        ({"stop_sequences": ["!", ";"]}, ("stop_sequence", ";")),
        ({"stop_sequences": ["nothing like it"]}, ("end_turn", None)),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_says_why_it_ended(fields: dict[str, object], expected: tuple[str, str | None], stream: bool) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running(FakeEngine("SELECT 1; SELECT 2!")) as here:
            token = here.gateway.admit(access())
            response = await here.post(token, ask(stream=stream) | fields, path=PATH)
            ended = events(response)[-2]["delta"] if stream else response.json()
            assert (ended["stop_reason"], ended["stop_sequence"]) == expected

    scenario()


@asynchronous
async def test_the_sampled_spelling_of_arguments_survives_the_clients_parsing() -> None:
    async with running(FakeEngine([Answer(tool_calls=[CALL])])) as here:
        token = here.gateway.admit(access())
        for stream in (False, True):
            await here.post(token, ask(tools=[TOOL], stream=stream), path=PATH)
            result = {"type": "tool_result", "tool_use_id": "c1", "content": "42"}
            for given, spelled in ((USE, SPELLED), (USE | {"input": {"q": 2}}, '{"q": 2}')):
                turns = [{"role": "assistant", "content": [given]}, {"role": "user", "content": [result]}]
                body = ask() | {"messages": [{"role": "user", "content": "hello"}, *turns]}
                await here.post(token, body, path=PATH)
                calls: Any = here.engine.log[-1].request.messages[1]["tool_calls"]
                assert calls[0]["function"]["arguments"] == spelled


@asynchronous
async def test_arguments_that_are_no_object_reach_the_client_wrapped_and_come_back_as_they_were() -> None:
    broken = CALL | {"function": {"name": "look", "arguments": "{oops"}}
    async with running(FakeEngine([Answer(tool_calls=[broken])])) as here:
        token = here.gateway.admit(access())
        answer = (await here.post(token, ask(tools=[TOOL]), path=PATH)).json()
        assert answer["content"][0]["input"] == {"INVALID_JSON": "{oops"}
        turns = [{"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "again"}]
        body = ask() | {"messages": [{"role": "user", "content": "hello"}, *turns]}
        await here.post(token, body, path=PATH)
        calls: Any = here.engine.log[-1].request.messages[1]["tool_calls"]
        assert calls[0]["function"]["arguments"] == "{oops"


@pytest.mark.parametrize(
    ("scripted", "blocks"),
    [
        ("hello", ["text"]),
        (Answer(text="look", tool_calls=[CALL, CALL | {"id": "c2"}]), ["text", "tool_use", "tool_use"]),
        (Answer(tool_calls=[CALL]), ["tool_use"]),
        ("", []),
    ],
)
def test_a_stream_tells_its_blocks_in_order(scripted: Any, blocks: list[str]) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running(FakeEngine([scripted], tokens_per_delta=100)) as here:
            token = here.gateway.admit(access())
            response = await here.post(token, ask(tools=[TOOL], stream=True), path=PATH)
            found = events(response)
            assert "[DONE]" not in found
            three = [f"content_block_{what}" for what in ("start", "delta", "stop")]
            expected = ["message_start", "ping", *(three * len(blocks)), "message_delta", "message_stop"]
            assert [one["type"] for one in found] == expected
            assert [line[7:] for line in response.text.split("\n") if line.startswith("event: ")] == expected
            starts = [one for one in found if one["type"] == "content_block_start"]
            assert [(one["index"], one["content_block"]["type"]) for one in starts] == list(enumerate(blocks))
            assert all(one["content_block"].get("input", {}) == {} for one in starts)
            deltas = [one["delta"] for one in found if one["type"] == "content_block_delta"]
            spelled = [delta.get("text", delta.get("partial_json")) for delta in deltas]
            texts = {"text": "look" if len(blocks) > 1 else "hello", "tool_use": SPELLED}
            assert spelled == [texts[block] for block in blocks]
            (sampled,) = here.engine.log[0].token_ids
            assert found[-2]["usage"]["output_tokens"] == len(sampled)

    scenario()


@asynchronous
async def test_errors_are_anthropics_from_the_key_to_the_engine() -> None:
    async with running(FakeEngine(context_length=12)) as here:
        token = here.gateway.admit(access())

        async def failing(body: object, key: str = token, path: str = PATH) -> tuple[int, str, str]:
            response = await here.post(key, body, path=path)
            found = response.json()
            assert found["type"] == "error"
            return response.status_code, found["error"]["type"], found["error"]["message"]

        assert (await failing(ask(), key="wrong"))[:2] == (401, "authentication_error")
        assert (await failing(ask(n=2)))[:2] == (400, "invalid_request_error")
        status, kind, message = await failing(ask("much too long for this"))
        assert (status, kind) == (400, "invalid_request_error")
        assert message.startswith("prompt is too long")
        assert (await failing(ask(), path=f"{PATH}/batches"))[:2] == (404, "not_found_error")
        here.engine.failure = EngineError("down")
        assert await failing(ask()) == (503, "overloaded_error", "down")
        here.engine.failure = ZeroDivisionError("oops")
        assert (await failing(ask()))[:2] == (500, "api_error")


@asynchronous
async def test_an_engine_that_fails_midway_sends_an_error_event() -> None:
    engine = FakeEngine([Answer(text="partial", error=EngineError("lost"))], tokens_per_delta=1)
    async with running(engine) as here:
        token = here.gateway.admit(access())
        response = await here.post(token, ask(stream=True), named(), path=PATH)
        assert response.text.rstrip().split("\n\n")[-1].startswith("event: error\n")
        assert events(response)[-1]["error"] == {"type": "overloaded_error", "message": "lost"}
        (completion,) = [one for one in await here.completions() if isinstance(one, Completion)]
        assert (completion.status, completion.choices[0].token_ids) == (Status.ERROR, list(b"partial"))


@asynchronous
async def test_a_prompt_is_counted_without_an_answer_or_a_record() -> None:
    async with running() as here:
        token = here.gateway.admit(access())
        body = {name: value for name, value in ask(tools=[TOOL], system="s").items() if name != "max_tokens"}
        counted = (await here.post(token, body, path=f"{PATH}/count_tokens")).json()
        await here.post(token, body | {"max_tokens": 9}, path=PATH)
        assert (await here.post(token, {"model": "sql"}, path=f"{PATH}/count_tokens")).status_code == 400
        assert (await here.client.get(f"{PATH}/count_tokens")).status_code == 405
        (completion,) = await here.completions()
        assert counted == {"input_tokens": len(completion.prompt_token_ids)}


@asynchronous
async def test_an_engine_that_does_not_count_says_so() -> None:
    class Silent:
        """Only what the protocol of engines asks for."""

        def __init__(self) -> None:
            self.start = FakeEngine().start

    async with running(Silent()) as here:  # type: ignore[arg-type]
        token = here.gateway.admit(access())
        response = await here.post(token, ask(), path=f"{PATH}/count_tokens")
        assert response.status_code == 501
        assert "does not count" in msgspec.json.decode(response.content)["error"]["message"]
