"""What the run's store keeps of a search for prompts: the tree of candidates, and what it has cost.

It is kept for people: a resumed search does not read it but makes it again.
"""

from __future__ import annotations

import msgspec

SEARCHES = "prompts/searches"
"""Note: the steps that have searched, as a JSON list."""


def note_of(step: int) -> str:
    """Return the name of the note that holds a step's record."""
    return f"prompts/{step}"


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts of all roles that were compared on the selection tasks."""

    number: int
    """0 is what the roles said before."""
    parents: list[int]
    changed: list[str]
    """Roles whose prompt differs from the first parent's."""
    prompts: dict[str, str]
    scores: list[float]
    """On the selection tasks, in their order."""
    rollouts: int
    """That the search had spent by then."""

    @property
    def score(self) -> float:
        """Return the mean."""
        return sum(self.scores) / len(self.scores)


class SearchRecord(msgspec.Struct, kw_only=True):
    """A search, as far as it is."""

    step: int
    method: str
    feedback: list[int]
    """Indices of the tasks that candidates were improved on."""
    selection: list[int]
    """Indices of the tasks that they were compared on."""
    budget: int
    rollouts: int = 0
    """Different ones it has looked at; those it found in the store are counted as well."""
    unrewarded: int = 0
    """Of these, how many had no reward and counted as 0."""
    rejected: int = 0
    """Proposals that were no better than their parent on a few tasks."""
    reflection_calls: int = 0
    reflection_tokens: int = 0
    """Asked and answered, as far as the model told them."""
    reflection_errors: int = 0
    last_error: str | None = None
    candidates: list[Candidate] = []
    ended: str | None = None
    """Why; `None` while it goes on."""
    winner: int | None = None
    """Whose prompts are in force; 0: no candidate was better than what the roles said before."""

    @property
    def best(self) -> Candidate:
        """Return the candidate with the highest score; of equal ones the earliest, so that a tie keeps the seed."""
        return max(self.candidates, key=lambda one: (one.score, -one.number))
