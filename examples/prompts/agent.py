"""A support desk of three roles: a plain LangGraph app on the `openai` client. It knows nothing of Leyden.

    sorter -> writer -> checker

The model is whatever OPENAI_BASE_URL and OPENAI_API_KEY point at.
"""

import functools
from typing import TypedDict

from langgraph.graph import END, START, StateGraph
from openai import OpenAI

MODEL = "desk"
SORTER = "You sort letters to a shop. Answer with the name of the queue that a letter belongs to, or GENERAL."
WRITER = "You answer letters to a shop. Write a short reply to the customer."
CHECKER = "You look at replies before they are sent. Answer SEND, or ESCALATE if a person must decide."


class State(TypedDict, total=False):
    """The graph's state; `letter` and `ticket` are its input."""

    letter: str
    ticket: str
    queue: str
    reply: str
    verdict: str


@functools.cache
def client() -> OpenAI:
    """Return the client, made on the first use: importing this module needs no key."""
    return OpenAI()


def ask(prompt: str, question: str) -> str:
    """Return the model's answer."""
    messages = [{"role": "system", "content": prompt}, {"role": "user", "content": question}]
    answer = client().chat.completions.create(model=MODEL, messages=messages)  # type: ignore[arg-type]  # plain dicts
    return answer.choices[0].message.content or ""


def sorter(state: State) -> State:
    """Choose a queue."""
    return {"queue": ask(SORTER, f"Letter: {state['letter']}")}


def writer(state: State) -> State:
    """Write a reply."""
    return {"reply": ask(WRITER, f"Ticket: {state['ticket']}\nQueue: {state['queue']}\nLetter: {state['letter']}")}


def checker(state: State) -> State:
    """Decide whether it may be sent."""
    return {"verdict": ask(CHECKER, f"Letter: {state['letter']}\nReply: {state['reply']}")}


def build():  # type: ignore[no-untyped-def]  # LangGraph's type has four parameters
    """Return the compiled graph."""
    graph = StateGraph(State)
    for name, node in (("sorter", sorter), ("writer", writer), ("checker", checker)):
        graph.add_node(name, node)
    graph.add_edge(START, "sorter")
    graph.add_edge("sorter", "writer")
    graph.add_edge("writer", "checker")
    graph.add_edge("checker", END)
    return graph.compile()


graph = build()
