"""A shop's counter before the order desk of `examples/two_policies`: three speakers, of which one is a closed model.

    sentence -> front -> good -> router -> department -> clerk -> shelf

`front` is somebody else's model, which only its instructions can change; `router` and `clerk` share a small open one,
which can be trained. A plain app with the `openai` client; only the names of its speakers are given.
"""

import functools

from openai import AsyncOpenAI

import leyden
from examples.two_policies.desk import GOODS, ask_model, find, shelf_of

FRONT = "You take orders at a counter. Answer with the good that the customer wants, in one word."
GERMAN = (
    "Seil", "Anker", "Segel", "Boje", "Rechen", "Schlauch", "Samen", "Spaten", "Säge", "Bohrer", "Nagel", "Zwinge",
    "Pfanne", "Messer", "Schale", "Sieb", "Stift", "Tinte", "Karte", "Leim", "Drachen", "Ball", "Kreisel", "Puppe",
)  # fmt: skip


@functools.cache
def client() -> AsyncOpenAI:
    """Return the client of the closed model, at OPENAI_BASE_URL."""
    return AsyncOpenAI()


async def front(sentence: str) -> str:
    """Ask which good a customer wants."""
    messages = [{"role": "system", "content": FRONT}, {"role": "user", "content": sentence}]
    with leyden.role("front"):
        reply = await client().chat.completions.create(model="closed-model", messages=messages)  # type: ignore[arg-type]
    return reply.choices[0].message.content or ""


async def solve(task: dict[str, str]) -> float:
    """Serve one customer; right or wrong."""
    good = await front(task["sentence"])
    return float(await find(good, ask_model) == shelf_of(task["good"]))


def tasks(*wordings: str) -> list[dict[str, str]]:
    """Return every good in every wording; `{good}`, `{goods}`, `{gut}` are its name, plural and German name."""
    return [
        {"good": good, "sentence": wording.format(good=good, goods=f"{good}s", gut=GERMAN[number])}
        for wording in wordings
        for number, good in enumerate(GOODS)
    ]


TASKS = tasks("a {good}", "two {goods}", "bitte {gut}")
HELD_OUT = tasks("please bring one {good}", "I need some {goods}", "ich suche {gut}")
