"""Chat messages and tools from what spans hold: one form, whatever protocol carried the call.

Spans keep requests as they were sent: OpenAI's chat messages, the items of its Responses, Anthropic's blocks, the parts
of the OpenTelemetry GenAI conventions. Who tokenises a recorded call anew needs one form, which engines read.
One trap: what is no text (an image, a tool that a provider's server runs) is refused and never left out: a model that
is trained on half of a prompt learns to answer what it was not asked.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence

from leyden.errors import DatasetError

Message = dict[str, object]

ROLES = {"assistant": "assistant", "developer": "system", "system": "system", "tool": "tool", "user": "user"}
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a content part -> the key of its text."""
CALL_PARTS = ("tool_use", "tool_call", "function_call")
RESULT_PARTS = ("tool_result", "tool_call_response")
THOUGHTS = ("thinking", "redacted_thinking", "reasoning")
"""Parts and items that no later prompt shows."""


def chat_messages(value: object) -> list[Message]:
    """Return chat messages: `role`, `content`, and `tool_calls`, `tool_call_id`, `name`, `reasoning_content` if any.

    Raises:
        DatasetError: there are none, or one holds what is no text.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple) or not value:
        raise DatasetError("it was recorded without its messages")
    found: list[Message] = []
    for item in value:
        if not isinstance(item, Mapping):
            raise DatasetError(f"a message is {type(item).__name__!r}, not an object")
        _add(found, item)
    return found


def asked_messages(attributes: Mapping[str, object]) -> list[Message]:
    """Return what a span says a model was asked, with instructions that the GenAI conventions keep apart.

    Raises:
        DatasetError: as `chat_messages`.
    """
    messages = chat_messages(attributes.get("gen_ai.input.messages"))
    instructions = _text(attributes.get("gen_ai.system_instructions"))
    if not instructions or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": instructions}, *messages]


def function_tools(value: object) -> list[Message]:
    """Return tools in the form of OpenAI's chat API.

    Raises:
        DatasetError: one is no function.
    """
    if value is None:
        return []
    return [_tool(one) for one in (value if isinstance(value, list | tuple) else [value])]


def _add(found: list[Message], item: Mapping[str, object]) -> None:
    """Add a message, or an item of the Responses API, which belongs to the assistant's message before it."""
    kind = item.get("type")
    if kind == "function_call":
        last = found[-1] if found else {}
        if last.get("role") != "assistant":
            last = {"role": "assistant", "content": ""}
            found.append(last)
        before = last.get("tool_calls")
        last["tool_calls"] = [*(before if isinstance(before, list) else ()), _call(item, "call_id", "arguments")]
    elif kind == "function_call_output":
        found.append({"role": "tool", "content": _text(item.get("output")), "tool_call_id": item.get("call_id")})
    elif "role" in item and kind in (None, "message"):
        found.extend(_messages(item))
    elif kind not in THOUGHTS:
        raise DatasetError(f"it holds an item of type {kind!r:.80}, which is no text")


def _messages(message: Mapping[str, object]) -> list[Message]:
    """Return a message, in front of it the tool results that stand among its parts."""
    role = ROLES.get(str(message.get("role")))
    if role is None or message.get("function_call") or message.get("audio"):
        raise DatasetError(f"a message of role {message.get('role')!r:.80} is no chat message of text and tool calls")
    parts = _parts(message.get("parts") if message.get("content") is None else message.get("content"))
    calls = message.get("tool_calls")
    if isinstance(calls, list | tuple) and calls:  # LangChain keeps blocks and items beside the calls read from them
        read = [_nested_call(one) for one in calls]
    else:
        made = [part for part in parts if part.get("type") in CALL_PARTS]
        read = [_call(part, "call_id" if "call_id" in part else "id", "input", "arguments") for part in made]
    results = [_result(part) for part in parts if part.get("type") in RESULT_PARTS]
    said = [part for part in parts if part.get("type") not in (*CALL_PARTS, *RESULT_PARTS, *THOUGHTS)]
    text = "\n".join(_part_text(part) for part in said) or str(message.get("refusal") or "")
    if results and not text and not read:
        return results
    found: Message = {"role": role, "content": text}
    if read:
        found["tool_calls"] = read
    found |= {key: message[key] for key in ("name", "tool_call_id") if isinstance(message.get(key), str)}
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str):
        found["reasoning_content"] = thought
    return [*results, found]


def _parts(content: object) -> list[Mapping[str, object]]:
    """Return content as parts; a string is one part of text.

    Raises:
        DatasetError: it is neither.
    """
    if content is None or content == "":
        return []
    found: list[Mapping[str, object]] = []
    for part in content if isinstance(content, list | tuple) else [content]:
        if not isinstance(part, str | Mapping):
            raise DatasetError(f"a message has the content {content!r:.80}, which is neither text nor parts")
        found.append({"type": "text", "text": part} if isinstance(part, str) else part)
    return found


def _text(content: object) -> str:
    return "\n".join(_part_text(part) for part in _parts(content))


def _part_text(part: Mapping[str, object]) -> str:
    kind = str(part.get("type", "text"))
    text = part.get(TEXT_PARTS.get(kind, ""), part.get("content") if kind == "text" else None)
    if not isinstance(text, str):
        raise DatasetError(f"a message holds a part of type {kind!r:.80}, which is no text")
    return text


def _result(part: Mapping[str, object]) -> Message:
    """Return a tool's result; that it failed is said in words, for which alone chat messages have a place."""
    found = next((part[key] for key in ("content", "response", "result") if part.get(key) is not None), "")
    text = _text(found) if isinstance(found, str | list) else json.dumps(found, ensure_ascii=False)
    if part.get("is_error") is True and not text.lower().startswith("error"):
        text = f"Error: {text}"
    return {"role": "tool", "content": text, "tool_call_id": part.get("tool_use_id") or part.get("id")}


def _call(call: object, id_key: str, *argument_keys: str) -> Message:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise DatasetError(f"a tool call {call!r:.80} has no name")
    arguments: object = next((call[key] for key in argument_keys if call.get(key) is not None), {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": call["name"], "arguments": written}
    return {"id": call.get(id_key), "type": "function", "function": function}


def _nested_call(call: object) -> Message:
    found = call if isinstance(call, Mapping) else {}
    return {**_call(found.get("function"), "", "arguments"), "id": found.get("id")}


def _tool(tool: object) -> Message:
    """Read a tool: nested (chat), flat (Responses, GenAI conventions) or with an `input_schema` (Anthropic)."""
    if not isinstance(tool, Mapping) or (tool.get("type", "function") != "function" and "input_schema" not in tool):
        raise DatasetError(f"a tool {tool!r:.80} is no function")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DatasetError(f"a tool {tool!r:.80} has no name")
    described: Message = {"name": function["name"]}
    if function.get("description") is not None:
        described["description"] = function["description"]
    parameters = function.get("parameters", function.get("input_schema"))
    if parameters is not None:
        described["parameters"] = parameters
    return {"type": "function", "function": described}


def same_calls(ours: Sequence[Mapping[str, object]], theirs: Sequence[Mapping[str, object]]) -> bool:
    """Say whether two lists hold the same tool calls, whatever their ids and however their arguments are spelled."""
    return [_meaning(call) for call in ours] == [_meaning(call) for call in theirs]


def _meaning(call: Mapping[str, object]) -> tuple[object, object]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return None, None
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # a model may have written what is no JSON
            arguments = json.loads(arguments or "{}")
    return function.get("name"), arguments
