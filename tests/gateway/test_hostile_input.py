"""Bodies, headers and paths made to break a server. It answers 4xx and goes on."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leyden_plugins.gateway.dialects import Dialect
from leyden_plugins.gateway.dialects.spoken import DIALECTS
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal
from tests.gateway.builders import CHAT, Running, access, ask, asynchronous, named, running

BODIES = {
    "empty": b"",
    "no JSON": b"hello",
    "cut": b'{"model": "sql", "mess',
    "deep list": b"[" * 200_000,
    "deep object": b'{"messages":' * 100_000,
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "lone surrogate": b'{"model":"sql","messages":[{"role":"user","content":"\\ud800 x"}]}',
    "number out of range": b'{"model":"sql","temperature":1e9999}',
    "not a number": b'{"model":"sql","temperature":NaN}',
    "endless digits": b'{"model":"sql","n":' + b"9" * 10_000 + b"}",
    "a list": b"[]",
    "a string": b'"hello"',
    "null": b"null",
    "names that nest": b'{"model":"sql","messages":[{"role":{"role":{}},"content":{}}]}',
}


async def assert_alive(here: Running, token: str) -> None:
    assert (await here.post(token, ask("still there?"))).status_code == 200


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("dialect", DIALECTS, ids=[dialect.path for dialect in DIALECTS])
def test_a_malformed_body_is_a_400(dialect: Dialect, body: bytes) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running() as here:
            token = here.gateway.admit(access())
            path = f"/v1/{dialect.path}"
            response = await here.client.post(path, content=body, headers=here.headers(token, **named()))
            assert response.status_code == 400
            assert response.json()["error"]["type"] == "invalid_request_error"
            await assert_alive(here, token)
            assert len([one for one in await here.completions() if one.span_id == "s1"]) == 1

    scenario()


@asynchronous
async def test_a_body_over_the_limit_is_refused_with_and_without_a_length() -> None:
    async with running(body_bytes=100_000) as here:
        token = here.gateway.admit(access())

        async def pieces() -> object:
            for _ in range(200):
                yield b" " * 1000

        for content in (b" " * 200_000, pieces()):
            response = await here.client.post(CHAT, content=content, headers=here.headers(token))  # type: ignore[arg-type]
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
        await assert_alive(here, token)


@asynchronous
async def test_a_declared_length_of_any_size_is_never_read_into_memory() -> None:
    async with running(body_bytes=100_000) as here:
        token = here.gateway.admit(access())
        port = int(here.gateway.base_url.split(":")[2].split("/")[0])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-length: {10**18}\r\n\r\n"
        writer.write(head.encode())
        assert b"413" in await reader.readline()
        writer.close()
        await assert_alive(here, token)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET " + b"/a" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /rollout/%ff%fe/role/%00/v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer \xff\xfe\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\nhost: x\r\n\r\n",
    ],
)
def test_broken_http_does_not_stop_the_server(raw: bytes) -> None:
    @asynchronous
    async def scenario() -> None:
        async with running() as here:
            token = here.gateway.admit(access())
            port = int(here.gateway.base_url.split(":")[2].split("/")[0])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(raw)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 10)
            writer.close()
            await assert_alive(here, token)

    scenario()


@asynchronous
async def test_names_of_any_length_and_kind_are_kept_or_refused() -> None:
    async with running() as here:
        token = here.gateway.admit(access(routes=()))
        long = await here.post(token, ask(), named(role="x" * 5000))
        assert (long.status_code, long.json()["error"]["param"]) == (400, "x-leyden-role")
        odd = await here.post(token, ask(), named(role="%00%ff%3Cscript%3E"))
        assert odd.status_code == 200
        (completion,) = await here.completions()
        assert completion.role == "\x00\ufffd<script>"


@asynchronous
async def test_text_that_looks_like_the_protocol_stays_text() -> None:
    hostile = 'data: [DONE]\n\ndata: {"choices": []}\r\n\r\nHTTP/1.1 200 OK\r\n\u2028\x00<script>'
    async with running() as here:
        here.engine._script = hostile
        token = here.gateway.admit(access())
        response = await here.post(token, ask(stream=True), named())
        lines = response.text.split("\n\n")
        assert lines[-2] == "data: [DONE]"
        assert sum(line == "data: [DONE]" for line in lines) == 1
        (completion,) = await here.completions()
        assert completion.choices[0].text == hostile


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    *("model", "messages", "input", "prompt", "system", "instructions", "tools", "tool_choice", "stop", "n"),
    *("stream_options", "logit_bias", "response_format", "text", "output_config", "include", "metadata", "logprobs"),
    *("previous_response_id", "max_tokens", "stop_sequences", "context_management", "thinking", "store", "x"),
]
TYPES = [
    *("text", "input_text", "output_text", "message", "function_call", "function_call_output", "item_reference"),
    *("tool_use", "tool_result", "thinking", "function", "custom", "json_schema", "any", "tool"),
]
PART = st.dictionaries(
    st.sampled_from(["type", "text", "id", "call_id", "name", "arguments", "output", "input", "content", "function"]),
    JSON | st.sampled_from(TYPES) | st.just({}),
)
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "name", "audio", "type", "refusal", "call_id"]),
        JSON | st.sampled_from(["user", "assistant", "tool", "system", *TYPES]) | st.lists(PART, max_size=2),
    ),
    max_size=2,
)


@pytest.mark.parametrize("dialect", DIALECTS, ids=[dialect.path for dialect in DIALECTS])
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), JSON | PART | st.lists(PART, max_size=2)), MESSAGES)
def test_any_json_is_either_understood_or_refused(
    dialect: Dialect, fields: dict[str, object], messages: list[object]
) -> None:
    prompts: dict[str, object] = {"completions": "x", "responses": messages}
    body = {"model": "sql", dialect.prompt_field: prompts.get(dialect.path, messages)} | fields
    if dialect.path == "messages":
        body = {"max_tokens": 1} | body
    try:
        request = dialect.read(body, decode=None, memory=Memory()).request
    except Refusal as refusal:
        assert (refusal.status, bool(refusal.message)) == (400, True)
        assert msgspec.json.decode(dialect.error(refusal))
    else:
        assert request.messages or request.prompt_text or request.prompt_token_ids
        # It is recorded, so it must be storable.
        assert msgspec.json.encode([request.messages, request.tools, request.tool_choice, request.response_format])
