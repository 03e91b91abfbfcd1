"""What the roles of `apps/crewai.py` say."""

from __future__ import annotations

from integration_tests.frameworks.story import Ask, Say, text_of


def answer(ask: Ask) -> Say:
    """Say what comes next, by the conversation so far."""
    text = " ".join(map(text_of, ask.messages))
    results = [text_of(message) for message in ask.messages if message.get("role") == "tool"]
    if ask.role == "planner":
        if results:
            return Say(text=results[-1])
        work = {"coworker": "worker", "task": f"[[rollout={ask.rollout}]] Count the rooms.", "context": "a first draft"}
        return Say(tool_calls=(("delegate_work_to_coworker", work),))
    if ask.role == "critic":
        return Say(text="APPROVE" if "second draft" in text else "REVISE the draft")
    if not results:
        return Say(tool_calls=(("search", {"query": "north"}), ("search", {"query": "south"})))
    return Say(text="second draft" if "REVISE" in text else "first draft")
