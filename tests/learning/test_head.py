"""Scores in blocks of the vocabulary: the plain computation as the oracle, derivatives by differences, and memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from leyden.interfaces import Loss, Objective, Sample
from leyden.roles import LoRA, Policy
from leyden_plugins.learners.torch import TorchLearner, head
from leyden_plugins.learners.torch.head import BLOCKS_AT_ONCE, answer_scores
from leyden_plugins.torch_models.logprobs import token_logprobs
from tests.learning.builders import sample
from tests.learning.memory import LiveBytes

VOCABULARY, HIDDEN = 100, 8


def model_of(
    *, tied: bool = False, bias: bool = False, vocabulary: int = VOCABULARY, dtype: torch.dtype
) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        initializer_range=0.5,
    )
    model = Qwen3ForCausalLM(config)
    if bias:
        model.lm_head = nn.Linear(HIDDEN, vocabulary)
    nn.Module.to(model, dtype)
    return model


def inputs(count: int, dtype: torch.dtype, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(vocabulary, (count,))
    tokens[0], tokens[-1] = 0, vocabulary - 1
    temperatures = torch.tensor([1.0, 0.7, 1.5]).repeat(count)[:count]
    return torch.randn(count, HIDDEN, dtype=dtype), tokens, temperatures


def plain(model: PreTrainedModel, hidden: Tensor, tokens: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies by their definitions, from the whole logits."""
    head = model.get_output_embeddings()
    kind = torch.promote_types(hidden.dtype, torch.float32)
    wide = hidden.to(kind) @ head.weight.to(kind).T + (0 if head.bias is None else head.bias.to(kind))
    logprobs = torch.log_softmax(wide / temperatures[:, None], -1)
    return logprobs.gather(1, tokens[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def gradients(
    model: PreTrainedModel, hidden: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return both values, and the gradient of a random mixture of them by hidden states and parameters."""
    nn.Module.zero_grad(model)
    leaf = hidden.clone().requires_grad_()
    logprobs, entropies = function(leaf)
    torch.manual_seed(2)
    mix = torch.randn(2, len(hidden), dtype=logprobs.dtype)
    (mix[0] * logprobs + mix[1] * entropies).sum().backward()
    assert leaf.grad is not None
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return logprobs.detach(), entropies.detach(), {"hidden": leaf.grad, **found}


@pytest.mark.parametrize("elements", [1, 13, 7 * 64, 7 * 99])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_values_and_gradients_are_those_of_the_whole_logits(
    elements: int, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = model_of(bias=bias, dtype=dtype)
    hidden, tokens, temperatures = inputs(7, dtype)

    def in_blocks(leaf: Tensor) -> tuple[Tensor, Tensor]:
        scores = answer_scores(model, leaf, tokens, temperatures, entropies=True, elements=elements)
        assert type(scores.logprobs.grad_fn).__name__ == "_BlockwiseBackward"
        assert scores.entropies is not None
        return scores.logprobs, scores.entropies

    ours = gradients(model, hidden, in_blocks)
    theirs = gradients(model, hidden, lambda leaf: plain(model, leaf, tokens, temperatures))
    assert ours[0].dtype == ours[1].dtype == torch.promote_types(dtype, torch.float32)
    for found, expected in zip(ours[:2], theirs[:2], strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-5 if dtype != torch.float64 else 1e-12)
    assert ours[2].keys() == theirs[2].keys() == {"hidden", "lm_head.weight"} | ({"lm_head.bias"} if bias else set())
    for name, expected in theirs[2].items():
        assert float((ours[2][name] - expected).norm() / expected.norm()) < tolerance, name


def test_logits_in_bfloat16_are_not_rounded() -> None:
    """Large ones would be, to multiples of 0.125 and more."""
    model = model_of(dtype=torch.bfloat16)
    hidden, tokens, temperatures = inputs(7, torch.bfloat16)
    hidden = hidden * 30
    expected = plain(model, hidden, tokens, temperatures)[0]
    found = answer_scores(model, hidden, tokens, temperatures).logprobs
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(token_logprobs(model.lm_head(hidden), tokens, temperatures), expected, atol=0.02)


@pytest.mark.parametrize("entropies", [False, True])
def test_derivatives_are_those_of_finite_differences(entropies: bool) -> None:
    model = model_of(bias=True, vocabulary=11, dtype=torch.float64)
    hidden, tokens, temperatures = inputs(4, torch.float64, 11)
    weight, bias = model.lm_head.weight, model.lm_head.bias

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        found = head._Blockwise.apply(hidden, weight, bias, tokens, temperatures.double(), 3, entropies)
        return found if entropies else found[0]

    leaves = tuple(one.detach().clone().requires_grad_() for one in (hidden, weight, bias))
    assert torch.autograd.gradcheck(function, leaves)


def test_a_head_that_is_the_embedding_gets_both_of_its_gradients(tied_checkpoint: Path) -> None:
    samples = [sample([1, 2, 3], [4, 5, 6, number], advantage=1.0 + number) for number in range(3)]
    loss = Loss(name="policy_gradient", entropy_coefficient=0.1)
    whole, blocks = (gradient_of_learner(tied_checkpoint, samples, loss, most) for most in (1 << 24, 20))
    assert float((whole - blocks).norm() / whole.norm()) < 1e-5


def test_an_adapters_gradient_passes_through_the_blocks(checkpoint: Path) -> None:
    samples = [sample([1, 2, 3], [4, 5, 6, number], advantage=1.0 + number) for number in range(3)]
    loss = Loss(name="policy_gradient", entropy_coefficient=0.1)
    lora = LoRA(rank=2)
    whole, blocks = (gradient_of_learner(checkpoint, samples, loss, most, lora=lora) for most in (1 << 24, 20))
    assert float(whole.norm()) > 0
    assert float((whole - blocks).norm() / whole.norm()) < 1e-5


def gradient_of_learner(
    checkpoint: Path, samples: list[Sample], loss: Loss, elements: int, lora: LoRA | None = None
) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(head.BLOCK_ELEMENTS, "cpu", elements)
        learner = TorchLearner()
        learner.open([Policy("p", lora=lora)], str(checkpoint), seed=0)
        learner.forward_backward("p", [Objective(loss=loss, samples=samples)])
        learner.logprobs("p", samples)
    found = learner._trainees["p"].parameters.values()
    return torch.cat([one.grad.flatten() for one in found if one.grad is not None])


class Scaled(nn.Linear):
    """A head that is more than its weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


def test_a_head_of_another_kind_is_computed_whole() -> None:
    model = model_of(dtype=torch.float32)
    model.lm_head = Scaled(HIDDEN, VOCABULARY)
    hidden, tokens, temperatures = inputs(7, torch.float32)
    found = answer_scores(model, hidden, tokens, temperatures, elements=1).logprobs
    assert torch.equal(found, token_logprobs(model.lm_head(hidden), tokens, temperatures))
    assert not torch.allclose(found, plain_linear(model, hidden, tokens, temperatures))


def plain_linear(model: Qwen3ForCausalLM, hidden: Tensor, tokens: Tensor, temperatures: Tensor) -> Tensor:
    return token_logprobs(nn.functional.linear(hidden, model.lm_head.weight), tokens, temperatures)


def test_a_hook_on_the_head_is_not_passed_over() -> None:
    model = model_of(dtype=torch.float32)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    hidden, tokens, temperatures = inputs(7, torch.float32)
    found = answer_scores(model, hidden, tokens, temperatures, elements=1).logprobs
    assert torch.equal(found, token_logprobs(model.lm_head(hidden), tokens, temperatures))


def test_no_logits_are_kept_and_a_block_bounds_what_there_is_at_once() -> None:
    """512 tokens of 20,000: the whole logits are 41 MB in float32, and the plain way holds several of them."""
    count, vocabulary, elements = 512, 20_000, 1 << 18
    model = model_of(vocabulary=vocabulary, dtype=torch.float32)
    hidden, tokens, temperatures = inputs(count, torch.float32, vocabulary)
    hidden.requires_grad_()
    kept: list[int] = []

    def keep(one: Tensor) -> Tensor:
        kept.append(one.numel())
        return one

    def watched(most: int) -> LiveBytes:
        nn.Module.zero_grad(model)
        kept.clear()
        with LiveBytes() as live:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
                scores = answer_scores(model, hidden, tokens, temperatures, entropies=True, elements=most)
            assert scores.entropies is not None
            (scores.logprobs + scores.entropies).sum().backward()
        return live

    blocks = watched(elements)
    weight = vocabulary * HIDDEN
    assert max(kept) == weight
    assert blocks.largest <= max(elements, weight)
    assert blocks.peak < 4 * weight + BLOCKS_AT_ONCE * 4 * elements + 50_000
    whole = watched(count * vocabulary)
    assert whole.peak > 3 * 4 * count * vocabulary
