"""What the roles of `apps/openai.py` say."""

from __future__ import annotations

from integration_tests.frameworks.story import Ask, Say, text_of


def answer(ask: Ask) -> Say:
    """Say what comes next, by the conversation so far."""
    if ask.role == "planner":
        return Say(text=f"Plan for {ask.rollout}: search twice, then count.")
    if ask.role == "critic":
        is_second = "second draft" in text_of(ask.messages[-1])
        return Say(text="APPROVE" if is_second else "REVISE: count again.")
    if any("REVISE" in text_of(message) for message in ask.messages):
        return Say(text=f"The second draft for {ask.rollout}: eight rooms.")
    if any(message["role"] == "tool" for message in ask.messages):
        return Say(text=f"The first draft for {ask.rollout}: seven rooms.")
    searches = tuple(("search", {"query": f"{part} of {ask.rollout}"}) for part in ("plan", "rooms"))
    return Say(tool_calls=searches)
