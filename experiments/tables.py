"""Markdown tables from the rows of results.csv and cost.csv, for compare.py.

Means are over n seeds, with 95% bootstrap intervals over seeds. With so few seeds the intervals are rough. Runs of one
seed share their base and their prompts, so the difference between two methods is taken seed by seed.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.evaluation import bootstrap


def interval(values: list[float], digits: int = 3, sign: str = "") -> str:
    """Mean and 95% bootstrap interval over seeds. One seed has no interval."""

    def shown(value):
        return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no "-0.000"

    if len(values) == 1:
        return shown(values[0])
    low, high = bootstrap(torch.tensor(values, dtype=torch.float32))
    return f"{shown(statistics.fmean(values))} [{shown(low)}, {shown(high)}]"


def first_time(values: list[float | None], scale: float = 1) -> str:
    """Steps or tokens until something happened. It may not have happened in every run."""
    reached = [v / scale for v in values if v is not None]
    if not reached:
        return "never"
    return interval(reached, 0) + (f" ({len(reached)} of {len(values)} runs)" if len(reached) < len(values) else "")


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines)) + "\n"


def report(rows: list[dict], costs: list[dict], tokens: int) -> str:
    """All tables, as tables.md and quick.md hold them, from the rows of results.csv and cost.csv."""
    text = f"Means over n seeds, with 95% bootstrap intervals; {tokens:,} sampled tokens a run.\n\n"
    text += "".join(tables(rows, question) for question in dict.fromkeys(row["question"] for row in rows))
    if costs:
        lines = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in costs]
        text += "### cost, easy\n\n" + markdown(list(costs[0]), lines)
    return text


def tables(rows: list[dict], question: str) -> str:
    """A question's tables: mean@k in all settings, if there are several, then each setting in detail."""
    settings: dict[str, dict[str, list[dict]]] = {}  # the runs of each line of a table
    for row in rows:
        if row["question"] == question:
            label = f"{row['method']} {row['variant']}".replace("weight_temperature", "P").strip()
            settings.setdefault(row["setting"], {}).setdefault(label, []).append(row)
    k = max(int(key.rpartition("@")[2]) for row in rows for key in row if key.startswith("after pass@"))
    mean, text = f"after mean@{k}", ""
    if len(settings) > 1:
        lines = [
            [label, *(interval([r[mean] for r in runs[label]]) if label in runs else "" for runs in settings.values())]
            for label in dict.fromkeys(label for runs in settings.values() for label in runs)
        ]
        text += f"### {question}: mean@{k}\n\n" + markdown(["run", *settings], lines)
    for setting, runs in settings.items():
        reference = next(iter(runs))
        base = {row["seed"]: row[mean] for row in runs[reference]}
        lines, passes, entropies = [], [], []
        ks = [key.removeprefix("after ") for key in rows[0] if key.startswith("after pass@")]
        for label, some in runs.items():
            gain = [row[mean] - base[row["seed"]] for row in some if row["seed"] in base]

            def column(key, some=some):
                return [row[key] for row in some]

            versus = interval(gain, sign="+") if gain and label != reference else ""
            speed = [first_time(column("steps to 0.8")), first_time(column("tokens to 0.8"), 1000)]
            shape = [interval(column("after length"), 1), interval(column("entropy last"))]
            lines.append([label, str(len(some)), interval(column(mean)), versus, *speed, *shape])
            passes.append([label, *(f"{statistics.fmean(column('after ' + key)):.3f}" for key in ks)])
            keys = ("entropy first", "entropy lowest", "entropy last", "rebound")
            entropies.append([label, *(interval(column(key), 2 if key == "rebound" else 3) for key in keys)])
        compared = f"against {reference}, by seed"
        header = ["run", "n", f"mean@{k}", compared, "steps to 0.8", "1,000 tokens to 0.8", "length", "last entropy"]
        text += f"### {question}, {setting}\n\n" + markdown(header, lines)
        if question == "methods":
            before = (f"{statistics.fmean(row['before ' + key] for row in runs[reference]):.3f}" for key in ks)
            text += markdown(["run", *ks], [["before", *before], *passes])
            text += markdown(["run", "first entropy", "lowest", "last", "rebound"], entropies)
    return text
