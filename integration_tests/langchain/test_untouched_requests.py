"""What a user's own endpoint sees of untrained roles: the same bytes and headers as without Leyden."""

from __future__ import annotations

from collections import Counter
from typing import Any

import openai
import pytest

import leyden
from integration_tests.langchain.apps import team
from integration_tests.langchain.conftest import Run
from tests.capture.rollouts import rollout, routing_to
from tests.capture.servers import FakeOpenAI

KEY = "Bearer user-key"


def requests(server: FakeOpenAI) -> Counter[tuple[object, ...]]:
    """Return what arrived, byte for byte, with every header."""
    return Counter((seen.path, seen.raw, *sorted(seen.headers.items())) for seen in server.seen)


@pytest.mark.parametrize("options", [{}, {"streaming": True}], ids=["json", "streaming"])
@pytest.mark.parametrize("is_sync", [False, True], ids=["async", "sync"])
def test_untrained_roles_of_a_graph_send_what_they_send_without_leyden(
    run: Run, user_server: FakeOpenAI, gateway: FakeOpenAI, is_sync: bool, options: dict[str, Any]
) -> None:
    app = team(user_server.base_url, is_sync=is_sync, **options)

    async def episode() -> None:
        task = {"task": "rollout=r1", "log": []}
        if is_sync:
            app.invoke(task)
        else:
            await app.ainvoke(task)

    run(episode())
    plain = requests(user_server)
    user_server.clear()
    leyden.instrument(["langchain"])
    try:
        with rollout(routing_to(gateway.base_url, "critic")):
            run(episode())
    finally:
        leyden.uninstrument()
    moved = [each for each in plain.elements() if b"role=critic" in bytes(each[1])]  # type: ignore[call-overload]
    assert len(moved) == len(gateway.seen) == 1
    assert requests(user_server) == plain - Counter(moved)
    assert all(seen.headers["authorization"] == KEY for seen in user_server.seen)
    (trained,) = gateway.seen
    assert "user-key" not in str(trained.headers) and b"user-key" not in trained.raw


@pytest.mark.parametrize("stream", [False, True], ids=["json", "streaming"])
def test_the_openai_client_sends_the_same_bytes_and_headers(
    user_server: FakeOpenAI, gateway: FakeOpenAI, stream: bool
) -> None:
    def ask(role: str) -> None:
        client = openai.OpenAI(base_url=user_server.base_url, api_key="user-key", default_headers={"x-team": "blue"})
        message = {"role": "user", "content": f"role={role} ä \u2028 x"}
        answer: Any = client.chat.completions.create(model="m", messages=[message], stream=stream, temperature=0.0)  # type: ignore[call-overload]
        if stream:
            list(answer)
        client.close()

    ask("critic")
    plain = requests(user_server)
    user_server.clear()
    leyden.instrument()
    try:
        with rollout(routing_to(gateway.base_url, "writer")):
            for role in ("critic", "writer"):
                with leyden.role(role):
                    ask(role)
    finally:
        leyden.uninstrument()
    assert requests(user_server) == plain
    (trained,) = gateway.seen
    assert "user-key" not in str(trained.headers) and "blue" not in str(trained.headers)
