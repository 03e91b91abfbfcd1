"""Sample from vLLM: servers that this engine starts and looks after, or ones that run already.

One idea: tokens in, tokens out. Chats are rendered and answers are read here, as in every other engine, and the
servers only sample; so a policy, its prompts and its tool calls are the same whichever engine it trains with.
One trap: log-probabilities. The servers give them at the temperature sampled with, but after top-k, top-p and
penalties; trained calls use none of these, and others are marked off-distribution.

vLLM is never imported: `python=` is the interpreter of an environment that has it. Nothing here imports torch before
`start`, so that constructing an engine in a script that worker processes import again costs them nothing.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from leyden.errors import EngineError
from leyden.interfaces import Generation, GenerationRequest, Weights
from leyden.roles import Policy
from leyden_plugins.engines.vllm.flags import Options

if TYPE_CHECKING:
    from leyden_plugins.engines.vllm.opening import Running

__all__ = ["VLLMEngine"]


class VLLMEngine:
    """Serve `base` and the policies from one or several vLLM servers.

    Policies with a LoRA have their versions side by side; at most one policy without one can be trained, alone, and
    then `base` is served until its weights are published first.

    Raises:
        ConfigurationError: a value that no server could be run with.
    """

    forces_tools = True
    """A tool choice that forces a call is kept to."""
    constrains_format = True
    """So is the form that an answer must have."""

    def __init__(
        self,
        model: str | Path,
        *,
        python: str | Path | None = None,
        urls: Sequence[str] = (),
        replicas: int = 1,
        devices: Sequence[str] | None = None,
        dtype: str = "auto",
        context_length: int | None = None,
        max_loras: int | None = None,
        max_lora_rank: int | None = None,
        gpu_memory_utilization: float | None = None,
        kv_cache_bytes: int | None = None,
        sleep: bool = False,
        weights_folder: str | Path | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        log_folder: str | Path | None = None,
        start_seconds: float = 600.0,
        seed: int = 0,
    ) -> None:
        """Remember the options; `start` starts or finds the servers.

        Args:
            model: a Hugging Face folder or name; with `urls`, the one that those servers were started with.
            python: interpreter of the environment that has vLLM; `None` is this one.
            urls: of servers that run already, such as `http://127.0.0.1:8000`; none are started then.
            replicas: how many servers are started.
            devices: `CUDA_VISIBLE_DEVICES` of each replica.
            dtype: what the servers compute in; `auto` is the checkpoint's type.
            context_length: lower than the model's own limit, or `None` for that.
            max_loras: adapters in one batch; `None` is two a policy with a LoRA, for the versions in use.
            max_lora_rank: `None` is what the policies need.
            gpu_memory_utilization: the share of a GPU's memory that a server takes; `None` is vLLM's own.
            kv_cache_bytes: memory for keys and values; `None`: what is left on a GPU, 1 GiB on a CPU.
            sleep: free the GPU while the learner works.
            weights_folder: where weights lie on their way; `None`: in memory where there is room. Servers on other
                machines must see it under the same path.
            arguments: more of `vllm serve`'s.
            environment: more environment variables of the servers.
            log_folder: gets their logs; `None` is a folder for temporary files.
            start_seconds: how long a server may take to come up.
            seed: of the servers' random numbers.
        """
        self.model = str(model)
        self._options = Options(
            model=self.model,
            python=sys.executable if python is None else str(python),
            urls=urls if isinstance(urls, str) else tuple(urls),
            replicas=replicas,
            devices=devices,
            dtype=dtype,
            context_length=context_length,
            max_loras=max_loras,
            max_lora_rank=max_lora_rank,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_bytes=kv_cache_bytes,
            sleep=sleep,
            weights_folder=None if weights_folder is None else Path(weights_folder).absolute(),
            arguments=arguments if isinstance(arguments, str) else tuple(arguments),
            environment=dict(environment or {}),
            log_folder=None if log_folder is None else Path(log_folder).absolute(),
            start_seconds=start_seconds,
            seed=seed,
        )
        self._running: Running | None = None
        self._starting = asyncio.Lock()

    @property
    def context_length(self) -> int:
        """The most tokens a prompt and its answer may have together; known once started.

        Raises:
            EngineError: the engine is not started and was given no limit.
        """
        if self._running is not None:
            return self._running.context_length
        if self._options.context_length is None:
            raise EngineError("the context length is known once the engine is started; await engine.start([...])")
        return self._options.context_length

    @property
    def keeps_versions(self) -> bool:
        """True with LoRAs; whole weights replace those that were served."""
        return self._running is None or self._running.policies.whole is None

    @property
    def sleeps(self) -> bool:
        """Whether it frees the GPU while the learner works."""
        return self._options.sleep

    @property
    def restarts(self) -> int:
        """How often a server was started again."""
        return 0 if self._running is None else self._running.fleet.restarts

    @property
    def urls(self) -> Sequence[str]:
        """The servers' addresses, once started."""
        return [replica.http.url for replica in self._started().fleet.replicas]

    @property
    def pids(self) -> Sequence[int]:
        """The servers' processes now, where they are ours."""
        return [one.process.pid for one in self._started().fleet.replicas if one.process is not None]

    def models(self) -> Sequence[str]:
        """Return the names served now."""
        return [] if self._running is None else self._running.policies.names

    def sha256(self, model: str) -> str:
        """Return the digest over the files of the weights served as `model`.

        Raises:
            ConfigurationError: no such model.
            EngineError: the engine is not running.
        """
        return self._started().policies.digest(model)

    # ---- life --------------------------------------------------------------------------------------------------

    async def start(self, policies: Sequence[Policy]) -> None:
        """Start or find the servers once, wake them; serve the base under each new policy's name as version 0.

        Raises:
            ConfigurationError: a vLLM that cannot be driven, servers that lack something, or policies that a server
                cannot have together.
            EngineError: a server does not come up; its log's last lines are in the message.
        """
        from leyden_plugins.engines.vllm.opening import open_servers
        from leyden_plugins.engines.vllm.policies import plan

        async with self._starting:
            wanted = plan(policies)
            if self._running is None:
                self._running = await open_servers(self._options, wanted)
            await self.wake()  # a run that broke off may have left it asleep
            self._running.policies.add(policies, wanted)

    async def generate(self, request: GenerationRequest) -> Generation:
        """Begin a generation; while servers are started again, sleep or change weights, this waits.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            ConfigurationError: an unknown model, or an option this engine cannot honour.
            EngineError: the engine is not running, or has given up.
        """
        from leyden_plugins.engines.vllm.asking import body_of
        from leyden_plugins.engines.vllm.generating import begin

        running = self._started()
        fleet, policies, prompts = running.fleet, running.policies, running.facts.prompts
        policies.check(request.model)
        prompt = prompts.prompt(request)
        body = body_of(request, prompt, prompts, running.context_length)
        served = None
        while served is None:
            await fleet.entrance.passed()
            fleet.check()
            policies.check(request.model)  # the weights may have changed while this waited
            served = policies.admit(request.model, fleet)
        stream, task = begin(running, request, body, served.name)
        task.add_done_callback(partial(policies.release, served, fleet))
        return Generation(prompt_token_ids=prompt, version=served.version, deltas=stream)

    async def publish(self, policy: str, version: int, weights: Weights) -> None:
        """Serve a copy of `weights` for requests that begin after this returns.

        A LoRA (`Weights.lora`, or a PEFT folder) comes beside the versions that are there. Whole weights replace them:
        requests in flight are waited for, new ones wait, prefixes are forgotten. Then a few tokens are sampled on each
        server and compared with what the learner computes (`Weights.logprobs`).

        Raises:
            ConfigurationError: an unknown policy, or weights that do not fit it.
            EngineError: a server failed, or does not sample from these weights.
        """
        running = self._started()
        await running.keeper.submit(running.policies.publish(running.fleet, policy, version, weights)).wait()

    async def restart(self) -> None:
        """Start every server of ours anew, with the published weights; for servers that hang. Requests are asked again.

        Raises:
            EngineError: the engine is not running, or a server does not come up.
        """
        running = self._started()
        await running.keeper.submit(running.fleet.restart()).wait()

    async def sleep(self) -> None:
        """Free the GPU's memory once nothing runs; requests that come meanwhile wait. Idempotent."""
        running = self._started()
        await running.keeper.submit(running.policies.sleep(running.fleet)).wait()

    async def wake(self) -> None:
        """Serve again. Idempotent."""
        running = self._started()
        await running.keeper.submit(running.policies.wake(running.fleet)).wait()

    async def stop(self) -> None:
        """End the servers that are ours; requests in flight end with `EngineError`. Idempotent."""
        running, self._running = self._running, None
        if running is not None:
            await running.close()

    # ---- prompts -----------------------------------------------------------------------------------------------

    def prompt(self, request: GenerationRequest) -> tuple[int, ...]:
        """Return the tokens of a request's prompt.

        Raises:
            ConfigurationError: the prompt is empty, or cannot be written in this model's tokens.
            EngineError: the engine is not running.
        """
        return self._started().facts.prompts.prompt(request)

    def continuation(
        self, request: GenerationRequest, answered: int, answer_ids: Sequence[int]
    ) -> tuple[int, ...] | None:
        """Return the tokens that follow a sampled answer, which is message number `answered` of the request.

        `None` where the chat template cannot say: it refuses such a conversation, or leaves the answer out.

        Raises:
            EngineError: the engine is not running.
        """
        return self._started().facts.prompts.continuation(request, answered, answer_ids)

    def tokenised(
        self, request: GenerationRequest, answer: Mapping[str, object]
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the tokens of a request's prompt and of an answer that somebody gave to it, its end included.

        `None` where the chat template cannot say which of its tokens are the answer's.

        Raises:
            ConfigurationError: the chat template refuses these messages.
            EngineError: the engine is not running.
        """
        return self._started().facts.prompts.tokenised(request, answer)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Spell tokens, special ones included: what a log-probability stands beside.

        Raises:
            EngineError: the engine is not started.
        """
        return self._started().facts.prompts.decode(token_ids)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`; where it spells a special token, that one.

        Raises:
            EngineError: the engine is not started.
        """
        return self._started().facts.prompts.encode(text)

    def _started(self) -> Running:
        if self._running is None:
            raise EngineError("the engine is not running; await engine.start([...]) first")
        return self._running
