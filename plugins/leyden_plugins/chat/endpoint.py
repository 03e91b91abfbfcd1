"""An OpenAI-compatible chat endpoint, asked from the side: never recorded, never routed, never trained.

Judges of rollouts and models that rewrite prompts are asked with it.

One idea: requests leave below the wire, so it does not matter which rollout, role or policy is at work around them.
One trap: a judge may run on several event loops (of workers, of the trainer); what belongs to a loop is kept by loop.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from leyden.errors import ConfigurationError, RewardError
from leyden.extras import extra
from leyden.wire.state import below_the_wire

if TYPE_CHECKING:
    import httpx

PASSING = frozenset({408, 409, 425, 429})
"""Statuses that another try may find gone, beside those from 500."""

UNREADABLE = (AttributeError, KeyError, IndexError, TypeError, UnicodeDecodeError, json.JSONDecodeError)
"""What reading raises where an answer is not what the protocol says."""

LONGEST_PAUSE_SECONDS = 60.0

Message = Mapping[str, str]


@dataclass
class Spent:
    """What an endpoint was asked, in this process."""

    calls: int = 0
    """Requests that were sent, repetitions included."""
    cached: int = 0
    """Questions that were answered from memory."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the endpoint reported them."""


@dataclass(frozen=True)
class Answer:
    """What the endpoint said, and what it cost."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the endpoint reported them."""


@dataclass(eq=False)
class ChatEndpoint:
    """Asks a chat model at temperature 0 and remembers its answers."""

    model: str
    _: KW_ONLY
    base_url: str
    api_key: str | None = field(repr=False)
    """`None` sends no key."""
    concurrency: int
    """Requests at a time, on each event loop."""
    timeout_seconds: float
    tries: int
    """Requests for one question, when the endpoint cannot be reached, is busy or fails."""
    most_calls: int | None
    """Requests in all, in this process; `None` for no limit."""
    options: Mapping[str, object]
    """Further fields of the request's body; they win over Leyden's own, and `None` takes one out."""
    pause_seconds: float = 0.5
    """Before the second try; twice as long before each further one."""
    purpose: str = "judge"
    """What its errors call it."""

    def __post_init__(self) -> None:
        with extra("openai"):
            import httpx
        if min(self.concurrency, self.tries, self.timeout_seconds) <= 0:
            raise ConfigurationError(
                f"concurrency={self.concurrency!r}, tries={self.tries!r} and timeout_seconds={self.timeout_seconds!r} "
                "must be above 0"
            )
        address = httpx.URL(self.base_url)
        if address.scheme not in ("http", "https") or address.userinfo:
            raise ConfigurationError(
                f"base_url={str(address.copy_with(userinfo=b''))!r} must be an http or https address without a name or "
                "password, such as 'http://127.0.0.1:8000/v1'"
            )
        self.spent = Spent()
        self._answers: dict[bytes, Answer] = {}
        self._places: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]
        self._places = weakref.WeakKeyDictionary()
        # Made once: reading the certificates takes longer than all else that a client of one request does.
        self._verify = httpx.create_ssl_context() if address.scheme == "https" else False

    async def ask(self, messages: Sequence[Message]) -> str:
        """Return what the model answers; a question that was asked before is answered from memory.

        Raises:
            RewardError: the budget of calls is spent.
            ConfigurationError: the endpoint refuses the request as it is: its key, its model, its fields.
            ConnectionError: it could not be reached, or failed, `tries` times.
        """
        content = self._content(messages)
        key = blake2b(content, digest_size=16).digest()
        if key in self._answers:
            self.spent.cached += 1
        else:
            self._answers[key] = await self._in_turn(content)
        return self._answers[key].text

    async def ask_anew(self, messages: Sequence[Message]) -> Answer:
        """Return what the model answers now, whatever it was asked before; raises as `ask` does."""
        return await self._in_turn(self._content(messages))

    def _content(self, messages: Sequence[Message]) -> bytes:
        body = {"model": self.model, "messages": list(messages), "temperature": 0, **self.options}
        return json.dumps({name: one for name, one in body.items() if one is not None}, ensure_ascii=False).encode()

    async def _in_turn(self, content: bytes) -> Answer:
        loop = asyncio.get_running_loop()
        async with self._places.setdefault(loop, asyncio.Semaphore(self.concurrency)):
            return await self._answer(content)

    async def _answer(self, content: bytes) -> Answer:
        import httpx

        pause = self.pause_seconds
        for attempt in range(1, self.tries + 1):
            asked: float | None = None
            try:
                response = await self._post(content)
                if response.status_code < 400:
                    return self._read(response.json())
                trouble = f"HTTP {response.status_code}: {self._clean(response.text)[:300]}"
                if response.status_code < 500 and response.status_code not in PASSING:
                    raise ConfigurationError(
                        f"the {self.purpose} at {self.base_url!r} refused {self.model!r}: {trouble}"
                    )
                asked = _seconds(response.headers.get("retry-after"))
            except (httpx.TransportError, *UNREADABLE) as error:
                trouble = f"{type(error).__name__}: {self._clean(str(error))}"
            if attempt < self.tries:
                await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, asked or pause * random.uniform(0.75, 1.25)))
                pause *= 2
        raise ConnectionError(
            f"the {self.purpose} {self.model!r} at {self.base_url!r} gave no answer in {self.tries} tries: {trouble}"
        )

    async def _post(self, content: bytes) -> httpx.Response:
        import httpx

        if self.most_calls is not None and self.spent.calls >= self.most_calls:
            raise RewardError(
                f"the {self.purpose} {self.model!r} has spent its most_calls={self.most_calls!r}; raise it and resume "
                "the run"
            )
        self.spent.calls += 1
        headers = {"content-type": "application/json"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        with below_the_wire():
            async with httpx.AsyncClient(timeout=self.timeout_seconds, verify=self._verify) as client:
                url = f"{self.base_url.rstrip('/')}/chat/completions"
                return await client.post(url, content=content, headers=headers)

    def _read(self, answer: Any) -> Answer:
        usage = answer.get("usage") or {}
        prompt_tokens = int(usage.get("prompt_tokens") or 0)
        completion_tokens = int(usage.get("completion_tokens") or 0)
        self.spent.prompt_tokens += prompt_tokens
        self.spent.completion_tokens += completion_tokens
        text = str(answer["choices"][0]["message"]["content"] or "")
        return Answer(text, prompt_tokens, completion_tokens)

    def _clean(self, text: str) -> str:
        """Return a text of the endpoint's without our key."""
        return text.replace(self.api_key, "[redacted]") if self.api_key else text


def key_from(api_key: str | None, api_key_env: str | None, *, purpose: str = "judge") -> str | None:
    """Return the key that was given, or the environment's.

    Raises:
        ConfigurationError: the variable is not set.
    """
    if api_key is not None or api_key_env is None:
        return api_key
    if not os.environ.get(api_key_env):
        raise ConfigurationError(
            f"the environment has no {api_key_env!r} for the {purpose}; set it, name another with api_key_env=, or "
            "pass api_key_env=None for an endpoint that wants no key"
        )
    return os.environ[api_key_env]


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None  # a date: our own pause will do
