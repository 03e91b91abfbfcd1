"""The automatic form: LangChain's configure hook, and the few methods that must know a call is rerouted.

Only routed roles and running rollouts are touched: routed roles bypass LLM caches, which would replay an old
policy, and the graphs of a rollout keep their state on threads of their own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import get_llm_cache
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.language_models.llms import BaseLLM
from langchain_core.tracers import context as tracer_context

from leyden import context, wire
from leyden.context import Frame
from leyden.errors import ConfigurationError
from leyden.patching import Patches, forget_import, when_imported
from leyden_plugins.frameworks.langchain.handler import RUNS, Recorder
from leyden_plugins.frameworks.langchain.run import GENERIC_NODES, is_name
from leyden_plugins.frameworks.langchain.threads import with_own_thread

MODEL_METHODS = ("_generate_with_cache", "_agenerate_with_cache")

COMPLETION_METHODS = ("generate", "agenerate", "_generate_helper", "_agenerate_helper")

RUN_METHODS = ("stream", "astream")
"""Everything that runs a graph ends in one of these."""

STATE_METHODS = (
    "get_state",
    "aget_state",
    "get_state_history",
    "aget_state_history",
    "bulk_update_state",
    "abulk_update_state",
)

WORKING_VERSIONS = "langchain-core 1.7 and langgraph 1.2"


class Hooks:
    """Everything the automatic form installs."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        # A default makes the hook active in every context: new threads, executors, event loops.
        self.variable: ContextVar[BaseCallbackHandler | None] = ContextVar("leyden_langchain", default=self.recorder)
        self.patches = Patches()
        self.waiting: list[tuple[str, Callable[[ModuleType], None]]] = [
            ("langgraph.pregel.main", self.patch_langgraph),
        ]

    def install(self) -> None:
        """Install all of it.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        check_hook_points(BaseChatModel, "langchain-core", MODEL_METHODS)
        check_hook_points(BaseLLM, "langchain-core", COMPLETION_METHODS)
        if not hasattr(tracer_context, "_configure_hooks"):
            raise ConfigurationError(
                "langchain-core has no '_configure_hooks' where Leyden attaches; "
                f"versions known to work: {WORKING_VERSIONS}"
            )
        RUNS.are_hooked = True
        tracer_context.register_configure_hook(self.variable, inheritable=True)
        self.patch_models()
        self.patch_completions()
        for module, patch in self.waiting:
            when_imported(module, patch)

    def remove(self) -> None:
        """Undo `install`. LangChain has no way to unregister, so the hook is taken from its list."""
        self.recorder.is_on = RUNS.are_hooked = False
        hooks = getattr(tracer_context, "_configure_hooks", [])
        hooks[:] = [hook for hook in hooks if hook[0] is not self.variable]
        for module, patch in self.waiting:
            forget_import(module, patch)
        self.patches.restore()

    # ---- models ------------------------------------------------------------------------------------------------

    def patch_models(self) -> None:
        """Give each call of `generate([a, b, c])` its own frame, and routed ones a model without a cache."""
        generate = vars(BaseChatModel)["_generate_with_cache"]
        agenerate = vars(BaseChatModel)["_agenerate_with_cache"]

        @functools.wraps(generate)
        def sync(model: Any, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> Any:
            run = RUNS.get(getattr(run_manager, "run_id", None))
            if run is None:
                return generate(model, messages, stop=stop, run_manager=run_manager, **options)
            with run.entered():
                return generate(for_route(model), messages, stop=stop, run_manager=quiet(run_manager), **options)

        @functools.wraps(agenerate)
        async def asynchronous(
            model: Any, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any
        ) -> Any:
            run = RUNS.get(getattr(run_manager, "run_id", None))
            if run is None:
                return await agenerate(model, messages, stop=stop, run_manager=run_manager, **options)
            with run.entered():
                return await agenerate(for_route(model), messages, stop=stop, run_manager=quiet(run_manager), **options)

        self.patches.replace(BaseChatModel, "_generate_with_cache", sync)
        self.patches.replace(BaseChatModel, "_agenerate_with_cache", asynchronous)

    def patch_completions(self) -> None:
        """Do the same for completion models.

        LangChain reports no run for what a cache answers, and starts async runs in tasks that the request is not in.
        """
        generate, agenerate = vars(BaseLLM)["generate"], vars(BaseLLM)["agenerate"]
        ask, aask = vars(BaseLLM)["_generate_helper"], vars(BaseLLM)["_agenerate_helper"]

        @functools.wraps(generate)
        def sync(model: Any, *args: Any, **options: Any) -> Any:
            return generate(for_route(model), *args, **options)

        @functools.wraps(agenerate)
        async def asynchronous(model: Any, *args: Any, **options: Any) -> Any:
            return await agenerate(for_route(model), *args, **options)

        @functools.wraps(ask)
        def sync_request(model: Any, prompts: Any, stop: Any, run_managers: Any, **options: Any) -> Any:
            with entered(run_managers):
                return ask(model, prompts, stop, run_managers, **options)

        @functools.wraps(aask)
        async def async_request(model: Any, prompts: Any, stop: Any, run_managers: Any, **options: Any) -> Any:
            with entered(run_managers):
                return await aask(model, prompts, stop, run_managers, **options)

        for name, patched in zip(COMPLETION_METHODS, (sync, asynchronous, sync_request, async_request), strict=True):
            self.patches.replace(BaseLLM, name, patched)

    # ---- graphs ------------------------------------------------------------------------------------------------

    def patch_langgraph(self, module: ModuleType) -> None:
        """Make graphs declare their roles when they start, and keep the threads of rollouts apart.

        Raises:
            ConfigurationError: a method is missing in this version.
        """
        check_hook_points(module.Pregel, "langgraph", (*RUN_METHODS, *STATE_METHODS))
        for name in RUN_METHODS:
            self.patches.replace(module.Pregel, name, running(vars(module.Pregel)[name]))
        for name in STATE_METHODS:
            self.patches.replace(module.Pregel, name, on_own_thread(vars(module.Pregel)[name]))


def check_hook_points(owner: type, package: str, names: Sequence[str]) -> None:
    """Check that this version has what is to be patched.

    Raises:
        ConfigurationError: it has not.
    """
    missing = [name for name in names if name not in vars(owner)]
    if missing:
        raise ConfigurationError(
            f"{package}: {owner.__name__} has no {missing!r} where Leyden attaches; "
            f"versions known to work: {WORKING_VERSIONS}"
        )


def entered(run_managers: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """Hold the frame of the first of some runs, which share one request."""
    run = RUNS.get(run_managers[0].run_id) if run_managers else None
    return run.entered() if run is not None else contextlib.nullcontext()


def quiet(run_manager: Any) -> Any:
    """Return the manager of a model call that tells no `Recorder` of each token: one has no use for them.

    Telling it takes LangChain longer than everything else that is done for a streamed answer. How the call ends is
    told by the manager itself, and calls inside this one by what it passes on.
    """
    told = copy.copy(run_manager)
    told.handlers = [handler for handler in run_manager.handlers if not is_deaf(handler)]
    return told


def is_deaf(handler: Any) -> bool:
    """Say whether a handler is one of ours that does nothing for a token; a user's subclass of it may."""
    return isinstance(handler, Recorder) and type(handler).on_llm_new_token is BaseCallbackHandler.on_llm_new_token


def for_route(model: Any) -> Any:
    """Return the model to call: the user's own, or for a routed role one that asks no cache."""
    if not wire.is_routed(context.current() or Frame()):
        return model
    has_cache = model.cache is not False and (model.cache or get_llm_cache() is not None)
    return model.model_copy(update={"cache": False}) if has_cache else model


def running(stream: Callable[..., Any]) -> Callable[..., Any]:
    """Return `stream` of a graph, which in a rollout declares its roles, uses its own thread and no node cache."""

    @functools.wraps(stream)
    def run(graph: Any, input: Any, config: Any = None, **options: Any) -> Any:
        frame = context.current()
        rollout = frame.rollout if frame else None
        if rollout is not None:
            rollout.declared_roles.update(roles_of(graph))
            config = with_own_thread(graph, config, rollout)
            if graph.cache is not None:
                # A node that is answered from a cache asks no model, so an old policy's answer would stand for it.
                graph = graph.copy({"cache": None})
        return stream(graph, input, config, **options)

    return run


def on_own_thread(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a graph's state, which in a rollout uses the rollout's own thread."""

    @functools.wraps(method)
    def call(graph: Any, config: Any, *args: Any, **options: Any) -> Any:
        frame = context.current()
        if frame is not None and frame.rollout is not None:
            config = with_own_thread(graph, config, frame.rollout)
        return method(graph, config, *args, **options)

    return call


_roles: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()


def roles_of(graph: Any) -> frozenset[str]:
    """Return the roles that a graph and its subgraphs may speak under."""
    known = _roles.get(graph)
    if known is None:
        graphs = [graph, *(subgraph for _, subgraph in graph.get_subgraphs(recurse=True))]
        known = _roles[graph] = frozenset(role for each in graphs for role in node_roles(each))
    return known


def node_roles(graph: Any) -> Iterator[str]:
    """Yield the roles of one graph's nodes."""
    for node in graph.nodes:
        if node.startswith("__"):
            continue
        yield graph.name if node in GENERIC_NODES and is_name(graph.name) else node
