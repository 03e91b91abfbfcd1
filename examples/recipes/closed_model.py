"""A stand-in for a closed model and for the strong one that rewrites its instructions, so that the recipe runs offline.

The closed model follows its instructions to the letter: it repeats the last word of a sentence, unless they ask for the
singular or for English. The other one reads what went wrong in what it is shown and adds one line about it. With real
models: their address in OPENAI_BASE_URL, and `Reflection("gpt-5")` in place of `reflect`.
"""

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from examples.recipes.shop import GERMAN
from examples.two_policies.desk import GOODS

SINGULAR = "Name the good in the singular."
ENGLISH = "Name the good in English."


def answer(system: str, sentence: str) -> str:
    """Return what the closed model says."""
    word = sentence.split()[-1]
    if "singular" in system and word.removesuffix("s") in GOODS:
        return word.removesuffix("s")
    if "English" in system and word in GERMAN:
        return GOODS[GERMAN.index(word)]
    return word


def reflect(messages: Sequence[Mapping[str, str]]) -> str:
    """Return new instructions: those in the request, and a line about the first thing that went wrong."""
    asked = messages[-1]["content"]
    instructions = asked.split("```")[1].strip()
    for said in re.findall(r"^user: .*?(\S+)$", asked, flags=re.MULTILINE):
        rule = (
            ENGLISH if said in GERMAN else SINGULAR if said.removesuffix("s") in GOODS and said not in GOODS else None
        )
        if rule is not None and rule not in instructions:
            return f"```\n{instructions}\n{rule}\n```"
    return f"```\n{instructions}\n```"


class Handler(BaseHTTPRequestHandler):
    """Answers chat completions."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer one request."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        system, sentence = (message["content"] for message in body["messages"])
        message = {"role": "assistant", "content": answer(system, sentence)}
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
    """Takes as many connections at once as a run makes."""

    request_queue_size = 256


@contextmanager
def serving() -> Iterator[str]:
    """Serve the closed model on a free port; yields its base URL."""
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
