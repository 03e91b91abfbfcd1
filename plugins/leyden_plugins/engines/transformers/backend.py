"""Everything of the engine that needs torch: one loaded model and the thread that samples from it."""

from __future__ import annotations

import asyncio
import copy
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any
from weakref import ref

from leyden.errors import ConfigurationError
from leyden.interfaces import GenerationRequest, Weights
from leyden_plugins.chat.prompts import Prompts
from leyden_plugins.chat.templates import Chat
from leyden_plugins.chat.text import Codec, TextStream
from leyden_plugins.engines.delivery import DeltaStream
from leyden_plugins.engines.transformers.batching import Answer, Batcher, Call
from leyden_plugins.engines.transformers.cache import PrefixCache
from leyden_plugins.engines.transformers.lane import Lane, Served, SoloLane, WindowLane
from leyden_plugins.engines.transformers.networks import ModuleNetwork, choose_network, row_network
from leyden_plugins.torch_models import (
    FusedNetwork,
    canonical_tensors,
    digest,
    eos_token_ids,
    hollow,
    is_adapter,
    load_model,
    load_tokenizer,
    read_adapter,
    read_tensors,
    vocabulary_of,
)

if TYPE_CHECKING:
    from leyden_plugins.engines.transformers.constraint import Constraint, Grammars


class Backend:
    """A loaded model: its tokenizer, its network, its versions of weights and its sampling thread."""

    def __init__(
        self,
        model: str | Path,
        *,
        max_rows: int,
        context_length: int | None,
        device: str,
        dtype: str,
        threads: int,
        prefix_cache_tokens: int,
        eos: frozenset[int] | None,
    ) -> None:
        """Load.

        Raises:
            ConfigurationError: the model cannot be loaded, or is shorter than `context_length`.
        """
        self._model = load_model(model, dtype=dtype, device=device)
        tokenizer = load_tokenizer(model)
        self.context_length = limit_of(self._model.config.get_text_config(), context_length, model)
        chat = Chat(Codec(tokenizer))
        self.prompts = Prompts(
            chat=chat,
            vocabulary=vocabulary_of(self._model),
            eos=eos_token_ids(self._model, tokenizer) if eos is None else eos,
        )
        tensors = dict(self._model.named_parameters())
        network = choose_network(self._model, tensors, self.context_length)
        self._solo = row_network(self._model, tensors) if network is None else None
        self._network: FusedNetwork | ModuleNetwork = network or self._solo  # type: ignore[assignment]  # one is there
        self._base: Any = self._network.prepare(tensors)
        self._base_id = 0
        self._cache = PrefixCache(prefix_cache_tokens)
        self._grammars: Grammars | None = None
        self.batcher = Batcher(
            lane=self._lane,
            cache=self._cache,
            chat=chat,
            eos=self.prompts.eos,
            max_rows=max_rows,
            threads=threads,
        )
        # Every version, the base too, is a copy of its own: the loaded one need not stay.
        hollow(self._model)
        # Published tensors are compared with this one: while the sampling thread runs, others stand in the first.
        self._described = copy.deepcopy(self._model)

    @property
    def network_name(self) -> str:
        """How the model is run."""
        if isinstance(self._network, FusedNetwork):
            return "fused"
        return "generic" if self._solo is None else "row by row"

    def base(self, weights_id: int) -> Served:
        """Return the weights the model was loaded with; LoRAs published later share their lane."""
        self._base_id = weights_id
        return Served(weights_id=weights_id, lane_id=weights_id, weights=self._base)

    def snapshot(self, weights_id: int, weights: Weights) -> Served:
        """Copy weights from memory or, where there are none, from their folder.

        Raises:
            ConfigurationError: they are not this model's.
        """
        if weights.tensors is None and weights.folder is None:
            raise ConfigurationError("Weights holds neither tensors nor a folder; give one of them")
        folder = None if weights.tensors is not None else Path(str(weights.folder))
        names_factors = any(".lora_" in name for name in weights.tensors or ())
        if weights.lora is not None or names_factors or (folder is not None and is_adapter(folder)):
            return self._snapshot_adapter(weights_id, weights, folder)
        given = weights.tensors if folder is None else read_tensors(folder)
        assert given is not None  # one of both is there
        prepared = self._network.prepare(canonical_tensors(self._described, given))
        return Served(weights_id=weights_id, lane_id=weights_id, weights=prepared)

    def _snapshot_adapter(self, weights_id: int, weights: Weights, folder: Path | None) -> Served:
        """Copy a LoRA on the base: beside it where the network adds factors, else merged into it."""
        adapter = read_adapter(self._described, lora=weights.lora, tensors=weights.tensors, folder=folder)
        if isinstance(self._network, FusedNetwork):
            fused = self._network.fuse(adapter)
            return Served(weights_id=weights_id, lane_id=self._base_id, weights=self._base, adapter=fused)
        merged = self._network.merge(self._base, adapter)
        return Served(weights_id=weights_id, lane_id=weights_id, weights=merged)

    def digest(self, served: Served) -> str:
        """Return the SHA-256 of served tensors under their Hugging Face names, a LoRA's factors under PEFT's."""
        named = dict(self._network.named(served.weights))
        if served.adapter is not None:
            named |= served.adapter.named
        return digest(named)

    def _lane(self, served: Served) -> Lane[Answer]:
        if self._solo is not None:
            return SoloLane(self._solo, served.weights)
        return WindowLane(self._network, served.weights, self._cache, self.context_length)

    def open_call(
        self,
        served: Served,
        prompt: tuple[int, ...],
        request: GenerationRequest,
        *,
        limit: int,
        seed: int,
        loop: asyncio.AbstractEventLoop,
    ) -> tuple[DeltaStream, Call]:
        """Make the call and the stream that its consumer reads."""
        stream = DeltaStream(loop)
        parses_tools = bool(request.tools) and request.tool_choice != "none"
        call = Call(
            is_streamed=request.stream,
            parses_tools=parses_tools,
            loop=loop,
            stream=ref(stream),
            open=request.sampling.n,
        )
        call.rows = [
            Answer(
                sampling=request.sampling,
                # A string seed is hashed whole, so that neighbouring seeds and choices do not resemble each other.
                random=Random(f"{seed}/{index}"),
                token_ids=[],
                forced=request.forced_token_ids,
                constraint=self._constraint(request),
                served=served,
                prompt=prompt,
                call=call,
                index=index,
                limit=limit,
                text=self._text(request, parses_tools),
            )
            for index in range(request.sampling.n)
        ]
        stream.abort = partial(self.batcher.abort, call)
        return stream, call

    def _constraint(self, request: GenerationRequest) -> Constraint | None:
        if request.forced_token_ids is not None or not (request.forces_tool or request.response_format):
            return None
        from leyden_plugins.engines.transformers.constraint import Grammars

        if self._grammars is None:
            self._grammars = Grammars(self.prompts.chat.codec, self.prompts.vocabulary, self.prompts.eos)
        return self._grammars.constraint(request, self.prompts.chat.forms[0])

    def _text(self, request: GenerationRequest, parses_tools: bool) -> TextStream | None:
        if not request.stream and not request.sampling.stop:
            return None
        chat = self.prompts.chat
        return TextStream(
            chat.codec,
            stop=request.sampling.stop,
            holds=[form.opening for form in chat.forms] if parses_tools else (),
            kept=chat.shown if parses_tools else frozenset(),
        )


def limit_of(config: object, asked: int | None, model: str | Path) -> int:
    """Return the context length.

    Raises:
        ConfigurationError: `asked` is beyond the model's limit, or neither is known.
    """
    most = getattr(config, "max_position_embeddings", None)
    if asked is None and most is None:
        raise ConfigurationError(f"{str(model)!r} states no max_position_embeddings; pass context_length=")
    if asked is not None and most is not None and asked > most:
        raise ConfigurationError(f"context_length={asked!r} is beyond the {most!r} positions of {str(model)!r}")
    return int(asked if asked is not None else most)  # type: ignore[arg-type]  # one of them is an int
