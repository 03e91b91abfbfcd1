"""The hook in the HTTP client: sends trained roles to the gateway and leaves every other call as it was.

It patches the public `send` of `httpx` and `httpx2`, one place below every SDK and framework. One idea: the
frame says who calls, the routing says where that role goes. A role in no route passes byte-identical, with the
user's own client and key; a routed one is sent by a client of Leyden's that has nothing of the user's.

The one trap: outside a known rollout nothing is attributed by guess. In training such a call is refused while
rollouts run here, because the usual cause is a thread that lost its context.
"""

from __future__ import annotations

import functools
import json
import logging
import sysconfig
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from leyden import context
from leyden.context import Frame
from leyden.errors import LostContextError, RolloutError
from leyden.patching import Patches, forget_import, when_imported
from leyden.roles import Routing
from leyden.wire.calls import DIALECTS, ModelCall, open_call
from leyden.wire.clients import Library

logger = logging.getLogger(__name__)

LIBRARIES = ("httpx", "httpx2")


class Wire:
    """What is installed in this process; there is one, because what it patches is the process's."""

    def __init__(self) -> None:
        self.is_installed = False
        self.patches = Patches()
        self.libraries: dict[str, Library] = {}
        self.lock = threading.Lock()
        self.default_routing: Routing | None = None
        """Of a deployed app: used where no rollout brings its own."""
        self.lost_calls = 0


_wire = Wire()


def install() -> None:
    """Patch `httpx` and `httpx2`, now or when they are imported. Idempotent."""
    if _wire.is_installed:
        return
    _wire.is_installed = True
    for name in LIBRARIES:
        when_imported(name, patch_library)


def uninstall() -> None:
    """Restore both libraries and close Leyden's clients. Idempotent."""
    _wire.is_installed = False
    for name in LIBRARIES:
        forget_import(name, patch_library)
    _wire.patches.restore()
    libraries, _wire.libraries = _wire.libraries, {}
    for library in libraries.values():
        library.close()


def is_installed() -> bool:
    """Say whether requests pass through here."""
    return _wire.is_installed


def set_default_routing(routing: Routing | None) -> None:
    """Route calls made outside any rollout: a deployed app."""
    _wire.default_routing = routing


def default_routing() -> Routing | None:
    """Return the routing of a deployed app."""
    return _wire.default_routing


def lost_calls() -> int:
    """Return how many model calls were refused here because their rollout was unknown."""
    return _wire.lost_calls


def is_routed(frame: Frame) -> bool:
    """Say whether a model call made in `frame` goes to the gateway."""
    routing = routing_of(frame)
    return routing is not None and routing.route_of(frame.role) is not None


def routing_of(frame: Frame | None) -> Routing | None:
    """Return the routing of the frame's rollout, else the deployed app's."""
    if frame is not None and frame.rollout is not None:
        return frame.rollout.routing
    return _wire.default_routing


# ---- deciding --------------------------------------------------------------------------------------------------


def recognise(request: Any) -> ModelCall | None:
    """Return what is to be done with a request, or `None` to leave it alone.

    Raises:
        LostContextError: it belongs to no known rollout while rollouts run here.
        DeadlineExceeded: its rollout has no time left.
        RolloutError: its rollout is over, and the gateway would not know it any more.
        ConfigurationError: its role is routed, but the gateway does not speak this protocol.
    """
    if request.method != "POST":
        return None
    path = request.url.path
    dialect = next((ending for ending in DIALECTS if path.endswith(ending)), None)
    if dialect is None:
        return None
    frame = context.current()
    rollout = frame.rollout if frame else None
    routing = routing_of(frame)
    if rollout is None and routing is None:
        refuse_lost_call(request)
        return None
    frame = frame or Frame()
    call = open_call(frame)
    role = call.role if call else frame.role
    changes = routing is not None and (routing.route_of(role) is not None or role in routing.prompts)
    if not changes and (rollout is None or rollout.is_closed or (call is not None and not is_late(frame))):
        return None
    raw = content_of(request)
    body = json_object(raw)
    if body is None:
        return None
    if changes and rollout is not None and rollout.is_closed:
        raise RolloutError(
            f"role {role!r} calls a model for rollout {rollout.rollout_id!r}, which is over; "
            "await or cancel the agent's background work before it returns"
        )
    model_call = ModelCall(frame, dialect, raw, body, routing)
    try:
        model_call.check_deadline()
        if model_call.route is not None:
            model_call.check_dialect()
    except BaseException as error:
        model_call.failed(error)
        raise
    return model_call


def is_late(frame: Frame) -> bool:
    """Say whether the frame's rollout has no time left."""
    left = frame.rollout.seconds_left() if frame.rollout else None
    return left is not None and left <= 0


def content_of(request: Any) -> bytes:
    """Return the body without consuming it; a streamed upload, which no SDK uses for a model call, gives none."""
    try:
        return bytes(request.content)
    except RuntimeError:
        return b""


def json_object(raw: bytes) -> dict[str, object] | None:
    """Return the body of a model call; a body that names no model is some other service's."""
    try:
        body = json.loads(raw)
    except ValueError:
        return None
    return body if isinstance(body, dict) and "model" in body else None


def refuse_lost_call(request: Any) -> None:
    """Refuse a model call without a rollout while rollouts run here.

    Raises:
        LostContextError: names the call site and the fix.
    """
    routing = context.active_routing()
    if routing is None or routing.on_lost_context != "error":
        return
    if json_object(content_of(request)) is None:
        return
    with _wire.lock:
        _wire.lost_calls += 1
    error = LostContextError(
        f"a model call at {call_site()} belongs to no known rollout, although rollouts run in this process. The "
        "usual cause is a thread or executor that does not copy the context: use asyncio.to_thread, or "
        "contextvars.copy_context().run, or leyden.instrument(threads=True). "
        "on_lost_context='pass' lets such calls through, unrecorded"
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


# ---- patching --------------------------------------------------------------------------------------------------


def patch_library(module: ModuleType) -> None:
    """Put the wire below both clients of an HTTP library."""
    if not _wire.is_installed or getattr(module.Client.send, "is_leyden_wire", False):
        return
    library = Library(module)
    _wire.libraries[module.__name__] = library

    @functools.wraps(library.send)
    def send(client: Any, request: Any, **options: Any) -> Any:
        call = recognise(request) if _wire.is_installed else None
        if call is None:
            return library.send(client, request, **options)
        return send_call(library, call, client, request, options)

    @functools.wraps(library.async_send)
    async def async_send(client: Any, request: Any, **options: Any) -> Any:
        call = recognise(request) if _wire.is_installed else None
        if call is None:
            return await library.async_send(client, request, **options)
        return await async_send_call(library, call, client, request, options)

    send.is_leyden_wire = True  # type: ignore[attr-defined]  # seen when one library is an alias of the other
    _wire.patches.replace(module.Client, "send", send)
    _wire.patches.replace(module.AsyncClient, "send", async_send)


def send_call(library: Library, call: ModelCall, client: Any, request: Any, options: dict[str, Any]) -> Any:
    """Send a model call and record how it went."""
    try:
        if call.route is None:
            response = library.send(client, own_request(library, call, request), **options)
            response.request = request
        else:
            response = library.forward(call, request)
        call.answered(response.status_code, encoding=response.headers.get("content-encoding"))
        if options.get("stream"):
            response.stream = library.observed(response.stream, call)
        else:
            call.finished(response.read())
        return response
    except library.unreachable as error:
        if not falls_back(call, error):
            call.failed(error)
            raise
        return library.send(client, request, **options)
    except BaseException as error:
        call.failed(error)
        if call.route is not None and isinstance(error, library.module.TimeoutException):
            call.check_deadline()
        raise


async def async_send_call(library: Library, call: ModelCall, client: Any, request: Any, options: dict[str, Any]) -> Any:
    """Send a model call and record how it went."""
    try:
        if call.route is None:
            response = await library.async_send(client, own_request(library, call, request), **options)
            response.request = request
        else:
            response = await library.async_forward(call, request)
        call.answered(response.status_code, encoding=response.headers.get("content-encoding"))
        if options.get("stream"):
            response.stream = library.observed(response.stream, call)
        else:
            call.finished(await response.aread())
        return response
    except library.unreachable as error:
        if not falls_back(call, error):
            call.failed(error)
            raise
        return await library.async_send(client, request, **options)
    except BaseException as error:
        call.failed(error)
        if call.route is not None and isinstance(error, library.module.TimeoutException):
            call.check_deadline()
        raise


def own_request(library: Library, call: ModelCall, request: Any) -> Any:
    """Return the request to send to the user's endpoint: the same object, or a copy with the role's prompt."""
    if call.prompt is None:
        return request
    headers = request.headers.copy()
    headers.pop("content-length", None)
    return library.module.Request(
        request.method, request.url, headers=headers, content=call.content(), extensions=request.extensions
    )


def falls_back(call: ModelCall, error: Exception) -> bool:
    """Say whether a deployed app's own model answers instead, and say so in the log once a server."""
    if call.route is None or call.routing is None or not call.routing.fallback:
        return False
    warn_of_fallback(call.routing.base_url, type(error).__name__)
    return True


@functools.cache
def warn_of_fallback(base_url: str, reason: str) -> None:
    """Log that a server does not answer."""
    logger.warning("%s cannot be reached (%s); the app's own model answers instead (fallback=True)", base_url, reason)
