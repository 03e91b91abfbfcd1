"""What an engine does with a request before any token is sampled: prompts of tokens, and checks that need no weights.

One idea: all engines share it, so one conversation has one prompt, whichever engine samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leyden.errors import ConfigurationError, ContextLengthError
from leyden.interfaces import GenerationRequest, SamplingParameters

if TYPE_CHECKING:  # engines are constructed in scripts that worker processes import again
    from leyden_plugins.chat.templates import Chat


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Requests to tokens for one model."""

    chat: Chat
    vocabulary: int
    """How many tokens the model's embedding knows; the tokenizer may use fewer."""
    eos: frozenset[int]
    """Every token that ends an answer."""

    def prompt(self, request: GenerationRequest) -> tuple[int, ...]:
        """Return the tokens of a request's prompt.

        Raises:
            ConfigurationError: the prompt is empty, or cannot be written in this model's tokens.
        """
        if request.prompt_token_ids is not None:
            prompt = tuple(request.prompt_token_ids)
            check_tokens("prompt", prompt, self.vocabulary)
        elif request.prompt_text is not None:
            prompt = tuple(self.chat.codec.encode(request.prompt_text, add_special_tokens=True))
        else:
            tools = () if request.tool_choice == "none" else request.tools
            prompt = self.chat.prompt(request.messages, tools)
        if not prompt:
            raise ConfigurationError("the prompt is empty; it needs at least one token")
        return prompt

    def continuation(
        self, request: GenerationRequest, answered: int, answer_ids: Sequence[int]
    ) -> tuple[int, ...] | None:
        """Return the tokens that follow a sampled answer, which is message number `answered` of the request.

        `None` where the chat template cannot say: it refuses such a conversation, or leaves the answer out.
        """
        tools = () if request.tool_choice == "none" else request.tools
        return self.chat.continuation(request.messages, answered, answer_ids, tools=tools, ends=self.eos)

    def tokenised(
        self, request: GenerationRequest, answer: Mapping[str, object]
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the tokens of a prompt and of an answer that somebody gave, as this model would have had to say it.

        `None` where the chat template cannot say which of its tokens are the answer's.

        Raises:
            ConfigurationError: the chat template refuses these messages.
        """
        from leyden_plugins.chat.imitation import answer_tokens  # as above: loads templates

        prompt = self.prompt(request)
        tools = () if request.tool_choice == "none" else request.tools
        found = answer_tokens(self.chat, prompt, request.messages, answer, tools=tools, ends=self.eos)
        return None if found is None else (prompt, found)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Spell tokens, special ones included: what a log-probability stands beside."""
        codec = self.chat.codec
        return codec.decode(token_ids, codec.special)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`; where it spells a special token, that one."""
        return self.chat.codec.encode(text)


def room_for(prompt: Sequence[int], context_length: int) -> int:
    """Return how many tokens an answer may have.

    Raises:
        ContextLengthError: none.
    """
    if len(prompt) >= context_length:
        raise ContextLengthError(
            f"the prompt has {len(prompt)!r} tokens and the context {context_length!r}: "
            "no room for an answer; shorten the prompt"
        )
    return context_length - len(prompt)


def check_tokens(name: str, token_ids: Sequence[int], vocabulary: int) -> None:
    """Refuse tokens that the model does not have.

    Raises:
        ConfigurationError: names the first of them.
    """
    wrong = next((token for token in token_ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ConfigurationError(f"{name} token {wrong!r} is outside 0 to {vocabulary - 1}")


def check_sampling(sampling: SamplingParameters) -> None:
    """Refuse values that no distribution has.

    Raises:
        ConfigurationError: names the parameter.
    """
    bounds = (
        ("temperature", sampling.temperature >= 0, "at least 0"),
        ("top_p", 0 < sampling.top_p <= 1, "in (0, 1]"),
        ("top_k", sampling.top_k >= 0, "0 (off) or more"),
        ("min_p", 0 <= sampling.min_p <= 1, "in [0, 1]"),
        ("n", sampling.n >= 1, "at least 1"),
        ("max_tokens", sampling.max_tokens is None or sampling.max_tokens >= 1, "at least 1"),
        ("stop", all(sampling.stop), "strings that are not empty"),
    )
    for name, is_right, expected in bounds:
        if not is_right:
            raise ConfigurationError(f"{name} must be {expected}, got {getattr(sampling, name)!r}")
