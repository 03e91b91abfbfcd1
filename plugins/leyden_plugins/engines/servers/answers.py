"""Pieces that a server sends, to the deltas that a gateway gives out.

One idea: the text is made here, from the tokens, so that it is the same whichever server sampled them: what a stop
string cuts off, what a tool call is, which tokens are hidden.
One trap: a server finds stop strings in a text of its own. If only ours holds one, the answer ends here all the same,
and the rest of its tokens is not waited for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal

from leyden.errors import EngineError
from leyden.interfaces import Delta, GenerationRequest
from leyden_plugins.chat.prompts import Prompts
from leyden_plugins.chat.templates import ToolCall
from leyden_plugins.chat.text import TextStream

Reason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some tokens of one choice, as they were sampled."""

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[float | None]
    """`None` where JSON has no word for what the server found: NaN."""
    finish_reason: Reason | None = None
    """Set on a choice's last piece."""


class Choice:
    """One choice of an answer, on its way from tokens to text."""

    def __init__(self, request: GenerationRequest, prompts: Prompts) -> None:
        chat = prompts.chat
        self.is_over = False
        self._is_streamed = request.stream
        self._parses_tools = bool(request.tools) and request.tool_choice != "none"
        self._prompts = prompts
        self._text = TextStream(
            chat.codec,
            stop=request.sampling.stop,
            holds=[form.opening for form in chat.forms] if self._parses_tools else (),
            kept=chat.shown if self._parses_tools else frozenset(),
        )
        self._given = 0
        self._token_ids: list[int] = []
        """What was not given out yet."""
        self._logprobs: list[float] = []

    def take(self, piece: Piece) -> Delta | None:
        """Add a piece; return what there is to give out of it.

        Raises:
            EngineError: its log-probabilities are not numbers, or not one a token.
        """
        logprobs = checked(piece)
        text, taken = self._push(piece.token_ids)
        token_ids, logprobs = piece.token_ids[:taken], logprobs[:taken]
        reason = "stop" if self._text.is_stopped else piece.finish_reason
        if reason is not None:
            return self._last(piece.index, token_ids, logprobs, reason)
        if not self._is_streamed:
            self._token_ids += token_ids
            self._logprobs += logprobs
            return None
        self._given += len(text)
        return Delta(index=piece.index, text=text, token_ids=token_ids, logprobs=logprobs)

    def _push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Add tokens; return the text that is certain now, and how many were taken: those up to a stop string."""
        spoken = [token for token in token_ids if token not in self._prompts.eos]
        if not self._text.stop:
            return self._text.push(spoken), len(token_ids)
        text = ""
        for count, token in enumerate(token_ids, start=1):
            text += "" if token in self._prompts.eos else self._text.push((token,))
            if self._text.is_stopped:
                return text, count
        return text, len(token_ids)

    def _last(self, index: int, token_ids: Sequence[int], logprobs: Sequence[float], reason: Reason) -> Delta:
        self.is_over = True
        self._text.finish()
        reason = "stop" if self._text.is_stopped else reason
        text = self._text.text
        tool_calls: Sequence[ToolCall] = ()
        finish: Literal["stop", "length", "tool_calls", "abort"] = reason
        if self._parses_tools and reason == "stop":
            parsed = self._prompts.chat.parse(text)
            text, tool_calls = parsed.text, parsed.calls
            finish = "tool_calls" if tool_calls else "stop"
        return Delta(
            index=index,
            text=text[self._given :],
            token_ids=(*self._token_ids, *token_ids),
            logprobs=(*self._logprobs, *logprobs),
            tool_calls=tool_calls,
            finish_reason=finish,
        )


def checked(piece: Piece) -> list[float]:
    """Return a piece's log-probabilities; refuse those that nothing could be trained on.

    Raises:
        EngineError: they are not numbers, or not one a token.
    """
    found = [logprob for logprob in piece.logprobs if logprob is not None and not math.isnan(logprob)]
    if len(found) != len(piece.logprobs):
        raise EngineError(
            "the server gave a log-probability that is not a number: the published weights hold NaN or overflow"
        )
    if len(piece.token_ids) != len(piece.logprobs):
        raise EngineError(
            f"the server gave {len(piece.token_ids)} tokens and {len(piece.logprobs)} log-probabilities; there must be "
            "one a token"
        )
    return found


async def deltas_of(
    pieces: AsyncGenerator[Piece, None], request: GenerationRequest, prompts: Prompts
) -> AsyncGenerator[Delta, None]:
    """Yield the deltas of all choices; closing this closes `pieces`.

    Raises:
        EngineError: the server ended before every choice was finished.
    """
    choices = [Choice(request, prompts) for _ in range(request.sampling.n)]
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if not 0 <= piece.index < len(choices):
                raise EngineError(f"the server answered choice {piece.index!r} of {len(choices)}")
            choice = choices[piece.index]
            if choice.is_over:
                continue
            delta = choice.take(piece)
            if delta is not None:
                yield delta
            if all(one.is_over for one in choices):
                return
    raise EngineError("the server ended its answer before it was finished")
