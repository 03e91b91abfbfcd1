"""All calls of a rollout and policy as one token tree: what each part was sampled by, and where prompts forked.

One idea: calls merge on exact token prefixes whoever made them (roles in turn, branches, retries, sub-agents, parallel
calls), so what stands twice in this tree is what a prompt did not repeat exactly.
One trap: a part of the tree is what *some* call sampled; other calls pass through it as context.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from leyden.credit import turns
from leyden.interfaces import RolloutRecords
from leyden.spans import Completion, Fork, ForkCause
from leyden.tokentree import Node, TokenTree, path


@dataclass(frozen=True, kw_only=True)
class SampledBy:
    """One choice of a call, as the source of a part of the tree."""

    completion: Completion
    choice: int
    """Position in its choices."""
    turn: int
    """Which call of its role in this rollout it is, from 0, as credit counts them: HTTP attempts of a call share it."""
    is_end: bool
    """The choice ends with this part."""


@dataclass(frozen=True, kw_only=True)
class Forked:
    """A prompt that leaves an earlier call here."""

    role: str
    turn: int
    fork: Fork


@dataclass(kw_only=True)
class CallTree:
    """The calls of one policy in one rollout."""

    policy: str
    tree: TokenTree = field(default_factory=TokenTree)
    calls: int = 0
    tokens_by_call: int = 0
    """In one row a choice: its prompt and its answer."""
    sampled: dict[int, list[SampledBy]] = field(default_factory=lambda: defaultdict(list))
    """`id` of a node -> what sampled it; nothing for context."""
    forks: dict[int, list[Forked]] = field(default_factory=lambda: defaultdict(list))
    """`id` of a node -> the prompts that fork where it begins."""

    @property
    def tokens(self) -> int:
        """How many tokens the tree holds."""
        return sum(len(node.token_ids) for node in self.tree.walk())


def call_trees(records: RolloutRecords) -> list[CallTree]:
    """Return a tree a policy, by name, of the latest attempt; calls without an answer are left out."""
    turn_of = turns(records)
    found: dict[str, CallTree] = {}
    ends: list[tuple[CallTree, Completion, int, Node, list[Node]]] = []
    for completion in sorted(records.completions, key=lambda one: (one.start_ns, one.sequence)):
        if completion.attempt != records.rollout.attempt or not completion.choices:
            continue
        tree = found.setdefault(completion.policy, CallTree(policy=completion.policy))
        tree.calls += 1
        asked = tree.tree.insert(completion.prompt_token_ids)
        answers = [tree.tree.insert([*completion.prompt_token_ids, *one.token_ids]) for one in completion.choices]
        tree.tokens_by_call += sum(
            len(completion.prompt_token_ids) + len(choice.token_ids) for choice in completion.choices
        )
        ends.append((tree, completion, turn_of[completion.span_id].number, asked, answers))
    # Later calls split the nodes of earlier ones, so that what belongs to whom is read off the finished tree.
    for tree, completion, turn, asked, answers in ends:
        length = len(completion.prompt_token_ids)
        for index, answer in enumerate(answers):
            for node in path(answer):
                if node.start >= length:
                    by = SampledBy(completion=completion, choice=index, turn=turn, is_end=node is answer)
                    tree.sampled[id(node)].append(by)
        if completion.fork is not None:
            position = completion.fork.position
            at = next((node for node in path(asked) if node.end > position), asked)
            tree.forks[id(at)].append(Forked(role=completion.role, turn=turn, fork=completion.fork))
    return [found[policy] for policy in sorted(found)]


def fork_counts(completions: Iterable[Completion]) -> dict[str, int]:
    """Count the forks of a rollout's or a step's calls by cause: `template`, `tokenisation` and `edit`, zeros too."""
    counts = Counter(completion.fork.cause for completion in completions if completion.fork is not None)
    return {cause.value: counts[cause] for cause in ForkCause}
