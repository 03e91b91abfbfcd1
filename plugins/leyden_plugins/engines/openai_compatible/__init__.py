"""Sample from a server that runs already and whose weights are not ours: vLLM, SGLang or llama.cpp.

One idea: tokens in, tokens out. Chats are rendered and answers are read here, with the tokenizer of `model`, so that
a conversation is the same tokens as in every other engine; the server only samples.
One trap: such a server is for roles that are not trained, for evaluation, prompt optimisation and sampling of
training data. Weights cannot be published to it; `VLLMEngine` is for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from leyden.errors import ConfigurationError, EngineError
from leyden.interfaces import Generation, GenerationRequest, Weights
from leyden.roles import RESERVED_MODEL, Policy

if TYPE_CHECKING:
    from leyden_plugins.chat.prompts import Prompts
    from leyden_plugins.engines.openai_compatible.probing import Found
    from leyden_plugins.engines.openai_compatible.protocol import Ask, Dialect
    from leyden_plugins.engines.servers.answers import Piece
    from leyden_plugins.engines.servers.http import Http

__all__ = ["OpenAICompatibleEngine"]

SERVERS = ("auto", "llama.cpp", "sglang", "vllm")
ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, kw_only=True)
class Link:
    """A server that was examined."""

    http: Http
    dialect: Dialect
    prompts: Prompts
    found: Found


class OpenAICompatibleEngine:
    """Serve `base`, and every policy's name as version 0, from a server's weights.

    Raises:
        ConfigurationError: a value that cannot be used.
    """

    keeps_versions = True
    """There is only one."""
    forces_tools = False
    constrains_format = True
    """All three kinds of server take a JSON schema."""

    def __init__(
        self,
        model: str | Path,
        base_url: str,
        *,
        api_key: str | None = None,
        server: str = "auto",
        served_name: str | None = None,
        context_length: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Remember the options; `start` asks the server.

        Args:
            model: folder or hub name of the model that the server runs: its tokenizer, template and config are used.
            base_url: as `http://127.0.0.1:8000`; a `/v1` at its end is left out.
            api_key: sent as bearer token.
            server: `vllm`, `sglang`, `llama.cpp`, or `auto` to find out.
            served_name: vLLM: which of its models. SGLang: the name of a loaded LoRA.
            context_length: lower than the server's, or `None` for that.
            eos_token_ids: tokens that end an answer; `None` takes the checkpoint's, an empty sequence none.
            seed: of requests that bring none.
        """
        if not base_url.startswith(("http://", "https://")):
            raise ConfigurationError(f"base_url must begin with http:// or https://, got {base_url!r}")
        if server not in SERVERS:
            raise ConfigurationError(f"server must be one of {SERVERS!r}, got {server!r}")
        if context_length is not None and context_length < 2:
            raise ConfigurationError(f"context_length must be at least 2, got {context_length!r}")
        self.model = str(model)
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.server = server
        self.served_name = served_name
        self.eos_token_ids = None if eos_token_ids is None else frozenset(eos_token_ids)
        self._api_key = api_key
        self._asked_context_length = context_length
        self._random = Random(seed)
        self._link: Link | None = None
        self._names: list[str] = []
        self._starting = asyncio.Lock()

    @property
    def context_length(self) -> int:
        """The most tokens a prompt and its answer may have together; known once started.

        Raises:
            EngineError: the engine is not started and was given no limit.
        """
        if self._link is not None:
            return self._link.found.context_length
        if self._asked_context_length is None:
            raise EngineError("the context length is known once the engine is started; await engine.start([...])")
        return self._asked_context_length

    @property
    def found(self) -> Found:
        """What was found out about the server.

        Raises:
            EngineError: the engine is not started.
        """
        return self._started().found

    def models(self) -> Sequence[str]:
        """Return the names served now."""
        return list(self._names)

    def sha256(self, model: str) -> str:
        """Return a digest of what the server says of itself: its tensors cannot be read.

        Raises:
            ConfigurationError: no such model.
        """
        self._check_name(model)
        found = self._started().found
        return hashlib.sha256(f"{self.model} {found.server} {found.version} {found.model}".encode()).hexdigest()

    async def start(self, policies: Sequence[Policy]) -> None:
        """Find out what the server is and can do; serve its weights under each policy's name too.

        Raises:
            ConfigurationError: it is no server that can be used, or not one of this model.
            EngineError: it does not answer.
        """
        async with self._starting:
            if self._link is None:
                self._link = await self._connect()
            for name in (RESERVED_MODEL, *(policy.name for policy in policies)):
                if name not in self._names:
                    self._names.append(name)

    async def _connect(self) -> Link:
        from leyden_plugins.engines.openai_compatible.probing import KINDS, examine, kind_of
        from leyden_plugins.engines.servers.http import Http
        from leyden_plugins.engines.servers.model import read_model

        model, asked = await asyncio.to_thread(read_model, self.model), self._asked_context_length
        prompts = model.prompts if self.eos_token_ids is None else replace(model.prompts, eos=self.eos_token_ids)
        http = Http(
            self.base_url, headers={} if self._api_key is None else {"authorization": f"Bearer {self._api_key}"}
        )
        try:
            kind = await kind_of(http) if self.server == "auto" else self.server
            dialect = KINDS[kind](self.served_name)
            found = await examine(http, dialect, prompts, longest=model.context_length, asked=asked)
        except BaseException:
            await http.close()
            raise
        return Link(http=http, dialect=dialect, prompts=prompts, found=found)

    async def generate(self, request: GenerationRequest) -> Generation:
        """Begin a generation; where the server's log-probabilities are not of its temperature, it is marked so.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            ConfigurationError: an unknown model, or an option this engine cannot honour.
            EngineError: the engine is not running.
        """
        from leyden_plugins.chat.prompts import check_sampling, room_for
        from leyden_plugins.engines.openai_compatible.protocol import Ask
        from leyden_plugins.engines.servers.answers import deltas_of

        link, sampling = self._started(), request.sampling
        self._check_name(request.model)
        check_sampling(sampling)
        self._check_ability(request)
        prompt = link.prompts.prompt(request)
        room = room_for(prompt, link.found.context_length)
        seed = sampling.seed if sampling.seed is not None else self._random.getrandbits(64)
        asks = [
            Ask(
                index=index,
                prompt=prompt,
                sampling=sampling,
                limit=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
                # A string seed is hashed whole, so that neighbouring seeds and choices do not resemble each other.
                seed=Random(f"{seed}/{index}").getrandbits(31),
                ends=link.prompts.eos,
                schema=_schema(request),
                stream=request.stream and link.dialect.streams,
            )
            for index in range(sampling.n)
        ]
        return Generation(
            prompt_token_ids=prompt,
            version=0,
            deltas=deltas_of(_sampled(link, asks), request, link.prompts),
            is_off_distribution=not link.found.scales_logprobs and sampling.temperature != 1,
        )

    def _check_ability(self, request: GenerationRequest) -> None:
        what = None
        if request.forces_tool:
            what = f"force a tool call (tool_choice={request.tool_choice!r:.100}); use 'auto'"
        elif request.forced_token_ids is not None:
            what = "score a given answer (forced_token_ids)"
        if what is not None:
            raise ConfigurationError(f"OpenAICompatibleEngine cannot {what}")

    def prompt(self, request: GenerationRequest) -> tuple[int, ...]:
        """Return the tokens of a request's prompt.

        Raises:
            ConfigurationError: the prompt is empty, or cannot be written in this model's tokens.
            EngineError: the engine is not running.
        """
        return self._started().prompts.prompt(request)

    def continuation(
        self, request: GenerationRequest, answered: int, answer_ids: Sequence[int]
    ) -> tuple[int, ...] | None:
        """Return the tokens that follow a sampled answer, which is message number `answered` of the request.

        `None` where the chat template cannot say: it refuses such a conversation, or leaves the answer out.

        Raises:
            EngineError: the engine is not running.
        """
        return self._started().prompts.continuation(request, answered, answer_ids)

    def tokenised(
        self, request: GenerationRequest, answer: Mapping[str, object]
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the tokens of a request's prompt and of an answer that somebody gave to it, its end included.

        `None` where the chat template cannot say which of its tokens are the answer's.

        Raises:
            ConfigurationError: the chat template refuses these messages.
            EngineError: the engine is not running.
        """
        return self._started().prompts.tokenised(request, answer)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Spell tokens, special ones included.

        Raises:
            EngineError: the engine is not started.
        """
        return self._started().prompts.decode(token_ids)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`; where it spells a special token, that one.

        Raises:
            EngineError: the engine is not started.
        """
        return self._started().prompts.encode(text)

    async def publish(self, policy: str, version: int, weights: Weights) -> None:
        """Refuse.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            f"cannot publish version {version!r} of {policy!r}: the weights of the server at {self.base_url} are not "
            "this engine's to change. Train with VLLMEngine or TransformersEngine, and use this one for roles that "
            "are not trained (Policy(..., trainable=False)), for evaluation or to sample data"
        )

    async def stop(self) -> None:
        """Let go of the server, which runs on. Idempotent."""
        link, self._link = self._link, None
        self._names.clear()
        if link is not None:
            await link.http.close()

    def _started(self) -> Link:
        if self._link is None:
            raise EngineError("the engine is not running; await engine.start([...]) first")
        return self._link

    def _check_name(self, model: str) -> None:
        if model not in self._names:
            raise ConfigurationError(f"model {model!r} is not served; these are: {self.models()!r}")


async def _sampled(link: Link, asks: Sequence[Ask]) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of all choices.

    Raises:
        ConfigurationError: the server refuses the request, as it would every time.
        EngineError: it does not answer, or fails.
    """
    from leyden_plugins.engines.openai_compatible.protocol import together
    from leyden_plugins.engines.servers.http import Refused

    try:
        async with contextlib.aclosing(together([link.dialect.choice(link.http, ask) for ask in asks])) as pieces:
            async for piece in pieces:
                yield piece
    except Refused as error:
        if error.status < 500 and error.status not in (408, 429):
            raise ConfigurationError(str(error)) from error
        raise


def _schema(request: GenerationRequest) -> Any:
    return None if request.response_format is None else request.response_format.get("schema", ANY_OBJECT)
