"""The gateway's ASGI app: routes, and the life of one call.

One idea: whatever happens to an admitted call (a bad field, a dead engine, a client that leaves), it ends in
exactly one place, `converse`, which answers what can still be answered and records it once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec

from leyden.errors import EngineError
from leyden.interfaces import Generation, GenerationRequest
from leyden.spans import Record, Status
from leyden_plugins.gateway.access import AccessTable, Caller, sampling_for, unquoted
from leyden_plugins.gateway.call import Call
from leyden_plugins.gateway.dialects import Decode, Dialect, Question
from leyden_plugins.gateway.dialects.chat import error_body
from leyden_plugins.gateway.exchange import Disconnected, Exchange, Receive, Scope, Send
from leyden_plugins.gateway.gate import Gate
from leyden_plugins.gateway.refusal import RETRY_AFTER_SECONDS, Refusal, refusal_of

logger = logging.getLogger(__name__)

KEEP_ALIVE = b": waiting for new weights\n\n"
"""A comment of the event stream: clients skip it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the gateway takes on."""

    body_bytes: int = 32 * 2**20
    calls: int = 1024
    """At once, held ones included."""
    hold_seconds: float = 30.0
    """How long a JSON call waits for new weights before it gets a 503; a stream waits on and is kept alive."""
    keep_alive_seconds: float = 5.0
    """Time between two comments on a held stream."""


@dataclass(frozen=True)
class Place:
    """What a request's path says."""

    tail: str
    """Below `/v1/`."""
    rollout_id: str | None = None
    role: str | None = None


class Generates(Protocol):
    """The part of an engine that answers calls.

    Two more attributes are optional: `decode(token_ids) -> str`, without which log-probabilities are refused,
    and `forces_tools`, without which a tool choice that forces a call is.
    """

    async def generate(self, request: GenerationRequest) -> Generation: ...


class App:
    """Answers for one engine. Every admitted call ends in `record`, unless that is `None`."""

    def __init__(
        self,
        *,
        engine: Generates,
        access: AccessTable,
        dialects: Iterable[Dialect],
        record: Callable[[Sequence[Record]], None] | None,
        limits: Limits,
    ) -> None:
        self.calls: set[Call] = set()
        """Those not yet recorded."""
        self.gate = Gate()
        self._engine = engine
        self._access = access
        self._dialects = {dialect.path: dialect for dialect in dialects}
        self._record = record
        self._limits = limits
        self._decode: Decode | None = getattr(engine, "decode", None)
        self._forces_tools = bool(getattr(engine, "forces_tools", False))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        try:
            await self._route(exchange)
        except Refusal as refusal:
            await refuse(exchange, refusal, None)

    async def _route(self, exchange: Exchange) -> None:
        if exchange.path == "/health" and exchange.method == "GET":
            await exchange.reply(200, b'{"status":"ok"}')
            return
        place = place_of(exchange.path)
        dialect = None if place is None else self._dialects.get(place.tail)
        if place is not None and dialect is not None and exchange.method == "POST":
            caller = self._access.identify(exchange, place.rollout_id, place.role)
            await self.converse(exchange, dialect, caller)
        elif place is not None and place.tail == "models" and exchange.method == "GET":
            models = self._access.models(exchange)
            await exchange.reply(200, msgspec.json.encode(model_list(models)))
        elif exchange.path == "/health" or (place is not None and (dialect or place.tail == "models")):
            raise Refusal(405, f"{exchange.method[:20]} is not allowed for this path", code="method_not_allowed")
        else:
            paths = sorted(["/health", "/v1/models", *(f"/v1/{path}" for path in self._dialects)])
            raise Refusal(404, f"no such path; there are {', '.join(paths)}", code="not_found")

    async def converse(self, exchange: Exchange, dialect: Dialect, caller: Caller) -> None:
        """Answer one model call and record it, however it ends."""
        task = asyncio.current_task()
        assert task is not None, "an ASGI server calls its app within a task"
        call = Call(caller, task)
        limit = caller.access.timeout_seconds
        # No call outlives a whole rollout's time; the rollout itself is ended by whoever runs it.
        overdue = Refusal(504, f"the call took longer than the rollout's {limit} seconds", code="timeout")
        timer = None if limit is None else asyncio.get_running_loop().call_later(limit, call.stop, overdue)
        self.calls.add(call)
        try:
            await self._answer(exchange, dialect, call)
        except Disconnected as error:
            call.end(Status.INTERRUPTED, str(error))
        except asyncio.CancelledError:
            await self._cut(exchange, dialect, call)
            if call.stopped is None:
                raise
            task.uncancel()
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                logger.exception("a model call failed in the engine or the gateway")
            call.end(Status.ERROR, refusal.message)
            await refuse(exchange, refusal, dialect)
        finally:
            if timer is not None:
                timer.cancel()
            self.conclude(call)

    def conclude(self, call: Call) -> None:
        """Record a call; one that has not ended counts as interrupted."""
        if call in self.calls:
            self.calls.discard(call)
            call.end(Status.INTERRUPTED, "the gateway stopped waiting for this call")
            if self._record is not None:
                self._record(call.records())

    async def _cut(self, exchange: Exchange, dialect: Dialect, call: Call) -> None:
        """End a call that was stopped; tell the client if it is still there."""
        reason = call.stopped
        call.end(Status.INTERRUPTED, "the server stopped" if reason is None else str(reason))
        if isinstance(reason, Refusal):
            await refuse(exchange, reason, dialect)

    async def _answer(self, exchange: Exchange, dialect: Dialect, call: Call) -> None:
        if len(self.calls) > self._limits.calls:
            raise Refusal(
                429,
                f"more than {self._limits.calls} calls at once; try again",
                code="too_many_requests",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        question = dialect.read(parse(await exchange.body(self._limits.body_bytes)), decode=self._decode)
        policy = call.caller.policy(question.request.model)
        asked = question.request.sampling
        sampling = sampling_for(call.caller.access.models[policy], asked)
        call.ask(replace(question.request, model=policy, sampling=sampling))
        if question.request.tool_choice not in ("auto", "none") and not self._forces_tools:
            raise Refusal(
                400,
                f"tool_choice={question.request.tool_choice!r} is not supported: this engine cannot force a "
                "tool call; use 'auto' or 'none'",
                code="unsupported_value",
                param="tool_choice",
            )
        watch = asyncio.create_task(watch_client(exchange, call))
        try:
            await self._pass_gate(exchange, question)
            try:
                await self._generate(exchange, question, call)
            finally:
                self.gate.leave()
        finally:
            watch.cancel()

    async def _pass_gate(self, exchange: Exchange, question: Question) -> None:
        """Wait while weights change: a stream is kept alive, a JSON call is sent away after a while."""
        if self.gate.enter():
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.hold_seconds
        while True:
            pause = self._limits.keep_alive_seconds
            await self.gate.wait(pause if question.stream else max(0.0, deadline - loop.time()))
            if self.gate.enter():
                return
            if question.stream:
                await exchange.write(KEEP_ALIVE)
            elif loop.time() >= deadline:
                raise Refusal(
                    503,
                    f"weights have been changing for {self._limits.hold_seconds:g} seconds; try again",
                    code="held",
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                )

    async def _generate(self, exchange: Exchange, question: Question, call: Call) -> None:
        assert call.request is not None
        generation = await self._engine.generate(call.request)
        answer = call.begin(generation)
        # A stream's opening goes out with its first piece: one write less, and an engine that fails before
        # its first token can still be answered with a status.
        opening = question.first(answer) if question.stream else b""
        async with closing(generation):
            async for delta in generation.deltas:
                call.take(delta)
                if delta.finish_reason == "abort":
                    aborted = "the engine aborted this generation; try again"
                    raise Refusal(503, aborted, code="aborted", retry_after_seconds=RETRY_AFTER_SECONDS)
                if question.stream:
                    events = opening + question.chunk(answer, delta)
                    opening = b""
                    if events:
                        await exchange.write(events)
        if any(choice.finish_reason is None for choice in answer.choices):
            raise EngineError("the engine ended its answer without a finish reason; try again")
        if question.stream:
            await exchange.write(opening + question.last(answer), last=True)
        else:
            await exchange.reply(200, question.answer(answer))
        call.end(Status.OK)


@contextlib.asynccontextmanager
async def closing(generation: Generation) -> AsyncIterator[None]:
    """Close the deltas at the end, which frees the generation's place in the batch."""
    try:
        yield
    finally:
        close = getattr(generation.deltas, "aclose", None)
        if close is not None:
            await close()


async def watch_client(exchange: Exchange, call: Call) -> None:
    """Stop a call when its client goes away."""
    await exchange.disconnect()
    call.stop(Disconnected("the client went away before the answer was complete"))


async def refuse(exchange: Exchange, refusal: Refusal, dialect: Dialect | None) -> None:
    """Answer with an error, within the stream when one has begun."""
    if exchange.has_begun:
        # A JSON answer that was cut within its body stays cut: the server closes the connection.
        if exchange.is_streaming and dialect is not None:
            await exchange.write(dialect.error_event(refusal), last=True)
        return
    headers: list[tuple[bytes, bytes]] = []
    if refusal.retry_after_seconds is not None:
        headers.append((b"retry-after", str(refusal.retry_after_seconds).encode()))
    body = dialect.error(refusal) if dialect else msgspec.json.encode(error_body(refusal))
    await exchange.reply(refusal.status, body, headers=headers)


def parse(body: bytes) -> dict[str, object]:
    """Return the body's JSON object.

    Raises:
        Refusal: it is not JSON, not an object, or nested too deep.
    """
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is not JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise Refusal(400, "the body's JSON is nested too deep", code="invalid_json") from error
    if not isinstance(value, dict):
        raise Refusal(400, "the body must be a JSON object", code="invalid_json")
    return value


def place_of(path: str) -> Place | None:
    """Read `/v1/...` or `/rollout/{rollout_id}/role/{role}/v1/...`; `None` for any other path."""
    if path.startswith("/v1/"):
        return Place(path[4:])
    parts = path.split("/", 6)
    if len(parts) == 7 and parts[1] == "rollout" and parts[3] == "role" and parts[5] == "v1":
        rollout_id, role = unquoted(parts[2], "the rollout's id"), unquoted(parts[4], "the role's name")
        if rollout_id and role:
            return Place(parts[6], rollout_id, role)
    return None


def model_list(models: Sequence[str]) -> dict[str, object]:
    """Return OpenAI's list of models."""
    data = [{"id": model, "object": "model", "created": 0, "owned_by": "leyden"} for model in models]
    return {"object": "list", "data": data}
