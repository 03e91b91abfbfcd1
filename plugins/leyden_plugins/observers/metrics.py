"""What each metric of a run measures, and which of them share a chart.

One idea: declared once here; `docs/metrics.md`, the report's axes and its explanations are read from it. With
several trainable policies a policy's metrics carry its name in front: `sql/loss/entropy`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What one number of a step is."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "reward/mean": Metric("reward", "mean total reward of the step's training rollouts that have one"),
    "reward/std": Metric("reward", "standard deviation of the same"),
    "groups/total": Metric("groups", "groups of rollouts of one task in the step"),
    "groups/without_signal": Metric("groups", "groups whose rewards are all equal: they teach nothing"),
    "evaluation/*": Metric("reward", "mean over the held-out tasks, by reward name; `reward` is the weighted total"),
    "loss/loss": Metric("loss", "summed loss of the policy's optimizer batches, averaged over the step's batches"),
    "loss/ratio_mean": Metric("ratio", "mean probability ratio to the weights that sampled; 1 before an update"),
    "loss/ratio_max": Metric("ratio", "largest such ratio of a trained token"),
    "loss/clip_fraction": Metric("share of tokens", "trained tokens whose gradient the clip removes"),
    "loss/entropy": Metric("nats a token", "mean -log p of the sampled tokens, an estimate of the entropy"),
    "loss/kl": Metric("nats a token", "divergence to the weights that sampled (k3 estimator, Schulman 2020)"),
    "loss/tokens": Metric("tokens", "trained tokens of an optimizer batch"),
    "loss/positions": Metric("positions", "positions computed for them, prompts and padding included"),
    "loss/padding_fraction": Metric("share of positions", "computed positions that are padding"),
    "gradient_norm": Metric("L2 norm", "norm of the gradient before clipping"),
    "learning_rate": Metric("learning rate", "of the step"),
    "advantage/std": Metric("advantage", "standard deviation of the advantages over the step's calls"),
    "policy/updates": Metric("policies", "policies that got a new version in the step"),
    "transitions/admitted": Metric("calls", "model calls that may be trained"),
    "samples/identical_groups": Metric("groups", "groups whose rollouts all sampled the same tokens (cache? T = 0?)"),
    "mdp/merge_ratio": Metric("ratio", "tokens in merged rows over tokens with one row a call"),
    "rollouts/kept": Metric("rollouts", "rollouts that rejection sampling imitates in the step"),
    "rollouts/total": Metric("rollouts", "rollouts since this process started"),
    "rollouts/failed": Metric("rollouts", "of these, those that raised, timed out or had no reward"),
    "rollouts/retried": Metric("rollouts", "attempts made again after an infrastructure failure"),
    "tokens/sampled": Metric("tokens", "tokens sampled by the policies since the step before"),
    "tokens/trained": Metric("tokens", "tokens with a weight in the step's loss"),
    "throughput/tokens_per_second": Metric("tokens/s", "sampled tokens over the step's whole wall time"),
    "time/sample_seconds": Metric("seconds", "waiting for the step's rollouts"),
    "time/learn_seconds": Metric("seconds", "in the learner"),
    "time/publish_seconds": Metric("seconds", "putting the new weights into the engine"),
    "time/evaluate_seconds": Metric("seconds", "evaluating the held-out tasks"),
    "time/checkpoint_seconds": Metric("seconds", "writing a checkpoint"),
}


@dataclass(frozen=True)
class Chart:
    """Metrics of one unit that are read together."""

    title: str
    metrics: tuple[str, ...]


CHARTS = (
    Chart("Reward", ("reward/mean", "evaluation/reward")),
    Chart("Held-out, by reward name", ("evaluation/*",)),
    Chart("Clip fraction", ("loss/clip_fraction",)),
    Chart("Probability ratio", ("loss/ratio_mean", "loss/ratio_max")),
    Chart("Gradient norm", ("gradient_norm",)),
    Chart("Entropy", ("loss/entropy",)),
    Chart("Divergence from the sampling weights", ("loss/kl",)),
    Chart("Loss", ("loss/loss",)),
    Chart("Throughput", ("throughput/tokens_per_second",)),
    Chart("Where the time goes", ("time/*",)),
    Chart("Groups", ("groups/total", "groups/without_signal", "samples/identical_groups")),
    Chart("Tokens", ("tokens/sampled", "tokens/trained")),
    Chart("Rollouts so far", ("rollouts/total", "rollouts/failed", "rollouts/retried")),
    Chart("Learning rate", ("learning_rate",)),
)
"""In the report's order; a metric of no chart gets one of its own behind these."""


def base_name(name: str) -> str | None:
    """Return the declared metric that `name` is, without a policy's name in front; `None` for an unknown one."""
    for candidate in (name, name.partition("/")[2]):
        if candidate in METRICS:
            return candidate
        if candidate.startswith("evaluation/"):
            return "evaluation/*"
    return None


def matches(pattern: str, name: str) -> bool:
    """Say whether `name`, with or without a policy's name in front, is meant by a chart's `pattern`."""
    names = (name, name.partition("/")[2])
    if pattern.endswith("*"):
        return any(one.startswith(pattern[:-1]) for one in names)
    return pattern in names


def unit_of(name: str) -> str:
    """Return a metric's unit; empty for an unknown one."""
    known = base_name(name)
    return METRICS[known].unit if known else ""
