"""An endpoint that speaks chat completions as a function tells it, JSON and SSE.

The truth about a request stands in its prompt (`[[role=...]]`, `[[rollout=...]]`), so tests can compare it with what
was recorded.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from integration_tests.frameworks.story import Ask, Say, ask_of

IDS = count(1)

Said = Say | int | str
"""An answer, a status code to fail with, or the word `cut`: a stream that breaks off."""


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    ask: Ask
    headers: dict[str, str]
    body: dict[str, Any]


class Endpoint:
    """The server; its `script` may be asynchronous."""

    def __init__(self) -> None:
        self.base_url = ""
        self.seen: list[Seen] = []
        self.script: Callable[[Ask], Any] = lambda ask: Say(text=f"{ask.role} speaks")

    def clear(self) -> None:
        """Forget what was seen and told."""
        self.seen.clear()
        self.script = lambda ask: Say(text=f"{ask.role} speaks")

    @property
    def roles(self) -> list[str]:
        return [seen.ask.role for seen in self.seen]

    async def answer(self, request: Request) -> Response:
        body = json.loads(await request.body())
        ask = ask_of(body["messages"], body.get("tools") or [])
        self.seen.append(Seen(ask, dict(request.headers), body))
        said: Any = self.script(ask)
        if inspect.isawaitable(said):
            said = await said
        if isinstance(said, int):
            return JSONResponse({"error": {"message": "told to fail", "type": "server_error"}}, said)
        if body.get("stream"):
            return StreamingResponse(chunks(body["model"], said), media_type="text/event-stream")
        message = {"role": "assistant", "content": said.text or None, "tool_calls": calls_of(said) or None}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if said.tool_calls else "stop"}
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        head = {"id": f"chatcmpl-{next(IDS)}", "object": "chat.completion", "created": 1, "model": body["model"]}
        return JSONResponse({**head, "choices": [choice], "usage": usage})


def calls_of(said: Say) -> list[dict[str, Any]]:
    """Return the tool calls in the form of the chat API; arguments may be text that is no JSON."""
    return [
        {
            "id": f"call_{next(IDS)}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)},
        }
        for name, arguments in said.tool_calls
    ]


async def chunks(model: str, said: Say | str) -> AsyncIterator[bytes]:
    """Yield the answer as server-sent events, a word each."""
    head = {"id": f"chatcmpl-{next(IDS)}", "object": "chat.completion.chunk", "created": 1, "model": model}

    def event(delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"

    yield event({"role": "assistant", "content": ""})
    if isinstance(said, str):
        yield event({"content": "half of"})
        return
    for word in said.text.split():
        yield event({"content": word + " "})
        await asyncio.sleep(0)
    for index, call in enumerate(calls_of(said)):
        yield event({"tool_calls": [{**call, "index": index}]})
    yield event({}, "tool_calls" if said.tool_calls else "stop")
    yield b"data: [DONE]\n\n"


@contextmanager
def serving() -> Iterator[Endpoint]:
    """Run an endpoint on a free port of 127.0.0.1 for the length of the block."""
    endpoint = Endpoint()
    app = Starlette(routes=[Route("/v1/chat/completions", endpoint.answer, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    endpoint.base_url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    try:
        yield endpoint
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(5)
