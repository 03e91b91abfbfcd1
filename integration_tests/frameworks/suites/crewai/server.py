"""A chat completions endpoint that answers what a script says, as JSON or SSE.

Who speaks stands in the prompt as `[[role=...]]`, so tests can compare it with what was recorded.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from integration_tests.frameworks.story import ROLE_TAG, Say, text_of

IDS = count(1)
FULL = {"message": "maximum context length exceeded", "code": "context_length_exceeded"}


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    path: str
    body: dict[str, Any]

    @property
    def role(self) -> str:
        """Who speaks, by the instructions; `main` where they name nobody."""
        system = " ".join(text_of(each) for each in self.messages if each["role"] == "system")
        return (ROLE_TAG.findall(system) or ["main"])[-1]

    @property
    def messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.body.get("messages") or []
        return found

    @property
    def text(self) -> str:
        return " ".join(map(text_of, self.messages))

    @property
    def results(self) -> list[str]:
        """What the tools answered."""
        return [text_of(each) for each in self.messages if each["role"] == "tool"]


Script = Callable[[Seen], Say | int]
"""Says an answer, or the status code to fail with."""


def speak(seen: Seen) -> Say | int:
    """Say who speaks."""
    return Say(text=f"{seen.role} speaks")


class Endpoint:
    """The server."""

    def __init__(self) -> None:
        self.base_url = ""
        self.seen: list[Seen] = []
        self.script: Script = speak

    @property
    def roles(self) -> list[str]:
        return [seen.role for seen in self.seen]

    async def answer(self, request: Request) -> Response:
        seen = Seen(request.url.path, json.loads(await request.body()))
        self.seen.append(seen)
        if not seen.path.endswith("/chat/completions"):
            return JSONResponse({"error": {"message": "not here"}}, 404)
        said = self.script(seen)
        if isinstance(said, int):
            return JSONResponse({"error": FULL if said == 400 else {"message": "told to fail"}}, said)
        message: dict[str, Any] = {"role": "assistant", "content": said.text or None}
        if said.tool_calls:
            message["tool_calls"] = [
                {"id": f"call_{next(IDS)}", "type": "function", "function": {"name": name, "arguments": text(given)}}
                for name, given in said.tool_calls
            ]
        if seen.body.get("stream"):
            return StreamingResponse(events(seen.body["model"], message), media_type="text/event-stream")
        return JSONResponse(completion(seen.body["model"], message))


def text(arguments: dict[str, Any]) -> str:
    """Return arguments as JSON; those under `raw` go out as they are."""
    return str(arguments["raw"]) if "raw" in arguments else json.dumps(arguments)


def completion(model: str, message: dict[str, Any]) -> dict[str, Any]:
    reason = "tool_calls" if message.get("tool_calls") else "stop"
    return {
        "id": f"chatcmpl-{next(IDS)}",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def events(model: str, message: dict[str, Any]) -> Iterator[str]:
    head = {"id": f"chatcmpl-{next(IDS)}", "object": "chat.completion.chunk", "created": 1, "model": model}
    calls = [{**call, "index": place} for place, call in enumerate(message.get("tool_calls") or [])]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": f"{word} "} for word in (message["content"] or "").split()]
    deltas += [{"tool_calls": [call]} for call in calls]
    for delta in deltas:
        yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n"
    reason = "tool_calls" if calls else "stop"
    yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': {}, 'finish_reason': reason}]})}\n\n"
    yield "data: [DONE]\n\n"


@contextmanager
def serving() -> Iterator[Endpoint]:
    """Run an endpoint on a free port of 127.0.0.1 for the length of the block."""
    endpoint = Endpoint()
    app = Starlette(routes=[Route("/v1/{rest:path}", endpoint.answer, methods=["POST"])])
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
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
