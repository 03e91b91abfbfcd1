"""What a model answered, for the record: text, tool calls, finish reasons and usage, in each protocol.

One idea: whatever the protocol, an answer becomes chat messages, so that every reader of spans knows one form.
One trap: readers trust the form of what they read and raise what Python raises; `reading` leaves such pieces out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from leyden.wire.protocols import Dialect

DONE = "[DONE]"
"""The last event of OpenAI's older streams."""

Message = dict[str, Any]


@dataclass
class Answer:
    """What is known of an answer; a stream is read up to where it ended."""

    messages: list[Message] = field(default_factory=list)
    """Chat messages, one a choice."""
    finish_reasons: list[str | None] = field(default_factory=list)
    response_id: str | None = None
    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    """What the model's server said inside an answer that began well."""
    is_whole: bool = False
    """Its end was seen. An answer that cannot be read counts as whole: nothing can be said of it."""

    def attributes(self) -> dict[str, object]:
        """Return what a span says of it."""
        told: dict[str, object] = {
            "gen_ai.response.id": self.response_id,
            "gen_ai.response.model": self.model,
            "gen_ai.output.messages": self.messages,
            "gen_ai.response.finish_reasons": self.finish_reasons,
            "gen_ai.usage.input_tokens": self.input_tokens,
            "gen_ai.usage.output_tokens": self.output_tokens,
        }
        return {name: value for name, value in told.items() if value not in (None, [])}


class Reader:
    """Reads one answer: its whole body, or the events of its stream one after the other."""

    def __init__(self, choices: int) -> None:
        self.choices = choices
        self.answer = Answer()
        self.texts: dict[int, list[str]] = {}
        """Choice or part of an answer -> pieces of its text."""
        self.calls: dict[tuple[int, int], Message] = {}
        """(Choice, number within it) -> a tool call, with its pieces of arguments in `pieces`."""
        self.reasons: dict[int, str | None] = {}

    def take_body(self, body: Any) -> None:
        """Read a whole answer."""
        raise NotImplementedError

    def take_event(self, event: Any) -> None:
        """Read one event."""
        raise NotImplementedError

    def call(self, choice: int, number: int, call_id: str | None, name: str | None, arguments: str | None) -> None:
        """Add to a tool call what one event says of it."""
        call = self.calls.setdefault((choice, number), {"id": None, "name": "", "pieces": []})
        call["id"] = call_id or call["id"]
        call["name"] = name or call["name"]
        call["pieces"].append(str(arguments or ""))

    def say(self, choice: int, text: object) -> None:
        """Add a piece of text."""
        self.texts.setdefault(choice, []).append(str(text or ""))

    def conclude(self) -> None:
        """Put the pieces of a stream together."""
        numbers = sorted({*self.texts, *(choice for choice, _ in self.calls)})
        for choice in numbers:
            calls = [call for (at, _), call in sorted(self.calls.items()) if at == choice]
            made = [tool_call(call["id"], call["name"], "".join(call["pieces"])) for call in calls]
            self.answer.messages.append(message("".join(self.texts.get(choice, ())), made))
            self.answer.finish_reasons.append(self.reasons.get(choice))


class Chat(Reader):
    """OpenAI chat completions."""

    def take_body(self, body: Any) -> None:
        self.take_head(body)
        for choice in body["choices"]:
            self.answer.messages.append(self.message_of(choice))
            self.answer.finish_reasons.append(choice.get("finish_reason"))

    def take_event(self, event: Any) -> None:
        if event == DONE:
            self.answer.is_whole = True
            return
        self.take_head(event)
        for choice in event.get("choices") or ():
            index = choice.get("index", 0)
            self.say(index, self.text_of(choice))
            for number, call in enumerate((choice.get("delta") or {}).get("tool_calls") or ()):
                function = call.get("function") or {}
                self.call(
                    index, call.get("index", number), call.get("id"), function.get("name"), function.get("arguments")
                )
            if choice.get("finish_reason"):
                self.reasons[index] = choice["finish_reason"]
        # Some servers send no `[DONE]`, and some clients stop reading before it.
        if len(self.reasons) >= self.choices:
            self.answer.is_whole = True

    def take_head(self, body: Any) -> None:
        """Read what stands in every body and event."""
        usage = body.get("usage") or {}
        self.answer.error = error_in(body) or self.answer.error
        self.answer.response_id = body.get("id") or self.answer.response_id
        self.answer.model = body.get("model") or self.answer.model
        self.answer.input_tokens = usage.get("prompt_tokens", self.answer.input_tokens)
        self.answer.output_tokens = usage.get("completion_tokens", self.answer.output_tokens)

    def message_of(self, choice: Any) -> Message:
        """Return the message of a choice."""
        return dict(choice["message"])

    def text_of(self, choice: Any) -> object:
        """Return a piece of a choice's text."""
        return (choice.get("delta") or {}).get("content")


class Completions(Chat):
    """OpenAI completions."""

    def message_of(self, choice: Any) -> Message:
        return message(choice["text"], [])

    def text_of(self, choice: Any) -> object:
        return choice.get("text")


class Responses(Reader):
    """OpenAI Responses."""

    def __init__(self, choices: int) -> None:
        super().__init__(choices)
        self.items: list[Any] = []
        """Output items that are complete."""

    def take_body(self, body: Any) -> None:
        usage = body.get("usage") or {}
        answer = self.answer
        answer.error = error_in(body)
        answer.response_id, answer.model = body.get("id"), body.get("model")
        answer.input_tokens, answer.output_tokens = usage.get("input_tokens"), usage.get("output_tokens")
        self.items = body.get("output") or self.items
        answer.finish_reasons = [(body.get("incomplete_details") or {}).get("reason") or body.get("status")]
        self.put_items("")

    def take_event(self, event: Any) -> None:
        kind = event["type"]
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            self.answer.is_whole = True
            self.texts.clear()
            self.take_body(event["response"])
        elif kind == "response.created":
            self.answer.response_id, self.answer.model = event["response"].get("id"), event["response"].get("model")
        elif kind == "response.output_text.delta":
            self.say(event.get("output_index", 0), event["delta"])
        elif kind == "response.output_item.done":
            self.items.append(event["item"])
            self.texts.pop(event.get("output_index", 0), None)
        elif kind == "error":
            self.answer.error = error_in({"error": event.get("error") or event})

    def conclude(self) -> None:
        if not self.answer.messages:
            self.put_items("".join(piece for index in sorted(self.texts) for piece in self.texts[index]))

    def put_items(self, rest: str) -> None:
        """Make one message of the output items and of text that belongs to none yet."""
        text, calls = [], []
        for item in self.items:
            if item["type"] == "message":
                text += [part.get("text") or part.get("refusal") or "" for part in item["content"]]
            elif "call_id" in item and "name" in item:
                calls.append(tool_call(item["call_id"], item["name"], item.get("arguments") or item.get("input") or ""))
        if text or calls or rest:
            self.answer.messages = [message("".join([*text, rest]), calls)]


class Messages(Reader):
    """Anthropic messages."""

    def take_body(self, body: Any) -> None:
        self.take_head(body)
        for index, block in enumerate(body["content"]):
            self.start(index, block)
        self.reasons[0] = body.get("stop_reason")
        self.conclude()

    def take_event(self, event: Any) -> None:
        kind = event["type"]
        if kind == "message_start":
            self.take_head(event["message"])
        elif kind == "content_block_start":
            self.start(event["index"], event["content_block"])
        elif kind == "content_block_delta":
            delta = event["delta"]
            self.say(0, delta.get("text"))
            if delta.get("type") == "input_json_delta":
                self.call(0, event["index"], None, None, delta["partial_json"])
        elif kind == "message_delta":
            self.reasons[0] = event["delta"].get("stop_reason") or self.reasons.get(0)
            self.take_usage(event.get("usage") or {})
            # Only `message_stop` follows, which some clients (litellm) do not wait for.
            self.answer.is_whole = self.reasons[0] is not None
        elif kind == "error":
            self.answer.error = error_in(event)

    def take_head(self, body: Any) -> None:
        """Read what a message begins with."""
        self.answer.error = error_in(body)
        self.answer.response_id, self.answer.model = body.get("id"), body.get("model")
        self.take_usage(body.get("usage") or {})

    def take_usage(self, usage: Any) -> None:
        """Read the counts that are there."""
        self.answer.input_tokens = usage.get("input_tokens", self.answer.input_tokens)
        self.answer.output_tokens = usage.get("output_tokens", self.answer.output_tokens)

    def start(self, index: int, block: Any) -> None:
        """Read a content block, or its beginning."""
        if block["type"] == "text":
            self.say(0, block["text"])
        elif block["type"] == "tool_use":
            given = block.get("input")
            self.call(0, index, block["id"], block["name"], msgspec.json.encode(given).decode() if given else "")


READERS: dict[Dialect, type[Reader]] = {
    "chat": Chat,
    "completions": Completions,
    "responses": Responses,
    "messages": Messages,
}


def message(text: str, calls: list[Message]) -> Message:
    """Return an assistant's chat message."""
    said: Message = {"role": "assistant", "content": text or None}
    return {**said, "tool_calls": calls} if calls else said


def tool_call(call_id: str | None, name: str, arguments: str) -> Message:
    """Return a tool call as chat messages hold it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def error_in(body: Any) -> str | None:
    """Return the message of a body's error, if it has one."""
    error = body.get("error") if isinstance(body, dict) else None
    if not error:
        return None
    return str(error.get("message") or error) if isinstance(error, dict) else str(error)
