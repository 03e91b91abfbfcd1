"""One model call on its way out: who makes it, where it goes, which span records it.

One idea: everything is decided before the request leaves, from the frame and the routing. One trap: a client
that retries sends the same body again; that is the next attempt of the same call, while another body sent
under the same open span is a call of its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

from leyden.context import Frame, OpenSpan, RolloutContext, status_of
from leyden.errors import ConfigurationError, DeadlineExceeded, EngineError
from leyden.roles import Route, Routing
from leyden.spans import Kind, Status

logger = logging.getLogger(__name__)

DIALECTS = ("/chat/completions", "/completions", "/responses", "/messages")
"""Path endings of the protocols that carry model calls; the longer of two that match stands first."""

SPOKEN = frozenset({"/chat/completions"})
"""Those that the gateway understands."""

REMEDIES = {
    "/completions": "call the chat completions API",
    "/responses": "use the chat completions API (langchain-openai: ChatOpenAI(use_responses_api=False))",
    "/messages": "give this role an OpenAI-compatible client, such as ChatOpenAI",
}

STREAM_ENDS = (b"data: [DONE]", b"data:[DONE]", b'"response.completed"', b'"message_stop"')
"""What stands in the last event of a complete stream."""

PATIENCE_SECONDS = 600.0
"""How long a held request is repeated when the rollout has no deadline."""

CONNECT_PATIENCE_SECONDS = 5.0
"""How long a refused connection is tried again: a server that starts or restarts needs a moment."""


@dataclass
class Attempts:
    """What one rollout has sent so far."""

    bodies: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Span id -> digest of the body it sent, and how often."""
    failed: bytes | None = None
    """Digest of the body whose failure stands as the rollout's infrastructure error."""


_attempts: weakref.WeakKeyDictionary[RolloutContext, Attempts] = weakref.WeakKeyDictionary()


def attempts_of(rollout: RolloutContext) -> Attempts:
    """Return what `rollout` has sent so far."""
    return _attempts.setdefault(rollout, Attempts())


class ModelCall:
    """One HTTP request of a model call."""

    def __init__(
        self, frame: Frame, dialect: str, raw: bytes, body: dict[str, object], routing: Routing | None
    ) -> None:
        self.rollout = frame.rollout
        self.dialect = dialect
        self.body = body
        self.routing = routing
        self.digest = hashlib.blake2b(raw, digest_size=16).digest()
        call = open_call(frame)
        self.role = call.role if call else frame.role
        self.route: Route | None = routing.route_of(self.role) if routing else None
        self.prompt: str | None = routing.prompts.get(self.role) if routing else None
        self.span: OpenSpan | None = None
        self.owns_span = False
        self.http_attempt = 0
        self.chunks: list[bytes] = []
        self.status_code = 0
        self.compressed = False
        self.is_over = False
        if self.rollout is not None and not self.rollout.is_closed:
            self.take_span(self.rollout, call, frame.span_id)

    def take_span(self, rollout: RolloutContext, call: OpenSpan | None, parent_id: str | None) -> None:
        """Use the adapter's open span for its first body and repetitions of it; else open one."""
        sent = attempts_of(rollout).bodies
        if call is not None:
            digest, count = sent.get(call.span_id, (self.digest, 0))
            if digest == self.digest:
                sent[call.span_id] = (digest, count + 1)
                self.span, self.http_attempt = call, count
                return
        model = self.body.get("model")
        self.span = rollout.open(Kind.MODEL_CALL, f"chat {model}" if model else "chat", self.role, parent_id)
        self.owns_span = True
        self.span.attributes.update(
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.request.model": model,
                "gen_ai.input.messages": self.body.get("messages") or self.body.get("input") or self.body.get("prompt"),
            }
        )

    # ---- the request -------------------------------------------------------------------------------------------

    def check_dialect(self) -> None:
        """Refuse a protocol that the gateway does not speak.

        Raises:
            ConfigurationError: names the protocol and the fix.
        """
        if self.dialect in SPOKEN:
            return
        error = ConfigurationError(
            f"role {self.role!r} is routed to {self.route.model if self.route else None!r}, but it calls "
            f"{self.dialect!r}, which is not served; {REMEDIES[self.dialect]}, or take the role out of the policy"
        )
        # SDKs wrap what a transport raises, so the log and the rollout say it too.
        logger.error("%s", error)
        self.blame(error)
        raise error

    def url(self) -> str:
        """Return where a routed request goes."""
        assert self.routing is not None
        return self.routing.base_url.rstrip("/") + self.dialect

    def headers(self) -> dict[str, str]:
        """Return the headers of a routed request: nothing of the user's."""
        assert self.routing is not None
        headers = {
            "authorization": f"Bearer {self.routing.token}",
            "content-type": "application/json",
            # The observer of a stream reads the bytes as they come.
            "accept-encoding": "identity",
        }
        if self.rollout is not None and self.span is not None:
            named = {
                "rollout": self.rollout.rollout_id,
                "attempt": str(self.rollout.attempt),
                "role": self.role,
                "span": self.span.span_id,
                "parent": self.span.parent_id or "",
                "http-attempt": str(self.http_attempt),
            }
            headers.update({f"x-leyden-{name}": quote(value, safe="") for name, value in named.items()})
        return headers

    def content(self) -> bytes:
        """Return the body with the route's model and the role's prompt.

        Raises:
            ConfigurationError: this protocol has no place for a system prompt.
        """
        body = dict(self.body)
        if self.route is not None:
            body["model"] = self.route.model
        if self.prompt is not None:
            set_prompt(body, self.dialect, self.prompt)
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

    # ---- the deadline ------------------------------------------------------------------------------------------

    def seconds_left(self) -> float | None:
        """Return the seconds until the rollout's deadline."""
        return self.rollout.seconds_left() if self.rollout else None

    def check_deadline(self) -> None:
        """Stop the agent when its rollout has no time left.

        Raises:
            DeadlineExceeded: the deadline has passed.
        """
        left = self.seconds_left()
        if left is not None and left <= 0:
            assert self.rollout is not None
            raise DeadlineExceeded(f"the deadline of rollout {self.rollout.rollout_id!r} passed {-left:.1f} s ago")

    # ---- the answer --------------------------------------------------------------------------------------------

    def answered(self, status_code: int, *, encoding: str | None) -> None:
        """Note the status line; a server error of the gateway is not the agent's fault."""
        self.status_code = status_code
        self.compressed = encoding not in (None, "identity")
        if self.route is None or self.rollout is None:
            return
        if status_code >= 500:
            self.blame(EngineError(f"the gateway answered {status_code} to role {self.role!r}"))
        elif status_code < 400 and attempts_of(self.rollout).failed == self.digest:
            self.rollout.infrastructure_error = attempts_of(self.rollout).failed = None

    def failed(self, error: BaseException) -> None:
        """Record that no answer came, or that its stream broke."""
        self.is_over = True
        if self.route is not None and isinstance(error, Exception):
            self.blame(error)
        if self.owns_span and self.span is not None:
            broken = self.status_code != 0 or isinstance(error, DeadlineExceeded)
            status = Status.INTERRUPTED if broken else status_of(error)
            self.span.close(status, f"{type(error).__name__}: {error}", **self.response_attributes())
        elif self.span is not None and self.status_code:
            self.span.attributes["leyden.stream"] = "interrupted"

    def blame(self, error: Exception) -> None:
        """Say that the rollout must not count, unless the same request succeeds later."""
        if self.rollout is not None:
            self.rollout.infrastructure_error = error
            attempts_of(self.rollout).failed = self.digest

    def finished(self, content: bytes | None = None) -> None:
        """Record the end of the answer: `content` when it came whole, else the chunks seen."""
        if self.span is None or self.is_over:
            return
        self.is_over = True
        streamed = content is None
        content = b"".join(self.chunks) if content is None else content
        cut = streamed and self.status_code < 400 and not self.is_whole(content)
        if cut and self.route is not None:
            self.blame(EngineError(f"the answer to role {self.role!r} was cut"))
        if not self.owns_span:
            if cut:
                self.span.attributes["leyden.stream"] = "interrupted"
            return
        attributes = self.response_attributes()
        if self.status_code >= 400:
            self.span.close(Status.ERROR, f"HTTP {self.status_code}", **attributes)
        elif cut:
            self.span.close(Status.INTERRUPTED, "the stream ended before its last event", **attributes)
        else:
            self.span.close(Status.OK, None, **attributes, **output_attributes(content))

    def closed_early(self) -> None:
        """Record that the reader stopped; after the last event that is the usual end."""
        if self.is_over:
            return
        content = b"".join(self.chunks)
        if self.status_code >= 400 or self.is_whole(content):
            self.finished(content)
            return
        self.is_over = True
        if self.owns_span and self.span is not None:
            self.span.close(Status.INTERRUPTED, "closed by the reader", **self.response_attributes())
        elif self.span is not None:
            self.span.attributes["leyden.stream"] = "interrupted"

    def is_whole(self, content: bytes) -> bool:
        """Say whether the bytes of an answer hold its end; a compressed one cannot be told and counts as whole."""
        if self.compressed or content.lstrip()[:1] in (b"{", b"["):
            return True
        return any(end in content for end in STREAM_ENDS) or b'"finish_reason":"' in content.replace(b": ", b":")

    def response_attributes(self) -> dict[str, object]:
        """Return what a span says of the answer's status."""
        return {"http.response.status_code": self.status_code} if self.status_code else {}


def open_call(frame: Frame) -> OpenSpan | None:
    """Return the frame's model-call span while it is open."""
    return frame.call if frame.call is not None and not frame.call.is_closed else None


def output_attributes(content: bytes) -> Mapping[str, object]:
    """Read answers, finish reasons and usage from a JSON body; a stream or another protocol gives nothing."""
    try:
        body = json.loads(content)
        choices = [choice for choice in body["choices"] if choice.get("message")]
        usage = body.get("usage") or {}
        return {
            "gen_ai.response.model": body.get("model"),
            "gen_ai.output.messages": [choice["message"] for choice in choices],
            "gen_ai.response.finish_reasons": [choice.get("finish_reason") for choice in choices],
            "gen_ai.usage.input_tokens": usage.get("prompt_tokens"),
            "gen_ai.usage.output_tokens": usage.get("completion_tokens"),
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def set_prompt(body: dict[str, object], dialect: str, prompt: str) -> None:
    """Put `prompt` in the place of the request's system message.

    Raises:
        ConfigurationError: this protocol has none.
    """
    if dialect == "/chat/completions":
        messages = body.get("messages")
        messages = list(messages) if isinstance(messages, list) else []
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if first.get("role") in ("system", "developer"):
            messages[0] = {**first, "content": prompt}
        else:
            messages.insert(0, {"role": "system", "content": prompt})
        body["messages"] = messages
    elif dialect == "/responses":
        body["instructions"] = prompt
    elif dialect == "/messages":
        body["system"] = prompt
    else:
        raise ConfigurationError(
            f"a prompt cannot be set on a request to {dialect!r}, which has no system message; {REMEDIES[dialect]}"
        )


class Patience:
    """When and how long to wait before a routed request is sent again."""

    def __init__(self, call: ModelCall) -> None:
        self.call = call
        now = time.monotonic()
        left = call.seconds_left()
        self.give_up = now + (PATIENCE_SECONDS if left is None else left)
        self.give_up_connecting = min(self.give_up, now + CONNECT_PATIENCE_SECONDS)
        self.pause = 0.05

    def after_refusal(self) -> float | None:
        """Return the pause after a refused connection, `None` to stop trying."""
        if self.call.routing is not None and self.call.routing.fallback:
            return None
        self.pause = min(self.pause * 2, 1.0)
        return self.bounded(self.pause * random.uniform(0.5, 1.0), self.give_up_connecting)

    def after_hold(self, retry_after: str) -> float | None:
        """Return the pause after a 503 with this `Retry-After`, `None` to stop trying."""
        try:
            seconds = max(float(retry_after), 0.05)
        except ValueError:
            seconds = 1.0
        return self.bounded(seconds * random.uniform(0.5, 1.5), self.give_up)

    def bounded(self, seconds: float, until: float) -> float | None:
        """Return `seconds`, or `None` when they would end after `until`."""
        return seconds if time.monotonic() + seconds < until else None
