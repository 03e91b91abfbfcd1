"""A vLLM engine behind a gateway, as a test sees them: ask as an agent would, push weights, read what was recorded."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import openai
import psutil
import torch
from transformers import AutoModelForCausalLM

from integration_tests.vllm.checkpoints import plain_logprobs
from integration_tests.vllm.figures import Figures
from leyden.interfaces import Access, GenerationRequest, SamplingParameters, Weights
from leyden.looping import LoopThread
from leyden.roles import AGENTS_OWN, Policy, Route
from leyden.spans import Completion, Record
from leyden_plugins.engines.vllm import VLLMEngine
from leyden_plugins.gateway import HttpGateway
from tests.engines.asking import Answered, collect

Result = TypeVar("Result")
KV_CACHE_BYTES = 2**26
ANSWER_SECONDS = 240.0


class Gate:
    """A running engine and gateway, for tests on another thread."""

    def __init__(self, engine: VLLMEngine, thread: LoopThread, figures: Figures) -> None:
        self.engine = engine
        self.figures = figures
        self.gateway = HttpGateway()
        self.records: list[Record] = []
        self.served = Path(engine.model)
        """The checkpoint whose weights the one policy with whole weights has now."""
        self.version = 0
        self._thread = thread
        self._rollouts = (f"r{number}" for number in itertools.count())

    def do(self, work: Coroutine[object, object, Result]) -> Result:
        """Run something on the engine's and the gateway's loop."""
        return self._thread.submit(work).result()

    def begin(self, work: Coroutine[object, object, Result]) -> Any:
        """The same, without waiting for it."""
        return self._thread.submit(work)

    async def start(self, policies: Sequence[Policy]) -> None:
        """Start both."""

        async def keep(batch: Sequence[Record]) -> None:
            self.records.extend(batch)

        await self.engine.start(policies)
        await self.gateway.start(self.engine, keep)

    async def stop(self) -> None:
        """Stop both."""
        await self.gateway.stop()
        await self.engine.stop()

    @contextlib.contextmanager
    def agent(self, policy: str = "me") -> Iterator[tuple[openai.OpenAI, list[Completion]]]:
        """Yield a client for one rollout; behind the block, what was recorded of it stands in the list."""
        rollout, recorded = next(self._rollouts), list[Completion]()
        access = Access(rollout_id=rollout, attempt=1, models={policy: AGENTS_OWN}, routes=(Route(model=policy),))

        async def admit() -> str:
            return self.gateway.admit(access)

        with openai.OpenAI(
            base_url=self.gateway.base_url, api_key=self.do(admit()), timeout=ANSWER_SECONDS, max_retries=0
        ) as client:
            yield client, recorded
        self.do(self.gateway.revoke(rollout))
        recorded += [one for one in self.records if isinstance(one, Completion) and one.rollout_id == rollout]

    def push(self, folder: Path) -> None:
        """Serve a checkpoint's weights as the next version of `me`, compared as a trainer would have it compared."""
        weights = weights_of(folder)
        self.version += 1

        async def publish() -> None:
            await self.gateway.hold()
            try:
                await self.engine.publish("me", self.version, weights)
            finally:
                self.gateway.release()

        self.do(publish())
        self.served = folder
        self.figures.pushes += 1

    async def ask(
        self, prompt: Sequence[int], *, model: str = "me", stream: bool = False, **sampling: Any
    ) -> tuple[int, list[Answered]]:
        """Ask the engine itself; return the version and the choices."""
        request = GenerationRequest(
            model=model,
            messages=(),
            prompt_token_ids=prompt,
            stream=stream,
            affinity=sampling.pop("affinity", None),
            sampling=SamplingParameters(**({"max_tokens": 8} | sampling)),
        )
        generation = await self.engine.generate(request)
        return generation.version, await collect(generation)

    def processes(self) -> dict[str, psutil.Process]:
        """Return processes of the engine's one server: its launcher, its door and what computes."""
        (pid,) = self.engine.pids
        server = psutil.Process(pid)
        launcher = server.parent()
        assert launcher is not None
        (core,) = [one for one in server.children(recursive=True) if "EngineCore" in title(one)]
        return {"launcher": launcher, "API server": server, "engine core": core}


def title(process: psutil.Process) -> str:
    """Return a process's command line; empty where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def weights_of(folder: Path) -> Weights:
    """Return a checkpoint as a learner would hand it over, with a forward pass of Transformers to compare with."""
    model = plain(folder)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if is_own(name, model)}
    return Weights(tensors=tensors, logprobs=lambda prompt, answer: plain_logprobs(model, prompt, answer))


def is_own(name: str, model: torch.nn.Module) -> bool:
    """Tell whether a tensor is one of the checkpoint's own: a tied head is not."""
    return not (name == "lm_head.weight" and model.config.tie_word_embeddings)  # type: ignore[union-attr]


def plain(folder: Path) -> torch.nn.Module:
    """Return a checkpoint in plain Transformers: the oracle."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


@contextlib.contextmanager
def serving(
    model: Path, policies: Sequence[Policy], *, python: Path, log_folder: Path, figures: Figures, **options: Any
) -> Iterator[Gate]:
    """Start servers of a model behind a gateway."""
    engine = VLLMEngine(
        model, python=python, kv_cache_bytes=KV_CACHE_BYTES, log_folder=log_folder, start_seconds=280, **options
    )
    thread = LoopThread("vllm-test")
    gate = Gate(engine, thread, figures)
    try:
        thread.submit(gate.start(policies)).result()
        figures.servers += options.get("replicas", 1)
        try:
            yield gate
        finally:
            thread.submit(gate.stop()).result()
    finally:
        thread.close()


def compare(gate: Gate, kind: str, completions: Sequence[Completion], oracle: Mapping[str, torch.nn.Module]) -> None:
    """Compare what was recorded with a forward pass at the temperature that was sampled with."""
    for completion in completions:
        temperature = completion.sampling["temperature"]
        assert isinstance(temperature, float | int)
        for choice in completion.choices:
            expected = plain_logprobs(
                oracle[completion.policy], completion.prompt_token_ids, choice.token_ids, temperature
            )
            gate.figures.compare(kind, choice.logprobs, expected)
