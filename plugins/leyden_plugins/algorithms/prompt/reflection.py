"""The model that rewrites prompts: how it is asked, what it costs, and what happens when it fails.

One idea: its answers are kept in the run's store under a hash of the question and how often it was asked before. A
search that runs again asks the same questions in the same order, so it finds them there and pays nothing.
One trap: a failure is kept too, or a resumed search would take another way; only those that stopped the search are
forgotten, so that it can go on once the model is back.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import msgspec

from leyden.errors import ConfigurationError, LeydenError
from leyden.interfaces import Session
from leyden.looping import together
from leyden.wire.state import below_the_wire
from leyden_plugins.algorithms.prompt.over import SearchOver
from leyden_plugins.chat.endpoint import Answer, ChatEndpoint, key_from

Message = Mapping[str, str]
Ask = Callable[[Sequence[Message]], str | Answer | Awaitable[str | Answer]]
"""Given chat messages, what a model answers."""


class ReflectionError(LeydenError, ConnectionError):
    """Report a reflection model that failed several times in a row."""


@dataclass(eq=False)
class Reflection:
    """Asks any OpenAI-compatible chat model to improve prompts; its calls are never recorded, routed or trained.

    Example:
        `GEPA(reflection=Reflection("gpt-5"))`; any function of chat messages that returns a text, sync or async, can
        stand in its place.
    """

    model: str
    _: KW_ONLY
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; `None` sends none."""
    api_key: str | None = field(default=None, repr=False)
    """The key itself, in place of the variable."""
    temperature: float | None = 1.0
    """`None` leaves it out, for models that refuse it."""
    concurrency: int = 8
    timeout_seconds: float = 300.0
    """Of one request."""
    tries: int = 4
    """Requests for one answer, when the endpoint fails or is busy."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Further fields of every request, such as `{"max_completion_tokens": 4000}`."""

    def __post_init__(self) -> None:
        self._endpoint = ChatEndpoint(
            self.model,
            base_url=self.base_url,
            api_key=key_from(self.api_key, self.api_key_env, purpose="reflection model"),
            concurrency=self.concurrency,
            timeout_seconds=self.timeout_seconds,
            tries=self.tries,
            most_calls=None,
            options={"temperature": self.temperature, **self.options},
            purpose="reflection model",
        )

    async def __call__(self, messages: Sequence[Message]) -> Answer:
        """Return an answer.

        Raises:
            ConfigurationError: the endpoint refuses the request as it is.
            ConnectionError: it gave no answer.
        """
        return await self._endpoint.ask_anew(messages)


class Kept(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer, or why there is none, as it lies in the store."""

    text: str | None = None
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Spent:
    """What reflection has cost; a resumed search counts what it finds in the store as well."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    errors: int = 0
    last_error: str | None = None


class Reflector:
    """Asks a reflection model on behalf of one search."""

    def __init__(
        self, ask: Ask, session: Session, *, prefix: str, most_calls: int | None, most_failures: int = 3
    ) -> None:
        """Wire it.

        Args:
            ask: the model.
            session: keeps answers.
            prefix: of the names they are kept under.
            most_calls: in the whole search.
            most_failures: in a row, before the search is stopped.
        """
        self.spent = Spent()
        self._ask = ask
        self._session = session
        self._prefix = prefix
        self._most_calls = most_calls
        self._most_failures = most_failures
        self._asked: Counter[str] = Counter()
        self._failed: list[str] = []
        """Keys of the latest failures in a row."""

    async def answers(self, questions: Sequence[Sequence[Message]]) -> list[str | None]:
        """Ask several questions at once; `None` where the model failed.

        Raises:
            SearchOver: there are not so many calls left.
            ReflectionError: the model failed several times in a row.
            ConfigurationError: it refuses the question as it is.
        """
        if self._most_calls is not None and self.spent.calls + len(questions) > self._most_calls:
            raise SearchOver(f"its max_reflection_calls={self._most_calls!r} are spent")
        keys = [self._key(question) for question in questions]  # in order: equal questions are told apart by it
        self.spent.calls += len(questions)
        return await together([self._answer(key, question) for key, question in zip(keys, questions, strict=True)])

    def _key(self, question: Sequence[Message]) -> str:
        content = json.dumps([dict(message) for message in question], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:24]
        self._asked[digest] += 1
        return f"{self._prefix}/{digest}/{self._asked[digest]}"

    async def _answer(self, key: str, question: Sequence[Message]) -> str | None:
        note = await self._session.get_note(key)
        if not note:
            kept = await self._fresh(question)
            await self._session.put_note(key, msgspec.json.encode(kept).decode())
        # Read back: a store keeps no secrets, and a resumed search must see what this one sees.
        kept = msgspec.json.decode(note or await self._session.get_note(key) or "{}", type=Kept)
        self.spent.prompt_tokens += kept.prompt_tokens
        self.spent.completion_tokens += kept.completion_tokens
        if kept.error is None:
            self._failed.clear()
        else:
            await self._failure(key, kept.error, is_fresh=not note)
        return kept.text

    async def _fresh(self, question: Sequence[Message]) -> Kept:
        try:
            answer = await asked(self._ask, question)
        except ConfigurationError:
            raise
        except Exception as error:
            return Kept(error=f"{type(error).__name__}: {error}")
        if not answer.text.strip():
            return Kept(
                error="it answered nothing",
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
            )
        return Kept(answer.text, None, answer.prompt_tokens, answer.completion_tokens)

    async def _failure(self, key: str, error: str, *, is_fresh: bool) -> None:
        self.spent.errors += 1
        self.spent.last_error = error
        if not is_fresh:
            return
        self._session.notice(f"the reflection model failed: {error}")
        self._failed.append(key)
        if len(self._failed) >= self._most_failures:
            for one in self._failed:
                await self._session.put_note(one, "")
            raise ReflectionError(
                f"the reflection model failed {len(self._failed)} times in a row, so the search stops; what it has "
                f"found is kept, and a resume goes on from there. The last failure: {error}"
            )


async def asked(ask: Ask, question: Sequence[Message]) -> Answer:
    """Call what the user gave, sync or async, outside any recording."""
    with below_the_wire():
        if inspect.iscoroutinefunction(ask) or inspect.iscoroutinefunction(getattr(ask, "__call__", None)):  # noqa: B004
            answer = await ask(question)  # type: ignore[misc]  # a coroutine, as was just seen
        else:
            answer = await asyncio.to_thread(ask, question)
            if inspect.isawaitable(answer):
                answer = await answer
    if isinstance(answer, Answer):
        return answer
    if not isinstance(answer, str):
        raise TypeError(f"the reflection function returned {answer!r:.200}, not a text")
    return Answer(answer)
