"""The losses a learner knows by name, the terms added to them, and what is reported of both.

One idea: everything is a sum over tokens of weight times value, and the weight holds every normalisation already, so
losses of micro-batches only add up.
One trap: in optional values of a token NaN says that its sample takes no part in the terms that need them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leyden.errors import ConfigurationError
from leyden.interfaces import Loss, Sample


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The trained tokens of a micro-batch, one an element."""

    logprobs: Tensor
    """Under the weights as they are now; carries the gradient."""
    sampled_logprobs: Tensor
    """As recorded when sampled."""
    old_logprobs: Tensor
    """Under the learner's weights when the update began; the recorded ones where nobody asked."""
    advantages: Tensor
    weights: Tensor
    samples: Tensor
    """Which call each token is of; all trained tokens of a call are in one micro-batch."""
    reference_logprobs: Tensor | None = None
    entropies: Tensor | None = None
    """Of the next-token distribution each token was drawn from; carries the gradient."""
    values: Tensor | None = None
    """What the value head predicts before each token; carries the gradient."""
    old_values: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """A named loss, a token, before its weight."""

    losses: Tensor
    clipped: Tensor
    """True where the clip took the token's gradient away or, of CISPO, changed its size."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A loss on a micro-batch."""

    total: Tensor
    """Weighted and summed; what is differentiated."""
    clipped: Tensor
    """As in `Surrogate`."""


# ---- surrogates ------------------------------------------------------------------------------------------------


def policy_gradient(tokens: Tokens) -> Surrogate:
    """-A log p (REINFORCE, Williams 1992): off policy it has no correction but that in the weights."""
    return _never_clipped(-tokens.advantages * tokens.logprobs)


def policy_gradient_clip(tokens: Tokens, *, clip_low: float, clip_high: float) -> Surrogate:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r the token's ratio (PPO, Schulman et al. 2017, eq. 7).

    With clip_high above clip_low it is DAPO's clip-higher (Yu et al. 2025, eq. 8).
    """
    return _pessimistic((tokens.logprobs - tokens.old_logprobs).exp(), tokens.advantages, clip_low, clip_high)


def gspo(tokens: Tokens, *, clip_low: float, clip_high: float) -> Surrogate:
    """The same with the call's ratio, the geometric mean of its tokens' (GSPO, Zheng et al. 2025, eq. 5 to 7)."""
    _, call = torch.unique(tokens.samples, return_inverse=True)
    log_ratio = tokens.logprobs - tokens.old_logprobs
    sums = torch.zeros_like(log_ratio).index_add(0, call, log_ratio)
    counts = torch.zeros_like(log_ratio).index_add(0, call, torch.ones_like(log_ratio))
    return _pessimistic((sums / counts.clamp(min=1))[call].exp(), tokens.advantages, clip_low, clip_high)


def cispo(tokens: Tokens, *, clip_low: float, clip_high: float) -> Surrogate:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log p, sg a stop of the gradient (MiniMax-M1, 2025, eq. 4 and 5).

    The paper leaves the lower bound open: clip_low = 1.
    """
    ratio = (tokens.logprobs - tokens.old_logprobs).exp().detach()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = (bounded != ratio) & (tokens.advantages != 0)
    return Surrogate(losses=-bounded * tokens.advantages * tokens.logprobs, clipped=clipped)


def cross_entropy(tokens: Tokens) -> Surrogate:
    """-log p."""
    return _never_clipped(-tokens.logprobs)


def _pessimistic(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Surrogate:
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    clipped = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    return Surrogate(losses=-gain, clipped=clipped)


def _never_clipped(losses: Tensor) -> Surrogate:
    return Surrogate(losses=losses, clipped=torch.zeros_like(losses, dtype=torch.bool))


LOSSES: dict[str, tuple[Callable[..., Surrogate], frozenset[str]]] = {
    "policy_gradient": (policy_gradient, frozenset()),
    "policy_gradient_clip": (policy_gradient_clip, frozenset({"clip_low", "clip_high"})),
    "gspo": (gspo, frozenset({"clip_low", "clip_high"})),
    "cispo": (cispo, frozenset({"clip_low", "clip_high"})),
    "cross_entropy": (cross_entropy, frozenset()),
}
"""Name -> the function and the options it must be given."""


# ---- added terms -----------------------------------------------------------------------------------------------


def divergence(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) a token, log r = reference - policy (Schulman 2020, as TRL and GRPO's eq. 4).

    k1 = -log r; k2 = (log r)^2 / 2; k3 = r - 1 - log r. k1 and k3 are unbiased *values* on policy; as *losses*, which
    are differentiated token by token, only k2 has the expected gradient of KL(policy || reference): that of k1 is 0
    (it is noise alone), that of k3 is the gradient of KL(reference || policy) (Tang and Munos 2025,
    arXiv 2506.09477). Near the reference k2 and k3 agree to first order. TRL's default multiplies k3 by the ratio
    (DeepSeek-V3.2); this is the term without it (TRL's `use_bias_correction_kl=False`).
    """
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return torch.expm1(log_ratio) - log_ratio


def value_errors(tokens: Tokens, clip: float | None) -> Tensor:
    """(V - R)^2 / 2, or the larger of that and its error when V may move by at most `clip` (PPO's code).

    The clip is that of Engstrom et al. 2020, section 2: max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).
    """
    assert tokens.values is not None and tokens.returns is not None
    returns = _filled(tokens.returns, tokens.values)
    errors = (tokens.values - returns).square()
    if clip is not None and tokens.old_values is not None:
        old = _filled(tokens.old_values, tokens.values)
        bounded = old + (tokens.values - old).clamp(-clip, clip)
        errors = torch.maximum(errors, (bounded - returns).square())
    return errors / 2


def _filled(optional: Tensor, stand_in: Tensor) -> Tensor:
    """Return `optional` with `stand_in` for NaN: multiplied by 0 later, a NaN would come back in the backward pass."""
    return torch.where(optional.isnan(), stand_in.detach(), optional)


def loss_function(loss: Loss) -> Callable[[Tokens], Value]:
    """Return the named loss with its options filled in, and its added terms.

    Raises:
        ConfigurationError: an unknown name, or options that are not exactly the loss's own.
    """
    if loss.name not in LOSSES:
        raise ConfigurationError(f"loss {loss.name!r} is unknown to this learner; it has {sorted(LOSSES)!r}")
    function, options = LOSSES[loss.name]
    if set(loss.options) != options:
        raise ConfigurationError(
            f"loss {loss.name!r} takes exactly the options {sorted(options)!r}, got {sorted(loss.options)!r}"
        )
    if loss.kl_estimator not in ("k1", "k2", "k3"):
        raise ConfigurationError(f"kl_estimator={loss.kl_estimator!r} is unknown; use 'k1', 'k2' or 'k3'")

    def evaluate(tokens: Tokens) -> Value:
        surrogate = function(tokens, **loss.options)
        losses = surrogate.losses
        if loss.kl_coefficient and tokens.reference_logprobs is not None:
            reference = tokens.reference_logprobs
            kl = divergence(tokens.logprobs, _filled(reference, tokens.logprobs), loss.kl_estimator)
            losses = losses + loss.kl_coefficient * kl * ~reference.isnan()
        if loss.entropy_coefficient:
            assert tokens.entropies is not None
            losses = losses - loss.entropy_coefficient * tokens.entropies
        if loss.value_coefficient and tokens.returns is not None:
            errors = value_errors(tokens, loss.value_clip)
            losses = losses + loss.value_coefficient * errors * ~tokens.returns.isnan()
        return Value(total=(tokens.weights * losses).sum(), clipped=surrogate.clipped)

    return evaluate


def check_inputs(loss: Loss, samples: Sequence[Sample]) -> None:
    """Refuse a loss of which no sample has what an added term needs; some samples may go without.

    Raises:
        ConfigurationError: names the term and what to fill in.
    """
    needs = (
        ("kl_coefficient", loss.kl_coefficient, "reference_logprobs"),
        ("value_coefficient", loss.value_coefficient, "returns"),
        ("value_clip", loss.value_coefficient and loss.value_clip, "values"),
    )
    for option, value, needed in needs:
        if value and samples and all(getattr(sample, needed) is None for sample in samples):
            raise ConfigurationError(
                f"loss {loss.name!r} has {option}={value!r}, but no sample has {needed!r}; fill them in before the "
                f"update, or set {option} to {None if option == 'value_clip' else 0.0!r}"
            )


class Statistics:
    """Sums what `forward_backward` reports over micro-batches."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._ratio_max = 0.0
        self._mismatch_max = 0.0
        self._places = 0
        self._padding = 0
        self._sums: dict[str, tuple[float, int]] = {}
        """Name -> sum and how many tokens took part."""

    @torch.no_grad()
    def add(self, tokens: Tokens, value: Value, loss: Loss, *, places: int, padding: int) -> None:
        """Count a micro-batch of `places` computed positions, `padding` of them empty."""
        log_ratio = (tokens.logprobs - tokens.old_logprobs).double()
        moved = (tokens.logprobs - tokens.sampled_logprobs).double()
        ratio = log_ratio.exp()
        parts = {
            "ratio_mean": ratio,
            "clip_fraction": value.clipped,
            "entropy": -tokens.logprobs,
            "kl": torch.expm1(moved) - moved,
            "mismatch": moved.abs(),
        }
        if tokens.entropies is not None:
            parts["entropy_exact"] = tokens.entropies
        if tokens.reference_logprobs is not None:
            parts["kl_reference"] = divergence(tokens.logprobs.double(), tokens.reference_logprobs.double(), "k3")
        if tokens.values is not None and tokens.returns is not None:
            valued = ~tokens.returns.isnan()
            returns, misses = tokens.returns[valued].double(), (tokens.returns - tokens.values)[valued].double()
            parts |= {"value_loss": value_errors(tokens, loss.value_clip)[valued], "return": returns, "miss": misses}
            parts |= {"return_square": returns.square(), "miss_square": misses.square()}
        for name, part in parts.items():
            taking = part[~part.isnan()]
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + float(taking.double().sum()), count + len(taking))
        self._ratio_max = max(self._ratio_max, float(ratio.max()))
        self._mismatch_max = max(self._mismatch_max, float(moved.abs().max()))
        self._loss += float(value.total)
        self._places += places
        self._padding += padding

    def metrics(self) -> dict[str, float]:
        """Return the metrics of one `forward_backward`.

        Sums: `loss/loss`, `loss/tokens` (trained), `loss/positions` (computed, padding included). Averages over
        trained tokens: `loss/ratio_mean` (to the weights the update began with), `loss/clip_fraction` (tokens whose
        gradient the clip took away or, of CISPO, bounded), `loss/entropy` (mean -log p of the sampled tokens),
        `loss/kl` (to the weights that sampled; k3), `mismatch/mean` (|log-probability now - recorded|).
        `loss/ratio_max` and `mismatch/max` are maxima, `loss/padding_fraction` a share of positions. Where the samples
        and the loss allow: `loss/entropy_exact` (of the whole distribution), `loss/kl_reference` (k3),
        `loss/value_loss`, `loss/explained_variance` (1 - Var(R - V) / Var(R), 0 where the returns do not vary).
        """
        mean = {name: total / max(count, 1) for name, (total, count) in self._sums.items()}
        found = {"loss/loss": self._loss, "loss/ratio_max": self._ratio_max}
        found |= {"mismatch/mean": mean.get("mismatch", 0.0), "mismatch/max": self._mismatch_max}
        for name in ("ratio_mean", "clip_fraction", "entropy", "kl"):
            found[f"loss/{name}"] = mean.get(name, 0.0)
        for name in ("entropy_exact", "kl_reference", "value_loss"):
            if self._sums.get(name, (0.0, 0))[1]:
                found[f"loss/{name}"] = mean[name]
        if "loss/value_loss" in found:
            spread = mean["return_square"] - mean["return"] ** 2
            missed = mean["miss_square"] - mean["miss"] ** 2
            found["loss/explained_variance"] = 1 - missed / spread if spread > 1e-12 else 0.0
        found["loss/tokens"] = float(self._sums.get("ratio_mean", (0.0, 0))[1])
        found["loss/positions"] = float(self._places)
        found["loss/padding_fraction"] = self._padding / max(self._places, 1)
        return found
