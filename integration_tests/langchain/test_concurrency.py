"""Fifty episodes at once: every call has the right rollout, role and parent. The truth stands in the prompts."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import pytest

from integration_tests.langchain.apps import team
from integration_tests.langchain.conftest import Run
from leyden.spans import Kind, Status
from leyden.wire.calls import ModelCall
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

TRAINED = ("worker", "critic")
EPISODES = 50
CALLS = {"planner": 1, "worker": 2, "critic": 1}

pytestmark = pytest.mark.usefixtures("instrumented")


def wrong(episodes: dict[str, Recorded], user: FakeOpenAI, gateway: FakeOpenAI) -> list[object]:
    """List everything that disagrees with the prompts."""
    faults: list[object] = []
    spans = {span.span_id: (rollout_id, span) for rollout_id, each in episodes.items() for span in each.calls}
    for seen in gateway.seen:
        claimed = {name: unquote(seen.headers.get(f"x-leyden-{name}", "")) for name in ("rollout", "role", "span")}
        rollout_id, span = spans.get(claimed["span"], (None, None))
        truth = (seen.marked("rollout"), seen.true_role)
        if truth != (claimed["rollout"], claimed["role"]) or span is None or truth != (rollout_id, span.role):
            faults.append(("header", truth, claimed))
        if seen.headers["authorization"] != "Bearer gateway-token" or seen.true_role not in TRAINED:
            faults.append(("misrouted to the gateway", truth))
    for seen in user.seen:
        if seen.headers["authorization"] != "Bearer user-key" or seen.true_role in TRAINED:
            faults.append(("misrouted to the user", seen.true_role))
    for rollout_id, each in episodes.items():
        roles: dict[str, int] = {}
        for span in each.calls:
            messages = str(span.attributes["gen_ai.input.messages"])
            roles[span.role] = roles.get(span.role, 0) + 1
            if f"rollout={rollout_id}'" not in messages or f"role={span.role}" not in messages:
                faults.append(("span", rollout_id, span.role, messages))
            if each.parent_of(span).kind is not Kind.AGENT or each.parent_of(span).role != span.role:
                faults.append(("parent", span.role, each.parent_of(span)))
        if roles != CALLS or any(span.status is not Status.OK for span in each.calls):
            faults.append(("calls", rollout_id, roles))
        if len(each.spans(Kind.TOOL)) != 3:
            faults.append(("tools", rollout_id, len(each.spans(Kind.TOOL))))
    if len({seen.headers.get("x-leyden-span") for seen in gateway.seen}) != 3 * len(episodes):
        faults.append("a call of a trained role is missing or shares its span")
    return faults


async def consume(app: Any, mode: str, task: dict[str, Any]) -> None:
    if mode == "invoke":
        await app.ainvoke(task)
    elif mode == "messages":
        async for _ in app.astream(task, stream_mode=["messages", "updates"]):
            pass
    elif mode == "events":
        async for _ in app.astream_events(task, version="v2"):
            pass
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is beta
            events = await app.astream_events(task, version="v3")
        async for _ in events:
            pass


async def run_many(app: Any, mode: str, base_url: str, count: int) -> dict[str, Recorded]:
    async def one(rollout_id: str) -> Recorded:
        with rollout(routing_to(base_url, *TRAINED), rollout_id) as recorded:
            await consume(app, mode, {"task": f"rollout={rollout_id}", "log": []})
        return recorded

    ids = [f"r{index}" for index in range(count)]
    return dict(zip(ids, await asyncio.gather(*map(one, ids)), strict=True))


@pytest.mark.parametrize(
    ("mode", "options", "count"),
    [
        ("invoke", {}, EPISODES),
        ("invoke", {"streaming": True}, EPISODES),
        ("messages", {}, EPISODES),
        ("events", {}, 10),
        ("v3", {}, 10),
    ],
    ids=["invoke", "streaming-model", "astream", "astream_events", "astream_events-v3"],
)
def test_async_episodes_are_told_apart(
    run: Run, user_server: FakeOpenAI, gateway: FakeOpenAI, mode: str, options: dict[str, Any], count: int
) -> None:
    app = team(user_server.base_url, **options)
    episodes = run(run_many(app, mode, gateway.base_url, count))
    assert wrong(episodes, user_server, gateway) == []
    assert len(gateway.seen) + len(user_server.seen) == 4 * count


@pytest.mark.parametrize("streaming", [False, True])
def test_sync_episodes_in_threads_are_told_apart(user_server: FakeOpenAI, gateway: FakeOpenAI, streaming: bool) -> None:
    app = team(user_server.base_url, is_sync=True, **({"streaming": True} if streaming else {}))

    def one(rollout_id: str) -> Recorded:
        with rollout(routing_to(gateway.base_url, *TRAINED), rollout_id) as recorded:
            app.invoke({"task": f"rollout={rollout_id}", "log": []})
        return recorded

    ids = [f"r{index}" for index in range(EPISODES)]
    with ThreadPoolExecutor(16) as pool:
        episodes = dict(zip(ids, pool.map(one, ids), strict=True))
    assert wrong(episodes, user_server, gateway) == []


def drop_role(headers: dict[str, str]) -> None:
    headers.pop("x-leyden-role")


def swap_role_and_rollout(headers: dict[str, str]) -> None:
    headers["x-leyden-role"], headers["x-leyden-rollout"] = headers["x-leyden-rollout"], headers["x-leyden-role"]


def leak_span(headers: dict[str, str], seen: dict[str, str] = {}) -> None:  # noqa: B006  # remembers the first
    headers["x-leyden-span"] = seen.setdefault("first", headers["x-leyden-span"])


@pytest.mark.parametrize("mutate", [drop_role, swap_role_and_rollout, leak_span])
def test_the_check_above_finds_a_broken_wire(
    run: Run,
    user_server: FakeOpenAI,
    gateway: FakeOpenAI,
    monkeypatch: pytest.MonkeyPatch,
    mutate: Callable[[dict[str, str]], None],
) -> None:
    original = ModelCall.headers

    def mutated(call: ModelCall) -> dict[str, str]:
        headers = original(call)
        mutate(headers)
        return headers

    monkeypatch.setattr(ModelCall, "headers", mutated)
    episodes = run(run_many(team(user_server.base_url), "invoke", gateway.base_url, 3))
    assert wrong(episodes, user_server, gateway)
