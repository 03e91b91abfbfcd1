"""Demonstrations: the calls of a policy's roles as transitions to imitate, whoever answered them.

One idea: a call without token ids gets a completion that is made from its span, so that admission, credit and turns are
those of the MDP builder. Such a completion is off-distribution and its transition marked `is_retokenised`.
One trap: these transitions say nothing of what the policy would have done. RL asks for `mdp.transitions`, which takes a
policy's own completions only; nothing made here is ever stored, so nothing made here can get there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from leyden import mdp
from leyden.conversations import asked_messages, chat_messages, function_tools
from leyden.credit import Credit, broadcast
from leyden.errors import ConfigurationError, DatasetError
from leyden.interfaces import GenerationRequest, RolloutRecords, Transition
from leyden.roles import Policy, matches
from leyden.spans import FINISHED, Choice, Completion, Kind, Span, Status

Tokenise = Callable[[GenerationRequest, Mapping[str, object]], tuple[Sequence[int], Sequence[int]] | None]
"""As `leyden.interfaces.Tokenises.tokenised`."""

CUT = frozenset({"length", "max_tokens", "max_output_tokens", "incomplete", "content_filter"})
"""Finish reasons, in any protocol, of an answer without its end, which must not be learnt as one."""


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """What a policy may imitate of some rollouts."""

    transitions: Sequence[Transition]
    """By rollout, then start time."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Why calls could not be made into tokens -> how many."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """How calls become demonstrations of one policy."""

    policy: Policy
    policies: Sequence[Policy]
    """Of the run, in order: the first whose pattern matches a role has it."""
    tokenise: Tokenise | None
    """`None`: nothing here can."""
    exact: bool = True
    """Recorded token ids are of the policy's tokenizer."""
    most_tokens: int | None = None
    """A prompt and its answer may have together; of those that are tokenised anew."""

    def has(self, role: str) -> bool:
        """Say whether a role is the policy's."""
        owner = next((one for one in self.policies if matches(one.roles, role)), None)
        return owner is not None and owner.name == self.policy.name


def demonstrations(
    records: RolloutRecords,
    source: Source,
    *,
    credit: Credit = broadcast,
    mask_overlong: bool = False,
    reward_weights: Mapping[str, float] | None = None,
) -> Demonstrations:
    """Return a finished rollout's calls to imitate, with their returns; without a reward the total counts as 0.

    A call counts when it was answered whole: a completion that was delivered, or a span that says so.

    Raises:
        ConfigurationError: a call must be tokenised anew, and nothing can.
        EngineError, RewardError: as `mdp.transitions`.
    """
    if records.rollout.state not in FINISHED:
        return Demonstrations(transitions=[])
    completions, unusable, made = _completions(records, source)
    whole = replace(
        records,
        completions=completions,
        rollout=msgspec.structs.replace(records.rollout, reward=records.rollout.reward or 0.0),
    )
    found = mdp.transitions(
        whole, [source.policy], credit=credit, mask_overlong=mask_overlong, reward_weights=reward_weights
    )
    if unused := made - {one.span_id for one in found}:
        unusable["it has several answers, and nothing says with which the agent went on"] += len(unused)
    return Demonstrations(
        transitions=[
            replace(one, is_retokenised=True, logprobs=[0.0] * len(one.token_ids)) if one.span_id in made else one
            for one in found
        ],
        unusable=unusable,
    )


def _completions(records: RolloutRecords, source: Source) -> tuple[list[Completion], Counter[str], set[str]]:
    """Return one line of completions for all calls, why some have none, and the spans of those that were made."""
    attempt = records.rollout.attempt
    known: dict[str, list[Completion]] = defaultdict(list)
    for completion in records.completions:
        if completion.attempt == attempt:
            known[completion.span_id].append(completion)
    found: list[Completion] = []
    unusable: Counter[str] = Counter()
    made: set[str] = set()
    spans = {one.span_id: one for one in records.spans if one.kind is Kind.MODEL_CALL and one.attempt == attempt}
    for span_id in dict.fromkeys([*spans, *known]):
        own, span = known[span_id], spans.get(span_id)
        role = own[-1].role if own else spans[span_id].role
        is_delivered = any(one.delivered for one in own)
        if not source.has(role) or (is_delivered and source.exact):
            speaker = source.policy.name if source.has(role) else ""
            found += [msgspec.structs.replace(one, policy=speaker) for one in own]
            if not own:
                found.append(_completion(spans[span_id], source, [], []))
        elif span is None:
            unusable["it was recorded without its messages"] += is_delivered
        elif span.status is Status.OK:
            try:
                found.append(_tokenised(span, source))
                made.add(span_id)
            except DatasetError as error:
                unusable[str(error)] += 1
    return found, +unusable, made


def _tokenised(span: Span, source: Source) -> Completion:
    """Make a completion from what a span says was asked and answered.

    Raises:
        DatasetError: it does not say enough, or not in words.
        ConfigurationError: nothing here can tokenise.
    """
    known = span.attributes
    if known.get("gen_ai.operation.name") == "text_completion":
        raise DatasetError("it is a text completion, whose end nobody recorded")
    if known.get("leyden.previous_response"):
        raise DatasetError("it goes on from an answer that the model's server keeps, so its prompt is not all there")
    answers = chat_messages(known.get("gen_ai.output.messages"))
    request = GenerationRequest(
        model=source.policy.name,
        messages=asked_messages(known),
        tools=function_tools(known.get("gen_ai.tool.definitions")),
    )
    if source.tokenise is None:
        raise ConfigurationError(
            f"call {span.span_id!r} of role {span.role!r} was recorded without token ids, and the engine cannot "
            "tokenise messages; use one with a method `tokenised`, such as TransformersEngine"
        )
    reasons = known.get("gen_ai.response.finish_reasons")
    is_cut = [str(reason) in CUT for reason in reasons] if isinstance(reasons, list | tuple) else []
    prompt: Sequence[int] = ()
    choices: list[Choice] = []
    for index, answer in enumerate(answers):
        if index < len(is_cut) and is_cut[index]:
            raise DatasetError("its answer was cut short")
        if answer.get("tool_calls") and not request.tools:
            raise DatasetError("it calls a tool, and nobody recorded which tools it had")
        try:
            pair = source.tokenise(request, answer)
        except ConfigurationError as error:
            raise DatasetError(str(error).partition(". ")[0]) from error  # without this call's own details
        if pair is None:
            raise DatasetError("the chat template does not write its answer so that it would be read as the same")
        prompt, tokens = pair
        if source.most_tokens is not None and len(prompt) + len(tokens) > source.most_tokens:
            raise DatasetError(f"it is longer than the {source.most_tokens} tokens that the engine has room for")
        choices.append(Choice(index=index, token_ids=list(tokens), logprobs=[0.0] * len(tokens), finish_reason="stop"))
    return _completion(span, source, prompt, choices)


def _completion(span: Span, source: Source, prompt: Sequence[int], choices: list[Choice]) -> Completion:
    """Stand for a call that the engine did not answer; without choices it only takes its place among the turns."""
    return Completion(
        span_id=span.span_id,
        http_attempt=0,
        rollout_id=span.rollout_id,
        attempt=span.attempt,
        role=span.role,
        policy=source.policy.name if choices else "",
        version=0,
        prompt_token_ids=list(prompt),
        choices=choices,
        sampling={"temperature": 1.0},
        off_distribution=True,
        status=span.status,
        delivered=span.status is Status.OK,
        start_ns=span.start_ns,
        first_token_ns=span.start_ns,
        end_ns=span.end_ns,
    )
