"""A thread of its own for each rollout: LangGraph's checkpointers keep a graph's state by `thread_id`.

The idea: rollouts of one task call the same graph with the same `thread_id` and would read each other's state, so
inside a rollout the id gets a suffix that no other attempt has. The trap: an explicit `thread_id` makes LangGraph
forget what a graph inherits from the run around it, so an inherited one is given back with everything beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.runnables.config import var_child_runnable_config

from leyden.context import RolloutContext

CONFIGURABLE = "configurable"
THREAD_ID = "thread_id"


def with_own_thread(graph: Any, config: Any, rollout: RolloutContext) -> Any:
    """Return the config with which to call `graph` in `rollout`; the given one is never changed."""
    # A subgraph without a checkpointer of its own uses its parent's, and with it the parent's thread.
    if not graph.checkpointer:
        return config
    given, bound = settings(config), settings(graph.config)
    inherited: Mapping[str, Any] = {}
    if given.get(THREAD_ID) is None and bound.get(THREAD_ID) is None:
        inherited = settings(var_child_runnable_config.get())
    found = {**inherited, **bound, **given}.get(THREAD_ID)
    if found is None:
        return config
    before = {**inherited, **bound} if inherited else {}
    return {**(config or {}), CONFIGURABLE: {**before, **given, THREAD_ID: own_id(found, rollout)}}


def settings(config: Any) -> Mapping[str, Any]:
    """Return the configurable part of a config."""
    return (config or {}).get(CONFIGURABLE) or {}


def own_id(thread_id: object, rollout: RolloutContext) -> str:
    """Return what a thread is called in `rollout`; its own name for one that comes out of the rollout itself."""
    suffix = f"@{rollout.rollout_id}.{rollout.attempt}.{rollout.root_id}"
    return str(thread_id).removesuffix(suffix) + suffix
