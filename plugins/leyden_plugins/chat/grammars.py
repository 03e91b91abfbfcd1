"""Write the grammar that an answer must keep to: JSON of a schema, or a tool call that the caller insists on.

One idea: a call's grammar is made from the form that the model's own template writes, so that a forced call looks like
a free one. The language is llguidance's Lark dialect; special tokens stand in it by their ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from leyden.errors import ConfigurationError
from leyden.extras import extra
from leyden.interfaces import GenerationRequest
from leyden_plugins.chat.templates import CallForm
from leyden_plugins.chat.text import Codec

with extra("train"):
    import llguidance

ANY_OBJECT: Mapping[str, object] = {"type": "object"}

WHITE_SPACE: dict[str, object] = {"x-guidance": {"whitespace_pattern": r"[ \n\t]{0,20}"}}
"""Between two items of JSON: bounded, because a small model may never stop writing it."""


def grammar_of(request: GenerationRequest, form: CallForm, codec: Codec) -> str | None:
    """Return the grammar of a request's answer, or `None` when it may be anything.

    Raises:
        ConfigurationError: the tool that must be called is none of the request's.
    """
    if request.forces_tool:
        return call_grammar(wanted_tools(request), form, codec)
    schema = schema_of(request)
    return None if schema is None else str(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)))


def schema_of(request: GenerationRequest) -> dict[str, object] | None:
    """Return the JSON schema that the whole answer must have, or `None` when there is none."""
    if request.response_format is None:
        return None
    schema: Any = request.response_format.get("schema", ANY_OBJECT)
    return dict(schema) | WHITE_SPACE


def constrained_field(request: GenerationRequest) -> str:
    """Return the name of the field that asked for a grammar, for messages."""
    return "tool_choice" if request.forces_tool else "response_format"


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
