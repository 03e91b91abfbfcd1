"""Read an answer as it arrived: decompressed, cut into events, and read by the reader of its protocol.

One trap: what arrives may be cut, compressed or malformed; a piece that cannot be read is left out, and nothing here
ever raises.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from leyden.wire.answers import DONE, READERS, Answer
from leyden.wire.protocols import Dialect

PLAIN = (None, "", "identity")

MALFORMED = (KeyError, TypeError, AttributeError, ValueError, IndexError)
"""What reading a piece of an unexpected form raises."""


def read_answer(dialect: Dialect, content: bytes, encoding: str | None = None, choices: int = 1) -> Answer:
    """Read an answer.

    Args:
        dialect: the protocol's.
        content: the body, or as much of it as arrived, decompressed or not.
        encoding: the answer's `Content-Encoding`.
        choices: how many answers were asked for (`n`).
    """
    text = text_of(content, encoding)
    if text is None or dialect == "other":
        return Answer(is_whole=True)
    reader = READERS[dialect](choices)
    is_json = text.lstrip()[:1] in ("{", "[")
    pieces: Iterable[Any] = [json_of(text)] if is_json else events_of(text)
    for piece in pieces:
        with contextlib.suppress(*MALFORMED):
            if is_json:
                reader.answer.is_whole = piece is not None
                reader.take_body(piece)
            else:
                reader.take_event(piece)
    if not is_json:
        with contextlib.suppress(*MALFORMED):
            reader.conclude()
    return reader.answer


def text_of(content: bytes, encoding: str | None) -> str | None:
    """Return the text of a body, or `None` when it is compressed in a way the standard library does not know.

    Some libraries hand out what they have decompressed and some what came, under the same header.
    """
    plain = None if encoding in PLAIN else inflated(content)
    if plain is not None:
        return plain.decode(errors="replace")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        is_cut_within_a_character = error.start > len(content) - 4
        return content.decode(errors="replace") if encoding in PLAIN or is_cut_within_a_character else None


def inflated(content: bytes) -> bytes | None:
    """Decompress as much as arrived; `None` when it is neither gzip nor zlib."""
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content)
    except zlib.error:
        return None


def json_of(text: str) -> Any:
    """Return a JSON value, or `None` when the text is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def events_of(text: str) -> Iterator[Any]:
    """Yield the data of server-sent events: JSON values, and the string of `DONE`."""
    # Not `splitlines`, which also splits at characters that stand inside JSON strings.
    for line in text.split("\n"):
        if line.startswith("data:"):
            data = line[5:].strip()
            value = data if data == DONE else json_of(data)
            if value is not None:
                yield value
