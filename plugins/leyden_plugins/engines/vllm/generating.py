"""One generation: a task that reads a server and fills a stream, from whichever loop asked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from weakref import ref

from leyden.errors import EngineError
from leyden.interfaces import GenerationRequest
from leyden_plugins.chat.prompts import Prompts
from leyden_plugins.engines.delivery import DeltaStream
from leyden_plugins.engines.servers.answers import Piece, deltas_of
from leyden_plugins.engines.servers.http import Refused, Unreachable
from leyden_plugins.engines.vllm.asking import pieces_of
from leyden_plugins.engines.vllm.opening import Running

TRIES = 4


def begin(
    running: Running, request: GenerationRequest, body: Mapping[str, Any], name: str | None
) -> tuple[DeltaStream, asyncio.Task[None]]:
    """Start a generation by the servers' model `name`, or by their base.

    Returns its stream, and the task that ends when nothing runs any more.

    Dropping or closing the stream cancels the task, which closes the connection, upon which the server lets go.
    """
    loop = asyncio.get_running_loop()
    stream = DeltaStream(loop)
    pieces = asked(running, body, name, request.affinity)
    task = loop.create_task(fill(ref(stream), pieces, request, running.facts.prompts))

    def abort() -> None:
        if not loop.is_closed():  # whoever drops a stream may do so anywhere, and late
            loop.call_soon_threadsafe(task.cancel)

    stream.abort = abort
    return stream, task


async def fill(
    held: ref[DeltaStream], pieces: AsyncGenerator[Piece, None], request: GenerationRequest, prompts: Prompts
) -> None:
    """Put the deltas of an answer into a stream, then its end or what went wrong."""
    end: EngineError | None = None
    try:
        async with contextlib.aclosing(deltas_of(pieces, request, prompts)) as deltas:
            async for delta in deltas:
                stream = held()
                if stream is None:
                    return
                stream.put(delta)
                del stream  # held only by whoever reads it: dropping it is how a generation is given up
    except asyncio.CancelledError:
        last = held()
        if last is not None:  # no reader has given this up
            last.put(EngineError("the engine was stopped"))
        raise
    except EngineError as error:
        end = error
    except Exception as error:
        end = EngineError(f"reading the answer failed: {error!r}")
        end.__cause__ = error
    last = held()
    if last is not None:
        last.put(end)


async def asked(
    running: Running, body: Mapping[str, Any], name: str | None, affinity: str | None
) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of an answer; one of which nothing has come is asked for again when its server dies.

    Raises:
        EngineError: it broke off in the middle, or no server answers.
    """
    failed: EngineError | None = None
    for _ in range(TRIES):
        replica = await running.fleet.choose(affinity)
        named = {**body, "model": name or replica.base}
        has_begun = False
        try:
            with running.fleet.using(replica):
                async with contextlib.aclosing(pieces_of(replica.http, named)) as pieces:
                    async for piece in pieces:
                        has_begun = True
                        yield piece
            return
        except (Unreachable, Refused) as error:
            is_ours = isinstance(error, Refused) and error.status < 500
            if has_begun or is_ours:
                raise
            failed = error
            is_down = await running.keeper.submit(running.fleet.suspect(replica)).wait()
            if isinstance(error, Refused) and not is_down:
                raise  # a server that is well, and fails at this request
    assert failed is not None  # each try that did not return has failed
    raise failed
