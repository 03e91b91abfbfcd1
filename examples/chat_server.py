"""Models that are functions, served on this machine in OpenAI's chat protocol: what some examples run on offline."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Messages = list[dict[str, str]]
Answer = Callable[[str, Messages], str]
"""(model, messages) -> text."""


class ChatServer(ThreadingHTTPServer):
    """Answers chat completions; takes as many connections at once as a run makes."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self, answer: Answer, port: int = 0) -> None:
        """Listen on loopback; port 0 takes a free one."""
        super().__init__(("127.0.0.1", port), Handler)
        self.answer = answer

    @property
    def base_url(self) -> str:
        """Return what clients are given."""
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        """Answer one request."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = self.server.answer(body["model"], body["messages"])
        asked, said = sum(len(one["content"].split()) for one in body["messages"]), len(text.split())
        reply = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said},
        }
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """Serve for the length of the block; yields the base URL."""
    with ChatServer(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.base_url
        finally:
            server.shutdown()
            thread.join()
