"""An endpoint that speaks chat completions as a script tells it, JSON and SSE.

The truth about a request stands in its prompt (`[[role=...]]`, `[[rollout=...]]`), so tests can compare it with what
was recorded. A manager's prompt is AutoGen's own and names no role.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from integration_tests.frameworks.story import ROLE_TAG, ROLLOUT_TAG, Say, text_of

IDS = count(1)
MANAGER = "manager"
"""Who speaks where no prompt says so."""


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    role: str
    rollout: str
    messages: list[Mapping[str, object]]
    headers: dict[str, str]

    @property
    def text(self) -> str:
        return " ".join(map(text_of, self.messages))

    @property
    def claimed_role(self) -> str | None:
        """Who Leyden says it is."""
        return self.headers.get("x-leyden-role")


Script = Callable[[Seen], Any]


def in_turn(**lines: list[Say]) -> Script:
    """Let each role of each rollout say its lines one after the other, the last one for ever."""
    spoken: dict[tuple[str, str], int] = {}

    def script(seen: Seen) -> Say:
        place = spoken.get((seen.rollout, seen.role), 0)
        spoken[seen.rollout, seen.role] = place + 1
        said = lines[seen.role]
        return said[min(place, len(said) - 1)]

    return script


class Endpoint:
    """The server; a script answers with what to say, or with a status code to fail with."""

    def __init__(self) -> None:
        self.base_url = ""
        self.seen: list[Seen] = []
        self.script: Script = lambda seen: Say(text=f"{seen.role} speaks")
        self.cuts = False
        """End streams in the middle."""

    def clear(self) -> None:
        """Forget what was seen and told."""
        host = self.base_url
        self.__init__()  # type: ignore[misc]  # back to the start, on the same port
        self.base_url = host

    @property
    def roles(self) -> list[str]:
        return [seen.role for seen in self.seen]

    async def answer(self, request: Request) -> Response:
        body = json.loads(await request.body())
        messages = body["messages"]
        instructions = " ".join(text_of(each) for each in messages if each["role"] == "system")
        roles = ROLE_TAG.findall(instructions) or [MANAGER]
        rollouts = ROLLOUT_TAG.findall(" ".join(map(text_of, messages))) or ["none"]
        seen = Seen(roles[-1], rollouts[-1], messages, dict(request.headers))
        self.seen.append(seen)
        said = self.script(seen)
        said = await said if inspect.isawaitable(said) else said
        if isinstance(said, int):
            return JSONResponse({"error": {"message": "told to fail", "type": "server_error"}}, said)
        if not body.get("stream"):
            return JSONResponse(completion(body, said))
        events = list(chat_events(body, said))
        return StreamingResponse(iter(events[:-2] if self.cuts else events), media_type="text/event-stream")


def calls_of(said: Say) -> list[dict[str, Any]]:
    """Return the tool calls; arguments under `raw` go out as they are."""
    return [
        {
            "index": place,
            "id": f"call_{next(IDS)}",
            "type": "function",
            "function": {"name": name, "arguments": str(given["raw"]) if "raw" in given else json.dumps(given)},
        }
        for place, (name, given) in enumerate(said.tool_calls)
    ]


def completion(body: dict[str, Any], said: Say) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.text or None}
    if said.tool_calls:
        message["tool_calls"] = calls_of(said)
    return {
        "id": f"chatcmpl-{next(IDS)}",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls" if said.tool_calls else "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def chat_events(body: dict[str, Any], said: Say) -> Iterator[str]:
    head = {"id": f"chatcmpl-{next(IDS)}", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in re.findall(r"\S+\s*", said.text)]
    deltas += [{"tool_calls": [call]} for call in calls_of(said)]
    for delta in deltas:
        yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n"
    reason = "tool_calls" if said.tool_calls else "stop"
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
