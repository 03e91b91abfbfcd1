"""Break the path from agent to engine in known ways: the contract suite must turn red for each.

Each imports what it breaks when it is applied, because the client's side and the server's run in environments of
their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

Headers = dict[str, str]


def role_dropped() -> None:
    """The wire forgets to say who speaks."""
    change_headers(lambda headers: headers.pop("x-leyden-role"))


def roles_swapped() -> None:
    """The wire mixes two roles up."""
    other = {"worker": "critic", "critic": "worker"}
    change_headers(lambda headers: headers.update({"x-leyden-role": other[headers["x-leyden-role"]]}))


def spans_swapped() -> None:
    """The wire names the parent as the call's span."""

    def swap(headers: Headers) -> None:
        headers["x-leyden-span"], headers["x-leyden-parent"] = headers["x-leyden-parent"], headers["x-leyden-span"]

    change_headers(swap)


def keys_swapped() -> None:
    """Every rollout uses the key of the first, and nobody says which it is."""
    first: list[str] = []

    def swap(headers: Headers) -> None:
        first.append(headers["authorization"])
        headers["authorization"] = first[0]
        del headers["x-leyden-rollout"]

    change_headers(swap)


def adapter_off() -> None:
    """No framework is instrumented, so every call is that of `main`."""
    from leyden import instrumentation

    replaced(instrumentation, "add_adapter", lambda *_, **__: None)


def span_lost() -> None:
    """One tool's end is never heard of."""
    from leyden.context import OpenSpan
    from leyden.spans import Kind, Status

    close = OpenSpan.close
    lost: list[OpenSpan] = []

    def closing(span: OpenSpan, status: Status = Status.OK, error: str | None = None, **attributes: object) -> None:
        if not lost and span.kind is Kind.TOOL:
            lost.append(span)
        if span not in lost or status is Status.ABANDONED:
            close(span, status, error, **attributes)

    replaced(OpenSpan, "close", closing)


def one_id_changed() -> None:
    """The gateway records one token wrongly."""
    from leyden_plugins.gateway.call import Call

    take = Call.take
    changed: list[object] = []

    def taken(call: Call, delta: Any) -> None:
        if call.caller.has_span and delta.token_ids and not changed:
            changed.append(delta)
            delta = replace(delta, token_ids=[delta.token_ids[0] ^ 1, *delta.token_ids[1:]])
        take(call, delta)

    replaced(Call, "take", taken)


def stream_cut() -> None:
    """The gateway drops the rest of one stream, and records it as delivered."""
    from leyden_plugins.gateway.exchange import Exchange

    write = Exchange.write
    cut: list[Exchange] = []

    async def writing(exchange: Exchange, events: bytes, *, last: bool = False) -> None:
        if not cut and exchange.is_streaming and exchange.header("x-leyden-span"):
            cut.append(exchange)
        if exchange not in cut:
            await write(exchange, events, last=last)
        elif last:
            await write(exchange, b"", last=True)

    replaced(Exchange, "write", writing)


def change_headers(change: Callable[[Headers], object]) -> None:
    """Change what the wire says about a call."""
    from leyden.wire.calls import ModelCall

    original = ModelCall.headers

    def headers(call: ModelCall) -> Headers:
        found = original(call)
        if "x-leyden-role" in found:
            change(found)
        return found

    replaced(ModelCall, "headers", headers)


def replaced(owner: object, name: str, value: object) -> None:
    """Put `value` in the place of a function, for good."""
    setattr(owner, name, value)


CLIENT: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (role_dropped, roles_swapped, spans_swapped, keys_swapped, adapter_off, span_lost)
}
"""Applied by `drive`."""

SERVER: dict[str, Callable[[], None]] = {each.__name__: each for each in (one_id_changed, stream_cut)}
"""Applied by `server`."""


def apply(name: str) -> None:
    """Break what `name` says.

    Raises:
        KeyError: there is no such mutation.
    """
    (CLIENT | SERVER)[name]()
