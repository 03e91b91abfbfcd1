"""Let a script decide what a real engine says, for tests that need a model able to follow a plot.

One idea: only the text is scripted. The engine spends a forward pass on every token of it, so token ids,
log-probabilities, streaming and timing are the engine's own; `ForcedEngine.log` keeps what it really made.
One trap: such tokens were not sampled. Their completions are marked off-distribution, so that on-policy training
refuses them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from leyden.errors import ConfigurationError
from leyden.interfaces import Delta, Engine, Generation, GenerationRequest
from leyden.testing.fakes import Answer

Script = Callable[[GenerationRequest], str | Answer]
"""Says what is answered; called once a request, every choice of which gets the same."""

END = "<|im_end|>"
"""What ends a turn in ChatML templates, those of Qwen and Hermes among them."""


class EncodingEngine(Engine, Protocol):
    """An engine that honours `GenerationRequest.forced_token_ids`."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the tokens of `text`; where it spells a special token, that one."""
        ...


@dataclass(kw_only=True)
class Made:
    """What the engine has really made for one request."""

    request: GenerationRequest
    """As it reached the engine."""
    text: str
    """What the script wanted, tool calls included."""
    prompt_token_ids: Sequence[int]
    token_ids: list[list[int]]
    """By choice; grows while the generation runs."""
    logprobs: list[list[float]] = field(default_factory=list)
    """Aligned with `token_ids`."""
    aborted: bool = False
    """Its reader left before the end."""


def hermes(answer: Answer, *, end: str = END) -> str:
    """Write an answer as Hermes and Qwen models do: each tool call as JSON between `<tool_call>` tags."""
    parts = [answer.text] if answer.text else []
    for call in answer.tool_calls:
        function = call["function"]
        assert isinstance(function, Mapping)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        value = {"name": function["name"], "arguments": arguments}
        parts.append(f"<tool_call>\n{json.dumps(value, ensure_ascii=False)}\n</tool_call>")
    return "\n".join(parts) + ("" if answer.error else end)


class ForcedEngine:
    """An `Engine` that says what a script tells it to; everything else is the engine's inside."""

    forces_tools = True
    """A scripted answer needs no constraint to call a tool."""

    def __init__(self, engine: EncodingEngine, script: Script, *, render: Callable[[Answer], str] = hermes) -> None:
        """Wrap `engine`.

        Args:
            engine: samples.
            script: what to say.
            render: writes an answer as the model's chat template would, the end of its turn included.

        Raises:
            ConfigurationError: the engine cannot turn a text into tokens.
        """
        if not callable(getattr(engine, "encode", None)):
            raise ConfigurationError(
                f"{type(engine).__name__!r} has no encode(text), so no answer can be forced on it; "
                "use an engine that has, such as TransformersEngine"
            )
        self.engine = engine
        self.script = script
        self.log: list[Made] = []
        self._render = render

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def generate(self, request: GenerationRequest) -> Generation:
        """Begin the scripted answer.

        Raises:
            Exception: whatever the script or the engine raises.
        """
        said = self.script(request)
        answer = Answer(text=said) if isinstance(said, str) else said
        text = self._render(answer)
        forced = replace(request, forced_token_ids=self.engine.encode(text))
        generation = await self.engine.generate(forced)
        choices = range(request.sampling.n)
        made = Made(
            request=request,
            text=text,
            prompt_token_ids=list(generation.prompt_token_ids),
            token_ids=[[] for _ in choices],
            logprobs=[[] for _ in choices],
        )
        self.log.append(made)
        deltas = watched(generation.deltas, made, answer.error)
        return replace(generation, deltas=deltas, is_off_distribution=True)


async def watched(deltas: AsyncIterator[Delta], made: Made, error: Exception | None) -> AsyncIterator[Delta]:
    """Pass deltas on and note them; `error` is raised in place of the last one's end."""
    unfinished = len(made.token_ids)
    try:
        async for delta in deltas:
            made.token_ids[delta.index] += delta.token_ids
            made.logprobs[delta.index] += delta.logprobs
            unfinished -= delta.finish_reason is not None
            if error is not None and delta.finish_reason is not None:
                yield replace(delta, finish_reason=None)
                raise error
            yield delta
    finally:
        made.aborted = unfinished > 0
        close = getattr(deltas, "aclose", None)
        if close is not None:
            await close()
