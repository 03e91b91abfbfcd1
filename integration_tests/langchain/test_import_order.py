"""`leyden.instrument()` before or after the framework's import, and an `uninstrument()` that leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.capture.servers import FakeOpenAI

ROOT = Path(__file__).parents[2]

EPISODE = """
import asyncio, json, sys
import leyden
{before}
from integration_tests.langchain.apps import graph_of, model, said
from tests.capture.rollouts import rollout, routing_to

llm = model(sys.argv[1])

async def trained(state):
    return {{"log": [(await llm.ainvoke(said("trained", "x"))).text]}}

async def other(state):
    return {{"log": [(await llm.ainvoke(said("other", "x"))).text]}}

app = graph_of(trained=trained, other=other)
{after}
async def episode():
    with rollout(routing_to(sys.argv[2], "trained")) as recorded:
        await app.ainvoke({{"task": "", "log": []}})
    return [[span.role, recorded.parent_of(span).name] for span in recorded.calls]

print(json.dumps(asyncio.run(episode())))
"""

ORDERS = {
    "before": ("leyden.instrument()\nassert 'langchain_core' not in sys.modules", ""),
    "after": ("", "leyden.instrument()"),
    "twice": ("leyden.instrument()", "leyden.instrument()"),
    "between": ("import langchain_core.callbacks\nleyden.instrument()", ""),
}


def python(code: str, *arguments: str) -> object:
    """Run code in a process of its own; return the JSON on its last line."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_import_and_instrument_does_not_matter(
    user_server: FakeOpenAI, gateway: FakeOpenAI, order: str
) -> None:
    before, after = ORDERS[order]
    code = EPISODE.format(before=before, after=after)
    assert python(code, user_server.base_url, gateway.base_url) == [["trained", "trained"], ["other", "other"]]
    assert [seen.true_role for seen in gateway.seen] == ["trained"]
    assert [seen.true_role for seen in user_server.seen] == ["other"]


LEFT_BEHIND = """
import concurrent.futures, inspect, json, sys, threading
import httpx, httpx2, langchain_openai, langgraph.func, langgraph.graph, openai
import langchain_core.tracers.context
import leyden

PATCHED = ("langchain", "langgraph", "openai", "httpx", "threading", "concurrent", "asyncio", "contextvars")

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(PATCHED):
            classes = [each for each in vars(module).values() if inspect.isclass(each)]
            for owner in [module, *classes]:
                label = getattr(owner, "__qualname__", "")
                where = (name if owner is module else owner.__module__) + ":" + label
                if owner is module or owner.__module__.startswith(PATCHED):
                    found.update({(where, key): value for key, value in list(vars(owner).items()) if callable(value)
                                  or isinstance(value, (staticmethod, classmethod, property))})
    return found

hooks = list(langchain_core.tracers.context._configure_hooks)
finders = list(sys.meta_path)
leyden.instrument(threads=True)
leyden.uninstrument()  # what is imported with the adapter counts as being there before
before = attributes()
leyden.instrument(threads=True)
changed = [key for key, value in attributes().items() if before.get(key, value) is not value]
leyden.uninstrument()
left = [key for key, value in attributes().items() if before.get(key, value) is not value]
assert langchain_core.tracers.context._configure_hooks == hooks
assert sys.meta_path == finders
print(json.dumps({"changed": sorted({key[1] for key in changed}), "left": left}))
"""


def test_uninstrument_leaves_no_function_of_any_library_changed() -> None:
    found = python(LEFT_BEHIND)
    assert isinstance(found, dict)
    patched = {"_generate_with_cache", "_agenerate_with_cache", "generate", "stream", "astream", "get_state", "start"}
    assert patched | {"submit"} <= set(found["changed"]), "the comparison sees what was patched"
    assert found["left"] == []
