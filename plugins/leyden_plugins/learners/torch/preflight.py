"""What is checked of a model before anything is trained: that this learner computes what the model computes.

One trap: an adapter begins without effect, so a check of a new one says nothing until its factors are nudged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from leyden.errors import ConfigurationError
from leyden.interfaces import Sample
from leyden_plugins.learners.torch.trainee import Trainee
from leyden_plugins.torch_models.logprobs import token_logprobs

if TYPE_CHECKING:
    from leyden_plugins.learners.torch import TorchLearner

STEM, TAILS = [1, 2, 3, 4], [[5, 6], [6, 5], [2]]
"""One prompt, and answers that share it."""


@torch.no_grad()
def check_logits(learner: TorchLearner, trainee: Trainee) -> None:
    """Compare the way samples are computed here with the model's own forward pass, on three with one prompt.

    Raises:
        ConfigurationError: they differ: the model changes its logits after the head, masks in its own way, or does
            not use an adapter's layers.
    """
    samples = [
        Sample(
            prompt_token_ids=STEM,
            token_ids=tail,
            weights=[1.0] * len(tail),
            advantages=[1.0] * len(tail),
            logprobs=[0.0] * len(tail),
        )
        for tail in TAILS
    ]
    name = trainee.policy.name
    with trainee.nudged(), _packing(trainee):
        ours = _flat(learner.logprobs(name, samples))
        with trainee.speaking():
            own = torch.cat([_own_logprobs(trainee.model, tail, learner.device) for tail in TAILS])
        is_felt = trainee.policy.lora is None or bool(
            (ours != _flat(learner.logprobs(name, samples, reference=True))).any()
        )
    kind = type(trainee.model).__name__
    if not is_same(ours, own, dtype=learner.dtype):
        raise ConfigurationError(
            f"{kind} gives other log-probabilities than its head alone, by up to "
            f"{float((ours - own).abs().max()):.3g}; this learner cannot train it"
            + (", but may with TorchLearner(layout='merged')" if trainee.layout in ("packed", "auto") else "")
        )
    if not is_felt:
        raise ConfigurationError(
            f"the adapter of policy {name!r} does not change what {kind} says; train full weights with lora=None"
        )


def is_same(ours: Tensor, own: Tensor, *, dtype: str) -> bool:
    """Say whether two computations of one model agree.

    Two of one value in bfloat16 differ by a step of its logits or so, 0.125 for those between 16 and 32; what is
    computed wrongly differs by whole nats.
    """
    distances = (ours - own).abs()
    return bool(distances.max() <= 1e-3 if dtype == "float32" else distances.mean() <= 0.25)


@contextmanager
def _packing(trainee: Trainee) -> Iterator[None]:
    """Make `auto` pack inside the block: what it may do later is what must be checked."""
    usual = trainee.layout
    if usual == "auto":
        trainee.layout = "packed"
    try:
        yield
    finally:
        trainee.layout = usual


def _flat(values: list[list[float]]) -> Tensor:
    return torch.tensor([value for one in values for value in one])


def _own_logprobs(model: PreTrainedModel, tail: list[int], device: str) -> Tensor:
    logits = model(torch.tensor([[*STEM, *tail]], device=device)).logits[0]
    return token_logprobs(logits[len(STEM) - 1 : -1], torch.tensor(tail, device=device)).cpu()


def attends_fully(model: PreTrainedModel) -> bool:
    """Say whether an explicit mask means the same in every layer: no sliding windows, no recurrence."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    return set(layers) == {"full_attention"} and not getattr(config, "sliding_window", None)
