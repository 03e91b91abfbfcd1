"""Keep an answer to a grammar: JSON of a schema, or a tool call that the caller insists on.

The grammar engine is llguidance, which masks the tokens that would leave the grammar. What a mask changes is no
longer the model's own distribution, so such answers are marked off-distribution; log-probabilities stay those of
the model before the mask.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leyden.errors import ConfigurationError, EngineError
from leyden.extras import extra
from leyden.interfaces import GenerationRequest
from leyden_plugins.chat.grammars import constrained_field, grammar_of

with extra("train"):
    import llguidance
    import llguidance.hf
    import numpy as np

if TYPE_CHECKING:
    from leyden_plugins.chat.templates import CallForm
    from leyden_plugins.chat.text import Codec


class Constraint:
    """The grammar of one choice, at the place it has reached."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def mask(self, logits_V: Tensor) -> None:
        """Set the logits of tokens that would leave the grammar to minus infinity."""
        # By hand, because `llguidance.torch` would import torch's compiler, which takes seconds.
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=self._vocabulary, bitorder="little").astype(bool)
        logits_V[~torch.from_numpy(allowed).to(logits_V.device)] = -torch.inf

    @property
    def is_complete(self) -> bool:
        """Say whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def take(self, token: int) -> None:
        """Go on by one token.

        Raises:
            EngineError: the grammar does not allow it.
        """
        if not self._matcher.consume_token(token):
            raise EngineError(f"token {token!r} leaves the grammar of its answer: {self._matcher.get_error()}")


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, codec: Codec, vocabulary: int, eos: frozenset[int]) -> None:
        self._codec = codec
        self._vocabulary = vocabulary
        self._eos = sorted(eos)
        self._tokens: Any = None
        self._lock = threading.Lock()

    def constraint(self, request: GenerationRequest, form: CallForm) -> Constraint | None:
        """Return what keeps one choice of a request to its format, or `None` when it may be anything.

        Raises:
            ConfigurationError: a schema that no grammar can be made of.
        """
        grammar = grammar_of(request, form, self._codec)
        return None if grammar is None else self._made(grammar, constrained_field(request))

    def _made(self, grammar: str, field: str) -> Constraint:
        with self._lock:
            if self._tokens is None:
                tokenizer: Any = self._codec.tokenizer
                try:
                    self._tokens = llguidance.hf.from_tokenizer(
                        tokenizer, n_vocab=self._vocabulary, eos_token=self._eos or None
                    )
                except ValueError as error:
                    raise ConfigurationError(f"{field} cannot be followed with this tokenizer: {error}") from error
        matcher = llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.get_error():
            raise ConfigurationError(f"{field} cannot be followed: {matcher.get_error()}; simplify its JSON schema")
        return Constraint(matcher, self._vocabulary)
