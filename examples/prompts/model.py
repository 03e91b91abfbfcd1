"""A model server on this machine, so that the example runs offline, in seconds and always alike.

`desk` does exactly what its system prompt says, so it is as good as its prompt. `editor` improves prompts: it reads
what a role answered and what would have been right, and adds one sentence; one time in five it breaks the prompt
instead, as models do.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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


class Handler(BaseHTTPRequestHandler):
    """Answers OpenAI's chat requests."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answer one."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        messages: list[dict[str, Any]] = body["messages"]
        if body["model"] == EDITOR:
            text = editor(messages[-1]["content"])
        else:
            text = desk(messages[0]["content"], messages[-1]["content"])
        words = sum(len(one["content"].split()) for one in messages)
        answer = {
            "id": "chat",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": words, "completion_tokens": len(text.split()), "total_tokens": 0},
        }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Takes many connections at once: a search asks from many rollouts."""

    request_queue_size = 256
    daemon_threads = True


@contextmanager
def serving() -> Iterator[str]:
    """Serve both models on a free port of this machine for the length of the block; yield the address."""
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
