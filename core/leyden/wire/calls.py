"""One model call on its way out: who makes it, where it goes, which span records it.

One idea: everything is decided before the request leaves, from the frame and the routing. One trap: a client
that retries sends the same body again; that is the next attempt of the same call, while another body sent
under the same open span is a call of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import weakref
from dataclasses import dataclass, field
from urllib.parse import quote

from leyden.context import Frame, OpenSpan, RolloutContext, status_of
from leyden.errors import ConfigurationError, DeadlineExceeded, EngineError
from leyden.roles import Route, Routing
from leyden.spans import Kind, Status
from leyden.wire.answers import Answer
from leyden.wire.protocols import Place, input_of, set_prompt, told_beside
from leyden.wire.reading import read_answer
from leyden.wire.state import WIRE

logger = logging.getLogger(__name__)

HTTP_BUSY = 429

LAST_EVENTS = (b"[DONE]", b"response.completed", b"response.incomplete", b"message_delta", b"message_stop", b'"error"')
"""What stands in a piece of a stream that may be the last to be read."""


@dataclass
class Attempts:
    """What one rollout has sent so far."""

    bodies: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Span id -> digest of the body it sent, and how often."""
    failed: dict[bytes, Exception] = field(default_factory=dict)
    """Digest of a body that was not answered -> why."""


_attempts: weakref.WeakKeyDictionary[RolloutContext, Attempts] = weakref.WeakKeyDictionary()


def attempts_of(rollout: RolloutContext) -> Attempts:
    """Return what `rollout` has sent so far."""
    return _attempts.setdefault(rollout, Attempts())


class ModelCall:
    """One HTTP request of a model call, or one that belongs to model calls and is sent where they are."""

    def __init__(
        self, frame: Frame, place: Place, method: str, raw: bytes, body: dict[str, object], routing: Routing | None
    ) -> None:
        self.rollout = frame.rollout
        self.protocol = place.protocol
        self.path = place.path
        self.method = method
        self.body = body
        self.raw = raw
        self.routing = routing
        self.digest = hashlib.blake2b(raw, digest_size=16).digest()
        call = open_call(frame)
        self.role = call.role if call else frame.role
        self.route: Route | None = routing.route_of(self.role) if routing else None
        self.prompt: str | None = routing.prompts.get(self.role) if routing and raw else None
        self.span: OpenSpan | None = None
        self.owns_span = False
        self.http_attempt = 0
        self.chunks: list[bytes] = []
        self.status_code = 0
        self.encoding: str | None = None
        self.is_over = False
        if self.rollout is not None and not self.rollout.is_closed and self.protocol.is_model_call:
            self.take_span(self.rollout, call, frame.span_id)

    def take_span(self, rollout: RolloutContext, call: OpenSpan | None, parent_id: str | None) -> None:
        """Use the adapter's open span for its first body and repetitions of it; else open one."""
        sent = attempts_of(rollout).bodies
        if call is not None:
            digest, count = sent.get(call.span_id, (self.digest, 0))
            if digest == self.digest:
                sent[call.span_id] = (digest, count + 1)
                self.span, self.http_attempt = call, count
                call.attributes.update(told_beside(self.body))
                if self.prompt is not None:  # the adapter has seen the agent's own
                    call.attributes["gen_ai.input.messages"] = self.asked()
                return
        model = self.body.get("model")
        self.span = rollout.open(Kind.MODEL_CALL, f"chat {model}" if model else "chat", self.role, parent_id)
        self.owns_span = True
        self.span.when_left = self.left
        self.span.attributes.update(
            {
                "gen_ai.operation.name": "text_completion" if self.protocol.dialect == "completions" else "chat",
                "gen_ai.request.model": model,
                "gen_ai.input.messages": self.asked(),
                **told_beside(self.body),
            }
        )

    def asked(self) -> object:
        """Return what the model is asked, under the prompt that is in force."""
        body = dict(self.body)
        if self.prompt is not None:
            with contextlib.suppress(ConfigurationError):  # which is raised where the call is sent
                set_prompt(body, self.protocol, self.prompt)
        return input_of(body)

    # ---- the request -------------------------------------------------------------------------------------------

    def check_protocol(self) -> None:
        """Refuse what the gateway does not speak, and a prompt that has no place.

        Raises:
            ConfigurationError: names the protocol and the fix.
        """
        try:
            if self.route is not None and self.protocol.cure is not None:
                raise ConfigurationError(
                    f"role {self.role!r} is routed to {self.route.model!r}, but it calls {self.path!r} of the protocol "
                    f"{self.protocol.name!r}, which is not served; {self.protocol.cure}, or take the role out of the "
                    "policy"
                )
            if self.prompt is not None:
                set_prompt(dict(self.body), self.protocol, self.prompt)
        except ConfigurationError as error:
            # SDKs wrap what a transport raises, so the log and the rollout say it too.
            logger.error("%s", error)
            self.blame(error)
            raise

    def url(self) -> str:
        """Return where a routed request goes."""
        assert self.routing is not None
        return self.routing.base_url.rstrip("/") + self.path

    def headers(self) -> dict[str, str]:
        """Return the headers of a routed request: nothing of the user's."""
        assert self.routing is not None
        headers = {
            "authorization": f"Bearer {self.routing.token}",
            "content-type": "application/json",
            # The observer of a stream reads the bytes as they come.
            "accept-encoding": "identity",
        }
        if self.rollout is None:
            return headers
        named = {
            "rollout": self.rollout.rollout_id,
            "attempt": str(self.rollout.attempt),
            "role": self.role,
        }
        model = self.body.get("model")
        if isinstance(model, str):
            # The answer names it too: frameworks compare it with what they asked for.
            named["model"] = model
        if self.span is not None:
            named["span"] = self.span.span_id
            named["parent"] = self.span.parent_id or ""
            named["http-attempt"] = str(self.http_attempt)
        return headers | {f"x-leyden-{name}": quote(value, safe="") for name, value in named.items()}

    def content(self) -> bytes:
        """Return the body: with the route's model and the role's prompt where there are such, else as it was."""
        if not self.raw or (self.route is None and self.prompt is None):
            return self.raw
        body = dict(self.body)
        if self.route is not None and (self.protocol.is_model_call or "model" in body):
            body["model"] = self.route.model
        if self.prompt is not None:
            set_prompt(body, self.protocol, self.prompt)
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
        """Note the status line; a server error of the gateway, or its being busy, is not the agent's fault."""
        self.status_code = status_code
        self.encoding = encoding
        if self.route is None or self.rollout is None:
            return
        if status_code >= 500 or status_code == HTTP_BUSY:
            self.blame(EngineError(f"the gateway answered {status_code} to role {self.role!r}"))
        elif status_code < 400:
            self.absolve()

    def saw(self, chunk: bytes) -> None:
        """Keep a piece of a stream for the record, and stop at the deadline.

        Raises:
            DeadlineExceeded: the deadline has passed.
        """
        self.chunks.append(chunk)
        # Readers often stop at the last event, or at an error, and leave the rest to the garbage collector.
        if any(mark in chunk for mark in LAST_EVENTS) and not self.is_over:
            answer = self.answer()
            if answer.error is not None or answer.is_whole:
                self.conclude(answer)
        self.check_deadline()

    def failed(self, error: BaseException) -> None:
        """Record that no answer came, or that its stream broke.

        Raises:
            DeadlineExceeded: a routed request failed because its rollout has no time left.
        """
        if self.is_over:
            return
        left = self.seconds_left()
        is_late = left is not None and left <= 0
        if self.route is not None and isinstance(error, Exception) and not is_late:
            self.blame(error)
        broken = self.status_code != 0 or is_late or isinstance(error, DeadlineExceeded)
        is_cancelled = isinstance(error, asyncio.CancelledError)
        if is_cancelled and self.chunks and self.answer().is_whole:  # it had read all it wanted
            self.closed_early()
            return
        status = Status.INTERRUPTED if broken and not is_cancelled else status_of(error)
        self.end(status, f"{type(error).__name__}: {error}", self.answer() if self.chunks else Answer())
        if self.route is not None and isinstance(error, Exception):
            self.check_deadline()

    def blame(self, error: Exception) -> None:
        """Say that the rollout must not count, unless the same request succeeds later."""
        if self.rollout is None:
            return
        with WIRE.lock:
            failed = attempts_of(self.rollout).failed
            stands = self.rollout.infrastructure_error
            is_ours = stands is None or any(stands is other for other in failed.values())
            failed[self.digest] = error
            if is_ours:  # what somebody else found no later success takes back
                self.rollout.infrastructure_error = error

    def absolve(self) -> None:
        """Take back what was said of this request, and let the next unanswered one stand for the rollout."""
        assert self.rollout is not None
        with WIRE.lock:
            failed = attempts_of(self.rollout).failed
            error = failed.pop(self.digest, None)
            if error is not None and self.rollout.infrastructure_error is error:
                self.rollout.infrastructure_error = next(iter(failed.values()), None)

    def finished(self, content: bytes | None = None) -> None:
        """Record the end of the answer: `content` when it came whole, else the chunks seen."""
        if self.is_over:
            return
        answer = self.answer(content)
        answer.is_whole |= content is not None
        self.conclude(answer)

    def conclude(self, answer: Answer) -> None:
        """End with an answer of which no more will come."""
        self.judge(answer, "the stream ended before its last event")
        if self.route is not None and self.status_code < 400 and (answer.error or not answer.is_whole):
            self.blame(EngineError(f"the answer to role {self.role!r} was cut"))

    def closed_early(self) -> None:
        """Record that the reader stopped; after the last event that is the usual end."""
        if not self.is_over:
            self.judge(self.answer(), "the reader stopped before its last event")

    def left(self) -> None:
        """Record that a reader let go of a stream without closing it."""
        if self.status_code:
            self.closed_early()

    def judge(self, answer: Answer, if_cut: str) -> None:
        """End with what the answer says of itself, and with `if_cut` when its end is missing."""
        if self.status_code >= 400:
            self.end(Status.ERROR, f"HTTP {self.status_code}", answer)
        elif answer.error is not None:
            self.end(Status.ERROR, f"the answer says: {answer.error}", answer)
        elif answer.is_whole:
            self.end(Status.OK, None, answer)
        else:
            self.end(Status.INTERRUPTED, if_cut, answer)

    def end(self, status: Status, error: str | None, answer: Answer) -> None:
        """Close the span, or tell an adapter's that its stream broke."""
        self.is_over = True
        if self.span is None:
            return
        if self.owns_span:
            code = {"http.response.status_code": self.status_code} if self.status_code else {}
            self.span.close(status, error, **code, **answer.attributes())
        elif 0 < self.status_code < 400 and status is not Status.OK:
            self.span.attributes["leyden.stream"] = "interrupted"

    def answer(self, content: bytes | None = None) -> Answer:
        """Read what arrived."""
        if self.span is None or (content is not None and not self.owns_span):
            return Answer(is_whole=True)
        choices = self.body.get("n")
        received = b"".join(self.chunks) if content is None else content
        wanted = choices if isinstance(choices, int) else 1
        return read_answer(self.protocol.dialect, received, self.encoding, wanted)


def open_call(frame: Frame) -> OpenSpan | None:
    """Return the frame's model-call span while it is open."""
    return frame.call if frame.call is not None and not frame.call.is_closed else None
