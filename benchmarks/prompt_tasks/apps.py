"""The app whose prompts are improved, on the plain `openai` client: the same code in every arm and in the evaluation.

A role's prompt is the system message of its calls. `as_role` is how an arm is told who speaks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from openai import AsyncOpenAI

from benchmarks.prompt_tasks.problem import Message, Problem, Task


def nobody(role: str) -> AbstractContextManager[object]:
    """Tell nobody who speaks."""
    return nullcontext()


async def run(
    problem: Problem,
    task: Task,
    prompts: Mapping[str, str],
    client: AsyncOpenAI,
    as_role: Callable[[str], AbstractContextManager[object]] = nobody,
) -> float:
    """Run the app on a task under these prompts; return its score."""

    async def ask(role: str, messages: Sequence[Message], tools: Sequence[Message] = ()) -> Message:
        request = {
            "model": f"{problem.name}/{role}",
            "messages": [{"role": "system", "content": prompts[role]}, *messages],
            **({"tools": list(tools)} if tools else {}),
        }
        with as_role(role):
            reply = await client.chat.completions.create(**request)  # type: ignore[call-overload]  # JSON as it is sent
        found: Message = reply.choices[0].message.model_dump(exclude_none=True)
        return found

    return await problem.solve(task, ask)
