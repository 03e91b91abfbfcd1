"""Rows for other trainers, such as TRL's `SFTTrainer`: token ids, and which of them are learnt.

One idea: a trainer that is given `input_ids` and `labels` renders nothing and guesses nothing, so it learns exactly the
tokens that were sampled. Its mean over labelled tokens is our `token_mean`.
One trap: a trainer may cut rows to a length of its own: `SFTConfig(max_length=None)`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from leyden import mdp
from leyden.demonstrations import Source, demonstrations
from leyden.interfaces import Engine, Sample, Tokenises, Transition
from leyden.layouts import Row, merged, one_row_a_call
from leyden.rewards import DEFAULT_REWARD
from leyden.roles import Policy
from leyden.training.stored import groups_of
from leyden_plugins.algorithms.sft.keeping import Keep, check_keep, kept_calls

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is read and not learnt: what PyTorch's cross-entropy leaves out."""


def sft_rows(
    transitions: Sequence[Transition], *, layout: Literal["calls", "merged"] = "calls"
) -> list[dict[str, list[int]]]:
    """Return `{"input_ids": [...], "labels": [...]}` for each row, aligned; every answer token is labelled once.

    Args:
        transitions: to be imitated, such as `session.demonstrations` gives.
        layout: `calls` is one row a call; in `merged` turns that go on from each other share a row. A call that
            another one repeats has a row of its own.
    """
    samples = mdp.samples(transitions)
    rows = one_row_a_call(samples) if layout == "calls" else merged(samples)
    found: list[dict[str, list[int]]] = []
    for row in rows:
        found += _labelled(row, samples)
    return found


async def stored_rows(
    source: str | Path,
    policy: Policy,
    *,
    engine: Engine,
    keep: Keep = None,
    exact: bool = False,
    layout: Literal["calls", "merged"] = "calls",
) -> list[dict[str, list[int]]]:
    """Return rows of the calls that stored rollouts made in a policy's roles.

    Args:
        source: a run folder or store.
        policy: its roles' calls.
        engine: knows the chat template of the model to be trained; it is started.
        keep: which rollouts, as in `FineTuning`; rewards are the reward named `reward`.
        exact: recorded token ids are of this model's tokenizer; False tokenises every call anew.
        layout: as in `sft_rows`.

    Raises:
        ConfigurationError: there is no store, or calls must be tokenised anew and the engine cannot.
    """
    check_keep(keep, group_size=None)
    groups = await groups_of(source, reward_weights={DEFAULT_REWARD: 1.0})
    await engine.start([policy])
    maker = Source(
        policy=policy,
        policies=[policy],
        tokenise=engine.tokenised if isinstance(engine, Tokenises) else None,
        exact=exact,
        most_tokens=engine.context_length,
    )
    shown = [demonstrations(one, maker) for group in groups for one in group.rollouts]
    for reason, count in sum((one.unusable for one in shown), Counter[str]()).items():
        logger.warning("%d calls of policy %r are left out: %s", count, policy.name, reason)
    return sft_rows(kept_calls([call for one in shown for call in one.transitions], groups, keep), layout=layout)


def _labelled(row: Row, samples: Sequence[Sample]) -> list[dict[str, list[int]]]:
    """Return a row with its labels, and behind it rows of the samples that repeat some of these."""
    labels = [IGNORED] * len(row.token_ids)
    repeated: list[dict[str, list[int]]] = []
    for index, places in row.samples.items():
        if any(labels[place + 1] != IGNORED for place in places):
            [own] = one_row_a_call([samples[index]])
            repeated += _labelled(own, [samples[index]])
            continue
        for place in places:
            labels[place + 1] = row.token_ids[place + 1]
    return [{"input_ids": list(row.token_ids), "labels": labels}, *repeated]
