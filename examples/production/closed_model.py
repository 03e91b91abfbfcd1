"""A stand-in for the closed model that production runs on: mostly right, known only by its answers.

It writes the right query for nine questions in ten, something useless for the tenth, and finds every query good.

    python -m examples.production.closed_model 8001
"""

import functools
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from examples.text_to_sql import questions
from examples.text_to_sql.agent import OK
from examples.text_to_sql.databases import path, schema

USELESS = "SELECT 1"
QUESTIONS = 4096
"""Of the train bucket, to which it knows an answer."""


@functools.cache
def known() -> dict[tuple[str, str], str]:
    """Return (tables, question) -> query."""
    every = questions.load("train", count=QUESTIONS)
    return {(schema(str(path(question.database))), question.text): question.sql for question in every}


def answer(messages: list[dict[str, str]]) -> str:
    """Return what it says as the node that the system message names."""
    node, _, tables = messages[0]["content"].partition("\n")
    if node == "checker":
        return OK
    question = messages[1]["content"]
    is_useless = hashlib.sha256(question.encode()).digest()[0] < 26
    return USELESS if is_useless else known().get((tables, question), USELESS)


class Handler(BaseHTTPRequestHandler):
    """Answers chat completions."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer one request."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        message = {"role": "assistant", "content": answer(body["messages"])}
        reply = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


class Server(ThreadingHTTPServer):
    """Takes as many connections at once as the app makes."""

    request_queue_size = 256


if __name__ == "__main__":
    known()
    server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    server.serve_forever()
