"""The layouts of a batch: who lies where, what it costs, who sees whom, and that the gradient is the same."""

import random
from collections import Counter
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

from leyden import mdp
from leyden.errors import ConfigurationError
from leyden.interfaces import Loss, Objective, Sample, Transition
from leyden.layouts import Attention, Layout, Row, lay_out, merged, one_row_a_call, packed
from leyden_plugins.learners.torch import TorchLearner
from leyden_plugins.learners.torch.batching import STRETCH, MicroBatch, attention_of, micro_batches
from leyden_plugins.torch_models.loading import load_model
from leyden_plugins.torch_models.tree_masks import BLOCK, additive_mask, block_mask, mask_mod
from tests.learning.builders import POLICY, context, rich_transitions, sample, transition
from tests.learning.conftest import VOCABULARY, write_checkpoint

CLIP = Loss(name="policy_gradient_clip", options={"clip_low": 0.2, "clip_high": 0.2})
LOSSES = (CLIP, Loss(name="gspo", options={"clip_low": 0.2, "clip_high": 0.2}), Loss(name="cross_entropy"))
NORMALISATIONS = get_args(mdp.Normalisation)
FREE = Attention(pair_cost=0.0, mask_entries=None)
"""Attention costs nothing, so that positions alone count."""
MASKS = Attention(pair_cost=0.0, mask_entries=10**6)


def tokens(rows: Sequence[Row]) -> list[list[int]]:
    return [list(row.token_ids) for row in rows]


def cost(row: Row, attention: Attention) -> float:
    """Count what a row costs, pair by pair."""
    length = len(row.token_ids)
    if row.seen_until is None:
        return length + attention.pair_cost * length * (length + 1) / 2
    seen = sum(until - place for place, until in enumerate(row.seen_until))
    return length + attention.pair_cost * (seen if attention.mask_entries is None else length**2)


@st.composite
def conversations(draw: st.DrawFn) -> list[Transition]:
    """Draw groups of rollouts: interleaved roles, branches, retries that say the same, and new beginnings."""
    found: list[Transition] = []
    some = st.lists(st.integers(1, 4), min_size=1, max_size=4)
    for group in range(draw(st.integers(1, 2))):
        opening = draw(some)
        for number in range(draw(st.integers(1, 3))):
            contexts = [opening]
            for turn in range(draw(st.integers(1, 4))):
                prompt = draw(st.sampled_from(contexts)) + draw(st.just([]) | some)
                answer = draw(some)
                contexts.append(prompt + answer)
                found.append(
                    transition(
                        prompt=prompt,
                        tokens=answer,
                        logprobs=[draw(st.floats(-4, -1)) for _ in answer],
                        rollout_id=f"r{group}-{number}",
                        group_id=f"g{group}",
                        role=draw(st.sampled_from(["writer", "rewriter"])),
                        span_id=f"s{group}-{number}-{turn}",
                        temperature=draw(st.sampled_from([1.0, 0.7])),
                        advantage=draw(st.floats(0.5, 2)) * draw(st.sampled_from([1, -1])),
                    )
                )
    return found


ATTENTIONS = st.builds(
    Attention, pair_cost=st.sampled_from([0.0, 0.01, 0.1, 1.0]), mask_entries=st.sampled_from([None, 100, 10_000])
)


# ---- rows ------------------------------------------------------------------------------------------------------


def test_a_conversation_of_turns_becomes_one_row() -> None:
    turns = [sample([1], [2, 3]), sample([1, 2, 3, 4], [5]), sample([1, 2, 3, 4, 5, 6], [7])]
    (row,) = merged(turns)
    assert row.token_ids == [1, 2, 3, 4, 5, 6, 7]
    assert {index: list(places) for index, places in row.samples.items()} == {0: [0, 1], 1: [3], 2: [5]}
    assert tokens(one_row_a_call(turns)) == [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]]


def test_a_broken_prefix_starts_a_row_of_its_own() -> None:
    assert tokens(merged([sample([1], [2, 3]), sample([1, 2, 9], [5])])) == [[1, 2, 3], [1, 2, 9, 5]]


def test_answers_that_repeat_or_overlap_stand_in_one_row_and_are_trained_each() -> None:
    calls = [sample([1], [2, 3]), sample([1], [2, 3]), sample([1, 2], [3, 4]), sample([1, 2, 3], [4], temperature=0.5)]
    (row,) = merged(calls)
    assert row.token_ids == [1, 2, 3, 4]
    assert {index: list(places) for index, places in row.samples.items()} == {0: [0, 1], 1: [0, 1], 2: [1, 2], 3: [2]}


def test_a_packed_row_holds_the_tree_depth_first() -> None:
    calls = [sample([1, 2], [3, 4]), sample([1, 2], [3, 5]), sample([1, 2], [6])]
    (row,) = packed(calls, FREE, longest=100)
    assert row.token_ids == [1, 2, 3, 4, 5, 6]
    assert row.position_ids == [0, 1, 2, 3, 3, 2]
    assert row.seen_until == [6, 6, 5, 4, 5, 6]
    assert row.samples == {0: [1, 2], 1: [1, 2], 2: [1]}


@given(conversations(), st.sampled_from(get_args(Layout)), ATTENTIONS, st.integers(1, 40))
def test_each_token_is_trained_once_and_in_its_own_context(
    calls: list[Transition], layout: Layout, attention: Attention, longest: int
) -> None:
    samples = mdp.samples(calls)
    trained: Counter[int] = Counter()
    for row in lay_out(samples, layout, attention, longest=longest):
        assert len(row.token_ids) == len(row.position_ids)
        for index, places in row.samples.items():
            trained[index] += 1
            one = samples[index]
            assert len(places) == len(one.token_ids)
            for number, place in enumerate(places):
                assert context(row, place) == (*one.prompt_token_ids, *one.token_ids[:number])
    assert trained == Counter(range(len(samples)))


@given(conversations(), st.sampled_from(["merged", "packed", "auto"]), ATTENTIONS, st.randoms(use_true_random=False))
def test_the_order_of_samples_changes_no_row(
    calls: list[Transition], layout: Layout, attention: Attention, rng: random.Random
) -> None:
    samples = mdp.samples(calls)
    shuffled = rng.sample(samples, len(samples))
    first, second = (lay_out(every, layout, attention, longest=40) for every in (samples, shuffled))
    assert [(row.token_ids, row.position_ids, row.seen_until) for row in first] == [
        (row.token_ids, row.position_ids, row.seen_until) for row in second
    ]


@given(conversations())
def test_merged_rows_hold_no_more_tokens_than_calls_and_packed_ones_each_node_once(calls: list[Transition]) -> None:
    samples = mdp.samples(calls)
    by_call, in_rows, in_packs = (
        sum(len(row.token_ids) for row in rows)
        for rows in (one_row_a_call(samples), merged(samples), packed(samples, FREE, longest=10**6))
    )
    whole = [(*one.prompt_token_ids, *one.token_ids) for one in samples]
    nodes = len({one[:length] for one in whole for length in range(1, len(one) + 1)})
    assert nodes == in_packs <= in_rows <= by_call


# ---- cost ------------------------------------------------------------------------------------------------------


def test_paths_share_a_row_when_that_costs_less() -> None:
    group = [sample([1] * 20, [2, number]) for number in range(8)]
    assert [len(row.samples) for row in packed(group, Attention(pair_cost=0.001, mask_entries=10**6), longest=99)] == [
        8
    ]
    assert [len(row.samples) for row in packed(group, Attention(pair_cost=10.0, mask_entries=10**6), longest=99)] == [
        1
    ] * 8
    strangers = [sample([number] * 20, [2]) for number in range(4)]
    assert [len(row.samples) for row in packed(strangers, FREE, longest=999)] == [1] * 4


def test_a_short_common_prefix_of_long_rows_is_not_worth_their_mask() -> None:
    calls = [sample([1] * 10 + [number] * 2000, [2]) for number in (3, 4)]
    masks, blocks = (Attention(pair_cost=1e-3, mask_entries=entries) for entries in (10**8, None))
    assert len(lay_out(calls, "auto", masks, longest=8192)) == 2
    assert len(lay_out(calls, "auto", blocks, longest=8192)) == 1
    assert len(lay_out(calls, "packed", masks, longest=8192)) == 1


@given(conversations(), ATTENTIONS, st.integers(1, 40))
@settings(max_examples=200)
def test_auto_is_the_cheapest_way_to_cut_the_leaves_into_runs(
    calls: list[Transition], attention: Attention, longest: int
) -> None:
    samples = mdp.samples(calls)
    leaves = merged(samples)
    bound = longest if attention.mask_entries is None else min(longest, int(attention.mask_entries**0.5))

    def run(first: int, end: int) -> Row | None:
        """Return the row of some leaves, all their common tokens shared; `None` where that is not allowed."""
        chosen = [index for row in leaves[first:end] for index in row.samples]
        rows = packed([samples[index] for index in chosen], FREE, longest=10**6)
        return rows[0] if len(rows) == 1 and (end - first == 1 or len(rows[0].token_ids) <= bound) else None

    cheapest = [0.0]  # of the first so many leaves
    for end in range(1, len(leaves) + 1):
        costs = [(cheapest[first], run(first, end)) for first in range(end)]
        cheapest.append(min(before + cost(row, attention) for before, row in costs if row is not None))
    found = lay_out(samples, "auto", attention, longest=longest)
    assert sum(cost(row, attention) for row in found) == pytest.approx(cheapest[-1])
    others: tuple[Layout, ...] = ("calls", "merged", "packed")
    for other in others:
        rows = lay_out(samples, other, attention, longest=longest)
        assert sum(cost(row, attention) for row in rows) >= cheapest[-1] - 1e-6


def test_rows_that_share_are_bounded_and_longer_paths_go_alone() -> None:
    calls = [sample([1] * 50, [number] * 10) for number in range(2, 12)]
    for attention, longest in ((FREE, 100), (Attention(pair_cost=0.0, mask_entries=100 * 100), 10**6)):
        assert [len(row.token_ids) for row in packed(calls, attention, longest=longest)] == [100, 100]
    assert [len(row.token_ids) for row in packed(calls, FREE, longest=59)] == [60] * 10


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
    assert float((found - reference).norm()) < 1e-5 * max(float(reference.norm()), 0.1 * size)


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
    with pytest.raises(ConfigurationError, match="layout='packed'.*Qwen3ForCausalLM.*use layout='auto' or 'merged'"):
        TorchLearner(layout="packed").open([POLICY], str(tmp_path), seed=0)


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="layout='tree' is unknown"):
        TorchLearner(layout="tree")  # type: ignore[arg-type]  # wrong on purpose
