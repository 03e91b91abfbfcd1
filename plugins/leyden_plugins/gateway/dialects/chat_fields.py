"""Check the messages and tools of a chat request, and put them in the form that engines take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from leyden_plugins.gateway.dialects.fields import unsupported, wrong

ROLES = ("assistant", "developer", "system", "tool", "user")

IGNORED = frozenset(
    {
        "annotations",
        "parsed",
        "token_ids",
        "index",
        "cache_control",
        "cache_breakpoint",
        "refusal",
        "provider_specific_fields",
    }
)
"""Keys that clients send with a message and that no model reads; a refusal is read as content."""

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a content part, in any protocol -> the key of its text."""

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
    content = read_content(value.get("content"), f"{where}.content", may_lack=role == "assistant")
    refusal = value.get("refusal")
    message["content"] = refusal if not content and isinstance(refusal, str) else content
    if calls:
        message["tool_calls"] = calls
    for key, item in value.items():
        if key in TEXTS and item is not None:
            if not isinstance(item, str):
                raise wrong(f"{where}.{key}", item, "a string")
            message[key] = item
        elif key not in ("role", "content", "tool_calls", *TEXTS, *IGNORED) and item:
            raise unsupported(f"{where}.{key}")
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
        kind = part.get("type") if isinstance(part, dict) else part
        if not isinstance(kind, str) or kind not in TEXT_PARTS:
            raise wrong(f"{where}[{index}]", kind, "a part of type 'text'; this model reads text only")
        text = part.get(TEXT_PARTS[kind])
        if not isinstance(text, str):
            raise wrong(f"{where}[{index}].{TEXT_PARTS[kind]}", text, "a string")
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
    tools: list[Mapping[str, object]] = []
    for index, tool in enumerate(tool_list(value)):
        function = tool.get("function")
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise wrong(f"tools[{index}]", tool, "a tool of type 'function'")
        tools.append(function_tool(function, f"tools[{index}].function"))
    return tools


def tool_list(value: object) -> Sequence[Mapping[str, object]]:
    """Return a request's tools, not yet checked."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong("tools", value, "a list of function tools")
    for index, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise wrong(f"tools[{index}]", tool, "an object")
    return value


def function_tool(function: Mapping[str, object], where: str, *, schema: str = "parameters") -> Mapping[str, object]:
    """Return a function in the one form that models are shown, whichever protocol described it.

    `strict` and other instructions to a server are left out: a chat template would print them into the prompt.
    """
    name, description, parameters = (function.get(key) for key in ("name", "description", schema))
    if not isinstance(name, str) or not name:
        raise wrong(f"{where}.name", name, "a non-empty string")
    if not isinstance(description, str | None):
        raise wrong(f"{where}.description", description, "a string")
    if not isinstance(parameters, dict | None):
        raise wrong(f"{where}.{schema}", parameters, "an object, the JSON schema of the arguments")
    shown: dict[str, object] = {"name": name}
    if description is not None:
        shown["description"] = description
    if parameters is not None:
        shown["parameters"] = parameters
    return {"type": "function", "function": shown}


def read_tool_choice(value: object, tools: Sequence[Mapping[str, object]]) -> str | Mapping[str, object]:
    """Return the tool choice; a named one must name a tool that is there."""
    if value is None:
        return "auto"
    if value in ("auto", "none"):
        return str(value)
    if value == "required" and tools:
        return "required"
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        return named_choice(value["function"].get("name"), tools)
    raise wrong("tool_choice", value, "'auto', 'none', or with tools 'required' or one of them")


def named_choice(name: object, tools: Sequence[Mapping[str, object]]) -> Mapping[str, object]:
    """Return the choice of one tool by name."""
    names = [tool["function"]["name"] for tool in tools if isinstance(tool["function"], dict)]
    if name not in names:
        raise wrong("tool_choice", name, f"one of the request's tools, {names!r}")
    return {"type": "function", "function": {"name": name}}
