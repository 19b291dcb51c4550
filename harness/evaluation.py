"""Greedy accuracy, mean@k and pass@k of verified completions, with their intervals."""

import math

import torch
from torch import Tensor

from common import Rollout


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """The probability that k of n completions, drawn without replacement, contain one of the n_right right ones: the
    unbiased estimator of pass@k (Chen et al., arXiv 2107.03374)."""
    return 1.0 - math.comb(n - n_right, k) / math.comb(n, k)


def bootstrap(values: Tensor, draws: int = 1000) -> tuple[float, float]:
    """95% interval of the mean of values [n], from the means of `draws` samples of n values, drawn with replacement.
    The draws are seeded: the same values give the same interval."""
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def evaluate(greedy: Rollout, sampled: Rollout, k: int) -> dict[str, float | tuple[float, float]]:
    """Accuracy on a set of problems, from verified completions: `greedy` holds the most probable one of each problem,
    `sampled` k samples of each.

    greedy: the share of problems whose most probable completion is right. mean@k: the share of right samples. pass@j
    for j = 1, 2, 4, ... and k: see pass_at_k. For each of these, NAME_ci is its 95% bootstrap interval over problems.
    truncated: the share of samples that were cut off at the limit. length: the mean of their tokens.
    """
    n_right = (sampled.rewards > 0.5).view(-1, k).sum(1).tolist()  # of each problem
    values = {"greedy": (greedy.rewards > 0.5).float().cpu(), f"mean@{k}": torch.tensor(n_right) / k}
    powers_of_two = [2**i for i in range(k.bit_length())]
    for j in sorted({k, *powers_of_two}):
        values[f"pass@{j}"] = torch.tensor([pass_at_k(k, n, j) for n in n_right])
    result: dict[str, float | tuple[float, float]] = {}
    for name, value in values.items():
        result[name] = float(value.mean())
        result[f"{name}_ci"] = bootstrap(value)
    result["truncated"] = float((~sampled.finished).float().mean())
    result["length"] = float(sampled.completion_lengths().mean())
    return result


def names(evaluations: list[dict]) -> list[str]:
    """The names of all numbers in these evaluations, in order, without the intervals. (A run that was resumed with
    another --eval-k has evaluations with different names.)"""
    all_names = [name for result in evaluations for name in result if not name.endswith("_ci")]
    return list(dict.fromkeys(all_names))
