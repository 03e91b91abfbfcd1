"""Fifty episodes at once against the real gateway and engine: every token, under the right rollout, role and parent.

The truth is independent of what is checked: who speaks stands in the prompts, and the engine is watched from outside
the gateway, so that its tokens are compared with those of the records.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import AutoTokenizer

from integration_tests.langchain.apps import team
from integration_tests.langchain.conftest import Run
from leyden.interfaces import Access, Delta, Generation, GenerationRequest
from leyden.roles import Policy, Sampling
from leyden.spans import Completion, Kind, Record, Span, Status
from leyden.wire.calls import ModelCall
from leyden_plugins.engines.transformers import TransformersEngine
from leyden_plugins.gateway.dialects import ChoiceSoFar
from leyden_plugins.gateway.exchange import Exchange
from leyden_plugins.gateway.gateway import HttpGateway
from tests.capture.rollouts import Recorded, rollout, routing_to
from tests.capture.servers import FakeOpenAI

MODEL = Path(__file__).parents[2] / "examples" / "text_to_sql" / "model"
TRAINED = ("planner", "critic")
EPISODES = 50
MAX_TOKENS = 8

pytestmark = pytest.mark.usefixtures("instrumented")


@dataclass
class Made:
    """One generation as the engine made it."""

    request: GenerationRequest
    prompt_token_ids: Sequence[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def speaker(self) -> tuple[str, str]:
        """Return the rollout and role that the prompt names."""
        system, user = (str(message["content"]) for message in self.request.messages)
        return user.removeprefix("rollout="), system.removeprefix("role=")


class WatchedEngine(TransformersEngine):
    """Remembers what it made."""

    def __init__(self) -> None:
        super().__init__(MODEL, seed=1)
        self.made: list[Made] = []

    async def generate(self, request: GenerationRequest) -> Generation:
        generation = await super().generate(request)
        made = Made(request, list(generation.prompt_token_ids))
        self.made.append(made)

        async def deltas() -> AsyncIterator[Delta]:
            async for delta in generation.deltas:
                made.token_ids += delta.token_ids
                made.logprobs += delta.logprobs
                yield delta

        return replace(generation, deltas=deltas())


@dataclass
class Outcome:
    """What fifty episodes left behind."""

    made: list[Made]
    completions: list[Completion]
    episodes: dict[str, Recorded]
    errors: list[BaseException]
    """What the agents raised."""


@asynccontextmanager
async def serving(outcome: Outcome) -> AsyncIterator[HttpGateway]:
    engine, gateway = WatchedEngine(), HttpGateway()

    async def keep(records: Sequence[Record]) -> None:
        outcome.completions += [record for record in records if isinstance(record, Completion)]

    await engine.start([Policy("sql")])
    await gateway.start(engine, keep)
    try:
        yield gateway
    finally:
        await gateway.stop()
        await engine.stop()
        outcome.made = engine.made


async def run_many(base_url: str, count: int, *, is_sync: bool, streaming: bool) -> Outcome:
    """Run `count` episodes at once, sync ones in threads."""
    app = team(base_url, is_sync=is_sync, max_tokens=MAX_TOKENS, **({"streaming": True} if streaming else {}))
    outcome = Outcome([], [], {}, [])
    pool = ThreadPoolExecutor(16)

    async with serving(outcome) as gateway:

        async def one(rollout_id: str) -> None:
            access = Access(rollout_id=rollout_id, attempt=1, models={"sql": Sampling(max_tokens=MAX_TOKENS)})
            routing = routing_to(gateway.base_url, *TRAINED)
            routing = msgspec.structs.replace(routing, token=gateway.admit(access))
            task = {"task": f"rollout={rollout_id}", "log": []}

            def in_thread() -> None:
                with rollout(routing, rollout_id) as outcome.episodes[rollout_id]:
                    app.invoke(task)

            if is_sync:
                await asyncio.get_running_loop().run_in_executor(pool, in_thread)
            else:
                with rollout(routing, rollout_id) as outcome.episodes[rollout_id]:
                    await app.ainvoke(task)

        ids = [f"r{index}" for index in range(count)]
        ended = await asyncio.gather(*map(one, ids), return_exceptions=True)
        outcome.errors = [error for error in ended if error is not None]
        await asyncio.gather(*map(gateway.revoke, ids))
    pool.shutdown()
    return outcome


def wrong(outcome: Outcome, user: FakeOpenAI) -> list[object]:
    """List everything that disagrees with the prompts or with the engine."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    faults: list[object] = list(outcome.errors)
    speakers = Counter(made.speaker for made in outcome.made)
    if speakers != Counter((rollout_id, role) for rollout_id in outcome.episodes for role in TRAINED):
        faults.append(("the engine was not asked once by each", speakers))
    completions = {(each.rollout_id, each.role): each for each in outcome.completions}
    if len(completions) != len(outcome.completions) or len(completions) != len(outcome.made):
        faults.append(("completions", len(outcome.completions), len(completions)))
    for made in outcome.made:
        rendered = tokenizer.apply_chat_template(list(made.request.messages), add_generation_prompt=True)
        found = completions.get(made.speaker)
        if found is None:
            faults.append(("no completion", made.speaker))
            continue
        (choice,) = found.choices
        if list(found.prompt_token_ids) != list(rendered["input_ids"]):
            faults.append(("prompt", made.speaker))
        if (list(choice.token_ids), list(choice.logprobs)) != (made.token_ids, made.logprobs) or not made.token_ids:
            faults.append(("tokens", made.speaker, choice.token_ids, made.token_ids))
        said = str(tokenizer.decode(made.token_ids, skip_special_tokens=True))
        faults += wrong_span(outcome.episodes[made.speaker[0]], found, said)
    for rollout_id, episode in outcome.episodes.items():
        if Counter(span.role for span in episode.calls) != {"planner": 1, "worker": 2, "critic": 1}:
            faults.append(("calls", rollout_id, [span.role for span in episode.calls]))
    if {seen.true_role for seen in user.seen} != {"worker"} or len(user.seen) != 2 * len(outcome.episodes):
        faults.append(("misrouted to the user", len(user.seen)))
    if any(seen.headers["authorization"] != "Bearer user-key" for seen in user.seen):
        faults.append("the user's key is not the user's")
    return faults


def wrong_span(episode: Recorded, completion: Completion, said: str) -> list[object]:
    """List what disagrees between a completion and the span that an adapter wrote for it."""
    spans: dict[str, Span] = {span.span_id: span for span in episode.calls}
    span = spans.get(completion.span_id)
    if span is None:
        return [("span of another rollout", completion.rollout_id)]
    parent = episode.parent_of(span)
    faults: list[object] = []
    if span.role != completion.role or (parent.kind, parent.role) != (Kind.AGENT, completion.role):
        faults.append(("role or parent", completion.role, span.role, parent))
    if (span.status, completion.status, completion.delivered) != (Status.OK, Status.OK, True):
        faults.append(("status", span.status, completion.status))
    messages: Any = span.attributes.get("gen_ai.output.messages") or [{}]
    if str(messages[0].get("content")).strip() != said.strip():
        faults.append(("the agent heard something else", messages, said))
    return faults


@pytest.mark.parametrize("streaming", [False, True], ids=["json", "streaming"])
@pytest.mark.parametrize("is_sync", [False, True], ids=["async", "sync"])
def test_every_trained_call_has_its_exact_tokens_and_no_other_has_any(
    run: Run, user_server: FakeOpenAI, is_sync: bool, streaming: bool
) -> None:
    outcome = run(run_many(user_server.base_url, EPISODES, is_sync=is_sync, streaming=streaming))
    assert wrong(outcome, user_server) == []
    assert len(outcome.completions) == 2 * EPISODES


Change = Callable[[pytest.MonkeyPatch], None]


def change_headers(change: Callable[[dict[str, str]], None]) -> Change:
    def apply(patch: pytest.MonkeyPatch) -> None:
        original = ModelCall.headers

        def headers(call: ModelCall) -> dict[str, str]:
            found = original(call)
            change(found)
            return found

        patch.setattr(ModelCall, "headers", headers)

    return apply


def drop_role(headers: dict[str, str]) -> None:
    headers.pop("x-leyden-role")


def swap_roles(headers: dict[str, str]) -> None:
    headers["x-leyden-role"] = {"planner": "critic", "critic": "planner"}[headers["x-leyden-role"]]


def swap_span_and_parent(headers: dict[str, str]) -> None:
    headers["x-leyden-span"], headers["x-leyden-parent"] = headers["x-leyden-parent"], headers["x-leyden-span"]


def swap_tokens(headers: dict[str, str], seen: dict[str, str] = {}) -> None:  # noqa: B006  # remembers the first
    headers["authorization"] = seen.setdefault("first", headers["authorization"])


def change_one_id(patch: pytest.MonkeyPatch) -> None:
    take = ChoiceSoFar.take
    changed: list[Delta] = []

    def taken(choice: ChoiceSoFar, delta: Delta) -> None:
        if delta.token_ids and not changed:
            changed.append(delta)
            delta = replace(delta, token_ids=[delta.token_ids[0] ^ 1, *delta.token_ids[1:]])
        take(choice, delta)

    patch.setattr(ChoiceSoFar, "take", taken)


def cut_one_stream(patch: pytest.MonkeyPatch) -> None:
    write = Exchange.write
    cut: list[Exchange] = []

    async def writing(exchange: Exchange, events: bytes, *, last: bool = False) -> None:
        if not cut and exchange.is_streaming:
            cut.append(exchange)
        if exchange not in cut:
            await write(exchange, events, last=last)
        elif last:
            await write(exchange, b"", last=True)

    patch.setattr(Exchange, "write", writing)


@pytest.mark.parametrize(
    ("mutate", "expected"),
    [
        (change_headers(drop_role), "no completion"),
        (change_headers(swap_roles), "role or parent"),
        (change_headers(swap_span_and_parent), "span of another rollout"),
        (change_headers(swap_tokens), "not good for rollout"),
        (change_one_id, "tokens"),
        (cut_one_stream, "the agent heard something else"),
    ],
    ids=["role dropped", "roles swapped", "span swapped", "token of another rollout", "one id", "stream cut"],
)
def test_the_check_above_finds_a_broken_path(
    run: Run, user_server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, mutate: Change, expected: str
) -> None:
    mutate(monkeypatch)
    outcome = run(run_many(user_server.base_url, 4, is_sync=False, streaming=True))
    assert [fault for fault in wrong(outcome, user_server) if expected in str(fault)]
