"""An endpoint that speaks chat completions and Responses as a script tells it, JSON and SSE.

The truth about a request stands in its prompt (`[[role=...]]`, `[[rollout=...]]`), so tests can compare it with what
was recorded.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    ask: Ask
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class Endpoint:
    """The server; a script answers with what to say, or with a status code to fail with."""

    def __init__(self) -> None:
        self.base_url = ""
        self.seen: list[Seen] = []
        self.script: Callable[[Ask], Any] = lambda ask: Say(text=f"{ask.role} speaks")
        self.refusal: str | None = None
        """The message of a 400 that answers everything."""
        self.cuts = False
        """End streams in the middle."""

    def clear(self) -> None:
        """Forget what was seen and told."""
        host = self.base_url
        self.__init__()  # type: ignore[misc]  # back to the start, on the same port
        self.base_url = host

    @property
    def roles(self) -> list[str]:
        return [seen.ask.role for seen in self.seen]

    async def answer(self, request: Request) -> Response:
        body = json.loads(await request.body())
        is_chat = request.url.path.endswith("/chat/completions")
        ask = ask_of(body["messages"] if is_chat else chat_messages(body), body.get("tools") or [])
        self.seen.append(Seen(ask, request.url.path, dict(request.headers), body))
        if self.refusal is not None:
            return JSONResponse({"error": {"message": self.refusal, "type": "invalid_request_error"}}, 400)
        said = self.script(ask)
        said = await said if inspect.isawaitable(said) else said
        if isinstance(said, int):
            return JSONResponse({"error": {"message": "told to fail", "type": "server_error"}}, said)
        if not body.get("stream"):
            return JSONResponse(completion(body, said) if is_chat else response(body, said))
        events = list(chat_events(body, said) if is_chat else response_events(body, said))
        return StreamingResponse(sent(events[:-2] if self.cuts else events), media_type="text/event-stream")


async def sent(events: list[str]) -> AsyncIterator[str]:
    for event in events:
        yield event


def chat_messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Put the input of a Responses request in chat messages."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": body.get("instructions") or ""}]
    items = body["input"] if isinstance(body["input"], list) else [{"role": "user", "content": body["input"]}]
    for item in items:
        if item.get("type") == "function_call_output":
            messages.append({"role": "tool", "content": item["output"], "tool_call_id": item["call_id"]})
        elif item.get("type") in (None, "message"):
            messages.append({"role": item["role"], "content": item["content"]})
    return messages


def calls_of(said: Say) -> list[tuple[str, str, str]]:
    """Return id, name and arguments of each call; arguments under `raw` go out as they are."""
    return [
        (f"call_{next(IDS)}", name, str(given["raw"]) if "raw" in given else json.dumps(given))
        for name, given in said.tool_calls
    ]


# ---- chat completions --------------------------------------------------------------------------------------------


def chat_calls(said: Say) -> list[dict[str, Any]]:
    return [
        {"index": place, "id": call_id, "type": "function", "function": {"name": name, "arguments": text}}
        for place, (call_id, name, text) in enumerate(calls_of(said))
    ]


def completion(body: dict[str, Any], said: Say) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.text or None}
    if said.tool_calls:
        message["tool_calls"] = chat_calls(said)
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
    deltas += [{"content": character} for character in said.text]
    deltas += [{"tool_calls": [call]} for call in chat_calls(said)]
    for delta in deltas:
        yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': None}]})}\n\n"
    reason = "tool_calls" if said.tool_calls else "stop"
    yield f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': {}, 'finish_reason': reason}]})}\n\n"
    yield "data: [DONE]\n\n"


# ---- Responses ---------------------------------------------------------------------------------------------------


def response_items(said: Say) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if said.text:
        text = {"type": "output_text", "text": said.text, "annotations": []}
        items.append(
            {"id": f"msg_{next(IDS)}", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
        )
    for call_id, name, arguments in calls_of(said):
        call = {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}
        items.append({"id": f"fc_{next(IDS)}", "status": "completed", **call})
    return items


def response(body: dict[str, Any], said: Say, items: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "id": f"resp_{next(IDS)}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "completed",
        "model": body["model"],
        "output": response_items(said) if items is None else items,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 7,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 10,
        },
    }


def response_events(body: dict[str, Any], said: Say) -> Iterator[str]:
    items = response_items(said)
    whole = response(body, said, items)
    numbers = count()

    def event(kind: str, **fields: Any) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, 'sequence_number': next(numbers), **fields})}\n\n"

    yield event("response.created", response={**whole, "status": "in_progress", "output": []})
    for place, item in enumerate(items):
        yield event("response.output_item.added", output_index=place, item={**item, "status": "in_progress"})
        for part in item.get("content", []):
            where = {"item_id": item["id"], "output_index": place, "content_index": 0}
            yield event("response.output_text.delta", **where, delta=part["text"], logprobs=[])
            yield event("response.output_text.done", **where, text=part["text"], logprobs=[])
        yield event("response.output_item.done", output_index=place, item=item)
    yield event("response.completed", response=whole)


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
