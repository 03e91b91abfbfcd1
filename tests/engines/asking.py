"""Ask an engine in one line."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from leyden.interfaces import Delta, Generation, GenerationRequest, SamplingParameters
from leyden.roles import Policy
from leyden_plugins.engines.transformers import TransformersEngine


@dataclass
class Answered:
    """One choice, put together from its deltas."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tool_calls: list[dict[str, dict[str, str]]] = field(default_factory=list)
    finish_reason: str | None = None
    deltas: list[Delta] = field(default_factory=list)


@asynccontextmanager
async def running(
    model: Path, *policies: str, eos: Sequence[int] | None = (), **options: int
) -> AsyncIterator[TransformersEngine]:
    """A started engine; without `eos` its answers have the length asked for."""
    engine = TransformersEngine(model, eos_token_ids=eos, **options)
    await engine.start([Policy(name) for name in policies])
    try:
        yield engine
    finally:
        await engine.stop()


def request(
    prompt: Sequence[int], *, model: str = "base", stream: bool = False, **sampling: object
) -> GenerationRequest:
    """A request with exact tokens."""
    return GenerationRequest(
        model=model,
        messages=(),
        prompt_token_ids=prompt,
        stream=stream,
        sampling=SamplingParameters(**({"max_tokens": 8} | sampling)),  # type: ignore[arg-type]
    )


async def collect(generation: Generation) -> list[Answered]:
    """Every choice of a generation, by index."""
    choices: dict[int, Answered] = {}
    async for delta in generation.deltas:
        choice = choices.setdefault(delta.index, Answered())
        assert choice.finish_reason is None, "a delta after the last one"
        choice.deltas.append(delta)
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        choice.tool_calls += delta.tool_calls  # type: ignore[arg-type]
        choice.finish_reason = delta.finish_reason
    return [choices[index] for index in sorted(choices)]


async def ask(engine: TransformersEngine, wanted: GenerationRequest) -> Answered:
    """The first choice of a request."""
    return (await collect(await engine.generate(wanted)))[0]


def plain_logprobs(
    model: torch.nn.Module, prompt: Sequence[int], answer: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """Log-softmax(logits / temperature) of `answer`, by one forward pass over everything."""
    tokens = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].float()
    logprobs = torch.log_softmax(logits / (temperature or 1.0), -1)
    return logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]


def assert_logprobs(model: torch.nn.Module, prompt: Sequence[int], got: Answered, temperature: float) -> None:
    """The recorded log-probabilities are those of a plain forward pass."""
    assert got.token_ids
    wanted = plain_logprobs(model, prompt, got.token_ids, temperature)
    torch.testing.assert_close(torch.tensor(got.logprobs), wanted, atol=1e-4, rtol=0)


def reference(folder: Path) -> torch.nn.Module:
    """The model as transformers runs it."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()
