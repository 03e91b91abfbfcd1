"""A model as the judge of rollouts: it scores one, or ranks a group.

One idea: a judge is an ordinary reward function; ranked against each other, rollouts get differences where absolute
scores would all be alike, and a group's baseline needs nothing but differences.
One trap: an answer that cannot be read is no score of 0: the rollout has no reward, and the reason is kept.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from hashlib import blake2b
from typing import Literal, TypeVar, cast

from leyden.errors import ConfigurationError
from leyden.interfaces import RolloutRecords
from leyden.rewards import DEFAULT_REWARD, NO_REWARD, emit_event
from leyden_plugins.chat.endpoint import ChatEndpoint, Message, Spent, key_from
from leyden_plugins.rewards.showing import (
    RANK_FORMAT,
    RANK_RUBRIC,
    SCORE_FORMAT,
    SCORE_RUBRIC,
    as_text,
    cut,
    final_output,
    score_in,
    scores_in,
)

log = logging.getLogger(__name__)

Read = TypeVar("Read")


@dataclass(eq=False)
class Judge:
    """Judges rollouts with any OpenAI-compatible chat model; its calls are never recorded, routed or trained.

    Example:
        `Trainer(agent, group_reward=Judge("gpt-4.1-mini", mode="rank"), ...)` ranks every group;
        `reward=` with a module's `judge = Judge("gpt-4.1-mini")`, named `"my_app:judge"`, scores every rollout alone.
    """

    model: str
    _: KW_ONLY
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; `None` sends none."""
    api_key: str | None = field(default=None, repr=False)
    """The key itself, in place of the variable."""
    mode: Literal["score", "rank"] = "score"
    """`rank` compares the rollouts of a group and is for `Trainer(group_reward=...)`; `score` is also for `reward=`."""
    rubric: str | None = None
    """What is good; `None` takes `SCORE_RUBRIC` or `RANK_RUBRIC`."""
    name: str = DEFAULT_REWARD
    """Of the reward."""
    shows: Callable[[RolloutRecords], str] = final_output
    """What the judge sees of a rollout: `final_output`, `trajectory`, or a function of yours."""
    most_characters: int = 20_000
    """Of one rollout; longer ones are shown without their middle."""
    concurrency: int = 8
    """Requests at a time, in each process."""
    timeout_seconds: float = 120.0
    """Of one request."""
    tries: int = 4
    """Requests for one question, when the endpoint fails or is busy."""
    most_calls: int | None = None
    """The budget: requests in all, in each process. Beyond it the judge refuses, and the run stops."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Further fields of every request, such as `{"max_tokens": 500}`; `temperature` is 0 unless it stands here."""
    seed: int = 0
    """Of the order in which a group is shown: judges favour places, so each group has an order of its own."""

    def __post_init__(self) -> None:
        if self.mode not in ("score", "rank"):
            raise ConfigurationError(f"mode is 'score' or 'rank', got {self.mode!r}")
        if self.most_characters < 100:
            raise ConfigurationError(f"most_characters must be at least 100, got {self.most_characters!r}")
        self._endpoint = ChatEndpoint(
            self.model,
            base_url=self.base_url,
            api_key=key_from(self.api_key, self.api_key_env),
            concurrency=self.concurrency,
            timeout_seconds=self.timeout_seconds,
            tries=self.tries,
            most_calls=self.most_calls,
            options=self.options,
        )

    @property
    def spent(self) -> Spent:
        """What it has cost so far, in this process."""
        return self._endpoint.spent

    async def __call__(self, task: object, judged: object, rollout: object = None) -> object:
        """Judge one rollout's output, as `Trainer(reward=...)` asks, or a group, as `group_reward=` does.

        Raises:
            ConfigurationError: an option does not fit what it is asked, or the endpoint refuses the request.
            RewardError: the budget is spent.
            ConnectionError: the endpoint cannot be reached.
        """
        if rollout is None:
            rollouts = cast(Sequence[RolloutRecords], judged)
            texts = [cut(self.shows(one), self.most_characters) for one in rollouts]
            scores = await (self._rank(task, texts) if self.mode == "rank" else self._score_each(task, texts))
            return [None if score is None else {self.name: score} for score in scores]
        if self.mode == "rank" or self.shows is not final_output:
            raise ConfigurationError(
                f"Judge(mode={self.mode!r}, shows={self.shows!r}) needs finished rollouts; pass it as "
                "Trainer(group_reward=...), or use mode='score' with what the agent returns"
            )
        score, reason = await self._score(task, cut(as_text(judged), self.most_characters))
        emit_event("judge", **{"leyden.judge.score": score, "leyden.judge.reason": reason})
        return NO_REWARD if score is None else {self.name: score}

    async def _score_each(self, task: object, texts: Sequence[str]) -> Sequence[float | None]:
        return [score for score, _ in await asyncio.gather(*(self._score(task, text) for text in texts))]

    async def _score(self, task: object, text: str) -> tuple[float | None, str]:
        """Return the score of one answer and why it has it, or why it has none."""
        shown = {"task": task, "answer": text}
        found, trouble = await self._ask(shown, SCORE_RUBRIC, SCORE_FORMAT, score_in)
        return (None, trouble) if found is None else found

    async def _rank(self, task: object, texts: Sequence[str]) -> Sequence[float | None]:
        """Return the scores of a group's answers, in order; equal answers are shown once and score alike."""
        answers = sorted(set(texts))
        digest = blake2b("\0".join([as_text(task), *answers]).encode(), digest_size=16).hexdigest()
        random.Random(f"{self.seed}/{digest}").shuffle(answers)
        shown = {"task": task, "answers": [{"id": k, "answer": text} for k, text in enumerate(answers, 1)]}
        found, _ = await self._ask(shown, RANK_RUBRIC, RANK_FORMAT, lambda text: scores_in(text, len(answers)))
        if found is None:
            return [None] * len(texts)
        by_text = dict(zip(answers, found, strict=True))
        return [by_text[text] for text in texts]

    async def _ask(self, shown: object, rubric: str, form: str, read: Callable[[str], Read]) -> tuple[Read | None, str]:
        """Return what was read from the judge's answer, asking once more where it cannot be read; else the reason."""
        messages: list[Message] = [
            {"role": "system", "content": f"{self.rubric or rubric}\n\n{form}"},
            {"role": "user", "content": json.dumps(shown, ensure_ascii=False, default=repr)},
        ]
        trouble = ""
        for _ in range(2):
            answer = await self._endpoint.ask(messages)
            try:
                return read(answer), ""
            except ValueError as error:
                trouble = f"the judge's answer cannot be used: {error}"
                messages += [
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": f"{trouble}. {form}"},
                ]
        log.warning("%s; no reward", trouble)
        return None, trouble
