"""What samples tokens, for several policies by name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from leyden.errors import ConfigurationError
from leyden.roles import LoRA, Policy


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """What one request asks for, after the policy's own sampling replaced the agent's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    """`None`: up to the context length."""
    n: int = 1

    @property
    def is_off_distribution(self) -> bool:
        """True when log-softmax(logits / temperature) is not the distribution sampled from."""
        return (
            self.temperature == 0
            or self.top_p < 1
            or self.top_k > 0
            or self.min_p > 0
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
        )


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One model call, in no dialect: the gateway translates every dialect into this."""

    model: str
    """A policy's name, or `base`."""
    messages: Sequence[Mapping[str, object]]
    """OpenAI chat messages; empty when the prompt came as tokens or text."""
    tools: Sequence[Mapping[str, object]] = ()
    """OpenAI function tools."""
    tool_choice: str | Mapping[str, object] = "auto"
    prompt_token_ids: Sequence[int] | None = None
    """The exact prompt, in place of `messages`, which may be given beside it to say what it means."""
    prompt_text: str | None = None
    """The prompt as plain text, in place of `messages`: no chat template, only the tokenizer's own special tokens."""
    response_format: Mapping[str, object] | None = None
    """`{"type": "json_object"}` or `{"type": "json_schema", "name": ..., "schema": {...}}`; `None` is free text."""
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    forced_token_ids: Sequence[int] | None = None
    """The exact answer of every choice, in place of sampling: how a given answer is scored. Log-probabilities, limits,
    streaming and timing stay the engine's own. An engine that cannot do it refuses the request."""
    stream: bool = True
    """False: the caller waits for whole answers, so an engine may give each choice as one delta."""
    affinity: str | None = None
    """Requests with the same one tend to go on from each other; an engine of several servers sends them to one."""

    @property
    def forces_tool(self) -> bool:
        """True when the answer must be a tool call."""
        return self.tool_choice not in ("auto", "none")

    @property
    def is_off_distribution(self) -> bool:
        """True when tokens are not sampled from log-softmax(logits / temperature) alone: a mask counts too."""
        is_masked = self.forces_tool or self.response_format is not None
        return self.sampling.is_off_distribution or is_masked or self.forced_token_ids is not None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """A piece of one choice. The token ids of a choice's deltas, joined, are exactly what was sampled."""

    index: int
    """Which choice, 0 to n - 1."""
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    """Aligned with `token_ids`: log-softmax(logits / temperature) before masks and penalties."""
    tool_calls: Sequence[Mapping[str, object]] = ()
    """Complete OpenAI tool calls (id, type, function{name, arguments}), given once they are parsed."""
    finish_reason: Literal["stop", "length", "tool_calls", "abort"] | None = None
    """Set on the last delta of a choice."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A running generation. Closing `deltas` early aborts it and frees its place in the batch."""

    prompt_token_ids: Sequence[int]
    version: int
    """The policy version that samples every token of this generation; 0 for `base`."""
    deltas: AsyncIterator[Delta]
    is_off_distribution: bool = False
    """True when the tokens do not follow the distribution of the log-probabilities, although the request would not
    tell: the engine changed it."""


@runtime_checkable
class Engine(Protocol):
    """Samples tokens for several policies by name.

    Duties: a request keeps the version it started with; a version number is never reused; log-probabilities follow
    DESIGN's convention; caches are keyed by version; aborted requests free their place.
    """

    @property
    def context_length(self) -> int:
        """The most tokens a prompt and its answer may have together."""
        ...

    @property
    def keeps_versions(self) -> bool:
        """True when versions stand side by side: a publish waits for nothing and disturbs no request in flight."""
        ...

    @property
    def model(self) -> str:
        """The base weights' folder or hub name; the learner starts from the same."""
        ...

    def sha256(self, model: str) -> str:
        """Return a digest over the tensors served under a name now."""
        ...

    def models(self) -> Sequence[str]:
        """Return the names served now."""
        ...

    async def start(self, policies: Sequence[Policy]) -> None:
        """Load the base weights and serve them as `base` and, as version 0, under each policy's name. Idempotent."""
        ...

    async def generate(self, request: GenerationRequest) -> Generation:
        """Begin a generation.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            ConfigurationError: an unknown model, or an option this engine cannot honour.
            EngineError: the engine cannot serve now; the call may be retried.
        """
        ...

    async def publish(self, policy: str, version: int, weights: Weights) -> None:
        """Serve `weights` as `version` of `policy` for requests that begin after this returns.

        Waits for requests in flight of that policy where the weights cannot be kept side by side.
        """
        ...

    async def stop(self) -> None:
        """Free everything; requests in flight end with `EngineError`. Idempotent."""
        ...


@runtime_checkable
class ContinuesExactly(Protocol):
    """An engine that can render what follows a recorded answer: what exact continuation needs."""

    def continuation(
        self, request: GenerationRequest, answered: int, answer_ids: Sequence[int]
    ) -> Sequence[int] | None:
        """Return the tokens that follow `answer_ids`, which were sampled as message number `answered` of the request.

        They are the end of that turn unless it was sampled, the messages behind it, and what asks for the next answer.
        `None`: the chat template cannot say.
        """
        ...


@runtime_checkable
class Tokenises(Protocol):
    """An engine that can write a call which somebody else answered in its model's own tokens."""

    def tokenised(
        self, request: GenerationRequest, answer: Mapping[str, object]
    ) -> tuple[Sequence[int], Sequence[int]] | None:
        """Return the tokens of a request's prompt and of an answer to it, its end token included.

        `None`: the chat template cannot say which of its tokens are the answer's.

        Args:
            request: its messages and tools are read.
            answer: an assistant's chat message: `content`, `tool_calls`.

        Raises:
            ConfigurationError: messages that the chat template refuses.
        """
        ...


@runtime_checkable
class Sleeps(Protocol):
    """An engine that can leave its device to a learner while nobody samples."""

    @property
    def sleeps(self) -> bool:
        """True when it was asked to; otherwise neither method is called."""
        ...

    async def sleep(self) -> None:
        """Free the device's memory; requests that come meanwhile wait. Idempotent."""
        ...

    async def wake(self) -> None:
        """Serve again, with the weights that were published last. Idempotent."""
        ...


def able_to_continue(engine: object) -> ContinuesExactly:
    """Return an engine that can go on exactly.

    Raises:
        ConfigurationError: it cannot.
    """
    if isinstance(engine, ContinuesExactly):
        return engine
    raise ConfigurationError(
        f"exact_continuation=True needs an engine that can go on from recorded tokens, and {type(engine).__name__!r} "
        "has no method `continuation`; use TransformersEngine, or leave the option out"
    )


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A policy's weights on their way to an engine: in memory, in a folder, or both."""

    lora: LoRA | None = None
    """Set: these are the low-rank factors of that adapter, to be added to the base weights."""

    tensors: Mapping[str, object] | None = None
    """Parameter name -> tensor, in the Hugging Face names; of a LoRA, PEFT's names without an adapter's name in them
    (`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`). The engine copies what it keeps."""
    folder: Path | None = None
    """A Hugging Face checkpoint folder, or PEFT's folder of a LoRA."""
    logprobs: Callable[[Sequence[int], Sequence[int]], Sequence[float]] | None = None
    """Prompt and answer -> the answer's log-probabilities under these weights at temperature 1, computed by the learner
    (it blocks): what an engine in another process compares its own with after a push. `None`: there is no learner."""
