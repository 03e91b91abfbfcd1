"""The contract app in plain `openai`: three functions that call a model, and a loop.

No framework says who speaks, so this app alone names Leyden: `with leyden.role(...)` around each agent's work and
`with leyden.tool(...)` around each tool's. Planner and worker speak chat completions, the critic speaks Responses.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import AsyncOpenAI, OpenAI

import leyden

MODES = ("async", "async-stream", "sync", "sync-stream")
SHARED = True
CALLS = {"planner": 1, "worker": 3, "critic": 2}
TOOLS = {"search": 2}
HANDOFFS: dict[str, int] = {}

MODEL = "user-model"

SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search the library.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}

PROMPTS = {
    "planner": "[[role=planner]] Make a plan.",
    "worker": "[[role=worker]] Search, then answer.",
    "critic": "[[role=critic]] Say APPROVE or REVISE.",
}

Message = dict[str, Any]


def begin(role: str, *texts: str) -> list[Message]:
    """Return a new conversation."""
    return [{"role": "system", "content": PROMPTS[role]}, *({"role": "user", "content": text} for text in texts)]


def joined(chunks: Iterable[Any]) -> Message:
    """Return the message that a stream's chunks make."""
    text, calls = "", {}
    for delta in (chunk.choices[0].delta for chunk in chunks if chunk.choices):
        text += delta.content or ""
        for piece in delta.tool_calls or ():
            empty = {"id": piece.id, "type": "function", "function": {"name": "", "arguments": ""}}
            function = calls.setdefault(piece.index, empty)["function"]
            function["name"] += piece.function.name or ""
            function["arguments"] += piece.function.arguments or ""
    made: Message = {"role": "assistant", "content": text}
    return {**made, "tool_calls": list(calls.values())} if calls else made


def message_of(completion: Any) -> Message:
    """Return the message of a completion."""
    made: Message = completion.choices[0].message.model_dump(exclude_none=True)
    return made


def search(call: Message) -> Message:
    """Run the tool that the worker asked for."""
    arguments = call["function"]["arguments"]
    named = {"gen_ai.tool.call.id": call["id"], "gen_ai.tool.call.arguments": arguments}
    with leyden.tool("search", **named) as span:
        found = f"found {json.loads(arguments)['query']}"
        if span is not None:
            span.attributes["gen_ai.tool.call.result"] = found
    return {"role": "tool", "tool_call_id": call["id"], "content": found}


def build(base_url: str, *, stream: bool, sync: bool) -> Callable[[str], object]:
    """Return the episode: a task in, the worker's last answer out."""
    options: dict[str, Any] = {"base_url": base_url, "api_key": "user-key", "max_retries": 1}
    return sync_app(OpenAI(**options), stream) if sync else async_app(AsyncOpenAI(**options), stream)


def async_app(client: AsyncOpenAI, stream: bool) -> Callable[[str], object]:
    """Return the async episode; one client serves all."""

    async def ask(messages: list[Message], **options: Any) -> Message:
        made: Any = await client.chat.completions.create(model=MODEL, messages=messages, stream=stream, **options)  # type: ignore[call-overload]
        return joined([chunk async for chunk in made]) if stream else message_of(made)

    async def judge(task: str, answer: str) -> str:
        asked: dict[str, Any] = {"instructions": PROMPTS["critic"], "input": f"{task}\nAnswer: {answer}"}
        made: Any = await client.responses.create(model=MODEL, stream=stream, **asked)
        if not stream:
            return str(made.output_text)
        return "".join([event.delta async for event in made if event.type == "response.output_text.delta"])

    async def work(messages: list[Message]) -> str:
        while True:
            answer = await ask(messages, tools=[SEARCH])
            if "tool_calls" not in answer:
                return str(answer["content"])
            results = await asyncio.gather(*(asyncio.to_thread(search, call) for call in answer["tool_calls"]))
            messages += [answer, *results]

    async def episode(task: str) -> str:
        with leyden.role("planner"):
            plan = await ask(begin("planner", task))
        with leyden.role("worker"):
            draft = await work(begin("worker", task, plan["content"]))
        while True:
            with leyden.role("critic"):
                review = await judge(task, draft)
            if "APPROVE" in review:
                return draft
            with leyden.role("worker"):
                draft = await work(begin("worker", task, draft, review))

    return episode


def sync_app(client: OpenAI, stream: bool) -> Callable[[str], object]:
    """Return the blocking episode; one client serves all threads."""

    def ask(messages: list[Message], **options: Any) -> Message:
        made: Any = client.chat.completions.create(model=MODEL, messages=messages, stream=stream, **options)  # type: ignore[call-overload]
        return joined(made) if stream else message_of(made)

    def judge(task: str, answer: str) -> str:
        asked: dict[str, Any] = {"instructions": PROMPTS["critic"], "input": f"{task}\nAnswer: {answer}"}
        made: Any = client.responses.create(model=MODEL, stream=stream, **asked)
        if not stream:
            return str(made.output_text)
        return "".join(event.delta for event in made if event.type == "response.output_text.delta")

    def work(messages: list[Message]) -> str:
        while True:
            answer = ask(messages, tools=[SEARCH])
            if "tool_calls" not in answer:
                return str(answer["content"])
            with ThreadPoolExecutor() as pool:
                running = [pool.submit(contextvars.copy_context().run, search, call) for call in answer["tool_calls"]]
                messages += [answer, *(each.result() for each in running)]

    def episode(task: str) -> str:
        with leyden.role("planner"):
            plan = ask(begin("planner", task))
        with leyden.role("worker"):
            draft = work(begin("worker", task, plan["content"]))
        while True:
            with leyden.role("critic"):
                review = judge(task, draft)
            if "APPROVE" in review:
                return draft
            with leyden.role("worker"):
                draft = work(begin("worker", task, draft, review))

    return episode
