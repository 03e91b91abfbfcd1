"""A recorded rollout that is over, and its texts as they may be stored.

One idea: what the user's `redact` fails on is not stored at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from leyden.interfaces import Outcome
from leyden.spans import Record, Rollout, Span

Redact = Callable[[str], str]


class NotRedactedError(Exception):
    """The user's function failed, so what it was to clean is not stored."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A rollout that is over."""

    rollout: Rollout
    records: Sequence[Record]
    outcome: Outcome

    @property
    def size(self) -> int:
        """Return how many records it is."""
        return 1 + len(self.records)


def redacted(one: Finished, redact: Redact) -> Finished:
    """Return a rollout whose texts the user's function has seen: task, output, errors, and attributes of spans.

    Raises:
        NotRedactedError: it raised, or returned no text.
    """
    rollout, outcome = one.rollout, one.outcome
    return Finished(
        rollout=msgspec.structs.replace(rollout, task=cleaned(rollout.task, redact)),
        records=[
            msgspec.structs.replace(
                record,
                attributes={name: cleaned(value, redact) for name, value in record.attributes.items()},
                error=None if record.error is None else cleaned_text(record.error, redact),
            )
            if isinstance(record, Span)
            else record
            for record in one.records
        ],
        outcome=replace(
            outcome,
            output=cleaned(outcome.output, redact),
            error=None if outcome.error is None else cleaned_text(outcome.error, redact),
        ),
    )


def cleaned(value: object, redact: Redact) -> object:
    """Return a JSON value with all its texts redacted; names of fields stay."""
    if isinstance(value, str):
        return cleaned_text(value, redact)
    if isinstance(value, Mapping):
        return {name: cleaned(each, redact) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(each, redact) for each in value]
    return value


def cleaned_text(text: str, redact: Redact) -> str:
    """Return one text redacted.

    Raises:
        NotRedactedError: the user's function raised, or returned no text.
    """
    try:
        found = redact(text)
    except Exception as error:
        raise NotRedactedError from error
    if not isinstance(found, str):
        raise NotRedactedError(f"redact returned {found!r}, which is no text")
    return found
