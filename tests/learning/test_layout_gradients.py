"""What the torch learner makes of layouts: costs, masks, micro-batches, and the same gradient from all."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import MambaConfig, MambaForCausalLM

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Loss, Objective, Sample, Transition
from leyden.layouts import Attention, Layout
from leyden_plugins.learners import torch as torch_learner
from leyden_plugins.learners.torch import TorchLearner, batching
from leyden_plugins.learners.torch.batching import STRETCH, MicroBatch, attention_of, micro_batches
from leyden_plugins.torch_models import logprobs
from leyden_plugins.torch_models.loading import load_model
from leyden_plugins.torch_models.tree_masks import BLOCK, additive_mask, block_mask, mask_mod
from tests.learning.builders import POLICY, rich_transitions, sample
from tests.learning.conftest import VOCABULARY, write_checkpoint
from tests.learning.conversations import conversations

CLIP = Loss(name="policy_gradient_clip", options={"clip_low": 0.2, "clip_high": 0.2})
LOSSES = (CLIP, Loss(name="gspo", options={"clip_low": 0.2, "clip_high": 0.2}), Loss(name="cross_entropy"))
NORMALISATIONS = get_args(mdp.Normalisation)
FREE = Attention(pair_cost=0.0, mask_entries=None)
"""Attention costs nothing, so that positions alone count."""
MASKS = Attention(pair_cost=0.0, mask_entries=10**6)
DEAR = Attention(pair_cost=0.001, mask_entries=10**6)


def test_the_cost_of_a_model_is_the_ratio_of_its_multiplications(checkpoint: Path, tied_checkpoint: Path) -> None:
    """Two layers of 2 heads x 16; by hand: q, k, v, o and three MLP matrices, and norms."""
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 16
    for kind in (checkpoint, tied_checkpoint):
        found = attention_of(load_model(kind))
        assert found.pair_cost == pytest.approx(2 * 32 * 2 / (2 * layer + 32))
        assert found.mask_entries == 8192**2


# ---- masks -----------------------------------------------------------------------------------------------------


def seen(seen_until_B_T: Tensor) -> Tensor:
    """Return [B, T, T] by the definition."""
    return torch.tensor(
        [
            [[key <= query < int(until) for key, until in enumerate(row)] for query in range(len(row))]
            for row in seen_until_B_T
        ]
    )


def group_of(prompt: int, answers: Sequence[int]) -> list[Sample]:
    return [sample([1] * prompt, [number] * length) for number, length in enumerate(answers, 2)]


@given(conversations(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=30)
def test_the_masks_say_what_the_definition_says(calls: list[Transition], dtype: torch.dtype) -> None:
    for batch in micro_batches(mdp.samples(calls), budget=200, layout="packed", attention=MASKS):
        if batch.seen_until_B_T is not None:
            count, length = batch.input_ids_B_T.shape
            expected = seen(batch.seen_until_B_T)
            mask = additive_mask(batch.seen_until_B_T, dtype)
            assert mask.dtype == dtype
            assert torch.equal(mask[:, 0] == 0, expected)
            assert torch.equal(mask[:, 0].isinf(), ~expected)
            by_pair = create_mask(mask_mod(batch.seen_until_B_T), count, 1, length, length, device="cpu")
            assert torch.equal(by_pair[:, 0], expected)
            assert expected.any(-1).all()  # padding too: a query that sees nothing would be NaN


@pytest.mark.parametrize("lengths", [[20, 200, 30], [1, 1, 1], [300, 300], [128, 128, 128]])
def test_blocks_are_those_that_flex_attention_would_find(lengths: list[int]) -> None:
    calls = group_of(150, lengths)
    (batch,) = micro_batches(calls, budget=8192, layout="packed", attention=FREE)
    assert batch.seen_until_B_T is not None
    length = batch.input_ids_B_T.shape[1]
    assert length % BLOCK == 0
    ours = block_mask(batch.seen_until_B_T)
    theirs = create_block_mask(mask_mod(batch.seen_until_B_T), 1, 1, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.full_kv_num_blocks is not None and theirs.full_kv_num_blocks is not None
    assert torch.equal(ours.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    query, key, value = torch.randn(3, 1, 2, length, 16)
    whole = scaled_dot_product_attention(query, key, value, additive_mask(batch.seen_until_B_T, torch.float32))
    assert torch.allclose(flex_attention(query, key, value, block_mask=ours), whole, atol=1e-5)


def test_blocks_of_rows_of_several_lengths_stand_beside_each_other() -> None:
    rows = [[5] * 5 + [9] * 4, [300] * 200 + [250] * 50 + [300] * 50]
    until = torch.stack([torch.arange(1, 3 * BLOCK + 1)] * 2)
    for number, row in enumerate(rows):
        until[number, : len(row)] = torch.tensor(row)
    theirs = create_block_mask(mask_mod(until), 2, 1, 3 * BLOCK, 3 * BLOCK, device="cpu")
    assert torch.equal(block_mask(until).to_dense(), theirs.to_dense())


# ---- micro-batches ---------------------------------------------------------------------------------------------


def test_samples_with_one_prompt_share_its_positions() -> None:
    calls = [sample([1] * 20, [2, number]) for number in range(8)]
    (batch,) = micro_batches(
        calls, budget=8192, layout="auto", attention=Attention(pair_cost=0.001, mask_entries=10**6)
    )
    assert batch.input_ids_B_T.shape == (1, 20 + 1 + 8)
    assert sorted(batch.sample_N.tolist()) == sorted([*range(8)] * 2)


def test_rows_that_share_nothing_need_no_mask_and_stand_apart_from_those_that_share() -> None:
    calls = [sample([number] * (5 + number), [1]) for number in range(3)] + [sample([9] * 8, [k]) for k in (1, 2)]
    batches = list(micro_batches(calls, budget=8192, layout="packed"))
    assert [(len(one.input_ids_B_T), one.seen_until_B_T is None) for one in batches][-1] == (1, False)
    assert all(one.seen_until_B_T is None and one.position_ids_B_T is None for one in batches[:-1])


def test_a_budget_bounds_a_micro_batch_and_padding_stays_small() -> None:
    calls = [sample([number] * (5 + number), [1]) for number in range(40)]
    batches = list(micro_batches(calls, budget=64, layout="merged"))
    for batch in batches:
        count, length = batch.input_ids_B_T.shape
        assert count == 1 or count * length <= 64
        assert batch.padding <= (1 - 1 / STRETCH) * count * length
    assert sorted(one for batch in batches for one in batch.sample_N.tolist()) == [*range(40)]


def test_the_masks_of_a_micro_batch_are_bounded() -> None:
    calls = [sample([group] * 20, [number] * 5) for group in range(1, 9) for number in (10, 11)]
    attention = Attention(pair_cost=0.0, mask_entries=2 * 30 * 30)

    def shapes(batches: Sequence[MicroBatch]) -> list[tuple[int, ...]]:
        return [tuple(one.input_ids_B_T.shape) for one in batches]

    assert shapes(list(micro_batches(calls, budget=8192, layout="packed", attention=attention))) == [(2, 30)] * 4
    assert shapes(list(micro_batches(calls, budget=8192, layout="packed"))) == [(8, 30)]


# ---- gradients -------------------------------------------------------------------------------------------------


def gradient(checkpoint: Path, samples: Sequence[Sample], loss: Loss = CLIP, **options: object) -> Tensor:
    """Return the whole gradient as one vector."""
    learner = TorchLearner(**options)  # type: ignore[arg-type]  # a test hands its options through
    learner.open([POLICY], str(checkpoint), seed=0)
    return gradient_of(learner, samples, loss)


def gradient_of(learner: TorchLearner, samples: Sequence[Sample], loss: Loss = CLIP) -> Tensor:
    model = learner._trainees["sql"].model
    torch.nn.Module.zero_grad(model)
    learner.forward_backward("sql", [Objective(loss=loss, samples=samples)])
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_every_layout_gives_the_same_gradient(checkpoint: Path, normalisation: mdp.Normalisation, loss: Loss) -> None:
    weighed = mdp.weigh(
        rich_transitions(VOCABULARY, temperatures=(1.0, 0.7)),
        normalisation,
        rollout_tokens=50 if normalisation == "dr_grpo" else None,
    )
    calls = mdp.samples(weighed)
    reference = gradient(checkpoint, calls, loss, layout="calls", micro_batch_tokens=1)
    for layout in get_args(Layout):
        assert relative(gradient(checkpoint, calls, loss, layout=layout), reference) < 1e-5
        assert relative(gradient(checkpoint, calls[::-1], loss, layout=layout, micro_batch_tokens=60), reference) < 1e-5


def test_tied_embeddings_get_the_same_gradient_too(tied_checkpoint: Path) -> None:
    calls = mdp.samples(mdp.weigh(rich_transitions(VOCABULARY), "per_rollout"))
    reference = gradient(tied_checkpoint, calls, layout="calls")
    for layout in ("merged", "packed"):
        assert relative(gradient(tied_checkpoint, calls, layout=layout), reference) < 1e-5


@pytest.fixture(scope="module")
def learners(checkpoint: Path) -> dict[str, TorchLearner]:
    opened = {}
    for layout in get_args(Layout):
        opened[layout] = TorchLearner(layout=layout)
        opened[layout].open([POLICY], str(checkpoint), seed=0)
    return opened


@given(
    calls=conversations(),
    layout=st.sampled_from(["merged", "packed", "auto"]),
    budget=st.sampled_from([1, 30, 8192]),
    loss=st.sampled_from(LOSSES),
    normalisation=st.sampled_from(["per_rollout", "per_call", "token_mean"]),
    rng=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_neither_layout_nor_cuts_nor_order_change_the_gradient(
    learners: dict[str, TorchLearner],
    calls: list[Transition],
    layout: Layout,
    budget: int,
    loss: Loss,
    normalisation: mdp.Normalisation,
    rng: random.Random,
) -> None:
    samples = mdp.samples(mdp.weigh(calls, normalisation))
    reference = gradient_of(learners["calls"], samples, loss)
    learners[layout].micro_batch_tokens = budget
    found = gradient_of(learners[layout], rng.sample(samples, len(samples)), loss)
    # Samples whose gradients cancel leave less than float32 keeps of either.
    size = sum(float(gradient_of(learners["calls"], [one], loss).norm()) for one in samples)
    assert float((found - reference).norm()) <= 1e-5 * max(float(reference.norm()), 0.1 * size)


@pytest.mark.slow
def test_a_row_of_four_thousand_positions_has_the_gradient_of_its_calls(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tied=False, context=8192)
    rng = random.Random(0)
    prompt = [rng.randrange(1, VOCABULARY) for _ in range(3000)]
    calls = [sample(prompt, [rng.randrange(1, VOCABULARY) for _ in range(250)]) for _ in range(4)]
    (batch,) = micro_batches(calls, budget=8192, layout="packed")
    assert 3990 <= batch.input_ids_B_T.shape[1] <= 4000
    reference = gradient(tmp_path, calls, layout="calls", micro_batch_tokens=1)
    assert relative(gradient(tmp_path, calls, layout="packed"), reference) < 1e-5


def test_a_model_says_the_same_with_blocks_as_with_masks(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU FlexAttention has no backward pass, and is not compiled; this shows that the model takes the blocks."""
    calls = mdp.samples(rich_transitions(VOCABULARY))
    found = []
    for is_flex in (False, True):
        for module in (batching, logprobs):
            monkeypatch.setattr(module, "uses_blocks", lambda model, is_flex=is_flex: is_flex)
        learner = TorchLearner(layout="packed")
        with torch.compiler.set_stance("force_eager"):
            learner.open([POLICY], str(checkpoint), seed=0)
            found.append([value for one in learner.logprobs("sql", calls) for value in one])
        assert learner._trainees["sql"].model.config._attn_implementation == "sdpa"
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[1] != found[0]  # another kernel, other last bits


# ---- on CUDA ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [1, 200, 8192])
def test_flex_attention_gives_the_gradient_of_the_calls(checkpoint: Path, budget: int) -> None:
    calls = mdp.samples(mdp.weigh(rich_transitions(VOCABULARY, temperatures=(1.0, 0.7)), "per_rollout"))
    reference = gradient(checkpoint, calls, layout="calls")
    found = gradient(checkpoint, calls, layout="packed", device="cuda", micro_batch_tokens=budget)
    assert relative(found.cpu(), reference) < 1e-4


@pytest.mark.gpu
def test_long_rows_on_cuda_have_the_gradient_of_their_calls(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tied=False, context=8192)
    rng = random.Random(0)
    prompt = [rng.randrange(1, VOCABULARY) for _ in range(4000)]
    calls = [sample(prompt, [rng.randrange(1, VOCABULARY) for _ in range(250)]) for _ in range(8)]
    reference = gradient(tmp_path, calls, layout="calls", device="cuda", micro_batch_tokens=1)
    assert relative(gradient(tmp_path, calls, layout="packed", device="cuda"), reference) < 1e-4


# ---- refusals --------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_packed_is_merged_or_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tied=False, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    learner = TorchLearner()
    learner.open([POLICY], str(tmp_path), seed=0)
    assert learner._trainees["sql"].layout == "merged"
    with pytest.raises(ConfigurationError, match=r"layout='packed'.*Qwen3ForCausalLM.*use layout='auto' or 'merged'"):
        TorchLearner(layout="packed").open([POLICY], str(tmp_path), seed=0)


def test_a_model_without_attention_is_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    calls = [sample([1, 2, 3], [4, number]) for number in range(3)]
    found = {layout: TorchLearner(layout=layout) for layout in ("calls", "auto")}
    for learner in found.values():
        learner.open([POLICY], str(tmp_path), seed=0)
    assert found["auto"]._trainees["sql"].layout == "merged"
    reference = gradient_of(found["calls"], calls)
    assert relative(gradient_of(found["auto"], calls), reference) < 1e-5


def test_what_auto_may_do_is_checked_at_start_even_where_it_would_not(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for a model that does not honour masks."""

    def everything(seen_until_B_T: Tensor, dtype: torch.dtype) -> Tensor:
        count, length = seen_until_B_T.shape
        return torch.zeros(count, 1, length, length, dtype=dtype)

    monkeypatch.setattr(logprobs, "additive_mask", everything)
    monkeypatch.setattr(torch_learner, "attention_of", lambda model: Attention(pair_cost=1e9, mask_entries=10**6))
    TorchLearner(layout="merged").open([POLICY], str(checkpoint), seed=0)
    with pytest.raises(ConfigurationError, match=r"other log-probabilities.*TorchLearner\(layout='merged'\)"):
        TorchLearner(layout="auto").open([POLICY], str(checkpoint), seed=0)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="layout='tree' is unknown"):
        TorchLearner(layout="tree")  # type: ignore[arg-type]  # wrong on purpose
