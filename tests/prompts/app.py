"""The example's desk as an app of plain HTTP calls; run as a program, it searches until it is done or killed.

python -m tests.prompts.app BASE_URL RUN_FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

import leyden
from examples.prompts import letters, model
from leyden_plugins.algorithms.prompt import GEPA, Reflection
from tests.prompts.desk import SEEDS

client = httpx.Client(trust_env=False)


def ask(base_url: str, role: str, question: str) -> str:
    """Ask as a role does."""
    messages = [{"role": "system", "content": SEEDS[role]}, {"role": "user", "content": question}]
    with leyden.role(role):
        reply = client.post(f"{base_url}/chat/completions", json={"model": "desk", "messages": messages})
    reply.raise_for_status()
    return str(reply.json()["choices"][0]["message"]["content"])


def desk(base_url: str) -> Callable[[letters.Task], Mapping[str, float]]:
    """Return the agent."""

    def solve(task: letters.Task) -> Mapping[str, float]:
        letter, ticket = task["letter"], task["ticket"]
        state = {"queue": ask(base_url, "sorter", f"Letter: {letter}")}
        state["reply"] = ask(base_url, "writer", f"Ticket: {ticket}\nQueue: {state['queue']}\nLetter: {letter}")
        state["verdict"] = ask(base_url, "checker", f"Letter: {letter}\nReply: {state['reply']}")
        return letters.score(task, state, None)

    return solve


def trainer(base_url: str, run: Path, *, budget: int = 80, **options: object) -> leyden.Trainer:
    """Return a trainer that improves all three prompts, which it reads from rollouts."""
    reflection = Reflection(model.EDITOR, base_url=base_url, api_key_env=None)
    defaults: dict[str, object] = {
        "algorithm": GEPA(reflection=reflection, budget=budget),
        "tasks": letters.draw(16, seed=0),
        "prompts": list(SEEDS),
        "run": run,
        "sinks": (),
        "workers": 0,
    }
    return leyden.Trainer(desk(base_url), **{**defaults, **options})  # type: ignore[arg-type]  # the caller's options


if __name__ == "__main__":
    with trainer(sys.argv[1], Path(sys.argv[2])) as searching:
        searching.fit()
