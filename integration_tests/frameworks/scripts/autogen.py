"""What planner, worker and critic of the AutoGen app say."""

from __future__ import annotations

from integration_tests.frameworks.story import Ask, Say


def answer(ask: Ask) -> Say:
    """Answer for one of the three roles."""
    if ask.role == "planner":
        return Say(tool_calls=(("transfer_to_worker", {}),))
    if ask.role == "critic":
        is_second = "second draft" in str(ask.messages[-1]["content"])
        return Say(text="APPROVE" if is_second else "REVISE: count again.")
    if "REVISE" in str(ask.messages[-1]["content"]):
        return Say(text=f"The second draft for {ask.rollout}: eight rooms.")
    if any(message["role"] == "tool" for message in ask.messages):
        return Say(text=f"The first draft for {ask.rollout}: seven rooms.")
    searches = tuple(("search", {"query": f"{part} of {ask.rollout}"}) for part in ("plan", "rooms"))
    return Say(text="I will search.", tool_calls=searches)
