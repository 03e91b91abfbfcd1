"""The explicit form: `with observe(): crew.kickoff()`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from crewai.events.stream_context import add_stream_sink, reset_stream_sinks

from leyden import context, wire
from leyden_plugins.frameworks.crewai import scopes
from leyden_plugins.frameworks.crewai.recorder import LISTENERS, record

logger = logging.getLogger(__name__)

_is_observed: ContextVar[bool] = ContextVar("leyden_crewai_is_observed", default=False)


@contextlib.contextmanager
def observe() -> Iterator[None]:
    """Record what crews, flows and agents do inside the block.

    It patches nothing of CrewAI; it does install Leyden's hook into the HTTP clients, because only there can a
    trained role be sent to the gateway. Inside another `observe` and beside the automatic form it adds nothing.

    Raises:
        ConcurrentUseError: two rollouts use one flow, crew or agent at once.
    """
    if not wire.is_installed():
        logger.info("observe() installs Leyden's hook into the HTTP clients; leyden.uninstrument() undoes it")
        wire.install()
    if _is_observed.get():
        yield
        return
    before = context.current()
    observed = _is_observed.set(True)
    sinks = add_stream_sink(sink)
    try:
        yield
    except BaseException as error:
        scopes.unwind(before, error)
        raise
    finally:
        reset_stream_sinks(sinks)
        _is_observed.reset(observed)


def sink(source: Any, event: Any) -> None:
    """Record an event, unless the automatic form does.

    Raises:
        ConcurrentUseError: two rollouts use one flow, crew or agent at once.
    """
    if not LISTENERS:
        record(source, event)
