"""Take rewards that programs send by HTTP: one small server on loopback for the whole process.

Each rollout has an address of its own that cannot be guessed. The body is a number or an object of named numbers.
"""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from leyden.rewards import DEFAULT_REWARD

LARGEST = sys.float_info.max

BODY_BYTES = 1 << 16
"""The longest body that is read."""


class Mail:
    """What one rollout's program has sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()

    def rewards(self) -> Mapping[str, float]:
        """Return name -> value."""
        with self._lock:
            return dict(self._values)

    def put(self, value: object) -> str | None:
        """Take a reward; return what is wrong with it, if anything is."""
        named = value if isinstance(value, dict) else {DEFAULT_REWARD: value}
        numbers: dict[str, float] = {}
        for name, number in named.items():
            if not isinstance(number, (int, float)) or not -LARGEST <= number <= LARGEST:
                return f"reward {name!r} must be a finite number, got {number!r:.100}"
            numbers[name] = float(number)
        with self._lock:
            twice = sorted(self._values.keys() & numbers.keys())
            if twice:
                return f"the rewards {twice!r} were given before; each is given once"
            self._values.update(numbers)
        return None if named else "an empty object holds no reward"


class Inbox:
    """The server. Its thread ends with the process."""

    def __init__(self) -> None:
        self._mail: dict[str, Mail] = {}
        inbox = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_POST(self) -> None:
                status, text = inbox.take(self)
                body = json.dumps({"ok": True} if status == 200 else {"error": text}).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Stay silent: the terminal is the run's."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, name="leyden-inbox", daemon=True).start()

    @staticmethod
    @functools.cache
    def shared() -> Inbox:
        """Return this process's inbox, made on first use."""
        return Inbox()

    @contextlib.contextmanager
    def opened(self) -> Iterator[Mail]:
        """Take what arrives at a new address for the length of the block."""
        path = f"/{secrets.token_urlsafe(24)}"
        mail = self._mail[path] = Mail(f"http://127.0.0.1:{self._server.server_port}{path}")
        try:
            yield mail
        finally:
            del self._mail[path]

    def take(self, request: BaseHTTPRequestHandler) -> tuple[int, str]:
        """Read one request; return the status and text of its answer."""
        mail = self._mail.get(request.path)
        if mail is None:
            return 404, "no rollout takes rewards at this address (any more)"
        length = request.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()) or int(length) > BODY_BYTES:
            return 400, f"send a body of at most {BODY_BYTES} bytes with its content-length"
        try:
            value = json.loads(request.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return 400, 'the body must be JSON: a number such as 0.5, or an object such as {"reward": 0.5}'
        error = mail.put(value)
        return (200, "") if error is None else (400, error)
