"""The torch learner: full-parameter AdamW on one device, one set of weights a policy.

One idea: rows arrive with every normalisation in their weights, so they may be packed, sorted and cut in any way.
One trap: models stay in evaluation mode. Dropout would make the ratio differ from 1 before the first update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from leyden.errors import ConfigurationError, LeydenError
from leyden.extras import extra
from leyden.interfaces import Loss, TrainingRow, Weights
from leyden.roles import Policy

with extra("train"):
    import torch
    from torch import Tensor
    from transformers.modeling_utils import PreTrainedModel

    from leyden_plugins.learners.torch.batching import MicroBatch, micro_batches
    from leyden_plugins.learners.torch.losses import Statistics, Tokens, loss_function
    from leyden_plugins.torch_models.loading import (
        canonical_tensors,
        load_model,
        load_tokenizer,
        quiet,
        read_tensors,
    )
    from leyden_plugins.torch_models.logprobs import logits_at, token_logprobs

__all__ = ["TorchLearner"]

OPTIMIZER_FILE = "optimizer.pt"
RNG_FILE = "rng.pt"


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A policy being trained."""

    policy: Policy
    model: PreTrainedModel
    optimizer: torch.optim.AdamW
    share_prefixes: bool
    """The model computes packed rows exactly."""


class TorchLearner:
    """Implements `leyden.interfaces.Learner` with torch on one device.

    Args:
        device: a torch device, `cpu` or `cuda`.
        dtype: of weights, gradients and optimizer state; `float32` or `bfloat16`.
        micro_batch_tokens: positions computed at once, padding included.
        threads: torch's threads in this process; `None` leaves them as they are.
        share_prefixes: compute what rows have in common once, where every layer of the model attends fully.

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
        share_prefixes: bool = True,
    ) -> None:
        if micro_batch_tokens < 1 or (threads is not None and threads < 1):
            raise ConfigurationError(
                f"micro_batch_tokens={micro_batch_tokens!r} and threads={threads!r} must be at least 1"
            )
        if dtype not in ("float32", "bfloat16"):
            raise ConfigurationError(f"dtype={dtype!r} cannot be trained here; use 'float32' or 'bfloat16'")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError(f"device={device!r}, but torch finds no CUDA device here; use device='cpu'")
        self.device = device
        self.dtype = dtype
        self.micro_batch_tokens = micro_batch_tokens
        self.threads = threads
        self.share_prefixes = share_prefixes
        self._trainees: dict[str, Trainee] = {}
        self._base: str | None = None

    def open(self, policies: Sequence[Policy], model: str, *, seed: int) -> None:
        """Load the base weights once a trainable policy.

        Raises:
            ConfigurationError: the model cannot be loaded, or its output is more than its head's.
        """
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.manual_seed(seed)
        self._base = model
        for policy in policies:
            if policy.trainable:
                loaded = load_model(model, dtype=self.dtype, device=self.device)
                self._trainees[policy.name] = Trainee(
                    policy=policy,
                    model=loaded,
                    optimizer=_optimizer(policy, loaded),
                    share_prefixes=self.share_prefixes and _attends_fully(loaded),
                )
        for trainee in self._trainees.values():
            self._check_logits(trainee)

    def forward_backward(self, policy: str, rows: Sequence[TrainingRow], loss: Loss) -> dict[str, float]:
        """Add the gradient of the summed loss over `rows`; return the metrics of `Statistics.metrics`.

        Raises:
            ConfigurationError: an unknown policy or loss, or a row that has no log-probabilities.
        """
        trainee = self._trainee(policy)
        function = loss_function(loss)
        statistics = Statistics(loss.options)
        for batch in self._batches(trainee, rows):
            tokens = Tokens(
                logprobs=self._logprobs(trainee, batch),
                sampled_logprobs=batch.sampled_logprobs_N,
                advantages=batch.advantages_N,
                weights=batch.weights_N,
            )
            value = function(tokens)
            value.backward()  # type: ignore[no-untyped-call]  # torch leaves this one method untyped
            statistics.add(tokens, value, places=batch.input_ids_B_T.numel(), padding=batch.padding)
        return statistics.metrics()

    @torch.no_grad()
    def logprobs(self, policy: str, rows: Sequence[TrainingRow]) -> list[list[float]]:
        """Return log-softmax(logits / temperature) of every masked token, row by row in order.

        Raises:
            ConfigurationError: an unknown policy, or a row that has no log-probabilities.
        """
        trainee = self._trainee(policy)
        found: list[list[float]] = [[] for _ in rows]
        for batch in self._batches(trainee, rows):
            values = self._logprobs(trainee, batch).tolist()
            for row, value in zip(batch.row_N.tolist(), values, strict=True):
                found[row].append(value)
        return found

    def optim_step(self, policy: str, learning_rate: float) -> dict[str, float]:
        """Clip the gradient, step AdamW, clear the gradient.

        Raises:
            LeydenError: the gradient is not finite; weights and optimizer are left as they were.
        """
        trainee = self._trainee(policy)
        norm = float(torch.nn.utils.clip_grad_norm_(trainee.model.parameters(), trainee.policy.max_gradient_norm))
        if not math.isfinite(norm):
            trainee.optimizer.zero_grad()
            raise LeydenError(
                f"the gradient of policy {policy!r} has norm {norm!r}, so no step was taken; the weights are those of "
                "the step before. Resume from the last checkpoint with a lower learning_rate"
            )
        for group in trainee.optimizer.param_groups:
            group["lr"] = learning_rate
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()
        return {"gradient_norm": norm, "learning_rate": learning_rate}

    def weights(self, policy: str) -> Weights:
        """Return the live tensors; the caller copies what it keeps."""
        model = self._trainee(policy).model
        return Weights(tensors={name: tensor.detach() for name, tensor in model.named_parameters()})

    def export(self, policy: str, folder: Path) -> None:
        """Write the policy as a Hugging Face folder: weights, config, tokenizer."""
        with quiet():
            self._trainee(policy).model.save_pretrained(folder)
        assert self._base is not None  # a trainee exists, so `open` has run
        load_tokenizer(self._base).save_pretrained(folder)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder and the optimizer's state a policy, and torch's random state."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, trainee in self._trainees.items():
            self.export(name, folder / name)
            torch.save(trainee.optimizer.state_dict(), folder / name / OPTIMIZER_FILE)
        random_states = {"cpu": torch.get_rng_state()}
        if torch.device(self.device).type == "cuda":
            random_states["cuda"] = torch.cuda.get_rng_state(self.device)
        torch.save(random_states, folder / RNG_FILE)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, in place.

        Raises:
            ConfigurationError: the folder's policies or shapes differ from the open ones.
        """
        saved = {file.parent.name for file in folder.glob(f"*/{OPTIMIZER_FILE}")}
        if saved != set(self._trainees):
            raise ConfigurationError(
                f"checkpoint {str(folder)!r} holds the policies {sorted(saved)!r}, this run trains "
                f"{sorted(self._trainees)!r}; resume with the policies the run began with"
            )
        for name, trainee in self._trainees.items():
            tensors = canonical_tensors(trainee.model, read_tensors(folder / name))
            with torch.no_grad():
                for key, parameter in trainee.model.named_parameters():
                    parameter.copy_(tensors[key])
            trainee.optimizer.load_state_dict(
                torch.load(folder / name / OPTIMIZER_FILE, map_location=self.device, weights_only=True)
            )
            trainee.optimizer.zero_grad()
        random_states = torch.load(folder / RNG_FILE, weights_only=True)
        torch.set_rng_state(random_states["cpu"])
        if "cuda" in random_states and torch.device(self.device).type == "cuda":
            torch.cuda.set_rng_state(random_states["cuda"], self.device)

    def close(self) -> None:
        """Free the models and optimizers."""
        self._trainees.clear()

    def _trainee(self, policy: str) -> Trainee:
        if policy not in self._trainees:
            raise ConfigurationError(
                f"policy {policy!r} is not open in this learner; it trains {sorted(self._trainees)!r}"
            )
        return self._trainees[policy]

    def _batches(self, trainee: Trainee, rows: Sequence[TrainingRow]) -> Iterator[MicroBatch]:
        return micro_batches(
            rows,
            budget=self.micro_batch_tokens,
            share_prefixes=trainee.share_prefixes,
            device=self.device,
        )

    def _logprobs(self, trainee: Trainee, batch: MicroBatch) -> Tensor:
        logits_N_V = logits_at(
            trainee.model,
            batch.input_ids_B_T,
            batch.source_N,
            position_ids_B_T=batch.position_ids_B_T,
            visible_B_1_T_T=batch.visible_B_1_T_T,
        )
        return token_logprobs(logits_N_V, batch.token_ids_N, batch.temperature_N)

    @torch.no_grad()
    def _check_logits(self, trainee: Trainee) -> None:
        """Compare the way rows are computed here with the model's own forward pass, on three rows with a common prefix.

        Raises:
            ConfigurationError: they differ; the model changes its logits after the head, or masks in its own way.
        """
        stem, tails = [1, 2, 3, 4], [[5, 6], [6, 5], [2]]
        rows = [
            TrainingRow(
                token_ids=[*stem, *tail],
                mask=[False] * len(stem) + [True] * len(tail),
                weights=[1.0] * (len(stem) + len(tail)),
                advantages=[1.0] * (len(stem) + len(tail)),
                logprobs=[0.0] * (len(stem) + len(tail)),
            )
            for tail in tails
        ]
        ours = torch.tensor([value for row in self.logprobs(trainee.policy.name, rows) for value in row])
        own: list[Tensor] = []
        for row, tail in zip(rows, tails, strict=True):
            logits = trainee.model(torch.tensor([row.token_ids], device=self.device)).logits[0]
            targets = torch.tensor(tail, device=self.device)
            own.append(token_logprobs(logits[len(stem) - 1 : -1], targets).cpu())
        tolerance = 1e-3 if self.dtype == "float32" else 5e-2
        if not torch.allclose(ours, torch.cat(own), atol=tolerance):
            raise ConfigurationError(
                f"{type(trainee.model).__name__} gives other log-probabilities than its head alone, by up to "
                f"{float((ours - torch.cat(own)).abs().max()):.3g}; this learner cannot train it"
                + (", but may with TorchLearner(share_prefixes=False)" if trainee.share_prefixes else "")
            )


def _optimizer(policy: Policy, model: PreTrainedModel) -> torch.optim.AdamW:
    """Return fused AdamW; weight decay is for matrices, not for norms and biases."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": policy.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=policy.learning_rate,
        betas=policy.betas,
        fused=True,
    )


def _attends_fully(model: PreTrainedModel) -> bool:
    """Say whether an explicit mask means the same in every layer: no sliding windows, no recurrence."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    return set(layers) == {"full_attention"} and not getattr(config, "sliding_window", None)
