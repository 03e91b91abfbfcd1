"""The automatic form: LangChain's configure hook, and the few methods that must know a call is rerouted.

Only routed roles are touched: they bypass LLM caches, which would replay an old policy, and models that would
use the Responses API use chat completions, which the gateway speaks.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.globals import get_llm_cache
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.tracers import context as tracer_context

from leyden import context, wire
from leyden.context import Frame
from leyden.errors import ConfigurationError
from leyden.patching import Patches, forget_import, when_imported
from leyden_plugins.frameworks.langchain.handler import RUNS, Recorder
from leyden_plugins.frameworks.langchain.runs import GENERIC_NODES, is_name

MODEL_METHODS = ("_generate_with_cache", "_agenerate_with_cache")

RESPONSES_ONLY = ("context_management", "include", "previous_response_id", "reasoning", "text", "truncation")
"""Options that only the Responses API has."""

WORKING_VERSIONS = "langchain-core 1.7 and langgraph 1.2"


class Hooks:
    """Everything the automatic form installs."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        # A default makes the hook active in every context: new threads, executors, event loops.
        self.variable: ContextVar[BaseCallbackHandler | None] = ContextVar("leyden_langchain", default=self.recorder)
        self.patches = Patches()
        self.waiting: list[tuple[str, Callable[[ModuleType], None]]] = [
            ("langchain_openai.chat_models.base", self.patch_openai),
            ("langchain_openai.chat_models.azure", self.patch_azure),
            ("langgraph.pregel.main", self.patch_langgraph),
        ]

    def install(self) -> None:
        """Install all of it.

        Raises:
            ConfigurationError: a hook point is missing in this version.
        """
        missing = [name for name in MODEL_METHODS if name not in vars(BaseChatModel)]
        if missing or not hasattr(tracer_context, "_configure_hooks"):
            raise ConfigurationError(
                f"langchain-core has no {missing or '_configure_hooks'!r} where Leyden attaches; "
                f"versions known to work: {WORKING_VERSIONS}"
            )
        tracer_context.register_configure_hook(self.variable, inheritable=True)
        self.patch_models()
        for module, patch in self.waiting:
            when_imported(module, patch)

    def remove(self) -> None:
        """Undo `install`. LangChain has no way to unregister, so the hook is taken from its list."""
        self.recorder.is_on = False
        hooks = tracer_context._configure_hooks
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
                model, options = for_route(model, options)
                return generate(model, messages, stop=stop, run_manager=run_manager, **options)

        @functools.wraps(agenerate)
        async def asynchronous(
            model: Any, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any
        ) -> Any:
            run = RUNS.get(getattr(run_manager, "run_id", None))
            if run is None:
                return await agenerate(model, messages, stop=stop, run_manager=run_manager, **options)
            with run.entered():
                model, options = for_route(model, options)
                return await agenerate(model, messages, stop=stop, run_manager=run_manager, **options)

        self.patches.replace(BaseChatModel, "_generate_with_cache", sync)
        self.patches.replace(BaseChatModel, "_agenerate_with_cache", asynchronous)

    def patch_openai(self, module: ModuleType) -> None:
        """Make streams of `ChatOpenAI` use chat completions where they are routed."""
        self.patch_streams(module.ChatOpenAI)

    def patch_azure(self, module: ModuleType) -> None:
        """Make streams of `AzureChatOpenAI` use chat completions where they are routed."""
        self.patch_streams(module.AzureChatOpenAI)

    def patch_streams(self, model_class: type) -> None:
        """Patch the two methods that choose between chat completions and the Responses API."""
        stream, astream = vars(model_class).get("_stream"), vars(model_class).get("_astream")
        if stream is None or astream is None:
            return

        @functools.wraps(stream)
        def sync(model: Any, *args: Any, **options: Any) -> Iterator[Any]:
            model, options = for_route(model, options)
            return stream(model, *args, **options)  # type: ignore[no-any-return]  # the method we wrap

        @functools.wraps(astream)
        def asynchronous(model: Any, *args: Any, **options: Any) -> AsyncIterator[Any]:
            model, options = for_route(model, options)
            return astream(model, *args, **options)  # type: ignore[no-any-return]  # the method we wrap

        self.patches.replace(model_class, "_stream", sync)
        self.patches.replace(model_class, "_astream", asynchronous)

    # ---- graphs ------------------------------------------------------------------------------------------------

    def patch_langgraph(self, module: ModuleType) -> None:
        """Declare a graph's nodes as roles when it starts, also those that will be silent."""
        for name in ("stream", "astream"):
            self.patches.replace(module.Pregel, name, declaring(vars(module.Pregel)[name]))


def for_route(model: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model and options to call with: the user's own, unless a routed role needs others."""
    frame = context.current()
    if not wire.is_routed(frame or Frame()):
        return model, options
    changes: dict[str, Any] = {}
    if model.cache is not False and (model.cache or get_llm_cache() is not None):
        changes["cache"] = False
    uses_responses = getattr(model, "_use_responses_api", None)
    if uses_responses is not None and uses_responses({**(model.model_kwargs or {}), **options}):
        changes["use_responses_api"] = False
        changes.update({name: None for name in RESPONSES_ONLY if hasattr(model, name)})
        changes["use_previous_response_id"] = False
        if model.output_version == "responses/v1":
            changes["output_version"] = None
        options = {name: value for name, value in options.items() if name not in RESPONSES_ONLY}
    return (model.model_copy(update=changes) if changes else model), options


def declaring(stream: Callable[..., Any]) -> Callable[..., Any]:
    """Return `stream` of a graph, which also declares its roles."""

    @functools.wraps(stream)
    def declare(graph: Any, *args: Any, **options: Any) -> Any:
        frame = context.current()
        if frame is not None and frame.rollout is not None:
            frame.rollout.declared_roles.update(roles_of(graph))
        return stream(graph, *args, **options)

    return declare


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
