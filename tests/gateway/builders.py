"""A running gateway with a fake engine behind it, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from leyden.interfaces import Access, Delta, Generation, GenerationRequest
from leyden.roles import AGENTS_OWN, Policy, Route, Sampling
from leyden.spans import Completion, Record, Span
from leyden.testing.fakes import FakeEngine
from leyden_plugins.gateway import HttpGateway, Limits

CHAT = "/v1/chat/completions"


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), timeout=60))

    return run


def ask(text: str = "hello", **fields: object) -> dict[str, object]:
    """Return a chat request."""
    return {"model": "sql", "messages": [{"role": "user", "content": text}]} | fields


def access(rollout_id: str = "r1", **changes: Any) -> Access:
    """Return the access of an attempt whose policy `sql` speaks for `writer` and `rewriter`."""
    values: dict[str, Any] = {
        "rollout_id": rollout_id,
        "attempt": 1,
        "models": {"sql": Sampling()},
        "routes": (Route(model="sql", roles=("writer", "rewriter", "main", "über/*")),),
    }
    return Access(**(values | changes))


def named(span: str = "s1", rollout: str = "r1", **others: str) -> dict[str, str]:
    """Return the headers that the wire sends."""
    values = {"rollout": rollout, "attempt": "1", "role": "writer", "span": span, "parent": "p1", "http-attempt": "0"}
    return {f"x-leyden-{name}": value for name, value in (values | others).items()}


@dataclass
class Running:
    """A gateway that runs, and what came out of it."""

    gateway: HttpGateway
    engine: FakeEngine
    client: httpx.AsyncClient
    records: list[Record]

    def headers(self, token: str, **named_headers: str) -> dict[str, str]:
        """Return the headers of a call with a token."""
        return {"authorization": f"Bearer {token}", **named_headers}

    async def post(
        self, token: str, body: object, headers: dict[str, str] | None = None, path: str = CHAT
    ) -> httpx.Response:
        """Send a body as JSON."""
        return await self.client.post(
            path, content=msgspec.json.encode(body), headers={"authorization": f"Bearer {token}"} | (headers or {})
        )

    async def completions(self, rollout_id: str = "r1") -> list[Completion]:
        """End a rollout; return its completions."""
        await self.gateway.revoke(rollout_id)
        return [one for one in self.records if isinstance(one, Completion) and one.rollout_id == rollout_id]

    def spans(self) -> list[Span]:
        return [one for one in self.records if isinstance(one, Span)]


@contextlib.asynccontextmanager
async def running(
    engine: FakeEngine | None = None,
    *,
    policies: Sequence[str] = ("sql",),
    record: Callable[[Sequence[Record]], Awaitable[None]] | None = None,
    exact_continuation: bool = False,
    **limits: Any,
) -> AsyncIterator[Running]:
    """Run a gateway until the block ends."""
    engine = engine or FakeEngine()
    await engine.start([Policy(name) for name in policies])
    records: list[Record] = []

    async def keep(batch: Sequence[Record]) -> None:
        records.extend(batch)

    gateway = HttpGateway(limits=Limits(**limits), exact_continuation=exact_continuation)
    await gateway.start(engine, record or keep)
    async with httpx.AsyncClient(base_url=gateway.base_url.removesuffix("/v1"), timeout=30) as client:
        try:
            yield Running(gateway, engine, client, records)
        finally:
            await gateway.stop()


def events(response: httpx.Response | bytes) -> list[Any]:
    """Return the data of a stream's events; the last is the string `[DONE]` when it ended well."""
    raw = response if isinstance(response, bytes) else response.content
    lines = [line[6:] for line in raw.decode().split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else msgspec.json.decode(line) for line in lines]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that must happen soon.

    Raises:
        TimeoutError: it did not.
    """
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def own_sampling(models: Iterable[str] = ("sql",)) -> dict[str, Sampling]:
    """Return an access's models that leave every parameter to the agent."""
    return dict.fromkeys(models, AGENTS_OWN)


class BlockedEngine(FakeEngine):
    """Starts generations only while `go` is set; the request has reached the engine by then."""

    def __init__(self, script: Any = "ok", **options: Any) -> None:
        super().__init__(script, **options)
        self.go = asyncio.Event()
        self.waiting = 0

    async def generate(self, request: GenerationRequest) -> Generation:
        self.waiting += 1
        try:
            await self.go.wait()
        finally:
            self.waiting -= 1
        return await super().generate(request)


class OpenDeltas:
    """Deltas that only `aclose` ends, as those of an engine that samples in another thread."""

    def __init__(self) -> None:
        self.closed = 0
        self.asked = 0

    def __aiter__(self) -> OpenDeltas:
        return self

    async def __anext__(self) -> Delta:
        self.asked += 1
        if self.asked > 1:
            await asyncio.get_running_loop().create_future()
        return Delta(index=0, text="x", token_ids=[120], logprobs=[-1.0])

    async def aclose(self) -> None:
        self.closed += 1


class OpenEngine(FakeEngine):
    """Gives one piece of an answer and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.deltas = OpenDeltas()

    async def generate(self, request: GenerationRequest) -> Generation:
        return Generation(prompt_token_ids=[1], version=0, deltas=self.deltas)
