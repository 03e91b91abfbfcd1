"""What all kinds of server have in common: one choice is asked for in tokens and comes back in tokens.

One idea: a kind of server is a body and a reader. Every choice is a request of its own, because only some servers keep
the choices of one request apart.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from leyden.errors import EngineError
from leyden.interfaces import SamplingParameters
from leyden_plugins.engines.servers.answers import Piece
from leyden_plugins.engines.servers.http import Http


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One choice."""

    index: int = 0
    prompt: Sequence[int]
    sampling: SamplingParameters
    limit: int
    """The most tokens it may have."""
    seed: int | None = None
    ends: frozenset[int] = frozenset()
    """Tokens that end it."""
    schema: Mapping[str, Any] | None = None
    """JSON schema that it must keep to."""
    stream: bool = False


@dataclass(frozen=True, kw_only=True)
class About:
    """What a server says of itself."""

    version: str
    model: str
    context_length: int | None


class Dialect(Protocol):
    """One kind of server. What is asked of it may raise what `Http` raises."""

    kind: str
    path: str
    """Where choices are asked for."""
    streams: bool
    """False: answers come whole."""
    spare: int
    """How many tokens below its context length a prompt and its answer must stay."""

    async def about(self, http: Http) -> About:
        """Ask what it is; called first."""
        ...

    def body(self, ask: Ask) -> dict[str, Any]:
        """Return what is asked; nothing is left to the server's defaults."""
        ...

    def choice(self, http: Http, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Sample one choice."""
        ...

    async def tokenize(self, http: Http, text: str) -> Sequence[int]:
        """Return the server's own tokens of `text`."""
        ...

    async def greatest(self, http: Http, ask: Ask) -> float:
        """Return the log-probability of the likeliest first token, as reported at the temperature of `ask`."""
        ...


async def answers(http: Http, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Any, None]:
    """Yield the events of a stream, or the one answer.

    Raises:
        EngineError: the server reports a failure inside the stream.
    """
    if not body["stream"]:
        yield await http.post(path, body)
        return
    async with contextlib.aclosing(http.events(path, body)) as events:  # type: ignore[type-var]  # a generator
        async for data in events:
            event = msgspec.json.decode(data)
            if "error" in event:
                raise EngineError(f"the server failed while it answered: {event['error']!r:.500}")
            yield event


async def together(choices: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of several choices as they come. Closing it ends them all."""
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pump(pieces: AsyncGenerator[Piece, None]) -> None:
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    queue.put_nowait(piece)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(pieces)) for pieces in choices]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def tokenize_prompt(http: Http, text: str, model: str | None) -> Sequence[int]:
    """Ask `/tokenize` in the form that vLLM and SGLang share."""
    answer = await http.post("/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
    return [int(token) for token in answer["tokens"]]
