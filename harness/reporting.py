"""The closing table of a run, its curves, and trackers such as wandb."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import evaluation, files


def print_table(evaluations: list[dict]) -> None:
    """Prints one line per evaluation, and below it the 95% intervals of the last one."""
    names = evaluation.names(evaluations)
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
