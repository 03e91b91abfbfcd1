"""Where requests go, what they carry, and what is recorded of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from leyden import context, wire
from leyden.context import role
from leyden.spans import Kind, Status
from leyden.wire.state import WIRE
from tests.capture.rollouts import rollout, routing_to
from tests.capture.servers import FakeOpenAI

BODY = {"model": "gpt", "messages": [{"role": "system", "content": "role=writer"}, {"role": "user", "content": "x=é"}]}
RAW = json.dumps(BODY, indent=3).encode()
"""Spaced as no serialiser of ours would space it."""

KEY = "Bearer user-key"

Post = Callable[..., Any]
"""Post RAW, or `content=`, to a base URL with a client of one library: `post(base_url, content=, client=, path=)`."""


@pytest.fixture(params=["sync", "async"])
def post(request: pytest.FixtureRequest, library: Any, installed: None) -> Post:
    def options(content: bytes, extra: dict[str, str]) -> dict[str, Any]:
        return {"content": content, "headers": {"authorization": KEY, "content-type": "application/json", **extra}}

    def sync(
        base_url: str, content: bytes = RAW, path: str = "/chat/completions", headers: Any = (), **made: Any
    ) -> Any:
        with library.Client(**made) as client:
            return client.post(base_url + path, **options(content, dict(headers)))

    def asynchronous(
        base_url: str, content: bytes = RAW, path: str = "/chat/completions", headers: Any = (), **made: Any
    ) -> Any:
        async def run() -> Any:
            async with library.AsyncClient(**made) as client:
                return await client.post(base_url + path, **options(content, dict(headers)))

        return asyncio.run(run())

    return sync if request.param == "sync" else asynchronous


def test_an_unrouted_role_passes_byte_identical_with_the_users_key(
    post: Post, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, "writer")), role("critic"):
        response = post(user_server.base_url)
    (seen,) = user_server.seen
    assert seen.raw == RAW
    assert seen.headers["authorization"] == KEY
    assert not [name for name in seen.headers if name.startswith("x-leyden")]
    assert gateway.seen == []
    assert response.json()["model"] == "gpt"


def test_a_routed_role_goes_to_the_gateway_as_its_policy_with_who_calls_in_the_headers(
    post: Post, user_server: FakeOpenAI, gateway: FakeOpenAI, library: Any
) -> None:
    with rollout(routing_to(gateway.base_url, "schreiber/ü")) as recorded, role("schreiber/ü"):
        response = post(user_server.base_url)
    (seen,) = gateway.seen
    (call,) = recorded.calls
    assert user_server.seen == []
    assert seen.path == "/v1/chat/completions"
    assert seen.body == {**BODY, "model": "sql"}
    named = {name: value for name, value in seen.headers.items() if name.startswith("x-leyden")}
    assert named == {
        "x-leyden-model": "gpt",
        "x-leyden-rollout": "r1",
        "x-leyden-attempt": "1",
        "x-leyden-role": "schreiber%2F%C3%BC",
        "x-leyden-span": call.span_id,
        "x-leyden-parent": call.parent_id,
        "x-leyden-http-attempt": "0",
    }
    assert seen.headers["authorization"] == "Bearer gateway-token"
    assert isinstance(response, library.Response)
    assert str(response.request.url) == user_server.base_url + "/chat/completions"
    assert response.request.headers["authorization"] == KEY


def test_nothing_of_the_users_client_reaches_the_gateway(
    post: Post, gateway: FakeOpenAI, library: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://user:secret@127.0.0.1:9")
    hooked: list[object] = []
    is_async = "async" in request.node.callspec.params["post"]

    def hook(sent: Any) -> None:
        hooked.append(sent)
        sent.headers["x-secret"] = "from-hook"

    async def async_hook(sent: Any) -> None:
        hook(sent)

    secrets = {"api-key": "azure-secret", "x-api-key": "secret", "openai-organization": "org"}
    with rollout(routing_to(gateway.base_url)):
        post(
            "https://user.invalid/openai/deployments/gpt",
            headers=secrets,
            auth=("name", "secret"),
            cookies={"session": "secret"},
            event_hooks={"request": [async_hook if is_async else hook]},
            trust_env=True,
        )
    (seen,) = gateway.seen
    assert hooked == []
    assert "secret" not in json.dumps(seen.headers)
    assert not set(seen.headers) & {"api-key", "x-api-key", "openai-organization", "cookie", "x-secret"}


def test_a_call_without_an_adapter_is_recorded_under_the_role_that_makes_it(
    post: Post, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        for name in ("writer", "critic"):
            with role(name):
                post(user_server.base_url)
    assert [(span.role, recorded.parent_of(span).name) for span in recorded.calls] == [
        ("writer", "writer"),
        ("critic", "critic"),
    ]
    assert recorded.context.spoken_roles == {"writer": 1, "critic": 1}
    for span in recorded.calls:
        assert span.status is Status.OK
        assert span.attributes["gen_ai.request.model"] == "gpt"
        assert span.attributes["gen_ai.input.messages"] == BODY["messages"]
        assert span.attributes["gen_ai.response.finish_reasons"] == ["stop"]
        assert span.attributes["http.response.status_code"] == 200


def test_an_open_call_of_an_adapter_is_used_and_a_repeated_body_is_its_next_attempt(
    post: Post, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        frame = context.current()
        assert frame is not None and frame.rollout is not None
        call = frame.rollout.open(Kind.MODEL_CALL, "adapter's", "writer", frame.span_id)
        token = context.enter(context.Frame(frame.rollout, "writer", frame.span_id, call))
        post("http://user.invalid")
        post("http://user.invalid")
        post("http://user.invalid", content=RAW.replace(b"x=", b"y="))
        call.close()
        post("http://user.invalid")
        context.leave(token)
    headers = [seen.headers for seen in gateway.seen]
    spans = [each["x-leyden-span"] for each in headers]
    assert [each["x-leyden-http-attempt"] for each in headers] == ["0", "1", "0", "0"]
    assert spans[0] == spans[1] == call.span_id
    assert len(set(spans)) == 3, "another body, and a body sent after the call has closed, are calls of their own"
    assert {each["x-leyden-role"] for each in headers} == {"writer"}
    assert len(recorded.calls) == 3


def test_an_unrouted_call_that_an_adapter_records_is_not_recorded_twice(
    post: Post, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        frame = context.current()
        assert frame is not None and frame.rollout is not None
        call = frame.rollout.open(Kind.MODEL_CALL, "adapter's", "critic", frame.span_id)
        token = context.enter(context.Frame(frame.rollout, "critic", frame.span_id, call))
        post(user_server.base_url)
        context.leave(token)
        call.close()
    assert [span.name for span in recorded.calls] == ["adapter's"]
    assert user_server.seen[0].raw == RAW


@pytest.mark.parametrize("messages", [BODY["messages"], BODY["messages"][1:]], ids=["replaced", "inserted"])
@pytest.mark.parametrize("is_routed", [True, False])
def test_a_prompt_replaces_the_system_message_of_its_role(
    post: Post, user_server: FakeOpenAI, gateway: FakeOpenAI, is_routed: bool, messages: list[dict[str, str]]
) -> None:
    routing = routing_to(gateway.base_url, "writer" if is_routed else "other", prompts={"writer": "better"})
    with rollout(routing), role("writer"):
        post(user_server.base_url, content=json.dumps({**BODY, "messages": messages}).encode())
    (seen,) = (gateway if is_routed else user_server).seen
    assert seen.body["messages"] == [{"role": "system", "content": "better"}, BODY["messages"][1]]
    assert seen.headers["authorization"] == ("Bearer gateway-token" if is_routed else KEY)
    assert seen.body["model"] == ("sql" if is_routed else "gpt")


def test_other_requests_of_a_routed_role_pass_untouched(
    post: Post, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    chat_of_people = b'{"text": "a message of some chat service"}'
    with rollout(routing_to(gateway.base_url)) as recorded:
        post(user_server.base_url, content=chat_of_people, path="/channels/7/messages")
        post(user_server.base_url, path="/embeddings")
    assert [seen.raw for seen in user_server.seen] == [chat_of_people, RAW]
    assert gateway.seen == []
    assert recorded.calls == []


def test_outside_rollouts_everything_passes_untouched(post: Post, user_server: FakeOpenAI) -> None:
    post(user_server.base_url)
    assert user_server.seen[0].raw == RAW


def test_install_is_idempotent_and_uninstall_restores_both_clients(library: Any) -> None:
    before = (vars(library.Client)["send"], vars(library.AsyncClient)["send"])
    wire.install()
    once = library.Client.send
    wire.install()
    assert library.Client.send is once and once is not before[0]
    wire.uninstall()
    wire.uninstall()
    assert (vars(library.Client)["send"], vars(library.AsyncClient)["send"]) == before


def test_a_patch_put_on_top_survives_uninstall_and_then_reaches_the_original(
    library: Any, user_server: FakeOpenAI, gateway: FakeOpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = library.Client.send
    monkeypatch.setattr(library.Client, "send", original)  # restored at the end whatever happens here
    wire.install()
    ours = library.Client.send
    passed: list[object] = []

    def theirs(client: Any, request: Any, **options: Any) -> Any:
        passed.append(request)
        return ours(client, request, **options)

    library.Client.send = theirs
    wire.uninstall()
    assert library.Client.send is theirs
    with rollout(routing_to(gateway.base_url)), library.Client() as client:
        client.post(user_server.base_url + "/chat/completions", json=BODY)
    assert len(passed) == 1
    assert gateway.seen == [] and len(user_server.seen) == 1


def test_leydens_clients_are_closed_with_the_wire(library: Any, gateway: FakeOpenAI) -> None:
    wire.install()
    with rollout(routing_to(gateway.base_url)), library.Client() as client:
        client.post("http://user.invalid/chat/completions", json=BODY)
    own = WIRE.libraries[library.__name__].sync_client()
    assert not own.is_closed
    wire.uninstall()
    assert own.is_closed


def test_each_event_loop_has_its_own_client(library: Any, gateway: FakeOpenAI, installed: None) -> None:
    async def call() -> int:
        async with library.AsyncClient() as client:
            return int((await client.post("http://user.invalid/chat/completions", json=BODY)).status_code)

    with rollout(routing_to(gateway.base_url)):
        assert [asyncio.run(call()) for _ in range(3)] == [200, 200, 200]
