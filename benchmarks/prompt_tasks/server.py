"""The model server of the benchmark: OpenAI's chat protocol, deterministic answers, and a log of all that was asked.

A model's name is `problem/role` or `problem/reflection`. Equal reflection requests get one answer after the other, as
a model at temperature 1 would give: the n-th answer is decided by (server's seed, request, n). A request whose client
has gone before the answer was ready is not counted, so what a killed process had under way is no answer of its.

    python -m benchmarks.prompt_tasks.server --seed 1     # prints its address

`GET /log` returns every answered request: when (seconds since the epoch), the model, and keys that name the prompt and
all of the request.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from benchmarks.prompt_tasks import reflecting
from benchmarks.prompt_tasks.problem import Message, digest, text_of
from benchmarks.prompt_tasks.problems import PROBLEMS

REFLECTION = "reflection"
LATENCY_SECONDS = 0.05
REFLECTION_SECONDS = 0.2


@dataclass(frozen=True)
class Entry:
    """An answered request."""

    at: float
    model: str
    system: str
    """The system prompt of a role's request."""
    key: str
    """The same for equal requests."""


class ModelServer:
    """Answers, and keeps what was asked."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.log: list[Entry] = []
        self._asked: Counter[str] = Counter()

    async def chat(self, request: Request) -> Response:
        """Answer a chat request."""
        body = await request.json()
        name, _, role = str(body["model"]).partition("/")
        if name not in PROBLEMS:
            return JSONResponse({"error": {"message": f"no model {body['model']!r}"}}, 404)
        messages: list[Message] = body["messages"]
        system = "\n".join(text_of(one) for one in messages if one["role"] in ("system", "developer"))
        key = f"{digest(body['model'], messages):012x}"
        await asyncio.sleep(REFLECTION_SECONDS if role == REFLECTION else LATENCY_SECONDS)
        if await request.is_disconnected():
            return Response(status_code=499)
        if role == REFLECTION:
            asked = "\n".join(text_of(one) for one in messages)
            self._asked[key] += 1
            seed = (self.seed, key, self._asked[key])
            message = {"role": "assistant", "content": reflecting.answer(PROBLEMS[name], asked, seed)}
        else:
            rest = [one for one in messages if one["role"] not in ("system", "developer")]
            message = PROBLEMS[name].answer(role, system, rest, bool(body.get("tools")))
        self.log.append(Entry(time.time(), body["model"], system, key))
        return JSONResponse(completion(body["model"], messages, message))

    async def entries(self, request: Request) -> Response:
        """Return the log."""
        return JSONResponse([asdict(entry) for entry in self.log])

    def app(self) -> Starlette:
        """Return the server's routes."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/log", self.entries),
            ]
        )


def completion(model: str, messages: Sequence[Message], message: Message) -> dict[str, Any]:
    """Return the body of an answer; a token is four characters."""
    read = sum(len(text_of(one)) for one in messages) // 4
    written = len(text_of(message)) // 4
    return {
        "id": f"chatcmpl-{time.time_ns()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {"index": 0, "finish_reason": "tool_calls" if message.get("tool_calls") else "stop", "message": message}
        ],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def main() -> None:
    """Serve on a free port of this machine, and print the address."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        server = uvicorn.Server(uvicorn.Config(ModelServer(options.seed).app(), log_level="warning"))
        asyncio.run(server.serve(sockets=[listening]))


if __name__ == "__main__":
    main()
