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
from leyden_plugins.chat.text import TextStream

Reason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some tokens of one choice, as they were sampled."""

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
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
        self._waiting: list[Piece] = []

    def take(self, piece: Piece) -> Delta | None:
        """Add a piece; return what there is to give out of it.

        Raises:
            EngineError: its log-probabilities are not numbers, or not one a token.
        """
        check(piece)
        reason = piece.finish_reason
        spoken = [token for token in piece.token_ids if token not in self._prompts.eos]
        text = self._text.push(spoken)
        if self._text.is_stopped and reason is None:
            reason = "stop"
        if reason is None:
            if not self._is_streamed:
                self._waiting.append(piece)
                return None
            self._given += len(text)
            return Delta(index=piece.index, text=text, token_ids=piece.token_ids, logprobs=piece.logprobs)
        return self._last(piece, reason)

    def _last(self, piece: Piece, reason: Reason) -> Delta:
        self.is_over = True
        self._text.finish()
        text, tool_calls = self._text.text, ()
        finish: Literal["stop", "length", "tool_calls", "abort"] = reason
        if self._parses_tools and reason == "stop":
            parsed = self._prompts.chat.parse(text)
            text, tool_calls = parsed.text, tuple(parsed.calls)
            finish = "tool_calls" if tool_calls else "stop"
        pieces = [*self._waiting, piece]
        return Delta(
            index=piece.index,
            text=text[self._given :],
            token_ids=tuple(token for one in pieces for token in one.token_ids),
            logprobs=tuple(logprob for one in pieces for logprob in one.logprobs),
            tool_calls=tool_calls,
            finish_reason=finish,
        )


def check(piece: Piece) -> None:
    """Refuse log-probabilities that nothing could be trained on.

    Raises:
        EngineError: they are not numbers, or not one a token.
    """
    if len(piece.token_ids) != len(piece.logprobs):
        raise EngineError(
            f"the server gave {len(piece.token_ids)} tokens and {len(piece.logprobs)} log-probabilities; there must be "
            "one a token"
        )
    for logprob in piece.logprobs:
        if not isinstance(logprob, int | float) or math.isnan(logprob):
            raise EngineError(
                f"the server gave {logprob!r} as a log-probability: the logits are not numbers, so the published "
                "weights hold NaN or overflow"
            )


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
