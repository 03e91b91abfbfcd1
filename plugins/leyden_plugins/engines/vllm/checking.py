"""Compare what a server samples after new weights with what the learner computes from them.

"Did the logits change?" is not enough: a server with half of the new weights passes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from leyden.errors import EngineError
from leyden.interfaces import Weights
from leyden_plugins.engines.servers.answers import checked
from leyden_plugins.engines.vllm.asking import pieces_of
from leyden_plugins.engines.vllm.replica import Replica

TOKENS = 8
TEXT = "The weights of this model have just been changed, so what would it say now?"
TOLERANCE = {"float32": 1e-3}
COARSE_TOLERANCE = 0.05
"""Nats, where the type itself is coarse: the mean over the tokens of |server - learner|."""


def probe_prompt(encoded: Sequence[int], vocabulary: int) -> list[int]:
    """Return the prompt that is compared on: the text's tokens, or any for a tokenizer that cannot write it."""
    return list(encoded) or [token % vocabulary for token in range(3, 19)]


async def compare(replica: Replica, name: str, weights: Weights, prompt: Sequence[int], dtype: str) -> None:
    """Sample a few tokens at temperature 1 and compare their log-probabilities.

    Raises:
        EngineError: they differ by more than arithmetic explains.
    """
    if weights.logprobs is None:
        return
    body: dict[str, Any] = {
        "model": name,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "stream": False,
    }
    async for piece in pieces_of(replica.http, body):
        found = checked(piece)
        expected = await asyncio.to_thread(weights.logprobs, prompt, piece.token_ids)
        differences = [abs(one - other) for one, other in zip(found, expected, strict=True)]
        mean, allowed = sum(differences) / len(differences), TOLERANCE.get(dtype, COARSE_TOLERANCE)
        if not mean <= allowed:  # also for NaN
            raise EngineError(
                f"after the push, the server at {replica.http.url} does not sample from the learner's weights: the "
                f"log-probabilities of {len(differences)} tokens sampled by {name!r} differ by {mean:.2g} nats in the "
                f"mean, where {dtype} explains {allowed:g} (server {[round(one, 4) for one in found]!r}, "
                f"learner {[round(one, 4) for one in expected]!r}). Is the model on the server the learner's, and its "
                "dtype the same?"
            )
