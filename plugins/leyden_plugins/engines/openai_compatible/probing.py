"""Find out what a server is and what it cannot do, before any answer counts.

One idea: ask it. A version says what a server should do; a probe says what this one, started as it was, does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from leyden.errors import ConfigurationError, EngineError
from leyden.interfaces import SamplingParameters
from leyden_plugins.chat.prompts import Prompts
from leyden_plugins.engines.openai_compatible.llama_cpp import LlamaCpp
from leyden_plugins.engines.openai_compatible.protocol import Ask, Dialect
from leyden_plugins.engines.openai_compatible.sglang import SGLang
from leyden_plugins.engines.openai_compatible.vllm import VLLM
from leyden_plugins.engines.servers.http import Http, Refused

logger = logging.getLogger(__name__)

KINDS: dict[str, Callable[[str | None], Dialect]] = {"vllm": VLLM, "sglang": SGLang, "llama.cpp": LlamaCpp}

SIGNS = (
    ("/props", "build_info", "llama.cpp"),
    ("/model_info", "model_path", "sglang"),
    ("/get_model_info", "model_path", "sglang"),
    ("/version", "version", "vllm"),
)
"""A path, what its answer has, and whose it is. vLLM comes last: others have such a path too."""

PROBE_TEXT = "What's 12+345?\n\n\tdef f(x): return 'Grüße, 世界 🙂'  # ok\n"
SAME = 1e-4
"""Log-probabilities nearer than this are of one temperature."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found out at start."""

    server: str
    version: str
    model: str
    """As the server names it."""
    context_length: int
    scales_logprobs: bool
    """True: log-softmax(logits / temperature). False: log-softmax(logits), of use at temperature 1 only."""
    tokenizer_agrees: bool | None
    """`None`: the server has no `/tokenize`."""
    streams: bool

    def __str__(self) -> str:
        notes = [f"{self.server} {self.version} with {self.model!r}, context of {self.context_length} tokens"]
        if not self.scales_logprobs:
            notes.append("log-probabilities only at temperature 1 (calls at others are marked as off-distribution)")
        if self.tokenizer_agrees is None:
            notes.append("its tokenizer could not be compared with ours")
        if not self.streams:
            notes.append("answers come whole, a stream in one piece")
        return "; ".join([*notes, "its weights are not ours to update"])


async def kind_of(http: Http) -> str:
    """Return which kind of server answers.

    Raises:
        ConfigurationError: none that is known.
        EngineError: nothing answers.
    """
    for path, key, kind in SIGNS:
        try:
            answer = await http.get(path)
        except Refused:
            continue
        if isinstance(answer, dict) and key in answer:
            return kind
    raise ConfigurationError(
        f"what answers there is none of {sorted(KINDS)!r}: only they return token ids with log-probabilities. If it is "
        "one of them behind a proxy, say which with server="
    )


async def examine(http: Http, dialect: Dialect, prompts: Prompts, *, longest: int | None, asked: int | None) -> Found:
    """Ask a server for everything that counts.

    Args:
        http: the way to it.
        dialect: what it speaks.
        prompts: our tokenizer.
        longest: positions of the model, where its config says.
        asked: the context length that the user wants.

    Raises:
        ConfigurationError: it lacks what sampling needs, or serves another tokenizer.
        EngineError: it does not answer.
    """
    about = await dialect.about(http)
    limits = [limit - dialect.spare for limit in (about.context_length, longest) if limit is not None]
    if asked is not None and limits and asked > min(limits):
        raise ConfigurationError(f"context_length={asked!r} is beyond the {min(limits)!r} tokens of the server")
    if asked is None and not limits:
        raise ConfigurationError(
            "neither the server nor the model's config says how long a context is; pass context_length="
        )
    agrees = await _compare_tokens(http, dialect, prompts)
    prompt = prompts.chat.codec.encode(PROBE_TEXT)
    await _sample(http, dialect, prompt)
    found = Found(
        server=dialect.kind,
        version=about.version,
        model=about.model,
        context_length=asked if asked is not None else min(limits),
        scales_logprobs=await _scales(http, dialect, prompt),
        tokenizer_agrees=agrees,
        streams=dialect.streams,
    )
    logger.log(logging.INFO if found.scales_logprobs and agrees else logging.WARNING, "engine: %s", found)
    return found


async def _compare_tokens(http: Http, dialect: Dialect, prompts: Prompts) -> bool | None:
    text = PROBE_TEXT + prompts.decode(sorted(prompts.eos))
    try:
        theirs = list(await dialect.tokenize(http, text))
    except Refused:
        return None
    ours = prompts.encode(text)
    if ours != theirs:
        place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
        raise ConfigurationError(
            f"the server's tokenizer is another: from token {place} on, ours of a probe text are "
            f"{ours[max(place, 0) :][:5]!r} and the server's {theirs[max(place, 0) :][:5]!r}; give the folder of the "
            "model that it serves as model="
        )
    return True


async def _sample(http: Http, dialect: Dialect, prompt: list[int]) -> None:
    ask = Ask(prompt=prompt, sampling=SamplingParameters(), limit=2, seed=1, stream=dialect.streams)
    token_ids: list[int] = []
    logprobs: list[float | None] = []
    try:
        async for piece in dialect.choice(http, ask):
            token_ids += piece.token_ids
            logprobs += piece.logprobs
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigurationError(f"{dialect.kind} answered {dialect.path} in another form: {error!r}") from error
    if (
        not token_ids
        or len(token_ids) != len(logprobs)
        or not all(value is not None and math.isfinite(value) for value in logprobs)
    ):
        raise ConfigurationError(
            f"{dialect.kind} gave the tokens {token_ids!r} with the log-probabilities {logprobs!r}; each needs one"
        )


async def _scales(http: Http, dialect: Dialect, prompt: list[int]) -> bool:
    """Compare the likeliest token's log-probability at two temperatures; where it cannot tell, it is not."""
    cool, warm = [
        await dialect.greatest(http, Ask(prompt=prompt, sampling=SamplingParameters(temperature=temperature), limit=1))
        for temperature in (0.5, 1.0)
    ]
    if cool < warm - SAME:
        raise EngineError(
            f"log-probabilities fall with the temperature ({cool!r} at 0.5, {warm!r} at 1); they are not usable"
        )
    return cool > warm + SAME
