"""Decide what happens to a request: whether it is a model call, who makes it, and where it goes.

One idea: the frame says who calls, the routing says where that role goes; headers of Leyden's that the user's own
client sends (`leyden.headers()`) say it where the frame cannot. A role in no route passes byte-identical.
The one trap: outside a known rollout nothing is attributed by guess. In training such a call is refused while
rollouts run here, because the usual cause is a thread that lost its context.
"""

from __future__ import annotations

import json
import logging
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from leyden import context
from leyden.context import Frame, RolloutContext
from leyden.errors import LostContextError, RolloutError
from leyden.roles import MAIN_ROLE
from leyden.spans import Mode
from leyden.wire.calls import ModelCall, open_call
from leyden.wire.protocols import Place, place_of
from leyden.wire.state import WIRE, is_below_the_wire, routing_of

logger = logging.getLogger(__name__)

MARK = "x-leyden-"
"""What the headers that say who calls begin with."""

MARKS = tuple(f"{MARK}{name}" for name in ("rollout", "attempt", "role", "parent"))


@dataclass(frozen=True)
class Outgoing:
    """A request about to be sent, in words that all HTTP libraries share."""

    method: str
    path: str
    header: Callable[[str], str | None]
    """Returns a header by its name in lower case."""
    read: Callable[[], bytes]
    """Returns the body without consuming it, or nothing when it cannot be read twice."""
    query: str = ""


def recognise(request: Outgoing) -> ModelCall | None:
    """Return what is to be done with a request, or `None` to leave it alone.

    Raises:
        LostContextError: it belongs to no known rollout while rollouts run here.
        DeadlineExceeded: its rollout has no time left.
        RolloutError: its rollout is over, and the gateway would not know it any more.
        ConfigurationError: its role is routed, but the gateway does not speak this protocol.
    """
    place = place_of(request.method, request.path)
    if place is None or is_below_the_wire():
        return None
    frame = caller_of(request)
    rollout = frame.rollout if frame else None
    routing = routing_of(frame)
    if rollout is None and routing is None:
        refuse_lost_call(request, place)
        return None
    frame = frame or Frame()
    call = open_call(frame)
    role = call.role if call else frame.role
    is_routed = routing is not None and routing.route_of(role) is not None
    changes = is_routed or any(request.header(name) is not None for name in MARKS)
    changes |= routing is not None and place.protocol.is_model_call and role in routing.prompts
    is_seen = rollout is not None and not rollout.is_closed and place.protocol.is_model_call
    if not changes and (not is_seen or (call is not None and not is_late(frame))):
        return None
    raw = request.read()
    body = body_of(raw, place)
    if body is None:
        return None
    if is_routed and rollout is not None and rollout.is_closed and rollout.mode is not Mode.RECORDED:
        raise RolloutError(
            f"role {role!r} calls a model for rollout {rollout.rollout_id!r}, which is over; "
            "await or cancel the agent's background work before it returns"
        )
    if request.method == "GET" and request.query:  # which part of a kept answer is wanted
        place = replace(place, path=f"{place.path}?{request.query}")
    model_call = ModelCall(frame, place, request.method, raw, body, routing)
    try:
        model_call.check_deadline()
        model_call.check_protocol()
    except BaseException as error:
        model_call.failed(error)
        raise
    return model_call


def is_late(frame: Frame) -> bool:
    """Say whether the frame's rollout has no time left."""
    left = frame.rollout.seconds_left() if frame.rollout else None
    return left is not None and left <= 0


def body_of(raw: bytes, place: Place) -> dict[str, object] | None:
    """Return the body of a request of this protocol, or `None` when it is some other service's."""
    if place.protocol.key is None and not raw:
        return {}
    try:
        body = json.loads(raw)
    except ValueError:
        return None
    return body if isinstance(body, dict) and place.protocol.is_meant_by(body) else None


# ---- who calls -------------------------------------------------------------------------------------------------


def caller_of(request: Outgoing) -> Frame | None:
    """Return the frame of a request: its own headers win over the frame that holds here."""
    frame = context.current()
    named, parent = marked(request, "role"), marked(request, "parent")
    if marked(request, "rollout") is not None:
        rollout = marked_rollout(request)
        if rollout is None:
            return None
    else:
        key = key_of(request)
        rollout = context.rollout_with_token(key.token, marked(request, "attempt")) if key.role else None
        named = named or (key.role if rollout else None)
    if rollout is not None and (frame is None or frame.rollout is not rollout):
        frame = Frame(rollout, MAIN_ROLE, key_of(request).span_id or rollout.root_id)
    if frame is None or frame.rollout is None:
        return replace(frame or Frame(), role=named) if named else frame
    if named is not None:
        frame.rollout.declared_roles.add(named)
    if parent is not None and rollout is not None:
        frame = replace(frame, span_id=parent)
    call = open_call(frame)
    if named is None or named == (call.role if call else frame.role):
        return frame
    if call is not None:
        call.context.reassign(call, named)
    return replace(frame, role=named)


def marked(request: Outgoing, name: str) -> str | None:
    """Return what a header of Leyden's says."""
    value = request.header(MARK + name)
    return unquote(value) if value else None


def marked_rollout(request: Outgoing) -> RolloutContext | None:
    """Return the running rollout that the headers name; none when it is another attempt's turn by now."""
    return context.active_rollout(marked(request, "rollout") or "", marked(request, "attempt"))


@dataclass(frozen=True)
class Key:
    """What a key that `leyden.endpoint` gave out says; any other has no role."""

    token: str
    role: str | None = None
    span_id: str | None = None
    """Of whoever asked for the endpoint."""


def key_of(request: Outgoing) -> Key:
    """Return the key that a request brings."""
    given = request.header("authorization") or ""
    is_bearer = given[:7].lower() == "bearer "
    key = (given[7:].strip() if is_bearer else given) or request.header("x-api-key") or ""
    token, _, rest = key.partition(":")
    role, _, span_id = rest.partition(":")
    return Key(token, unquote(role) or None, span_id or None)


# ---- nobody calls ----------------------------------------------------------------------------------------------


def refuse_lost_call(request: Outgoing, place: Place) -> None:
    """Refuse a model call without a rollout while rollouts run here.

    Raises:
        LostContextError: names the call site and the fix.
    """
    routing = context.active_routing()
    if routing is None or routing.on_lost_context != "error" or request.method != "POST":
        return
    if not body_of(request.read(), place):
        return
    with WIRE.lock:
        WIRE.lost_calls += 1
    named = marked(request, "rollout")
    if named is not None:
        cause = (
            f"is meant for rollout {named!r}, which does not run in this process, or not in that attempt any more. "
            "Answer a rollout's jobs before its agent returns"
        )
    else:
        cause = (
            "belongs to no known rollout, although rollouts run in this process. The usual cause is a thread or "
            "executor that does not copy the context: use asyncio.to_thread, or contextvars.copy_context().run, or "
            "leyden.instrument(threads=True); a worker that serves every rollout sends leyden.headers() of whoever "
            "asked it"
        )
    error = LostContextError(
        f"a model call at {call_site()} {cause}. on_lost_context='pass' lets such calls through, unrecorded"
    )
    # SDKs wrap what a transport raises in an error of their own, so the log says it too.
    logger.error("%s", error)
    raise error


def call_site() -> str:
    """Name the innermost line of the running stack that is in no installed package and not ours."""
    paths = sysconfig.get_paths()
    installed = tuple(str(Path(paths[key]).resolve()) for key in ("stdlib", "platstdlib", "purelib", "platlib"))
    for frame, line in traceback.walk_stack(None):
        code, package = frame.f_code, str(frame.f_globals.get("__name__")).partition(".")[0]
        file = str(Path(code.co_filename).resolve())
        if (
            package not in ("leyden", "leyden_plugins")
            and not file.startswith(installed)
            and code.co_filename[0] != "<"
        ):
            return f"{file}:{line} in {code.co_name}"
    return "an unknown place (no line of user code is on this thread's stack)"
