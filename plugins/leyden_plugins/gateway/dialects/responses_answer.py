"""Spell a Responses answer: one JSON body, or the ordered events that the official clients put it together from.

The trap: clients index what they have built so far by `output_index` and `content_index`, so an item must be added
before its first delta, and nothing may come between the events of one item.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from leyden.interfaces import Delta, GenerationRequest
from leyden_plugins.gateway.dialects import Answer, ChoiceSoFar, Decode
from leyden_plugins.gateway.dialects.responses_items import Remembered
from leyden_plugins.gateway.dialects.spelling import error_body, event, function_of, token_logprobs
from leyden_plugins.gateway.memory import Memory
from leyden_plugins.gateway.refusal import Refusal

Json = dict[str, object]


@dataclass(kw_only=True)
class ResponsesQuestion:
    """One Responses request, and how far its answer has been told."""

    request: GenerationRequest
    stream: bool
    settings: Mapping[str, object]
    """What every body repeats of the request."""
    added: Sequence[Mapping[str, object]]
    """The messages of this request's own input."""
    previous: Remembered | None
    memory: Memory | None
    """Where the answer is kept; `None` when the client wants it forgotten."""
    wants_token_ids: bool
    decode: Decode | None
    """Set when log-probabilities were asked for."""
    _told: Answer | None = field(default=None, init=False)
    """The answer whose stream has begun."""
    _sequence: int = field(default=0, init=False)
    _message_is_open: bool = field(default=False, init=False)

    # ---- one JSON body -----------------------------------------------------------------------------------------

    def answer(self, answer: Answer) -> bytes:
        """Spell the complete answer."""
        return msgspec.json.encode(self.finished(answer))

    def finished(self, answer: Answer) -> Json:
        """Return the body of a complete answer, and remember it."""
        (choice,) = answer.choices
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        output = self.output(answer, choice, status)
        prompt, sampled = len(answer.prompt_token_ids), answer.sampled
        body = self.body(answer, status, output) | {
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": sampled,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + sampled,
            }
        }
        if status == "incomplete":
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        if self.memory is not None:
            self.remember(self.memory, body, choice, output)
        if self.wants_token_ids:
            body |= {"prompt_token_ids": answer.prompt_token_ids, "token_ids": choice.token_ids}
        return body

    def remember(self, memory: Memory, body: Json, choice: ChoiceSoFar, output: Sequence[Json]) -> None:
        """Keep an answer, for those who go on from it."""
        messages = [memory.shared(message) for message in (*self.added, choice.spoken)]
        memory.put(str(body["id"]), Remembered(messages=messages, previous=self.previous, body=dict(body)))
        for item in output:
            memory.put(str(item["id"]), item)

    def body(self, answer: Answer, status: str, output: Sequence[Json]) -> Json:
        """Return a response object."""
        return {
            "id": f"resp_{answer.answer_id}",
            "object": "response",
            "created_at": answer.created_seconds,
            "status": status,
            "error": None,
            "incomplete_details": None,
            **self.settings,
            "output": output,
            "usage": None,
        }

    def output(self, answer: Answer, choice: ChoiceSoFar, status: str) -> list[Json]:
        """Return the items of an answer: its text, unless it only calls functions, then its calls."""
        text = "".join(choice.text)
        items: list[Json] = []
        if text or not choice.tool_calls:
            logprobs = token_logprobs(choice.token_ids, choice.logprobs, self.decode)
            items.append(self.message(answer, status, [text_part(text, logprobs)]))
        for index, call in enumerate(choice.tool_calls):
            items.append(function_call(f"fc_{answer.answer_id}_{index}", call, status))
        return items

    def message(self, answer: Answer, status: str, content: Sequence[Json]) -> Json:
        """Return the message item of an answer."""
        return {
            "id": f"msg_{answer.answer_id}",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    # ---- events ------------------------------------------------------------------------------------------------

    def event(self, kind: str, **fields: object) -> bytes:
        """Return the next event."""
        value = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event(value, kind)

    def first(self, answer: Answer) -> bytes:
        """Spell that the answer has begun."""
        self._told = answer
        body = self.body(answer, "in_progress", [])
        return self.event("response.created", response=body) + self.event("response.in_progress", response=body)

    def chunk(self, answer: Answer, delta: Delta) -> bytes:
        """Spell a piece of text. Calls wait for the end, because an answer's text is its first item."""
        # Tokens without text open no message: the answer may turn out to be calls alone.
        if not delta.text and not (self._message_is_open and self.decode is not None and delta.token_ids):
            return b""
        opening = b"" if self._message_is_open else self.open_message(answer)
        logprobs = token_logprobs(delta.token_ids, delta.logprobs, self.decode)
        return opening + self.text_event(answer, "delta", delta=delta.text, logprobs=logprobs)

    def last(self, answer: Answer) -> bytes:
        """Spell the ends of the items, the calls, and the whole response once more."""
        body = self.finished(answer)
        status = str(body["status"])
        (choice,) = answer.choices
        items = self.output(answer, choice, status)
        events: list[bytes] = []
        if items[0]["type"] == "message":
            events.append(self.close_message(answer, status, choice))
        for index, item in enumerate(items):
            if item["type"] == "function_call":
                events.append(self.call_events(index, item))
        return b"".join(events) + self.event(f"response.{status}", response=body)

    def open_message(self, answer: Answer) -> bytes:
        """Spell the beginning of the text."""
        self._message_is_open = True
        item = self.message(answer, "in_progress", [])
        added = self.event("response.output_item.added", output_index=0, item=item)
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        return added + self.event("response.content_part.added", **place, part=text_part("", []))

    def close_message(self, answer: Answer, status: str, choice: ChoiceSoFar) -> bytes:
        """Spell the end of the text; an answer without any has an empty one."""
        opening = b"" if self._message_is_open else self.open_message(answer)
        text = "".join(choice.text)
        logprobs = token_logprobs(choice.token_ids, choice.logprobs, self.decode)
        part = text_part(text, logprobs)
        item = self.message(answer, status, [part])
        return (
            opening
            + self.text_event(answer, "done", text=text, logprobs=logprobs)
            + self.event("response.content_part.done", item_id=item["id"], output_index=0, content_index=0, part=part)
            + self.event("response.output_item.done", output_index=0, item=item)
        )

    def text_event(self, answer: Answer, what: str, **fields: object) -> bytes:
        """Return an event of the text."""
        item_id = f"msg_{answer.answer_id}"
        return self.event(f"response.output_text.{what}", item_id=item_id, output_index=0, content_index=0, **fields)

    def call_events(self, index: int, item: Json) -> bytes:
        """Spell a whole function call."""
        place = {"item_id": item["id"], "output_index": index}
        begun = item | {"arguments": "", "status": "in_progress"}
        arguments = item["arguments"]
        return (
            self.event("response.output_item.added", output_index=index, item=begun)
            + self.event("response.function_call_arguments.delta", **place, delta=arguments)
            + self.event("response.function_call_arguments.done", **place, name=item["name"], arguments=arguments)
            + self.event("response.output_item.done", output_index=index, item=item)
        )

    def error_event(self, refusal: Refusal) -> bytes:
        """Spell a failure as OpenAI does: the error, which clients raise, then the failed response."""
        error = error_body(refusal)["error"]
        said = self.event("error", code=refusal.code, message=refusal.message, param=refusal.param, error=error)
        if self._told is None:
            return said
        body = self.body(self._told, "failed", []) | {"error": {"code": "server_error", "message": refusal.message}}
        return said + self.event("response.failed", response=body)


def text_part(text: str, logprobs: Sequence[Json]) -> Json:
    """Return a message's text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def function_call(item_id: str, call: Mapping[str, object], status: str) -> Json:
    """Return the item of a chat tool call."""
    function = function_of(call)
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": call["id"],
        "name": function["name"],
        "arguments": function["arguments"],
    }
