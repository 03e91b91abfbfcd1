"""Who makes a call when the context does not say: headers, keys, and what is refused."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import leyden
from leyden import context, wire
from leyden.context import role
from leyden.errors import ConfigurationError, LostContextError
from leyden.spans import Kind, Status
from tests.capture.clients import KINDS, send
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

CHAT = "/chat/completions"
USER = "http://user.invalid/v1"


@pytest.fixture(autouse=True)
def wired(installed: None) -> None:
    """Every test here runs with the wire."""


def body(text: str = "role=writer") -> bytes:
    return json.dumps({"model": "gpt", "messages": [{"role": "user", "content": text}]}).encode()


def call(base_url: str = USER, headers: dict[str, str] | None = None, text: str = "role=writer") -> None:
    httpx.post(base_url + CHAT, content=body(text), headers=headers)


async def async_call(base_url: str = USER, headers: dict[str, str] | None = None) -> None:
    async with httpx.AsyncClient() as client:
        await client.post(base_url + CHAT, content=body(), headers=headers)


def roles(recorded: Recorded) -> list[str]:
    return [span.role for span in recorded.calls]


# ---- headers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_role_in_the_users_own_headers_wins_over_the_frame(
    kind: str, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    named = {"x-leyden-role": "schreiber%2F%C3%BC"}
    with rollout(routing_to(gateway.base_url, "schreiber/ü")) as recorded, role("critic"):
        send(kind, user_server.base_url + CHAT, body(), named)
        send(kind, user_server.base_url + CHAT, body())
    assert [seen.headers["x-leyden-role"] for seen in gateway.seen] == ["schreiber%2F%C3%BC"]
    assert roles(recorded) == ["schreiber/ü", "critic"]
    assert {recorded.parent_of(span).name for span in recorded.calls} == {"critic"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_endpoint_gets_the_same_body_without_leydens_headers(
    kind: str, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    marks = {"x-leyden-role": "critic", "x-leyden-parent": "p", "x-other": "kept"}
    with rollout(routing_to(gateway.base_url, "writer")) as recorded, role("writer"):
        send(kind, user_server.base_url + CHAT, body(), marks)
    (seen,) = user_server.seen
    assert seen.raw == body()
    assert [name for name in seen.headers if name.startswith("x-")] == ["x-other"]
    assert roles(recorded) == ["critic"]


def test_where_nothing_runs_or_is_deployed_the_headers_pass_untouched(user_server: FakeOpenAI) -> None:
    call(user_server.base_url, {"x-leyden-role": "writer", "x-leyden-rollout": "elsewhere"})
    assert user_server.seen[0].headers["x-leyden-rollout"] == "elsewhere"


def test_a_header_renames_the_call_that_an_adapter_has_opened(user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url, "writer")) as recorded:
        frame = context.current()
        assert frame is not None and frame.rollout is not None
        opened = frame.rollout.open(Kind.MODEL_CALL, "adapter's", "critic", frame.span_id)
        token = context.enter(context.Frame(frame.rollout, "critic", frame.span_id, opened))
        call(headers={"x-leyden-role": "writer"})
        context.leave(token)
        opened.close()
    assert [(span.name, span.role) for span in recorded.calls] == [("adapter's", "writer")]
    assert recorded.context.spoken_roles == {"writer": 1}
    assert gateway.seen[0].headers["x-leyden-span"] == opened.span_id


def test_headers_carry_a_call_to_a_worker_that_serves_every_rollout(gateway: FakeOpenAI) -> None:
    jobs: queue.Queue[dict[str, str] | None] = queue.Queue()

    def serve() -> None:
        while (headers := jobs.get()) is not None:
            call(headers=headers)
            jobs.task_done()

    worker = threading.Thread(target=serve)
    worker.start()
    routing = routing_to(gateway.base_url)
    with rollout(routing, "r/1") as first, rollout(routing, "r/2") as second:
        with role("writer"):
            jobs.put(leyden.headers())
            jobs.put(leyden.headers("editor"))
        first_frame = context.Frame(first.context, "main", first.context.root_id)
        token = context.enter(first_frame)
        jobs.put(leyden.headers())
        context.leave(token)
        jobs.join()
    jobs.put(None)
    worker.join()
    assert roles(first) == ["main"]
    assert roles(second) == ["writer", "editor"]
    assert {second.parent_of(span).name for span in second.calls} == {"writer"}
    assert [seen.headers["x-leyden-rollout"] for seen in gateway.seen] == ["r%2F2", "r%2F2", "r%2F1"]


def test_headers_name_what_there_is_to_name() -> None:
    assert leyden.headers() == {}
    assert leyden.headers("ü") == {"x-leyden-role": "%C3%BC"}
    with role("critic"):
        assert leyden.headers() == {"x-leyden-role": "critic"}
    with rollout(rollout_id="r 1") as recorded:
        assert leyden.headers() == {
            "x-leyden-rollout": "r%201",
            "x-leyden-attempt": "1",
            "x-leyden-role": "main",
            "x-leyden-parent": recorded.context.root_id,
        }


@pytest.mark.parametrize("field", ["x-leyden-rollout", "x-leyden-attempt"])
def test_a_call_for_a_rollout_or_attempt_that_does_not_run_is_refused_and_never_given_to_another(
    field: str, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded:
        with pytest.raises(LostContextError, match=r"meant for rollout '(r1|7)', which does not run .* any more"):
            call(user_server.base_url, {**leyden.headers(), field: "7"})
    assert recorded.calls == [] and user_server.seen == gateway.seen == []


def test_a_deployed_app_takes_the_role_from_the_header(user_server: FakeOpenAI, gateway: FakeOpenAI) -> None:
    wire.set_default_routing(routing_to(gateway.base_url, "writer"))
    try:
        call(headers={"x-leyden-role": "writer"})
        call(user_server.base_url, {"x-leyden-role": "critic"})
    finally:
        wire.set_default_routing(None)
    assert len(gateway.seen) == 1
    assert "x-leyden-role" not in user_server.seen[0].headers


def test_plain_code_declares_the_roles_that_may_stay_silent() -> None:
    leyden.declare_roles("nobody")
    with rollout() as recorded:
        leyden.declare_roles("writer", "editor")
        with role("critic"):
            pass
    assert recorded.context.declared_roles == {"writer", "editor", "critic"}


# ---- endpoints -------------------------------------------------------------------------------------------------


def test_an_endpoint_names_rollout_and_role_twice(gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url, "main", "a/ü"), "r 1") as recorded:
        place = leyden.endpoint("a/ü")
        main = leyden.endpoint()
    root = gateway.base_url.removesuffix("/v1")
    assert place.base_url == f"{root}/rollout/r%201/role/a%2F%C3%BC/v1"
    assert place.anthropic_base_url == f"{root}/rollout/r%201/role/a%2F%C3%BC"
    assert (place.api_key, place.model) == (f"gateway-token:a%2F%C3%BC:{recorded.context.root_id}", "sql")
    assert main.base_url.endswith("/role/main/v1")
    assert "gateway-token" not in repr(place)
    assert "a/ü" in recorded.context.declared_roles


def test_an_endpoint_is_the_deployed_server_where_nothing_runs() -> None:
    wire.set_default_routing(routing_to("http://served/v1", "writer"))
    try:
        place = leyden.endpoint("writer")
    finally:
        wire.set_default_routing(None)
    assert (place.base_url, place.anthropic_base_url) == ("http://served/v1", "http://served")
    assert (place.api_key, place.model) == ("gateway-token", "sql")


def test_an_endpoint_that_does_not_exist_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"endpoint\('main'\) was called outside a rollout .* leyden\.deploy"):
        leyden.endpoint()
    with rollout(routing_to("http://x/v1", "writer", "editor-*")):
        with pytest.raises(ConfigurationError, match=r"role 'critic' is in no policy.*\[\['writer', 'editor-\*'\]\]"):
            leyden.endpoint("critic")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_a_key_given_out_here_names_its_rollout_and_role_also_without_context(
    kind: str, header: str, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, "writer", "ü")) as recorded:
        place = leyden.endpoint("ü")
        key = f"Bearer {place.api_key}" if header == "authorization" else place.api_key
        with role("writer"), ThreadPoolExecutor(1) as pool:
            pool.submit(send, kind, place.base_url + CHAT, body(), {header: key}).result()
            send(kind, place.base_url + CHAT, body(), {header: key})
    assert roles(recorded) == ["ü", "ü"]
    assert {seen.path for seen in gateway.seen} == {"/v1/chat/completions"}
    assert {seen.headers["authorization"] for seen in gateway.seen} == {"Bearer gateway-token"}
    assert [span.span_id for span in recorded.calls] == [seen.headers["x-leyden-span"] for seen in gateway.seen]


# ---- lost contexts ---------------------------------------------------------------------------------------------


def in_a_thread(base_url: str = USER) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            call(base_url)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


def in_a_pool(base_url: str = USER) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call, base_url).result()


def in_an_executor(base_url: str = USER) -> None:
    async def main() -> None:
        await asyncio.get_running_loop().run_in_executor(None, call, base_url)

    asyncio.run(main())


def in_a_foreign_loop(base_url: str = USER) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(async_call(base_url))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]


LOSING = [in_a_thread, in_a_pool, in_an_executor, in_a_foreign_loop]


@pytest.mark.parametrize("lose", LOSING)
def test_a_call_whose_context_is_lost_is_refused_with_its_line_and_the_cures(lose: Any, gateway: FakeOpenAI) -> None:
    before = wire.lost_calls()
    with rollout(routing_to(gateway.base_url)) as recorded:
        with pytest.raises(
            LostContextError, match=r"test_callers\.py:\d+ in (async_)?call belongs to no known"
        ) as lost:
            lose()
    assert "leyden.instrument(threads=True)" in str(lost.value) and "leyden.headers()" in str(lost.value)
    assert wire.lost_calls() == before + 1
    assert gateway.seen == [] and recorded.calls == []


@pytest.mark.parametrize("lose", LOSING)
def test_threads_that_copy_the_context_lose_nothing(lose: Any, gateway: FakeOpenAI) -> None:
    leyden.instrument([], threads=True)
    try:
        with rollout(routing_to(gateway.base_url)) as recorded, role("writer"):
            lose()
    finally:
        leyden.uninstrument()
    assert roles(recorded) == ["writer"]
    assert recorded.parent_of(recorded.calls[0]).name == "writer"


@pytest.mark.parametrize("lose", LOSING)
def test_lost_calls_may_pass_to_the_users_endpoint_unrecorded(
    lose: Any, user_server: FakeOpenAI, gateway: FakeOpenAI
) -> None:
    with rollout(routing_to(gateway.base_url, on_lost_context="pass")) as recorded:
        lose(user_server.base_url)
    assert [seen.raw for seen in user_server.seen] == [body()]
    assert gateway.seen == [] and recorded.calls == []


def test_threads_of_two_rollouts_at_once_keep_theirs_apart(gateway: FakeOpenAI) -> None:
    leyden.instrument([], threads=True)
    found: dict[str, Recorded] = {}

    def episode(name: str) -> None:
        with rollout(routing_to(gateway.base_url), name) as recorded, role(f"writer-{name}"):
            found[name] = recorded
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda _: call(text=f"rollout={name}"), range(4)))

    try:
        threads = [threading.Thread(target=episode, args=(f"r{number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        leyden.uninstrument()
    assert {name: roles(recorded) for name, recorded in found.items()} == {
        f"r{number}": [f"writer-r{number}"] * 4 for number in range(8)
    }
    for seen in gateway.seen:
        assert seen.headers["x-leyden-rollout"] == seen.marked("rollout")


# ---- tools -----------------------------------------------------------------------------------------------------


def test_a_tool_of_plain_code_is_recorded_below_its_agent(gateway: FakeOpenAI) -> None:
    with rollout(routing_to(gateway.base_url)) as recorded, role("writer"):
        with leyden.tool("search", query="x"):
            call()
        with pytest.raises(ZeroDivisionError), leyden.tool("broken"):
            raise ZeroDivisionError("by hand")
    search, broken = recorded.spans(Kind.TOOL)
    assert (search.name, search.role, search.status) == ("search", "writer", Status.OK)
    assert search.attributes == {"gen_ai.tool.name": "search", "query": "x"}
    assert recorded.parent_of(search).name == "writer"
    assert recorded.parent_of(recorded.calls[0]) is search
    assert (broken.status, broken.error) == (Status.ERROR, "ZeroDivisionError: by hand")
