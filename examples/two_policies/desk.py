"""An order desk of two agents: the router names the department of a good, the clerk its shelf.

    good -> router -> department -> clerk -> shelf

A plain app with the `openai` client; only the names of its two speakers are given with `leyden.role`. The clerk sees
what the router said, and answers `?` when it is asked for a good that its department does not have: an order is right
only when both are.
"""

import functools
from collections.abc import Awaitable, Callable

from openai import AsyncOpenAI

import leyden

DEPARTMENTS = ("marine", "garden", "tools", "kitchen", "paper", "toys")
GOODS = (
    "rope", "anchor", "sail", "buoy", "rake", "hose", "seed", "spade", "saw", "drill", "nail", "clamp",
    "pan", "knife", "bowl", "sieve", "pen", "ink", "card", "glue", "kite", "ball", "top", "doll",
)  # fmt: skip
SHELVES = tuple(f"{row}{number}" for row in "abcdef" for number in range(4))
NO_SUCH_GOOD = "?"

Ask = Callable[[str, str], Awaitable[str]]
"""(role, question) -> answer."""


def department_of(good: str) -> str:
    """Return the department that has a good."""
    return DEPARTMENTS[GOODS.index(good) // 4]


def shelf_of(good: str) -> str:
    """Return the shelf that a good lies on; next to each other in the list is not next to each other on shelves."""
    return SHELVES[(GOODS.index(good) * 7 + 3) % len(SHELVES)]


async def find(good: str, ask: Ask) -> str:
    """Return the shelf that the desk names."""
    department = await ask("router", good)
    return await ask("clerk", f"{department} {good}")


@functools.cache
def client() -> AsyncOpenAI:
    """Return the client, made on the first use."""
    return AsyncOpenAI(api_key="not-needed", base_url="http://127.0.0.1:9/v1")


async def ask_model(role: str, question: str) -> str:
    """Ask a role's model."""
    with leyden.role(role):
        reply = await client().chat.completions.create(
            model="desk", messages=[{"role": "user", "content": f"{role} {question}"}], max_tokens=4
        )
    return reply.choices[0].message.content or ""


async def solve(task: dict[str, str]) -> float:
    """Answer one order; right or wrong."""
    return float(await find(task["good"], ask_model) == shelf_of(task["good"]))


TASKS = [{"good": good} for good in GOODS]
