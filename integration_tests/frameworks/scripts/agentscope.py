"""What the roles of `apps/agentscope.py` say."""

from __future__ import annotations

from integration_tests.frameworks.story import ROLLOUT_TAG, Ask, Say, text_of


def answer(ask: Ask) -> Say:
    """Say what comes next, by the conversation so far."""
    if ask.role == "planner":
        task = ROLLOUT_TAG.search(" ".join(map(text_of, ask.messages)))
        is_first = not any(message.get("role") == "tool" for message in ask.messages)
        if "TeamAssign" in ask.tools and is_first and task:
            return Say(tool_calls=(("TeamAssign", {"member": "worker", "prompt": f"{task[0]} answer"}),))
        return Say(text="search north and south")
    said = [text_of(message) for message in ask.messages if message.get("role") == "assistant"]
    if ask.role == "critic":
        return Say(text="APPROVE" if any("REVISE" in text for text in said) else "REVISE the draft")
    if not any("found" in text_of(message) for message in ask.messages if message.get("role") == "tool"):
        return Say(tool_calls=(("search", {"query": "north"}), ("search", {"query": "south"})))
    return Say(text="second draft" if any("first draft" in text for text in said) else "first draft")
