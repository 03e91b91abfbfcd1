"""Every protocol that carries model calls: what is routed, what is recorded, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from leyden.context import role
from leyden.errors import ConfigurationError
from leyden.spans import Status
from leyden.wire.protocols import PROTOCOLS, place_of
from leyden.wire.reading import read_answer
from tests.capture.clients import send
from tests.capture.dialects import answer_body, answer_events
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

PATHS = ("/chat/completions", "/completions", "/responses", "/messages")

ASK = "rollout=r1 role=writer"
ANSWER = "answer to rollout=r1 role=writer"

CALL = {"id": "call_0", "type": "function", "function": {"name": "search", "arguments": '{"query": "rollout=r1"}'}}
PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}}


@pytest.fixture(autouse=True)
def wired(installed: None) -> None:
    """Every test here runs with the wire."""


@pytest.fixture(params=["httpx", "requests"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def body(path: str, text: str = ASK, **fields: Any) -> bytes:
    """Return a request of the protocol at `path`."""
    asked: dict[str, Any] = {"model": "gpt", **fields}
    if path in ("/chat/completions", "/messages"):
        asked["messages"] = [{"role": "user", "content": text}]
    else:
        asked["input" if path == "/responses" else "prompt"] = text
    if path == "/messages":
        asked["max_tokens"] = 100
    return json.dumps(asked).encode()


def tools(path: str) -> list[dict[str, Any]]:
    if path == "/messages":
        return [{"name": "search", "input_schema": PARAMETERS}]
    function = {"name": "search", "parameters": PARAMETERS}
    flat = {"type": "function", **function}
    return [flat if path == "/responses" else {"type": "function", "function": function}]


def only(recorded: Recorded) -> Any:
    (call,) = recorded.calls
    return call


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_each_protocol_is_routed_and_its_answer_recorded(
    kind: str, path: str, stream: bool, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded, role("writer"):
        send(kind, "http://user.invalid/v1" + path, body(path, stream=stream), stream=stream)
    assert (gateway.seen[0].path, gateway.seen[0].body["model"]) == (f"/v1{path}", "sql")
    call = only(recorded)
    assert (call.status, call.error) == (Status.OK, None)
    assert call.name == "chat gpt"
    (said,) = call.attributes["gen_ai.output.messages"]
    assert (said["role"], said["content"].strip()) == ("assistant", ANSWER)
    (reason,) = call.attributes["gen_ai.response.finish_reasons"]
    assert reason == {"/responses": "completed", "/messages": "end_turn"}.get(path, "stop")
    assert call.attributes["gen_ai.response.model"] == "sql"
    if not (stream and path.endswith("/completions")):  # OpenAI's older streams tell only those who ask
        assert call.attributes["gen_ai.usage.input_tokens"] == 7
        assert call.attributes["gen_ai.usage.output_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/chat/completions", "/responses", "/messages"])
def test_tool_calls_are_recorded_as_chat_messages_hold_them(
    kind: str, path: str, stream: bool, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        asked = body(path, f"{ASK} call=search*2", stream=stream, tools=tools(path))
        send(kind, "http://user.invalid/v1" + path, asked, stream=stream)
    (said,) = only(recorded).attributes["gen_ai.output.messages"]
    found = said["tool_calls"]
    assert [call["id"] for call in found] == ["call_0", "call_1"]
    assert [json.loads(call["function"]["arguments"]) for call in found] == [{"query": "rollout=r1"}] * 2
    assert {call["function"]["name"] for call in found} == {"search"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("mark", "status", "error"),
    [
        ("cut", Status.INTERRUPTED, "the stream ended before its last event"),
        ("zipped cut", Status.INTERRUPTED, "the stream ended before its last event"),
        ("fails", Status.ERROR, "the answer says: the server failed"),
        ("broken", Status.OK, None),
        ("zipped", Status.OK, None),
        ("status=529", Status.ERROR, "HTTP 529"),
    ],
)
def test_how_a_stream_of_each_protocol_ends(
    kind: str, path: str, mark: str, status: Status, error: str | None, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        send(kind, "http://user.invalid/v1" + path, body(path, f"{ASK} {mark} .", stream=True), stream=True)
    call = only(recorded)
    assert (call.status, call.error) == (status, error)
    assert (recorded.context.infrastructure_error is None) is (status is Status.OK)
    if status is Status.INTERRUPTED:
        (said,) = call.attributes["gen_ai.output.messages"]
        assert ANSWER.startswith(said["content"].strip()) and said["content"]


@pytest.mark.parametrize("dialect", ["chat", "completions", "responses", "messages"])
def test_no_beginning_of_a_stream_raises_or_counts_as_whole(dialect: Any) -> None:
    path = {"chat": "/chat/completions"}.get(dialect, f"/{dialect}")
    message = {
        "role": "assistant",
        "content": "eins zwei ü 三",
        "tool_calls": [CALL] if dialect != "completions" else [],
    }
    stream = b"".join(answer_events(path, "m", message))
    whole = read_answer(dialect, stream)
    assert whole.is_whole and whole.messages[0]["content"].strip() == "eins zwei ü 三"
    ending = {"responses": b"event: response.completed", "messages": b'"stop_reason": "'}.get(dialect)
    end = stream.index(ending or b'"finish_reason": "')
    answers = [read_answer(dialect, stream[:length]) for length in range(end)]
    assert not any(answer.is_whole for answer in answers)
    assert answers[-1].messages[0]["content"].strip() == "eins zwei ü 三"


@pytest.mark.parametrize("dialect", ["chat", "completions", "responses", "messages"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[1, 2]",
        b'{"choices": 7, "output": "x", "content": null, "usage": []}',
        b'{"choices": [{"message": null}], "output": [{"type": "message"}], "content": [{}]}',
        b'data: {"type": "response.completed"}\n\ndata: [1]\n\ndata: "x"\n\n',
        b'data: {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": 7}}]}}]}\n\ndata: [DONE]\n\n',
        b"\xff\xfe\x00garbage",
        b"\x1f\x8bnot gzip",
    ],
)
def test_an_answer_that_makes_no_sense_is_left_out(dialect: Any, content: bytes) -> None:
    for encoding in (None, "gzip", "br"):
        for message in read_answer(dialect, content, encoding).messages:
            json.dumps(message)


def test_a_stream_of_several_choices_is_whole_when_all_of_them_are() -> None:
    def event(index: int, text: str, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": {"content": text}, "finish_reason": reason}
        return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"

    stream = event(1, "b") + event(0, "a", "stop")
    assert not read_answer("chat", stream, choices=2).is_whole
    answer = read_answer("chat", stream + event(1, "c", "length"), choices=2)
    assert answer.is_whole
    assert [message["content"] for message in answer.messages] == ["a", "bc"]
    assert answer.finish_reasons == ["stop", "length"]


def test_an_unfinished_response_says_why() -> None:
    whole = answer_body("/responses", "m", {"role": "assistant", "content": "half"})
    whole |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    ending = json.dumps({"type": "response.incomplete", "response": whole}).encode()
    answer = read_answer("responses", b"data: " + ending + b"\n\n")
    assert (answer.is_whole, answer.finish_reasons, answer.error) == (True, ["max_output_tokens"], None)
    failed = {**whole, "status": "failed", "error": {"code": "server_error", "message": "out of luck"}}
    answer = read_answer("responses", b"data: " + json.dumps({"type": "response.failed", "response": failed}).encode())
    assert answer.error == "out of luck"


# ---- prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        ("/responses", {"instructions": "old"}, {"instructions": "better", "input": ASK}),
        ("/responses", {}, {"instructions": "better", "input": ASK}),
        (
            "/responses",
            {"input": [{"role": "developer", "content": "old"}, {"role": "user", "content": ASK}]},
            {"input": [{"role": "developer", "content": "better"}, {"role": "user", "content": ASK}]},
        ),
        ("/messages", {"system": [{"type": "text", "text": "old"}]}, {"system": "better"}),
        ("/messages", {}, {"system": "better"}),
    ],
)
def test_a_prompt_takes_the_place_that_the_protocol_has_for_it(
    kind: str, path: str, given: dict[str, Any], expected: dict[str, Any], gateway: FakeOpenAI
) -> None:
    sent = {**json.loads(body(path)), **given}
    with rollout(routing_to(gateway.base_url, prompts={"main": "better"})):
        send(kind, "http://user.invalid/v1" + path, json.dumps(sent).encode())
    assert gateway.seen[0].body == {**json.loads(body(path)), **expected, "model": "sql"}


def test_a_prompt_for_a_protocol_without_one_is_refused(
    kind: str, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, "other", prompts={"main": "better"})) as recorded:
        with pytest.raises(ConfigurationError, match=r"a prompt cannot be set on .*'OpenAI completions'.*chat"):
            send(kind, user_server.base_url + "/completions", body("/completions"))
    assert user_server.seen == []
    assert isinstance(recorded.context.infrastructure_error, ConfigurationError)


# ---- what is no model call, and what is not served ---------------------------------------------------------------


@pytest.mark.parametrize("path", ["/responses/input_tokens", "/messages/count_tokens"])
def test_counting_tokens_for_a_routed_role_asks_the_gateway_and_is_no_model_call(
    kind: str, path: str, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        with role("writer"):
            reply = send(kind, user_server.base_url + path, body("/messages"), {"authorization": "Bearer user-key"})
        assert json.loads(reply.content)["input_tokens"] == 7
        assert (len(gateway.seen), len(user_server.seen)) == (1, 0)
        send(kind, user_server.base_url + path, body("/messages"))
    (asked,) = gateway.seen
    assert (asked.path, asked.body["model"]) == (f"/v1{path}", "sql")
    assert asked.headers["authorization"] == "Bearer gateway-token"
    assert (asked.headers["x-leyden-role"], "x-leyden-span" in asked.headers) == ("writer", False)
    assert [seen.raw for seen in user_server.seen] == [body("/messages")]
    assert recorded.calls == [] and recorded.context.spoken_roles == {}


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/responses/resp_7"), ("POST", "/responses/resp_7/cancel"), ("DELETE", "/responses/resp_7")],
)
def test_an_answer_is_fetched_again_where_it_was_given(
    kind: str, method: str, path: str, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        with role("writer"):
            send(kind, user_server.base_url + path, b"", method=method)
        send(kind, user_server.base_url + path, b"", method=method)
    assert [(seen.method, seen.path, seen.raw) for seen in gateway.seen] == [(method, f"/v1{path}", b"")]
    assert [(seen.method, seen.path) for seen in user_server.seen] == [(method, f"/v1{path}")]
    assert recorded.calls == []


@pytest.mark.parametrize(
    ("path", "sent", "named", "cure"),
    [
        ("/v1beta/models/gemini-3:generateContent", {"contents": []}, "Gemini", "v1beta/openai"),
        ("/v1beta/models/gemini-3:streamGenerateContent", {"contents": []}, "Gemini", "v1beta/openai"),
        ("/api/chat", {"model": "llama", "messages": []}, "Ollama", "11434/v1"),
        ("/api/generate", {"model": "llama", "prompt": "x"}, "Ollama", "11434/v1"),
        ("/model/anthropic.claude/converse", {"messages": []}, "Amazon Bedrock", "OpenAI-compatible"),
        ("/model/anthropic.claude/invoke", {"anthropic_version": "x"}, "Amazon Bedrock", "OpenAI-compatible"),
        ("/v2/chat", {"model": "command", "messages": []}, "Cohere chat", "OpenAI-compatible"),
        ("/publishers/anthropic/models/claude:streamRawPredict", {"messages": []}, "Vertex AI", "OpenAI-compatible"),
        ("/responses/compact", {"model": "gpt", "input": []}, "Responses compaction", "in the agent"),
    ],
)
def test_a_protocol_that_the_gateway_does_not_speak_is_refused_for_routed_roles_only(
    kind: str,
    path: str,
    sent: dict[str, Any],
    named: str,
    cure: str,
    user_server: FakeOpenAI,
    gateway: FakeOpenAI,
    caplog: pytest.LogCaptureFixture,
) -> None:
    raw = json.dumps(sent).encode()
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        with role("writer"), pytest.raises(ConfigurationError, match=f"'writer' is routed to 'sql'.*{named}.*{cure}"):
            send(kind, user_server.base_url + path, raw)
        assert user_server.seen == gateway.seen == []
        assert isinstance(recorded.context.infrastructure_error, ConfigurationError)
        assert named in caplog.text
        with role("critic"):
            send(kind, user_server.base_url + path, raw)
    assert [seen.raw for seen in user_server.seen] == [raw]
    assert [(call.role, call.status) for call in recorded.calls] == [("writer", Status.ERROR), ("critic", Status.OK)]


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/embeddings", {"model": "e", "input": "x"}),
        ("/channels/7/messages", {"text": "hello"}),
        ("/forms/7/responses", {"answers": []}),
        ("/forms/7/responses/resp", {"model": "x"}),
        ("/api/chat", {"message": "to the user's own service"}),
        ("/models", {"model": "x"}),
        ("/messages/batches", {"requests": []}),
    ],
)
def test_what_only_looks_like_a_model_call_passes_untouched(
    kind: str, path: str, sent: dict[str, Any], user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    raw = json.dumps(sent).encode()
    with rollout(routing_to(gateway.base_url)) as recorded:
        send(kind, user_server.base_url + path, raw)
    assert [seen.raw for seen in user_server.seen] == [raw]
    assert gateway.seen == [] and recorded.calls == []


def test_the_path_of_every_protocol_is_known_by_its_own_entry() -> None:
    for protocol in PROTOCOLS:
        if protocol.ending.startswith("/") and not set(protocol.ending) & set("([|"):
            place = place_of("POST", "/some/prefix" + protocol.ending)
            assert place is not None and place.protocol is protocol
