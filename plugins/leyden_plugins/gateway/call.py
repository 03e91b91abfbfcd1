"""One model call from its first byte to its record.

One idea: a call ends once, with one status, and from then on nothing stops or changes it. Whatever cuts it short
(the client is gone, the rollout is over, time is up) cancels its task through `stop`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping

from leyden.interfaces import Delta, Generation, GenerationRequest
from leyden.spans import Choice, Completion, Fork, Kind, Record, Span, Status, now_ns
from leyden_plugins.gateway.access import Caller
from leyden_plugins.gateway.dialects import Answer, ChoiceSoFar, Decode, Question
from leyden_plugins.gateway.exchange import Disconnected
from leyden_plugins.gateway.refusal import Refusal


class Call:
    """What is known of a running call."""

    def __init__(self, caller: Caller, task: asyncio.Task[object], decode: Decode | None) -> None:
        self.caller = caller
        self.task = task
        self.question: Question | None = None
        """As the client asked it; `None` until the request has been understood."""
        self.policy = ""
        """Empty until the request has been understood."""
        self.request: GenerationRequest | None = None
        """As it went to the engine, but for a prompt that goes on exactly."""
        self.fork: Fork | None = None
        self.spliced = 0
        self.stopped: Refusal | Disconnected | None = None
        self.ended = False
        self._start_ns = now_ns()
        self._first_token_ns = 0
        self._end_ns = 0
        self._version = 0
        self._is_off_distribution = False
        self._status = Status.INTERRUPTED
        self._error: str | None = None
        self._decode = decode
        self._answer = Answer(
            answer_id=f"{caller.span_id}-{caller.http_attempt}",
            created_seconds=int(time.time()),
            prompt_token_ids=(),
            choices=[],
        )

    def ask(self, question: Question, request: GenerationRequest) -> None:
        """Note what the client asks, and what of it goes to the engine."""
        self.question = question
        self.policy = request.model
        self.request = request

    def begin(self, generation: Generation) -> Answer:
        """Note that the engine has accepted; return the answer, still empty."""
        assert self.request is not None
        self._version = generation.version
        self._is_off_distribution = generation.is_off_distribution
        self._answer.prompt_token_ids = generation.prompt_token_ids
        self._answer.choices = [ChoiceSoFar() for _ in range(self.request.sampling.n)]
        return self._answer

    def take(self, delta: Delta) -> None:
        """Add a piece of the answer."""
        if not self._first_token_ns and delta.token_ids:
            self._first_token_ns = now_ns()
        self._answer.choices[delta.index].take(delta)

    def stop(self, reason: Refusal | Disconnected) -> None:
        """Cut the call short; does nothing when it has ended or was stopped before."""
        if not self.ended and self.stopped is None:
            self.stopped = reason
            self.task.cancel()

    def end(self, status: Status, error: str | None = None) -> None:
        """Fix how the call ended; a second end is ignored."""
        if not self.ended:
            self.ended = True
            self._end_ns = now_ns()
            self._status = status
            self._error = error

    def records(self) -> list[Record]:
        """Return the completion, and the span when no adapter writes it."""
        caller = self.caller
        completion = Completion(
            span_id=caller.span_id,
            http_attempt=caller.http_attempt,
            rollout_id=caller.access.rollout_id,
            attempt=caller.access.attempt,
            role=caller.role,
            policy=self.policy,
            version=self._version,
            prompt_token_ids=list(self._answer.prompt_token_ids),
            choices=[self._choice(index, choice) for index, choice in enumerate(self._answer.choices)],
            sampling=parameters(self.request) if self.request else {},
            off_distribution=self._is_off_distribution
            or (self.request is not None and self.request.is_off_distribution),
            status=self._status,
            delivered=self._status is Status.OK,
            start_ns=self._start_ns,
            first_token_ns=self._first_token_ns,
            end_ns=self._end_ns,
            error=self._error,
            fork=self.fork,
            spliced=self.spliced,
        )
        return [completion] if caller.has_span else [self._span(completion), completion]

    def _choice(self, index: int, choice: ChoiceSoFar) -> Choice:
        unfinished = "error" if self._status is Status.ERROR else "interrupted"
        reason = choice.finish_reason
        return Choice(
            index=index,
            token_ids=choice.token_ids,
            logprobs=choice.logprobs,
            finish_reason=unfinished if reason in (None, "abort") else reason,
            text="".join(choice.text),
        )

    def _read_by_model(self, request: GenerationRequest) -> list[Mapping[str, object]]:
        """Return the prompt as chat messages; one that came as text or tokens is what a user said."""
        if request.messages:
            return list(request.messages)
        text = request.prompt_text
        # Only tokens that the engine has accepted can be spelled.
        if text is None and self._decode is not None:
            text = self._decode(self._answer.prompt_token_ids)
        return [{"role": "user", "content": text}]

    def _span(self, completion: Completion) -> Span:
        operation = "text_completion" if self.request is not None and not self.request.messages else "chat"
        attributes: dict[str, object] = {
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": self.policy,
            "gen_ai.usage.input_tokens": len(completion.prompt_token_ids),
            "gen_ai.usage.output_tokens": sum(len(choice.token_ids) for choice in completion.choices),
            "gen_ai.response.finish_reasons": [choice.finish_reason for choice in completion.choices],
        }
        if self.request is not None:
            attributes["gen_ai.input.messages"] = self._read_by_model(self.request)
            attributes["gen_ai.output.messages"] = [choice.spoken for choice in self._answer.choices]
            if self.request.tools and self.request.tool_choice != "none":
                attributes["gen_ai.tool.definitions"] = list(self.request.tools)
        return Span(
            span_id=completion.span_id,
            parent_id=self.caller.parent_id,
            rollout_id=completion.rollout_id,
            attempt=completion.attempt,
            kind=Kind.MODEL_CALL,
            name=f"{operation} {self.policy}",
            role=completion.role,
            start_ns=completion.start_ns,
            end_ns=completion.end_ns,
            status=completion.status,
            error=completion.error,
            attributes=attributes,
        )


def parameters(request: GenerationRequest) -> dict[str, object]:
    """Return what was really used to sample; a mask's name stands beside the numbers."""
    used: dict[str, object] = dataclasses.asdict(request.sampling)
    if request.forces_tool:
        used["tool_choice"] = request.tool_choice
    if request.response_format is not None:
        used["response_format"] = request.response_format["type"]
    return used
