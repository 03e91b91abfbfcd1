"""What SGLang is asked, and how its answer reads.

One trap: a stream repeats all tokens so far in every event, or holds only new ones, as the server was started
(`--incremental-streaming-output`); the count of tokens beside them tells which.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from leyden.errors import ConfigurationError, EngineError
from leyden_plugins.engines.openai_compatible.protocol import About, Ask, answers, tokenize_prompt
from leyden_plugins.engines.servers.answers import Piece
from leyden_plugins.engines.servers.http import Http, Refused


class SGLang:
    """SGLang's own `/generate`."""

    kind = "sglang"
    path = "/generate"
    streams = True
    spare = 1

    def __init__(self, served_name: str | None) -> None:
        self.adapter = served_name
        """A LoRA that was loaded under this name; `None` is the base."""

    async def about(self, http: Http) -> About:
        """Ask under the newer name of the path, then under the older one."""
        try:
            found = await http.get("/server_info")
        except Refused:
            found = await http.get("/get_server_info")
        # A prompt and its answer must also fit into the cache as a whole. A length that was not given is the model's.
        limits = [found.get(name) for name in ("context_length", "max_total_num_tokens")]
        known = [int(limit) for limit in limits if limit]
        model = str(found.get("served_model_name") or found.get("model_path"))
        return About(
            version=str(found.get("version", "unknown")), model=model, context_length=min(known) if known else None
        )

    def body(self, ask: Ask) -> dict[str, Any]:
        """Return a request; `no_stop_trim` and special tokens concern only the text, which we write ourselves."""
        sampling = ask.sampling
        parameters: dict[str, Any] = {
            "max_new_tokens": ask.limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "repetition_penalty": 1.0,
            "stop": list(sampling.stop),
            "stop_token_ids": sorted(ask.ends),
            "n": 1,
        }
        if ask.seed is not None:  # kept to in the server's deterministic mode only
            parameters["sampling_seed"] = ask.seed
        if ask.schema is not None:
            parameters["json_schema"] = json.dumps(ask.schema)
        body = {
            "input_ids": list(ask.prompt),
            "sampling_params": parameters,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "stream": ask.stream,
        }
        return body | ({"lora_path": self.adapter} if self.adapter is not None else {})

    async def choice(self, http: Http, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Sample one choice. Events repeat all tokens so far, or hold the new ones, as the server was started."""
        seen = 0
        async for answer in answers(http, self.path, self.body(ask)):
            meta = answer["meta_info"]
            total, listed = int(meta["completion_tokens"]), meta.get("output_token_logprobs")
            if listed is None:
                raise ConfigurationError("this SGLang server returned no output_token_logprobs")
            if len(listed) < total - seen:
                raise EngineError(f"SGLang says that it sampled {total - seen} more tokens and names {len(listed)}")
            # An event that repeats may hold tokens that came after it was made; those come again with the next.
            fresh = listed[seen:total] if len(listed) >= total else listed[len(listed) - (total - seen) :]
            seen = total
            reason = meta.get("finish_reason")
            if fresh or reason:
                yield Piece(
                    index=ask.index,
                    token_ids=[int(item[1]) for item in fresh],
                    logprobs=[float(item[0]) for item in fresh],
                    finish_reason=reason["type"] if reason else None,
                )

    async def tokenize(self, http: Http, text: str) -> Sequence[int]:
        """Return the server's own tokens of `text`."""
        return await tokenize_prompt(http, text, "default")

    async def greatest(self, http: Http, ask: Ask) -> float:
        """Ask for the two likeliest."""
        answer = await http.post(self.path, self.body(ask) | {"top_logprobs_num": 2})
        return max(float(item[0]) for item in answer["meta_info"]["output_top_logprobs"][0])
