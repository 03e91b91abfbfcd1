"""Keep an answer to a grammar: JSON of a schema, or a tool call that the caller insists on.

The grammar engine is llguidance, which masks the tokens that would leave the grammar. What a mask changes is no
longer the model's own distribution, so such answers are marked off-distribution; log-probabilities stay those of
the model before the mask.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leyden.errors import ConfigurationError, EngineError
from leyden.extras import extra
from leyden.interfaces import GenerationRequest

with extra("train"):
    import llguidance
    import llguidance.hf
    import numpy as np

if TYPE_CHECKING:
    from leyden_plugins.engines.transformers.chat import CallForm
    from leyden_plugins.engines.transformers.text import Codec

ANY_OBJECT: Mapping[str, object] = {"type": "object"}

WHITE_SPACE: dict[str, object] = {"x-guidance": {"whitespace_pattern": r"[ \n\t]{0,20}"}}
"""Between two items of JSON: bounded, because a small model may never stop writing it."""


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

    def constraint(self, request: GenerationRequest, forms: Sequence[CallForm]) -> Constraint | None:
        """Return what keeps one choice of a request to its format, or `None` when it may be anything.

        Raises:
            ConfigurationError: a schema that no grammar can be made of.
        """
        if request.forces_tool:
            return self._made(call_grammar(wanted_tools(request), forms[0], self._codec), "tool_choice")
        if request.response_format is not None:
            schema: Any = request.response_format.get("schema", ANY_OBJECT)
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(dict(schema) | WHITE_SPACE))
            return self._made(grammar, "response_format")
        return None

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


def wanted_tools(request: GenerationRequest) -> Sequence[Mapping[str, Any]]:
    """Return the functions of which one must be called."""
    functions: list[Mapping[str, Any]] = [tool["function"] for tool in request.tools]  # type: ignore[misc]  # checked
    if isinstance(request.tool_choice, Mapping):
        named: Any = request.tool_choice["function"]
        functions = [function for function in functions if function["name"] == named["name"]]
    if not functions:
        raise ConfigurationError(f"tool_choice {request.tool_choice!r} names no tool of this request")
    return functions


def call_grammar(functions: Sequence[Mapping[str, Any]], form: CallForm, codec: Codec) -> str:
    """Return the grammar of one call in a model's own form."""
    opening, closing = literal(form.opening, codec), literal(closing_of(form.opening), codec)
    rules = ["start: " + (f"{opening} SPACE " if opening else "") + "call" + (f" SPACE {closing}" if closing else "")]
    names = [f"call_{index}" for index in range(len(functions))]
    rules.append(f"call: {' | '.join(names)}")
    for name, function in zip(names, functions, strict=True):
        before = "" if form.between is None else f"{json.dumps(function['name'])} {literal(form.between, codec)} "
        rules.append(f"{name}: {before}{name}_json")
        rules.append(f"{name}_json: %json {json.dumps(call_schema(function, form) | WHITE_SPACE)}")
    return "\n".join([*rules, "SPACE: /[ \\n]?/", ""])


def literal(text: str, codec: Codec) -> str:
    """Return a literal of the grammar: a special token by its id, other text by its bytes; nothing for no text."""
    token = codec.tokenizer.convert_tokens_to_ids(text) if text else None
    if isinstance(token, int) and token in codec.special and codec.tokenizer.convert_ids_to_tokens(token) == text:
        return f"<[{token}]>"
    return json.dumps(text) if text else ""


def closing_of(opening: str) -> str:
    """Return the tag that closes `<tag>`; other openings are not closed."""
    is_tag = opening.startswith("<") and opening.endswith(">") and "|" not in opening
    return f"</{opening[1:]}" if is_tag else ""


def call_schema(function: Mapping[str, Any], form: CallForm) -> dict[str, object]:
    """Return the JSON schema of a call: its arguments alone where the name stands before them."""
    arguments = dict(function.get("parameters") or ANY_OBJECT)
    if form.between is not None:
        return arguments
    return {
        "type": "object",
        "properties": {form.name_key: {"const": function["name"]}, form.arguments_key: arguments},
        "required": [form.name_key, form.arguments_key],
        "additionalProperties": False,
    }
