"""The protocols that carry model calls: how a request is known as one, and where its system prompt stands.

One idea: the end of the path names the protocol, and one key of the body tells a model call from some other
service that happens to have such a path. One trap: a protocol that no server of ours speaks must be known too,
or a trained role that uses it would be answered by the user's own model and learn nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from leyden.errors import ConfigurationError

Dialect = Literal["chat", "completions", "responses", "messages", "other"]
"""How a protocol's bodies and answers are read."""

POST = ("POST",)

OPENAI_COMPATIBLE = "give this role an OpenAI-compatible or an Anthropic client"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One kind of request."""

    name: str
    """As its own documentation calls it."""
    ending: str
    """Pattern of the path's end; what it matches is the path below the gateway's base."""
    dialect: Dialect = "other"
    methods: Sequence[str] = POST
    key: str | None = "model"
    """A body without it is some other service's; `None` where the path says enough."""
    is_model_call: bool = True
    """False: no model speaks (tokens are counted, an answer is fetched again), so nothing is recorded."""
    cure: str | None = None
    """What to do instead; `None` for a protocol that the gateway speaks."""

    def is_meant_by(self, body: Mapping[str, object]) -> bool:
        """Say whether a body is this protocol's."""
        return self.key is None or self.key in body


PROTOCOLS = (
    Protocol(name="OpenAI chat completions", ending="/chat/completions", dialect="chat", key="messages"),
    Protocol(name="OpenAI completions", ending="/completions", dialect="completions"),
    Protocol(name="OpenAI Responses", ending="/responses", dialect="responses"),
    Protocol(name="Anthropic messages", ending="/messages", dialect="messages"),
    Protocol(name="OpenAI token counts", ending="/responses/input_tokens", dialect="responses", is_model_call=False),
    Protocol(name="Anthropic token counts", ending="/messages/count_tokens", dialect="messages", is_model_call=False),
    # An answer is kept by whoever gave it, so its role asks there again. Other services have `/responses/` too, but
    # not such ids.
    Protocol(
        name="OpenAI Responses",
        ending=r"/responses/resp_[\w-]+(/cancel|/input_items)?",
        dialect="responses",
        methods=("GET", "POST", "DELETE"),
        key=None,
        is_model_call=False,
    ),
    Protocol(
        name="OpenAI Responses compaction",
        ending="/responses/compact",
        cure="keep the conversation short in the agent",
    ),
    Protocol(
        name="Gemini",
        ending=":(generateContent|streamGenerateContent)",
        key="contents",
        cure=f"{OPENAI_COMPATIBLE} (Gemini itself has one under /v1beta/openai/)",
    ),
    Protocol(
        name="Vertex AI raw prediction", ending=":(rawPredict|streamRawPredict)", key=None, cure=OPENAI_COMPATIBLE
    ),
    Protocol(
        name="Amazon Bedrock",
        ending="/model/[^/]+/(converse|converse-stream|invoke|invoke-with-response-stream)",
        key=None,
        cure=OPENAI_COMPATIBLE,
    ),
    Protocol(
        name="Ollama",
        ending="/api/(chat|generate)",
        cure="use Ollama's OpenAI-compatible address (http://HOST:11434/v1) with an OpenAI client",
    ),
    Protocol(name="Cohere chat", ending="/v[12]/chat", cure=OPENAI_COMPATIBLE),
)
"""In the order they are tried; of two that match the longer stands first."""

_ENDINGS = [(re.compile(f"(?:{protocol.ending})$"), protocol) for protocol in PROTOCOLS]


@dataclass(frozen=True)
class Place:
    """What a request's method and path say."""

    protocol: Protocol
    path: str
    """Below the gateway's base."""


def place_of(method: str, path: str) -> Place | None:
    """Return what kind of request this may be, or `None` for any other."""
    for ending, protocol in _ENDINGS:
        found = ending.search(path)
        if found is not None and method in protocol.methods:
            return Place(protocol, found.group())
    return None


def set_prompt(body: dict[str, object], protocol: Protocol, prompt: str) -> None:
    """Put `prompt` in the place of the request's system message.

    Raises:
        ConfigurationError: this protocol has none.
    """
    if protocol.dialect == "chat":
        body["messages"] = with_prompt(body.get("messages"), prompt) or [
            {"role": "system", "content": prompt},
            *listed(body.get("messages")),
        ]
    elif protocol.dialect == "responses":
        replaced = None if body.get("instructions") else with_prompt(body.get("input"), prompt)
        body.update({"instructions": prompt} if replaced is None else {"input": replaced})
    elif protocol.dialect == "messages":
        body["system"] = prompt
    else:
        raise ConfigurationError(
            f"a prompt cannot be set on a request of the protocol {protocol.name!r}, which has no system message "
            "that Leyden knows; call the chat completions API"
        )


def with_prompt(messages: object, prompt: str) -> list[object] | None:
    """Return the messages with the content of the first one replaced, or `None` when it is no system message."""
    first, *others = listed(messages) or [None]
    if not isinstance(first, dict) or first.get("role") not in ("system", "developer"):
        return None
    return [{**first, "content": prompt}, *others]


def listed(value: object) -> list[object]:
    """Return a list, empty for anything else."""
    return value if isinstance(value, list) else []


def input_of(body: Mapping[str, object]) -> object:
    """Return what a model was asked, its instructions first where they stand apart."""
    asked = body.get("messages") or body.get("input") or body.get("prompt") or body.get("contents")
    instructions = body.get("instructions") or body.get("system")
    if not instructions:
        return asked
    messages = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    return [{"role": "system", "content": instructions}, *messages]


def told_beside(body: Mapping[str, object]) -> dict[str, object]:
    """Return what a span says of a request beside its messages: its tools, and which answer its server goes on from."""
    choice = body.get("tool_choice")
    is_off = choice == "none" or (isinstance(choice, dict) and choice.get("type") == "none")
    told = {
        "gen_ai.tool.definitions": None if is_off else body.get("tools"),
        "leyden.previous_response": body.get("previous_response_id") or body.get("conversation"),
    }
    return {name: value for name, value in told.items() if value}
