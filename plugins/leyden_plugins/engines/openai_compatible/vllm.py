"""What vLLM is asked, and how its answer reads."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from leyden.errors import ConfigurationError
from leyden_plugins.engines.openai_compatible.protocol import About, Ask, answers, tokenize_prompt
from leyden_plugins.engines.servers.answers import Piece
from leyden_plugins.engines.servers.http import Http


class VLLM:
    """`/v1/completions` of vLLM 0.10.2 or later, the first that returns token ids."""

    kind = "vllm"
    path = "/v1/completions"
    streams = True
    spare = 0

    def __init__(self, served_name: str | None) -> None:
        self.served_name = served_name

    async def about(self, http: Http) -> About:
        """Ask for the version and the models."""
        version = str((await http.get("/version"))["version"])
        models = (await http.get("/v1/models"))["data"]
        names = [str(model["id"]) for model in models]
        if self.served_name is None:
            self.served_name = names[0]
        if self.served_name not in names:
            raise ConfigurationError(f"served_name={self.served_name!r} is not served; the server has {names!r}")
        [model] = [model for model in models if model["id"] == self.served_name][:1]
        return About(version=version, model=self.served_name, context_length=model.get("max_model_len"))

    def body(self, ask: Ask) -> dict[str, Any]:
        """Return a request in which nothing is left to the server's defaults, which follow the model's own."""
        sampling = ask.sampling
        body: dict[str, Any] = {
            "model": self.served_name,
            "prompt": list(ask.prompt),
            "max_tokens": ask.limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "repetition_penalty": 1.0,
            "stop": list(sampling.stop),
            "stop_token_ids": sorted(ask.ends),
            "seed": ask.seed,
            "logprobs": 0,
            "return_token_ids": True,
            "stream": ask.stream,
        }
        return body | ({"structured_outputs": {"json": ask.schema}} if ask.schema is not None else {})

    async def choice(self, http: Http, ask: Ask) -> AsyncGenerator[Piece, None]:
        """Sample one choice."""
        async for answer in answers(http, self.path, self.body(ask)):
            for choice in answer.get("choices", ()):
                piece = piece_of(ask.index, choice)
                if piece.token_ids or piece.finish_reason:
                    yield piece

    async def tokenize(self, http: Http, text: str) -> Sequence[int]:
        """Return the server's own tokens of `text`."""
        return await tokenize_prompt(http, text, self.served_name)

    async def greatest(self, http: Http, ask: Ask) -> float:
        """Ask for the two likeliest."""
        answer = await http.post(self.path, self.body(ask) | {"logprobs": 2})
        return max(float(value) for value in answer["choices"][0]["logprobs"]["top_logprobs"][0].values())


def piece_of(index: int, choice: Mapping[str, Any]) -> Piece:
    """Read one choice of an answer or of an event.

    Raises:
        ConfigurationError: there are no token ids in it.
    """
    token_ids = choice.get("token_ids")
    if token_ids is None:
        raise ConfigurationError("this server returns no token ids (return_token_ids); vLLM does from 0.10.2 on")
    listed = (choice.get("logprobs") or {}).get("token_logprobs") or []
    return Piece(index=index, token_ids=token_ids, logprobs=listed, finish_reason=choice.get("finish_reason"))
