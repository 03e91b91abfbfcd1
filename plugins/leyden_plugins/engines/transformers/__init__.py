"""Sample in this process, with continuous batching, from any Hugging Face causal language model.

One idea: versions of weights are values. `publish` copies tensors and puts the copy under the policy's name; a
request keeps the copy it began with, so nothing waits for anything.
One trap: nothing here imports torch before `start`, so that constructing an engine in a script that worker
processes import again costs them nothing.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from leyden.errors import ConfigurationError, EngineError
from leyden.interfaces import Generation, GenerationRequest, Weights
from leyden.roles import RESERVED_MODEL, Policy
from leyden_plugins.chat.prompts import check_sampling, check_tokens, room_for

if TYPE_CHECKING:
    from leyden_plugins.engines.transformers.backend import Backend
    from leyden_plugins.engines.transformers.lane import Served

__all__ = ["TransformersEngine"]


class TransformersEngine:
    """Serve `base` and the policies from one process, on CPU or GPU.

    Raises:
        ConfigurationError: a value that no model could be served with.
    """

    keeps_versions = True
    """Requests in flight keep their copy of the weights, so a publish disturbs none."""
    forces_tools = True
    """A tool choice that forces a call is kept to."""
    constrains_format = True
    """So is the form that an answer must have."""

    def __init__(
        self,
        model: str | Path,
        *,
        max_batch_size: int = 64,
        context_length: int | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 1,
        seed: int = 0,
        prefix_cache_tokens: int = 16_384,
        eos_token_ids: Sequence[int] | None = None,
    ) -> None:
        """Remember the options; `start` loads.

        Args:
            model: a Hugging Face folder or name.
            max_batch_size: choices decoded together, over all versions.
            context_length: lower than the model's own limit, or `None` for that.
            device: as torch names it.
            dtype: `float32`, `bfloat16` or `float16`.
            threads: torch threads of the sampling thread.
            seed: of requests that bring none.
            prefix_cache_tokens: tokens of prompts whose keys and values are kept; 0 keeps none.
            eos_token_ids: tokens that end an answer; `None` takes the checkpoint's, an empty sequence none.
        """
        if max_batch_size < 1 or threads < 1 or prefix_cache_tokens < 0:
            raise ConfigurationError(
                f"max_batch_size={max_batch_size!r} and threads={threads!r} must be at least 1, "
                f"prefix_cache_tokens={prefix_cache_tokens!r} at least 0"
            )
        if context_length is not None and context_length < 2:
            raise ConfigurationError(f"context_length must be at least 2, got {context_length!r}")
        self.model = str(model)
        self.max_batch_size = max_batch_size
        self.device = device
        self.dtype = dtype
        self.threads = threads
        self.prefix_cache_tokens = prefix_cache_tokens
        self.eos_token_ids = None if eos_token_ids is None else frozenset(eos_token_ids)
        self._asked_context_length = context_length
        self._random = Random(seed)
        self._weights_ids = itertools.count()
        self._backend: Backend | None = None
        self._served: dict[str, tuple[int, Served]] = {}
        self._tokens_before = 0
        self._starting = asyncio.Lock()

    @property
    def context_length(self) -> int:
        """The most tokens a prompt and its answer may have together; known once started.

        Raises:
            EngineError: the engine is not started and was given no limit.
        """
        if self._backend is not None:
            return self._backend.context_length
        if self._asked_context_length is None:
            raise EngineError("the context length is known once the engine is started; await engine.start([...])")
        return self._asked_context_length

    @property
    def tokens_sampled(self) -> int:
        """Tokens sampled since the engine was made."""
        return self._tokens_before + (self._backend.batcher.tokens_sampled if self._backend else 0)

    @property
    def running(self) -> int:
        """How many choices are in the batch now."""
        return self._backend.batcher.running if self._backend else 0

    @property
    def network(self) -> str:
        """How the model is run: `fused`, `generic` or `row by row`.

        Raises:
            EngineError: the engine is not started.
        """
        return self._started().network_name

    def models(self) -> Sequence[str]:
        """Return the names served now."""
        return list(self._served)

    async def start(self, policies: Sequence[Policy]) -> None:
        """Load the base weights once; serve them as `base` and, as version 0, under each new policy's name.

        Raises:
            ConfigurationError: the model cannot be loaded, or is shorter than `context_length`.
        """
        async with self._starting:
            if self._backend is None:
                self._backend = await asyncio.to_thread(self._load)
                self._served[RESERVED_MODEL] = (0, self._backend.base(next(self._weights_ids)))
                self._backend.batcher.start()
            for policy in policies:
                self._served.setdefault(policy.name, self._served[RESERVED_MODEL])

    def _load(self) -> Backend:
        from leyden_plugins.engines.transformers.backend import Backend

        return Backend(
            self.model,
            max_rows=self.max_batch_size,
            context_length=self._asked_context_length,
            device=self.device,
            dtype=self.dtype,
            threads=self.threads,
            prefix_cache_tokens=self.prefix_cache_tokens,
            eos=self.eos_token_ids,
        )

    async def generate(self, request: GenerationRequest) -> Generation:
        """Begin a generation.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            ConfigurationError: an unknown model, or an option this engine cannot honour.
            EngineError: the engine is not running.
        """
        backend = self._started()
        if request.model not in self._served:
            raise ConfigurationError(f"model {request.model!r} is not served; these are: {self.models()!r}")
        check_sampling(request.sampling)
        prompt = self.prompt(request)
        room = room_for(prompt, backend.context_length)
        version, served = self._served[request.model]
        sampling, forced = request.sampling, request.forced_token_ids
        if forced is not None:
            if not forced:
                raise ConfigurationError("forced_token_ids is empty; an answer needs at least one token")
            check_tokens("forced", forced, backend.prompts.vocabulary)
            room = min(room, len(forced))
        stream, call = backend.open_call(
            served,
            prompt,
            request,
            limit=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
            seed=sampling.seed if sampling.seed is not None else self._random.getrandbits(64),
            loop=asyncio.get_running_loop(),
        )
        backend.batcher.submit(call)
        return Generation(prompt_token_ids=prompt, version=version, deltas=stream)

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

    async def publish(self, policy: str, version: int, weights: Weights) -> None:
        """Serve a copy of `weights` for requests that begin after this returns; running ones keep theirs.

        The number is the caller's, who never reuses one; caches are keyed by the copy, so that none could mix. LoRAs
        (`Weights.lora`, or a PEFT folder) are added to the base: in the families that run `fused`, rows of all of them
        and of the base decode in one step; elsewhere each is merged into a copy of the layers that it changes.

        Raises:
            ConfigurationError: an unknown policy, or weights of another model.
        """
        backend = self._started()
        if policy not in self._served or policy == RESERVED_MODEL:
            raise ConfigurationError(
                f"cannot publish to {policy!r}; policies: {[name for name in self._served if name != RESERVED_MODEL]!r}"
            )
        served = await asyncio.to_thread(backend.snapshot, next(self._weights_ids), weights)
        _, before = self._served[policy]
        self._served[policy] = (version, served)
        if all(other is not before for _, other in self._served.values()):
            backend.batcher.retire(before.weights_id)

    def sha256(self, model: str) -> str:
        """Return the digest over the tensors served as `model`, under their Hugging Face names.

        Raises:
            ConfigurationError: no such model.
        """
        if model not in self._served:
            raise ConfigurationError(f"model {model!r} is not served; these are: {self.models()!r}")
        return self._started().digest(self._served[model][1])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Spell tokens, special ones included: what a log-probability stands beside.

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

    async def stop(self) -> None:
        """Free everything; requests in flight end with `EngineError`. Idempotent."""
        backend, self._backend = self._backend, None
        self._served.clear()
        if backend is not None:
            await asyncio.to_thread(backend.batcher.stop)
            self._tokens_before += backend.batcher.tokens_sampled

    def _started(self) -> Backend:
        if self._backend is None:
            raise EngineError("the engine is not running; await engine.start([...]) first")
        return self._backend
