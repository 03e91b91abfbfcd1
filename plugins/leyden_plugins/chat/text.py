"""Turn sampled tokens into text as they come.

One idea: text is given out once it cannot change any more. What may still become a longer character, a stop
string or a tool call is held back; the pieces joined are exactly the text of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What an incomplete character decodes to."""


class Codec:
    """Text to tokens and back, without the tokenizer's bookkeeping around each call."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(int(token) for token in tokenizer.all_special_ids)
        # The Rust tokenizer under the wrapper is several times quicker for short texts; not every tokenizer has one.
        self.backend = getattr(tokenizer, "backend_tokenizer", None)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the tokens of `text`; a rendered chat holds its special tokens already, plain text does not."""
        if self.backend is not None:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=add_special_tokens)]

    def decode(self, token_ids: Sequence[int], kept: frozenset[int] = frozenset()) -> str:
        """Return the text of `token_ids` without special tokens but those in `kept`."""
        hidden = self.special - kept if kept else self.special
        shown = [token for token in token_ids if token not in hidden]
        if self.backend is not None:
            return str(self.backend.decode(shown, skip_special_tokens=False))
        return str(self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class TextStream:
    """The text of one choice: push tokens, take what is certain."""

    def __init__(
        self,
        codec: Codec,
        *,
        stop: Sequence[str] = (),
        holds: Sequence[str] = (),
        kept: frozenset[int] = frozenset(),
    ) -> None:
        """Watch for `stop`, which ends the text, and for `holds`, from which on text waits for the end.

        Args:
            codec: decodes the tokens.
            stop: the text ends before the first of these.
            holds: the empty string holds everything.
            kept: special tokens that are shown.
        """
        self.codec = codec
        self.stop = tuple(stop)
        self.holds = tuple(holds)
        self.kept = kept
        self.is_stopped = False
        self.text = ""
        """All text so far, cut before a stop string."""
        self.given = 0
        """How many characters of `text` were given out."""
        self._tokens: list[int] = []
        self._prefix = 0
        self._read = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; return the text that is certain now."""
        self._tokens.extend(token_ids)
        # Tokens from `_prefix` to `_read` are decoded again with the new ones: some tokenizers write a space
        # only in front of a token that is not the first.
        known = self.codec.decode(self._tokens[self._prefix : self._read], self.kept)
        window = self.codec.decode(self._tokens[self._prefix :], self.kept)
        if len(window) > len(known) and not window.endswith(REPLACEMENT):
            self._prefix, self._read = self._read, len(self._tokens)
            self._append(window[len(known) :])
        return self._give(self._certain())

    def finish(self) -> str:
        """Return the rest of the text: nothing is to come."""
        if not self.is_stopped:
            known = self.codec.decode(self._tokens[self._prefix : self._read], self.kept)
            window = self.codec.decode(self._tokens[self._prefix :], self.kept)
            self._read = self._prefix = len(self._tokens)
            self._append(window[len(known) :])
        return self._give(len(self.text))

    def _append(self, piece: str) -> None:
        start = len(self.text)
        self.text += piece
        found = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self.stop]
        if any(place >= 0 for place in found):
            self.text = self.text[: min(place for place in found if place >= 0)]
            self.is_stopped = True

    def _certain(self) -> int:
        if self.is_stopped:
            return len(self.text)
        end = len(self.text)
        for hold in self.holds:
            found = self.text.find(hold, self.given)
            if found >= 0:
                return min(end, found)
        for watched in (*self.stop, *self.holds):
            for length in range(min(len(watched) - 1, len(self.text) - self.given), 0, -1):
                if self.text.endswith(watched[:length]):
                    end = min(end, len(self.text) - length)
                    break
        return end

    def _give(self, end: int) -> str:
        piece = self.text[self.given : end]
        self.given = max(self.given, end)
        return piece
