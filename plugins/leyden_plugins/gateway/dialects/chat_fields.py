"""Check the messages and tools of a chat request, and put them in the form that engines take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from leyden_plugins.gateway.dialects.sampling import wrong
from leyden_plugins.gateway.refusal import Refusal

ROLES = ("assistant", "developer", "system", "tool", "user")

IGNORED = frozenset({"annotations", "parsed", "token_ids", "index"})
"""Keys that clients send back with an assistant's message and that no model reads."""

TEXTS = ("name", "tool_call_id", "reasoning_content")
"""Keys that are passed on as they are; the chat template decides what it shows."""


def read_messages(value: object) -> list[Mapping[str, object]]:
    """Return the messages with `developer` as `system` and text parts joined.

    Raises:
        Refusal: names the message and key that is wrong.
    """
    if not isinstance(value, list) or not value:
        raise wrong("messages", value, "a non-empty list of messages")
    return [read_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def read_message(value: object, where: str) -> Mapping[str, object]:
    """Return one message."""
    if not isinstance(value, dict):
        raise wrong(where, value, "an object with role and content")
    role = value.get("role")
    if role not in ROLES:
        raise wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    message: dict[str, object] = {"role": "system" if role == "developer" else role}
    calls = read_tool_calls(value.get("tool_calls"), f"{where}.tool_calls")
    message["content"] = read_content(value.get("content"), f"{where}.content", may_lack=role == "assistant")
    if calls:
        message["tool_calls"] = calls
    for key, item in value.items():
        if key in TEXTS and item is not None:
            if not isinstance(item, str):
                raise wrong(f"{where}.{key}", item, "a string")
            message[key] = item
        elif key not in ("role", "content", "tool_calls", *TEXTS, *IGNORED) and item:
            raise Refusal(
                400, f"{where}.{key} is not supported; remove it", code="unsupported_field", param=f"{where}.{key}"
            )
    return message


def read_content(value: object, where: str, *, may_lack: bool) -> str:
    """Return the text of a content string or of its text parts, one a line (as vLLM joins them)."""
    if isinstance(value, str):
        return value
    if value is None:
        if may_lack:
            return ""
        raise wrong(where, value, "a string or a list of text parts")
    if not isinstance(value, list):
        raise wrong(where, value, "a string or a list of text parts")
    texts: list[str] = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise wrong(f"{where}[{index}]", kind, "a part of type 'text'; this model reads text only")
        text = part.get("text")
        if not isinstance(text, str):
            raise wrong(f"{where}[{index}].text", text, "a string")
        texts.append(text)
    return "\n".join(texts)


def read_tool_calls(value: object, where: str) -> Sequence[Mapping[str, object]]:
    """Return an assistant's earlier tool calls."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong(where, value, "a list of tool calls")
    calls: list[Mapping[str, object]] = []
    for index, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        name, arguments = (function.get(key) for key in ("name", "arguments")) if isinstance(function, dict) else (0, 0)
        call_id = call.get("id") if isinstance(call, dict) else None
        if not (isinstance(name, str) and isinstance(arguments, str) and isinstance(call_id, str)):
            raise wrong(f"{where}[{index}]", call, "a function call: an id, a name, its arguments as a JSON string")
        # Only what is known is passed on: it is recorded too, and a record must be storable whatever a client sends.
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def read_tools(value: object) -> Sequence[Mapping[str, object]]:
    """Return the function tools.

    Raises:
        Refusal: a tool that is not a function, or has no name.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong("tools", value, "a list of function tools")
    for index, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise wrong(f"tools[{index}]", tool, "a tool of type 'function'")
        if not isinstance(function.get("name"), str):
            raise wrong(f"tools[{index}].function.name", function.get("name"), "a string")
    return value


def read_tool_choice(value: object, tools: Sequence[Mapping[str, object]]) -> str | Mapping[str, object]:
    """Return the tool choice; a named one must name a tool that is there."""
    if value is None:
        return "auto"
    if value in ("auto", "none"):
        return str(value)
    if value == "required" and tools:
        return "required"
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        named = value["function"].get("name")
        for tool in tools:
            function = tool["function"]
            if isinstance(function, dict) and function["name"] == named:
                return value
    raise wrong("tool_choice", value, "'auto', 'none', or with tools 'required' or one of them")
