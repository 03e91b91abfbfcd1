"""Rows for other trainers, such as TRL's `SFTTrainer`: token ids, and which of them are learnt.

One idea: a trainer that is given `input_ids` and `labels` renders nothing and guesses nothing, so it learns exactly the
tokens that were sampled. Its mean over labelled tokens is our `token_mean`.
One trap: a trainer may cut rows to a length of its own: `SFTConfig(max_length=None)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from leyden import mdp
from leyden.interfaces import Sample, Transition
from leyden.layouts import Row, merged, one_row_a_call

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
