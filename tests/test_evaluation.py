"""Accuracy, pass@k and their intervals."""

import itertools
import math

import pytest
import torch
from helpers import T, rollout_of

from harness import evaluation


def test_pass_at_k_counts_the_draws_with_a_right_one():
    for n, n_right, k in itertools.product([5], range(6), range(1, 6)):
        draws = list(itertools.combinations([True] * n_right + [False] * (n - n_right), k))
        assert evaluation.pass_at_k(n, n_right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_an_evaluation_holds_the_means_of_its_problems(loaded):
    greedy = rollout_of(*loaded, Q=3, G=1)
    sampled = rollout_of(*loaded, Q=3, G=4)
    greedy.rewards = torch.tensor([1.0, 0, 1])
    sampled.rewards = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    result = evaluation.evaluate(greedy, sampled, 4)
    assert result["greedy"] == pytest.approx(2 / 3) and result["mean@4"] == pytest.approx(0.5)
    assert [result[f"pass@{k}"] for k in (1, 2, 4)] == pytest.approx([0.5, (5 / 6 + 0 + 1) / 3, 2 / 3])
    assert "pass@8" not in result
    low, high = result["mean@4_ci"]
    assert 0 <= low < 0.5 < high <= 1


def test_length_and_truncation_are_those_of_the_samples(loaded):
    greedy = rollout_of(*loaded, Q=3, G=1)
    sampled = rollout_of(*loaded, Q=3, G=4)
    sampled.finished = torch.tensor([True] * 9 + [False] * 3)
    result = evaluation.evaluate(greedy, sampled, 4)
    assert result["truncated"] == pytest.approx(0.25)
    assert result["length"] == pytest.approx(float(sampled.mask.sum() / 12))
    assert result["length"] != pytest.approx(float(greedy.mask.sum() / 3)) and 1 < result["length"] <= T


def test_bootstrap_intervals_have_the_width_of_normal_ones_and_are_seeded():
    values = (torch.arange(400) % 4 == 0).float()
    low, high = evaluation.bootstrap(values)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.007) and high == pytest.approx(0.25 + half, abs=0.007)
    assert (low, high) == pytest.approx((0.21, 0.28756), abs=1e-5)  # as in all tables of results so far
