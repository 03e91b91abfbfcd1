"""What `FakeOpenAI` reads and writes in each protocol; inside it everything is a chat message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]


def dialect_of(path: str) -> str:
    """Name the protocol by the path's last part; a chat path counts for any other."""
    name = path.rstrip("/").rpartition("/")[2]
    if name == "completions" and not path.endswith("/chat/completions"):
        return "completions"
    return name if name in ("responses", "messages") else "chat"


def messages_of(body: dict[str, Any]) -> list[Message]:
    """Return what was asked as chat messages."""
    instructions = body.get("instructions") or body.get("system")
    asked = body.get("messages") or body.get("input") or body.get("prompt") or []
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    found = [{"role": "system", "content": instructions}] if instructions else []
    for each in asked:
        content = each.get("content")
        result = isinstance(content, list) and any(part.get("type") == "tool_result" for part in content)
        if each.get("type") == "function_call_output" or result:
            each = {**each, "role": "tool"}
        found.append(each)
    return found


def tools_of(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the offered functions: name and parameters."""
    found = [tool.get("function") or tool for tool in body.get("tools") or []]
    return [{**tool, "parameters": tool.get("parameters") or tool.get("input_schema") or {}} for tool in found]


def answer_body(path: str, model: str, message: Message) -> dict[str, Any]:
    """Return the JSON of an answer."""
    calls = message.get("tool_calls") or []
    dialect = dialect_of(path)
    if dialect == "responses":
        return {
            "id": "resp_1",
            "object": "response",
            "created_at": 1.0,
            "status": "completed",
            "model": model,
            "output": response_items(message),
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "temperature": 1.0,
            "top_p": 1.0,
            "usage": {
                "input_tokens": 7,
                "output_tokens": 3,
                "total_tokens": 10,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens_details": {"reasoning_tokens": 0},
            },
        }
    if dialect == "messages":
        return {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": message_blocks(message),
            "stop_reason": "tool_use" if calls else "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 7, "output_tokens": 3},
        }
    reason = "tool_calls" if calls else "stop"
    choice = {"text": message["content"] or "", "logprobs": None} if dialect == "completions" else {"message": message}
    return {
        "id": "chatcmpl-1",
        "object": "text_completion" if dialect == "completions" else "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, **choice, "finish_reason": reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def response_items(message: Message) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if message.get("content"):
        part = {"type": "output_text", "text": message["content"], "annotations": []}
        items.append({"type": "message", "id": "item_1", "role": "assistant", "status": "completed", "content": [part]})
    for call in message.get("tool_calls") or ():
        item = {"type": "function_call", "id": f"fc_{call['id']}", "call_id": call["id"], "status": "completed"}
        items.append({**item, **call["function"]})
    return items


def message_blocks(message: Message) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if message.get("content"):
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls") or ():
        arguments = json.loads(call["function"]["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments})
    return blocks


def answer_events(path: str, model: str, message: Message, *, has_usage: bool = False) -> Iterator[bytes]:
    """Yield an answer as server-sent events: an opening, one a word, the end."""
    write = {"responses": response_events, "messages": message_events}.get(dialect_of(path))
    if write is not None:
        for event in write(path, model, message):
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
        return
    for event in chat_events(path, model, message, has_usage):
        yield b"data: " + json.dumps(event).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


def error_event(path: str) -> bytes:
    """Return the event of a server that fails in the middle."""
    error = {"type": "server_error", "message": "the server failed", "code": "server_error", "param": None}
    if dialect_of(path) == "responses":
        event = {**error, "type": "error", "sequence_number": 9}
    elif dialect_of(path) == "messages":
        event = {"type": "error", "error": error}
    else:
        return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
    return f"event: error\ndata: {json.dumps(event)}\n\n".encode()


def words(message: Message) -> list[str]:
    return [word + " " for word in (message.get("content") or "").split()]


def chat_events(path: str, model: str, message: Message, has_usage: bool) -> Iterator[dict[str, Any]]:
    is_chat = dialect_of(path) == "chat"
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    head = {"id": "chatcmpl-1", "object": kind, "created": 1, "model": model}

    def event(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        said = {"delta": delta} if is_chat else {"text": delta.get("content", ""), "logprobs": None}
        return {**head, "choices": [{"index": 0, **said, "finish_reason": reason}]}

    yield event({"role": "assistant", "content": ""})
    for word in words(message):
        yield event({"content": word})
    for index, call in enumerate(message.get("tool_calls") or []):
        arguments = call["function"]["arguments"]
        yield event({"tool_calls": [{**call, "index": index, "function": {**call["function"], "arguments": ""}}]})
        for piece in (arguments[:4], arguments[4:]):
            yield event({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    yield event({}, "tool_calls" if message.get("tool_calls") else "stop")
    if has_usage:
        yield {**head, "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}


def response_events(path: str, model: str, message: Message) -> Iterator[dict[str, Any]]:
    whole = answer_body(path, model, message)
    yield {
        "type": "response.created",
        "sequence_number": 0,
        "response": {**whole, "status": "in_progress", "output": []},
    }
    for index, item in enumerate(whole["output"]):
        empty: dict[str, Any] = {"content": []} if item["type"] == "message" else {"arguments": ""}
        at = {"sequence_number": 1, "output_index": index}
        yield {"type": "response.output_item.added", **at, "item": {**item, "status": "in_progress", **empty}}
        at["item_id"] = item["id"]
        if item["type"] == "message":
            part = {"type": "output_text", "text": "", "annotations": []}
            yield {"type": "response.content_part.added", **at, "content_index": 0, "part": part}
            for word in words(message):
                yield {"type": "response.output_text.delta", **at, "content_index": 0, "delta": word, "logprobs": []}
        else:
            yield {"type": "response.function_call_arguments.delta", **at, "delta": item["arguments"]}
        yield {"type": "response.output_item.done", "sequence_number": 2, "output_index": index, "item": item}
    yield {"type": "response.completed", "sequence_number": 3, "response": whole}


def message_events(path: str, model: str, message: Message) -> Iterator[dict[str, Any]]:
    whole = answer_body(path, model, message)
    opening = {**whole, "content": [], "stop_reason": None, "usage": {"input_tokens": 7, "output_tokens": 1}}
    yield {"type": "message_start", "message": opening}
    for index, block in enumerate(whole["content"]):
        at = {"index": index}
        if block["type"] == "text":
            yield {"type": "content_block_start", **at, "content_block": {"type": "text", "text": ""}}
            for word in words(message):
                yield {"type": "content_block_delta", **at, "delta": {"type": "text_delta", "text": word}}
        else:
            yield {"type": "content_block_start", **at, "content_block": {**block, "input": {}}}
            arguments = json.dumps(block["input"])
            for piece in (arguments[:4], arguments[4:]):
                delta = {"type": "input_json_delta", "partial_json": piece}
                yield {"type": "content_block_delta", **at, "delta": delta}
        yield {"type": "content_block_stop", **at}
    ending = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
    yield {"type": "message_delta", "delta": ending, "usage": {"output_tokens": 3}}
    yield {"type": "message_stop"}
