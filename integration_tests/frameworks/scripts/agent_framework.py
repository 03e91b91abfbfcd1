"""What the roles of `apps/agent_framework.py` say."""

from __future__ import annotations

from integration_tests.frameworks.story import Ask, Say, text_of


def answer(ask: Ask) -> Say:
    """Say what comes next, by the conversation so far."""
    if ask.role == "planner":
        return Say(tool_calls=(("handoff_to_worker", {}),))
    if ask.role == "critic":
        is_second = "second draft" in text_of(ask.messages[-1])
        return Say(text="APPROVE" if is_second else "REVISE the draft")
    if any("REVISE" in text_of(message) for message in ask.messages):
        return Say(text="second draft")
    if any(message.get("role") == "tool" for message in ask.messages):
        return Say(text="first draft")
    return Say(tool_calls=(("search", {"query": "north"}), ("search", {"query": "south"})))
