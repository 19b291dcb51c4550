"""Greedy accuracy, mean@k and pass@k of verified completions, with their intervals."""

import math

import torch
from torch import Tensor

from common import Rollout


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n completions, c of them correct, drawn without replacement, hold a correct one: the
    unbiased estimator of pass@k (Chen et al., arXiv 2107.03374)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap(values: Tensor, draws: int = 1000) -> tuple[float, float]:
    """95% interval of the mean of values [n], from `draws` samples of n of them with replacement; seeded."""
    picks = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def evaluate(greedy: Rollout, sampled: Rollout, k: int) -> dict[str, float | tuple[float, float]]:
    """Accuracy on one set of problems, from their verified completions: the most probable one, and k samples of each.

    greedy: share of problems whose most probable completion is right. mean@k: share of right ones among the samples.
    pass@j for j = 1, 2, 4 ... and k. Beside each of these NAME stands NAME_ci, its 95% bootstrap interval over
    problems. truncated: share of samples cut off at the limit. length: their mean, in tokens.
    """
    right = (sampled.rewards > 0.5).view(-1, k).sum(1).tolist()
    values = {"greedy": (greedy.rewards > 0.5).float().cpu(), f"mean@{k}": torch.tensor(right) / k}
    for j in sorted({k, *(2**i for i in range(k.bit_length()))}):
        values[f"pass@{j}"] = torch.tensor([pass_at_k(k, c, j) for c in right])
    result = {}
    for name, value in values.items():
        result |= {name: float(value.mean()), f"{name}_ci": bootstrap(value)}
    result["truncated"] = float((~sampled.finished).float().mean())
    result["length"] = float(sampled.lengths().mean())
    return result


def names(evaluations: list[dict]) -> list[str]:
    """What stands in any of them, in order and without the intervals. (They differ after a resume with another k.)"""
    return [name for name in dict.fromkeys(n for e in evaluations for n in e) if not name.endswith("_ci")]
