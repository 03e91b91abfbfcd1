"""The callback handler: LangChain's events as spans, and the frame for whatever runs inside.

`run_inline` makes LangChain call it in the task of the run itself, in order, so that the frame it sets reaches
the HTTP request. It never resets a frame: end callbacks run shielded, in another task with a copied context.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult

from leyden import wire
from leyden.context import status_of
from leyden.errors import DeadlineExceeded
from leyden.spans import Kind, Status
from leyden.wire.protocols import told_beside
from leyden_plugins.frameworks.langchain.messages import answer_attributes, message_json, plain
from leyden_plugins.frameworks.langchain.run import Run
from leyden_plugins.frameworks.langchain.runs import Runs

logger = logging.getLogger(__name__)

RUNS = Runs()
"""Shared by every handler: the automatic and the explicit form together record each run once."""

CONTROL_FLOW = "GraphBubbleUp"
"""LangGraph's base class of interrupts and commands, which it reports as errors."""


class Recorder(BaseCallbackHandler):
    """Records runs. LangChain logs the exceptions of a callback and goes on."""

    run_inline = True

    def __init__(self) -> None:
        self.is_on = True
        """False after `detach`: callback managers made before may still hold this handler."""

    # ---- chains: graphs, nodes, sequences, prompts -------------------------------------------------------------

    def on_chain_start(
        self,
        serialized: dict[str, Any] | None,
        inputs: dict[str, Any],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        if self.is_on:
            RUNS.start_chain(run_id, parent_run_id, name_of(serialized, rest, "Runnable"), metadata)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **rest: Any) -> None:
        record_handoff(run_id, outputs)
        RUNS.end(run_id, Status.OK, None, {})

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **rest: Any) -> None:
        end_with_error(run_id, error, {})

    def on_retriever_start(
        self,
        serialized: dict[str, Any] | None,
        query: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        # A retriever may call a model to rewrite its query; nobody speaks under the retriever's name.
        if self.is_on:
            RUNS.start_chain(run_id, parent_run_id, "RunnableRetriever", metadata)

    def on_retriever_end(self, documents: Any, *, run_id: UUID, **rest: Any) -> None:
        RUNS.end(run_id, Status.OK, None, {})

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **rest: Any) -> None:
        end_with_error(run_id, error, {})

    # ---- tools -------------------------------------------------------------------------------------------------

    def on_tool_start(
        self,
        serialized: dict[str, Any] | None,
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        if not self.is_on:
            return
        name = name_of(serialized, rest, "tool")
        attributes = {
            "gen_ai.tool.call.id": rest.get("tool_call_id"),
            "gen_ai.tool.call.arguments": plain(inputs if inputs is not None else input_str),
        }
        RUNS.start_tool(run_id, parent_run_id, name, metadata, attributes)

    def on_tool_end(self, output: Any, *, run_id: UUID, **rest: Any) -> None:
        record_handoff(run_id, output)
        # A tool error that was handled arrives as an end whose message says so.
        is_error = getattr(output, "status", None) == "error"
        result = plain(getattr(output, "content", output))
        status, error = (Status.ERROR, str(result)) if is_error else (Status.OK, None)
        RUNS.end(run_id, status, error, {"gen_ai.tool.call.result": result})

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **rest: Any) -> None:
        end_with_error(run_id, error, {})

    # ---- model calls -------------------------------------------------------------------------------------------

    def on_chat_model_start(
        self,
        serialized: dict[str, Any] | None,
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        if self.is_on:
            inputs = messages[0] if messages else []
            self.start_model(
                serialized, rest, run_id, parent_run_id, metadata, lambda: [message_json(item) for item in inputs]
            )

    def on_llm_start(
        self,
        serialized: dict[str, Any] | None,
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        if not self.is_on:
            return
        run = self.start_model(
            serialized,
            rest,
            run_id,
            parent_run_id,
            metadata,
            lambda: [{"role": "user", "content": prompt} for prompt in prompts],
        )
        if run is not None and not RUNS.are_hooked:
            run.has_asked = True

    def start_model(
        self,
        serialized: Mapping[str, Any] | None,
        rest: Mapping[str, Any],
        run_id: UUID,
        parent_run_id: UUID | None,
        metadata: Mapping[str, Any] | None,
        inputs: Callable[[], Sequence[object]],
    ) -> Run | None:
        """Open a model call; `inputs` is asked only when there is a span to keep them."""
        run = RUNS.start_model(run_id, parent_run_id, name_of(serialized, rest, "model"), metadata)
        if run is None or run.span is None:
            return run
        parameters = rest.get("invocation_params") or {}
        run.span.attributes["gen_ai.request.model"] = parameters.get("model") or parameters.get("model_name")
        run.span.attributes["gen_ai.input.messages"] = inputs()
        # The wire reads only requests that it sends elsewhere.
        run.span.attributes.update({name: plain(value) for name, value in told_beside(parameters).items()})
        return run

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **rest: Any) -> None:
        run = RUNS.get(run_id)
        if run is None:
            return
        attributes: dict[str, object] = {}
        try:
            attributes = answer_attributes(response)
        except Exception:
            logger.exception("the answer of a model call could not be recorded")
        RUNS.end_model(run, attributes)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **rest: Any) -> None:
        end_with_error(run_id, error, {})
        if isinstance(error, DeadlineExceeded):
            # `agenerate` (langchain-core 1.7) mistakes what is no Exception for an answer and then fails with an
            # AttributeError, which an agent may swallow; raised from here, the deadline passes through it.
            raise error


class LeydenCallbackHandler(Recorder):
    """The explicit form: `graph.invoke(..., config={"callbacks": [LeydenCallbackHandler()]})`.

    It patches no class of LangChain or LangGraph; it does install Leyden's hook into the HTTP clients, because only
    there can a trained role be sent to the gateway. Unlike the automatic form it cannot go around caches (a trained
    role that one answers is refused) or keep the threads of a checkpointer apart.
    """

    def __init__(self) -> None:
        super().__init__()
        if not wire.is_installed():
            logger.info(
                "LeydenCallbackHandler installs Leyden's hook into the HTTP clients; leyden.uninstrument() undoes it"
            )
            wire.install()


def name_of(serialized: Mapping[str, Any] | None, rest: Mapping[str, Any], default: str) -> str:
    """Return a run's name."""
    return str(rest.get("name") or (serialized or {}).get("name") or default)


def end_with_error(run_id: UUID, error: BaseException, attributes: Mapping[str, object]) -> None:
    """Close a run that ended with an exception, which for LangGraph may be ordinary control flow."""
    names = {cls.__name__ for cls in type(error).__mro__}
    text = f"{type(error).__name__}: {error}"
    if CONTROL_FLOW in names:
        RUNS.end(run_id, Status.OK, None, {"langgraph.control_flow": type(error).__name__, **attributes})
    elif names & {"GeneratorExit", "DeadlineExceeded"}:
        RUNS.end(run_id, Status.INTERRUPTED, text, attributes)
    else:
        RUNS.end(run_id, status_of(error), text, attributes)


def record_handoff(run_id: UUID, output: object) -> None:
    """Record that a tool or node passes control on, when it returns a `Command` that names where."""
    run = RUNS.get(run_id)
    goto = getattr(output, "goto", None) if type(output).__name__ == "Command" else None
    if run is None or run.rollout is None or not goto or run.span is None:
        return
    targets = [goto] if isinstance(goto, str) else [str(getattr(item, "node", item)) for item in goto]
    for target in targets:
        span = run.rollout.open(Kind.HANDOFF, f"handoff to {target}", run.role, run.span_id)
        span.close(Status.OK, None, **{"leyden.handoff.to": target})
