"""The model that rewrites prompts: it finds wrong answers in what it is sent, and adds the rule for one of them.

It reads any request that holds a prompt and what came of it: gepa's, and the critiques and edits of a textual
gradient. A prompt is known by its opening line, so a request shows it before anything else that begins like it.
Three mutations in ten damage the prompt: two take a rule away, one throws all of it away. Of a critique and its edit,
only the edit does damage, so that every method suffers it once a mutation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.prompt_tasks.problem import Problem, digest

FOUND = "Missing rule: "
"""Begins a line of a critique."""


@dataclass(frozen=True)
class Prompt:
    """A prompt in a request, and whose it is."""

    role: str
    opening: str
    rules: list[str]

    @property
    def text(self) -> str:
        """Return it as it is sent to the role's model."""
        return "\n".join([self.opening, *self.rules])


def lost(role: str) -> str:
    """Return a prompt of which nothing is left but whose it is."""
    return f"You are a poet by the name of {role}."


def prompt_in(problem: Problem, request: str) -> Prompt | None:
    """Return the first prompt in a request: an opening, and the rules that follow it line by line."""
    lines = [re.sub(r"^[\s`>#*-]+", "", line).strip() for line in request.splitlines()]
    for number, line in enumerate(lines):
        role = next((role for role, opening in problem.openings.items() if line in (opening, lost(role))), None)
        if role is None:
            continue
        known = {rule for rules in problem.rules.values() for rule in rules}
        rules: list[str] = []
        for following in lines[number + 1 :]:
            if following not in known:
                break
            rules.append(following)
        return Prompt(role, line, rules)
    return None


def answer(problem: Problem, request: str, seed: object) -> str:
    """Return a critique, an edited prompt, or gepa's instruction in a fence; `seed` decides what is up to chance."""
    prompt = prompt_in(problem, request)
    if prompt is None:
        return "There is no prompt here that I know."
    if is_edit(request):
        return mutated(problem, prompt, critique_in(request), seed).text
    lines = [line for line in problem.missing(prompt.role, request) if line not in prompt.rules]
    picked = [lines[digest("pick", seed) % len(lines)]] if lines else []
    if is_critique(request):
        return "\n".join(f"- {FOUND}{line}" for line in picked) or "- It looks right as it is."
    return f"Here is the new instruction.\n```\n{mutated(problem, prompt, picked, seed).text}\n```"


def is_edit(request: str) -> bool:
    """Say whether a prompt is to be revised by a critique that is in the request."""
    return FOUND in request or "It looks right as it is." in request


def is_critique(request: str) -> bool:
    """Say whether what is asked for is a critique only."""
    return "critique" in request.lower()


def critique_in(request: str) -> list[str]:
    """Return the rules that a critique asks for."""
    return [line.strip() for line in re.findall(rf"{FOUND}(.+)", request)]


def mutated(problem: Problem, prompt: Prompt, added: list[str], seed: object) -> Prompt:
    """Return the prompt with rules added; in three of ten cases damaged."""
    opening = problem.openings[prompt.role]
    rules = list(dict.fromkeys([*prompt.rules, *added]))
    chance = digest("damage", seed) % 10
    if chance == 0:
        return Prompt(prompt.role, lost(prompt.role), [])
    if chance in (1, 2) and rules:
        rules.pop(digest("drop", seed) % len(rules))
    return Prompt(prompt.role, opening, rules)
