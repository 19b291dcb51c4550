"""Accuracy, pass@k and their intervals."""

import io
import itertools
import math
import sys

import pytest
import torch
import tqdm.std
from helpers import T, rollout_of

from harness import reporting


def test_pass_at_k_counts_the_draws_with_a_right_one():
    for n, n_right, k in itertools.product([5], range(6), range(1, 6)):
        draws = list(itertools.combinations([True] * n_right + [False] * (n - n_right), k))
        assert reporting.pass_at_k(n, n_right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_an_evaluation_holds_the_means_of_its_problems_and_the_length_of_the_samples(loaded):
    greedy = rollout_of(*loaded, Q=3, G=1)
    sampled = rollout_of(*loaded, Q=3, G=4)
    greedy.rewards = torch.tensor([1.0, 0, 1])
    sampled.rewards = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    sampled.finished = torch.tensor([True] * 9 + [False] * 3)
    result = reporting.evaluate(greedy, sampled, 4)
    assert result["greedy"] == pytest.approx(2 / 3) and result["mean@4"] == pytest.approx(0.5)
    assert [result[f"pass@{k}"] for k in (1, 2, 4)] == pytest.approx([0.5, (5 / 6 + 0 + 1) / 3, 2 / 3])
    assert "pass@8" not in result
    low, high = result["mean@4_ci"]
    assert 0 <= low < 0.5 < high <= 1
    assert result["truncated"] == pytest.approx(0.25)
    assert result["length"] == pytest.approx(float(sampled.mask.sum() / 12))
    assert result["length"] != pytest.approx(float(greedy.mask.sum() / 3)) and 1 < result["length"] <= T


def test_bootstrap_intervals_have_the_width_of_normal_ones_and_are_seeded():
    values = (torch.arange(400) % 4 == 0).float()
    low, high = reporting.bootstrap(values)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert low == pytest.approx(0.25 - half, abs=0.007) and high == pytest.approx(0.25 + half, abs=0.007)
    assert (low, high) == pytest.approx((0.21, 0.28756), abs=1e-5)  # as in all tables of results so far


@pytest.mark.parametrize("on_terminal", [True, False])
def test_progress_is_a_bar_that_goes_away_or_plain_lines_where_there_is_no_terminal(on_terminal, loaded, monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: on_terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stderr)
    clock = itertools.count(0, 40)
    monkeypatch.setattr(tqdm.std, "time", lambda: next(clock))  # each look at it is 40 seconds later
    with reporting.token_bar("evaluation", loaded[0]):
        rollout_of(*loaded)
    text = stderr.getvalue()
    assert "evaluation" in text and "tokens" in text
    assert ("\r" in text) == on_terminal


def test_a_quick_block_shows_no_progress(loaded, capsys):
    with reporting.token_bar("evaluation", loaded[0]):
        rollout_of(*loaded)
    assert capsys.readouterr().err == ""
    assert not loaded[0].base_model._forward_hooks
