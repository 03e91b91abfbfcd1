"""Read the items of a Responses request as chat messages, and remember those that answers were made of.

One idea: items are a flat list, chat messages are not. What one answer said, a message and then its function calls,
becomes one assistant message again, so that the prompt begins with exactly the tokens that were sampled before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from leyden_plugins.gateway.dialects.chat_fields import function_tool, named_choice, read_content, tool_list
from leyden_plugins.gateway.dialects.fields import unsupported, wrong
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal

Messages = list[Mapping[str, object]]

ROLES = ("assistant", "developer", "system", "user")

IGNORED = ("reasoning",)
"""Items that clients send back and that no model reads here."""


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """One answered request. Its conversation is the chain of `previous`, which lives as long as its last link."""

    messages: Sequence[Mapping[str, object]]
    """What this request added, and the answer."""
    previous: Remembered | None
    body: Mapping[str, object]
    """As it was answered."""

    def history(self) -> Messages:
        """Return the whole conversation without its instructions, which are not carried over."""
        links: list[Remembered] = []
        link: Remembered | None = self
        while link is not None:
            links.append(link)
            link = link.previous
        return [message for link in reversed(links) for message in link.messages]


def recalled(answer_id: object, where: str, memory: Memory) -> Remembered:
    """Return an earlier answer of this caller.

    Raises:
        Refusal: there is none of that id.
    """
    found = memory.get(answer_id) if isinstance(answer_id, str) else None
    if not isinstance(found, Remembered):
        raise Refusal(
            400,
            f"{where} {answer_id!r:.100} was not found: it was never answered here, was not stored, or is forgotten",
            code="previous_response_not_found",
            param=where,
        )
    return found


class Reader:
    """Puts items together to messages."""

    def __init__(self, memory: Memory) -> None:
        self.messages: Messages = []
        self._memory = memory

    def read(self, value: object) -> Messages:
        """Return the messages of a request's `input`.

        Raises:
            Refusal: names the item that is wrong or not supported.
        """
        if isinstance(value, str):
            return [{"role": "user", "content": value}]
        if not isinstance(value, list):
            raise wrong("input", value, "a string or a list of items")
        for index, item in enumerate(value):
            self.add(item, f"input[{index}]")
        return self.messages

    def add(self, item: object, where: str) -> None:
        """Add one item."""
        if not isinstance(item, dict):
            raise wrong(where, item, "an object")
        kind = item.get("type") or ("message" if "role" in item else "item_reference")
        if kind == "message":
            self.add_message(item, where)
        elif kind == "function_call":
            self.add_call(item, where)
        elif kind == "function_call_output":
            call_id, output = item.get("call_id"), item.get("output")
            if not isinstance(call_id, str):
                raise wrong(f"{where}.call_id", call_id, "a string")
            content = read_content(output, f"{where}.output", may_lack=False)
            self.messages.append({"role": "tool", "content": content, "tool_call_id": call_id})
        elif kind == "item_reference":
            self.add_reference(item, where)
        elif kind not in IGNORED:
            expected = "is no item that this server understands: messages, function calls and their outputs"
            raise unsupported(f"{where}.type", f"{kind!r:.80} {expected}")

    def add_message(self, item: Mapping[str, object], where: str) -> None:
        """Add a message."""
        role = item.get("role")
        if role not in ROLES:
            raise wrong(f"{where}.role", role, f"one of {', '.join(ROLES)}")
        content = read_content(item.get("content"), f"{where}.content", may_lack=False)
        self.messages.append({"role": "system" if role == "developer" else role, "content": content})

    def add_call(self, item: Mapping[str, object], where: str) -> None:
        """Add a function call to the assistant's message that it belongs to."""
        call_id, name, arguments = (item.get(key) for key in ("call_id", "name", "arguments"))
        if not (isinstance(call_id, str) and isinstance(name, str) and isinstance(arguments, str)):
            raise wrong(where, item, "a function call: a call_id, a name, its arguments as a JSON string")
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant":
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        before = last.get("tool_calls")
        self.messages[-1] = {**last, "tool_calls": [*(before if isinstance(before, list) else ()), call]}

    def add_reference(self, item: Mapping[str, object], where: str) -> None:
        """Add an item of an earlier answer."""
        item_id = item.get("id")
        found = self._memory.get(item_id) if isinstance(item_id, str) else None
        if not isinstance(found, dict):
            raise Refusal(
                400,
                f"{where}.id: item {item_id!r:.100} was not found; only items of stored answers can be referred to",
                code="item_not_found",
                param=f"{where}.id",
            )
        self.add(found, where)


def read_flat_tools(value: object) -> Sequence[Mapping[str, object]]:
    """Return the function tools, which this protocol describes without nesting.

    Raises:
        Refusal: a hosted tool, which no engine here has, or a function without a name.
    """
    tools: list[Mapping[str, object]] = []
    for index, tool in enumerate(tool_list(value)):
        if tool.get("type") != "function":
            why = f"{tool.get('type')!r:.80} is a tool that this server does not host; only functions are supported"
            raise unsupported(f"tools[{index}].type", why)
        tools.append(function_tool(tool, f"tools[{index}]"))
    return tools


def read_flat_choice(value: object, tools: Sequence[Mapping[str, object]]) -> str | Mapping[str, object]:
    """Return the tool choice."""
    if value is None:
        return "auto"
    if value in ("auto", "none") or (value == "required" and tools):
        return str(value)
    if isinstance(value, dict) and value.get("type") == "function":
        return named_choice(value.get("name"), tools)
    raise wrong("tool_choice", value, "'auto', 'none', or with function tools 'required' or one of them")
