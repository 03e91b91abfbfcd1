"""Intervals of held-out figures, against closed forms."""

import math
import random

import pytest

from leyden.training.evaluation import Evaluation, bootstrap


def test_the_interval_of_a_proportion_is_close_to_the_normal_approximation():
    values = [1.0] * 130 + [0.0] * 70
    estimate = bootstrap(values)
    half = 1.96 * math.sqrt(0.65 * 0.35 / 200)
    assert estimate.mean == pytest.approx(0.65)
    assert estimate.low == pytest.approx(0.65 - half, abs=0.012)
    assert estimate.high == pytest.approx(0.65 + half, abs=0.012)


def test_no_values_give_nan_and_equal_values_give_a_point():
    assert math.isnan(bootstrap([]).mean)
    assert (bootstrap([0.5] * 9).low, bootstrap([0.5] * 9).high) == (0.5, 0.5)


def test_the_gain_is_paired_by_task():
    rng = random.Random(0)
    old = {f"v{i}": rng.random() for i in range(100)}
    before = Evaluation(step=0, values={"reward": old}, failures=0)
    after = Evaluation(step=1, values={"reward": {task: value + 0.1 for task, value in old.items()}}, failures=0)
    gain = after.gain_over(before)
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))
