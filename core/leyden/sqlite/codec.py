"""Turn records into redacted bytes and back.

One idea: a record is stored as its own msgpack with the token ids taken out, so a new field of a record needs no
change here. One trap: a batch of records is never refused for one bad value; what msgpack cannot say is kept as
text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from leyden.errors import RewardError, StoreError
from leyden.redaction import Redactor
from leyden.spans import SCHEMA_VERSION, Choice, Completion, Record, Reward, Span
from leyden.sqlite.packing import PackedTokens, completion_key, pack_numbers


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """A record ready for its row; a completion's prompt is packed later, by the only writer."""

    rollout_id: str
    attempt: int
    key: str
    """Unique within the attempt; two records with one key are the same record."""
    body: bytes
    """The record as msgpack, without the numbers of a completion."""
    reward: float | None = None
    numbers: PackedTokens | None = None
    """A completion's numbers, its whole prompt still unshared; `None` for other records."""


class RecordCodec:
    """Turns records and JSON values into redacted bytes and back."""

    def __init__(self, redactor: Redactor) -> None:
        self.redactor = redactor
        self._encoder = msgspec.msgpack.Encoder(enc_hook=repr)
        self._records: msgspec.msgpack.Decoder[Record] = msgspec.msgpack.Decoder(Span | Completion | Reward)
        self._tokens = msgspec.msgpack.Decoder(PackedTokens)

    def encode(self, value: object) -> bytes:
        """Return a value as msgpack without its secrets; what JSON does not know is kept as its `repr`."""
        try:
            body = self._encoder.encode(value)
            if not self.redactor.suspects(body):
                return body
        except (TypeError, ValueError, OverflowError, RecursionError):
            pass  # integers beyond 64 bits, lone surrogates, values that hold themselves: cleaned below
        return self._encoder.encode(self.redactor.clean(value))

    def encode_record(self, record: Record) -> EncodedRecord:
        """Return a record ready for its row.

        Raises:
            StoreError: a record of a newer schema, of an unknown type, or with token ids that are no 32-bit integers.
            RewardError: a reward that is no finite number.
        """
        if record.schema > SCHEMA_VERSION:
            raise StoreError(newer_schema(type(record).__name__.lower(), record.schema))
        rollout_id, attempt = record.rollout_id, record.attempt
        if type(record) is Span:
            return EncodedRecord(rollout_id, attempt, f"s{record.span_id}", self.encode(record))
        if type(record) is Reward:
            value = _finite(record)
            body = self.encode(msgspec.structs.replace(record, value=value))
            return EncodedRecord(rollout_id, attempt, reward_key(record), body, reward=value)
        if type(record) is Completion:
            body = self.encode(msgspec.structs.replace(record, prompt_token_ids=[], choices=_bare(record)))
            key = completion_key(record.span_id, record.http_attempt)
            return EncodedRecord(rollout_id, attempt, key, body, numbers=pack_numbers(record))
        raise StoreError(f"a store keeps spans, completions and rewards, got {type(record).__name__!r}")

    def encode_tokens(self, tokens: PackedTokens) -> bytes:
        return self._encoder.encode(tokens)

    def decode_tokens(self, blob: bytes) -> PackedTokens:
        return self._tokens.decode(blob)

    def decode_record(self, body: bytes, sequence: int) -> Record:
        """Return the record of a row; a completion still lacks its numbers.

        Raises:
            StoreError: the record was written by a newer version of Leyden, or is damaged.
        """
        try:
            record = self._records.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StoreError(f"record {sequence} {_why_unreadable(body, error)}") from error
        if record.schema > SCHEMA_VERSION:
            raise StoreError(f"record {sequence}: {newer_schema('record', record.schema)}")
        if type(record) is not Reward:
            msgspec.structs.force_setattr(record, "sequence", sequence)
        return record


def reward_key(reward: Reward) -> str:
    """Return the key of a reward's row within its attempt."""
    target = (reward.name, reward.target_role, reward.target_span, reward.index)
    return "r" + msgspec.json.encode(target).decode()


def _finite(reward: Reward) -> float:
    try:
        value = float(reward.value)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise RewardError(
            f"rollout {reward.rollout_id!r}: reward {reward.name!r} is {reward.value!r}; give a finite number"
        )
    return value


def _bare(completion: Completion) -> list[Choice]:
    return [msgspec.structs.replace(choice, token_ids=[], logprobs=[]) for choice in completion.choices]


def newer_schema(what: str, schema: int) -> str:
    return (
        f"a {what} of schema {schema!r}, and this Leyden knows {SCHEMA_VERSION}: it was written by a newer "
        "version; upgrade with pip install -U leyden"
    )


def _why_unreadable(body: bytes, error: Exception) -> str:
    try:
        raw = msgspec.msgpack.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raw = None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(schema, int) and schema > SCHEMA_VERSION:
        return f"is {newer_schema('record', schema)}"
    return f"is damaged ({error}); restore the store from a copy, or delete the rollout it belongs to"
