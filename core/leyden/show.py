"""A rollout as text for the terminal: who spoke, how long, how many tokens, what came of it.

Everything an agent wrote is untrusted: control characters are made visible, so that no text can move the cursor,
colour the screen or hide what stands before it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from leyden.calltree import CallTree, Forked, call_trees, fork_counts
from leyden.interfaces import RolloutRecords
from leyden.spans import Completion, Fork, Kind, Reward, Rollout, Status
from leyden.spantree import Message, Node, answer_of, as_text, attributes_of, nodes, prompt_of, token_counts
from leyden.tokentree import Node as TokenNode

SHORT_LINES = 6
"""Lines of a text that are shown unless all is asked for."""
SHORT_CHARACTERS = 160

_BOLD, _DIM, _RED, _GREEN, _YELLOW, _CYAN = "1", "2", "31", "32", "33", "36"


@dataclass(frozen=True, kw_only=True)
class _Paint:
    """Writes ANSI colours, or nothing."""

    is_on: bool

    def __call__(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.is_on and text else text


def span_tree(
    records: RolloutRecords, *, text: bool = True, all_text: bool = False, tokens: bool = False, color: bool = False
) -> str:
    """Return a rollout's span tree.

    Args:
        records: of one rollout.
        text: show prompts and answers, shortened.
        all_text: show them whole.
        tokens: show token ids and log-probabilities.
        color: use ANSI colours.
    """
    paint = _Paint(is_on=color)
    lines = _header(records.rollout, paint)
    roots = [reward for reward in records.rewards if reward.target_span is None]
    if roots:
        lines.append("rewards: " + ", ".join(_reward(reward) for reward in roots))
    for node in nodes(records):
        lines += _node_lines(node, paint, text=text or all_text, whole=all_text, tokens=tokens)
    spans = {span.span_id for span in records.spans}
    lines += [
        f"completion without a span: {_completion(one)}" for one in records.completions if one.span_id not in spans
    ]
    return "\n".join(lines)


def token_trees(records: RolloutRecords, *, color: bool = False) -> str:
    """Return the merged token tree of each policy: what each part was sampled by, and where prompts forked.

    A part that only one other follows stands right above it; where several follow, each is a branch.
    """
    paint = _Paint(is_on=color)
    lines: list[str] = []
    for found in call_trees(records):
        own = [one for one in records.completions if one.policy == found.policy]
        forks = [f"{count} {cause}" for cause, count in fork_counts(own).items() if count]
        lines.append(
            f"policy {paint(_BOLD, printable(found.policy))}: {found.calls} calls, {found.tokens} tokens in the tree, "
            f"{found.tokens_by_call} in one row a call" + (f", forks: {', '.join(forks)}" if forks else "")
        )
        stack = [(found.tree.root, "", "")]
        while stack:
            node, first, rest = stack.pop()
            if node.parent is not None:
                lines += [
                    paint(_DIM, first) + _part_title(found, node, paint),
                    *(paint(_DIM, rest) + "  " + _forked(one, paint) for one in found.forks.get(id(node), ())),
                ]
            children = sorted(node.children.values(), key=lambda one: one.token_ids[0], reverse=True)
            for index, child in enumerate(children):
                if len(children) == 1:
                    stack.append((child, rest, rest))
                else:
                    is_last = index == 0
                    stack.append((child, rest + ("└─ " if is_last else "├─ "), rest + ("   " if is_last else "│  ")))
    return "\n".join(lines) or "no call of this rollout has tokens"


def fork_line(fork: Fork) -> str:
    """Say in one line where and why a prompt forked, with the texts around the break."""
    before, expected, found = (
        '"' + printable(text).replace("\n", "\\n").replace("\t", "\\t") + '"'
        for text in (fork.before, fork.expected, fork.found)
    )
    return (
        f"fork ({fork.cause.value}) from call {printable(fork.span_id)} after {fork.position} tokens: "
        f"behind {before} it had {expected}, this prompt has {found}"
    )


def printable(text: str) -> str:
    """Return `text` with control and direction characters spelled out; tabs and newlines stay."""
    # Cs: a lone surrogate cannot be written to a terminal at all.
    return "".join(
        one if one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cf", "Cs") else _spelled(one) for one in text
    )


def one_line(value: object, width: int) -> str:
    """Return a value on one line of at most `width` characters."""
    text = " ".join(printable(as_text(value)).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def task_text(task: object) -> str:
    """Return what a reader wants of a task: its first text, for a mapping with one, else its JSON."""
    if isinstance(task, dict):
        for name in ("question", "prompt", "input", "task", "query", "text", "instruction", "problem"):
            if isinstance(task.get(name), str) and task[name]:
                return str(task[name])
    return as_text(task)


def program() -> str:
    """Return what starts this environment's `leyden` from here, in commands that people copy."""
    ours, found = Path(sys.executable).with_name("leyden"), shutil.which("leyden")
    if not ours.exists():
        return f"{shlex.quote(sys.executable)} -m leyden.cli"
    if found is not None and os.path.samefile(found, ours):
        return "leyden"
    # `leyden resume` has gone into the folder that the run was started from; the reader's shell may be elsewhere.
    here = Path.cwd()
    is_near = ours.is_relative_to(here) and os.environ.get("PWD", str(here)) == str(here)
    return shlex.quote(str(ours.relative_to(here) if is_near else ours))


def seconds(ns: int) -> str:
    """Return a duration for people."""
    ms = ns / 1e6
    if ms < 1000:
        return f"{ms:.1f} ms" if ms < 10 else f"{ms:.0f} ms"
    return f"{ms / 1000:.2f} s" if ms < 60_000 else f"{int(ms // 60_000)} min {ms % 60_000 / 1000:.0f} s"


def _spelled(one: str) -> str:
    return f"\\x{ord(one):02x}" if ord(one) < 256 else f"\\u{ord(one):04x}"


def _header(rollout: Rollout, paint: _Paint) -> list[str]:
    good = rollout.state == "succeeded"
    facts = [
        paint(_BOLD, printable(rollout.rollout_id)),
        rollout.mode.value,
        f"step {rollout.step}",
        paint(_GREEN if good else _RED, rollout.state.value),
        "no reward" if rollout.reward is None else f"reward {rollout.reward:g}",
    ]
    if rollout.ended_ns and rollout.started_ns:
        facts.append(seconds(rollout.ended_ns - rollout.started_ns))
    if rollout.attempt > 1:
        facts.append(f"attempt {rollout.attempt}")
    facts += [f"{printable(name)} v{version}" for name, version in sorted(rollout.versions.items())]
    lines = [" · ".join(facts), "task: " + one_line(task_text(rollout.task), 500)]
    if rollout.output is not None:
        lines.append("output: " + one_line(rollout.output, 500))
    if rollout.error_type or rollout.error:
        lines.append(paint(_RED, f"{rollout.error_type or 'error'}: {one_line(rollout.error or '', 500)}"))
    return lines


def _node_lines(node: Node, paint: _Paint, *, text: bool, whole: bool, tokens: bool) -> list[str]:
    before = "".join("   " if last else "│  " for last in node.last_S[1:-1])
    branch = "" if node.depth == 0 else ("└─ " if node.last_S[-1] else "├─ ")
    below = before + ("" if node.depth == 0 else "   " if node.last_S[-1] else "│  ")
    lines = [paint(_DIM, before + branch) + _title(node, paint)]
    details: list[str] = []
    if node.span.error:
        details.append(paint(_RED, f"! {one_line(node.span.error, 500)}"))
    details += [paint(_YELLOW, fork_line(one.fork)) for one in node.completions if one.fork is not None]
    if text:
        details += _text_lines(node, paint, whole=whole)
    if tokens:
        details += [line for one in node.completions for line in _token_lines(one)]
    return lines + [paint(_DIM, below) + "   " + detail for detail in details]


def _title(node: Node, paint: _Paint) -> str:
    span = node.span
    name = "" if span.name == span.kind.value else f" {paint(_BOLD, one_line(span.name, 80))}"
    parts = [f"{span.kind.value}{name}", paint(_CYAN, one_line(span.role, 40))]
    if span.kind not in (Kind.REWARD, Kind.MESSAGE, Kind.EVENT):
        parts.append(seconds(span.end_ns - span.start_ns))
    counts = token_counts(node)
    if counts:
        parts.append(f"{counts[0]} + {counts[1]} tokens")
    if node.completions:
        last = node.completions[-1]
        parts.append(f"{printable(last.policy)} v{last.version}")
        parts += [choice.finish_reason for choice in last.choices if choice.finish_reason != "stop"]
        if last.spliced:
            parts.append(f"goes on exactly from {last.spliced} tokens")
        if len(node.completions) > 1:
            parts.append(f"{len(node.completions)} HTTP attempts")
        if last.off_distribution:
            parts.append("off-distribution")
        if not last.delivered:
            parts.append(paint(_RED, "not delivered"))
    if span.status is not Status.OK:
        parts.append(paint(_RED, span.status.value))
    parts += [_reward(reward) for reward in node.rewards]
    return " · ".join(parts)


def _text_lines(node: Node, paint: _Paint, *, whole: bool) -> list[str]:
    if node.span.kind is Kind.MODEL_CALL:
        asked = prompt_of(node.span)
        # Without --text the last message is what changed since the call before.
        shown = asked if whole else asked[-1:]
        lines = [line for one in shown for line in _message_lines(">", one, whole)]
        return lines + [paint(_GREEN, line) for one in answer_of(node) for line in _message_lines("<", one, whole)]
    return [
        f"{name} = {one_line(value, 2000 if whole else SHORT_CHARACTERS)}" for name, value in attributes_of(node.span)
    ]


def _message_lines(mark: str, message: Message, whole: bool) -> list[str]:
    lines = printable(message.text).splitlines() or [""]
    if not whole:
        cut = [line if len(line) <= SHORT_CHARACTERS else line[: SHORT_CHARACTERS - 1] + "…" for line in lines]
        lines = cut[:SHORT_LINES] + ([f"… {len(cut) - SHORT_LINES} more lines"] if len(cut) > SHORT_LINES else [])
    speaker = f"{printable(message.role)}: " if message.role and mark == ">" else ""
    return [f"{mark} {speaker}{lines[0]}", *(f"  {line}" for line in lines[1:])]


def _part_title(tree: CallTree, node: TokenNode, paint: _Paint) -> str:
    """Return a part's length and what sampled it."""
    said: list[str] = []
    for one in tree.sampled.get(id(node), ()):
        choice = one.completion.choices[one.choice]
        number = f" choice {choice.index}" if len(one.completion.choices) > 1 else ""
        note = "" if one.completion.delivered else ", not delivered"
        text = f" {one_line(choice.text, 40)!r}" if one.is_end and choice.text else ""
        who = paint(_CYAN, f"{one_line(one.completion.role, 40)} {one.turn}")
        said.append(f"{who} (call {printable(one.completion.span_id)}{number}{note}){text}")
    length = f"{len(node.token_ids)} token" + ("" if len(node.token_ids) == 1 else "s")
    return f"{length} sampled by {', '.join(said)}" if said else length


def _forked(one: Forked, paint: _Paint) -> str:
    return paint(_YELLOW, f"{one_line(one.role, 40)} {one.turn}: {fork_line(one.fork)}")


def _token_lines(completion: Completion) -> list[str]:
    lines = [f"prompt token ids: {' '.join(map(str, completion.prompt_token_ids))}"]
    for choice in completion.choices:
        sampled = " ".join(
            f"{token}({logprob:.3f})" for token, logprob in zip(choice.token_ids, choice.logprobs, strict=False)
        )
        lines.append(f"choice {choice.index}, token id (log-probability): {sampled}")
    return lines


def _completion(completion: Completion) -> str:
    sampled = sum(len(choice.token_ids) for choice in completion.choices)
    return (
        f"{one_line(completion.role, 40)} · {printable(completion.policy)} v{completion.version} · "
        f"{len(completion.prompt_token_ids)} + {sampled} tokens · {completion.status.value}"
    )


def _reward(reward: Reward) -> str:
    target = f" ({one_line(reward.target_role, 40)})" if reward.target_role else ""
    index = f" [{reward.index}]" if reward.index else ""
    return f"{one_line(reward.name, 40)}{index} {reward.value:g}{target}"
