"""Beam search along textual gradients: ProTeGi (Pryzant et al. 2023, arXiv 2305.03495), the method of APO.

A "gradient" is a critique, in words, of a prompt that has failed on a few tasks; an edit is a step against it. Each
round every prompt of the beam gets `branch_factor` critiques and edits, and the best `beam_width` prompts, old and new,
make the next beam.

Two things differ from the paper: candidates are compared on all selection tasks, where it spends its budget on a
bandit's choice of them, and no edit is paraphrased once more. Agent Lightning's APO leaves the same two out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from leyden.errors import ConfigurationError
from leyden_plugins.algorithms.prompt.algorithm import PromptSearch
from leyden_plugins.algorithms.prompt.record import Candidate
from leyden_plugins.algorithms.prompt.reflection import Message
from leyden_plugins.algorithms.prompt.search import Search, Tried
from leyden_plugins.algorithms.prompt.showing import Example, calls_of, examples

CRITIQUE = """\
This is the system prompt of {role}:
```
{prompt}
```

This is what happened under it on some tasks:

{examples}

Write a critique of the prompt: which of its words, or which missing ones, led to what went wrong? Name every fact \
about the task that these examples show and the prompt does not say. Write a short list, one finding a line, and \
nothing else; do not write a new prompt."""

EDIT = """\
This is the system prompt of {role}:
```
{prompt}
```

This is a critique of it, from what happened under it on some tasks:

{critique}

Write the prompt anew so that the critique no longer applies. Keep what it does not criticise. Answer with the whole \
new prompt within ``` blocks, and nothing else."""


@dataclass(frozen=True)
class Branch:
    """One way on from a prompt."""

    parent: Candidate
    role: str
    examples: Sequence[Example]

    @property
    def prompt(self) -> str:
        """Return what is to be improved."""
        return self.parent.prompts[self.role]


@dataclass(frozen=True, kw_only=True)
class BeamSearch(PromptSearch):
    """Beam search along textual gradients, as Agent Lightning's APO does it; of several roles, one a branch in turn."""

    minibatch: int = 4
    """Feedback tasks that a critique is made from."""
    beam_width: int = 4
    """Prompts that a round goes on from."""
    branch_factor: int = 4
    """Critiques, and so new prompts, of each of them."""
    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("beam_width", "branch_factor", "rounds"):
            if getattr(self, option) < 1:
                raise ConfigurationError(f"BeamSearch: {option}={getattr(self, option)!r} must be at least 1")

    async def improve(self, search: Search) -> None:
        """Go through the rounds."""
        draw = random.Random(f"{self.seed}/beam")
        beam = list(search.record.candidates[:1])
        turn = 0
        for _ in range(self.rounds):
            drawn: list[tuple[Candidate, Sequence[int]]] = []
            for parent in beam:
                for _ in range(self.branch_factor):
                    count = min(self.minibatch, len(search.split.feedback))
                    drawn.append((parent, sorted(draw.sample(list(search.split.feedback), count))))
            tried = await search.evaluate([(parent.prompts, tasks) for parent, tasks in drawn])
            branches = []
            for (parent, _), found in zip(drawn, tried, strict=True):
                if (branch := self._branch(parent, found, list(search.seeds), turn)) is not None:
                    branches.append(branch)
                turn += 1
            children = await self._children(search, branches)
            beam = self._best([*beam, *await self._compared(search, children)])

    def _branch(self, parent: Candidate, tried: Sequence[Tried], roles: Sequence[str], turn: int) -> Branch | None:
        """Return the branch of the role whose turn it is, among those that spoke; none where nothing went wrong."""
        wrong = [one.records for one in tried if self.perfect is None or one.score < self.perfect]
        spoke = [role for role in roles if any(calls_of(one, role) for one in wrong)]
        if not spoke:
            return None
        role = spoke[turn % len(spoke)]
        return Branch(parent, role, examples(wrong, role))

    async def _children(self, search: Search, branches: Sequence[Branch]) -> list[tuple[dict[str, str], list[int]]]:
        """Return new prompts with their parents' numbers."""
        critiques = await search.reflect([self._question(CRITIQUE, one, list(search.seeds)) for one in branches])
        criticised = [(one, text) for one, text in zip(branches, critiques, strict=True) if text is not None]
        edits = await search.reflect(
            [self._question(EDIT, one, list(search.seeds), critique=text) for one, text in criticised]
        )
        children = []
        for (one, _), answer in zip(criticised, edits, strict=True):
            text = "" if answer is None else prompt_in(answer)
            if text and text != one.prompt:
                children.append(({**one.parent.prompts, one.role: text}, [one.parent.number]))
        return children

    async def _compared(self, search: Search, children: Sequence[tuple[dict[str, str], list[int]]]) -> list[Candidate]:
        """Compare as many of them as the budget has room for, which ends the search if it has none for all.

        Raises:
            SearchOver: the budget is spent.
        """
        affordable, left = [], search.left
        for child in children:
            left -= search.cost(child[0], search.split.selection)
            if left >= 0:
                affordable.append(child)
        found = await search.compare(affordable)
        if len(affordable) < len(children):
            await search.compare(children)  # which says that the budget is spent
        return found

    def _best(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        different = {one.number: one for one in candidates}
        return sorted(different.values(), key=lambda one: (-one.score, one.number))[: self.beam_width]

    def _question(self, form: str, branch: Branch, roles: Sequence[str], *, critique: str = "") -> Sequence[Message]:
        among = f" in an application with the roles {list(roles)!r}" if len(roles) > 1 else ""
        shown = "\n\n".join(
            f"## Example {number}\n" + "\n".join(f"### {heading}\n{text}" for heading, text in one.items())
            for number, one in enumerate(branch.examples, 1)
        )
        text = form.format(
            role=f"the role {branch.role!r}{among}", prompt=branch.prompt, examples=shown, critique=critique
        )
        return [{"role": "user", "content": "\n\n".join(part for part in (text, self.hints) if part)}]


def prompt_in(answer: str) -> str:
    """Return the text between an answer's first and last fence; all of it where there is none."""
    _, fence, rest = answer.partition("```")
    if not fence:
        return answer.strip()
    inside, last, _ = rest.rpartition("```")
    inside = inside if last else rest
    first, _, others = inside.partition("\n")
    is_language = first.strip().isalpha() or not first.strip()
    return (others if is_language else inside).strip()
