"""Sample all requests together, on a thread of its own.

One idea: each turn of the loop admits what waits, takes one decode step for every lane that has rows, and hands the
results over with one wake-up. A lane is one set of whole weights; rows of all LoRAs on it are in that same step. A
request joins and leaves between two steps.
One trap: requests hold their weights themselves, so a version lives exactly as long as its last request.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Literal
from weakref import ref

import torch

from leyden.errors import EngineError
from leyden.interfaces import Delta
from leyden_plugins.chat.templates import Chat, ToolCall
from leyden_plugins.chat.text import TextStream
from leyden_plugins.engines.delivery import DeltaStream, Item, deliver
from leyden_plugins.engines.transformers.cache import PrefixCache
from leyden_plugins.engines.transformers.lane import Lane, Row, Served
from leyden_plugins.engines.transformers.sampling import Sampler

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(eq=False, kw_only=True)
class Call:
    """A request in the batch."""

    is_streamed: bool
    parses_tools: bool
    loop: asyncio.AbstractEventLoop
    stream: ref[DeltaStream]
    """Weak: a consumer that drops its stream thereby aborts the call."""
    rows: Sequence[Answer] = ()
    open: int = 0
    """Choices not finished."""
    is_over: bool = False
    """Aborted or failed: rows still waiting are skipped."""


@dataclass(eq=False, kw_only=True)
class Answer(Row):
    """One choice of a call."""

    call: Call
    index: int
    limit: int
    """The most tokens it may have."""
    text: TextStream | None
    """`None` where nobody needs text before the end."""
    given: int = 0
    """How many characters were given out."""
    logprobs: list[float] = field(default_factory=list)


class Batcher:
    """The sampling thread and what it owns: lanes, prefix cache, the queue of waiting rows."""

    def __init__(
        self,
        *,
        lane: Callable[[Served], Lane[Answer]],
        cache: PrefixCache,
        chat: Chat,
        eos: frozenset[int],
        max_rows: int,
        threads: int,
    ) -> None:
        self.tokens_sampled = 0
        self._make_lane = lane
        self._cache = cache
        self._chat = chat
        self._eos = eos
        self._max_rows = max_rows
        self._threads = threads
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._waiting: deque[Answer] = deque()
        self._lanes: dict[int, Lane[Answer]] = {}
        self._samplers: dict[int, Sampler] = {}
        self._retired: set[int] = set()
        self._calls: set[Call] = set()
        self._outbox: list[tuple[Call, Item]] = []
        self._gate = threading.Lock()
        self._is_stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="leyden-engine", daemon=True)

    @property
    def running(self) -> int:
        """How many choices are in the batch."""
        return sum(len(lane.rows) for lane in list(self._lanes.values()))

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, call: Call) -> None:
        """Queue a call.

        Raises:
            EngineError: the thread has ended.
        """

        def take() -> None:
            self._calls.add(call)
            self._waiting.extend(call.rows)

        with self._gate:
            if self._is_stopping:
                raise EngineError("the engine is stopped; start it again") from self._failure
            self._commands.put(take)

    def abort(self, call: Call) -> None:
        """Take a call out before the next step."""
        call.is_over = True
        self._commands.put(lambda: self._leave([call]))

    def retire(self, weights_id: int) -> None:
        """Forget these weights once no request runs on them."""
        self._commands.put(lambda: self._retired.add(weights_id))

    def stop(self) -> None:
        """End the thread; open calls fail. Blocks until it is gone."""
        with self._gate:
            self._is_stopping = True
        self._commands.put(lambda: None)
        self._thread.join()

    # ---- on the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        reason = "the engine was stopped"
        try:
            with torch.inference_mode():
                while not self._is_stopping:
                    self._turn()
        except BaseException as error:
            # Whatever ended this thread, nobody may wait for it for ever.
            self._failure = error
            reason = f"the engine's thread has ended: {error!r}"
        with self._gate:
            self._is_stopping = True
        self._take_commands(wait=False)
        # First, because a lane that is broken could not even let its rows go.
        self._lanes.clear()
        self._cache.clear()
        self._fail(list(self._calls), reason, self._failure)
        self._hand_over()

    def _turn(self) -> None:
        is_idle = not self._waiting and not any(lane.rows for lane in self._lanes.values())
        self._take_commands(wait=is_idle)
        self._admit()
        for lane_id, lane in list(self._lanes.items()):
            if lane.rows:
                self._guarded(lane_id, partial(self._step, lane_id, lane))
        self._hand_over()
        if self._retired:
            self._drop_retired()

    def _take_commands(self, *, wait: bool) -> None:
        if wait:
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                return
            command()

    def _admit(self) -> None:
        room = self._max_rows - self.running
        chosen: dict[int, list[Answer]] = {}
        while self._waiting and room > 0:
            row = self._waiting.popleft()
            if not row.call.is_over:
                chosen.setdefault(row.served.lane_id, []).append(row)
                room -= 1
        for lane_id, rows in chosen.items():
            self._guarded(lane_id, partial(self._join, rows), rows)

    def _join(self, rows: list[Answer]) -> None:
        served = rows[0].served
        if served.lane_id not in self._lanes:
            self._lanes[served.lane_id] = self._make_lane(served)
        self._lanes[served.lane_id].admit(rows)
        self._samplers.pop(served.lane_id, None)

    def _guarded(self, lane_id: int, work: Callable[[], None], joining: Iterable[Answer] = ()) -> None:
        """Do `work`; what it raises fails the requests of this lane and nobody else."""
        try:
            work()
        except Exception as error:
            lane = self._lanes.pop(lane_id, None)
            self._samplers.pop(lane_id, None)
            self._fail_rows([*(lane.rows if lane else ()), *joining], error)

    def _fail_rows(self, rows: Iterable[Answer], error: Exception) -> None:
        """Fail the calls of rows."""
        failed = list(rows)
        for weights_id in {row.served.weights_id for row in failed}:
            # What the cache holds may be the cause, or half written.
            self._cache.drop(weights_id)
        self._fail({row.call for row in failed}, f"sampling failed: {error!r}", error)

    def _step(self, lane_id: int, lane: Lane[Answer]) -> None:
        logits = lane.decode()
        sampler = self._samplers.get(lane_id)
        if sampler is None:
            sampler = self._samplers[lane_id] = Sampler(list(lane.rows), logits.device)
        chosen = sampler.choose(logits)
        tokens, logprobs = chosen.tokens_B.tolist(), chosen.logprobs_B.tolist()
        gone, spoilt = [], []
        for place, row in enumerate(lane.rows):
            row.token_ids.append(tokens[place])
            row.logprobs.append(logprobs[place])
            if math.isnan(logprobs[place]):
                spoilt.append(row)
            elif self._advance(row, tokens[place]):
                gone.append(place)
        self.tokens_sampled += len(tokens)
        if gone:
            lane.remove(gone)
            del self._samplers[lane_id]
        if spoilt:
            # One policy's weights may be at fault while the others of the lane are sound.
            self._fail_rows(
                spoilt, EngineError("the logits are not numbers; the published weights hold NaN or overflow")
            )
            lane.scrub()

    def _advance(self, row: Answer, token: int) -> bool:
        """Give out what is new of a row; say whether it is finished."""
        is_end = token in self._eos
        is_complete = is_end or (row.constraint is not None and row.constraint.is_complete)
        reason: Reason | None = "stop" if is_complete else "length" if len(row.token_ids) >= row.limit else None
        piece = ""
        if row.text is not None and not is_end:
            piece = row.text.push((token,))
            if row.text.is_stopped:
                reason = "stop"
        if reason is not None:
            self._finish(row, reason)
            return True
        if row.call.is_streamed:
            row.given += len(piece)
            delta = Delta(index=row.index, text=piece, token_ids=(token,), logprobs=(row.logprobs[-1],))
            self._outbox.append((row.call, delta))
        return False

    def _finish(self, row: Answer, reason: Reason) -> None:
        """Give out the last delta of a row."""
        call = row.call
        if row.text is None:
            answer = row.token_ids[:-1] if row.token_ids[-1] in self._eos else row.token_ids
            text = self._chat.codec.decode(answer, self._chat.shown if call.parses_tools else frozenset())
        else:
            row.text.finish()
            text = row.text.text
        tool_calls: Sequence[ToolCall] = ()
        if call.parses_tools and reason == "stop":
            parsed = self._chat.parse(text)
            text, tool_calls = parsed.text, parsed.calls
            reason = "tool_calls" if tool_calls else "stop"
        news = slice(-1 if call.is_streamed else 0, None)
        delta = Delta(
            index=row.index,
            text=text[row.given :],
            token_ids=tuple(row.token_ids[news]),
            logprobs=tuple(row.logprobs[news]),
            tool_calls=tool_calls,
            finish_reason=reason,
        )
        self._outbox.append((call, delta))
        call.open -= 1
        if call.open == 0:
            self._outbox.append((call, None))
            self._calls.discard(call)

    def _fail(self, calls: Iterable[Call], reason: str, cause: BaseException | None) -> None:
        for call in list(calls):
            error = EngineError(reason)
            error.__cause__ = cause
            self._outbox.append((call, error))
        self._leave(calls)

    def _leave(self, calls: Iterable[Call]) -> None:
        """Take the rows of calls out of the batch; waiting ones are skipped when their turn comes."""
        for call in calls:
            call.is_over = True
            self._calls.discard(call)
            for lane_id in {row.served.lane_id for row in call.rows} & set(self._lanes):
                lane = self._lanes[lane_id]
                gone = [place for place, row in enumerate(lane.rows) if row.call is call]
                if gone:
                    lane.remove(gone)
                    self._samplers.pop(lane_id, None)

    def _hand_over(self) -> None:
        """Wake each loop once with everything that is for it."""
        if not self._outbox:
            return
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[ref[DeltaStream], Item]]] = {}
        for call, item in self._outbox:
            by_loop.setdefault(call.loop, []).append((call.stream, item))
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(deliver, items)
            except RuntimeError:
                # The loop is closed: nobody is left to read.
                self._leave([call for call in self._calls if call.loop is loop])
        self._outbox.clear()

    def _drop_retired(self) -> None:
        rows = [*self._waiting, *(row for lane in self._lanes.values() for row in lane.rows)]
        idle = self._retired - {row.served.weights_id for row in rows}
        for weights_id in idle:
            self._lanes.pop(weights_id, None)
            self._samplers.pop(weights_id, None)
            self._cache.drop(weights_id)
        if idle:
            self._retired -= idle
            for lane in self._lanes.values():
                lane.forget()
