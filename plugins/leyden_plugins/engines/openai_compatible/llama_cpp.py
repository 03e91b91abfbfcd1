"""What llama.cpp's server is asked, and how its answer reads.

One idea: answers are asked for whole. In a stream the server leaves out every token that ends inside a character; in a
whole answer it has them all, and leaves out only their log-probabilities, which are scored afterwards.
One trap: which of several equal tokens was left out is not said. A place is certain only when matching what is listed
from the left and from the right agree on it; the others are scored anew.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from leyden.errors import ConfigurationError, EngineError
from leyden_plugins.engines.openai_compatible.protocol import About, Ask
from leyden_plugins.engines.servers.answers import Piece
from leyden_plugins.engines.servers.http import Http

LIKELIEST = 1000
"""How many tokens are looked through first."""
EVERY_TOKEN = 2**20
"""More than any vocabulary has."""
MOST_SEEDS = 50


class LlamaCpp:
    """`/completion` of llama.cpp's server.

    It leaves out tokens that end inside a character: from a stream altogether, from a whole answer only their
    log-probabilities. So answers are asked for whole, and what is missing is scored afterwards.
    """

    kind = "llama.cpp"
    path = "/completion"
    streams = False
    spare = 0

    def __init__(self, served_name: str | None) -> None:
        if served_name is not None:
            raise ConfigurationError(f"served_name={served_name!r}: a llama.cpp server has one model; leave it out")
        self._plain_token = 0
        """One that is text by itself, for `_score`."""

    async def about(self, http: Http) -> About:
        """Ask for the properties; the context length is that of one slot."""
        found = await http.get("/props")
        self._plain_token = (await self.tokenize(http, "a"))[0]
        context = found["default_generation_settings"].get("n_ctx")
        return About(
            version=str(found.get("build_info", "unknown")),
            model=str(found.get("model_alias") or found.get("model_path")),
            context_length=int(context) if context else None,
        )

    def body(self, ask: Ask) -> dict[str, Any]:
        """Return a request. Its samplers are named, so that the server adds none of its own.

        `post_sampling_probs` are those behind the samplers: at a temperature with no sampler that masks, exactly
        softmax(logits / temperature). At temperature 1, and where tokens are masked, raw ones are asked for.
        """
        sampling = ask.sampling
        names = {"penalties": sampling.frequency_penalty != 0 or sampling.presence_penalty != 0}
        names |= {"top_k": sampling.top_k > 0, "top_p": sampling.top_p < 1, "min_p": sampling.min_p > 0}
        body: dict[str, Any] = {
            "prompt": list(ask.prompt),
            "n_predict": ask.limit,
            "samplers": [*(name for name, is_on in names.items() if is_on), "temperature"],
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "repeat_penalty": 1.0,
            "repeat_last_n": len(ask.prompt) + ask.limit,  # penalties look at everything
            "stop": list(sampling.stop),
            "seed": -1 if ask.seed is None else ask.seed,
            "n_probs": 1,
            "post_sampling_probs": self.scaled(ask),
            "return_tokens": True,
            "stream": False,
        }
        if ask.schema is not None:
            body["json_schema"] = ask.schema
        return body

    def scaled(self, ask: Ask) -> bool:
        """Whether probabilities are asked for behind the temperature."""
        is_masked = ask.sampling.is_off_distribution or ask.schema is not None
        return ask.sampling.temperature != 1 and not is_masked

    async def choice(self, http: Http, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Sample one choice and score what the server left out."""
        answer = await http.post(self.path, self.body(ask))
        token_ids = [int(token) for token in answer.get("tokens", ())]
        listed = answer.get("completion_probabilities", ())  # not there at all where every token was left out
        if len(token_ids) < int(answer["tokens_predicted"]):
            raise ConfigurationError("this llama.cpp server returns no token ids (return_tokens)")
        # It knows its own end tokens only; what it sampled after one of ours is no part of the answer.
        end = next((place for place, token in enumerate(token_ids, 1) if token in ask.ends), len(token_ids))
        given = [(int(item["id"]), logprob_of(item)) for item in listed]
        logprobs = [
            await self._score(http, ask, token_ids[:place], token_ids[place]) if value is None else value
            for place, value in enumerate(certain(token_ids, given)[:end])
        ]
        is_stop = answer["stop_type"] in ("eos", "word") or not ask.ends.isdisjoint(token_ids)
        yield Piece(
            index=ask.index, token_ids=token_ids[:end], logprobs=logprobs, finish_reason="stop" if is_stop else "length"
        )

    async def _score(self, http: Http, ask: Ask, before: Sequence[int], token: int) -> float:
        """Return the log-probability of a token, read from the raw distribution at its place.

        For that one token more is asked for, and pushed to be one that ends no character half-way, so that it is
        listed; raw log-probabilities are those before the push. At temperature 1 the likeliest tokens nearly always
        hold the one that is wanted; at others the softmax needs all.
        """
        temperature = ask.sampling.temperature if self.scaled(ask) else 1.0
        for many in (LIKELIEST, EVERY_TOKEN) if temperature == 1 else (EVERY_TOKEN,):
            body = {
                "prompt": [*ask.prompt, *before],
                "n_predict": 1,
                "n_probs": many,
                "samplers": ["temperature"],
                "temperature": 1.0,
                "logit_bias": [[self._plain_token, 1e6]],
            }
            listed = (await http.post(self.path, body))["completion_probabilities"][0]["top_logprobs"]
            raw = {int(item["id"]): float(item["logprob"]) for item in listed}
            if token in raw:
                return raw[token] if temperature == 1 else logprob_at(raw, token, temperature)
        raise EngineError(f"llama.cpp listed {len(raw)} tokens, and none of them was {token!r}, which it had sampled")

    async def tokenize(self, http: Http, text: str) -> Sequence[int]:
        """Return the server's own tokens of `text`."""
        body = {"content": text, "add_special": False, "parse_special": True}
        return [int(token) for token in (await http.post("/tokenize", body))["tokens"]]

    async def greatest(self, http: Http, ask: Ask) -> float:
        """Read the likeliest of what `body` asks for, with a seed whose token the server lists."""
        for seed in range(MOST_SEEDS):
            answer = await http.post(self.path, self.body(replace(ask, seed=seed)))
            if listed := answer.get("completion_probabilities"):
                top = listed[0]["top_probs" if "prob" in listed[0] else "top_logprobs"]
                return max(logprob_of(item) for item in top)
        raise ConfigurationError(f"this llama.cpp server gave no log-probability in {MOST_SEEDS} answers (n_probs)")


def certain(token_ids: Sequence[int], listed: Sequence[tuple[int, float]]) -> list[float | None]:
    """Return a log-probability for each token, `None` where it is not sure which of them was listed.

    Args:
        token_ids: all tokens.
        listed: token and log-probability, in order, of some of them.
    """
    if [token for token, _ in listed] == list(token_ids):
        return [value for _, value in listed]
    backwards = places_of(token_ids[::-1], [token for token, _ in reversed(listed)])
    latest = [len(token_ids) - 1 - place for place in reversed(backwards)]
    found: list[float | None] = [None] * len(token_ids)
    for early, late, (_, value) in zip(
        places_of(token_ids, [token for token, _ in listed]), latest, listed, strict=False
    ):
        if early == late:
            found[early] = value
    return found


def places_of(token_ids: Sequence[int], listed: Sequence[int]) -> list[int]:
    """Return the first places at which `listed` can be a subsequence; empty where it is none."""
    places, start = [], 0
    for token in listed:
        start = next((place for place in range(start, len(token_ids)) if token_ids[place] == token), len(token_ids))
        if start == len(token_ids):
            return []
        places.append(start)
        start += 1
    return places


def logprob_at(raw: Mapping[int, float], token: int, temperature: float) -> float:
    """Return log-softmax(logits / temperature) of `token`, from all log-probabilities at temperature 1.

    Those differ from the logits by a constant, which the softmax takes out again.
    """
    scaled = [value / temperature for value in raw.values()]
    most = max(scaled)
    return raw[token] / temperature - most - math.log(sum(math.exp(value - most) for value in scaled))


def logprob_of(item: Mapping[str, Any]) -> float:
    """Read the log-probability of a listed token, in whichever of the two forms."""
    if "prob" in item:
        return math.log(item["prob"]) if item["prob"] > 0 else -math.inf
    return float(item["logprob"])
