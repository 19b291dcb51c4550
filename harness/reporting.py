"""What a run says about itself: evaluations, warnings, progress, the closing table, curves, trackers such as wandb."""

import importlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import Rollout
from harness import distributed, files
from harness.options import fail, first_line

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


def mean_at_k(result: dict) -> tuple[float, list[float]]:
    """mean@k of an evaluation, whatever its k, with its interval."""
    name = next(name for name in result if name.startswith("mean@"))
    return result[name], result[name + "_ci"]


def best_of(evaluations: list[dict]) -> dict | None:
    """The evaluation with the highest mean@k after a step of training; None if there is none."""
    trained = [result for result in evaluations if result["step"] > 0]
    return max(trained, key=lambda result: mean_at_k(result)[0]) if trained else None


def read_evaluations(folder: Path, step: int) -> list[dict]:
    """The evaluations in a run's eval.json up to this step. Fails if it is damaged."""
    try:
        stored = json.loads((folder / "eval.json").read_text())
        evaluations = [result for result in list.copy(stored) if result["step"] <= step]
        for result in evaluations:
            mean_at_k(result)
    except (ValueError, TypeError, KeyError, StopIteration):
        fail(f"--resume {folder}: its eval.json is damaged; without this file the run goes on and evaluates again")
    return evaluations


# --- during and after a run -------------------------------------------------------------------------------------------


class Stream(io.TextIOWrapper):
    """Standard output or error that outlives its reader: after `| head -1` and a closed terminal it is silent."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self.silence()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self.silence()

    def silence(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def guard_streams() -> None:
    """From here on, no print ends the run: not for a reader that is gone, and not for a character that the terminal
    cannot show."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # not in a notebook or a test
            setattr(sys, name, Stream(
                stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            ))  # fmt: skip


def progress_bar(label: str, unit: str, **options: Any) -> Any:
    """A bar of tqdm on stderr, in process 0. Where there is no terminal: now and then a line, instead of one that is
    written again and again."""
    from tqdm import tqdm  # not above: a method's functions can be imported without it

    class Lines(tqdm):
        @staticmethod
        def status_printer(file):
            def write(text: str) -> None:
                if text.strip():
                    print(text.strip(), file=file, flush=True)

            return write

        def moveto(self, n: int) -> None:
            pass

    options |= dict(desc=label, unit=unit, disable=distributed.rank() > 0)
    if sys.stderr.isatty():
        return tqdm(**options)
    return Lines(**options, delay=60, mininterval=60, maxinterval=60, position=1, leave=False)


@contextmanager
def token_bar(label: str, model) -> Iterator[None]:
    """Shows how many tokens run through the model inside this block, and how fast, if it takes some seconds."""
    options = {"delay": 3, "leave": False} if sys.stderr.isatty() else {}
    with progress_bar(label, " tokens", unit_scale=True, **options) as bar:

        def count(decoder, args, inputs, output) -> None:
            bar.update(inputs["input_ids"].numel())

        hook = model.base_model.register_forward_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


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
    if len(history) >= 3 and all(metrics["frac_reward_zero_std"] >= 0.9 for metrics in history[-3:]):
        found["no_signal"] = (
            "in three steps, nine of ten groups or more had no different rewards, so hardly anything is learned; the "
            "problems are too hard or too easy (--dataset), or --group-size is too small"
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


def print_table(evaluations: list[dict], mark_best: bool = False) -> None:
    """Prints one line per evaluation, and below it the 95% intervals of the last one. Warns on stderr if the last one
    is worse than the best one by more than chance. mark_best: marks the line of the model in best/."""
    names = metric_names(evaluations)
    print("".join(name.rjust(11) for name in names))
    for result in evaluations:
        cells = [f"{result[name]:.4g}" if name in result else "" for name in names]
        mark = "  <- best/" if mark_best and result is best_of(evaluations) else ""
        print("".join(cell.rjust(11) for cell in cells) + mark)
    if evaluations:
        last = evaluations[-1]
        intervals = []
        for name in names:
            if name + "_ci" in last:
                low, high = last[name + "_ci"]
                intervals.append(f"{name} {low:.3f} to {high:.3f}")
        print("95% intervals of the last line:", ", ".join(intervals))
        best = max(evaluations, key=lambda result: mean_at_k(result)[0])
        last_mean, (_, last_high) = mean_at_k(last)
        best_mean, (best_low, _) = mean_at_k(best)
        if last_mean < best_low and last_high < best_mean and distributed.rank() == 0:
            kept = "; best/ holds that model" if mark_best and best["step"] > 0 else ""
            print(f"warning: after step {last['step']} the model is worse than after step {best['step']}: mean@k "
                  f"{last_mean:.3f}, and {best_mean:.3f} there{kept}; a smaller --lr or fewer --steps help",
                  file=sys.stderr)  # fmt: skip


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


def tracker(name: str, folder: Path, config: dict) -> Callable[[dict], None]:
    """A function that sends the metrics of a step to the tracker of this name ("none": to nothing). Fails if the
    tracker cannot be started. What fails later is one warning, because a run is worth more than its log elsewhere."""
    if name == "none":
        return lambda metrics: None
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(folder / "tensorboard")

            def send(metrics: dict) -> None:
                for key, value in metrics.items():
                    writer.add_scalar(key, value, metrics["step"])
        else:
            library = importlib.import_module(name)  # wandb and trackio have the same two calls
            library.init(project="entropy-rl", name=folder.name, config=config)

            def send(metrics: dict) -> None:
                library.log(metrics, step=metrics["step"])
    except (Exception, SystemExit) as error:
        fail(f"--track {name}: {first_line(error)}")

    has_failed = False

    def track(metrics: dict) -> None:
        nonlocal has_failed
        try:
            send(metrics)
        except Exception as error:  # of any class; a network may be gone for a while
            if not has_failed:
                print(f"\nwarning: --track {name}: {first_line(error)}; the run goes on", file=sys.stderr)
            has_failed = True

    return track
