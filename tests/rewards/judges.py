"""A chat endpoint that judges as a test says, and an agent whose output it judges, both importable by workers."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from leyden_plugins.rewards import Judge
from tests.running.small import ask, rollout_id

URL_VARIABLE = "JUDGE_URL"
KEY = "a-secret-of-twenty-letters"


def solve(task: object) -> str:
    """Speak once and answer with the sample's own text."""
    ask(str(task))
    return f"quality 0.{rollout_id()[-1]}"


judge = Judge("judge-model", base_url=os.environ.get(URL_VARIABLE, "http://127.0.0.1:9/v1"), api_key=KEY)


def quality(text: str) -> float:
    return float(text.split()[1])


def by_quality(shown: dict[str, Any]) -> str:
    """Judge answers `quality 0.5` by what they say."""
    if "answers" in shown:
        rows = [{"id": one["id"], "reason": "r", "score": quality(one["answer"])} for one in shown["answers"]]
        return json.dumps({"scores": rows})
    return json.dumps({"reason": "it says so", "score": quality(shown["answer"])})


@dataclass
class JudgeServer:
    """What arrived, and what is answered."""

    answer: Callable[[dict[str, Any]], str] = by_quality
    """Given what is to be judged."""
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Status and body of the next answers."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    base_url: str = ""

    @property
    def shown(self) -> list[dict[str, Any]]:
        return [json.loads(body["messages"][1]["content"]) for body in self.bodies]


@contextmanager
def serving(**options: Any) -> Iterator[JudgeServer]:
    """Run a judge on a free port of 127.0.0.1 for the length of the block."""
    server = JudgeServer(**options)
    lock, running = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with lock:
                running[0] += 1
                server.most_at_once = max(server.most_at_once, running[0])
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, text = 200, ""
            with lock:
                server.bodies.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                if server.failures:
                    status, text = server.failures.pop(0)
            if status == 200 and not text:
                message = {"role": "assistant", "content": server.answer(json.loads(body["messages"][1]["content"]))}
                usage = {"prompt_tokens": 10, "completion_tokens": 2}
                text = json.dumps({"choices": [{"index": 0, "message": message}], "usage": usage})
            with lock:
                running[0] -= 1
            self.send_response(status)
            self.send_header("content-length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: object) -> None: ...

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.base_url = f"http://127.0.0.1:{web.server_port}/v1"
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()
        thread.join(5)
