"""Compare what Leyden recorded of a run with what is known of it independently.

One idea: who really spoke, and in which episode, stands in the prompts; what was really sampled stands in the engine's
own log. Completions are matched to that log by their tokens alone, so that no id which an adapter gave is believed.
One trap: a count of 0 means nothing where there was nothing to count; the exact numbers of calls, tools and handoffs
of every episode are part of the contract.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from integration_tests.frameworks.story import ROLE_TAG, ROLLOUT_TAG

USER_KEY = "user-key"
TOOL_USER = {"search": "worker"}
"""Tool -> the only role that has it."""
COLUMNS = ("wrong_role", "wrong_rollout", "wrong_parent", "misrouted", "open_spans", "token_mismatches")

Json = Mapping[str, Any]


@dataclass
class Verdict:
    """What was wrong with one mode of one framework."""

    framework: str
    version: str
    mode: str
    calls: int = 0
    """Model calls of all episodes, by the endpoints' own count."""
    counts: Counter[str] = field(default_factory=Counter)
    """Of each of `COLUMNS`."""
    faults: list[str] = field(default_factory=list)
    """Everything that was wrong, in words; what fits no column stands here alone."""

    def blame(self, column: str | None, fault: str) -> None:
        """Note something that is wrong."""
        if column is not None:
            self.counts[column] += 1
        self.faults.append(f"{column or 'episode'}: {fault}")

    def row(self) -> dict[str, object]:
        """Return the verdict as a row of the table of compatibility."""
        counts = {column: self.counts[column] for column in COLUMNS}
        return {"framework": self.framework, "version": self.version, "mode": self.mode, "calls": self.calls, **counts}


def judge(run: Json) -> Verdict:
    """Return what is wrong with what `drive` wrote down."""
    verdict = Verdict(run["framework"], run["version"], run["mode"])
    server: Json = run["server"]
    verdict.calls = len(server["gateway"]) + len(server["user"])
    if not run["episodes"]:
        verdict.blame(None, "no episode was run")
    spans = {each["rollout"]: {span["span_id"]: span for span in each["spans"]} for each in run["episodes"]}
    for failure in server["failures"]:
        verdict.blame(None, f"the script could not answer: {failure}")
    check_routes(verdict, server, set(run["trained"]))
    check_tokens(verdict, server, spans)
    check_untrained_calls(verdict, server, spans)
    said: dict[str, set[str]] = defaultdict(set)
    for each in server["said"]:
        said[each["rollout"]].add(each["text"].strip())
    for episode in run["episodes"]:
        check_episode(verdict, episode, run["expected"], said[episode["rollout"]])
        for span in episode["spans"]:
            check_span(verdict, span, spans[episode["rollout"]])
    return verdict


def check_routes(verdict: Verdict, server: Json, trained: set[str]) -> None:
    """Each request must have gone to the endpoint of its role, with a key that belongs there."""
    for arrived in server["user"]:
        who = f"{arrived['role']!r} of {arrived['rollout']!r}"
        if arrived["role"] in trained:
            verdict.blame("misrouted", f"{who} reached the user's endpoint")
        if arrived["key"] != USER_KEY or arrived["headers"]:
            verdict.blame("misrouted", f"{who} brought something of Leyden's to the user's endpoint: {arrived!r}")
    owners = {token: rollout for rollout, token in server["tokens"].items()}
    for arrived in server["gateway"]:
        who = f"{arrived['role']!r} of {arrived['rollout']!r}"
        if arrived["role"] not in trained:
            verdict.blame("misrouted", f"{who} reached the gateway")
        owner = owners.get(arrived["key"])
        if owner is None:
            verdict.blame("misrouted", f"{who} came to the gateway with a key that is not the gateway's")
        elif owner != arrived["rollout"]:
            verdict.blame("wrong_rollout", f"{who} used the key of {owner!r}")


def check_tokens(verdict: Verdict, server: Json, spans: Mapping[str, Mapping[str, Json]]) -> None:
    """Each answer of the engine must be one completion, token for token, under the right names."""
    left: dict[object, list[Json]] = defaultdict(list)
    for completion in server["completions"]:
        choices = completion["choices"]
        key = fingerprint(
            completion["prompt_token_ids"], [c["token_ids"] for c in choices], [c["logprobs"] for c in choices]
        )
        left[key].append(completion)
    for made in server["made"]:
        who = f"{made['role']!r} of {made['rollout']!r}"
        same = left[fingerprint(made["prompt_token_ids"], made["token_ids"], made["logprobs"])]
        if not same:
            verdict.blame("token_mismatches", f"no completion holds what the engine made for {who}: {made['text']!r}")
            continue
        # Equal ones (a retry) may belong to anybody of that prompt; the best fit is not blamed for the others.
        found = max(same, key=lambda each: (each["rollout_id"] == made["rollout"], each["role"] == made["role"]))
        same.remove(found)
        if made["aborted"] or found["status"] != "ok" or not found["delivered"]:
            verdict.blame("token_mismatches", f"the answer to {who} was not delivered: {found['error']!r}")
        check_completion(verdict, made, found, spans)
    for completion in (each for same in left.values() for each in same):
        verdict.blame(
            "token_mismatches",
            f"the engine made no such tokens as a completion of {completion['role']!r} in {completion['rollout_id']!r} "
            f"holds ({completion['status']}, {completion['error']!r})",
        )


def fingerprint(prompt: Sequence[int], tokens: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> object:
    """Return what identifies an answer by its tokens."""
    return tuple(prompt), tuple(map(tuple, tokens)), tuple(map(tuple, logprobs))


def check_completion(verdict: Verdict, made: Json, found: Json, spans: Mapping[str, Mapping[str, Json]]) -> None:
    """A completion and the span it names must be of the role and rollout that the prompt names."""
    who = f"{made['role']!r} of {made['rollout']!r}"
    if found["role"] != made["role"]:
        verdict.blame("wrong_role", f"the completion of {who} says {found['role']!r}")
    if found["rollout_id"] != made["rollout"]:
        verdict.blame("wrong_rollout", f"the completion of {who} says {found['rollout_id']!r}")
    span = spans.get(made["rollout"], {}).get(found["span_id"])
    if span is None or span["kind"] != "model_call":
        verdict.blame("wrong_parent", f"the completion of {who} names {'no' if span is None else 'another'} span")
        return
    if span["role"] != made["role"]:
        verdict.blame("wrong_role", f"the span of {who} says {span['role']!r}")
    heard = heard_text(span)
    if heard is not None and heard.strip() not in made["text"]:
        verdict.blame("token_mismatches", f"{who} heard {heard!r} instead of {made['text']!r}")


def heard_text(span: Json) -> str | None:
    """Return the text that a model call's span says it got; `None` where it says nothing."""
    messages = span["attributes"].get("gen_ai.output.messages")
    if not messages or not isinstance(messages[0], Mapping):
        return None
    content = messages[0].get("content")
    return content if isinstance(content, str) else None


def check_untrained_calls(verdict: Verdict, server: Json, spans: Mapping[str, Mapping[str, Json]]) -> None:
    """Each request at the user's endpoint must be one span of its role and rollout."""
    arrived = Counter((each["rollout"], each["role"]) for each in server["user"])
    ours = {completion["span_id"] for completion in server["completions"]}
    recorded: Counter[tuple[str, str]] = Counter()
    for rollout, of_rollout in spans.items():
        for span in of_rollout.values():
            if span["kind"] == "model_call" and span["span_id"] not in ours:
                recorded[rollout, span["role"]] += 1
                prompt = str(span["attributes"].get("gen_ai.input.messages") or "")
                if ROLLOUT_TAG.findall(prompt)[-1:] not in ([], [rollout]):
                    verdict.blame("wrong_rollout", f"a span of {rollout!r} holds a prompt of another")
                if set(ROLE_TAG.findall(prompt)) - {span["role"]}:
                    verdict.blame("wrong_role", f"a span of {span['role']!r} in {rollout!r} holds another's prompt")
    for key in sorted(arrived.keys() | recorded.keys()):
        if arrived[key] != recorded[key]:
            rollout, role = key
            verdict.blame(
                "wrong_role",
                f"{role!r} of {rollout!r} asked the user's endpoint {arrived[key]} times; spans say {recorded[key]}",
            )


def check_episode(verdict: Verdict, episode: Json, expected: Json, said: set[str]) -> None:
    """An episode must have ended well, with exactly its calls, tools and handoffs, and with a text that was said."""
    rollout = episode["rollout"]
    if episode["error"] is not None:
        verdict.blame(None, f"{rollout!r} failed: {episode['error']}")
    elif episode["answer"].strip() not in said:
        verdict.blame("token_mismatches", f"{rollout!r} returned what nobody said: {episode['answer']!r}")
    if episode["unheard"] is not None:
        verdict.blame("token_mismatches", f"an answer did not reach {rollout!r} whole: {episode['unheard']}")
    for span in episode["spans"]:
        if span["status"] == "abandoned":
            verdict.blame("open_spans", f"{span['kind']} {span['name']!r} of {rollout!r} was left open")
        elif span["status"] != "ok":
            verdict.blame(
                None, f"{span['kind']} {span['name']!r} of {rollout!r} ended {span['status']}: {span['error']}"
            )
    undeclared = set(expected["calls"]) - set(episode["declared"])
    if undeclared:
        verdict.blame(None, f"the roles {sorted(undeclared)} of {rollout!r} were not declared")
    for what, found in counted(episode["spans"]).items():
        if found != Counter(expected[what]):
            verdict.blame(None, f"{rollout!r} has {what} {dict(found)!r} instead of {dict(expected[what])!r}")


def counted(spans: Sequence[Json]) -> dict[str, Counter[str]]:
    """Count model calls by role, tools by name, and handoffs by both ends."""
    of_kind: dict[str, list[Json]] = defaultdict(list)
    for span in spans:
        of_kind[span["kind"]].append(span)
    return {
        "calls": Counter(span["role"] for span in of_kind["model_call"]),
        "tools": Counter(tool_name(span) for span in of_kind["tool"]),
        "handoffs": Counter(
            f"{span['role']}->{span['attributes']['leyden.handoff.to']}" for span in of_kind["handoff"]
        ),
    }


def tool_name(span: Json) -> str:
    """Return the name of a tool span's tool."""
    return str(span["attributes"].get("gen_ai.tool.name", span["name"]))


def check_span(verdict: Verdict, span: Json, spans: Mapping[str, Json]) -> None:
    """A model call hangs below an agent of its role, a tool below the agent that has it, all below one root."""
    who = f"{span['kind']} {span['name']!r} of {span['role']!r} in {span['rollout_id']!r}"
    chain = list(ancestors(span, spans))
    if span["kind"] == "rollout":
        return
    if not chain or chain[-1]["kind"] != "rollout":
        verdict.blame("wrong_parent", f"{who} does not hang below its rollout")
    elif span["kind"] == "model_call" and (chain[0]["kind"], chain[0]["role"]) != ("agent", span["role"]):
        verdict.blame("wrong_parent", f"{who} hangs below {chain[0]['kind']} {chain[0]['role']!r}")
    elif span["kind"] == "tool":
        user = TOOL_USER.get(tool_name(span), span["role"])
        agent = next((each for each in chain if each["kind"] == "agent"), None)
        if agent is None or agent["role"] != user:
            verdict.blame("wrong_parent", f"{who} hangs below the agent {agent and agent['role']!r}, not {user!r}")


def ancestors(span: Json, spans: Mapping[str, Json]) -> Iterator[Json]:
    """Yield a span's parent, its parent, and so on."""
    seen = {span["span_id"]}
    while span["parent_id"] in spans and span["parent_id"] not in seen:
        span = spans[span["parent_id"]]
        seen.add(span["span_id"])
        yield span
