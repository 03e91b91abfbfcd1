"""The torch learner: AdamW on one device; a policy is a full copy of the weights or an adapter on a shared base.

One idea: samples arrive with every normalisation in their weights, so they may be laid out and cut in any way.
One trap: models stay in evaluation mode. Dropout would make the ratio differ from 1 before the first update.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from leyden.errors import ConfigurationError, LeydenError
from leyden.extras import extra
from leyden.interfaces import Batch, Loss, Sample, Weights
from leyden.layouts import Layout
from leyden.roles import Policy

with extra("train"):
    import torch
    from torch import Tensor
    from transformers.modeling_utils import PreTrainedModel

    from leyden_plugins.learners.torch import checkpoints
    from leyden_plugins.learners.torch.advice import Situation, lines_of, refuse_impossible, situation_of
    from leyden_plugins.learners.torch.batching import MicroBatch, attention_of, micro_batches
    from leyden_plugins.learners.torch.head import answer_scores
    from leyden_plugins.learners.torch.losses import Statistics, Tokens, check_inputs, loss_function
    from leyden_plugins.learners.torch.preflight import attends_fully, check_logits
    from leyden_plugins.learners.torch.recomputing import recompute_layers
    from leyden_plugins.learners.torch.trainee import FullTrainee, Trainee
    from leyden_plugins.learners.torch.value_head import predicted_values
    from leyden_plugins.torch_models.loading import load_model
    from leyden_plugins.torch_models.logprobs import hidden_at

if TYPE_CHECKING:
    from leyden_plugins.learners.torch.lora import SharedBase

__all__ = ["TorchLearner"]


class TorchLearner:
    """Implements `leyden.interfaces.Learner` with torch on one device.

    Args:
        device: a torch device, `cpu` or `cuda`.
        dtype: models compute in it, `float32` or `bfloat16`. Gradients add up in float32 and AdamW steps float32
            weights either way. A trained value takes 16 bytes in float32 (weight, gradient, two moments) and 18 in
            bfloat16, whose rounded copy is refreshed after each step; activations take about half. Autocast would
            take as much, convert every weight in every pass, and not compute what an engine in bfloat16 does.
        micro_batch_tokens: positions computed at once, padding included.
        threads: torch's threads in this process; `None` leaves them as they are.
        layout: how samples lie in rows, see `batching.Layout`. Rows of several paths need a model whose layers all
            attend fully; for another one `auto` means `merged`.
        activation_checkpointing: keep only the input of each layer and compute its inside again going backward: far
            less memory for about a third more time. `auto`: on a GPU, if the plan does not fit without.

    Raises:
        ConfigurationError: a value that torch on this machine cannot honour.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        micro_batch_tokens: int = 8192,
        threads: int | None = 1,
        layout: Layout = "auto",
        activation_checkpointing: bool | Literal["auto"] = "auto",
    ) -> None:
        if micro_batch_tokens < 1 or (threads is not None and threads < 1):
            raise ConfigurationError(
                f"micro_batch_tokens={micro_batch_tokens!r} and threads={threads!r} must be at least 1"
            )
        if dtype not in ("float32", "bfloat16"):
            raise ConfigurationError(f"dtype={dtype!r} cannot be trained here; use 'float32' or 'bfloat16'")
        if layout not in get_args(Layout):
            raise ConfigurationError(f"layout={layout!r} is unknown; use one of {get_args(Layout)!r}")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError(f"device={device!r}, but torch finds no CUDA device here; use device='cpu'")
        self.device = device
        self.dtype = dtype
        self.micro_batch_tokens = micro_batch_tokens
        self.threads = threads
        self.layout: Layout = layout
        if activation_checkpointing not in (True, False, "auto"):
            raise ConfigurationError(
                f"activation_checkpointing={activation_checkpointing!r} is unknown; use True, False or 'auto'"
            )
        self.activation_checkpointing: bool | Literal["auto"] = activation_checkpointing
        self._trainees: dict[str, Trainee] = {}
        self._source = ""
        self._shared: SharedBase | None = None
        """Under all policies with an adapter."""
        self._reference: PreTrainedModel | None = None
        """A frozen copy of the base weights, loaded when a run without adapters first asks for them."""
        self._situation: Situation | None = None
        """What memory there was when this was opened, and what was planned."""

    def open(self, policies: Sequence[Policy], model: str, *, seed: int) -> None:
        """Load the base weights: once for all policies with an adapter, and once for each without.

        Raises:
            ConfigurationError: the model cannot be loaded, its output is more than its head's, a policy's adapter
                targets layers that it does not have, or the device cannot hold what is trained.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.manual_seed(seed)
        self._source = model
        trained = [policy for policy in policies if policy.trainable]
        self._situation = situation_of(self, model, trained)
        refuse_impossible(self._situation)
        for policy in trained:
            self._trainees[policy.name] = self._new_trainee(policy, seed)
        adapted = [trainee for trainee in self._trainees.values() if trainee.policy.lora is not None]
        for trainee in self._trainees.values():
            if trainee.policy.lora is None or trainee is adapted[0]:  # the others have the same layers
                check_logits(self, trainee)

    def forward_backward(self, policy: str, batch: Batch) -> dict[str, float]:
        """Add the gradient of the batch's summed losses; return the metrics of `Statistics.metrics`.

        The gradient of a value term reaches the trunk as well as the head.

        Raises:
            ConfigurationError: an unknown policy or loss, a term whose inputs are missing, or a sample that has no
                log-probabilities.
        """
        trainee = self._trainee(policy)
        statistics = Statistics()
        for objective in batch:
            loss, function = objective.loss, loss_function(objective.loss)
            check_inputs(loss, objective.samples)
            for part in self._micro_batches(trainee, objective.samples):
                with trainee.speaking():
                    tokens = self._tokens(trainee, part, loss)
                    value = function(tokens)
                    value.total.backward()  # type: ignore[no-untyped-call]  # torch leaves this one method untyped
                statistics.add(tokens, value, loss, places=part.input_ids_B_T.numel(), padding=part.padding)
        return statistics.metrics()

    @torch.no_grad()
    def logprobs(self, policy: str, samples: Sequence[Sample], *, reference: bool = False) -> list[list[float]]:
        """Return log-softmax(logits / temperature) of every answer token, sample by sample in order.

        Raises:
            ConfigurationError: an unknown policy, or a sample that has no log-probabilities.
        """
        trainee = self._trainee(policy)
        found: list[list[float]] = [[] for _ in samples]
        for part in self._micro_batches(trainee, samples):
            with self._speaking(trainee, reference=reference) as model:
                scores = answer_scores(model, _hidden(model, part), part.token_ids_N, part.temperature_N)
            _scatter(found, part, scores.logprobs)
        return found

    @torch.no_grad()
    def values(self, policy: str, samples: Sequence[Sample]) -> list[list[float]]:
        """Return the value head's prediction before every answer token, sample by sample in order.

        Raises:
            ConfigurationError: as `logprobs`.
        """
        trainee = self._trainee(policy)
        head = trainee.value_head()
        found: list[list[float]] = [[] for _ in samples]
        for part in self._micro_batches(trainee, samples):
            with trainee.speaking():
                _scatter(found, part, predicted_values(head, _hidden(trainee.model, part)))
        return found

    def optim_step(self, policy: str, learning_rate: float) -> dict[str, float]:
        """Clip the gradient (one norm over weights and value head), step AdamW, clear the gradient.

        Raises:
            LeydenError: the gradient is not finite; weights and optimizer are left as they were.
        """
        trainee = self._trainee(policy)
        norm = float(torch.nn.utils.clip_grad_norm_(list(trainee.trained()), trainee.policy.max_gradient_norm))
        if not math.isfinite(norm):
            trainee.optimizer.zero_grad()
            raise LeydenError(
                f"the gradient of policy {policy!r} has norm {norm!r}, so no step was taken; the weights are those of "
                "the step before. Resume from the last checkpoint with a lower learning_rate"
            )
        trainee.set_learning_rate(learning_rate)
        trainee.step()
        return {"gradient_norm": norm, "learning_rate": learning_rate}

    def weights(self, policy: str) -> Weights:
        """Return the live tensors; the caller copies what it keeps."""
        return self._trainee(policy).weights()

    def export(self, policy: str, folder: Path) -> None:
        """Write a Hugging Face folder (weights, config, tokenizer), or an adapter in PEFT's format."""
        self._trainee(policy).write(folder)

    def save(self, folder: Path) -> None:
        """Write every policy's weights, value head and optimizer, and torch's random state."""
        checkpoints.save(folder, self._trainees, device=self.device)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, in place.

        Raises:
            ConfigurationError: the folder's policies, shapes or adapters differ from the open ones.
        """
        checkpoints.load(folder, self._trainees, device=self.device)

    def notes(self) -> list[str]:
        """Return what was planned of memory when this was opened, and what to change if it may not fit."""
        return [] if self._situation is None or not self._situation.policies else lines_of(self._situation)

    def release_memory(self) -> None:
        """Give the GPU memory that torch keeps for later back to the device; weights and optimizer stay."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Free the models and optimizers."""
        self._trainees.clear()
        self._shared = self._reference = None
        gc.collect()  # layers that compute their activations anew refer to themselves
        self.release_memory()

    def _new_trainee(self, policy: Policy, seed: int) -> Trainee:
        if policy.lora is None:
            model = self._load_trained()
            exact = {} if self.dtype == "float32" else dict(load_model(self._source).named_parameters())
            return FullTrainee(policy, model, exact=exact, source=self._source, layout=self._layout_of(model))
        from leyden_plugins.learners.torch.lora import SharedBase  # PEFT is slow to import

        if self._shared is None:
            self._shared = SharedBase(self._load_trained(), self._source)
        return self._shared.add(policy, policy.lora, seed=seed, layout=self._layout_of(self._shared.model))

    def _load(self) -> PreTrainedModel:
        return load_model(self._source, dtype=self.dtype, device=self.device)

    def _load_trained(self) -> PreTrainedModel:
        """Return a model that gradients pass through."""
        model = self._load()
        if self._situation is not None and self._situation.recompute:
            recompute_layers(model)
        return model

    def _layout_of(self, model: PreTrainedModel) -> Layout:
        """Return what the model allows.

        Raises:
            ConfigurationError: packing was asked for by name, and this model cannot be packed.
        """
        if self.layout in ("calls", "merged") or attends_fully(model):
            return self.layout
        if self.layout == "packed":
            raise ConfigurationError(
                f"layout='packed' needs layers that attend to everything before them, and {type(model).__name__} has "
                "others (sliding windows or states); use layout='auto' or 'merged'"
            )
        return "merged"

    def _trainee(self, policy: str) -> Trainee:
        if policy not in self._trainees:
            raise ConfigurationError(
                f"policy {policy!r} is not open in this learner; it trains {sorted(self._trainees)!r}"
            )
        return self._trainees[policy]

    def _micro_batches(self, trainee: Trainee, samples: Sequence[Sample]) -> Iterator[MicroBatch]:
        return micro_batches(
            samples,
            budget=self.micro_batch_tokens,
            layout=trainee.layout,
            attention=attention_of(trainee.model),
            device=self.device,
        )

    @contextmanager
    def _speaking(self, trainee: Trainee, *, reference: bool) -> Iterator[PreTrainedModel]:
        """Yield the model that computes with the policy's weights or, as its reference, with the base's."""
        if not reference:
            with trainee.speaking():
                yield trainee.model
        elif self._shared is not None:
            with self._shared.speaking_as(None):
                yield self._shared.model
        else:
            if self._reference is None:
                self._reference = self._load().requires_grad_(False)
            yield self._reference

    def _tokens(self, trainee: Trainee, part: MicroBatch, loss: Loss) -> Tokens:
        """Compute what `loss` needs of a micro-batch."""
        hidden_N_H = _hidden(trainee.model, part)
        scores = answer_scores(
            trainee.model,
            hidden_N_H,
            part.token_ids_N,
            part.temperature_N,
            entropies=bool(loss.entropy_coefficient),
        )
        return Tokens(
            logprobs=scores.logprobs,
            sampled_logprobs=part.sampled_logprobs_N,
            old_logprobs=part.old_logprobs_N,
            advantages=part.advantages_N,
            weights=part.weights_N,
            samples=part.sample_N,
            reference_logprobs=part.reference_logprobs_N,
            entropies=scores.entropies,
            values=predicted_values(trainee.value_head(), hidden_N_H) if loss.value_coefficient else None,
            old_values=part.values_N,
            returns=part.returns_N,
        )


def _hidden(model: PreTrainedModel, part: MicroBatch) -> Tensor:
    """Return the last hidden state at the place that predicts each trained token."""
    return hidden_at(
        model,
        part.input_ids_B_T,
        part.source_N,
        position_ids_B_T=part.position_ids_B_T,
        seen_until_B_T=part.seen_until_B_T,
    )


def _scatter(found: list[list[float]], part: MicroBatch, values_N: Tensor) -> None:
    """Append each token's value to its sample's."""
    for index, value in zip(part.sample_N.tolist(), values_N.tolist(), strict=True):
        found[index].append(value)
