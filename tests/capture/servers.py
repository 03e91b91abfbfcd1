"""A small server whose answers are decided by markers in the prompt, for capture tests.

It speaks the protocols of OpenAI (chat, completions, Responses) and Anthropic, JSON and streams.

The truth about a request stands in its messages, so a test can compare it with what the headers claim:
`rollout=r1 role=planner` anywhere; the last role named in a system message counts. Other markers:
`call=NAME*2` answers with two tool calls of NAME until a tool message follows; `status=500*2` fails twice;
`slow=0.5` waits; `cut` ends a stream in the middle, `fails` ends it with an error event, `broken` puts an event
that is no JSON into it, `gated` holds it after the first word, `lingers` before its very last event; `zipped`
compresses any answer.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import threading
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.capture.dialects import answer_body, answer_events, error_event, messages_of, tools_of


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    raw: bytes
    body: dict[str, Any]

    method: str = "POST"
    query: str = ""
    port: int = 0
    """Of the client's end of the connection."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        return messages_of(self.body)

    @property
    def text(self) -> str:
        return " ".join(flat(message.get("content")) for message in self.messages)

    def marked(self, name: str) -> str | None:
        """Return the value of the last marker `name=value` in the prompt."""
        found = re.findall(rf"\b{name}=([\w.*-]+)", self.text)
        return found[-1] if found else None

    @property
    def true_role(self) -> str | None:
        systems = [m for m in self.messages if m.get("role") in ("system", "developer")]
        found = re.findall(r"\brole=([\w.-]+)", " ".join(flat(m.get("content")) for m in systems))
        return found[-1] if found else self.marked("role")


def flat(content: object) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content)
    return str(content or "")


class FakeOpenAI:
    """The server; `seen` holds what arrived, in order."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.failures: Counter[str] = Counter()
        self.held = 0
        """How many requests to answer with `held_status` and `Retry-After`."""
        self.held_status = 503
        self.go_on = threading.Event()
        """Lets a stream with the marker `gated` or `lingers` go on."""
        self.base_url = ""

    def clear(self) -> None:
        """Forget what was seen."""
        self.seen.clear()
        self.failures.clear()
        self.held, self.held_status = 0, 503
        self.go_on.clear()

    async def answer(self, request: Request) -> Response:
        raw = await request.body()
        client = request.client
        seen = Seen(
            request.url.path,
            dict(request.headers),
            raw,
            json.loads(raw or b"{}"),
            request.method,
            request.url.query,
            client.port if client else 0,
        )
        if self.held > 0:
            self.held -= 1
            return JSONResponse({"error": {"message": "held"}}, self.held_status, headers={"retry-after": "0.05"})
        self.seen.append(seen)
        if (slow := seen.marked("slow")) is not None:
            await asyncio.sleep(float(slow))
        if (failure := seen.marked("status")) is not None:
            code, _, times = failure.partition("*")
            self.failures[seen.text] += 1
            if self.failures[seen.text] <= int(times or 1):
                return JSONResponse({"error": {"message": "told to fail", "type": "server_error"}}, int(code))
        if seen.path.endswith(("/input_tokens", "/count_tokens")):
            return JSONResponse({"input_tokens": 7, "object": "response.input_tokens"})
        message = answer_to(seen)
        zipped = {"content-encoding": "gzip"} if "zipped" in seen.text.split() else None
        if seen.body.get("stream"):
            pieces = events(seen, message, self.go_on, is_zipped=zipped is not None)
            return StreamingResponse(pieces, media_type="text/event-stream", headers=zipped)
        content = json.dumps(answer_body(seen.path, seen.body.get("model", ""), message)).encode()
        content = gzip.compress(content) if zipped else content
        return Response(content, media_type="application/json", headers=zipped)


def answer_to(seen: Seen) -> dict[str, Any]:
    """Return the message that the markers ask for."""
    wanted = seen.marked("call")
    last_is_tool = bool(seen.messages) and seen.messages[-1].get("role") == "tool"
    offered = tools_of(seen.body)
    if wanted and not last_is_tool:
        name, _, times = wanted.partition("*")
        tool = next((each for each in offered if each["name"] == name), None)
        if tool is not None:
            argument = next(iter(tool.get("parameters", {}).get("properties", {})), None)
            arguments = json.dumps({argument: f"rollout={seen.marked('rollout')}"} if argument else {})
            calls = [
                {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for index in range(int(times or 1))
            ]
            return {"role": "assistant", "content": None, "tool_calls": calls}
    return {"role": "assistant", "content": f"answer to rollout={seen.marked('rollout')} role={seen.true_role}"}


async def events(
    seen: Seen, message: dict[str, Any], go_on: threading.Event, *, is_zipped: bool = False
) -> AsyncIterator[bytes]:
    """Yield the answer as server-sent events."""
    marks = seen.text.split()
    squeeze = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    path = seen.path
    has_usage = bool((seen.body.get("stream_options") or {}).get("include_usage"))
    for index, event in enumerate(answer_events(path, seen.body["model"], message, has_usage=has_usage)):
        if index == 3 and "broken" in marks:
            event = b'data: {"choices": [{"ind\n\ndata: 7\n\n' + event
        is_failing = index == 3 and "fails" in marks
        event = error_event(path) if is_failing else event
        yield squeeze.compress(event) + squeeze.flush(zlib.Z_SYNC_FLUSH) if is_zipped else event
        if is_failing or (index == 3 and "cut" in marks):
            return
        is_held = (index == 1 and "gated" in marks) or ("lingers" in marks and is_reason_known(event))
        while is_held and not go_on.is_set():
            await asyncio.sleep(0.002)
    if is_zipped:
        yield squeeze.flush()


def is_reason_known(event: bytes) -> bool:
    """Say whether an event tells why the answer ended; only formalities follow."""
    return b'"message_delta"' in event or b'"finish_reason": "' in event


@contextmanager
def serving() -> Iterator[FakeOpenAI]:
    """Run a server on a free port of 127.0.0.1 for the length of the block."""
    fake = FakeOpenAI()
    paths = ("/v1/{rest:path}", "/openai/{rest:path}", "/{rest:path}")
    app = Starlette(routes=[Route(path, fake.answer, methods=["POST", "GET", "DELETE"]) for path in paths])
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    fake.base_url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    try:
        yield fake
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(5)
