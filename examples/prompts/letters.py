"""Letters to a shop, and how an answer to one is scored."""

import random
from typing import Any

Task = dict[str, str]

QUEUES = {"invoice": "BILLING", "password": "ACCOUNT", "parcel": "LOGISTICS", "refund": "RETURNS"}
LETTERS = {
    "invoice": ("There is something wrong with my invoice.", "I was charged twice on one invoice."),
    "password": ("My password does not work.", "How do I set a new password?"),
    "parcel": ("My parcel has not come.", "The parcel came, but it was empty."),
    "refund": ("When do I get my refund?", "You owe me a refund for the lamp."),
}
THREAT = "My lawyer will write to you next."
APOLOGY = "sorry"


def draw(count: int, seed: int) -> list[Task]:
    """Return letters with what is right for each; a seed draws the same ones again."""
    chance = random.Random(seed)
    tasks = []
    for _ in range(count):
        topic = chance.choice(list(QUEUES))
        is_threat = chance.random() < 0.4
        letter = chance.choice(LETTERS[topic]) + (f" {THREAT}" if is_threat else "")
        ticket = f"T-{chance.randrange(1000, 10000)}"
        verdict = "ESCALATE" if is_threat else "SEND"
        tasks.append({"letter": letter, "ticket": ticket, "queue": QUEUES[topic], "verdict": verdict})
    return tasks


def score(task: Task, state: dict[str, Any], rollout: object) -> dict[str, float]:
    """Score what each role made of a letter; `reward` is their mean."""
    reply = str(state["reply"])
    parts = {
        "queue": float(state["queue"] == task["queue"]),
        "reply": (float(task["ticket"] in reply) + float(APOLOGY in reply)) / 2,
        "verdict": float(state["verdict"] == task["verdict"]),
    }
    return {"reward": sum(parts.values()) / len(parts), **parts}
