"""What is refused: options outside their range, options that do not go together, samples without a ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Literal

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Group, Transition
from leyden.roles import Policy
from leyden_plugins.algorithms.rl.corrections import ImportanceSampling

if TYPE_CHECKING:
    from leyden_plugins.algorithms.rl.policy_gradient import PolicyGradient

OF_THE_STEP = (
    "group_size",
    "most_batches",
    "normalisation",
    "rollout_tokens",
    "updates_per_step",
    "epochs",
    "off_distribution",
    "by_role",
    "replay",
    "seed",
)
"""Options that an algorithm inside another cannot have for itself."""
OF_THE_CALL = ("correction", "kl_coefficient", "kl_in", "kl_estimator", "entropy_coefficient", "overlong")
"""Options that it can have, where roles have algorithms of their own."""


def at_least_one(owner: object, *names: str) -> None:
    """Check whole numbers.

    Raises:
        ConfigurationError: one is below 1.
    """
    for name in names:
        if getattr(owner, name) < 1:
            raise ConfigurationError(f"{type(owner).__name__}: {name}={getattr(owner, name)!r} must be at least 1")


def one_of(owner: object, name: str, values: Sequence[object]) -> None:
    """Check a choice.

    Raises:
        ConfigurationError: none of `values`.
    """
    if getattr(owner, name) not in values:
        raise ConfigurationError(
            f"{type(owner).__name__}: {name}={getattr(owner, name)!r} must be one of {list(values)!r}"
        )


def in_range(owner: object, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    """Check a number, low <= it <= high; `open_low` refuses `low` itself.

    Raises:
        ConfigurationError: outside.
    """
    value = getattr(owner, name)
    if not (low < value <= high or (value == low and not open_low)) or math.isinf(value):
        raise ConfigurationError(
            f"{type(owner).__name__}: {name}={value!r} must be in {'(' if open_low else '['}{low:g}, {high:g}"
            f"{')' if math.isinf(high) else ']'}"
        )


def check_options(algorithm: PolicyGradient) -> None:
    """Check the options that all policy-gradient algorithms have.

    Raises:
        ConfigurationError: names the option.
    """
    name = type(algorithm).__name__
    at_least_one(algorithm, "group_size", "updates_per_step", "epochs")
    one_of(algorithm, "off_distribution", ("error", "drop"))
    one_of(algorithm, "kl_in", ("loss", "reward"))
    one_of(algorithm, "kl_estimator", (None, "k1", "k2", "k3"))
    in_range(algorithm, "kl_coefficient", 0, math.inf)
    in_range(algorithm, "entropy_coefficient", 0, math.inf)
    mdp.weigh([], algorithm.normalisation, rollout_tokens=algorithm.rollout_tokens)
    if algorithm.compares_rollouts and algorithm.group_size < 2:
        raise ConfigurationError(
            f"{name}: group_size={algorithm.group_size!r}: a group-relative advantage needs at least 2 rollouts a task"
        )
    if algorithm.ratio == "call" and getattr(algorithm.correction, "level", None) == "token":
        raise ConfigurationError(
            f"{name}: correction={algorithm.correction!r} weighs each token, but this loss has one ratio a call; use "
            "ImportanceSampling(level='sequence')"
        )
    if not isinstance(algorithm.correction, ImportanceSampling) and algorithm.correction not in ("auto", None):
        raise ConfigurationError(
            f"{name}: correction={algorithm.correction!r} must be 'auto', None or ImportanceSampling(...)"
        )
    if algorithm.kl_in == "reward" and algorithm.kl_estimator not in (None, "k1"):
        raise ConfigurationError(
            f"{name}: kl_estimator={algorithm.kl_estimator!r} with kl_in='reward': only k1 as a reward has the "
            "divergence's gradient; leave kl_estimator out, or use kl_in='loss'"
        )
    if algorithm.kl_in == "loss" and algorithm.kl_estimator == "k1":
        raise ConfigurationError(
            f"{name}: kl_estimator='k1' with kl_in='loss': the gradient of k1 as a loss is 0 on average, so it would "
            "add noise only; use 'k2' or 'k3', or kl_in='reward'"
        )
    if algorithm.ratio is None and (algorithm.updates_per_step > 1 or algorithm.epochs > 1):
        raise ConfigurationError(
            f"{name}: updates_per_step={algorithm.updates_per_step!r}, epochs={algorithm.epochs!r}: after the first "
            "optimizer step the weights have moved, and this loss has no ratio that would correct for it; use 1 and "
            "1, or an algorithm with a clipped ratio such as GRPO"
        )


def check_inner(outer: PolicyGradient, inner: PolicyGradient, *, where: str, shared: Sequence[str]) -> None:
    """Check an algorithm that works inside another.

    Raises:
        ConfigurationError: it has a value of its own for an option that it shares with the outer one, or needs what
            the outer one does not give.
    """
    if not hasattr(inner, "compares_rollouts"):
        raise ConfigurationError(f"{where}={inner!r} is no policy-gradient algorithm; use one such as GRPO()")
    defaults = {
        one.name: one.default_factory() if one.default_factory is not MISSING else one.default for one in fields(inner)
    }
    options = {one.name for one in fields(outer)}
    for name in shared:
        value = getattr(inner, name)
        if name in defaults and value != defaults[name] and value != getattr(outer, name):
            raise ConfigurationError(
                f"{where} has {name}={value!r}, but how a step is sampled and weighed is decided outside it, by "
                f"{type(outer).__name__} with {name}={getattr(outer, name)!r}; "
                + ("set it there" if name in options else "leave it out: that one has no such option")
            )
    if inner.normalisation == "dr_grpo" and outer.normalisation != "dr_grpo":
        raise ConfigurationError(
            f"{where}={type(inner).__name__} divides by a constant, but weights are decided outside it, by "
            f"{type(outer).__name__}(normalisation={outer.normalisation!r}); set normalisation='dr_grpo' and "
            "rollout_tokens there, or use GRPO(normalise_std=False) here"
        )
    if inner.compares_rollouts and outer.group_size < 2:
        raise ConfigurationError(f"{where} compares rollouts of a task, but group_size={outer.group_size!r}; use 2")
    if inner.ratio is None and (outer.updates_per_step > 1 or outer.epochs > 1):
        raise ConfigurationError(
            f"{where} has a loss without a ratio, but updates_per_step={outer.updates_per_step!r} and "
            f"epochs={outer.epochs!r}; use 1 and 1, or an algorithm with a clipped ratio there"
        )


def check_sampling(policy: Policy) -> None:
    """Check that a policy's training samples have log-probabilities of the distribution they are drawn from.

    Raises:
        ConfigurationError: names the sampling options.
    """
    sampling = policy.sampling
    wrong = {
        name: value
        for name, value, is_off in (
            ("temperature", sampling.temperature, sampling.temperature == 0),
            ("top_p", sampling.top_p, sampling.top_p is not None and sampling.top_p < 1),
            ("top_k", sampling.top_k, bool(sampling.top_k)),
        )
        if is_off
    }
    if wrong:
        raise ConfigurationError(
            f"policy {policy.name!r} samples with {wrong!r}, so its recorded log-probabilities are not those of the "
            "distribution it samples from, which a policy gradient needs; use Sampling(temperature=1.0, top_p=1.0, "
            "top_k=0)"
        )


def on_distribution(
    transitions: Sequence[Transition], groups: Sequence[Group], otherwise: Literal["error", "drop"]
) -> list[Transition]:
    """Return the transitions that a ratio can be taken of.

    Raises:
        ConfigurationError: there are others, and `otherwise` is `error`; names their parameters.
    """
    kept = [one for one in transitions if not one.off_distribution]
    if otherwise == "error" and len(kept) < len(transitions):
        first = next(one for one in transitions if one.off_distribution)
        raise ConfigurationError(
            f"{len(transitions) - len(kept)} of {len(transitions)} calls of policy {first.policy!r} were not sampled "
            f"from log-softmax(logits / temperature); the first is of role {first.role!r}, with "
            f"{dict(mdp.sampling_of(groups, first))!r}. Let Policy(sampling=Sampling(temperature=1.0, top_p=1.0, "
            "top_k=0)) replace the agent's own values, or leave such calls out: off_distribution='drop'"
        )
    return kept
