"""What each metric of a run measures, and which of them share a chart.

One idea: declared once here; `docs/metrics.md`, the report's axes and its explanations are read from it. A name that
ends in `*` stands for several metrics, one a reward, role or type of failure. With several trainable policies a
policy's metrics carry its name in front: `sql/loss/entropy`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What one number of a step is."""

    unit: str
    meaning: str


THEMES: dict[str, dict[str, Metric]] = {
    "Reward": {
        "reward/mean": Metric("reward", "mean total reward of the step's training rollouts that have one"),
        "reward/std": Metric("reward", "standard deviation of the same"),
        "reward/name/*": Metric("reward", "mean of a named reward, before its weight, over the rollouts that have it"),
        "reward/role/*": Metric(
            "reward",
            "by role: mean total of the rollouts in which it spoke; `reward/role/<role>/<name>`: mean of what the "
            "role or its calls were given by that name",
        ),
        "evaluation/*": Metric(
            "reward", "mean over the held-out tasks, by reward name; `reward` is the weighted total"
        ),
    },
    "Signal": {
        "groups/total": Metric("groups", "groups of rollouts of one task in the step"),
        "groups/without_signal": Metric("groups", "groups whose rewards are all equal: they teach nothing"),
        "groups/without_signal_share": Metric("share", "the same over all groups"),
        "groups/rejected": Metric("groups", "groups that the algorithm sampled and did not accept for the step"),
        "advantage/mean": Metric("advantage", "mean advantage of the policy's calls"),
        "advantage/std": Metric("advantage", "standard deviation of the same"),
        "advantage/max": Metric("advantage", "largest absolute advantage of a call"),
        "advantage/zero_share": Metric("share", "calls whose advantage is 0: they add nothing to the gradient"),
        "diversity/distinct_answers": Metric(
            "share",
            "of a role's first answers in a group, (distinct - 1) / (answers - 1), mean over groups: 0 all the same, "
            "1 all different",
        ),
        "samples/entropy": Metric(
            "nats a token", "mean -log p of all sampled tokens, as recorded: an estimate of the policy's entropy"
        ),
        "samples/identical_groups": Metric(
            "groups", "groups whose rollouts all sampled the same tokens (cache? T = 0?)"
        ),
    },
    "Loss": {
        "loss/loss": Metric("loss", "summed loss of the policy's optimizer batches, averaged over the step's batches"),
        "loss/ratio_mean": Metric("ratio", "mean probability ratio to the weights the step's update began with"),
        "loss/ratio_max": Metric("ratio", "largest such ratio of a trained token"),
        "loss/clip_fraction": Metric("share", "trained tokens whose gradient the clip removes (CISPO: bounds)"),
        "loss/entropy": Metric("nats a token", "the same over the trained tokens alone, under the learner's weights"),
        "loss/entropy_exact": Metric("nats a token", "entropy of the whole distribution, where the loss needs it"),
        "loss/kl": Metric("nats a token", "divergence to the weights that sampled (k3 estimator, Schulman 2020)"),
        "loss/kl_reference": Metric("nats a token", "divergence to the base weights (k3), where the loss needs it"),
        "loss/value_loss": Metric("squared reward", "half the squared error of the value head"),
        "loss/explained_variance": Metric(
            "share", "1 - Var(return - value) / Var(return): 1 is a perfect value head, 0 a useless one"
        ),
        "preference/loss": Metric("loss", "-log sigmoid(margin) of a preference loss, mean over the step's pairs"),
        "preference/margin": Metric(
            "log-odds", "mean margin, before the update, by which chosen rollouts are preferred"
        ),
        "preference/accuracy": Metric("share", "pairs whose margin is above 0"),
        "preference/pairs": Metric("pairs", "pairs of rollouts in an optimizer batch"),
        "gradient_norm": Metric("L2 norm", "norm of the gradient before clipping"),
        "learning_rate": Metric("learning rate", "of the step"),
        "policy/updates": Metric("policies", "policies that got a new version in the step"),
    },
    "Prompts": {
        "prompts/score_before": Metric("reward", "mean on the selection tasks under what the roles said before"),
        "prompts/score_after": Metric("reward", "the same under the best candidate; compared with, so not held out"),
        "prompts/candidates": Metric("candidates", "prompts that were compared on the selection tasks"),
        "prompts/rejected": Metric("proposals", "proposals that were no better than their parent on a few tasks"),
        "prompts/rollouts": Metric("rollouts", "different rollouts that the search looked at, found or paid"),
        "prompts/unrewarded": Metric("rollouts", "of these, those without a reward, which count as 0"),
        "prompts/reflection_calls": Metric("calls", "calls of the reflection model"),
        "prompts/reflection_tokens": Metric("tokens", "asked and answered, as far as the model tells"),
        "prompts/reflection_errors": Metric("calls", "of these calls, those that failed"),
    },
    "Off-policy": {
        "mismatch/mean": Metric(
            "nats a token", "mean |recorded log-probability - the learner's own| before the step's first update"
        ),
        "mismatch/max": Metric("nats a token", "largest such difference"),
        "policy/staleness_mean": Metric("updates", "updates the policy has had since its calls were sampled"),
        "policy/staleness_max": Metric("updates", "largest number of such updates"),
        "correction/mean": Metric("ratio", "mean importance weight of the tokens, where a correction is used"),
        "correction/zero_share": Metric("share", "tokens that the correction leaves out"),
    },
    "Calls and lengths": {
        "transitions/admitted": Metric("calls", "model calls that may be trained"),
        "rollouts/calls_mean": Metric("calls", "model calls a rollout, of all roles, trained or not"),
        "rollouts/calls_max": Metric("calls", "most model calls of one rollout"),
        "turns/mean": Metric("calls", "admitted calls of one of the policy's roles in a rollout"),
        "turns/max": Metric("calls", "most such calls"),
        "lengths/prompt_mean": Metric("tokens", "prompt of a call of the policy"),
        "lengths/prompt_p95": Metric("tokens", "95th percentile of the same"),
        "lengths/prompt_max": Metric("tokens", "longest such prompt"),
        "lengths/answer_mean": Metric("tokens", "answer of the policy, trained or not"),
        "lengths/answer_p95": Metric("tokens", "95th percentile of the same"),
        "lengths/answer_max": Metric("tokens", "longest such answer"),
        "lengths/overlong_share": Metric("share", "answers cut off at their limit (`finish_reason` is `length`)"),
    },
    "Tokens and layout": {
        "tokens/sampled": Metric("tokens", "tokens sampled by the policies since the step before"),
        "tokens/trained": Metric("tokens", "tokens with a weight in the step's loss"),
        "tokens/trained_per_sampled": Metric(
            "ratio", "the same over all tokens that the policy sampled for the step's rollouts; above 1 with epochs"
        ),
        "tokens/retokenised_share": Metric(
            "share", "imitated calls that were recorded as text alone and tokenised anew"
        ),
        "mdp/merge_ratio": Metric(
            "ratio",
            "tokens when calls of a rollout that extend each other share a row, over tokens with one row a call",
        ),
        "loss/tokens": Metric("tokens", "trained tokens of an optimizer batch"),
        "loss/positions": Metric("positions", "positions computed for them, prompts and padding included"),
        "loss/padding_fraction": Metric("share", "computed positions that are padding"),
        "forks/template": Metric("calls", "prompts that the chat template rendered unlike the call they go on from"),
        "forks/tokenisation": Metric("calls", "prompts of the same text in other tokens"),
        "forks/edit": Metric("calls", "prompts of which the agent changed the history"),
        "forks/spliced_share": Metric("share", "prompt tokens that exact continuation took from the record"),
    },
    "Rollouts": {
        "rollouts/kept": Metric("rollouts", "rollouts that are imitated in the step"),
        "rollouts/failed_share": Metric("share", "the step's rollouts that failed or timed out"),
        "rollouts/unrewarded_share": Metric(
            "share", "the step's rollouts without a reward: dropped on purpose, or the judge failed; never trained"
        ),
        "rollouts/total": Metric("rollouts", "rollouts since this process started"),
        "rollouts/failed": Metric("rollouts", "of these, those that raised, timed out or had no reward"),
        "rollouts/failed/*": Metric("rollouts", "the same by type of failure"),
        "rollouts/retried": Metric("rollouts", "attempts made again after an infrastructure failure"),
    },
    "Time": {
        "throughput/tokens_per_second": Metric("tokens/s", "sampled tokens over the step's whole wall time"),
        "time/sample_seconds": Metric("seconds", "waiting for the step's rollouts"),
        "time/learn_seconds": Metric("seconds", "in the learner"),
        "time/publish_seconds": Metric("seconds", "putting the new weights into the engine"),
        "time/evaluate_seconds": Metric("seconds", "evaluating the held-out tasks"),
        "time/checkpoint_seconds": Metric("seconds", "writing a checkpoint"),
    },
}
"""In the order of `docs/metrics.md`, which has a table a theme."""

METRICS: dict[str, Metric] = {name: metric for metrics in THEMES.values() for name, metric in metrics.items()}


@dataclass(frozen=True)
class Chart:
    """Metrics of one unit that are read together."""

    title: str
    metrics: tuple[str, ...]
    least: int = 1
    """With fewer curves the chart is left out: another one shows the same."""
    is_idle_at_zero: bool = False
    """Nothing but zeros is good news, and stands behind the other charts."""


CHARTS = (
    Chart("Reward", ("reward/mean", "evaluation/reward")),
    Chart("Held-out, by reward name", ("evaluation/*",), least=2),
    Chart("Reward, by role", ("reward/role/*",), least=2),
    Chart("Reward, by name", ("reward/name/*",), least=2),
    Chart(
        "No signal, distinct answers, failed, cut off",
        (
            "groups/without_signal_share",
            "diversity/distinct_answers",
            "rollouts/failed_share",
            "lengths/overlong_share",
        ),
    ),
    Chart("Advantages", ("advantage/std", "advantage/max")),
    Chart("Entropy", ("samples/entropy", "loss/entropy", "loss/entropy_exact")),
    Chart("Divergence", ("loss/kl", "loss/kl_reference")),
    Chart("Engine against learner", ("mismatch/mean", "mismatch/max")),
    Chart("Clip fraction", ("loss/clip_fraction", "correction/zero_share")),
    Chart("Probability ratio", ("loss/ratio_mean", "loss/ratio_max", "correction/mean")),
    Chart("Gradient norm", ("gradient_norm",)),
    Chart("Loss", ("loss/loss", "preference/loss")),
    Chart("Explained variance", ("loss/explained_variance",)),
    Chart("Staleness", ("policy/staleness_mean", "policy/staleness_max"), is_idle_at_zero=True),
    Chart("Answer length", ("lengths/answer_mean", "lengths/answer_p95", "lengths/answer_max")),
    Chart("Calls", ("rollouts/calls_mean", "turns/mean")),
    Chart("Tokens", ("tokens/sampled", "tokens/trained")),
    Chart("Throughput", ("throughput/tokens_per_second",)),
    Chart("Where the time goes", ("time/*",)),
    Chart("Failures so far", ("rollouts/failed/*", "rollouts/retried"), is_idle_at_zero=True),
)
"""In the report's order; a metric of no chart gets one of its own behind these."""


def base_name(name: str) -> str | None:
    """Return the declared metric that `name` is, without a policy's name in front; `None` for an unknown one."""
    for candidate in (name, name.partition("/")[2]):
        if candidate in METRICS:
            return candidate
        for pattern in METRICS:
            if pattern.endswith("*") and candidate.startswith(pattern[:-1]):
                return pattern
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
