"""A model server on this machine, so that the example runs offline, in seconds and always alike.

`desk` does exactly what its system prompt says, so it is as good as its prompt. `editor` improves prompts: it reads
what a role answered and what would have been right, and adds one sentence; one time in five it breaks the prompt
instead, as models do.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from examples import chat_server
from examples.chat_server import Messages
from examples.prompts.letters import APOLOGY, QUEUES, Task

EDITOR = "editor"
TICKET_RULE = "Give the ticket number."
APOLOGY_RULE = "Say that we are sorry."
THREAT_RULE = "Escalate when the letter mentions a lawyer."


def queue_rule(topic: str) -> str:
    """Return the sentence that makes the sorter know a topic."""
    return f"Letters about a {topic} belong to {QUEUES[topic]}."


def desk(system: str, user: str) -> str:
    """Answer as one of the three roles, which the system prompt's first words tell."""
    letter = user.partition("Letter: ")[2]
    if system.startswith("You sort"):
        return next((QUEUES[one] for one in QUEUES if one in letter and queue_rule(one) in system), "GENERAL")
    if system.startswith("You answer"):
        ticket = user.partition("Ticket: ")[2].partition("\n")[0]
        told = ["Thank you for your letter."]
        told += [f"We are {APOLOGY}."] if APOLOGY_RULE in system else []
        told += [f"Your ticket is {ticket}."] if TICKET_RULE in system else []
        return " ".join(told)
    if system.startswith("You look"):
        return "ESCALATE" if "lawyer" in letter and THREAT_RULE in system else "SEND"
    return "I do not know what to do."


def editor(question: str) -> str:
    """Return a prompt with one more sentence, between fences."""
    prompt = question.partition("```\n")[2].partition("\n```")[0]
    tasks = [json.loads(line) for line in question.splitlines() if line.startswith('{"letter"')]
    answers = re.findall(r"^answer: (.*)$", question, re.MULTILINE)
    wanted = {
        rule
        for task, answer in zip(tasks, answers, strict=False)
        for rule in missing(prompt, task, answer)
        if rule not in prompt
    }
    chance = int(hashlib.sha256(question.encode()).hexdigest()[:8], 16)
    if chance % 5 == 0:
        return "```\nYou are a helpful poet.\n```"
    added = [sorted(wanted)[chance % len(wanted)]] if wanted else []
    return "\n".join(["This will do better:", "```", prompt, *added, "```"])


def missing(prompt: str, task: Task, answer: str) -> list[str]:
    """Return the sentences for want of which a role answered wrongly."""
    if prompt.startswith("You sort"):
        topic = next(one for one in QUEUES if one in task["letter"])
        return [] if answer == task["queue"] else [queue_rule(topic)]
    if prompt.startswith("You look"):
        return [] if answer == task["verdict"] else [THREAT_RULE]
    rules = {TICKET_RULE: task["ticket"], APOLOGY_RULE: APOLOGY}
    return [rule for rule, sign in rules.items() if sign not in answer]


def answer(model: str, messages: Messages) -> str:
    """Answer as either model."""
    if model == EDITOR:
        return editor(messages[-1]["content"])
    return desk(messages[0]["content"], messages[-1]["content"])


@contextmanager
def serving() -> Iterator[str]:
    """Serve both models on a free port of this machine for the length of the block; yield the address."""
    with chat_server.serving(answer) as address:
        yield address
