"""What a run says about itself: evaluations, warnings, the closing table, curves, and trackers such as wandb."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import Rollout
from harness import files

# --- evaluation -------------------------------------------------------------------------------------------------------


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


def metric_names(evaluations: list[dict]) -> list[str]:
    """The names of all numbers in these evaluations, in order, without the intervals. (A run that was resumed with
    another --eval-k has evaluations with different names.)"""
    all_names = [name for result in evaluations for name in result if not name.endswith("_ci")]
    return list(dict.fromkeys(all_names))


# --- during and after a run -------------------------------------------------------------------------------------------


def warnings(history: list[dict[str, Any]]) -> dict[str, str]:
    """What is wrong after the last of these steps, as {name: line}. history: the metrics of all steps so far.

    An earlier warning is in the metrics of its step as warning/<name>. The same warning is not given twice.
    """
    first = history[0]
    last = history[-1]
    found = {}
    if last["completions/clipped_ratio"] > 0.3:
        share = last["completions/clipped_ratio"]
        found["cut_off"] = f"{share:.0%} of the completions were cut off; a larger --max-new-tokens gives them room"
    if len(history) >= 3 and all(metrics["frac_reward_zero_std"] == 1 for metrics in history[-3:]):
        found["no_signal"] = (
            "no group had different rewards in three steps, so nothing is learned; the problems are too hard or too "
            "easy (--dataset), or --group-size is too small"
        )
    if last["reward/parse_failed"] > 0.5:
        share = last["reward/parse_failed"]
        found["unreadable"] = (
            f"{share:.0%} of the completions state no readable answer; --system or --prompt-template can ask for the "
            "answer in \\boxed{}"
        )
    if last["entropy"] < 0.01 * first["entropy"]:
        found["no_entropy"] = (
            f"the entropy has fallen from {first['entropy']:.2g} to {last['entropy']:.2g} nats, so samples hardly "
            "differ; a smaller --lr or fewer --steps keep more of it"
        )
    given = {name.removeprefix("warning/") for metrics in history for name in metrics if name.startswith("warning/")}
    return {name: line for name, line in found.items() if name not in given}


def print_table(evaluations: list[dict]) -> None:
    """Prints one line per evaluation, and below it the 95% intervals of the last one."""
    names = metric_names(evaluations)
    print("".join(name.rjust(11) for name in names))
    for result in evaluations:
        cells = [f"{result[name]:.4g}" if name in result else "" for name in names]
        print("".join(cell.rjust(11) for cell in cells))
    if evaluations:
        last = evaluations[-1]
        intervals = []
        for name in names:
            if name + "_ci" in last:
                low, high = last[name + "_ci"]
                intervals.append(f"{name} {low:.3f} to {high:.3f}")
        print("95% intervals of the last line:", ", ".join(intervals))


def plot(folder: Path) -> None:
    """Draws reward, entropy and length over the steps of metrics.jsonl into curves.png, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not (folder / "metrics.jsonl").exists():
        return
    metrics = files.read_lines(folder / "metrics.jsonl")
    steps = [line["step"] for line in metrics]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3), layout="constrained")
    for axis, name in zip(axes, ("reward", "entropy", "completions/mean_length"), strict=True):
        axis.plot(steps, [line[name] for line in metrics])
        axis.set(title=name, xlabel="step")
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)


def tracker(name: str, folder: Path, config: dict) -> Callable[[dict], Any]:
    """A function that sends the metrics of a step to the tracker of this name ("none": to nothing)."""
    if name == "none":
        return lambda metrics: None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard")

        def write(metrics: dict) -> None:
            for key, value in metrics.items():
                writer.add_scalar(key, value, metrics["step"])

        return write
    library = importlib.import_module(name)  # wandb and trackio have the same two calls
    library.init(project="entropy-rl", name=folder.name, config=config)
    return lambda metrics: library.log(metrics, step=metrics["step"])
