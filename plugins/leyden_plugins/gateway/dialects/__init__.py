"""Protocols that the gateway speaks. A dialect reads requests and spells answers; it knows nothing of rollouts.

One idea: `read` returns a `Question`, which holds what to generate and how this client wants to hear it. The
trap: what a dialect cannot honour it refuses by name, because a field dropped in silence changes what is trained.
A field that would change which tokens are sampled is refused; a hint (effort, verbosity, caching) is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from leyden.interfaces import Delta, GenerationRequest
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""


@dataclass
class ChoiceSoFar:
    """One choice while it is being sampled."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tool_calls: list[Mapping[str, object]] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, delta: Delta) -> None:
        """Add a piece."""
        if delta.text:
            self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.tool_calls.extend(delta.tool_calls)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason

    @property
    def spoken(self) -> Mapping[str, object]:
        """Return the choice as a chat message."""
        message: dict[str, object] = {"role": "assistant", "content": "".join(self.text)}
        return message | {"tool_calls": list(self.tool_calls)} if self.tool_calls else message


@dataclass
class Answer:
    """What the engine has answered so far."""

    answer_id: str
    """Unique for its admission; a dialect puts its own prefix before it."""
    created_seconds: int
    prompt_token_ids: Sequence[int]
    choices: list[ChoiceSoFar]

    @property
    def sampled(self) -> int:
        """Return how many tokens were sampled."""
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        """Return OpenAI's token counts."""
        prompt = len(self.prompt_token_ids)
        return {"prompt_tokens": prompt, "completion_tokens": self.sampled, "total_tokens": prompt + self.sampled}


class Question(Protocol):
    """One request in its dialect. It may keep what it has said so far."""

    @property
    def request(self) -> GenerationRequest:
        """What to generate; `model` is the name that the client used."""
        ...

    @property
    def stream(self) -> bool:
        """The client wants events as they come, rather than one JSON answer."""
        ...

    def answer(self, answer: Answer) -> bytes:
        """Spell the complete answer."""
        ...

    def first(self, answer: Answer) -> bytes:
        """Spell what opens a stream; `answer` has its prompt and no token yet."""
        ...

    def chunk(self, answer: Answer, delta: Delta) -> bytes:
        """Spell one piece, which `answer` holds already; empty when this client has nothing to hear of it."""
        ...

    def last(self, answer: Answer) -> bytes:
        """Spell what ends a stream."""
        ...

    def error_event(self, refusal: Refusal) -> bytes:
        """Spell a failure within a stream that has begun, perhaps with no more than a comment."""
        ...


class Dialect(Protocol):
    """One HTTP protocol."""

    @property
    def path(self) -> str:
        """Where its requests go, below `/v1/`."""
        ...

    @property
    def prompt_field(self) -> str:
        """Its name for what the model reads."""
        ...

    @property
    def format_field(self) -> str:
        """Its name for the form that the answer must have."""
        ...

    def read(self, body: Mapping[str, object], *, decode: Decode | None, memory: Memory) -> Question:
        """Check a request. `decode` is `None` when the engine cannot spell single tokens.

        Raises:
            Refusal: names the field that is wrong or not supported.
        """
        ...

    def error(self, refusal: Refusal) -> bytes:
        """Spell a refusal as JSON."""
        ...


@runtime_checkable
class CountsTokens(Dialect, Protocol):
    """A dialect whose clients may ask how long a prompt is."""

    @property
    def count_path(self) -> str:
        """Where they ask, below the dialect's own path."""
        ...

    def read_prompt(self, body: Mapping[str, object], *, memory: Memory) -> GenerationRequest:
        """Check a request for a count.

        Raises:
            Refusal: names the field that is wrong or not supported.
        """
        ...

    def count(self, tokens: int) -> bytes:
        """Spell the number."""
        ...


@runtime_checkable
class Recalls(Dialect, Protocol):
    """A dialect whose clients may ask for an answer again, below its own path."""

    def recall(self, answer_id: str, *, memory: Memory) -> bytes:
        """Spell an earlier answer.

        Raises:
            Refusal: no such answer was given to this caller, or it was not to be kept.
        """
        ...
