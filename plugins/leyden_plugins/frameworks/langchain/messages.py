"""LangChain's messages and answers as the JSON values that spans hold, in the form of OpenAI's chat messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, LLMResult

CHAT_ROLES = {"human": "user", "ai": "assistant", "AIMessageChunk": "assistant"}
"""LangChain's message types that have another name in the chat API."""


def plain(value: object) -> object:
    """Return `value` as a JSON value; what is none becomes its text."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, BaseMessage):
        return message_json(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(item) for item in value]
    return str(value)


def message_json(message: BaseMessage) -> dict[str, object]:
    """Return a message in the form of the chat API."""
    result: dict[str, object] = {
        "role": CHAT_ROLES.get(message.type, message.type),
        "content": plain(message.content),
    }
    if message.name:
        result["name"] = message.name
    if isinstance(message, AIMessage) and message.tool_calls:
        result["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": json.dumps(plain(call["args"]), ensure_ascii=False)},
            }
            for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        result["tool_call_id"] = message.tool_call_id
    return result


def answer_attributes(response: LLMResult) -> dict[str, object]:
    """Return what a span says of a model's answer."""
    choices = response.generations[0] if response.generations else []
    messages = [choice.message for choice in choices if isinstance(choice, ChatGeneration)]
    if not messages:
        return {"gen_ai.output.messages": [{"role": "assistant", "content": choice.text} for choice in choices]}
    first = messages[0]
    attributes: dict[str, object] = {
        "gen_ai.output.messages": [message_json(message) for message in messages],
        "gen_ai.response.finish_reasons": [message.response_metadata.get("finish_reason") for message in messages],
        "gen_ai.response.model": first.response_metadata.get("model_name"),
    }
    usage = first.usage_metadata if isinstance(first, AIMessage) else None
    if usage is not None:
        attributes["gen_ai.usage.input_tokens"] = usage["input_tokens"]
        attributes["gen_ai.usage.output_tokens"] = usage["output_tokens"]
    return attributes
