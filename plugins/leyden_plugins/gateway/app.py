"""The gateway's ASGI app: routes, and the life of one call.

One idea: whatever happens to an admitted call (a bad field, a dead engine, a client that leaves), it ends in
exactly one place, `converse`, which answers what can still be answered and records it once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import msgspec

from leyden.errors import EngineError
from leyden.interfaces import Generation, GenerationRequest, able_to_continue
from leyden.spans import Record, Status
from leyden_plugins.gateway.access import AccessTable, Caller, request_for, unquoted
from leyden_plugins.gateway.call import Call
from leyden_plugins.gateway.continuity import Continuity
from leyden_plugins.gateway.dialects import CountsTokens, Decode, Dialect, Question, Recalls
from leyden_plugins.gateway.dialects.spelling import error_body
from leyden_plugins.gateway.exchange import Disconnected, Exchange, Receive, Scope, Send
from leyden_plugins.gateway.gate import Gate
from leyden_plugins.gateway.places import Place, model_list, place_of
from leyden_plugins.gateway.refusal import RETRY_AFTER_SECONDS, Refusal, refusal_of

logger = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[None]]

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


class Generates(Protocol):
    """The part of an engine that answers calls.

    More attributes are optional: `decode(token_ids) -> str`, without which log-probabilities are refused;
    `prompt(request) -> token ids`, without which counts of tokens are; and two flags, `forces_tools` and
    `constrains_format`, without which a tool choice that forces a call and a form for the answer are.
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
        exact_continuation: bool = False,
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
        self._continuity = Continuity(self._decode, able_to_continue(engine) if exact_continuation else None)
        self._prompt: Callable[[GenerationRequest], Sequence[int]] | None = getattr(engine, "prompt", None)
        self._forces_tools = bool(getattr(engine, "forces_tools", False))
        self._constrains_format = bool(getattr(engine, "constrains_format", False))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        place: Place | None = None
        try:
            place = place_of(exchange.path)
            await self._route(exchange, place)
        except Disconnected:
            return
        except Refusal as refusal:
            await refuse(exchange, refusal, self._dialect_at(place))

    async def _route(self, exchange: Exchange, place: Place | None) -> None:
        handlers = {"GET": self._health} if exchange.path == "/health" else self._handlers(place)
        if exchange.method in handlers:
            await handlers[exchange.method](exchange)
        elif handlers:
            raise Refusal(405, f"{exchange.method[:20]} is not allowed for this path", code="method_not_allowed")
        else:
            paths = sorted(["/health", "/v1/models", *(f"/v1/{path}" for path in self._dialects)])
            raise Refusal(404, f"no such path; there are {', '.join(paths)}", code="not_found")

    def _handlers(self, place: Place | None) -> dict[str, Handler]:
        """Return what answers at a path, by method."""
        if place is None:
            return {}
        if place.tail == "models":
            return {"GET": self._models}
        dialect = self._dialect_at(place)
        if dialect is None:
            return {}
        if place.tail == dialect.path:
            return {"POST": partial(self._converse, place, dialect)}
        below = place.tail[len(dialect.path) + 1 :]
        if isinstance(dialect, CountsTokens) and below == dialect.count_path:
            return {"POST": partial(self._count, place, dialect)}
        if isinstance(dialect, Recalls):
            return {"GET": partial(self._recall, place, dialect, below)}
        return {}

    def _dialect_at(self, place: Place | None) -> Dialect | None:
        """Return the dialect to which a path belongs: it is the dialect's own, or one below."""
        if place is None:
            return None
        below = (dialect for path, dialect in self._dialects.items() if f"{place.tail}/".startswith(f"{path}/"))
        return next(below, None)

    async def _health(self, exchange: Exchange) -> None:
        await exchange.reply(200, b'{"status":"ok"}')

    async def _models(self, exchange: Exchange) -> None:
        await exchange.reply(200, msgspec.json.encode(model_list(self._access.models(exchange))))

    async def _converse(self, place: Place, dialect: Dialect, exchange: Exchange) -> None:
        await self.converse(exchange, dialect, self._access.identify(exchange, place.rollout_id, place.role))

    async def _recall(self, place: Place, dialect: Recalls, below: str, exchange: Exchange) -> None:
        caller = self._access.identify(exchange, place.rollout_id, place.role)
        answer_id = unquoted(below, "the answer's id") or ""
        await exchange.reply(200, dialect.recall(answer_id, memory=caller.admission.memory))

    async def _count(self, place: Place, dialect: CountsTokens, exchange: Exchange) -> None:
        caller = self._access.identify(exchange, place.rollout_id, place.role)
        if self._prompt is None:
            raise Refusal(501, "this engine does not count tokens", code="unsupported")
        body = await exchange.json(self._limits.body_bytes)
        request = dialect.read_prompt(body, memory=caller.admission.memory)
        request = replace(request, model=caller.policy(request.model))
        try:
            tokens = len(self._prompt(request))
        except Exception as error:
            raise explained(error, dialect) from error
        await exchange.reply(200, dialect.count(tokens))

    async def converse(self, exchange: Exchange, dialect: Dialect, caller: Caller) -> None:
        """Answer one model call and record it, however it ends."""
        task = asyncio.current_task()
        assert task is not None, "an ASGI server calls its app within a task"
        call = Call(caller, task, self._decode)
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
            refusal = explained(error, dialect)
            call.end(Status.ERROR, refusal.message)
            await refuse(exchange, refusal, dialect, call.question)
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
            await refuse(exchange, reason, dialect, call.question)

    async def _answer(self, exchange: Exchange, dialect: Dialect, call: Call) -> None:
        if len(self.calls) > self._limits.calls:
            raise Refusal(
                429,
                f"more than {self._limits.calls} calls at once; try again",
                code="too_many_requests",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        body = await exchange.json(self._limits.body_bytes)
        caller = call.caller
        asked = body.get("model")
        if isinstance(asked, str) and caller.model is not None:
            body["model"] = caller.model
        question = dialect.read(body, decode=self._decode, memory=caller.admission.memory)
        policy = caller.policy(asked if isinstance(asked, str) else question.request.model)
        request = request_for(caller.access.models[policy], question.request)
        call.ask(question, replace(request, model=policy, affinity=caller.access.rollout_id or None))
        self._check_ability(request, dialect)
        watch = asyncio.create_task(watch_client(exchange, call))
        try:
            await self._pass_gate(exchange, question)
            try:
                await self._generate(exchange, question, call)
            finally:
                self.gate.leave()
        finally:
            watch.cancel()

    def _check_ability(self, request: GenerationRequest, dialect: Dialect) -> None:
        """Refuse what this engine cannot do, rather than answer in another way than was asked."""
        if request.forces_tool and not self._forces_tools:
            why = f"{request.tool_choice!r:.200} is not supported: this engine cannot force a tool call; use 'auto'"
            raise Refusal(400, f"tool_choice={why}", code="unsupported_value", param="tool_choice")
        if request.response_format is not None and not self._constrains_format:
            why = "is not supported: this engine cannot force the form of an answer; remove it"
            raise Refusal(400, f"{dialect.format_field!r} {why}", code="unsupported_field", param=dialect.format_field)

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
        admission, place = call.caller.admission, None
        if not admission.is_open:
            place = self._continuity.place(call.request, admission.conversations, call.caller.role)
        generation = await self._engine.generate(call.request if place is None else place.request)
        answer = call.begin(generation)
        if place is not None:
            call.spliced = place.spliced
            call.fork = self._continuity.fork(place, generation.prompt_token_ids)
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
        if place is not None:
            # Before the client can have the answer, and go on from it.
            self._continuity.remember(place, call.caller.span_id, answer)
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


def explained(error: Exception, dialect: Dialect) -> Refusal:
    """Return what a client is told of a failure; one that nobody foresaw is logged too."""
    refusal = refusal_of(error, dialect.prompt_field)
    if refusal.status == 500:
        logger.exception("a model call failed in the engine or the gateway", exc_info=error)
    return refusal


async def watch_client(exchange: Exchange, call: Call) -> None:
    """Stop a call when its client goes away."""
    await exchange.disconnect()
    call.stop(Disconnected("the client went away before the answer was complete"))


async def refuse(
    exchange: Exchange, refusal: Refusal, dialect: Dialect | None, question: Question | None = None
) -> None:
    """Answer with an error, within the stream when one has begun."""
    if exchange.has_begun:
        # A JSON answer that was cut within its body stays cut: the server closes the connection.
        if exchange.is_streaming and question is not None:
            await exchange.write(question.error_event(refusal), last=True)
        return
    headers: list[tuple[bytes, bytes]] = []
    if refusal.retry_after_seconds is not None:
        headers.append((b"retry-after", str(refusal.retry_after_seconds).encode()))
    body = dialect.error(refusal) if dialect else msgspec.json.encode(error_body(refusal))
    await exchange.reply(refusal.status, body, headers=headers)
