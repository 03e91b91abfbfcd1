"""Read an Anthropic conversation as chat messages.

The trap: a tool call comes back as a parsed object, and another spelling of the same JSON is other tokens. The
spelling that was sampled is remembered by the call's id, and used whenever it means the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from leyden_plugins.gateway.dialects.chat_fields import function_tool, named_choice, read_content, tool_list
from leyden_plugins.gateway.dialects.fields import unsupported, wrong
from leyden_plugins.gateway.memory import Memory

IGNORED = ("thinking", "redacted_thinking")
"""Blocks that clients send back and that no model reads here."""

NO_JSON = "INVALID_JSON"
"""The key under which arguments that are no JSON object reach a client that needs one (Anthropic's convention)."""


def read_conversation(system: object, messages: object, memory: Memory) -> list[Mapping[str, object]]:
    """Return the system prompt and the turns.

    Raises:
        Refusal: names the block that is wrong or not supported.
    """
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", messages, "a non-empty list of messages")
    found: list[Mapping[str, object]] = []
    if system is not None:
        found.append({"role": "system", "content": read_content(system, "system", may_lack=False)})
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role == "user":
            found.extend(read_user(content, where))
        elif role == "assistant":
            found.append(read_assistant(content, where, memory))
        elif role == "system":
            found.append({"role": "system", "content": read_content(content, f"{where}.content", may_lack=False)})
        else:
            raise wrong(f"{where}.role", role if isinstance(message, dict) else message, "'user' or 'assistant'")
    if found[-1]["role"] == "assistant":
        why = "end with an answer of the assistant to be continued, which this server cannot; end with the user's turn"
        raise unsupported("messages", why)
    return found


def blocks(content: object, where: str) -> Sequence[Mapping[str, object]]:
    """Return a message's blocks; a string is one block of text."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise wrong(f"{where}.content", content, "a string or a list of content blocks")
    return content


def read_user(content: object, where: str) -> list[Mapping[str, object]]:
    """Return the tool results and the text of a user's turn, in their order."""
    found: list[Mapping[str, object]] = []
    texts: list[Mapping[str, object]] = []

    def flush() -> None:
        if texts:
            found.append({"role": "user", "content": read_content(list(texts), f"{where}.content", may_lack=False)})
            texts.clear()

    for index, block in enumerate(blocks(content, where)):
        if block.get("type") == "text":
            texts.append(block)
        elif block.get("type") == "tool_result":
            flush()
            found.append(read_result(block, f"{where}.content[{index}]"))
        else:
            raise other_block(block, f"{where}.content[{index}]")
    flush()
    return found or [{"role": "user", "content": ""}]


def read_result(block: Mapping[str, object], where: str) -> Mapping[str, object]:
    """Return a tool's result. That it failed is said in words, because chat messages have no other place for it."""
    call_id = block.get("tool_use_id")
    if not isinstance(call_id, str):
        raise wrong(f"{where}.tool_use_id", call_id, "a string")
    content = read_content(block.get("content"), f"{where}.content", may_lack=True)
    if block.get("is_error") is True and not content.lower().startswith("error"):
        content = f"Error: {content}"
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def read_assistant(content: object, where: str, memory: Memory) -> Mapping[str, object]:
    """Return an assistant's turn with its tool calls."""
    texts: list[Mapping[str, object]] = []
    calls: list[Mapping[str, object]] = []
    for index, block in enumerate(blocks(content, where)):
        kind = block.get("type")
        if kind == "text":
            texts.append(block)
        elif kind == "tool_use":
            calls.append(read_use(block, f"{where}.content[{index}]", memory))
        elif kind not in IGNORED:
            raise other_block(block, f"{where}.content[{index}]")
    message: dict[str, object] = {
        "role": "assistant",
        "content": read_content(texts, f"{where}.content", may_lack=True),
    }
    return message | {"tool_calls": calls} if calls else message


def read_use(block: Mapping[str, object], where: str, memory: Memory) -> Mapping[str, object]:
    """Return a tool call with its arguments as they were sampled, or spelled anew when they are not from here."""
    call_id, name, given = (block.get(key) for key in ("id", "name", "input"))
    if not (isinstance(call_id, str) and isinstance(name, str) and isinstance(given, dict)):
        raise wrong(where, block, "a tool_use: an id, a name, its input as an object")
    sampled = memory.get(call_id)
    if isinstance(sampled, str) and arguments_object(sampled) == given:
        arguments = sampled
    else:
        arguments = json.dumps(given, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def arguments_object(arguments: str) -> Mapping[str, object]:
    """Return sampled arguments as the object that this protocol needs."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {NO_JSON: arguments}


def other_block(block: Mapping[str, object], where: str) -> Exception:
    """Return the refusal of a block that no model here reads."""
    return wrong(f"{where}.type", block.get("type"), "'text', 'tool_use' or 'tool_result': this model reads text only")


def read_client_tools(value: object) -> Sequence[Mapping[str, object]]:
    """Return the tools that the client itself runs.

    Raises:
        Refusal: a tool that Anthropic's servers run, or one without a name.
    """
    tools: list[Mapping[str, object]] = []
    for index, tool in enumerate(tool_list(value)):
        if tool.get("type") not in (None, "custom"):
            why = f"{tool.get('type')!r:.80} is a tool that this server does not host; only custom tools are supported"
            raise unsupported(f"tools[{index}].type", why)
        tools.append(function_tool(tool, f"tools[{index}]", schema="input_schema"))
    return tools


def read_anthropic_choice(value: object, tools: Sequence[Mapping[str, object]]) -> str | Mapping[str, object]:
    """Return the tool choice in OpenAI's words."""
    if value is None:
        return "auto"
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("auto", "none"):
        return str(kind)
    if kind == "any" and tools:
        return "required"
    if kind == "tool" and isinstance(value, dict):
        return named_choice(value.get("name"), tools)
    raise wrong("tool_choice", value, "of type 'auto' or 'none', or with tools 'any' or 'tool'")
